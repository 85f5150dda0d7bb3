"""Block masks of the routed plan: regrouped queries, and queries with their own blocks.

Both are made by arithmetic on ranges of tiles. The transposed lists, which FlexAttention's
backward reads, are ranges too.
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

# FlexAttention's backward on Hopper accepts only mask blocks of multiples of 128 (for head dims
# from 64 to 128).
TILE = 128

_NO_ROW = 2**30  # more than any row, so that rows ascend within a tile


def settled(length: int) -> int:
    """Return `length`, made constant if it is one tile, for a mask_mod to capture.

    Under dynamic shapes PyTorch 2.11 generates code that does not compile if a mask_mod captures
    the symbol of a length of one tile: FlexAttention's guards make it constant, but too late. So
    the comparison here makes it constant first.
    """
    return TILE if length == TILE else length


def capturable(x: Tensor) -> Tensor:
    """Return `x` `[...]` as `[..., 1]`, materialized by `topk` for a mask_mod to capture.

    In a compiled graph, inductor inlines the computation of a captured tensor into every score,
    and on CPU does not compile it; or the mask_mod reads a buffer before a kernel has filled it.
    The result of `topk` is a buffer that is complete and read as it is.
    """
    return x.unsqueeze(-1).topk(1).values


def row_of(b: Tensor, rows: Tensor) -> Tensor:
    """Return the row of `rows` `[R, ...]` for row `b` of the batch; `R` is 1 or `B`."""
    return b if rows.shape[0] > 1 else b * 0


@dataclass(frozen=True)
class KeyLayout:
    """Where keys lie in memory, with each block that a query may choose at a multiple of `TILE`.

    A *place* is a position in that memory. The tensors are None if every key is at its own place.

    Attributes:
        stride: Places per block.
        length: Number of places.
        key: The key in each place, int64 `[R, length]`; -1 in empty places.
        place: The place of each key, int64 `[R, KV]`; -1 for keys of blocks that no query may
            choose.
        start: The first key of each block, `[R, M, 1]`, from `capturable`.
        stop: The key after the last of each block, `[R, M, 1]`, from `capturable`.
    """

    stride: int
    length: int
    key: Tensor | None = None
    place: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None

    def places_of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the key in each place and the place of each key, repeated for each head of `x`.

        They are `[B, H, length]` and `[B, H, KV, 1]`, for keys or values `x` `[B, H, KV, D]`; None
        if every key is at its own place.
        """
        if self.key is None or self.place is None:
            return None
        key, place = (y.unsqueeze(1).expand(*x.shape[:2], -1) for y in (self.key, self.place))
        return key, place.unsqueeze(3)

    def key_of(self, b: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key in a place, and whether it holds one; key 0 if it does not."""
        if self.start is None or self.stop is None:
            return place, place >= 0
        b, block, none = row_of(b, self.start), place // self.stride, place * 0
        key = self.start[b, block, none] + place % self.stride
        exists = key < self.stop[b, block, none]
        return torch.where(exists, key, 0), exists


def lay_out_keys(routing: Routing) -> tuple[KeyLayout, Routing]:
    """Lay out the blocks that queries may choose, and number them in that order.

    In plain rows, blocks of a multiple of `TILE` keys need no move. Other blocks are padded. So is
    a short last block that queries outside of it may choose: FlexAttention would read past the end
    of the keys.

    If causal, only whole blocks can be chosen, and the short blocks of documents get no places.

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
    if not causal:  # also a short block, if another block precedes it
        offered = whole | ((stop > start) & F.pad(whole.int(), (1, -1)).bool())
    most = kv_len // block_size * (1 if causal else 2) + 1
    count = offered.cumsum(1, dtype=torch.int32)
    # The length is subtracted and added again: as a pad value it would become a constant.
    number = F.pad(torch.where(offered, count - 1, most) - most, (0, 1)) + most
    blocks = number.expand(routing.blocks.shape[0], -1).gather(1, routing.blocks.long().flatten(1))
    blocks = blocks.view(routing.blocks.shape)

    # PyTorch 2.11 does not compile a `searchsorted` for values that all rows share: the minimum,
    # which changes nothing, gives each row values of its own.
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
    """Return a function from a slot and a place to the query head, the query and the key.

    Args:
        groups: The regrouping, with tiles of `TILE` slots.
        layout: Where the keys lie.
        q_len: Number of queries.
        group: Query heads for each key/value head.
    """
    q_len = settled(q_len)
    row = torch.where(groups.row < 0, _NO_ROW, groups.row).unflatten(2, (-1, TILE))
    # The rows of a tile ascend already: `topk` only makes them capturable, see `capturable`.
    rows = row.topk(TILE, largest=False).values

    def origin(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Indices:
        row = rows[b, h, q_idx // TILE, q_idx % TILE]
        row = torch.where(row < _NO_ROW, row, 0)
        return b, h * group + row // q_len, row % q_len, layout.key_of(b, kv_idx)[0]

    return origin


def routed_block_mask(
    groups: Regrouping, layout: KeyLayout, mask_mod: MaskMod | None = None
) -> BlockMask:
    """Return the mask `[B, Hkv, S, length]` between regrouped queries and the blocks they chose.

    Args:
        groups: The regrouping, with tiles of `TILE` slots.
        layout: Where the keys lie.
        mask_mod: Hides further keys, given slots and places.
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
    """Return the mask `[R, 1, Q, KV]` between queries and their own blocks, in natural order.

    Args:
        routing: Says where the blocks lie; the chosen blocks are not read.
        mask_mod: Hides further keys.
    """
    block_size, causal = routing.block_size, routing.causal
    q_len, kv_len = settled(routing.q_len), settled(routing.kv_len)
    start, stop = _own_keys(routing)
    starts, stops = (start, stop) if routing.tables is None else map(capturable, (start, stop))

    def in_own_block(b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if routing.tables is not None:
            b, none = row_of(b, starts), q_idx * 0
            return (kv_idx >= starts[b, q_idx, none]) & (kv_idx < stops[b, q_idx, none])
        # q_len and kv_len stay apart: under dynamic shapes a mask_mod can capture symbols, but no
        # expressions of them.
        position = q_idx + kv_len - q_len
        same = position // block_size == kv_idx // block_size
        return same & (kv_idx <= position) if causal else same

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = in_own_block(b, q_idx, kv_idx)
        return own if mask_mod is None else own & mask_mod(b, h, q_idx, kv_idx)

    ranges = _Ranges.of(start, stop, masked=mask_mod is not None)
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)
    # The keys that a tile of queries sees span at most a tile and the block at one end or, if not
    # causal, at both ends. So do the queries that see a tile of keys. There is no such bound if
    # documents have fewer queries than keys.
    span = kv_len if block_size >= kv_len else TILE + block_size * (1 if causal else 2)
    if routing.tables is not None and q_len != kv_len:
        span = kv_len
    by_query = ranges.lists(min(ceil_div(span, TILE) + 1, kv_tiles), kv_tiles)
    by_key = ranges.transposed(kv_tiles).lists(min(ceil_div(span, TILE) + 1, q_tiles), q_tiles)
    partial, full = (by_query[i] + by_key[i] for i in (0, 1))
    return list_tiles((q_len, kv_len), partial, full, (TILE, TILE), sees)


def _own_keys(routing: Routing) -> tuple[Tensor, Tensor]:
    """Return the first key that each query sees in its own block, and the key after the last.

    Both are int64 `[R, Q]`, ascending, and equal for queries that see no key.
    """
    device, kv_len = routing.blocks.device, routing.kv_len
    at = routing.layout.coordinates(device)
    position, own = at.position.long(), at.own.long()
    start, stop = (F.pad(x, (0, 1)).long().gather(1, own) for x in (at.start, at.stop))
    if routing.causal:
        stop = torch.minimum(stop, position + 1)
    if routing.tables is None:
        return start, stop
    # Padding queries precede or follow the real ones. They get an empty range at the tile boundary
    # next to the keys that the real ones see, so that a tile with both kinds lists no more tiles.
    real = position >= 0
    before = torch.arange(routing.q_len, device=device) < real.int().argmax(1, keepdim=True)
    first = torch.where(real, start, kv_len).amin(1, keepdim=True) // TILE * TILE
    last = ceil_div(torch.where(real, stop, 0).amax(1, keepdim=True), TILE) * TILE
    nothing = torch.where(before, first, last)
    return torch.where(real, start, nothing), torch.where(real, stop, nothing)


@dataclass(frozen=True)
class _Ranges:
    """The range of key tiles that each tile of queries sees, or the transpose; int64 `[R, tiles]`.

    All ascend. A tile is seen *fully* if the mask hides none of its pairs of a query and a key.

    Attributes:
        start: The first tile seen.
        stop: The tile after the last one seen.
        full_start: The first tile seen fully.
        full_stop: The tile after the last one seen fully; at most `full_start` if there is none.
    """

    start: Tensor
    stop: Tensor
    full_start: Tensor
    full_stop: Tensor

    @classmethod
    def of(cls, start: Tensor, stop: Tensor, *, masked: bool) -> "_Ranges":
        """Return the key tiles that each tile of queries sees, given the keys of each query."""
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
        """Return the ranges of the transposed mask, which has `tiles` key tiles."""
        tile = torch.arange(tiles, device=self.start.device)[:, None]

        def before(x: Tensor) -> Tensor:
            return (x.unsqueeze(1) <= tile).sum(2)

        return _Ranges(
            before(self.stop), before(self.start), before(self.full_stop), before(self.full_start)
        )

    def lists(self, width: int, tiles: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return counts `[R, 1, n]` and indices `[R, 1, n, width]` of partial and full tiles."""
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
    """Make a BlockMask from lists of tiles.

    Args:
        seq_lengths: Numbers of queries and keys.
        partial: Lists of the tiles that `mask_mod` applies to: counts and indices by row, counts
            and indices by column.
        full: The same lists of the tiles without hidden keys.
        mask_block_size: Queries and keys per tile.
        mask_mod: Says which keys of a partial tile are seen.
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

    FlexAttention on CUDA assumes contiguous lists. But inductor lays out a computed tensor as it
    likes, whatever strides the graph shows, and a view of one head has stride 0: FlexAttention
    would silently read the lists of other sequences. A flat tensor has only one layout, and
    inductor keeps the strides of `as_strided`.
    """
    strides = [prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    return x.long().flatten().int().as_strided(x.shape, strides)
