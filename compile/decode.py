"""The decode plan on CPU: few queries attend to many keys, without gradients.

Pairs of a query and a block that it chose are sorted by block and cut into tiles, each of a few
queries and the keys of one block. All tiles of all heads are one batched matrix product.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.cpu import forward
from moba_flex.compile.engine import shapes_of_attention
from moba_flex.masks._torch.inputs import all_finite
from moba_flex.masks.layout import Layout, ceil_div
from moba_flex.masks.mods import Mods
from moba_flex.masks.routing import Routing

_TILE = 16  # queries of a tile, at most
_AT_ONCE = 1 << 19  # numbers gathered at a time: keys stay in the processor's cache


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

    Returns:
        Output `[B, Hq, Q, Dv]` and log-sum-exp `[B, Hq, Q]` (float32, float64 for float64 inputs).
        A query that sees nothing has output 0 and log-sum-exp -inf.
    """
    routing = Routing.over(
        Layout(q.shape[2], k.shape[2], block_size, causal, queries, extents), blocks
    )
    exact = torch.promote_types(q.dtype, torch.float32)
    # A row behind the last stands in where a tile has no query.
    rows = F.pad(q.flatten(0, 2).to(exact), (0, 0, 0, 1))
    most = torch.full((rows.shape[0],), -math.inf, dtype=exact)
    sees = torch.zeros(rows.shape[0], dtype=torch.bool)
    tiles, attended = _Tiles.of(routing, v.shape[1]), []
    keys, values = _Vectors.of(k), _Vectors.of(v)
    for tile in tiles.split(max(1, _AT_ONCE // (block_size * max(q.shape[3], v.shape[3])))):
        some_k, some_v = (x.take(tile).to(exact) for x in (keys, values))
        # `[T, block_size, M]`: products with tall first factors are up to ten times as fast.
        scores = (some_k @ rows[tile.row].mT).mul_(scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(tile.slot.unsqueeze(2) > tile.last.unsqueeze(1), -math.inf)
        top = scores.amax(dim=1).clamp_(min=torch.finfo(exact).min)
        weight = scores.sub_(top.unsqueeze(1)).exp_()
        value = weight.mT @ some_v
        if not all_finite(value):  # perhaps of a key that the query does not see
            return forward(q, k, v, routing, Mods(softcap=softcap or None), scale)
        attended.append((tile.row.flatten(), top.flatten(), weight.sum(1).flatten(), value))
        sees[tile.row[tile.slot[:, :1] <= tile.last]] = True
    for row, top, _, _ in attended:
        most.scatter_reduce_(0, row, top, "amax")
    total = torch.zeros_like(most)
    out = rows.new_zeros(rows.shape[0], v.shape[3])
    for row, top, weight, value in attended:
        share = (top - most[row]).exp_()
        total.index_add_(0, row, share * weight)
        out.index_add_(0, row, value.flatten(0, 1).mul_(share.unsqueeze(1)))
    # A query whose scores are all -inf has a total of zero: its output is NaN.
    out = out / total.where(sees, 1.0).unsqueeze(1)
    lse = (most + total.log()).where(sees, -math.inf)
    shape = q.shape[:3]
    return out[:-1].view(*shape, -1).to(q.dtype), lse[:-1].view(shape)


decode_cpu.register_fake(shapes_of_attention)


@dataclass
class _Tiles:
    """Tiles of up to `M` queries that share a key/value head, and the keys of one block.

    Attributes:
        list: Key/value head of each tile, counted through the batch, `[T]`.
        row: Queries, counted through batch and heads, `[T, M]`; the number of all for none.
        slot: Keys, `[T, block_size]`; behind the end of a block come those of the next.
        end: The last key of each block, `[T]`.
        last: The last key that each query sees, `[T, M]`; -1 for none.
    """

    list: Tensor
    row: Tensor
    slot: Tensor
    end: Tensor
    last: Tensor

    @classmethod
    def of(cls, routing: Routing, num_kv_heads: int) -> Self:
        """Sort the pairs of a routing by block, and cut them."""
        at, none, size = routing.layout.coordinates("cpu"), routing.num_blocks, routing.block_size
        batch, num_heads, q_len, _ = routing.blocks.shape
        own = at.own[:, None, :, None].expand(batch, num_heads, -1, 1)
        lists = torch.cat((routing.blocks, own), dim=3).long()
        row, column = (lists.flatten(0, 2) < none).nonzero(as_tuple=True)
        block = lists.flatten(0, 2)[row, column]
        head = row // (q_len * (num_heads // num_kv_heads))
        key, order = (head * none + block).sort(stable=True)
        row = row[order]
        found, which, count = key.unique_consecutive(return_inverse=True, return_counts=True)
        width = min(_TILE, int(count.max()) if count.numel() else 1)
        per_block = ceil_div(count, width)
        first_pair, first_tile = count.cumsum(0) - count, per_block.cumsum(0) - per_block
        within = torch.arange(key.shape[0]) - first_pair[which]
        num_tiles = int(per_block.sum())
        rows = torch.full((num_tiles, width), batch * num_heads * q_len)
        rows[first_tile[which] + within // width, within % width] = row

        found = found.repeat_interleave(per_block)
        head, block = found // none, found % none
        layout = head // num_kv_heads % at.start.shape[0]
        slot = at.start[layout, block].long()[:, None] + torch.arange(size)
        end = at.stop[layout, block].long() - 1
        last = end[:, None].expand(-1, width)
        if routing.causal:
            position = at.position[:, None].expand(batch, num_heads, -1).flatten()
            last = last.minimum(F.pad(position, (0, 1), value=-1)[rows])
        return cls(head, rows, slot, end, last)

    def split(self, size: int) -> "Iterator[_Tiles]":
        """Cut into parts of `size` tiles."""
        fields = self.list, self.row, self.slot, self.end, self.last
        for part in zip(*(x.split(size) for x in fields), strict=True):
            yield _Tiles(*part)


@dataclass
class _Vectors:
    """Keys or values as rows of one matrix.

    Attributes:
        matrix: The rows, `[R, D]`.
        first: The row of the first slot of each key/value head, `[B * Hkv]`.
    """

    matrix: Tensor
    first: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Self:
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
        return cls(x.as_strided((number, dim), (step, 1)), first.flatten())

    def take(self, tiles: _Tiles) -> Tensor:
        """Copy the vectors of the keys of tiles, `[T, block_size, D]`."""
        # Slots behind the end of a block may hold anything: its last key is read instead.
        slot = tiles.slot.minimum(tiles.end[:, None])
        rows = self.first[tiles.list][:, None] + slot
        return self.matrix.index_select(0, rows.flatten()).unflatten(0, rows.shape)
