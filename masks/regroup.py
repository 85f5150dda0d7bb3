"""Regrouped order: queries sorted by the key block that they chose.

A *pair* is one query and one block that it chose, other than its own. The query heads that share a
key/value head form one list, whose *rows* are numbered `(head in group) * Q + query`. The pairs of
a list are sorted by block; the *rank* of a pair is its place in that order. If each tile must hold
pairs of one block alone, pairs are put into *slots*: the slots of each block start at a multiple
of the tile.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_flex.masks._torch.exporting import holds
from moba_flex.masks.layout import ceil_div
from moba_flex.masks.routing import Routing

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.regroup_kernel import sort_pairs_triton, tile_blocks_triton


@dataclass(frozen=True)
class Pairs:
    """The sorted pairs of each of `Hkv` key/value heads; entries without a block come last.

    Attributes:
        row: The row of the pair of each rank, int32 `[B, Hkv, R * (K - 1)]`, with `R = Hq / Hkv *
            Q`; ascending within a block.
        rank: The rank of each pair, int32 `[B, Hkv, R, K - 1]`; -1 where there is no pair.
        first: The rank of the first pair of each block, and the number of pairs, int32 `[B, Hkv, N
            + 1]`.
    """

    row: Tensor
    rank: Tensor
    first: Tensor


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def sort_pairs(routing: Routing, num_kv_heads: int) -> Pairs:
    """Sort the pairs of `routing` by block, and the pairs of one block by row."""
    batch, num_heads, q_len, picks = routing.blocks.shape
    device, num_blocks = routing.blocks.device, routing.num_blocks
    rows = num_heads // num_kv_heads * q_len
    lists, pairs = batch * num_kv_heads, rows * picks

    if picks == 0:
        first = torch.zeros(batch, num_kv_heads, num_blocks + 1, dtype=torch.int32, device=device)
        none = first.new_empty(batch, num_kv_heads, 0)
        return Pairs(none, none.new_empty(batch, num_kv_heads, rows, 0), first)
    if _has_kernels(device):
        return Pairs(*sort_pairs_triton(routing.blocks, num_kv_heads, num_blocks))
    key = routing.blocks.reshape(lists, pairs)
    if holds(num_blocks < 2**15 - 1):  # num_blocks + 1 must fit too
        # 16-bit keys take half the passes of a radix sort.
        key = key.to(torch.int16)
    block, order = key.sort(dim=1, stable=True)
    # Under dynamic shapes PyTorch 2.11 does not compile a `searchsorted` for values that all lists
    # share: the minimum, which changes no result, gives each list values of its own.
    edges = torch.arange(num_blocks + 1, device=device, dtype=key.dtype)
    edges = torch.minimum(edges, block[:, -1, None] + 1)
    first = torch.searchsorted(block, edges, out_int32=True)
    number = torch.arange(pairs, device=device, dtype=torch.int32)
    rank = torch.where(block < num_blocks, number, -1)
    rank = torch.empty_like(rank).scatter_(1, order, rank)
    return Pairs(
        row=(order // picks).int().view(batch, num_kv_heads, pairs),
        rank=rank.view(batch, num_kv_heads, rows, picks),
        first=first.view(batch, num_kv_heads, num_blocks + 1),
    )


def tile_blocks(first: Tensor, num_pairs: int, tile: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Cut the pairs of each block into tiles, and number the tiles of each list.

    Args:
        first: `Pairs.first`.
        num_pairs: Pairs per list, including entries without a block.
        tile: Pairs per tile.
        skip: How many tiles at the start of each block are left out.

    Returns:
        The block of each tile, int32 `[B * Hkv, T]`, where `T` tiles suffice for any choice, and
        unused ones hold `N`. And the first tile of each block, followed by the number of tiles,
        int32 `[B * Hkv, N + 1]`.
    """
    num_blocks = first.shape[2] - 1
    # Two tiles more than needed: PyTorch specializes sizes of 0 and 1, which would guard lengths.
    most = num_pairs // tile + (2 if skip else num_blocks + 1)
    if _has_kernels(first.device):
        return tile_blocks_triton(first, tile, skip, most)
    first = first.flatten(0, 1)
    num_tiles = (ceil_div(first.diff(dim=1), tile) - skip).clamp(min=0)
    last_tile = num_tiles.cumsum(dim=1, dtype=torch.int32)
    index = torch.arange(most, device=first.device, dtype=torch.int32)
    index = torch.minimum(index, last_tile[:, -1, None])
    tile_block = torch.searchsorted(last_tile, index, right=True, out_int32=True)
    first_tile = torch.nn.functional.pad(last_tile, (1, 0))
    return tile_block, first_tile


