"""The gate on CUDA: a streaming top-k in Triton that never writes the affinities.

There are two ways. `gate_kernel` inserts blocks into the best so far, as often as some row of its
tile has a better one, which is always exact. `sift_kernel` asks no such questions: it keeps the
best two of each group of blocks by minima and maxima alone. It knows the rows where that may have
dropped a block that belongs to the result, and leaves those few to `gate_kernel`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_flex.masks._torch.kernel_op import kernel_op, launch, power_of_2, wrap_triton
from moba_flex.masks.layout import ceil_div

_TILE_Q = 64
_TILE_N = 32
_WARPS = 4
# Sifting: queries and blocks of a tile, groups of blocks, warps, stages, and the registers of a
# thread that let two programs run on a multiprocessor.
_SIFT_TILE_Q = 128
_SIFT_TILE_N = 64
_GROUPS = 32
_SIFT_WARPS = 8
_SIFT_STAGES = 2
_REGISTERS = 128
# Low bits of a score that give way to the number of a group's block.
_INDEX_MASK = 1023
# Up to so many blocks, those bits also hold the number of the group.
_FULL_BLOCKS = 990
# From so many blocks on, it is rare that two of the best are in one pair of columns.
_PAIRED_BLOCKS = 4096
# Sifting pays from so many blocks on, and up to so many picks and dimensions.
_SIFT_BLOCKS = 256
_SIFT_PICKS = 16
_SIFT_DIM = 128
# Triton's interpreter runs no assembly.
_ASM = not triton.knobs.runtime.interpret


# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = [
    "block_size",
    "group",
    "local_blocks",
    "num_blocks",
    "num_heads",
    "numbers",
    "picks",
    "q_len",
    "q_offset",
    "sink_blocks",
    "table_rows",
]


@triton.jit
def _offer(  # type: ignore[no-untyped-def]
    best, block, q, block_keys_ptr, stride_kn, stride_kd, first, stop, own, oldest, newest,
    num_blocks, sink_blocks, local_blocks,
    MASKED: tl.constexpr, FORCED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Update the best blocks so far by tiles of blocks, from tile `stop - 1` down to tile `first`.

    Blocks come from the most recent to the oldest, so a block replaces another only if it is
    strictly better. Without MASKED, all queries may choose all of these blocks.
    """
    dim, lane = tl.arange(0, HEAD_DIM_PADDED)[:, None], tl.arange(0, TILE_N)[None, :]
    largest = 3.4028234663852886e38
    for step in range(first, stop):
        top = (first + stop - step) * TILE_N - 1
        col = top - lane
        key_ptrs = block_keys_ptr + col.to(tl.int64) * stride_kn + dim * stride_kd
        if MASKED:
            block_keys = tl.load(key_ptrs, mask=(col < num_blocks) & (dim < HEAD_DIM), other=0.0)
        else:
            block_keys = tl.load(key_ptrs, mask=dim < HEAD_DIM, other=0.0)
        affinity = tl.dot(q, block_keys, input_precision="ieee")
        affinity = tl.where(affinity == affinity, affinity, -largest)  # NaN counts as lowest
        # Infinities are reserved for forced blocks and empty slots.
        affinity = tl.minimum(tl.maximum(affinity, -largest), largest)
        if FORCED:
            forced = col < oldest + sink_blocks
            forced |= (col < own) & (col >= own - local_blocks)
            affinity = tl.where(forced, float("inf"), affinity)
        if MASKED:
            candidate = (col >= oldest) & (col <= newest) & (col != own)
            affinity = tl.where(candidate, affinity, -float("inf"))

        new, worst = tl.max(affinity, 1, keep_dims=True), tl.min(best, 1, keep_dims=True)
        while tl.max((new > worst).to(tl.int32)) > 0:
            # Ties go to the left, where the more recent block is, and evict the oldest block.
            at = tl.min(tl.where(affinity == new, lane, TILE_N), 1, keep_dims=True)
            last = tl.min(tl.where(best == worst, block, 0x7FFFFFFF), 1, keep_dims=True)
            evicted = (new > worst) & (best == worst) & (block == last)
            best = tl.where(evicted, new, best)
            block = tl.where(evicted, top - at, block)
            affinity = tl.where(lane == at, -float("inf"), affinity)
            new, worst = tl.max(affinity, 1, keep_dims=True), tl.min(best, 1, keep_dims=True)
    return best, block


