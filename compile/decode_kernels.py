"""The decode plan on CUDA: few queries, each with its own choice among many keys.

A step is one launch. Some programs append new keys to a cache, some score block keys, some choose
blocks, and some attend to a part of a block; the last program of a query merges the parts. A
program waits, by counters in memory, for programs before it alone. A GPU starts programs in their
order, so that those have started, and none of them waits for a later one.

The number of programs depends on shapes alone, and kernels read where the keys of a cache lie, so
that a CUDA graph holds a step while lengths grow.

A *list* is one key/value head of one row of the batch; its *rows* are `(head in group) * Q +
query`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_flex.compile.fused_kernels import _cap
from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks._torch.inputs import dense_vectors
from moba_flex.masks._torch.kernel_op import kernel_op, launch, power_of_2, wrap_triton
from moba_flex.masks.append_kernel import append_block, blocks_touched, keys_ahead
from moba_flex.masks.layout import Layout, NewKeys, ceil_div

_TILE_KEYS = 64
_WARP_BYTES = 8192  # of a tile's keys
_TILE_PARTS = 32
# Beyond any of these, programs of their own choose blocks, rather than each that attends.
_MOST_AFFINITIES = 1024
_MOST_PICKS = 16
_MOST_CHOOSING = 128  # rows
# Such a program holds so many affinities at a time, and the best of each of so many lanes.
_HELD = 2048
_LANES = 256

# The log-sum-exp of a part in which a row sees no key; that of infinite scores is -inf.
NO_KEYS = tl.constexpr(-3.4028234663852886e38)
# An append adds this to the counter of a list; a tile of scores, or the choice of a row, adds 1.
_APPENDED = tl.constexpr(1 << 16)

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = [
    "num_heads", "group", "q_len", "kv_len", "num_blocks", "block_size", "picks", "tiles",
    "table_rows", "rows", "sink_blocks", "local_blocks", "numbers", "blocks_per_page",
    "page_size", "num_pages", "table_width", "lists", "touched", "score_tiles", "stride_counter",
]  # fmt: skip


@triton.jit
def _wait(counter_ptr, number):  # type: ignore[no-untyped-def]
    """Wait until other programs have raised a counter to a number."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < number:
        pass


