"""Measures of a routing: how much it attends to, how evenly, how alike, and how much it misses.

All take plain rows, packed documents and padded rows; padding counts nowhere, except as work in
`tile_fill`. Unless a measure says otherwise, it looks at the blocks that a query chose beside its
own, and is NaN where there are no queries or no choices. No gradient flows.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moba_flex.attention import watch
from moba_flex.masks._torch.gradients import is_transformed
from moba_flex.masks.checks import (
    check_blocks,
    check_int,
    check_qk,
    check_routing,
    check_scale,
    check_softcap,
    is_readable,
)
from moba_flex.masks.layout import ceil_div
from moba_flex.masks.request import Request
from moba_flex.masks.router import route_request
from moba_flex.masks.routing import Routing
from moba_flex.module import MoBAAttention

# Elements of the largest tensor held at a time.
_CHUNK = 1 << 25


def density(routing: Routing) -> float:
    """Return the share of query-key pairs that are attended to.

        density = sum_i |keys that query i attends to| / sum_i |keys that query i can see|

    A query can see the keys at its position and before, or all keys if not causal; of its own
    document alone. Sums are over batch and heads.

    Example:
        Of 36 pairs, 24 lie in a query's own block or in the block before:

        >>> x = torch.randn(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> round(density(routing), 3)
        0.667
    """
    attended, visible = _pairs(_as_set(routing))
    return float(attended.sum() / (visible.sum() * attended.shape[1]))


def load(routing: Routing) -> Tensor:
    """Return how many queries chose each block besides their own, int64 `[B, Hq, N]`.

    Example:
        >>> x = torch.randn(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> load(routing)
        tensor([[[2, 2, 2, 0]]])
    """
    routing = _as_set(routing)
    rows = torch.zeros(1, routing.q_len, dtype=torch.int64, device=routing.blocks.device)
    return _histogram(routing.blocks, rows, 1, routing.num_blocks)[:, :, 0]


def load_imbalance(routing: Routing) -> Tensor:
    """Return how much hotter the hottest block is than under uniform random routing, `[B, Hq]`.

        imbalance = max_n load_n / max_n expected_n
        expected_n = sum over the queries i that may choose n of k_i / c_i

    where query `i` chose `k_i` of the `c_i` blocks that it may choose. If causal, more queries may
    choose an early block, so that max/mean would exceed 1 for random routing too. This measure is
    1 for random routing, up to noise, largest if all queries choose the same block, and 1 if no
    query may choose any.

    Example:
        All 14 queries behind the first block choose it. With random choices, 2 * (1 + 1/2 + ... +
        1/7) = 5.2 of them would:

        >>> x = torch.randn(1, 1, 16, 4)
        >>> routing = patterns.sink_window(x, x, block_size=2, sink_blocks=1, local_blocks=0)
        >>> round(load_imbalance(routing).item(), 2)
        2.7
    """
    routing = _as_set(routing)
    # Padded, because there may be no block at all.
    chosen, most = (F.pad(x, (0, 1)).amax(-1) for x in (load(routing), _expected_load(routing)))
    return torch.where(most > 0, chosen / most, 1.0).float()


def load_gini(routing: Routing) -> Tensor:
    """Return the Gini coefficient of the load of blocks, `[B, Hq]`.

    The load of a block is taken relative to what uniform random routing would give it, as of
    `load_imbalance`. So it is 0 for random routing, up to noise, and near 1 if all queries choose
    a block that few may choose. It is 0 if no query may choose any.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 4096, 16)
        >>> even = route(q, k, block_size=64, top_k=3)
        >>> sink = patterns.sink_window(q, k, block_size=64, sink_blocks=1, local_blocks=1)
        >>> load_gini(even).item() < load_gini(sink).item()
        True
    """
    routing = _as_set(routing)
    counts, expected = load(routing).double(), _expected_load(routing)
    order = torch.where(expected > 0, counts / expected.clamp(min=1e-12), 0).argsort(-1)
    lorenz = []
    for x in (expected, counts):
        share = x.gather(-1, order).cumsum(-1)
        lorenz.append(F.pad(share / F.pad(share, (1, 0))[..., -1:].clamp(min=1e-12), (1, 0)))
    width, height = lorenz[0].diff(), lorenz[1][..., 1:] + lorenz[1][..., :-1]
    gini = 1 - (width * height).sum(-1)
    return torch.where(counts.sum(-1) > 0, gini, 0.0).float()


def routing_entropy(routing: Routing, bands: int | None = None) -> Tensor:
    """Return how much the queries of one block disagree about what to attend to, `[B, Hq]`.

    For the queries of each block, `H` is the entropy of their choices over blocks, scaled to 0 if
    all of them chose the same `n` blocks, and to 1 if they chose all `c` candidates equally often:

        (H - log(n)) / (log(c) - log(n)),  H = -sum_n share_n log(share_n)

    where `n` is the mean number of blocks that they chose. The result is averaged over the queries
    with more candidates than that. A mask in natural order skips much near 0 and nearly nothing
    near 1. It is 0 if no query may choose any block.

    Args:
        routing: The choice of the queries.
        bands: If given, the result is `[B, Hq, bands]`, an average for each of so many equal
            ranges of queries; NaN for those without such queries.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 1024, 16)
        >>> window = patterns.sliding_window(q, k, block_size=64, local_blocks=2)
        >>> routing_entropy(window).item()
        0.0
        >>> routing_entropy(route(q, k, block_size=64, top_k=3)).item() > 0.8
        True
    """
    at = _Places.of(routing := _as_set(routing))
    blocks, num_blocks, q_len = routing.blocks, routing.num_blocks, routing.q_len
    batch, num_heads = blocks.shape[:2]
    parts = 1 if bands is None else check_int("bands", bands, 1)
    total = torch.zeros(batch, num_heads, parts, device=blocks.device)
    queries = torch.zeros_like(total)
    band = torch.arange(q_len, device=blocks.device) * parts // max(1, q_len)
    step = max(1, _CHUNK // max(1, batch * num_heads * num_blocks))
    for low in range(0, num_blocks if blocks.numel() else 0, step):
        high = min(low + step, num_blocks)
        here = at.real & (at.own >= low) & (at.own < high)
        idx = here.any(0).nonzero().flatten()
        # Queries of other blocks count in one row more.
        own = torch.where(here[:, idx], at.own[:, idx] - low, high - low)
        counts = _histogram(blocks[:, :, idx], own, high - low + 1, num_blocks)
        chosen = counts.sum(-1)
        share = counts / chosen.unsqueeze(-1).clamp(min=1)
        entropy = -share.xlogy(share).sum(-1)
        rows = own.new_zeros(own.shape[0], chosen.shape[2])
        rows.scatter_add_(1, own, torch.ones_like(own))
        mean = _look_up_rows((chosen / rows.clamp(min=1)[:, None]).clamp(min=1), own)
        most = at.candidates[:, None, idx]
        free = here[:, None, idx] & (most > mean) & (_look_up_rows(chosen, own) > 0)
        least, most = mean.log(), torch.maximum(most, mean + 1).log()
        scaled = (_look_up_rows(entropy, own) - least) / (most - least)
        total.index_add_(2, band[idx], (scaled * free).float())
        queries.index_add_(2, band[idx], free.float())
    if bands is None:
        return (total / queries.clamp(min=1))[..., 0]
    return total / queries


def choice_distance(routing: Routing) -> Tensor:
    """Return how many blocks lie between a query's own block and those it chose, `[B, Hq]`.

    Averaged over choices; 1 if each is a neighbour of the own block.

    Example:
        >>> x = torch.randn(1, 1, 8, 4)
        >>> choice_distance(patterns.sliding_window(x, x, block_size=2, local_blocks=2))
        tensor([[1.4000]])
    """
    at = _Places.of(routing := _as_set(routing))
    chosen = routing.blocks < routing.num_blocks
    distance = (at.own[:, None, :, None] - routing.blocks).abs() * chosen
    return (distance.sum((2, 3)) / chosen.sum((2, 3))).float()


def group_union(routing: Routing, num_kv_heads: int) -> Tensor:
    """Return how many distinct blocks the heads of a group attend to, over all, `[B, Hkv]`.

        union = sum_i |blocks that any head attends to from i| / sum_i sum_heads |blocks|

    It is 1 over the heads of a group if they choose alike, and 1 if no two choose the same. Own
    blocks count.

    Args:
        routing: The choice of the queries.
        num_kv_heads: `Hkv`; its query heads are a group.

    Example:
        >>> x = torch.randn(1, 4, 8, 4)
        >>> group_union(patterns.sliding_window(x, x, block_size=2, local_blocks=1), 2)
        tensor([[0.5000, 0.5000]])
    """
    listed = _listed(routing := _as_set(routing))
    if routing.blocks.shape[1] % check_int("num_kv_heads", num_kv_heads, 1):
        raise ValueError(
            f"num_kv_heads must divide the {routing.blocks.shape[1]} query heads, "
            f"got {num_kv_heads}"
        )
    grouped = listed.unflatten(1, (num_kv_heads, -1)).transpose(2, 3).flatten(3)
    ordered = F.pad(grouped.sort(-1).values, (0, 1), value=routing.num_blocks)
    distinct = (ordered[..., :-1] != ordered[..., 1:]).sum((2, 3))
    return (distinct / (grouped < routing.num_blocks).sum((2, 3))).float()


def tile_fill(routing: Routing, tile: int = 128) -> Tensor:
    """Return how full the tiles of a mask in natural order are, `[B, Hq]`.

    Such a mask, as the plan masked uses, visits a block from all queries of a tile if one of them
    attends to it:

        fill = sum_i |blocks of query i| / sum over tiles of queries * |blocks of any of them|

    Padding that lies in a tile with other queries is work as they are.

    Args:
        routing: The choice of the queries.
        tile: Queries in a tile.

    Example:
        >>> x = torch.randn(1, 1, 8, 4)
        >>> tile_fill(patterns.sliding_window(x, x, block_size=2, local_blocks=1), tile=4)
        tensor([[0.7000]])
    """
    listed = _listed(routing := _as_set(routing))
    tile = check_int("tile", tile, 1)
    rows = torch.arange(routing.q_len, device=listed.device) // tile
    tiles = ceil_div(routing.q_len, tile)
    counts = _histogram(listed, rows[None], tiles, routing.num_blocks)
    queries = rows.bincount(minlength=tiles)
    return (counts.sum((2, 3)) / ((counts > 0).sum(-1) * queries).sum(-1)).float()


def choice_change(before: Routing, after: Routing) -> Tensor:
    """Return the share of choices that another routing of the same queries has not, `[B, Hq]`.

        change = 1 - sum_i |before_i and after_i| / sum_i max(|before_i|, |after_i|)

    For routings of a batch before and after a step of training, say.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 1024, 16)
        >>> routing = route(q, k, block_size=64, top_k=3)
        >>> choice_change(routing, routing)
        tensor([[0.]])
        >>> choice_change(routing, route(-q, k, block_size=64, top_k=3)).item() > 0.5
        True
    """
    before, after = _as_set(before, "before"), _as_set(after, "after")
    sizes = [(*x.blocks.shape[:3], x.kv_len, x.block_size, x.causal) for x in (before, after)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "after must have [B, Hq, Q], kv_len, block_size and causal of before, "
            f"{sizes[0]}, got {sizes[1]}"
        )
    places = [x.layout.coordinates(x.blocks.device) for x in (before, after)]
    if not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(*places, strict=True)):
        raise ValueError("after must be of the same documents or padding as before, got others")
    none = after.num_blocks
    both = torch.cat((before.blocks, after.blocks), -1).sort(-1).values
    same = ((both[..., 1:] == both[..., :-1]) & (both[..., 1:] < none)).sum((2, 3))
    numbers = [(x.blocks < none).sum(-1) for x in (before, after)]
    return (1 - same / torch.maximum(*numbers).sum(-1)).float()


def attention_recall(
    q: Tensor,
    k: Tensor,
    routing: Routing,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    rows: int = 256,
) -> Tensor:
    """Return the share of dense attention's weight that lies on the chosen tokens, `[B, Hq]`.

        recall = mean over sampled queries i of sum_{j attended by i} softmax_j(scale * q_i . k_j)

    where the softmax is over all keys that the query can see. The sample is `rows` evenly spaced
    queries, whose recall is exact. Memory is bounded at any length.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        routing: The choice of the queries.
        scale: Factor on the scores; `1 / sqrt(D)` if None.
        softcap: Scores become `softcap * tanh(score / softcap)`; None for no change.
        rows: Number of sampled queries; all if there are fewer.

    Example:
        If all keys are equal, the keys that a query sees have equal weights. Queries 0 to 3 attend
        to all of their keys, queries 4 to 7 to 3/5, 4/6, 3/7 and 4/8 of them:

        >>> x = torch.ones(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> attention_recall(x, x, routing)
        tensor([[0.7744]])
    """
    return _recall_and_best(q, k, routing, scale, softcap, rows)[0]


def attention_regret(
    q: Tensor,
    k: Tensor,
    routing: Routing,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    rows: int = 256,
) -> Tensor:
    """Return how much more of dense attention's weight the best blocks would hold, `[B, Hq]`.

    It is the recall of as many blocks as each query chose, but those of the largest weight, less
    `attention_recall`; arguments are those of that function.

    Example:
        If all keys are equal, whole blocks are equally good:

        >>> x = torch.ones(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> attention_regret(x, x, routing).abs().item() < 1e-6
        True
    """
    recall, best = _recall_and_best(q, k, routing, scale, softcap, rows)
    return best - recall


def routing_map(routing: Routing, buckets: int = 64) -> Tensor:
    """Return the share of nearby queries that attends to each block, as a picture of the routing.

    Args:
        routing: The choice of the queries.
        buckets: Rows of the picture; `R = min(buckets, Q)`.

    Returns:
        The shares `[B, Hq, R, N]`, for the queries of each of `R` equal ranges; own blocks are
        included.

    Example:
        >>> x = torch.randn(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> routing_map(routing, buckets=4)[0, 0]
        tensor([[1., 0., 0., 0.],
                [1., 1., 0., 0.],
                [0., 1., 1., 0.],
                [0., 0., 1., 1.]])
    """
    listed = _listed(routing := _as_set(routing))
    buckets = min(check_int("buckets", buckets, 1), routing.q_len)
    rows = torch.arange(routing.q_len, device=listed.device) * buckets // max(1, routing.q_len)
    counts = _histogram(listed, rows[None], buckets, routing.num_blocks)
    real = _Places.of(routing).real.long()
    queries = real.new_zeros(real.shape[0], buckets).index_add_(1, rows, real)
    return counts / queries[:, None, :, None].clamp(min=1)


MEASURES: dict[str, str] = {
    "density": "share of query-key pairs attended to",
    "recall": "share of dense attention's weight that lies on the chosen tokens",
    "regret": "weight that the best blocks would hold beyond that",
    "entropy": "0: the queries of a block choose the same blocks, 1: any block alike",
    "imbalance": "load of the most chosen block; 1: as if blocks were chosen at random",
    "gini": "inequality of loads; 0: as if blocks were chosen at random",
    "distance": "blocks between the own block and a chosen one",
    "union": "distinct blocks of a group of heads over all that they attend to",
    "tile fill": "share of the work of a mask in natural order that is needed",
}
"""The measures of `collect` by name, and their meanings."""


_OF_SEVERAL = {"entropy", "imbalance", "gini", "tile fill"}
"""Measures that compare queries, and say nothing of one alone."""


@dataclass
class LayerMeasures:
    """Measures of the routing of one layer, summed over the queries of its calls.

    Example:
        >>> q = torch.randn(1, 2, 256, 8)
        >>> with collect() as layers:
        ...     out = moba_attention(q, q, q, block_size=16, top_k=2)
        >>> layers["attention"].means()["union"]
        tensor([1., 1.], dtype=torch.float64)

    Attributes:
        calls: Calls that were measured.
        sums: By the names of `MEASURES`, float64 `[Hq]`, or `[Hkv]` for "union".
        weights: Queries that they are sums over, likewise.
    """

    calls: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def means(self) -> dict[str, Tensor]:
        """Return the averages over queries; NaN where there are none."""
        return {name: total / self.weights[name] for name, total in self.sums.items()}

    def add(self, request: Request, rows: int) -> None:
        """Measure one more call.

        Args:
            request: The call.
            rows: Queries to sample for recall.
        """
        request = request.joined()
        q, k, mods = request.q, request.k, request.mods
        routing = route_request(request)
        attended, visible = _pairs(routing)
        found = {
            "density": attended / visible[:, None],
            "entropy": routing_entropy(routing),
            "imbalance": load_imbalance(routing),
            "gini": load_gini(routing),
            "distance": choice_distance(routing),
            "union": group_union(routing, k.shape[1]),
            "tile fill": tile_fill(routing),
        }
        if not mods.ask:  # functions of positions change weights in ways not known here
            recall, best = _recall_and_best(q, k, routing, request.scale, mods.softcap, rows)
            found |= {"recall": recall, "regret": best - recall}
        queries = _Places.of(routing).real.sum(1).double().expand(q.shape[0])
        for name, x in found.items():
            weight = queries[:, None] * x.isfinite()
            if name in _OF_SEVERAL:
                weight = weight * (queries > 1)[:, None]
            total = (x.double().nan_to_num() * weight).sum(0).cpu()
            self.sums[name] = self.sums.get(name, 0) + total
            self.weights[name] = self.weights.get(name, 0) + weight.sum(0).cpu()
        self.calls += 1


@contextmanager
def collect(
    model: nn.Module | None = None, *, rows: int = 128
) -> Iterator[dict[str, LayerMeasures]]:
    """Measure the routing of each layer of a model, in each call within the `with` block.

    It holds sums alone, `Hq` numbers for each measure and layer, whatever the number of calls.
    Prefill, training and calls with a cache are measured, and weigh as many as their queries; a
    call of one query says nothing of how queries differ. Calls that attend to all keys are left
    out, and so are compiled graphs, transforms of `torch.func` and tensors without contents. A
    layer that is computed again for gradients counts again. Recall and regret include soft caps
    but no learned sinks, and leave out calls with a `score_mod` or `mask_mod`.

    Args:
        model: A model with `MoBAAttention` modules, or one of transformers under
            `moba_flex.integrations.transformers.apply`. If None, all calls count, as of a layer
            "attention".
        rows: Queries of each call to sample for recall and regret.

    Yields:
        The measures of each layer, by the name of its module.

    Example:
        >>> attention = MoBAAttention(block_size=16, top_k=2)
        >>> model = nn.ModuleDict({"attention": attention})
        >>> q = torch.randn(1, 2, 256, 8)
        >>> with collect(model) as layers:
        ...     out = attention(q, q, q)
        >>> layers["attention"].calls, layers["attention"].means()["recall"].shape
        (1, torch.Size([2]))
    """
    check_int("rows", rows, 1)
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"model must be a Module or None, got {type(model).__name__}")
    layers: dict[str, LayerMeasures] = {}
    running, lock = _Running(), threading.Lock()

    def measure(request: Request) -> None:
        q, names = request.q, running.names
        if (model is not None and not names) or not is_readable(q) or is_transformed():
            return
        name = names[-1] if names else "attention"
        with torch.no_grad(), lock:
            layer = layers.setdefault(name, LayerMeasures())
            if "density" in layer.sums and len(layer.sums["density"]) != q.shape[1]:
                name = f"{name} of {q.shape[1]} heads"
                layer = layers.setdefault(name, LayerMeasures())
            layer.add(request, rows)

    def enter(name: str, *_: Any) -> None:
        running.names.append(name)

    def leave(name: str, *_: Any) -> None:
        if running.names[-1:] == [name]:  # else a hook before `enter` raised
            running.names.pop()

    with ExitStack() as stack:
        for name, module in () if model is None else model.named_modules():
            if isinstance(module, MoBAAttention) or hasattr(module, "layer_idx"):
                for handle in (
                    module.register_forward_pre_hook(partial(enter, name)),
                    module.register_forward_hook(partial(leave, name), always_call=True),
                ):
                    stack.callback(handle.remove)
        stack.enter_context(watch(measure))
        yield layers


class _Running(threading.local):
    """Names of the layers that run in a thread, the innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []


@dataclass(frozen=True)
class _Places:
    """Where queries and blocks lie, int64; `R` is 1 or `B`.

    Attributes:
        real: Which queries are no padding, bool `[R, Q]`.
        own: Own block of each query, `[R, Q]`; `N` for padding.
        own_start: First key of that block.
        last: Last key of that block that the query sees.
        first: First key that the query sees.
        last_visible: Last key that the query sees.
        oldest: First block that the query may choose.
        newest: Last block that it may choose.
        inside: Whether the own block lies between these two.
        candidates: How many blocks it may choose.
        start: First key of each block, `[R, N]`.
        size: Keys of each block, `[R, N]`.
    """

    real: Tensor
    own: Tensor
    own_start: Tensor
    last: Tensor
    first: Tensor
    last_visible: Tensor
    oldest: Tensor
    newest: Tensor
    inside: Tensor
    candidates: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, routing: Routing) -> "_Places":
        """Return those of a routing."""
        coordinates = routing.layout.coordinates(routing.blocks.device)
        position, own, oldest, newest, start, stop = (x.long() for x in coordinates)
        real = own < routing.num_blocks
        # One number more, which padding reads, also where there is no block.
        starts, stops = F.pad(start, (0, 1)), F.pad(stop, (0, 1))
        inside = (own >= oldest) & (own <= newest)
        causal = routing.causal
        return cls(
            real=real,
            own=own,
            own_start=starts.gather(1, own),
            last=position if causal else stops.gather(1, own) - 1,
            first=starts.gather(1, oldest),
            last_visible=position if causal else stops.gather(1, newest.clamp(min=0)) - 1,
            oldest=oldest,
            newest=newest,
            inside=inside,
            candidates=(newest - oldest + 1 - inside.long()).clamp(min=0) * real,
            start=start,
            size=stop - start,
        )


def _as_set(routing: Routing, name: str = "routing") -> Routing:
    """Return the routing as a set: each chosen block once, without the own block."""
    check_blocks(name, routing)
    return routing.as_set()


def _listed(routing: Routing) -> Tensor:
    """Return the blocks that each query attends to, its own included, `[B, Hq, Q, K]`."""
    own = _Places.of(routing).own[:, None, :, None].to(routing.blocks.dtype)
    return torch.cat((routing.blocks, own.expand(*routing.blocks.shape[:3], 1)), dim=-1)


def _look_up(table: Tensor, blocks: Tensor) -> Tensor:
    """Return the entries of a table `[R, N]` for blocks `[B, Hq, Q, K]`; 0 for no block."""
    batch, num_heads = blocks.shape[:2]
    table = F.pad(table, (0, 1))[:, None].expand(batch, num_heads, -1)
    return table.gather(2, blocks.flatten(2).long()).view(blocks.shape)


def _look_up_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return the entries of a table `[B, Hq, n]` in rows `[R, Q]`: `[B, Hq, Q]`."""
    return table.gather(2, rows[:, None].expand(*table.shape[:2], -1))


def _pairs(routing: Routing) -> tuple[Tensor, Tensor]:
    """Return how many pairs each head attends to, and how many it could, `[B, Hq]` and `[B]`."""
    at, (batch, num_heads) = _Places.of(routing), routing.blocks.shape[:2]
    chosen = _look_up(at.size, routing.blocks).sum((2, 3))
    own = ((at.last - at.own_start + 1) * at.real).sum(1, keepdim=True)
    visible = ((at.last_visible - at.first + 1) * at.real).sum(1)
    return chosen + own.expand(batch, num_heads), visible.expand(batch)


def _expected_load(routing: Routing) -> Tensor:
    """Return the load of each block if choices were random, float64 `[B, Hq, N]`."""
    at, num_blocks = _Places.of(routing), routing.num_blocks
    rate = (routing.blocks < num_blocks).sum(-1).double() / at.candidates.clamp(min=1)[:, None]
    # Each query adds its rate to all blocks from `oldest` to `newest`, but not to its own.
    edges = rate.new_zeros(*rate.shape[:2], num_blocks + 2)
    own = at.own.where(at.inside, num_blocks)
    for place, sign in ((at.oldest, 1), (at.newest + 1, -1), (own, -1), (own + 1, 1)):
        edges.scatter_add_(2, place[:, None].expand_as(rate), sign * rate)
    expected = edges.cumsum(-1)[..., :num_blocks]
    return expected.where(expected > 1e-9, 0.0)  # what rounding left


def _histogram(blocks: Tensor, rows: Tensor, num_rows: int, num_blocks: int) -> Tensor:
    """Count blocks `[B, Hq, Q, K]` by the rows `[R, Q]` of their queries: `[B, Hq, n, N]`."""
    width = num_blocks + 1  # the last column counts "no block"
    place = (blocks.long() + (rows * width)[:, None, :, None]).flatten(2)
    counts = place.new_zeros(*place.shape[:2], num_rows * width)
    counts.scatter_add_(2, place, torch.ones_like(place))
    return counts.unflatten(2, (num_rows, width))[..., :-1]


def _sample(real: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced real queries of each row `[R, n]`, and which of them exist."""
    number = real.sum(1, keepdim=True)
    rows = min(rows, int(number.max())) if number.numel() else 0
    ordered = (~real).long().sort(dim=1, stable=True).indices  # real queries come first
    step = torch.arange(rows, device=real.device)
    spaced = (step * (number - 1).double() / max(rows - 1, 1)).round().long()
    place = torch.where(number > rows, spaced, step.expand_as(spaced))
    return ordered.gather(1, place.clamp(max=max(real.shape[1] - 1, 0))), step < number


def _recall_and_best(
    q: Tensor, k: Tensor, routing: Routing, scale: float | None, softcap: float | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the recall of the chosen blocks, and of the best ones, `[B, Hq]` each."""
    check_qk(q, k)
    check_routing(routing, q, k)
    scale, softcap = check_scale(scale), check_softcap(softcap)
    check_int("rows", rows, 1)
    q, k = q.detach(), k.detach()
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    routing = routing.as_set(num_heads)
    num_blocks = routing.num_blocks
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    at, key = _Places.of(routing), torch.arange(kv_len, device=q.device)
    block = torch.arange(num_blocks, device=q.device)
    # Keys of each block, and one key of weight 0 for what lies behind its end.
    width = int(at.size.max()) if at.size.numel() else 0
    keys = at.start[:, :, None] + torch.arange(width, device=q.device)
    keys = keys.where(keys < (at.start + at.size)[:, :, None], kv_len).flatten(1)
    sample, exists = _sample(at.real, rows)
    sums = torch.zeros(2, batch, num_heads, device=q.device)
    step = max(1, _CHUNK // max(1, batch * num_heads * max(kv_len, num_blocks * width)))
    for idx, real in zip(sample.split(step, 1), exists.split(step, 1), strict=True):

        def of(x: Tensor, idx: Tensor = idx) -> Tensor:
            return x.gather(1, idx)[:, None, :, None]

        def rows_of(x: Tensor, idx: Tensor = idx) -> Tensor:
            place = idx[:, None, :, None].expand(batch, num_heads, -1, x.shape[3])
            return x.gather(2, place)

        grouped = rows_of(q).unflatten(1, (num_kv_heads, -1)).float()
        scores = (grouped @ k.float().unsqueeze(2).mT).flatten(1, 2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        seen = (key >= of(at.first)) & (key <= of(at.last_visible)) & real[:, None, :, None]
        weight = scores.masked_fill(~seen, -math.inf).softmax(-1).where(seen, 0.0)
        by_block = F.pad(weight, (0, 1)).gather(
            -1, keys[:, None, None].expand(*weight.shape[:3], -1)
        )
        mass = F.pad(by_block.unflatten(-1, (num_blocks, width)).sum(-1), (0, 1))
        own, chosen = of(at.own).expand(*mass.shape[:3], 1), rows_of(routing.blocks).long()
        in_own = mass.gather(-1, own).squeeze(-1)
        may = (block >= of(at.oldest)) & (block <= of(at.newest)) & (block != of(at.own))
        best = F.pad(mass[..., :-1].where(may, 0.0).sort(-1, descending=True).values, (1, 0))
        number = (chosen < num_blocks).sum(-1, keepdim=True)
        sums[0] += (in_own + mass.gather(-1, chosen).sum(-1)).sum(-1)
        sums[1] += (in_own + best.cumsum(-1).gather(-1, number).squeeze(-1)).sum(-1)
    recall, best = sums / exists.sum(1)[:, None]
    return recall, best
