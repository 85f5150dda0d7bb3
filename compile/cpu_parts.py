"""Attention on CPU cut into parts: queries, and keys that all of them see, or a causal triangle.

A part refers to the tensors by slices where it can, so that keys are read in place.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.layout import Coordinates
from moba_flex.masks.regroup import sort_pairs
from moba_flex.masks.routing import Routing

# Queries of one part. Flash attention's key gradients are sums in the dtype of the inputs within a
# part; over parts we sum in float32.
_MAX_QUERIES = 2048


class Place(NamedTuple):
    """Some vectors of a tensor `[B, H, length, ...]`.

    Attributes:
        view: Returns a view `[b, h, n, ...]` of the tensor.
        rows: Which of the `n` vectors these are, int `[r]`, each at most once; None for all.
        fold: Number of sequences that lie one after another: if more than one, the vectors
            `[1, h, fold * r, ...]` are taken as `[fold, h, r, ...]`.
    """

    view: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    fold: int = 1

    def take(self, x: Tensor) -> Tensor:
        """Return the vectors of `x`: a view, unless `rows` lists them."""
        taken = self.view(x)
        return self._folded(taken if self.rows is None else taken.index_select(2, self.rows))

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write to where `take` reads."""
        if self.rows is None:
            self._folded(self.view(x)).copy_(value)
            return
        if self.fold > 1:
            value = value.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        self.view(x).index_copy_(2, self.rows, value.to(x.dtype))

    def add(self, x: Tensor, value: Tensor) -> None:
        """Add to where `take` reads."""
        if self.rows is None:
            self._folded(self.view(x)).add_(value)
        else:
            self.put(x, self.take(x) + value)

    def _folded(self, x: Tensor) -> Tensor:
        return x[0].unflatten(1, (self.fold, -1)).transpose(0, 1) if self.fold > 1 else x


class Part(NamedTuple):
    """Queries and keys of all heads, or of one key/value head and its query heads.

    Attributes:
        queries: Where the queries are, in a tensor `[B, Hq, Q, ...]`.
        keys: Where the keys are, in a tensor `[B, Hkv, KV, ...]`.
        causal: Whether the first query sees the first key alone, the second two, and so on.
        first: Whether no part before holds any of these queries.
    """

    queries: Place
    keys: Place
    causal: bool = False
    first: bool = False


class Results(NamedTuple):
    """Output and log-sum-exp over all parts, and their gradients."""

    grad: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor

    def without(self, rows: Tensor) -> "Results":
        """Return results in which some rows, bool `[B, Hq, Q]`, have no share in any gradient."""
        grad, out = (x.masked_fill(rows.unsqueeze(3), 0.0) for x in (self.grad, self.out))
        grad_lse = None if self.grad_lse is None else self.grad_lse.masked_fill(rows, 0.0)
        return Results(grad, grad_lse, out, self.lse.masked_fill(rows, torch.inf))


def cut(routing: Routing, num_kv_heads: int) -> Iterator[Part]:
    """Cut attention into parts: queries and their own blocks, then blocks and who chose them.

    Args:
        routing: The choice of blocks.
        num_kv_heads: Number of key/value heads, `Hkv`.
    """
    blocks, at = routing.blocks, routing.layout.coordinates(routing.blocks.device)
    layouts = at.own.shape[0]
    sees_all = _sees_all(routing, at)
    for row in range(layouts):
        batch = slice(0, blocks.shape[0]) if layouts == 1 else slice(row, row + 1)
        own = Coordinates(*(x[row] for x in at))
        yield from _own_parts(batch, own, sees_all[row], routing.causal)
    if blocks.shape[3] == 0:
        return
    others = blocks.masked_fill(sees_all[:, None, :, None], routing.num_blocks)
    pairs = sort_pairs(replace(routing, blocks=others), num_kv_heads)
    group = blocks.shape[1] // num_kv_heads
    starts, stops, first = at.start.tolist(), at.stop.tolist(), pairs.first.tolist()
    for b, h, block in pairs.first.diff(dim=2).nonzero().tolist():
        start, stop = (x[b % layouts][block] for x in (starts, stops))
        queries = pairs.row[b, h, first[b][h][block] : first[b][h][block + 1]].long()
        for rows in queries.split(_MAX_QUERIES):
            yield _chosen_block(b, h, group, start, stop, rows)


def _sees_all(routing: Routing, at: Coordinates) -> Tensor:
    """Return which queries chose, in every head, all blocks that they may choose: bool `[R, Q]`.

    The keys of such a query lie in one piece. Unless it is long, it is taken as the own block.
    """
    own, oldest, newest = (x.long() for x in (at.own, at.oldest, at.newest))
    last = newest.maximum(own)
    candidates = last - oldest if routing.causal else newest - oldest
    count = (routing.blocks < routing.num_blocks).sum(3).amin(1)
    count = count if own.shape[0] > 1 else count.amin(0, keepdim=True)
    short = (last - oldest + 1) * routing.block_size <= _MAX_QUERIES
    return (own < routing.num_blocks) & (count == candidates) & short


