"""Regrouped order on CUDA: a stable counting sort, so that all runs give the same order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_flex.masks._torch.kernel_op import kernel_op, launch, wrap_triton
from moba_flex.masks.layout import ceil_div

# `_TILE` pairs are placed at a time, by one warp. A chunk is one such tile per `_BLOCKS_PER_TILE`
# blocks, so that there are half as many counts, one per block and chunk, as pairs.
_TILE = 32
_BLOCKS_PER_TILE = 16
_WIDTH = 128
_SUM_WIDTH = 16

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = ["num_pairs", "num_blocks", "picks", "chunks", "chunk_size", "tile", "skip", "num_tiles"]


@triton.jit(do_not_specialize=_SIZES)
def count_kernel(  # type: ignore[no-untyped-def]
    block_ptr, count_ptr, done_ptr, num_pairs, num_blocks, chunks, chunk_size, WIDTH: tl.constexpr
):  # fmt: skip
    """Count the pairs of a chunk for each block, and for no block."""
    chunk, list_id = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if chunk == 0:
        tl.store(done_ptr + list_id, 0)
    block_ptr += list_id * num_pairs
    count_ptr += (list_id * chunks + chunk) * (num_blocks + 1)
    for at in range(0, num_blocks + 1, WIDTH):
        block = at + tl.arange(0, WIDTH)
        tl.store(count_ptr + block, 0, mask=block <= num_blocks)
    tl.debug_barrier()  # all zeros are there before the first pair is counted
    stop = tl.minimum((chunk + 1) * chunk_size, num_pairs)
    for at in range(chunk * chunk_size, stop, WIDTH):
        pair = at + tl.arange(0, WIDTH)
        exists = pair < stop
        block = tl.load(block_ptr + pair, mask=exists, other=0)
        tl.atomic_add(count_ptr + block, 1, mask=exists, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def sum_kernel(  # type: ignore[no-untyped-def]
    count_ptr, total_ptr, done_ptr, first_ptr, num_blocks, chunks, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Turn the counts of `WIDTH` blocks into those before each chunk.

    The last program of a list adds up the totals, for the first pair of each block.
    """
    list_id = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = block <= num_blocks
    count_ptr += list_id * chunks * (num_blocks + 1) + block[None, :]
    total_ptr += list_id * (num_blocks + 1)
    first_ptr += list_id * (num_blocks + 1)
    total = tl.zeros([WIDTH], tl.int32)
    for at in range(0, chunks, TILE):
        chunk = at + tl.arange(0, TILE)[:, None]
        some = (chunk < chunks) & exists[None, :]
        count_ptrs = count_ptr + chunk.to(tl.int64) * (num_blocks + 1)
        count = tl.load(count_ptrs, mask=some, other=0)
        tl.store(count_ptrs, total[None, :] + tl.cumsum(count, 0) - count, mask=some)
        total += tl.sum(count, 0)
    tl.store(total_ptr + block, total, mask=exists)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(done_ptr + list_id, 1) == tl.num_programs(0) - 1:
        before = 0
        tl.store(first_ptr, 0)
        for at in range(0, num_blocks, ROOM):
            place = at + tl.arange(0, ROOM)
            inside = place < num_blocks
            # Past the L1 cache, which does not see what other programs write.
            pairs = tl.load(total_ptr + place, mask=inside, other=0, cache_modifier=".cg")
            tl.store(first_ptr + 1 + place, before + tl.cumsum(pairs), mask=inside)
            before += tl.sum(pairs)


