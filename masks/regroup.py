"""Regrouped order: queries sorted by the key block that they chose.

A *pair* is one query and one block that it chose. Pairs of a head are laid into *slots*, block
after block, each block starting at a multiple of the tile, so that a tile of slots meets one key
block and needs no mask. The query heads that share a key/value head form one list: their *rows*
are numbered `(head in group) * Q + query`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.router import Routing


@dataclass(frozen=True)
class Regrouping:
    """Where every pair lies; `S` slots for each of `Hkv` key/value heads.

    Attributes:
        row: The row in each slot, int32 `[B, Hkv, S]`; -1 in empty slots.
        slot: The slot of each pair, int32 `[B, Hkv, R, K - 1]`, with `R = Hq / Hkv * Q`; -1 where
            there is no pair.
        tile_block: The block that each tile of slots meets, int32 `[B, Hkv, S / tile]`; 0 in
            unused tiles.
        tile_used: Which tiles hold a pair, bool `[B, Hkv, S / tile]`.
        first_tile: The first tile of each block, int32 `[B, Hkv, N]`.
        num_tiles: The number of tiles of each block, int32 `[B, Hkv, N]`.
        num_pairs: The number of pairs of each block, int32 `[B, Hkv, N]`.
    """

    row: Tensor
    slot: Tensor
    tile_block: Tensor
    tile_used: Tensor
    first_tile: Tensor
    num_tiles: Tensor
    num_pairs: Tensor


def regroup(routing: Routing, num_kv_heads: int, tile: int) -> Regrouping:
    """Sort the pairs of `routing` by block and give each a slot, blocks padded to whole tiles.

    Args:
        routing: The choice of blocks.
        num_kv_heads: Number of key/value heads, `Hkv`.
        tile: Slots per tile. The number of slots does not depend on the choice: it is what `R * (K
            - 1)` pairs need at worst.

    Returns:
        The regrouping. It is deterministic: pairs of a block lie in the order of their rows.
    """
    batch, num_heads, q_len, picks = routing.blocks.shape
    device, num_blocks = routing.blocks.device, routing.num_blocks
    rows = num_heads // num_kv_heads * q_len
    pairs = rows * picks
    lists = batch * num_kv_heads
    tiles = ceil_div(pairs + min(num_blocks, pairs) * (tile - 1), tile)

    key = routing.blocks.reshape(lists, pairs)
    if num_blocks < 2**15 - 1:  # half the passes of a radix sort; room for one more than "none"
        key = key.to(torch.int16)
    block, order = key.sort(dim=1, stable=True)
    # PyTorch 2.11 compiles no search, under dynamic shapes, for values that all lists share: the
    # bounds, which change no result, make them each list's own.
    edges = torch.arange(num_blocks + 1, device=device, dtype=key.dtype)
    edges = torch.minimum(edges, block[:, -1:] + 1)
    first_pair = torch.searchsorted(block, edges)
    num_pairs = first_pair.diff(dim=1)
    num_tiles = ceil_div(num_pairs, tile)
    last_tile = num_tiles.cumsum(dim=1)
    first_tile = last_tile - num_tiles

    shift = first_tile * tile - first_pair[:, :-1]
    slot = torch.arange(pairs, device=device) + shift.gather(
        1, block.long().clamp(max=num_blocks - 1)
    )
    slot = torch.where(block < num_blocks, slot, -1).int()
    slot = torch.empty_like(slot).scatter_(1, order, slot)

    tile_index = torch.arange(tiles, device=device)
    tile_block = torch.searchsorted(
        last_tile, torch.minimum(tile_index, last_tile[:, -1:]), right=True
    )
    tile_used = tile_block < num_blocks
    tile_block = torch.where(tile_used, tile_block, 0)
    start = (tile_index - first_tile.gather(1, tile_block)) * tile  # of the tile, within its block
    within = start[..., None] + torch.arange(tile, device=device)
    filled = tile_used[..., None] & (within < num_pairs.gather(1, tile_block)[..., None])
    rank = torch.where(filled, within + first_pair.gather(1, tile_block)[..., None], 0)
    row = torch.where(filled.flatten(1), order.gather(1, rank.flatten(1)) // picks, -1).int()

    return Regrouping(
        row=row.view(batch, num_kv_heads, tiles * tile),
        slot=slot.view(batch, num_kv_heads, rows, picks),
        tile_block=tile_block.int().view(batch, num_kv_heads, tiles),
        tile_used=tile_used.view(batch, num_kv_heads, tiles),
        first_tile=first_tile.int().view(batch, num_kv_heads, num_blocks),
        num_tiles=num_tiles.int().view(batch, num_kv_heads, num_blocks),
        num_pairs=num_pairs.int().view(batch, num_kv_heads, num_blocks),
    )