def _own_parts(batch: slice, at: Coordinates, sees_all: Tensor, causal: bool) -> Iterator[Part]:
    """Cut attention of queries to their own blocks; blocks of the same sizes are one part.

    If causal, queries see a triangle of keys, and a rectangle of those before the first query.

    Args:
        batch: Rows of the batch, all alike.
        at: Coordinates of these rows, `[Q]` and `[N]`.
        sees_all: Which queries see all keys from their oldest block on, bool `[Q]`.
        causal: Whether a query sees only keys at its position and before.
    """
    query = (at.own < at.start.shape[0]).nonzero().squeeze(1)
    position, own, oldest, newest = (x[query].long() for x in at[:4])
    sees_all = sees_all[query]
    low = at.start.long()[torch.where(sees_all, oldest, own)]
    high = at.stop[torch.where(sees_all, newest.maximum(own), own)]
    keys_seen = low if causal else low * 2**32 + high
    sizes = keys_seen.unique_consecutive(return_counts=True)[1]
    start = sizes.cumsum(0) - sizes
    columns = (x[start] for x in (query, low, high, position))
    # Where queries and keys start, by number of queries and of keys.
    rectangles, triangles = defaultdict(list), defaultdict(list)
    runs = zip(sizes.tolist(), *(x.tolist() for x in columns), strict=True)
    for q_size, q_start, key, stop, diagonal in runs:
        end = diagonal if causal else stop
        if key < end:
            rectangles[q_size, end - key].append((q_start, key))
        if causal:
            triangles[q_size, q_size, key == diagonal].append((q_start, diagonal))
    for (q_size, k_size), members in rectangles.items():
        yield from _spans(batch, members, q_size, k_size, False, True)
    for (q_size, k_size, first), members in triangles.items():
        yield from _spans(batch, members, q_size, k_size, True, first)


def _spans(
    batch: slice, members: list[tuple[int, int]], q_size: int, k_size: int, *kind: bool
) -> Iterator[Part]:
    """Yield spans of queries and keys of one size, which start where `members` say."""
    if any(after < before + k_size for (_, before), (_, after) in pairwise(members)):
        for one in members:  # a part holds a key once
            yield from _spans(batch, [one], q_size, k_size, *kind)
        return
    q_starts, k_starts = zip(*members, strict=True)
    rows = [slice(b, b + 1) for b in range(batch.start, batch.stop)]
    for row in rows if len(members) > 1 else [batch]:
        yield Part(_span(row, q_starts, q_size), _span(row, k_starts, k_size), *kind)


def _span(batch: slice, starts: Sequence[int], size: int) -> Place:
    first, last = starts[0], starts[-1]
    if all(after - before == size for before, after in pairwise(starts)):
        return Place(lambda x: x[batch, :, first : last + size], fold=len(starts))
    rows = torch.tensor(starts).unsqueeze(1) + torch.arange(size)
    return Place(lambda x: x[batch], rows.flatten(), len(starts))


def _chosen_block(b: int, h: int, group: int, start: int, stop: int, rows: Tensor) -> Part:
    """Return a block of a key/value head and the rows, of its query heads, that chose it."""
    return Part(
        Place(lambda x: x[b, h * group : (h + 1) * group].view(1, 1, -1, *x.shape[3:]), rows),
        Place(lambda x: x[b : b + 1, h : h + 1, start:stop]),
    )


def sees_nonfinite(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Tensor:
    """Return which queries are not finite, or see a key or a value that is not: `[B, Hq, Q]`."""
    at, batch, num_kv_heads = routing.layout.coordinates(k.device), *k.shape[:2]
    bad_q, bad_k, bad_v = (~x.isfinite().all(3) for x in (q, k, v))
    bad_before = F.pad((bad_k | bad_v).long().cumsum(2), (1, 0))

    def any_bad(start: Tensor, stop: Tensor) -> Tensor:
        """Return which ranges of keys `[R, n]` hold a bad one, `[B, Hkv, n]`."""
        ends = (x.unsqueeze(1).expand(batch, num_kv_heads, -1) for x in (start, stop))
        first, last = (bad_before.gather(2, x) for x in ends)
        return last > first

    start, stop = at.start.long(), at.stop.long()
    bad_block = F.pad(any_bad(start, stop), (0, 1))
    chosen = routing.blocks.unflatten(1, (num_kv_heads, -1))
    bad_chosen = bad_block.gather(2, chosen.flatten(2).long()).view(chosen.shape).any(4)
    position, own = at.position.long(), at.own.long()
    start, stop = (F.pad(x, (0, 1)).gather(1, own) for x in (start, stop))
    if routing.causal:
        stop = torch.minimum(stop, position + 1)
    bad_keys = (bad_chosen | any_bad(start, stop).unsqueeze(2)).flatten(1, 2)
    return bad_keys | (bad_q & (own < routing.num_blocks).unsqueeze(1))