@triton.jit(do_not_specialize=_SIZES)
def place_kernel(  # type: ignore[no-untyped-def]
    block_ptr, next_ptr, first_ptr, row_ptr, rank_ptr, num_pairs, num_blocks, picks, chunks,
    chunk_size, TILE: tl.constexpr,
):  # fmt: skip
    """Give each pair of a chunk the next rank of its block."""
    chunk, list_id = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_pair, entry = list_id * num_pairs, list_id * (num_blocks + 1)
    first_ptr += entry
    next_ptr += (list_id * chunks + chunk) * (num_blocks + 1)
    index = tl.arange(0, TILE)
    stop = tl.minimum((chunk + 1) * chunk_size, num_pairs)
    for at in range(chunk * chunk_size, stop, TILE):
        pair = at + index
        exists = pair < stop
        block = tl.load(block_ptr + first_pair + pair, mask=exists, other=-1)
        # `same` holds, for each pair, how many pairs of the tile have its block and, in the upper
        # 16 bits, how many of them precede it.
        weight = tl.where(index[:, None] < index[None, :], (1 << 16) + 1, 1)
        same = tl.sum(tl.where(block[:, None] == block[None, :], weight, 0), 0)
        earlier = same >> 16
        is_last = earlier + 1 == same & 0xFFFF
        next_ptrs = next_ptr + block
        # Barriers, since one thread writes numbers that others read in the next step.
        tl.debug_barrier()
        number = tl.load(next_ptrs, mask=exists, other=0) + earlier
        tl.debug_barrier()
        tl.store(next_ptrs, number + 1, mask=exists & is_last)
        rank = tl.load(first_ptr + block, mask=exists, other=0) + number
        tl.store(row_ptr + first_pair + rank, pair // picks, mask=exists)
        rank = tl.where(block < num_blocks, rank, -1)
        tl.store(rank_ptr + first_pair + pair, rank, mask=exists)


@kernel_op("moba_flex::sort_pairs_triton")
def sort_pairs_triton(
    blocks: Tensor, num_kv_heads: int, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `row`, `rank` and `first` of `Pairs`, for `Routing.blocks` with `K > 1`."""
    blocks = blocks.contiguous()
    batch, num_heads, q_len, picks = blocks.shape
    rows = num_heads // num_kv_heads * q_len
    lists, pairs = batch * num_kv_heads, rows * picks
    chunk_size = ceil_div(num_blocks + 1, _BLOCKS_PER_TILE) * _TILE
    chunks = ceil_div(pairs, chunk_size)
    # First the pairs of each block in each chunk, then those of the block before each chunk.
    count = blocks.new_empty(lists, chunks, num_blocks + 1)
    done = blocks.new_empty(lists)
    launch(
        wrap_triton(count_kernel),
        (chunks, lists),
        *(blocks, count, done),
        pairs,
        num_blocks,
        chunks,
        chunk_size,
        WIDTH=_WIDTH,
    )
    first = blocks.new_empty(batch, num_kv_heads, num_blocks + 1)
    launch(
        wrap_triton(sum_kernel),
        (ceil_div(num_blocks + 1, _SUM_WIDTH), lists),
        *(count, torch.empty_like(first), done, first),
        num_blocks,
        chunks,
        TILE=64,
        WIDTH=_SUM_WIDTH,
        ROOM=1024,
    )
    row = blocks.new_empty(batch, num_kv_heads, pairs)
    rank = blocks.new_empty(batch, num_kv_heads, rows, picks)
    launch(
        wrap_triton(place_kernel),
        (chunks, lists),
        blocks,
        count,
        first,
        row,
        rank,
        pairs,
        num_blocks,
        picks,
        chunks,
        chunk_size,
        TILE=_TILE,
        num_warps=1,
    )
    return row, rank, first


@triton.jit(do_not_specialize=_SIZES)
def tile_kernel(  # type: ignore[no-untyped-def]
    first_ptr, tile_block_ptr, first_tile_ptr, num_blocks, tile, skip, num_tiles,
    WIDTH: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Number the tiles of `WIDTH` blocks; the program of the last ones also marks unused tiles."""
    list_id, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * WIDTH
    first_ptr += list_id * (num_blocks + 1)
    first_tile_ptr += list_id * (num_blocks + 1)
    tile_block_ptr += list_id * num_tiles
    before, total = 0, 0
    count = tl.zeros([WIDTH], tl.int32)
    for at in range(0, start + 1, WIDTH):
        block = at + tl.arange(0, WIDTH)
        exists = block < num_blocks
        stop = tl.load(first_ptr + block + 1, mask=exists, other=0)
        pairs = stop - tl.load(first_ptr + block, mask=exists, other=0)
        count = tl.maximum(tl.cdiv(pairs, tile) - skip, 0)
        total = before
        before += tl.sum(count)
    block = start + tl.arange(0, WIDTH)
    first_tile = total + tl.cumsum(count) - count
    tl.store(first_tile_ptr + block, first_tile, mask=block < num_blocks)
    for at in range(0, tl.max(count), ROOM):
        number = at + tl.arange(0, ROOM)[None, :]
        place = first_tile[:, None] + number
        tl.store(tile_block_ptr + place, block[:, None], mask=number < count[:, None])
    if start + WIDTH >= num_blocks:
        tl.store(first_tile_ptr + num_blocks, before)
        for at in range(before, num_tiles, WIDTH):
            place = at + tl.arange(0, WIDTH)
            tl.store(tile_block_ptr + place, num_blocks, mask=place < num_tiles)


def tile_blocks_triton(
    first: Tensor, tile: int, skip: int, num_tiles: int
) -> tuple[Tensor, Tensor]:
    """Return the two tensors of `tile_blocks`, with room for `num_tiles` tiles."""
    lists, num_blocks = first.shape[0] * first.shape[1], first.shape[2] - 1
    tile_block = first.new_empty(lists, num_tiles)
    first_tile = first.new_empty(lists, num_blocks + 1)
    launch(
        wrap_triton(tile_kernel),
        (ceil_div(num_blocks, _WIDTH), lists),
        first,
        tile_block,
        first_tile,
        num_blocks,
        tile,
        skip,
        num_tiles,
        WIDTH=_WIDTH,
        ROOM=16,
    )
    return tile_block, first_tile
