"""The layout of a cache on CUDA: one launch says where queries and blocks lie."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_flex.masks._torch.kernel_op import kernel_op, launch, wrap_triton

_WIDTH = 256

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = ["batch", "q_len", "num_blocks", "block_size"]


@triton.jit(do_not_specialize=_SIZES)
def locate_kernel(  # type: ignore[no-untyped-def]
    start_ptr, stop_ptr, query_ptr, queries_ptr, extents_ptr, batch, q_len, num_blocks,
    block_size, QUERY: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the coordinates of some of the queries of a row, which blocks follow."""
    row = tl.program_id(1)
    first, after = tl.load(start_ptr + row).to(tl.int32), tl.load(stop_ptr + row).to(tl.int32)
    query = tl.load(query_ptr + row).to(tl.int32) if QUERY else after - q_len
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)

    position = query + index
    real = (position >= first) & (position < after)
    own = (position - first) // block_size
    newest = own - 1 if CAUSAL else (after - first - 1) // block_size + tl.zeros_like(own)
    field = batch.to(tl.int64) * q_len
    queries_ptr += row.to(tl.int64) * q_len + index
    tl.store(queries_ptr, tl.where(real, position, -1), mask=index < q_len)
    tl.store(queries_ptr + field, tl.where(real, own, num_blocks), mask=index < q_len)
    tl.store(queries_ptr + 2 * field, tl.zeros_like(own), mask=index < q_len)
    tl.store(queries_ptr + 3 * field, tl.where(real, newest, -1), mask=index < q_len)

    block = index - q_len
    exists = (block >= 0) & (block < num_blocks)
    start = tl.minimum(first + block * block_size, after)
    stop = start + tl.minimum(after - start, block_size)  # no sum that int32 cannot hold
    extents_ptr += row.to(tl.int64) * num_blocks + block
    tl.store(extents_ptr, start, mask=exists)
    tl.store(extents_ptr + batch.to(tl.int64) * num_blocks, stop, mask=exists)


@kernel_op("moba_flex::locate_triton")
def locate_triton(
    start: Tensor,
    stop: Tensor,
    query: Tensor | None,
    q_len: int,
    num_blocks: int,
    block_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Return `queries` and `extents` of a `Layout` for rows of a cache.

    Args:
        start: That of `Slots`.
        stop: That of `Slots`.
        query: That of `Slots`.
        q_len: Number of queries.
        num_blocks: `N`.
        block_size: Keys per block.
        causal: Whether only blocks before the own one can be chosen.
    """
    start, stop = start.contiguous(), stop.contiguous()
    batch = start.shape[0]
    queries = start.new_empty((4, batch, q_len), dtype=torch.int32)
    extents = start.new_empty((2, batch, num_blocks), dtype=torch.int32)
    if extents.numel():
        launch(
            wrap_triton(locate_kernel),
            ((q_len + num_blocks + _WIDTH - 1) // _WIDTH, batch),
            start,
            stop,
            start if query is None else query.contiguous(),  # a placeholder, not read
            queries,
            extents,
            batch,
            q_len,
            num_blocks,
            block_size,
            QUERY=query is not None,
            CAUSAL=causal,
            WIDTH=_WIDTH,
        )
    return queries, extents