@dataclass(frozen=True)
class Regrouping:
    """The slot of every pair; each of `Hkv` key/value heads has `S` slots.

    Attributes:
        row: The row in each slot, int32 `[B, Hkv, S]`; -1 in empty slots.
        slot: The slot of each pair, int32 `[B, Hkv, R, K - 1]`, with `R = Hq / Hkv * Q`; -1 where
            there is no pair.
        tile_block: The block of the pairs in each tile of slots, int32 `[B, Hkv, S / tile]`; 0 in
            unused tiles.
        tile_used: Which tiles hold a pair, bool `[B, Hkv, S / tile]`.
        first_tile: The first tile of each block, int32 `[B, Hkv, N]`.
        num_tiles: The number of tiles of each block, int32 `[B, Hkv, N]`.
    """

    row: Tensor
    slot: Tensor
    tile_block: Tensor
    tile_used: Tensor
    first_tile: Tensor
    num_tiles: Tensor


def regroup(routing: Routing, num_kv_heads: int, tile: int) -> Regrouping:
    """Sort the pairs of `routing` by block and give each a slot, blocks padded to whole tiles.

    Args:
        routing: The choice of blocks.
        num_kv_heads: Number of key/value heads, `Hkv`.
        tile: Slots per tile. The number of slots does not depend on the choice: it suffices for
            any `R * (K - 1)` pairs.

    Returns:
        The regrouping. It is deterministic: pairs of a block lie in the order of their rows.
    """
    batch, device, num_blocks = routing.blocks.shape[0], routing.blocks.device, routing.num_blocks
    sorted_pairs = sort_pairs(routing, num_kv_heads)
    lists, pairs = batch * num_kv_heads, sorted_pairs.row.shape[2]
    tiles = ceil_div(pairs + min(num_blocks, pairs) * (tile - 1), tile)
    first_pair = sorted_pairs.first.flatten(0, 1)
    num_pairs = first_pair.diff(dim=1)
    num_tiles = ceil_div(num_pairs, tile)
    last_tile = num_tiles.cumsum(dim=1)
    first_tile = last_tile - num_tiles

    shift = first_tile * tile - first_pair[:, :-1]
    block = routing.blocks.reshape(lists, pairs).long().clamp(max=num_blocks - 1)
    rank = sorted_pairs.rank.view(lists, pairs)
    slot = torch.where(rank >= 0, rank + shift.gather(1, block), -1).int()

    tile_index = torch.arange(tiles, device=device)
    tile_block = torch.searchsorted(
        last_tile, torch.minimum(tile_index, last_tile[:, -1, None]), right=True
    )
    tile_used = tile_block < num_blocks
    tile_block = torch.where(tile_used, tile_block, 0)
    start = (tile_index - first_tile.gather(1, tile_block)) * tile  # of the tile, within its block
    within = start[..., None] + torch.arange(tile, device=device)
    filled = tile_used[..., None] & (within < num_pairs.gather(1, tile_block)[..., None])
    place = torch.where(filled, within + first_pair.gather(1, tile_block)[..., None], 0)
    row = sorted_pairs.row.view(lists, pairs).gather(1, place.flatten(1))
    row = torch.where(filled.flatten(1), row, -1)

    return Regrouping(
        row=row.view(batch, num_kv_heads, tiles * tile),
        slot=slot.view(sorted_pairs.rank.shape),
        tile_block=tile_block.int().view(batch, num_kv_heads, tiles),
        tile_used=tile_used.view(batch, num_kv_heads, tiles),
        first_tile=first_tile.int().view(batch, num_kv_heads, num_blocks),
        num_tiles=num_tiles.int().view(batch, num_kv_heads, num_blocks),
    )
