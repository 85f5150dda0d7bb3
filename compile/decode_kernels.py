"""The decode plan on CUDA: few queries, each with its own choice among many keys.

One kernel scores block keys. In another, each program chooses a block by the scores and attends to
a part of it, and the last program of a query merges the parts. The number of launches and of
programs depends on shapes alone, and kernels read where the keys of a cache lie, so that a CUDA
graph holds a step while lengths grow.

A *list* is one key/value head of one row of the batch; its *rows* are `(head in group) * Q +
query`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_flex.compile.fused_kernels import _cap
from moba_flex.masks._torch.inputs import dense_vectors
from moba_flex.masks._torch.kernel_op import kernel_op, launch, power_of_2, wrap_triton
from moba_flex.masks.layout import Layout, ceil_div

MOST_ROWS = 64
"""Rows of a list that `decode_few_triton` takes."""
_TILE_KEYS = 64
_WARP_BYTES = 8192  # of a tile's keys
_TILE_PARTS = 32
_TILE_BLOCKS = 64
# Beyond any of these, a kernel of its own chooses blocks, rather than each program that attends.
_MOST_AFFINITIES = 1024
_MOST_PICKS = 16
_MOST_CHOOSING = 128  # rows
_SELECTED = 4096  # affinities that a program of that kernel holds

# The log-sum-exp of a part in which a row sees no key; that of infinite scores is -inf.
NO_KEYS = tl.constexpr(-3.4028234663852886e38)

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = [
    "num_heads", "group", "q_len", "kv_len", "num_blocks", "block_size", "picks", "tiles",
    "table_rows", "rows", "sink_blocks", "local_blocks", "numbers", "blocks_per_page",
    "page_size", "table_width",
]  # fmt: skip


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    row, rows, batch, query_ptr, start_ptr, stop_ptr, q_len, kv_len, block_size,
    CACHED: tl.constexpr, QUERY: tl.constexpr,
):  # fmt: skip
    """Return the first key's slot, the one behind the last key, and each row's slot and own block.

    The own block of a row that does not exist, or is padding, is -1.
    """
    first, stop = kv_len * 0, kv_len
    if CACHED:
        first, stop = tl.load(start_ptr + batch), tl.load(stop_ptr + batch)
    query = stop - q_len
    if QUERY:
        query = tl.load(query_ptr + batch)
    position = query + row % q_len
    real = (row < rows) & (position >= first) & (position < stop)
    return first, stop, position, tl.where(real, (position - first) // block_size, -1)


@triton.jit(do_not_specialize=_SIZES)
def score_kernel(  # type: ignore[no-untyped-def]
    q_ptr, block_keys_ptr, affinity_ptr, arrived_ptr, query_ptr, start_ptr, stop_ptr, table_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    num_heads, group, q_len, kv_len, num_blocks, block_size, rows, sink_blocks, local_blocks,
    blocks_per_page, table_width,
    CACHED: tl.constexpr, QUERY: tl.constexpr, PAGED: tl.constexpr, CAUSAL: tl.constexpr,
    FORCED: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the affinities of the rows of a list with a tile of blocks, as integers that sort so.

    The least integer stands for a block that a row cannot choose.
    """
    tiles = tl.cdiv(num_blocks, TILE)
    tile, index = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    num_lists_of_batch = num_heads // group
    batch = (index // num_lists_of_batch).to(tl.int64)
    kv_head = (index % num_lists_of_batch).to(tl.int64)
    row, dim, block = tl.arange(0, ROWS), tl.arange(0, D), tile * TILE + tl.arange(0, TILE)
    first, stop, _, own = _places(
        row, rows, batch, query_ptr, start_ptr, stop_ptr, q_len, kv_len, block_size, CACHED, QUERY
    )
    place = index.to(tl.int64) * rows + row
    if tile == 0:
        tl.store(arrived_ptr + place, tl.zeros([ROWS], tl.int32), mask=row < rows)
    if CAUSAL:
        newest = own - 1
    else:
        newest = tl.where(own >= 0, (stop - first + block_size - 1) // block_size - 1, -1)
    out_ptrs = affinity_ptr + place[:, None] * num_blocks + block[None, :]
    within = (row < rows)[:, None] & (block < num_blocks)[None, :]
    none = tl.full([ROWS, TILE], -0x80000000, tl.int32)
    last = tl.minimum(tl.max(newest, 0), num_blocks - 1)
    if tile * TILE <= last:
        head = kv_head * group + row // q_len
        q_ptr += batch * stride_qb
        q_ptrs = q_ptr + head[:, None] * stride_qh + (row % q_len)[:, None] * stride_qm
        exists = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
        q = tl.load(q_ptrs + dim[None, :], mask=exists, other=0.0)
        if PAGED:
            table_ptrs = table_ptr + batch * table_width + block // blocks_per_page
            page = tl.load(table_ptrs, mask=block <= last, other=0).to(tl.int64)
            offset = page * stride_kb + (block % blocks_per_page) * stride_kn
        else:
            offset = batch * stride_kb + block.to(tl.int64) * stride_kn
        key_ptrs = block_keys_ptr + kv_head * stride_kh + offset[None, :] + dim[:, None]
        exists = (block <= last)[None, :] & (dim < HEAD_DIM)[:, None]
        affinity = tl.dot(q, tl.load(key_ptrs, mask=exists, other=0.0), input_precision="ieee")
        largest = 3.4028234663852886e38
        affinity = tl.where(affinity == affinity, affinity, -largest)  # NaN counts as lowest
        affinity = tl.minimum(tl.maximum(affinity, -largest), largest)
        affinity = tl.where(affinity == 0.0, 0.0, affinity)  # -0.0 has other bits
        if FORCED:
            forced = (block < sink_blocks)[None, :]
            near = (block[None, :] < own[:, None]) & (
                block[None, :] >= own[:, None] - local_blocks
            )
            affinity = tl.where(forced | near, float("inf"), affinity)
        bits = affinity.to(tl.int32, bitcast=True)
        candidate = (block[None, :] <= newest[:, None]) & (block[None, :] != own[:, None])
        found = tl.where(candidate, bits ^ ((bits >> 31) & 0x7FFFFFFF), none)
        tl.store(out_ptrs, found, mask=within)
    else:
        tl.store(out_ptrs, none, mask=within)


@triton.jit
def _next_best(  # type: ignore[no-untyped-def]
    affinity, affinity_ptr, num_blocks, before, WHOLE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return the largest number below `before`: the affinity of a block, then the block.

    `affinity` holds the first `WIDTH` affinities of a row.
    """
    at = tl.arange(0, WIDTH)
    lowest = tl.full([1], -0x80000000, tl.int64) << 32
    key = (affinity.to(tl.int64) << 32) | at
    best = tl.max(tl.where(key < before, key, lowest), 0)
    if not WHOLE:
        for begin in range(WIDTH, num_blocks, WIDTH):
            block = begin + at
            mask = block < num_blocks
            more = tl.load(affinity_ptr + block, mask=mask, other=-0x80000000)
            key = (more.to(tl.int64) << 32) | block
            best = tl.maximum(best, tl.max(tl.where(key < before, key, lowest), 0))
    return best


@triton.jit
def _block_of(best):  # type: ignore[no-untyped-def]
    """Return the block in a number of `_next_best`, or -1 if a row cannot choose it."""
    return tl.where(best >> 32 != -0x80000000, best & 0x7FFFFFFF, -1).to(tl.int32)


@triton.jit
def _room(head_top_k_ptr, row, q_len, picks, numbers, BY_HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many blocks a row chooses beside its own."""
    if BY_HEAD:
        chosen = tl.load(head_top_k_ptr + row // q_len % numbers).to(tl.int32) - 1
        picks = tl.minimum(picks, chosen)
    return picks


@triton.jit(do_not_specialize=_SIZES)
def select_kernel(  # type: ignore[no-untyped-def]
    affinity_ptr, out_ptr, head_top_k_ptr, q_len, num_blocks, picks, numbers,
    BY_HEAD: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the best blocks of one row, best first; -1 for none."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    affinity_ptr += row * num_blocks
    room = _room(head_top_k_ptr, row, q_len, picks, numbers, BY_HEAD)
    affinity = tl.load(affinity_ptr + at, mask=at < num_blocks, other=-0x80000000)
    best = tl.max(tl.full([1], 0x7FFFFFFFFFFFFFFF, tl.int64), 0)
    for pick in range(picks):
        best = _next_best(affinity, affinity_ptr, num_blocks, best, WHOLE, WIDTH)
        tl.store(out_ptr + row * picks + pick, tl.where(pick < room, _block_of(best), -1))


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    row, part_ptr, part_lse_ptr, out_ptr, lse_ptr, parts,
    VALUE_DIM: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row, which other programs wrote."""
    value_dim = tl.arange(0, DV)
    part_ptr += row * parts * VALUE_DIM
    part_lse_ptr += row * parts
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    sees = tl.full([], 0, tl.int32)
    out = tl.zeros([DV], tl.float32)
    for at in range(0, parts, TILE):
        part = at + tl.arange(0, TILE)
        lse = tl.load(part_lse_ptr + part, mask=part < parts, other=NO_KEYS, cache_modifier=".cg")
        exists = lse != NO_KEYS
        sees = tl.maximum(sees, tl.max(exists.to(tl.int32), 0))
        lse = tl.where(exists, lse, -float("inf"))
        higher = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(lse - shift)
        decay = tl.exp2(top - shift)
        some = (part < parts)[:, None] & (value_dim < VALUE_DIM)[None, :]
        places = part[:, None] * VALUE_DIM + value_dim[None, :]
        value = tl.load(part_ptr + places, mask=some, other=0.0, cache_modifier=".cg")
        value = tl.where(exists[:, None], value, 0.0)  # what has no keys was not written
        out = out * decay + tl.sum(weight[:, None] * value, 0)
        total = total * decay + tl.sum(weight, 0)
        top = higher
    # The output of a row whose scores are all -inf is NaN.
    spoilt = (total == 0.0) & (sees > 0)
    total = tl.where(total == 0.0, 1.0, total)
    out = tl.where(spoilt, float("nan"), out / total)
    out_ptrs = out_ptr + row * VALUE_DIM + value_dim
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=value_dim < VALUE_DIM)
    tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)


@triton.jit(do_not_specialize=_SIZES)
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, blocks_ptr, affinity_ptr, head_top_k_ptr, query_ptr, start_ptr, stop_ptr,
    table_ptr, queries_ptr, extents_ptr, part_ptr, part_lse_ptr, arrived_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    num_heads, group, q_len, kv_len, num_blocks, block_size, picks, tiles, table_rows, rows,
    numbers, page_size, table_width, scale, cap,
    CHOOSE: tl.constexpr, BY_HEAD: tl.constexpr, WIDTH: tl.constexpr,
    CACHED: tl.constexpr, QUERY: tl.constexpr, PAGED: tl.constexpr, TABLES: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Attend from one row to up to `TILE` keys of a block that it chose; the last is its own.

    With `CHOOSE` it finds the block among the affinities of its row, else in a list of blocks.
    Rows of a list that chose the same block are neighbours, and find its keys in the L2 cache. The
    last program of a row merges what all wrote.
    """
    parts = (picks + 1) * tiles
    row, rest = tl.program_id(0) % rows, tl.program_id(0) // rows
    part, index = rest % parts, rest // parts
    choice, sub = part // tiles, part % tiles
    num_lists_of_batch = num_heads // group
    batch = (index // num_lists_of_batch).to(tl.int64)
    kv_head = (index % num_lists_of_batch).to(tl.int64)
    place = index.to(tl.int64) * rows + row
    key, dim, value_dim = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, DV)
    head = kv_head * group + row // q_len
    q_ptr += batch * stride_qb + head * stride_qh + row % q_len * stride_qm
    q = tl.load(q_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    chosen = picks * 0 - 1
    if choice < picks:
        if CHOOSE:
            at = tl.arange(0, WIDTH)
            affinity_ptr += place * num_blocks
            affinity = tl.load(affinity_ptr + at, mask=at < num_blocks, other=-0x80000000)
            best = tl.max(tl.full([1], 0x7FFFFFFFFFFFFFFF, tl.int64), 0)
            for _ in range(choice + 1):
                best = _next_best(affinity, affinity_ptr, num_blocks, best, True, WIDTH)
            room = _room(head_top_k_ptr, place, q_len, picks, numbers, BY_HEAD)
            chosen = tl.where(choice < room, _block_of(best), -1)
        else:
            chosen = tl.load(blocks_ptr + place * picks + choice)
    if TABLES:
        queries_ptr += batch % table_rows * q_len + row % q_len
        position, own = tl.load(queries_ptr), tl.load(queries_ptr + table_rows * q_len)
        first, stop = kv_len * 0, kv_len
    else:
        first, stop, position, own = _places(
            row, rows, batch, query_ptr, start_ptr, stop_ptr, q_len, kv_len, block_size, CACHED,
            QUERY,
        )  # fmt: skip
    block = tl.where(choice < picks, chosen, own)
    begin, end = kv_len * 0, kv_len * 0
    if (block >= 0) & (block < num_blocks):
        if TABLES:
            extents_ptr += batch % table_rows * num_blocks + block
            begin, end = tl.load(extents_ptr), tl.load(extents_ptr + table_rows * num_blocks)
        else:
            begin = first + block * block_size
            end = tl.minimum(begin + block_size, stop)
        if CAUSAL:
            end = tl.minimum(end, position + 1)
    begin += sub * TILE
    if begin < end:
        seen = key < end - begin
        where, slot = batch, begin.to(tl.int64)
        if PAGED:  # a page holds whole blocks
            where = tl.load(table_ptr + batch * table_width + begin // page_size).to(tl.int64)
            slot = slot % page_size
        k_ptr += where * stride_kb + kv_head * stride_kh + slot * stride_kn
        v_ptr += where * stride_vb + kv_head * stride_vh + slot * stride_vn
        k_ptrs = k_ptr + key[:, None] * stride_kn + dim[None, :]
        v_ptrs = v_ptr + key[:, None] * stride_vn + value_dim[None, :]
        k = tl.load(k_ptrs, mask=seen[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=seen[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        score = tl.sum(k.to(tl.float32) * q[None, :], 1)
        if SOFTCAP:
            score, _ = _cap(score, scale, cap, PRECISION)
        else:
            score *= scale
        score = tl.where(seen, score, -float("inf"))
        top = tl.max(score, 0)
        weight = tl.exp2(score - tl.where(top == -float("inf"), 0.0, top))
        total = tl.sum(weight, 0)
        nothing = total == 0.0
        total = tl.where(nothing, 1.0, total)
        out = tl.sum(weight[:, None] * v.to(tl.float32), 0) / total
        lse = tl.where(nothing, -float("inf"), top + tl.log2(total))
        into = part_ptr + (place * parts + part) * VALUE_DIM + value_dim
        tl.store(into, out, mask=value_dim < VALUE_DIM)
        tl.store(part_lse_ptr + place * parts + part, lse)
    else:
        tl.store(part_lse_ptr + place * parts + part, NO_KEYS)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(arrived_ptr + place, 1) == parts - 1:
        _merge(place, part_ptr, part_lse_ptr, out_ptr, lse_ptr, parts, VALUE_DIM, DV, PARTS)


@kernel_op("moba_flex::decode_triton")
def decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    queries: Tensor | None,
    extents: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Do what `decode_cpu` does."""
    layout = Layout(q.shape[2], k.shape[2], block_size, causal, queries, extents)
    choice = _Choice(blocks.contiguous(), blocks.shape[3])
    return _attend(q, k, v, choice, (None, None, None, None), layout, scale, softcap)


@kernel_op("moba_flex::decode_few_triton")
def decode_few_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_keys: Tensor,
    query: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    table: Tensor | None,
    numbers: Sequence[int],
    causal: bool,
    head_top_k: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Choose blocks and attend to them.

    A list has at most `MOST_ROWS` rows.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        block_keys: Mean keys, `[B, Hkv, N, D]`.
        query: Slot of the first query, int32 `[B]`; None if queries are the last of the keys.
        start: Slot of the first key, int32 `[B]`; None if `k` and `v` are no cache.
        stop: The slot after the last key, int32 `[B]`; None likewise.
        table: Page of each `page_size` slots of a row, int32 `[B, W]`. Then `k` and `v` are pages,
            `[P, Hkv, page_size, D]`, and `block_keys` are those of pages. None for rows in one
            piece.
        numbers: As of `choose_cpu`.
        causal: Whether a query sees only keys at its position and before.
        head_top_k: As of `choose_cpu`.
        scale: Factor on the scores.
        softcap: Soft cap of the scores; 0 for none.

    Returns:
        As `decode_cpu`.
    """
    picks, block_size, sink_blocks, local_blocks = numbers
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    if table is not None:
        kv_len *= table.shape[1]
    if head_top_k is not None:
        head_top_k = head_top_k.contiguous()
    places = tuple(x if x is None else x.contiguous() for x in (query, start, stop, table))
    layout = Layout(q_len, kv_len, block_size, causal)
    num_blocks = layout.num_blocks
    choice = _Choice(None, picks)
    if picks and q.numel():
        q, block_keys = dense_vectors(q, block_keys)
        rows = num_heads // num_kv_heads * q_len
        affinity = q.new_empty(batch * num_heads * q_len, num_blocks, dtype=torch.int32)
        arrived = affinity.new_empty(batch * num_heads * q_len)
        choice = _Choice(affinity, picks, head_top_k, arrived, chosen=False)
        launch(
            wrap_triton(score_kernel),
            (ceil_div(num_blocks, _TILE_BLOCKS) * batch * num_kv_heads,),
            *(q, block_keys, affinity, arrived, *(arrived if x is None else x for x in places)),
            *(stride for x in (q, block_keys) for stride in x.stride()[:3]),
            num_heads,
            num_heads // num_kv_heads,
            q_len,
            kv_len,
            num_blocks,
            block_size,
            rows,
            sink_blocks,
            local_blocks,
            block_keys.shape[2],
            1 if table is None else table.shape[1],
            CACHED=start is not None,
            QUERY=query is not None,
            PAGED=table is not None,
            CAUSAL=causal,
            FORCED=sink_blocks + local_blocks > 0,
            HEAD_DIM=head_dim,
            D=max(16, power_of_2(head_dim)),
            ROWS=max(16, power_of_2(rows)),
            TILE=_TILE_BLOCKS,
            num_warps=4,
        )
        cheap = num_blocks <= _MOST_AFFINITIES and picks <= _MOST_PICKS
        if not cheap or affinity.shape[0] > _MOST_CHOOSING:
            choice = _select(choice, q_len, num_blocks)
    return _attend(q, k, v, choice, places, layout, scale, softcap)


@dataclass
class _Choice:
    """What blocks the rows attend to.

    Attributes:
        numbers: Blocks of each row, or affinities to all blocks; None for the own block alone.
        picks: Blocks beside the own one.
        head_top_k: As of `choose_cpu`, if blocks are still to be chosen.
        arrived: Programs of each row that have attended, zeros at first.
        chosen: Whether `numbers` are blocks.
    """

    numbers: Tensor | None
    picks: int
    head_top_k: Tensor | None = None
    arrived: Tensor | None = None
    chosen: bool = True

    @property
    def by_head(self) -> tuple[bool, Tensor | None, int]:
        """Whether heads differ, their numbers, and how many there are."""
        x = self.head_top_k
        return x is not None, x, 1 if x is None else x.numel()


def _select(choice: _Choice, q_len: int, num_blocks: int) -> _Choice:
    """Choose blocks in a kernel of its own."""
    affinity = choice.numbers
    assert affinity is not None
    blocks = affinity.new_empty(affinity.shape[0], choice.picks)
    by_head, head_top_k, numbers = choice.by_head
    width = min(_SELECTED, power_of_2(num_blocks))
    launch(
        wrap_triton(select_kernel),
        (affinity.shape[0],),
        *(affinity, blocks, blocks if head_top_k is None else head_top_k),
        q_len,
        num_blocks,
        choice.picks,
        numbers,
        BY_HEAD=by_head,
        WHOLE=width >= num_blocks,
        WIDTH=width,
        num_warps=4 if width > 512 else 1,
    )
    return _Choice(blocks, choice.picks, arrived=choice.arrived)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: _Choice,
    places: tuple[Tensor | None, ...],
    layout: Layout,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend to own and chosen blocks, and merge; `places` are query, start, stop and table."""
    q, k, v = dense_vectors(q, k, v)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, value_dim = k.shape[1], v.shape[3]
    out = q.new_empty(batch, num_heads, q_len, value_dim)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tile = min(_TILE_KEYS, power_of_2(layout.block_size))
    tile_bytes = tile * max(head_dim, value_dim) * k.element_size()
    tiles = ceil_div(layout.block_size, tile)
    parts = (choice.picks + 1) * tiles
    part = q.new_empty(lse.numel(), parts, value_dim, dtype=torch.float32)
    part_lse = q.new_empty(lse.numel(), parts, dtype=torch.float32)
    arrived = choice.arrived
    if arrived is None:
        arrived = torch.zeros(lse.numel(), dtype=torch.int32, device=q.device)
    by_head, head_top_k, numbers = choice.by_head
    blocks, affinity = (choice.numbers, None) if choice.chosen else (None, choice.numbers)
    # Placeholders stand for what the kernel does not read.
    read = blocks, affinity, head_top_k, *places, layout.queries, layout.extents
    launch(
        wrap_triton(attend_kernel),
        (lse.numel() * parts,),
        *(q, k, v, *(arrived if x is None else x for x in read)),
        *(part, part_lse, arrived, out, lse),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        num_heads,
        num_heads // num_kv_heads,
        q_len,
        layout.kv_len,
        layout.num_blocks,
        layout.block_size,
        choice.picks,
        tiles,
        1 if layout.extents is None else layout.extents.shape[1],
        num_heads // num_kv_heads * q_len,
        numbers,
        k.shape[2],
        1 if places[3] is None else places[3].shape[1],
        scale / math.log(2),
        softcap / math.log(2),
        CHOOSE=affinity is not None,
        BY_HEAD=by_head,
        WIDTH=1 if affinity is None else power_of_2(affinity.shape[1]),
        CACHED=places[1] is not None,
        QUERY=places[0] is not None,
        PAGED=places[3] is not None,
        TABLES=layout.extents is not None,
        CAUSAL=layout.causal,
        SOFTCAP=softcap > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        HEAD_DIM=head_dim,
        D=power_of_2(head_dim),
        VALUE_DIM=value_dim,
        DV=power_of_2(value_dim),
        TILE=tile,
        PARTS=min(_TILE_PARTS, power_of_2(parts)),
        num_warps=min(8, power_of_2(max(1, tile_bytes // _WARP_BYTES))),
    )
    return out, lse
