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

# FlexAttention's backward on Hopper takes mask blocks in multiples of 128 alone (for head dims
# from 64 to 128).
TILE = 128


@dataclass(frozen=True)
class KeyLayout:
    """Keys in memory with every block at a multiple of `TILE`.

    Blocks of a multiple of `TILE` keys lie like that already; others are padded. A short last
    block is padded too where queries outside of it may choose it, since FlexAttention would read
    past the end of the keys.

    Attributes:
        block_size: Keys per block.
        kv_len: Number of keys.
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
    num_slots = groups.row.shape[2]
    # A block is chosen at most once by a row, which bounds its tiles.
    width = ceil_div(groups.slot.shape[2], TILE)
    count = groups.tile_used.int()
    index = groups.tile_block.unsqueeze(-1)
    last = groups.tile_block.shape[2] - 1
    tiles = torch.arange(width, device=index.device, dtype=torch.int32)
    q_index = (groups.first_tile.unsqueeze(-1) + tiles).clamp(max=last)
    q_count = groups.num_tiles

    def has_key(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return layout.position(kv_idx) < layout.kv_len

    lists = (count, index, q_count, q_index)
    nothing = (torch.zeros_like(count), index, torch.zeros_like(q_count), q_index)
    partial, full = (lists, nothing) if layout.padded else (nothing, lists)
    return _block_mask((num_slots, layout.length), partial, full, (TILE, layout.stride), has_key)


def own_block_mask(q_len: int, layout: KeyLayout, causal: bool, device: torch.device) -> BlockMask:
    """Return the mask of queries in natural order and their own blocks, `[1, 1, Q, length]`.

    Args:
        q_len: Number of queries, the last of the positions.
        layout: Where the keys lie.
        causal: Whether a query sees only keys at its position and before.
        device: Where to make the mask.
    """
    block_size, kv_len = layout.block_size, layout.kv_len
    q_offset = kv_len - q_len
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(layout.length, TILE)
    per_block = layout.stride // TILE

    def arange(n: int) -> Tensor:
        return torch.arange(n, device=device)

    # Queries: positions first..last of a tile lie in blocks low..high, whose tiles are start..stop
    # - 1.
    first = q_offset + arange(q_tiles) * TILE
    last = (first + TILE - 1).clamp(max=kv_len - 1)
    low, high = first // block_size, last // block_size
    start = low * per_block
    keys_in_high = (
        last % block_size + 1 if causal else (kv_len - high * block_size).clamp(max=block_size)
    )
    stop = high * per_block + ceil_div(keys_in_high, TILE)
    # Tiles that every query of the tile sees whole: no second block, no padding, nothing later
    # than the first query.
    whole = block_size // TILE
    seen = (first % block_size + 1 if causal else kv_len - low * block_size) // TILE
    full = torch.where(low == high, seen.clamp(max=whole), 0)
    spanned = (TILE + block_size - 2) // block_size + 1  # blocks that a tile can touch
    slots = arange(min(spanned * per_block, kv_tiles))
    kv_full = _lists(full, start[:, None] + slots, kv_tiles)
    kv_partial = _lists(stop - start - full, (start + full)[:, None] + slots, kv_tiles)

    # Keys: a tile of block `block` from key `begin` is seen by queries from..to, whole by tiles
    # full_start..full_stop.
    tile = arange(kv_tiles)
    block, begin = tile // per_block, tile % per_block * TILE
    block_stop = ((block + 1) * block_size).clamp(max=kv_len)
    key = block * block_size + begin
    q_from = ((key if causal else block * block_size) - q_offset).clamp(min=0)
    q_to = block_stop - q_offset
    exists = (begin < block_size) & (key < block_stop) & (q_to > 0)
    q_start = q_from // TILE
    q_stop = torch.where(exists, ceil_div(q_to, TILE), q_start)
    full_from = (key + TILE - 1 if causal else block * block_size) - q_offset
    full_start = ceil_div(full_from.clamp(min=0), TILE)
    # The last tile of queries may be short: it ends where the queries do.
    full_stop = torch.where(q_to == q_len, q_tiles, q_to // TILE)
    is_whole = exists & (begin + TILE <= block_size) & (key + TILE <= kv_len)
    num_full = torch.where(is_whole, full_stop - full_start, 0).clamp(min=0)
    full_start = torch.where(num_full > 0, full_start, q_stop)
    slots = arange(min(ceil_div(block_size, TILE) + 1, q_tiles))
    q_full = _lists(num_full, full_start[:, None] + slots, q_tiles)
    before = full_start - q_start
    skip = torch.where(slots >= before[:, None], num_full[:, None], 0)
    q_partial = _lists(q_stop - q_start - num_full, q_start[:, None] + slots + skip, q_tiles)

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # Lengths one by one: under dynamic shapes FlexAttention takes symbols here, but no
        # expressions of them.
        position = q_idx + kv_len - q_len
        same = position // block_size == kv_idx // layout.stride
        key = layout.position(kv_idx)
        return same & (key <= position) if causal else same & (key < kv_len)

    return _block_mask(
        (q_len, layout.length), (*kv_partial, *q_partial), (*kv_full, *q_full), (TILE, TILE), sees
    )


def _lists(count: Tensor, index: Tensor, limit: int) -> tuple[Tensor, Tensor]:
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
