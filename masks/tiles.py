"""Block masks of the routed plan: regrouped queries, and queries with their own blocks.

Both come from arithmetic on tile numbers: no table of tiles by tiles is made, and the transposed
lists, which the backward of FlexAttention reads, are ranges.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.regroup import Regrouping

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Lists = tuple[Tensor, Tensor]
"""Counts `[B, H, rows]` and indices `[B, H, rows, width]` of a BlockMask."""

# FlexAttention's backward on Hopper takes mask blocks in multiples of 128 alone (for head dims
# from 64 to 128).
TILE = 128


def settled(length: int) -> int:
    """Return `length` as a mask_mod may capture it under dynamic shapes.

    FlexAttention's own guards pin a length of one tile to that number, but only after the mask_mod
    captured a symbol for it, for which PyTorch 2.11 then generates code that does not compile.
    """
    return TILE if length == TILE else length


@dataclass(frozen=True)
class KeyLayout:
    """Keys in memory with every block at a multiple of `TILE`.

    Blocks of a multiple of `TILE` keys lie like that already; others are padded. A short last
    block is padded too where queries outside of it may choose it, since FlexAttention would read
    past the end of the keys.

    Attributes:
        block_size: Keys per block.
        kv_len: Number of keys, as a mask_mod may capture it.
        stride: Places per block.
        padded: Whether there are places without a key.
    """

    block_size: int
    kv_len: int
    stride: int
    padded: bool

    @classmethod
    def of(cls, block_size: int, kv_len: int, causal: bool) -> "KeyLayout":
        """Return the layout of `kv_len` keys in blocks of `block_size`."""
        kv_len = settled(kv_len)
        stride = ceil_div(block_size, TILE) * TILE
        padded = stride != block_size or not (causal or kv_len % block_size == 0)
        return cls(block_size, kv_len, stride, padded)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return ceil_div(self.kv_len, self.block_size)

    @property
    def length(self) -> int:
        """Number of places."""
        return self.num_blocks * self.stride if self.padded else self.kv_len

    def pad(self, x: Tensor) -> Tensor:
        """Lay out keys or values `[B, H, KV, D]` as `[B, H, length, D]`, zeros in empty places."""
        if not self.padded:
            return x
        batch, num_heads, kv_len, head_dim = x.shape
        x = F.pad(x, (0, 0, 0, self.num_blocks * self.block_size - kv_len))
        x = x.view(batch, num_heads, self.num_blocks, self.block_size, head_dim)
        return F.pad(x, (0, 0, 0, self.stride - self.block_size)).flatten(2, 3)

    def position(self, place: Tensor) -> Tensor:
        """Return the position of the key in a place; `kv_len` or more where there is none."""
        within = place % self.stride
        position = place // self.stride * self.block_size + within
        return (
            torch.where(within < self.block_size, position, self.kv_len)
            if self.padded
            else position
        )


def routed_block_mask(groups: Regrouping, layout: KeyLayout) -> BlockMask:
    """Return the mask `[B, Hkv, S, length]` of regrouped queries and the blocks they chose.

    Args:
        groups: The regrouping, with tiles of `TILE` slots.
        layout: Where the keys lie.
    """
    num_slots, num_tiles = groups.row.shape[2], groups.tile_block.shape[2]
    count, index = groups.tile_used.int(), groups.tile_block.unsqueeze(-1)
    # A row chooses a block at most once, which bounds the tiles of a block.
    width = ceil_div(groups.slot.shape[2], TILE)
    tile = torch.arange(width, device=index.device, dtype=torch.int32)
    q_count = groups.num_tiles
    q_index = (groups.first_tile.unsqueeze(-1) + tile).clamp(max=num_tiles - 1)

    def has_key(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return layout.position(kv_idx) < layout.kv_len

    lists = (count, index, q_count, q_index)
    nothing = (torch.zeros_like(count), index, torch.zeros_like(q_count), q_index)
    partial, full = (lists, nothing) if layout.padded else (nothing, lists)
    return _block_mask((num_slots, layout.length), partial, full, (TILE, layout.stride), has_key)


def own_block_mask(q_len: int, layout: KeyLayout, causal: bool, device: torch.device) -> BlockMask:
    """Return the mask `[1, 1, Q, length]` of queries in natural order and their own blocks.

    Args:
        q_len: Number of queries, the last of the positions.
        layout: Where the keys lie.
        causal: Whether a query sees only keys at its position and before.
        device: Where to make the mask.
    """
    block_size, kv_len = layout.block_size, layout.kv_len
    q_len = settled(q_len)

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # Lengths one by one: under dynamic shapes FlexAttention takes symbols here, but no
        # expressions of them.
        position = q_idx + kv_len - q_len
        same = position // block_size == kv_idx // layout.stride
        key = layout.position(kv_idx)
        return same & (key <= position) if causal else same & (key < kv_len)

    kv_partial, kv_full = _own_keys_of_queries(q_len, layout, causal, device)
    q_partial, q_full = _own_queries_of_keys(q_len, layout, causal, device)
    partial, full = (*kv_partial, *q_partial), (*kv_full, *q_full)
    return _block_mask((q_len, layout.length), partial, full, (TILE, TILE), sees)


def _own_keys_of_queries(
    q_len: int, layout: KeyLayout, causal: bool, device: torch.device
) -> tuple[Lists, Lists]:
    """List for each tile of queries the tiles of their own blocks, to mask and full."""
    block_size, kv_len = layout.block_size, layout.kv_len
    kv_tiles, per_block = ceil_div(layout.length, TILE), layout.stride // TILE
    # The positions first..last of a tile lie in blocks low..high: tiles start to before stop.
    first = kv_len - q_len + torch.arange(ceil_div(q_len, TILE), device=device) * TILE
    last = (first + TILE - 1).clamp(max=kv_len - 1)
    low, high = first // block_size, last // block_size
    start = low * per_block
    keys = last % block_size + 1 if causal else (kv_len - high * block_size).clamp(max=block_size)
    stop = high * per_block + ceil_div(keys, TILE)
    # Full is what all queries see whole: no second block, nothing later than the first query.
    seen = (first % block_size + 1 if causal else kv_len - low * block_size) // TILE
    num_full = torch.where(low == high, seen.clamp(max=block_size // TILE), 0)

    spanned = (TILE + block_size - 2) // block_size + 1  # blocks that a tile can touch
    slot = torch.arange(min(spanned * per_block, kv_tiles), device=device)
    full = _lists(num_full, start[:, None] + slot, kv_tiles)
    partial = _lists(stop - start - num_full, (start + num_full)[:, None] + slot, kv_tiles)
    return partial, full


def _own_queries_of_keys(
    q_len: int, layout: KeyLayout, causal: bool, device: torch.device
) -> tuple[Lists, Lists]:
    """List for each tile of keys the tiles of queries of that block, to mask and full."""
    block_size, kv_len = layout.block_size, layout.kv_len
    q_offset, q_tiles, per_block = kv_len - q_len, ceil_div(q_len, TILE), layout.stride // TILE
    tile = torch.arange(ceil_div(layout.length, TILE), device=device)
    block, begin = tile // per_block, tile % per_block * TILE
    key = block * block_size + begin
    block_stop = ((block + 1) * block_size).clamp(max=kv_len)
    # Queries from..to of the block see a key of this tile: tiles start to before stop.
    q_from = ((key if causal else block * block_size) - q_offset).clamp(min=0)
    q_to = block_stop - q_offset
    exists = (begin < block_size) & (key < block_stop) & (q_to > 0)
    start = q_from // TILE
    stop = torch.where(exists, ceil_div(q_to, TILE), start)
    # Full are, if the tile has all its keys, tiles of queries of this block alone that see all.
    sees_all = (key + TILE - 1 if causal else block * block_size) - q_offset
    full_start = ceil_div(sees_all.clamp(min=0), TILE)
    full_stop = torch.where(q_to == q_len, q_tiles, q_to // TILE)  # the last tile may be short
    has_all = exists & (begin + TILE <= block_size) & (key + TILE <= kv_len)
    num_full = torch.where(has_all, full_stop - full_start, 0).clamp(min=0)
    full_start = torch.where(num_full > 0, full_start, stop)

    slot = torch.arange(min(ceil_div(block_size, TILE) + 1, q_tiles), device=device)
    full = _lists(num_full, full_start[:, None] + slot, q_tiles)
    skip = torch.where(slot >= (full_start - start)[:, None], num_full[:, None], 0)
    partial = _lists(stop - start - num_full, start[:, None] + slot + skip, q_tiles)
    return partial, full


def _lists(count: Tensor, index: Tensor, limit: int) -> Lists:
    """Give lists the form of BlockMask; unused indices must be in range too."""
    return count.int()[None, None], index.clamp(0, limit - 1).int()[None, None]


def _block_mask(
    seq_lengths: tuple[int, int],
    partial: tuple[Tensor, Tensor, Tensor, Tensor],
    full: tuple[Tensor, Tensor, Tensor, Tensor],
    mask_block_size: tuple[int, int],
    mask_mod: MaskMod,
) -> BlockMask:
    """Make a BlockMask of lists: counts and indices by row, counts and indices by column."""
    return BlockMask(
        seq_lengths,
        partial[0],
        partial[1],
        full[0],
        full[1],
        partial[2],
        partial[3],
        full[2],
        full[3],
        BLOCK_SIZE=mask_block_size,
        mask_mod=mask_mod,
    )