@triton.jit(do_not_specialize=_SIZES)
def gate_kernel(  # type: ignore[no-untyped-def]
    q_ptr, block_keys_ptr, out_ptr, head_top_k_ptr, queries_ptr, count_ptr, row_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    num_heads, group, q_len, q_offset, num_blocks, block_size, sink_blocks, local_blocks, picks,
    table_rows, numbers,
    CAUSAL: tl.constexpr, FORCED: tl.constexpr, BY_HEAD: tl.constexpr, TABLES: tl.constexpr,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Choose `picks` blocks for `TILE_Q` queries of one head, of all or of those LISTED.

    The best blocks so far are kept, unordered, in `SLOTS` registers per query, a power of two.
    """
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    if LISTED:
        count = tl.load(count_ptr + tl.program_id(1))
        if tl.program_id(0) * TILE_Q >= count:
            return
        place = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
        # Places past the last row repeat it.
        row_ptr += tl.program_id(1).to(tl.int64) * q_len
        row = tl.load(row_ptr + tl.minimum(place, count - 1))
        real = place < count
    else:
        # Tiles at the end of the sequence have the most candidates, so they start first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        row = tile * TILE_Q + tl.arange(0, TILE_Q)
        real = row < q_len
    dim = tl.arange(0, HEAD_DIM_PADDED)
    q_ptr += batch * stride_qb + head * stride_qh
    q_ptrs = q_ptr + row[:, None].to(tl.int64) * stride_qm + dim[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=real[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
    if TABLES:
        # Rows past the last query repeat it, so they widen no range of candidates.
        queries_ptr += (batch % table_rows) * q_len + tl.minimum(row, q_len - 1)[:, None]
        field = table_rows * q_len
        own = tl.load(queries_ptr + field)
        oldest, newest = tl.load(queries_ptr + 2 * field), tl.load(queries_ptr + 3 * field)
    else:
        own = ((row + q_offset) // block_size)[:, None]
        oldest = tl.zeros_like(own)
        # Rows past the last query may have own blocks that do not exist.
        newest = tl.minimum(own, num_blocks) - 1 if CAUSAL else oldest + num_blocks - 1
    chosen = picks
    if BY_HEAD:
        number = tl.program_id(1) % numbers
        chosen = tl.minimum(picks, tl.load(head_top_k_ptr + number).to(tl.int32) - 1)

    slot = tl.arange(0, SLOTS)[None, :]
    # Slots past `chosen` hold infinity, which nothing replaces. Each empty slot has a number of
    # its own, so that an eviction hits one slot.
    best = tl.where(slot < chosen, -float("inf"), float("inf"))
    best += tl.zeros([TILE_Q, SLOTS], tl.float32)
    block = tl.zeros([TILE_Q, SLOTS], tl.int32) - 1 - slot

    # Tiles `first..start` and `stop..last` need a mask.
    first, last = tl.min(oldest) // TILE_N, tl.cdiv(tl.max(newest) + 1, TILE_N)
    stop = tl.minimum(tl.maximum(tl.min(newest) + 1, 0) // TILE_N, last) if CAUSAL else first
    start = tl.minimum(tl.cdiv(tl.max(oldest), TILE_N), stop)
    block_keys_ptr += batch * stride_kb + (head // group) * stride_kh
    best, block = _offer(
        best, block, q, block_keys_ptr, stride_kn, stride_kd, stop, last, own, oldest, newest,
        num_blocks, sink_blocks, local_blocks, True, FORCED, HEAD_DIM, HEAD_DIM_PADDED, TILE_N,
    )  # fmt: skip
    if CAUSAL:
        best, block = _offer(
            best, block, q, block_keys_ptr, stride_kn, stride_kd, start, stop, own, oldest,
            newest, num_blocks, sink_blocks, local_blocks, False, FORCED, HEAD_DIM,
            HEAD_DIM_PADDED, TILE_N,
        )  # fmt: skip
    if CAUSAL and TABLES:
        best, block = _offer(
            best, block, q, block_keys_ptr, stride_kn, stride_kd, first, start, own, oldest,
            newest, num_blocks, sink_blocks, local_blocks, True, FORCED, HEAD_DIM,
            HEAD_DIM_PADDED, TILE_N,
        )  # fmt: skip

    block = tl.sort(tl.where((block < 0) | (slot >= chosen), num_blocks, block), 1)
    out_row = (tl.program_id(1).to(tl.int64) * q_len + row[:, None]) * picks
    tl.store(out_ptr + out_row + slot, block, mask=real[:, None] & (slot < picks))


@triton.jit
def _insert(first, second, third, spilled, key, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Insert a key into the `DEPTH` best of each group, and what falls out into `spilled`."""
    rest = tl.minimum(first, key)
    first = tl.maximum(first, key)
    second, third, spilled = _insert_lower(second, third, spilled, rest, DEPTH)
    return first, second, third, spilled


@triton.jit
def _insert_lower(second, third, spilled, key, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Insert a key that is not the best of its group."""
    rest = tl.minimum(second, key)
    second = tl.maximum(second, key)
    if DEPTH == 3:
        rest2 = tl.minimum(third, rest)
        third = tl.maximum(third, rest)
        spilled = tl.maximum(spilled, rest2)
    else:
        spilled = tl.maximum(spilled, rest)
    return second, third, spilled


@triton.jit
def _sift(  # type: ignore[no-untyped-def]
    first, second, third, spilled, odd, q, block_keys_ptr, stride_kn, stride_kd, start, stop, own,
    oldest, newest, past, num_blocks, sink_blocks, local_blocks,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, TABLES: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_N: tl.constexpr, GROUPS: tl.constexpr, DEPTH: tl.constexpr, FULL: tl.constexpr,
    PAIRED: tl.constexpr, INDEX_MASK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Insert the blocks of tiles `start..stop` into the best of their groups.

    Groups are columns modulo `GROUPS`. A key is an affinity whose low bits say which block of its
    group it belongs to, so that comparing and moving it is one instruction. Without MASKED, all
    queries may choose all of these blocks.
    """
    WIDE: tl.constexpr = TILE_N // GROUPS
    dim, lane = tl.arange(0, HEAD_DIM_PADDED)[:, None], tl.arange(0, TILE_N)[None, :]
    for tile in range(start, stop):
        col = tile * TILE_N + lane
        key_ptrs = block_keys_ptr + col.to(tl.int64) * stride_kn + dim * stride_kd
        if MASKED:
            block_keys = tl.load(key_ptrs, mask=(col < num_blocks) & (dim < HEAD_DIM), other=0.0)
        else:
            block_keys = tl.load(key_ptrs, mask=dim < HEAD_DIM, other=0.0)
        affinity = tl.dot(q, block_keys, input_precision="ieee")
        # NaN from the first NaN or infinity on. Adding is cheap: other units do it.
        some = affinity * 4.0 if FORCED else affinity
        odd += tl.sum(tl.reshape(some, [TILE_Q, TILE_N // 8, 8]), 1) * 0.0
        if FORCED:
            forced = col < oldest + sink_blocks
            forced |= (col < own) & (col >= own - local_blocks)
            # Above a quarter of the largest float, and no two of a tile alike.
            top = (0x7F000000 + lane * 0x10000).to(tl.float32, bitcast=True)
            affinity = tl.where(forced, top, affinity)
        index = tile * WIDE + lane // GROUPS + past
        if FULL:
            index = index * GROUPS
        bits = affinity.to(tl.int32, bitcast=True)
        if ASM:  # one instruction, of which Triton's compiler makes two
            bits = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [bits, ~INDEX_MASK, index],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            bits = (bits & ~INDEX_MASK) | index
        key = bits.to(tl.float32, bitcast=True)
        if MASKED:
            candidate = col <= newest
            if TABLES:
                candidate &= col >= oldest
            if not CAUSAL:
                candidate &= col != own
            key = tl.where(candidate, key, -3.4028234663852886e38)
        if WIDE == 1:
            first, second, third, spilled = _insert(first, second, third, spilled, key, DEPTH)
        else:
            pairs = tl.reshape(key, [TILE_Q, 2, GROUPS])
            high, low = tl.max(pairs, 1), tl.min(pairs, 1)
            first, second, third, spilled = _insert(first, second, third, spilled, high, DEPTH)
            if PAIRED:
                spilled = tl.maximum(spilled, low)
            else:
                second, third, spilled = _insert_lower(second, third, spilled, low, DEPTH)
    return first, second, third, spilled, odd


@triton.jit(do_not_specialize=_SIZES)
def sift_kernel(  # type: ignore[no-untyped-def]
    q_ptr, block_keys_ptr, out_ptr, head_top_k_ptr, queries_ptr, count_ptr, row_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    num_heads, group, q_len, q_offset, num_blocks, block_size, sink_blocks, local_blocks, picks,
    table_rows, numbers,
    CAUSAL: tl.constexpr, FORCED: tl.constexpr, BY_HEAD: tl.constexpr, TABLES: tl.constexpr,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, GROUPS: tl.constexpr, DEPTH: tl.constexpr,
    FULL: tl.constexpr, PAIRED: tl.constexpr, INDEX_MASK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Choose as `gate_kernel` does, or list a row, and count it, if the choice is not certain.

    It is certain if the affinities of all other blocks are below those chosen by more than the
    bits that keys lack. With FULL, the low bits of a key are the block's number.
    """
    # Tiles at the end of the sequence have the most candidates, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = tile * TILE_Q + tl.arange(0, TILE_Q)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    q_ptr += batch * stride_qb + head * stride_qh
    q_ptrs = q_ptr + row[:, None].to(tl.int64) * stride_qm + dim[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=(row[:, None] < q_len) & (dim[None, :] < HEAD_DIM), other=0.0)
    # Inline, as in `gate_kernel`: if a helper loads these numbers, PyTorch's mutation analysis
    # marks their tensors as written, because the addresses of listed rows depend on them.
    if TABLES:
        # Rows past the last query repeat it, so they widen no range of candidates.
        queries_ptr += (batch % table_rows) * q_len + tl.minimum(row, q_len - 1)[:, None]
        field = table_rows * q_len
        own = tl.load(queries_ptr + field)
        oldest, newest = tl.load(queries_ptr + 2 * field), tl.load(queries_ptr + 3 * field)
    else:
        own = ((row + q_offset) // block_size)[:, None]
        oldest = tl.zeros_like(own)
        # Rows past the last query may have own blocks that do not exist.
        newest = tl.minimum(own, num_blocks) - 1 if CAUSAL else oldest + num_blocks - 1
    chosen = picks
    if BY_HEAD:
        number = tl.program_id(1) % numbers
        chosen = tl.minimum(picks, tl.load(head_top_k_ptr + number).to(tl.int32) - 1)

    # The least float stands for no block. It has all low bits, which no block's index has.
    empty = -3.4028234663852886e38
    first = tl.full([TILE_Q, GROUPS], empty, tl.float32)
    second, third, spilled = first, first, first
    odd = tl.zeros([TILE_Q, 8], tl.float32)
    # Zero in all rows that matter: it makes the index a vector, as `lop3` wants it.
    past = tl.where(row[:, None] < q_len, 0, 1)

    # Tiles `low..start` and `stop..high` need a mask.
    low, high = tl.min(oldest) // TILE_N, tl.cdiv(tl.max(newest) + 1, TILE_N)
    stop = tl.minimum(tl.maximum(tl.min(newest) + 1, 0) // TILE_N, high) if CAUSAL else low
    start = tl.minimum(tl.cdiv(tl.max(oldest), TILE_N), stop)
    block_keys_ptr += batch * stride_kb + (head // group) * stride_kh
    if CAUSAL:
        first, second, third, spilled, odd = _sift(
            first, second, third, spilled, odd, q, block_keys_ptr, stride_kn, stride_kd, start,
            stop, own, oldest, newest, past, num_blocks, sink_blocks, local_blocks, False, CAUSAL,
            FORCED, TABLES, HEAD_DIM, HEAD_DIM_PADDED, TILE_Q, TILE_N, GROUPS, DEPTH, FULL, PAIRED,
            INDEX_MASK, ASM,
        )  # fmt: skip
    if CAUSAL and TABLES:
        first, second, third, spilled, odd = _sift(
            first, second, third, spilled, odd, q, block_keys_ptr, stride_kn, stride_kd, low,
            start, own, oldest, newest, past, num_blocks, sink_blocks, local_blocks, True, CAUSAL,
            FORCED, TABLES, HEAD_DIM, HEAD_DIM_PADDED, TILE_Q, TILE_N, GROUPS, DEPTH, FULL, PAIRED,
            INDEX_MASK, ASM,
        )  # fmt: skip
    first, second, third, spilled, odd = _sift(
        first, second, third, spilled, odd, q, block_keys_ptr, stride_kn, stride_kd, stop, high,
        own, oldest, newest, past, num_blocks, sink_blocks, local_blocks, True, CAUSAL, FORCED,
        TABLES, HEAD_DIM, HEAD_DIM_PADDED, TILE_Q, TILE_N, GROUPS, DEPTH, FULL, PAIRED, INDEX_MASK,
        ASM,
    )  # fmt: skip

    unsure = tl.sum(odd, 1, keep_dims=True) != 0.0
    spilled = tl.max(spilled, 1, keep_dims=True)
    if FULL:
        number = tl.arange(0, GROUPS)[None, :]
        first = (first.to(tl.int32, bitcast=True) | number).to(tl.float32, bitcast=True)
        second = (second.to(tl.int32, bitcast=True) | number).to(tl.float32, bitcast=True)
        third = (third.to(tl.int32, bitcast=True) | number).to(tl.float32, bitcast=True)
        if DEPTH == 2:
            # Two groups of two make one of three, which halves what follows.
            firsts = tl.reshape(first, [TILE_Q, 2, GROUPS // 2])
            seconds = tl.reshape(second, [TILE_Q, 2, GROUPS // 2])
            first, rest = tl.max(firsts, 1), tl.min(firsts, 1)
            upper, lower = tl.max(seconds, 1), tl.min(seconds, 1)
            second, rest = tl.maximum(rest, upper), tl.minimum(rest, upper)
            third, rest = tl.maximum(rest, lower), tl.minimum(rest, lower)
            spilled = tl.maximum(spilled, tl.max(rest, 1, keep_dims=True))

    slot = tl.arange(0, SLOTS)[None, :]
    block = tl.zeros([TILE_Q, SLOTS], tl.int32) + num_blocks
    tagged = tl.arange(0, first.shape[1])[None, :].to(tl.float32) + 1024.0
    best = tl.max(first, 1, keep_dims=True)
    worst = tl.full([TILE_Q, 1], float("inf"), tl.float32)
    for pick in range(chosen):
        found = best > empty
        at = best.to(tl.int32, bitcast=True) & INDEX_MASK
        if not FULL:
            # The sum is 1024 and the group's number, unless several groups have this key.
            tag = tl.sum(tl.where(first == best, tagged, 0.0), 1, keep_dims=True).to(tl.int32)
            unsure |= found & (tag >= 2048)
            at = at * GROUPS + tag - 1024
        block = tl.where((slot == pick) & found, at, block)
        worst = best
        # The same as `first == best`, but not kept in registers from above.
        hit = first >= best
        first = tl.where(hit, second, first)
        if DEPTH == 3 or FULL:
            second = tl.where(hit, third, second)
            third = tl.where(hit, empty, third)
        else:
            second = tl.where(hit, empty, second)
        best = tl.max(first, 1, keep_dims=True)
    rest = tl.maximum(best, spilled)
    rest_score = (rest.to(tl.int32, bitcast=True) & ~INDEX_MASK).to(tl.float32, bitcast=True)
    worst_score = (worst.to(tl.int32, bitcast=True) & ~INDEX_MASK).to(tl.float32, bitcast=True)
    unsure |= (rest > empty) & (rest_score >= worst_score)
    unsure |= num_blocks > INDEX_MASK * GROUPS

    block = tl.sort(block, 1)
    out_row = (tl.program_id(1).to(tl.int64) * q_len + row[:, None]) * picks
    tl.store(out_ptr + out_row + slot, block, mask=(row[:, None] < q_len) & (slot < picks))
    again = unsure & (row[:, None] < q_len)
    place = tl.atomic_add(count_ptr + tl.program_id(1) + tl.zeros_like(own), 1, mask=again)
    row_ptr += tl.program_id(1).to(tl.int64) * q_len
    tl.store(row_ptr + place, row[:, None], mask=again)


@kernel_op("moba_flex::choose_triton")
def choose_triton(
    q: Tensor,
    block_keys: Tensor,
    numbers: Sequence[int],
    causal: bool,
    head_top_k: Tensor | None,
    q_offset: int,
    queries: Tensor | None,
) -> Tensor:
    """Choose blocks besides the own one, with arguments and result as in `choose_cpu`."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, num_blocks = block_keys.shape[1:3]
    picks, block_size, sink_blocks, local_blocks = numbers
    out = torch.empty(batch, num_heads, q_len, picks, dtype=torch.int32, device=q.device)
    if not out.numel():
        return out
    # Symbolic, the number of blocks is not asked for: graphs serve all.
    known = isinstance(num_blocks, int)
    sifted = q.dtype.itemsize == 2 and head_dim <= _SIFT_DIM and picks <= _SIFT_PICKS
    sifted = sifted and not (known and num_blocks < _SIFT_BLOCKS)
    count = rows = out  # placeholders, which the kernel does not read
    if sifted:
        count = torch.zeros(batch * num_heads, dtype=torch.int32, device=q.device)
        rows = torch.empty(batch * num_heads, q_len, dtype=torch.int32, device=q.device)
    arguments = (
        q,
        block_keys,
        out,
        # Placeholders too.
        out if head_top_k is None else head_top_k.contiguous(),
        out if queries is None else queries,
        count,
        rows,
        *q.stride(),
        *block_keys.stride(),
        num_heads,
        num_heads // num_kv_heads,
        q_len,
        q_offset,
        num_blocks,
        block_size,
        sink_blocks,
        local_blocks,
        picks,
        1 if queries is None else queries.shape[1],
        1 if head_top_k is None else head_top_k.numel(),
    )
    constants = {
        "CAUSAL": causal,
        "FORCED": sink_blocks + local_blocks > 0,
        "BY_HEAD": head_top_k is not None,
        "TABLES": queries is not None,
        "SLOTS": max(2, power_of_2(picks)),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": max(16, power_of_2(head_dim)),
    }
    if sifted:
        depth = 2 if picks <= 8 else 3
        launch(
            wrap_triton(sift_kernel),
            (ceil_div(q_len, _SIFT_TILE_Q), batch * num_heads),
            *arguments,
            **constants,
            TILE_Q=_SIFT_TILE_Q,
            TILE_N=_SIFT_TILE_N,
            GROUPS=_GROUPS,
            DEPTH=depth,
            FULL=known and num_blocks <= _FULL_BLOCKS,
            PAIRED=known and num_blocks >= _PAIRED_BLOCKS,
            INDEX_MASK=_INDEX_MASK,
            ASM=_ASM,
            num_warps=_SIFT_WARPS,
            num_stages=_SIFT_STAGES,
            maxnreg=_REGISTERS,
        )
    launch(
        wrap_triton(gate_kernel),
        (ceil_div(q_len, _TILE_Q), batch * num_heads),
        *arguments,
        **constants,
        TILE_Q=_TILE_Q,
        TILE_N=_TILE_N,
        LISTED=sifted,
        num_warps=_WARPS,
        num_stages=2,
    )
    return out
