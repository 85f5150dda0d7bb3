"""The decode plan on CPU: few queries attend to many keys, without gradients.

Where the chosen blocks of all queries amount to much of the cache, flash attention takes all keys
and a mask. Else work is cut into tiles of queries and the keys that they attend to: one query and
all its blocks, or, where many queries share blocks, a few queries and one block. Keys of many
tiles are gathered at a time, and flash attention takes tiles for rows of a batch. Matrix products
stand in for it with a soft cap, where 16-bit inputs need an exact log-sum-exp, and where it would
hide NaN. What belongs to one query is merged by log-sum-exp.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.cpu import bias_of, flash_op, forward, widen
from moba_flex.compile.engine import shapes_of_attention
from moba_flex.masks._torch.inputs import all_finite, dense_vectors
from moba_flex.masks.layout import Coordinates, Layout, ceil_div
from moba_flex.masks.mods import Mods
from moba_flex.masks.routing import Routing

_TILE = 16  # queries of a tile, at most
_ALONE = 4  # of up to so many queries, each has a tile of its own
_AT_ONCE = 1 << 20  # numbers gathered at a time: keys stay in the processor's cache
_MOST_MASKED = 1 << 24  # numbers of a mask over all keys
_LEAST_KEYS = 16  # flash attention hides NaN among fewer keys (pytorch/pytorch#141128)


class _Memory(threading.local):
    """Memory for copies of keys and of values, kept by each thread.

    Fresh memory of megabytes would cost more time than the copies: the system clears its pages.
    """

    @cached_property
    def rooms(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(2, 8 * _AT_ONCE, dtype=torch.uint8, device="cpu")


_memory = _Memory()


@torch.library.custom_op("moba_flex::decode_cpu", mutates_args=(), device_types="cpu")
def decode_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    queries: Tensor | None,
    extents: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
    exact_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend to the own block and to the chosen ones.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        blocks: Those of a `Routing`.
        queries: Those of its layout.
        extents: Those of its layout.
        block_size: Keys per block.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores.
        softcap: Soft cap of the scores; 0 for none.
        exact_lse: Whether the log-sum-exp is needed; else, with 16-bit inputs, it errs by 5e-5.

    Returns:
        Output `[B, Hq, Q, Dv]` and log-sum-exp `[B, Hq, Q]` (float32, float64 for float64 inputs).
        A query that sees nothing has output 0 and log-sum-exp -inf.
    """
    block_size = min(block_size, max(1, k.shape[2]))  # no block has more keys
    routing = Routing.over(
        Layout(q.shape[2], k.shape[2], block_size, causal, queries, extents), blocks
    )
    exact = torch.promote_types(q.dtype, torch.float32)
    # A row behind the last stands in where a tile has no query.
    rows = F.pad(q.flatten(0, 2), (0, 0, 0, 1))
    # Flash attention rounds exponentials of 16-bit inputs to 20 bits: log-sum-exps err by 5e-5.
    flash = q.dtype.itemsize > 2 or not exact_lse
    flash = flash and not softcap and block_size >= _LEAST_KEYS and all_finite(q)
    if flash and _few_keys(q, k, v, routing):
        out, lse = _attend_to_all(q, k, v, routing, scale)
        if _certain(out, lse):
            return out, lse
    attend = _attend if flash else partial(_multiply, softcap=softcap)
    keys, values = map(_Vectors.of, (k, v), _memory.rooms)
    attended = []
    for tiles in _cut(routing, v.shape[1]):
        for tile in tiles.split(
            max(1, _AT_ONCE // (tiles.slot.shape[1] * max(k.shape[3], v.shape[3])))
        ):
            inputs = rows[tile.row], keys.take(tile), values.take(tile)
            part, lse = attend(*inputs, tile.hidden, scale)
            # The key that made something infinite or NaN may be one that the query does not see.
            if not (_certain(part, lse) if flash else all_finite(part, lse)):
                return forward(q, k, v, routing, Mods(softcap=softcap or None), scale)
            attended.append((tile.row.flatten(), lse.flatten(), part.flatten(0, 1)))
    out = torch.zeros(rows.shape[0], v.shape[3], dtype=exact)
    lse = torch.full((rows.shape[0],), -math.inf, dtype=exact)
    if routing.q_len <= _ALONE:
        for row, part_lse, part in attended:
            out[row], lse[row] = part.to(exact), part_lse
    else:
        _merge(out, lse, attended)
    shape = q.shape[:3]
    return out[:-1].view(*shape, -1).to(q.dtype), lse[:-1].view(shape)


decode_cpu.register_fake(shapes_of_attention)


def _certain(out: Tensor, lse: Tensor) -> bool:
    """Whether results of flash attention show neither NaN nor infinity, nor hide any.

    It returns 0 where all scores are -inf.
    """
    return all_finite(out, lse) and bool(lse.all())


def _few_keys(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> bool:
    """Whether attention to all keys, under a mask, costs less than copies of those chosen."""
    batch, num_heads, q_len, head_dim = q.shape
    kv_len, chosen = k.shape[2], (routing.blocks.shape[3] + 1) * routing.block_size
    # Measured: reading a key costs a third of copying and reading it, and a score under the mask
    # a seventh of one in a tile.
    times = min(3 * (num_heads // k.shape[1]) * q_len, 7)
    small = kv_len <= times * chosen and batch * num_heads * q_len * kv_len <= _MOST_MASKED
    return small and routing.tables is None and head_dim == v.shape[3]


def _attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to all keys of plain rows, under a mask, by flash attention."""
    shape, q_len, kv_len = q.shape[:3], q.shape[2], k.shape[2]
    size = routing.block_size
    own = torch.arange(kv_len - q_len, kv_len)[:, None] // size
    blocks = torch.cat((routing.blocks, own.expand(*shape, 1)), dim=3)
    bias = q.new_full((*shape, routing.num_blocks + 1), -math.inf).scatter_(3, blocks, 0.0)
    bias = bias[..., :-1].repeat_interleave(size, dim=3)[..., :kv_len]
    if routing.causal and q_len > 1:  # all other keys come before the first query
        later = torch.ones(q_len, q_len, dtype=torch.bool).triu_(1)
        bias[..., kv_len - q_len :].masked_fill_(later, -math.inf)
    # Heads that share keys become queries of one head.
    q, bias = (x.reshape(shape[0], k.shape[1], -1, x.shape[3]) for x in (q, bias))
    out, lse = flash_op(*dense_vectors(q, k, v), attn_mask=bias, scale=scale)
    return out.reshape(*shape, -1).contiguous(), lse.reshape(shape).contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within tiles, by flash attention.

    Args:
        q: Queries, `[T, M, D]`.
        k: Keys, `[T, S, D]`.
        v: Values, `[T, S, Dv]`.
        hidden: Those of `_Tiles`.
        scale: Factor on the scores.

    Returns:
        Output `[T, M, Dv]` and log-sum-exp `[T, M]`.
    """
    width = max(q.shape[2], v.shape[2])
    bias = None if hidden is None else bias_of(~hidden, q.dtype).unsqueeze(1)
    inputs = (widen(x.unsqueeze(1), width) for x in (q, k, v))
    out, lse = flash_op(*inputs, attn_mask=bias, scale=scale)
    return out[:, 0, :, : v.shape[2]], lse[:, 0]


def _multiply(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Do what `_attend` does, by matrix products, and with a soft cap."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    # Products with tall first factors are up to ten times as fast.
    scores = (k @ q.mT).mul_(scale).mT
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    return scores.softmax(dim=2) @ v, scores.logsumexp(dim=2)


def _merge(out: Tensor, lse: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Merge parts of rows, each of their numbers, log-sum-exps and outputs.

    Args:
        out: Zeros, `[R, Dv]`; written to.
        lse: -inf, `[R]`; written to.
        parts: The parts.
    """
    most, total = lse.clone(), torch.zeros_like(lse)
    for row, part_lse, _ in parts:
        most.scatter_reduce_(0, row, part_lse, "amax")
    for row, part_lse, part in parts:
        share = (part_lse - most[row]).exp_()
        total.index_add_(0, row, share)
        out.index_add_(0, row, share.unsqueeze(1) * part)
    out /= total.where(total > 0, 1.0).unsqueeze(1)
    torch.add(most, total.log(), out=lse)


def _cut(routing: Routing, num_kv_heads: int) -> "Iterator[_Tiles]":
    """Yield tiles with all pairs of a query and a block that it attends to."""
    at = routing.layout.coordinates("cpu")
    own = at.own[:, None, :, None].expand(*routing.blocks.shape[:3], 1)
    if routing.q_len <= _ALONE:
        lists = torch.cat((routing.blocks, own), dim=3)
        yield _Tiles.of_queries(routing, at, lists, num_kv_heads)
        return
    # Apart, since an own block has many queries, and hides keys from some.
    for lists in (routing.blocks, own):
        if bool((lists < routing.num_blocks).any()):
            yield _Tiles.of_blocks(routing, at, lists, num_kv_heads)


@dataclass
class _Tiles:
    """Tiles of `M` queries that share a key/value head, and of `S` keys.

    Attributes:
        list: Key/value head of each tile, counted through the batch, `[T]`.
        row: Queries, counted through batch and heads, `[T, M]`; the number of all for none.
        slot: Keys, `[T, S]`; behind the end of a block its last key is repeated.
        hidden: Which keys a query does not see, `[T, M or 1, S]`; None if none is hidden.
    """

    list: Tensor
    row: Tensor
    slot: Tensor
    hidden: Tensor | None

    @classmethod
    def of_queries(
        cls, routing: Routing, at: Coordinates, lists: Tensor, num_kv_heads: int
    ) -> Self:
        """Make a tile of each query and the blocks of its list, the last of which is its own."""
        none, size = routing.num_blocks, routing.block_size
        batch, num_heads, q_len, _ = lists.shape
        row = (lists[..., -1].flatten() < none).nonzero()
        block = lists.flatten(0, 2)[row.squeeze(1)].long()
        real = block < none
        block = block.where(real, block[:, -1:])
        head = row // (q_len * (num_heads // num_kv_heads))
        layout = head // num_kv_heads % at.start.shape[0]
        slot = at.start[layout, block].long()[..., None] + torch.arange(size)
        end = at.stop[layout, block].long() - 1
        last = end.where(real, -1)
        if routing.causal:
            position = at.position[:, None].expand(batch, num_heads, -1).flatten()
            last = last.minimum(position[row])
        hidden = (slot > last[..., None]).flatten(1).unsqueeze(1)
        return cls(head.squeeze(1), row, slot.minimum(end[..., None]).flatten(1), hidden)

    @classmethod
    def of_blocks(
        cls, routing: Routing, at: Coordinates, lists: Tensor, num_kv_heads: int
    ) -> Self:
        """Make tiles of each block and up to `_TILE` of the queries that list it."""
        none, size = routing.num_blocks, routing.block_size
        batch, num_heads, q_len, _ = lists.shape
        row, column = (lists.flatten(0, 2) < none).nonzero(as_tuple=True)
        block = lists.flatten(0, 2)[row, column]
        head = row // (q_len * (num_heads // num_kv_heads))
        key, order = (head * none + block).sort(stable=True)
        row = row[order]
        found, which, count = key.unique_consecutive(return_inverse=True, return_counts=True)
        # Fuller tiles read fewer keys, emptier ones have fewer queries to pad.
        width = min(_TILE, int(count.max()), ceil_div(3 * key.shape[0], 2 * found.shape[0]))
        per_block = ceil_div(count, width)
        first_pair, first_tile = count.cumsum(0) - count, per_block.cumsum(0) - per_block
        within = torch.arange(key.shape[0]) - first_pair[which]
        rows = torch.full((int(per_block.sum()), width), batch * num_heads * q_len)
        rows[first_tile[which] + within // width, within % width] = row

        found = found.repeat_interleave(per_block)
        head, block = found // none, found % none
        layout = head // num_kv_heads % at.start.shape[0]
        slot = at.start[layout, block].long()[:, None] + torch.arange(size)
        last = end = at.stop[layout, block].long()[:, None] - 1
        if routing.causal:
            position = at.position[:, None].expand(batch, num_heads, -1).flatten()
            last = last.minimum(F.pad(position, (0, 1), value=none * size)[rows])
        hidden = (
            slot.unsqueeze(1) > last.unsqueeze(2) if bool((slot[:, -1:] > last).any()) else None
        )
        return cls(head, rows, slot.minimum(end), hidden)

    def split(self, size: int) -> "Iterator[_Tiles]":
        """Cut into parts of `size` tiles."""
        for low in range(0, self.list.shape[0], size):
            part = slice(low, low + size)
            hidden = None if self.hidden is None else self.hidden[part]
            yield _Tiles(self.list[part], self.row[part], self.slot[part], hidden)


@dataclass
class _Vectors:
    """Keys or values as rows of one matrix.

    Attributes:
        matrix: The rows, `[R, D]`.
        first: The row of the first slot of each key/value head, `[B * Hkv]`.
        room: Bytes for copies.
    """

    matrix: Tensor
    first: Tensor
    room: Tensor

    @classmethod
    def of(cls, x: Tensor, room: Tensor) -> Self:
        """View a tensor `[B, Hkv, KV, D]`; copy it only if it has no such view."""
        batch, num_heads, length, dim = x.shape
        of_row, of_head, step, last = x.stride()
        if last != 1 or step < dim or of_row % step or of_head % step:
            x = x.contiguous()
            # Its own strides may be others where it has one row, head or key.
            of_row, of_head, step = num_heads * length * dim, length * dim, dim
        of_row, of_head = of_row // step, of_head // step
        number = max(0, (batch - 1) * of_row + (num_heads - 1) * of_head + length)
        first = torch.arange(batch)[:, None] * of_row + torch.arange(num_heads) * of_head
        return cls(x.as_strided((number, dim), (step, 1)), first.flatten(), room)

    def take(self, tiles: _Tiles) -> Tensor:
        """Copy the vectors of the keys of tiles, `[T, S, D]`, over those copied before."""
        rows = (self.first[tiles.list][:, None] + tiles.slot).flatten()
        size = rows.shape[0] * self.matrix.shape[1]
        room = self.room.view(self.matrix.dtype)[:size]
        if room.shape[0] < size:  # one tile of many keys
            room = self.matrix.new_empty(size)
        room = room.view(rows.shape[0], -1)
        torch.index_select(self.matrix, 0, rows, out=room)
        return room.unflatten(0, tiles.slot.shape)
