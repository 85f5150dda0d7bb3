"""Attention on CPU, cut into parts: some queries, and keys that all of them see, or a triangle.

Own blocks of the same sizes are one part, and each block that others chose is one; what lies
evenly in memory is read in place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.layout import Layout as Tables
from moba_flex.masks.regroup import sort_pairs
from moba_flex.masks.routing import Routing

# Rows of one part. Flash attention's key gradients are sums in the dtype of the inputs within a
# part, and sums in float32 over parts.
_MAX_ROWS = 2048


class Place(NamedTuple):
    """Some vectors of a tensor `[B, H, length, ...]`.

    Attributes:
        view: A view `[b, h, n, ...]` of the tensor.
        rows: Which of the `n` vectors these are, int `[r]`, each at most once; None for all.
        fold: As how many sequences, one after another, attention takes them: if more than one,
            the place `[1, h, fold * r, ...]` is taken as `[fold, h, r, ...]`.
    """

    view: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    fold: int = 1

    def take(self, x: Tensor) -> Tensor:
        """Return what `x` holds here."""
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
    """One call of flash attention, over queries and keys of all heads or of one group.

    Attributes:
        queries: Where the queries are, in a tensor `[B, Hq, Q, ...]`.
        keys: Where the keys are, in a tensor `[B, Hkv, KV, D]`.
        causal: Whether the first query sees the first key alone, the second two, and so on.
        first: Whether no part before holds any of these queries.
    """

    queries: Place
    keys: Place
    causal: bool = False
    first: bool = False


def cut(routing: Routing, num_kv_heads: int) -> Iterator[Part]:
    """Cut attention into parts: queries and their own blocks, blocks and who chose them.

    Args:
        routing: The choice of blocks.
        num_kv_heads: Number of key/value heads, `Hkv`.
    """
    blocks, batch = routing.blocks, routing.blocks.shape[0]
    tables = routing.places
    covered = _covered(routing, tables)
    rows = tables.queries.shape[1]
    for row in range(rows):
        # Of all rows alike, or of this one.
        some = slice(0, batch) if rows == 1 else slice(row, row + 1)
        own = tables.queries[:, row], tables.extents[:, row], covered[row]
        yield from _own_parts(some, *own, routing.causal)
    if blocks.shape[3] == 0:
        return
    others = blocks.masked_fill(covered[:, None, :, None], tables.num_blocks)
    pairs = sort_pairs(replace(routing, blocks=others), num_kv_heads)
    group = blocks.shape[1] // num_kv_heads
    extents, first = tables.extents.tolist(), pairs.first.tolist()
    for b, h, block in pairs.first.diff(dim=2).nonzero().tolist():
        start, stop = (x[b % rows][block] for x in extents)
        chosen_by = pairs.row[b, h, first[b][h][block] : first[b][h][block + 1]].long()
        for part in chosen_by.split(_MAX_ROWS):
            yield _chosen_block(b, h, group, start, stop, part)


def _covered(routing: Routing, tables: Tables) -> Tensor:
    """Say which queries chose, in every head, all blocks that they may choose: bool `[R, Q]`.

    What such a query sees lies in one piece, and is attended to as if it were its own block,
    unless it is long.
    """
    _, own, oldest, newest = tables.queries.long()
    last = newest.maximum(own)
    candidates = last - oldest if routing.causal else newest - oldest
    number = (routing.blocks < tables.num_blocks).sum(3).amin(1)
    number = number if tables.queries.shape[1] > 1 else number.amin(0, keepdim=True)
    real = own < tables.num_blocks
    return real & (number == candidates) & ((last - oldest + 1) * routing.block_size <= _MAX_ROWS)


def _own_parts(
    batch: slice,
    queries: Tensor,
    extents: Tensor,
    covered: Tensor,
    causal: bool,
) -> Iterator[Part]:
    """Cut attention of queries to their own blocks into parts, equal ones together.

    Args:
        batch: The rows of the batch.
        queries: Of these rows, of `Tables`, `[4, Q]`.
        extents: Likewise, `[2, N]`.
        covered: Which queries see all from the oldest block on, bool `[Q]`.
        causal: Whether a query sees only keys at its position and before.
    """
    position, own, oldest, newest = queries.long()
    place = (own < extents.shape[1]).nonzero().squeeze(1)
    position, own, oldest, newest, covered = (
        x[place] for x in (position, own, oldest, newest, covered)
    )
    low = extents[0][torch.where(covered, oldest, own)].long()
    high = extents[1][own if causal else torch.where(covered, newest.maximum(own), own)].long()
    starts = torch.ones_like(covered)
    starts[1:] = low.diff() != 0
    if not causal:  # of a routing of the caller's own, one query may see more than the next
        starts[1:] |= high.diff() != 0
    start = starts.nonzero().squeeze(1)
    sizes = F.pad(start, (0, 1), value=place.shape[0]).diff()
    columns = (place[start], sizes, low[start], high[start], position[start])
    alike: dict[tuple[int, int, bool, bool, int], list[tuple[int, int]]] = {}
    met: Counter[tuple[int, int, int]] = Counter()

    def add(query: int, q_size: int, key: int, k_size: int, triangle: bool, first: bool) -> None:
        """Add some queries to the parts that are alike; a part holds a key once."""
        turn = met[q_size, key, k_size]
        met[q_size, key, k_size] += 1
        kind = q_size, k_size, triangle, first, turn
        alike.setdefault(kind, []).append((query, key))

    for query, size, k_start, k_stop, diagonal in zip(*(x.tolist() for x in columns), strict=True):
        if not causal:
            add(query, size, k_start, k_stop - k_start, False, True)
            continue
        if k_start < diagonal:
            add(query, size, k_start, diagonal - k_start, False, True)
        add(query, size, diagonal, size, True, k_start == diagonal)
    # Triangles last: their queries may have been in another part.
    for (q_size, k_size, *kind, _), members in sorted(alike.items(), key=lambda x: x[0][2]):
        q_starts, k_starts = zip(*members, strict=True)
        rows = [slice(b, b + 1) for b in range(batch.start, batch.stop)]
        for row in rows if len(members) > 1 else [batch]:
            yield Part(_spans(row, q_starts, q_size), _spans(row, k_starts, k_size), *kind)


def _spans(batch: slice, starts: Sequence[int], size: int) -> Place:
    """Return the place of spans of one size, in all heads of rows of the batch."""
    first, last = starts[0], starts[-1]
    if all(after - before == size for before, after in pairwise(starts)):
        return Place(lambda x: x[batch, :, first : last + size], fold=len(starts))
    rows = torch.tensor(starts).unsqueeze(1) + torch.arange(size)
    return Place(lambda x: x[batch], rows.flatten(), len(starts))


def _chosen_block(b: int, h: int, group: int, start: int, stop: int, rows: Tensor) -> Part:
    """One block of a key/value head, and the rows of its `group` query heads that chose it."""
    return Part(
        Place(lambda x: x[b, h * group : (h + 1) * group].view(1, 1, -1, *x.shape[3:]), rows),
        Place(lambda x: x[b : b + 1, h : h + 1, start:stop]),
    )


def seen_by(routing: Routing, keys: Tensor) -> Tensor:
    """Say which queries see one of some keys: bool `[B, Hq, Q]`.

    Args:
        routing: The choice of blocks.
        keys: Which keys, bool `[B, Hkv, KV]`.
    """
    tables, batch, num_kv_heads = routing.places, *keys.shape[:2]
    before = F.pad(keys.long().cumsum(2), (1, 0))  # so many of them lie before each key

    def among(start: Tensor, stop: Tensor) -> Tensor:
        """Say in which ranges `[R, n]` one lies, `[B, Hkv, n]`."""
        at = (x.unsqueeze(1).expand(batch, num_kv_heads, -1) for x in (start, stop))
        first, last = (before.gather(2, x) for x in at)
        return last > first

    start, stop = tables.extents.long()
    by_block = F.pad(among(start, stop), (0, 1))
    chosen = routing.blocks.unflatten(1, (num_kv_heads, -1))
    seen = by_block.gather(2, chosen.flatten(2).long()).view(chosen.shape).any(4)
    position, own = tables.queries[:2].long()
    start, stop = (F.pad(x, (0, 1)).gather(1, own) for x in (start, stop))
    if routing.causal:
        stop = torch.minimum(stop, position + 1)
    return (seen | among(start, stop).unsqueeze(2)).flatten(1, 2)


def spoilt_by(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Tensor:
    """Say which queries are not finite or see a key or a value that is not: bool `[B, Hq, Q]`."""
    bad_q, bad_k, bad_v = (~x.isfinite().all(3) for x in (q, k, v))
    tables = routing.places
    real = tables.queries[1] < tables.num_blocks
    return seen_by(routing, bad_k | bad_v) | (bad_q & real.unsqueeze(1))


def shapes_of_attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, not computed, of an op that attends."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=exact)


def shapes_of_gradients(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`, not computed, of such an op's backward."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