@triton.jit
def _place(row, rows, query, first, stop, q_len, block_size):  # type: ignore[no-untyped-def]
    """Return each row's slot and own block: -1 for a row that does not exist, or is padding."""
    position = query + row % q_len
    real = (row < rows) & (position >= first) & (position < stop)
    return position, tl.where(real, (position - first) // block_size, -1)


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    q_ptr, block_keys_ptr, affinity_ptr, table_ptr, ready_ptr,
    stride_qb, stride_qh, stride_qm, stride_sb, stride_sh, stride_sn,
    batch, kv_head, index, tile, first, stop, own, fresh,
    group, q_len, num_blocks, block_size, rows, sink_blocks, local_blocks, blocks_per_page,
    table_width, touched,
    APPEND: tl.constexpr, PAGED: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr,
    AT_ONCE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the affinities of the rows of a list with a tile of blocks, as integers that sort so.

    The least integer stands for a block that a row cannot choose. Block keys change from block
    `fresh` on. With `AT_ONCE`, block keys are loaded before it is known which of them exist.
    """
    row, dim, block = tl.arange(0, ROWS), tl.arange(0, D), tile * TILE + tl.arange(0, TILE)
    place = index.to(tl.int64) * rows + row
    if CAUSAL:
        newest = own - 1
    else:
        newest = tl.where(own >= 0, (stop - first + block_size - 1) // block_size - 1, -1)
    out_ptrs = affinity_ptr + place[:, None] * num_blocks + block[None, :]
    within = (row < rows)[:, None] & (block < num_blocks)[None, :]
    none = tl.full([ROWS, TILE], -0x80000000, tl.int32)
    last = tl.minimum(tl.max(newest, 0), num_blocks - 1)
    head = kv_head * group + row // q_len
    q_ptr += batch * stride_qb
    q_ptrs = q_ptr + head[:, None] * stride_qh + (row % q_len)[:, None] * stride_qm
    exists = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptrs + dim[None, :], mask=exists, other=0.0)
    loaded = block < num_blocks if AT_ONCE else block <= last
    if PAGED:
        table_ptrs = table_ptr + batch * table_width + block // blocks_per_page
        page = tl.load(table_ptrs, mask=loaded, other=0).to(tl.int64)
        offset = page * stride_sb + (block % blocks_per_page) * stride_sn
    else:
        offset = batch * stride_sb + block.to(tl.int64) * stride_sn
    key_ptrs = block_keys_ptr + kv_head * stride_sh + offset[None, :] + dim[:, None]
    exists = loaded[None, :] & (dim < HEAD_DIM)[:, None]
    keys = tl.load(key_ptrs, mask=exists, other=0.0)
    if tile * TILE <= last:
        if APPEND:  # noqa: SIM102 (Triton would compile both conditions)
            if (fresh <= last) & (fresh < (tile + 1) * TILE):
                _wait(ready_ptr, touched * _APPENDED)
                keys = tl.load(key_ptrs, mask=exists, other=0.0)
        affinity = tl.dot(q, keys, input_precision="ieee")
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
def _find_best(affinity, number, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the affinity and the number of a row's block that `number - 1` others exceed.

    The later of two equal blocks exceeds the other.
    """
    # Maxima of 32-bit integers are single instructions of a warp.
    at = tl.arange(0, WIDTH)
    top, best = tl.full([], 0x7FFFFFFF, tl.int32), number * 0 + WIDTH
    for _ in range(number):
        top = tl.max(tl.where(affinity < top, affinity, -0x80000000), 0)
    if tl.sum((affinity >= top).to(tl.int32), 0) == number:
        best = tl.max(tl.where(affinity == top, at, -1), 0)
    else:  # some are equal: find one after the other
        top = tl.full([], 0x7FFFFFFF, tl.int32)
        for _ in range(number):
            left = (affinity < top) | ((affinity == top) & (at < best))
            top = tl.max(tl.where(left, affinity, -0x80000000), 0)
            best = tl.max(tl.where(left & (affinity == top), at, -1), 0)
    return top, best


@triton.jit
def _room(head_top_k_ptr, row, q_len, picks, numbers, BY_HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many blocks a row chooses beside its own."""
    if BY_HEAD:
        chosen = tl.load(head_top_k_ptr + row // q_len % numbers).to(tl.int32) - 1
        picks = tl.minimum(picks, chosen)
    return picks


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    affinity_ptr, blocks_ptr, head_top_k_ptr, row, q_len, num_blocks, picks, numbers,
    BY_HEAD: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the best blocks of one row, best first; -1 for none.

    A lane knows the best of the blocks whose number is its own modulo `WIDTH`.
    """
    lane, turn, depth = tl.arange(0, WIDTH), tl.arange(0, ROUNDS), tl.arange(0, DEPTH)
    affinity_ptr += row * num_blocks
    room = _room(head_top_k_ptr, row, q_len, picks, numbers, BY_HEAD)
    high = tl.full([WIDTH], -0x80000000, tl.int32)
    high_at = tl.full([WIDTH], -1, tl.int32)
    for begin in range(0, num_blocks, WIDTH * ROUNDS):
        block = begin + turn[:, None] * WIDTH + lane[None, :]
        some = tl.load(affinity_ptr + block, mask=block < num_blocks, other=-0x80000000)
        top = tl.max(some, 0)
        high_at = tl.where(
            top >= high, tl.max(tl.where(some == top[None, :], block, -1), 0), high_at
        )
        high = tl.maximum(high, top)
    for pick in range(picks):
        top = tl.max(high, 0)
        best = tl.max(tl.where(high == top, high_at, -1), 0)
        chosen = (pick < room) & (top != -0x80000000)
        tl.store(blocks_ptr + row * picks + pick, tl.where(chosen, best, -1))
        block = best % WIDTH + depth * WIDTH
        exists = (block >= 0) & (block < num_blocks)
        some = tl.load(affinity_ptr + block, mask=exists, other=-0x80000000)
        left = (some < top) | ((some == top) & (block < best))
        some = tl.where(left, some, -0x80000000)
        below = tl.max(some, 0)
        found = tl.max(tl.where(left & (some == below), block, -1), 0)
        high_at = tl.where(lane == best % WIDTH, found, high_at)
        high = tl.where(lane == best % WIDTH, below, high)


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


@triton.jit
def _attend_to_part(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, part_ptr, part_lse_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    batch, kv_head, begin, end, page_size, table_width, scale, cap,
    PAGED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Attend from one row to the keys in slots from `begin` to `end`, at most `TILE` of them."""
    key, dim, value_dim = tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, DV)
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
        q = tl.load(q_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
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
        tl.store(part_ptr + value_dim, out, mask=value_dim < VALUE_DIM)
        tl.store(part_lse_ptr, lse)
    else:
        tl.store(part_lse_ptr, NO_KEYS)


@triton.jit(do_not_specialize=_SIZES)
def decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, block_keys_ptr, blocks_ptr, affinity_ptr, head_top_k_ptr, query_ptr,
    start_ptr, stop_ptr, table_ptr, queries_ptr, extents_ptr, sums_ptr, new_k_ptr, new_v_ptr,
    counts_ptr, part_ptr, part_lse_ptr, counter_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_sb, stride_sh, stride_sn,
    stride_new_kb, stride_new_kh, stride_new_kn, stride_new_kd,
    stride_new_vb, stride_new_vh, stride_new_vn, stride_new_vd,
    num_heads, group, q_len, kv_len, num_blocks, block_size, picks, tiles, table_rows, rows,
    numbers, sink_blocks, local_blocks, blocks_per_page, page_size, num_pages, table_width,
    lists, touched, score_tiles, stride_counter, scale, cap,
    APPEND: tl.constexpr, COUNTS: tl.constexpr, SCORE: tl.constexpr, SELECT: tl.constexpr,
    FORCED: tl.constexpr, BY_HEAD: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr,
    DEPTH: tl.constexpr, AHEAD: tl.constexpr,
    CACHED: tl.constexpr, QUERY: tl.constexpr, PAGED: tl.constexpr, TABLES: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TILE_BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Append, score, choose and attend, by the number of the program.

    The first programs of a list append to one of `touched` blocks each, or score one of
    `score_tiles` tiles of blocks. With `SELECT`, the next choose the blocks of one row each. The
    next attend from one row to up to `TILE` keys of a block; the last block of a row is its own,
    and without `SELECT` these programs choose the others themselves, or find them in a list. The
    last of these that ends for a row merges its parts. The last programs of all, one for each row
    of the batch, set its counters to zero.

    The counters of a row of the batch are the number of its queries whose parts are written, then
    for each list what is appended, scored and chosen, then for each query the number of its
    programs that have ended.
    """
    program, prepare = tl.program_id(0), touched + score_tiles
    num_lists_of_batch, parts = num_heads // group, (picks + 1) * tiles
    before, selecting, attending = lists * prepare, lists * 0, lists * rows * parts
    if SELECT:
        selecting = lists * rows
    if program < before:
        index, tile = program // prepare, program % prepare - touched
    elif program < before + selecting:
        index, tile = (program - before) // rows, program * 0
    elif program < before + selecting + attending:
        index, tile = (program - before - selecting) // (rows * parts), program * 0
    else:
        index = (program - before - selecting - attending) * num_lists_of_batch
        tile = program * 0
    batch = (index // num_lists_of_batch).to(tl.int64)
    kv_head = (index % num_lists_of_batch).to(tl.int64)
    counter_ptr += batch * stride_counter
    ready_ptr, arrived_ptr = counter_ptr + 1 + kv_head, counter_ptr + 1 + num_lists_of_batch

    first, stop = kv_len * 0, kv_len
    if CACHED:
        first, stop = tl.load(start_ptr + batch), tl.load(stop_ptr + batch)
    low = stop  # the slot of the first new key
    if COUNTS:
        stop += tl.load(counts_ptr + batch)
    elif APPEND:
        stop += q_len
    query = stop - q_len
    if APPEND:  # the queries are those of the new keys
        query = low
    elif QUERY:
        query = tl.load(query_ptr + batch)

    if program < before:
        if tile < 0:
            if APPEND:
                append_block(
                    k_ptr, v_ptr, sums_ptr, block_keys_ptr, new_k_ptr, new_v_ptr, table_ptr,
                    stride_kb, stride_kh, stride_kn, 1, stride_vb, stride_vh, stride_vn, 1,
                    stride_new_kb, stride_new_kh, stride_new_kn, stride_new_kd,
                    stride_new_vb, stride_new_vh, stride_new_vn, stride_new_vd,
                    batch, kv_head, tile + touched, first, low, stop,
                    num_lists_of_batch, blocks_per_page, block_size, kv_len, page_size, num_pages,
                    table_width, PAGED, HEAD_DIM, D, VALUE_DIM, DV, AHEAD,
                )  # fmt: skip
        elif SCORE:
            _, own = _place(tl.arange(0, ROWS), rows, query, first, stop, q_len, block_size)
            _score(
                q_ptr, block_keys_ptr, affinity_ptr, table_ptr, ready_ptr,
                stride_qb, stride_qh, stride_qm, stride_sb, stride_sh, stride_sn,
                batch, kv_head, index, tile, first, stop, own, (low - first) // block_size,
                group, q_len, num_blocks, block_size, rows, sink_blocks, local_blocks,
                blocks_per_page, table_width, touched,
                APPEND, PAGED, CAUSAL, FORCED, not (SELECT or PAGED), HEAD_DIM, D, ROWS,
                TILE_BLOCKS,
            )  # fmt: skip
        tl.debug_barrier()  # all threads have written before one of them says so
        tl.atomic_add(ready_ptr, tl.where(tile < 0, _APPENDED, 1))
    elif program < before + selecting:
        if SELECT:
            _wait(ready_ptr, touched * _APPENDED + score_tiles)
            _select(
                affinity_ptr, blocks_ptr, head_top_k_ptr, (program - before).to(tl.int64), q_len,
                num_blocks, picks, numbers, BY_HEAD, WIDTH, ROUNDS, DEPTH,
            )  # fmt: skip
            tl.debug_barrier()
            tl.atomic_add(ready_ptr, 1)
    elif program < before + selecting + attending:
        row = (program - before - selecting) % rows
        part = (program - before - selecting) // rows % parts
        choice, turn = part // tiles, row % q_len
        if TABLES:
            queries_ptr += batch % table_rows * q_len + turn
            position, own = tl.load(queries_ptr), tl.load(queries_ptr + table_rows * q_len)
        else:
            position, own = _place(row, rows, query, first, stop, q_len, block_size)
        place, block = index.to(tl.int64) * rows + row, own
        if choice < picks:
            if SELECT:
                _wait(ready_ptr, touched * _APPENDED + score_tiles + rows)
            elif SCORE:
                _wait(ready_ptr, touched * _APPENDED + score_tiles)
            if SCORE and not SELECT:
                at = tl.arange(0, WIDTH)
                affinity_ptr += place * num_blocks
                affinity = tl.load(affinity_ptr + at, mask=at < num_blocks, other=-0x80000000)
                top, best = _find_best(affinity, choice + 1, WIDTH)
                room = _room(head_top_k_ptr, place, q_len, picks, numbers, BY_HEAD)
                block = tl.where((choice < room) & (top != -0x80000000), best, -1)
            else:
                block = tl.load(blocks_ptr + place * picks + choice)
        elif APPEND:
            _wait(ready_ptr, touched * _APPENDED)
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
        head = kv_head * group + row // q_len
        q_ptr += batch * stride_qb + head * stride_qh + turn * stride_qm
        _attend_to_part(
            q_ptr, k_ptr, v_ptr, table_ptr,
            part_ptr + (place * parts + part) * VALUE_DIM, part_lse_ptr + place * parts + part,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            batch, kv_head, begin + part % tiles * TILE, end, page_size, table_width, scale, cap,
            PAGED, SOFTCAP, PRECISION, HEAD_DIM, D, VALUE_DIM, DV, TILE,
        )  # fmt: skip
        tl.debug_barrier()
        arrived_ptr += kv_head * rows + row
        if tl.atomic_add(arrived_ptr, 1) == parts - 1:
            tl.store(arrived_ptr, 0)
            tl.atomic_add(counter_ptr, 1)
            _merge(place, part_ptr, part_lse_ptr, out_ptr, lse_ptr, parts, VALUE_DIM, DV, PARTS)
    else:
        _wait(counter_ptr, num_heads * q_len)
        tl.store(counter_ptr, 0)
        for at in range(1, num_lists_of_batch + 1):
            tl.store(counter_ptr + at, 0)
        if APPEND:
            tl.store(stop_ptr + batch, stop)


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
    gate = _Gate(blocks.shape[3], chosen=blocks.contiguous())
    return _decode(q, k, v, layout, gate, _Places(), None, None, scale, softcap)


@kernel_op("moba_flex::decode_few_triton", mutates=("counters",))
def decode_few_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_keys: Tensor,
    query: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    table: Tensor | None,
    counters: Tensor | None,
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
        counters: Zeros in which programs count, int32 `[B, 1 + Hkv + Hq * Q]` or wider; zeros
            again when the kernel ends. None to allocate some.
        numbers: As of `choose_cpu`.
        causal: Whether a query sees only keys at its position and before.
        head_top_k: As of `choose_cpu`.
        scale: Factor on the scores.
        softcap: Soft cap of the scores; 0 for none.

    Returns:
        As `decode_cpu`.
    """
    places = _Places(*(x if x is None else x.contiguous() for x in (query, start, stop, table)))
    layout = places.layout(q, k, numbers, causal)
    gate = _Gate.of(numbers, head_top_k, block_keys)
    return _decode(q, k, v, layout, gate, places, counters, None, scale, softcap)


@kernel_op(
    "moba_flex::decode_step_triton",
    mutates=("keys", "values", "sums", "block_keys", "stop", "counters"),
)
def decode_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    block_keys: Tensor,
    start: Tensor,
    stop: Tensor,
    counters: Tensor,
    counts: Tensor | None,
    table: Tensor | None,
    numbers: Sequence[int],
    head_top_k: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Append to a cache, then choose blocks and attend from the queries of the new keys.

    Args:
        q: Queries of the new keys, `[B, Hq, T, D]`.
        k: As of `moba_flex.masks.append.append`, as all up to `table`, but `counters`.
        v: Likewise.
        keys: Likewise.
        values: Likewise.
        sums: Likewise.
        block_keys: Likewise.
        start: Likewise.
        stop: Likewise.
        counters: As of `decode_few_triton`, as what follows `table`.
        counts: As of `append`.
        table: Likewise.
        numbers: As of `decode_few_triton`.
        head_top_k: Likewise.
        scale: Likewise.
        softcap: Likewise.

    Returns:
        As `decode_few_triton`.
    """
    if table is not None:
        table = table.contiguous()
    places, new = _Places(None, start, stop, table), NewKeys(k, v, counts, sums)
    layout = places.layout(q, keys, numbers, True)
    gate = _Gate.of(numbers, head_top_k, block_keys)
    return _decode(q, keys, values, layout, gate, places, counters, new, scale, softcap)


@dataclass
class _Places:
    """Where a cache lies, as of `decode_few_triton`."""

    query: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    table: Tensor | None = None

    def layout(self, q: Tensor, k: Tensor, numbers: Sequence[int], causal: bool) -> Layout:
        """Return the sizes of a row; where it lies, the kernel reads."""
        kv_len = k.shape[2] if self.table is None else k.shape[2] * self.table.shape[1]
        return Layout(q.shape[2], kv_len, numbers[1], causal)


@dataclass
class _Gate:
    """How blocks are chosen.

    Attributes:
        picks: Blocks beside the own one.
        sink_blocks: As of `Gate`.
        local_blocks: As of `Gate`.
        head_top_k: As of `choose_cpu`.
        block_keys: Mean keys, which programs score; None if `chosen` says all.
        chosen: Blocks that are chosen already.
    """

    picks: int
    sink_blocks: int = 0
    local_blocks: int = 0
    head_top_k: Tensor | None = None
    block_keys: Tensor | None = None
    chosen: Tensor | None = None

    @classmethod
    def of(cls, numbers: Sequence[int], head_top_k: Tensor | None, block_keys: Tensor) -> Self:
        """Return a gate that is still to choose."""
        picks, _, sink_blocks, local_blocks = numbers
        if head_top_k is not None:
            head_top_k = head_top_k.contiguous()
        return cls(picks, sink_blocks, local_blocks, head_top_k, *dense_vectors(block_keys))


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    gate: _Gate,
    places: _Places,
    counters: Tensor | None,
    new: NewKeys | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel."""
    q, k, v = dense_vectors(q, k, v)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, value_dim, num_blocks = k.shape[1], v.shape[3], layout.num_blocks
    out = q.new_empty(batch, num_heads, q_len, value_dim)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    group = num_heads // num_kv_heads
    lists, rows, total = batch * num_kv_heads, group * q_len, lse.numel()
    tile = min(_TILE_KEYS, power_of_2(layout.block_size))
    tile_bytes = tile * max(head_dim, value_dim) * k.element_size()
    tiles, picks = ceil_div(layout.block_size, tile), gate.picks
    parts = (picks + 1) * tiles
    part = q.new_empty(total, parts, value_dim, dtype=torch.float32)
    part_lse = q.new_empty(total, parts, dtype=torch.float32)
    if counters is None:
        counters = lse.new_zeros(batch, 1 + num_kv_heads * (1 + rows), dtype=torch.int32)

    scores, blocks, affinity = gate.chosen is None and picks > 0, gate.chosen, None
    selects, touched = False, 0 if new is None else blocks_touched(q_len, layout.block_size)
    if scores:
        affinity = q.new_empty(total, num_blocks, dtype=torch.int32)
        cheap = num_blocks <= _MOST_AFFINITIES and picks <= _MOST_PICKS
        selects = not cheap or total > _MOST_CHOOSING
        if selects:
            blocks = affinity.new_empty(total, picks)
    tile_blocks = 32 if selects else 16
    score_tiles = ceil_div(num_blocks, tile_blocks) if scores else 0
    width = power_of_2(num_blocks) if scores else 1
    if selects:
        width = min(width, _LANES)
    depth = power_of_2(ceil_div(num_blocks, width)) if selects else 1
    by_head, block_keys = gate.head_top_k, gate.block_keys
    table, queries, extents = places.table, layout.queries, layout.extents
    new_k, new_v, counts, sums = (None, None, None, None) if new is None else new
    read = block_keys, blocks, affinity, by_head, places.query, places.start, places.stop, table
    read_too = queries, extents, sums, new_k, new_v, counts
    # Placeholders stand for what the kernel does not read.
    tensors = (
        *(counters if x is None else x for x in (*read, *read_too)),
        *(part, part_lse, counters, out, lse),
    )
    strides = (
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        *((0, 0, 0) if block_keys is None else block_keys.stride()[:3]),
        *(stride for x in (new_k, new_v) for stride in ((0,) * 4 if x is None else x.stride())),
    )
    numbers = (
        num_heads,
        group,
        q_len,
        layout.kv_len,
        num_blocks,
        layout.block_size,
        picks,
        tiles,
        1 if extents is None else extents.shape[1],
        rows,
        1 if by_head is None else by_head.numel(),
        gate.sink_blocks,
        gate.local_blocks,
        1 if block_keys is None else block_keys.shape[2],
        k.shape[2],
        k.shape[0],
        1 if table is None else table.shape[1],
        lists,
        touched,
        score_tiles,
        counters.stride(0),
    )
    options: dict[str, Any] = dict(
        APPEND=new is not None,
        COUNTS=counts is not None,
        SCORE=scores,
        SELECT=selects,
        FORCED=gate.sink_blocks + gate.local_blocks > 0,
        BY_HEAD=by_head is not None,
        WIDTH=width,
        ROUNDS=min(depth, max(1, _HELD // width)),
        DEPTH=depth,
        AHEAD=1 if new is None else keys_ahead(q_len, layout.block_size),
        CACHED=places.start is not None,
        QUERY=places.query is not None,
        PAGED=table is not None,
        TABLES=extents is not None,
        CAUSAL=layout.causal,
        SOFTCAP=softcap > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        HEAD_DIM=head_dim,
        D=max(16, power_of_2(head_dim)),
        VALUE_DIM=value_dim,
        DV=power_of_2(value_dim),
        ROWS=max(16, power_of_2(rows)) if scores else 1,
        TILE=tile,
        TILE_BLOCKS=tile_blocks,
        PARTS=min(_TILE_PARTS, power_of_2(parts)),
        num_warps=min(8, power_of_2(max(1, tile_bytes // _WARP_BYTES))),
        # For its assertions; else Triton would check each sum of integers too.
        **({} if is_traced() or new is None else {"debug": True, "sanitize_overflow": False}),
    )
    programs = lists * (touched + score_tiles) + total * (selects + parts) + batch
    launch(
        wrap_triton(decode_kernel),
        (programs,),
        *(q, k, v, *tensors, *strides, *numbers),
        scale / math.log(2),
        softcap / math.log(2),
        **options,
    )
    return out, lse
