"""The gate on CUDA: a streaming top-k in Triton that never writes the affinities."""

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
    q_ptr, block_keys_ptr, out_ptr, head_top_k_ptr, queries_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    num_heads, group, q_len, q_offset, num_blocks, block_size, sink_blocks, local_blocks, picks,
    table_rows, numbers,
    CAUSAL: tl.constexpr, FORCED: tl.constexpr, BY_HEAD: tl.constexpr, TABLES: tl.constexpr,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Choose `picks` blocks for `TILE_Q` queries of one head.

    The best blocks so far are kept, unordered, in `SLOTS` registers per query, a power of two.
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
    tl.store(out_ptr + out_row + slot, block, mask=(row[:, None] < q_len) & (slot < picks))


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
    if out.numel():
        launch(
            wrap_triton(gate_kernel),
            (ceil_div(q_len, _TILE_Q), batch * num_heads),
            q,
            block_keys,
            out,
            # Placeholders, which the kernel does not read.
            out if head_top_k is None else head_top_k.contiguous(),
            out if queries is None else queries,
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
            CAUSAL=causal,
            FORCED=sink_blocks + local_blocks > 0,
            BY_HEAD=head_top_k is not None,
            TABLES=queries is not None,
            SLOTS=max(2, power_of_2(picks)),
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=max(16, power_of_2(head_dim)),
            TILE_Q=_TILE_Q,
            TILE_N=_TILE_N,
            num_warps=_WARPS,
            num_stages=2,
        )
    return out
