"""Block masks of the routed plan: regrouped queries, and queries with their own blocks.

Both come from arithmetic on ranges of tiles: the transposed lists, which the backward of
FlexAttention reads, are ranges too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from moba_flex.masks.layout import ceil_div
from moba_flex.masks.mods import Indices, MaskMod
from moba_flex.masks.regroup import Regrouping
from moba_flex.masks.routing import Routing

# FlexAttention's backward on Hopper takes mask blocks in multiples of 128 alone (for head dims
# from 64 to 128).
TILE = 128

_NO_ROW = 2**30  # more than there are, so that the rows of a tile ascend


def settled(length: int) -> int:
    """Return `length` as a mask_mod may capture it under dynamic shapes.

    FlexAttention's own guards pin a length of one tile to that number, but only after the mask_mod
    captured a symbol for it, for which PyTorch 2.11 then generates code that does not compile.
    """
    return TILE if length == TILE else length


def capturable(x: Tensor) -> Tensor:
    """Return `x` `[...]` as `[..., 1]`, as a mask_mod may capture it.

    What a mask_mod captures, a compiled graph would compute anew for every score, on CPU not at
    all; and it would read a buffer as it was before a kernel filled it. But what `topk` returns is
    a buffer in memory that is read as it is.
    """
    return x.unsqueeze(-1).topk(1).values


def row_of(b: Tensor, rows: Tensor) -> Tensor:
    """Return the row of tables `[R, ...]` that is about the sequence `b` of the batch."""
    return b if rows.shape[0] > 1 else b * 0


@dataclass(frozen=True)
class KeyLayout:
    """Keys in memory with every block that a query may choose at a multiple of `TILE`.

    Attributes:
        stride: Places per block.
        length: Number of places.
        key: The key in each place, int64 `[R, length]`, -1 in empty ones; None if every key is in
            its own.
        place: The place of each key, int64 `[R, KV]`, -1 for keys of no such block; or None.
        start: The first key of each block, capturable `[R, M, 1]`; or None.
        stop: The key after its last, likewise.
    """

    stride: int
    length: int
    key: Tensor | None = None
    place: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None

    def places_of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the key in each place, and the place of each key, of each head of `x`.

        `[B, H, length]` and `[B, H, KV, 1]`, of keys or values `[B, H, KV, D]`; None if every key
        is in its place.
        """
        if self.key is None or self.place is None:
            return None
        key, place = (y.unsqueeze(1).expand(*x.shape[:2], -1) for y in (self.key, self.place))
        return key, place.unsqueeze(3)

    def key_of(self, b: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key in a place, and whether there is one; key 0 if not."""
        if self.start is None or self.stop is None:
            return place, place >= 0
        b, block, none = row_of(b, self.start), place // self.stride, place * 0
        key = self.start[b, block, none] + place % self.stride
        exists = key < self.stop[b, block, none]
        return torch.where(exists, key, 0), exists


def lay_out_keys(routing: Routing) -> tuple[KeyLayout, Routing]:
    """Lay out the blocks that queries may choose, and number them by where they lie.

    Blocks of a multiple of `TILE` keys lie like that already, but for packed documents and padded
    rows. Others are padded, a short last block too where queries outside of it may choose it:
    FlexAttention would read past the end of the keys.

    Short blocks of many documents take no room: if causal, only whole blocks can be chosen.

    Returns:
        The layout, and the routing to blocks of `stride` places.
    """
    block_size, kv_len, causal = routing.block_size, settled(routing.kv_len), routing.causal
    stride = ceil_div(block_size, TILE) * TILE
    if routing.tables is None and stride == block_size and (causal or kv_len % block_size == 0):
        return KeyLayout(stride, kv_len), routing
    device = routing.blocks.device
    at = routing.layout.coordinates(routing.blocks.device)
    start, stop = at.start, at.stop
    whole = stop - start == block_size
    offered = whole
    if not causal:  # a short block too, if there is another before it
        offered = whole | ((stop > start) & F.pad(whole.int(), (1, -1)).bool())
    most = kv_len // block_size * (1 if causal else 2) + 1
    count = offered.cumsum(1, dtype=torch.int32)
    # As a pad value, a length would become part of the graph.
    number = F.pad(torch.where(offered, count - 1, most) - most, (0, 1)) + most
    blocks = number.expand(routing.blocks.shape[0], -1).gather(1, routing.blocks.long().flatten(1))
    blocks = blocks.view(routing.blocks.shape)

    # PyTorch 2.11 compiles no search for values that all lists share: the minimum changes nothing.
    index = torch.arange(1, most + 1, device=device, dtype=torch.int32)
    which = torch.searchsorted(count, torch.minimum(index, count[:, -1:] + 1))
    start, stop = (
        (F.pad(x - kv_len, (0, 1)) + kv_len).long().gather(1, which) for x in (start, stop)
    )
    key = start.unsqueeze(2) + torch.arange(stride, device=device)
    key = torch.where(key < stop.unsqueeze(2), key, -1).flatten(1)
    length = most * stride
    place = torch.full((key.shape[0], kv_len + 1), -1, device=device, dtype=torch.int64)
    spot = torch.arange(length, device=device).expand_as(key)
    place = place.scatter(1, torch.where(key < 0, kv_len, key), spot)[:, :-1]
    layout = KeyLayout(stride, length, key, place, capturable(start), capturable(stop))
    return layout, Routing(blocks, stride, routing.q_len, length, causal)


def regrouped_origin(
    groups: Regrouping, layout: KeyLayout, q_len: int, group: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Indices]:
    """Return what tells of a slot and a place the head, the query and the key.

    Args:
        groups: The regrouping, with tiles of `TILE` slots.
        layout: Where the keys lie.
        q_len: Number of queries.
        group: Query heads for each key/value head.
    """
    q_len = settled(q_len)
    row = torch.where(groups.row < 0, _NO_ROW, groups.row).unflatten(2, (-1, TILE))
    # The rows of a tile ascend, so this changes nothing, but see `capturable`.
    rows = row.topk(TILE, largest=False).values

    def origin(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Indices:
        row = rows[b, h, q_idx // TILE, q_idx % TILE]
        row = torch.where(row < _NO_ROW, row, 0)
        return b, h * group + row // q_len, row % q_len, layout.key_of(b, kv_idx)[0]

    return origin


def routed_block_mask(
    groups: Regrouping, layout: KeyLayout, mask_mod: MaskMod | None = None
) -> BlockMask:
    """Return the mask `[B, Hkv, S, length]` of regrouped queries and the blocks they chose.

    Args:
        groups: The regrouping, with tiles of `TILE` slots.
        layout: Where the keys lie.
        mask_mod: What else hides keys, of slots and places.
    """
    num_slots, num_tiles = groups.row.shape[2], groups.tile_block.shape[2]
    count, index = groups.tile_used, groups.tile_block.unsqueeze(-1)
    # A row chooses a block at most once, which bounds the tiles of a block.
    width = ceil_div(groups.slot.shape[2], TILE)
    tile = torch.arange(width, device=index.device, dtype=torch.int32)
    q_count = groups.num_tiles
    q_index = (groups.first_tile.unsqueeze(-1) + tile).clamp(max=num_tiles - 1)

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        exists = layout.key_of(b, kv_idx)[1]
        return exists if mask_mod is None else exists & mask_mod(b, h, q_idx, kv_idx)

    lists = (count, index, q_count, q_index)
    nothing = (torch.zeros_like(count), index, torch.zeros_like(q_count), q_index)
    whole = layout.key is None and mask_mod is None
    partial, full = (nothing, lists) if whole else (lists, nothing)
    return list_tiles((num_slots, layout.length), partial, full, (TILE, layout.stride), sees)


def own_block_mask(routing: Routing, mask_mod: MaskMod | None = None) -> BlockMask:
    """Return the mask `[R, 1, Q, KV]` of queries and their own blocks, in natural order.

    Args:
        routing: Where the blocks lie; what it chose does not matter.
        mask_mod: What else hides keys.
    """
    block_size, causal = routing.block_size, routing.causal
    q_len, kv_len = settled(routing.q_len), settled(routing.kv_len)
    start, stop = _own_keys(routing)
    starts, stops = (start, stop) if routing.tables is None else map(capturable, (start, stop))

    def in_own_block(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if routing.tables is not None:
            b, none = row_of(b, starts), q_idx * 0
            return (kv_idx >= starts[b, q_idx, none]) & (kv_idx < stops[b, q_idx, none])
        # Lengths one by one: under dynamic shapes FlexAttention takes symbols here, but no
        # expressions of them.
        position = q_idx + kv_len - q_len
        same = position // block_size == kv_idx // block_size
        return same & (kv_idx <= position) if causal else same

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = in_own_block(b, q_idx, kv_idx)
        return own if mask_mod is None else own & mask_mod(b, h, q_idx, kv_idx)

    ranges = _Ranges.of(start, stop, masked=mask_mod is not None)
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)
    # What a tile of queries sees, and what sees a tile of keys, spans a tile and the block at an
    # end, or at both. But between the few last queries of documents anything may lie.
    span = kv_len if block_size >= kv_len else TILE + block_size * (1 if causal else 2)
    if routing.tables is not None and q_len != kv_len:
        span = kv_len
    by_query = ranges.lists(min(ceil_div(span, TILE) + 1, kv_tiles), kv_tiles)
    by_key = ranges.transposed(kv_tiles).lists(min(ceil_div(span, TILE) + 1, q_tiles), q_tiles)
    partial, full = (by_query[i] + by_key[i] for i in (0, 1))
    return list_tiles((q_len, kv_len), partial, full, (TILE, TILE), sees)


def _own_keys(routing: Routing) -> tuple[Tensor, Tensor]:
    """Return the first key that each query sees in its own block and the one after the last.

    int64 `[R, Q]`; both ascend. Equal for queries that see nothing.
    """
    device, kv_len = routing.blocks.device, routing.kv_len
    at = routing.layout.coordinates(device)
    position, own = at.position.long(), at.own.long()
    start, stop = (F.pad(x, (0, 1)).long().gather(1, own) for x in (at.start, at.stop))
    if routing.causal:
        stop = torch.minimum(stop, position + 1)
    if routing.tables is None:
        return start, stop
    # Queries that are padding come before those that are not, or after: no tile lies between them
    # and what the nearest of the others sees.
    real = position >= 0
    before = torch.arange(routing.q_len, device=device) < real.int().argmax(1, keepdim=True)
    first = torch.where(real, start, kv_len).amin(1, keepdim=True) // TILE * TILE
    last = ceil_div(torch.where(real, stop, 0).amax(1, keepdim=True), TILE) * TILE
    nothing = torch.where(before, first, last)
    return torch.where(real, start, nothing), torch.where(real, stop, nothing)


@dataclass(frozen=True)
class _Ranges:
    """Ranges of tiles that tiles of the other kind meet, int64 `[R, tiles]` each, all ascending.

    Attributes:
        start: The first tile that is met.
        stop: The tile after the last.
        full_start: The first one that is met as a whole.
        full_stop: The one after the last, unless before the first.
    """

    start: Tensor
    stop: Tensor
    full_start: Tensor
    full_stop: Tensor

    @classmethod
    def of(cls, start: Tensor, stop: Tensor, *, masked: bool) -> "_Ranges":
        """Return the tiles of keys of each tile of queries, given the keys of each query."""
        q_len = start.shape[1]
        index = torch.arange(ceil_div(q_len, TILE) * TILE, device=start.device)
        index = index.clamp(max=q_len - 1)
        start, stop = (x[:, index].unflatten(1, (-1, TILE)) for x in (start, stop))
        full_start = ceil_div(start.amax(2), TILE)
        return cls(
            start.amin(2) // TILE,
            ceil_div(stop.amax(2), TILE),
            full_start,
            full_start if masked else stop.amin(2) // TILE,
        )

    def transposed(self, tiles: int) -> "_Ranges":
        """Return the tiles that meet each of so many tiles."""
        tile = torch.arange(tiles, device=self.start.device)[:, None]

        def before(x: Tensor) -> Tensor:
            return (x.unsqueeze(1) <= tile).sum(2)

        return _Ranges(
            before(self.stop), before(self.start), before(self.full_stop), before(self.full_start)
        )

    def lists(self, width: int, tiles: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return counts `[R, 1, n]` and indices `[R, 1, n, width]`: partly met, and fully."""
        slot = torch.arange(width, device=self.start.device)
        start, stop, full_start, full_stop = (
            x.unsqueeze(1) for x in (self.start, self.stop, self.full_start, self.full_stop)
        )
        num_full = (full_stop - full_start).clamp(min=0)
        num_partial = (stop - start).clamp(min=0) - num_full
        skip = torch.where(slot >= (full_start - start).unsqueeze(3), num_full.unsqueeze(3), 0)
        partial, full = start.unsqueeze(3) + slot + skip, full_start.unsqueeze(3) + slot
        # Unused indices must be in range too.
        partial, full = (x.clamp(0, tiles - 1) for x in (partial, full))
        return (num_partial, partial), (num_full, full)


def list_tiles(
    seq_lengths: tuple[int, int],
    partial: tuple[Tensor, ...],
    full: tuple[Tensor, ...],
    mask_block_size: tuple[int, int],
    mask_mod: MaskMod,
) -> BlockMask:
    """Make a BlockMask of lists.

    Args:
        seq_lengths: Numbers of queries and keys.
        partial: Of tiles to mask: counts and indices by row, counts and indices by column.
        full: Of tiles that are seen as a whole, likewise.
        mask_block_size: Queries and keys of a tile.
        mask_mod: Which keys of a tile to mask are seen.
    """
    partial, full = (tuple(map(_contiguous, lists)) for lists in (partial, full))
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


def _contiguous(x: Tensor) -> Tensor:
    """Return `x` as int32, contiguous in compiled graphs too.

    There what is computed lies in memory in an order of the compiler's choice, whatever strides it
    seems to have, and a view of one head has stride 0. But FlexAttention on CUDA takes the lists
    of a sequence to follow those of the one before, and the indices of a row to follow each other:
    it would read other lists, silently. One dimension leaves no choice, and strides that are asked
    for are kept.
    """
    strides = [prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    return x.long().flatten().int().as_strided(x.shape, strides)
