"""Measures of a routing: how much it attends to, how evenly, and how much it misses.

All raise a ValueError for packed documents and padded rows. Averages over no queries are NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.checks import check_qk, check_routing
from moba_flex.masks.routing import Routing

# Elements of the largest tensor held at a time.
_CHUNK = 1 << 25


def density(routing: Routing) -> float:
    """Return the share of query-key pairs that are attended to.

        density = sum_i |keys that query i attends to| / sum_i |keys that query i can see|

    A query can see the keys at its position and before, or all keys if not causal. Averaged over
    batch and heads.

    Example:
        Of 36 pairs, 24 lie in a query's own block or in the block before:

        >>> x = torch.randn(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> round(density(routing), 3)
        0.667
    """
    routing = _as_set(routing)
    own, sizes = _own_blocks(routing), _block_sizes(routing)
    position = routing.q_offset + torch.arange(routing.q_len, device=own.device)
    if routing.causal:
        own_keys, visible = position - own * routing.block_size + 1, position + 1
    else:
        own_keys, visible = sizes[own], torch.full_like(own, routing.kv_len)
    chosen_keys = F.pad(sizes, (0, 1))[routing.blocks.long()].sum(-1).double().mean(dim=(0, 1))
    return float((own_keys + chosen_keys).sum() / visible.sum())


def load(routing: Routing) -> Tensor:
    """Return how many queries chose each block besides their own, int64 `[B, Hq, N]`.

    Example:
        >>> x = torch.randn(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> load(routing)
        tensor([[[2, 2, 2, 0]]])
    """
    routing = _as_set(routing)
    rows = torch.zeros_like(_own_blocks(routing))
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
    own, num_blocks = _own_blocks(routing), routing.num_blocks
    candidates = own if routing.causal else torch.full_like(own, num_blocks - 1)
    rate = (routing.blocks < num_blocks).sum(-1) / candidates.clamp(min=1)
    offered = rate.new_zeros(*rate.shape[:2], num_blocks)
    offered.scatter_add_(2, own.expand_as(rate), rate)
    # A causal query may choose the blocks before its own, any other query all but its own.
    expected = offered.sum(2, keepdim=True) - (offered.cumsum(2) if routing.causal else offered)
    # Padded, because there may be no block at all.
    chosen, most = (F.pad(x, (0, 1)).amax(-1) for x in (load(routing), expected))
    return torch.where(rate.sum(-1) > 0, chosen / most, 1.0)


def routing_entropy(routing: Routing) -> Tensor:
    """Return how much the queries of one block disagree about what to attend to, `[B, Hq]`.

    For the queries of each block, `H` is the entropy of their choices over blocks, scaled to 0 if
    all of them chose the same `K - 1` blocks, and to 1 if they chose all `c` candidates equally
    often:

        (H - log(K - 1)) / (log(c) - log(K - 1)),  H = -sum_n share_n log(share_n)

    The result is averaged over the queries with more candidates than choices. A mask in natural
    order skips much near 0 and nearly nothing near 1. It is 0 if no query may choose any block.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 1024, 16)
        >>> window = patterns.sliding_window(q, k, block_size=64, local_blocks=2)
        >>> routing_entropy(window).item()
        0.0
        >>> routing_entropy(route(q, k, block_size=64, top_k=3)).item() > 0.8
        True
    """
    routing = _as_set(routing)
    blocks, size, num_blocks = routing.blocks, routing.block_size, routing.num_blocks
    batch, num_heads = blocks.shape[:2]
    total = torch.zeros(batch, num_heads, device=blocks.device)
    picks = int((blocks < num_blocks).sum(-1).max()) if blocks.numel() else 0
    queries = 0
    if picks == 0:
        return total
    step = max(1, _CHUNK // max(1, batch * num_heads * num_blocks))
    for low in range(routing.q_offset // size, num_blocks, step):
        high = min(low + step, num_blocks)
        begin, end = (max(0, block * size - routing.q_offset) for block in (low, high))
        own = _own_blocks(routing)[begin:end] - low
        counts = _histogram(blocks[:, :, begin:end], own, high - low, num_blocks)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        entropy = -share.xlogy(share).sum(-1)

        candidates = torch.full((high - low,), num_blocks - 1, device=blocks.device)
        if routing.causal:
            candidates = torch.arange(low, high, device=blocks.device)
        free = candidates > picks
        least, most = math.log(picks), candidates.clamp(min=picks + 1).log()
        weight = own.bincount(minlength=high - low) * free
        total += (weight * (entropy - least) / (most - least)).sum(-1)
        queries += int(weight.sum())
    return total / max(queries, 1)


def attention_recall(
    q: Tensor, k: Tensor, routing: Routing, *, scale: float | None = None, rows: int = 256
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
        rows: Number of sampled queries; all if there are fewer.

    Example:
        If all keys are equal, the keys that a query sees have equal weights. Queries 0 to 3 attend
        to all of their keys, queries 4 to 7 to 3/5, 4/6, 3/7 and 4/8 of them:

        >>> x = torch.ones(1, 1, 8, 4)
        >>> routing = patterns.sliding_window(x, x, block_size=2, local_blocks=1)
        >>> attention_recall(x, x, routing)
        tensor([[0.7744]])
    """
    check_qk(q, k)
    check_routing(routing, q, k)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    routing = routing.as_set(num_heads)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    rows = min(rows, q_len)
    sample = torch.linspace(0, q_len - 1, rows, dtype=torch.float64).round().long().to(q.device)
    key_pos = torch.arange(kv_len, device=q.device)
    short = routing.num_blocks * routing.block_size - kv_len
    total = torch.zeros(batch, num_heads, device=q.device)
    for idx in sample.split(max(1, _CHUNK // max(1, batch * num_heads * kv_len))):
        grouped = q[:, :, idx].unflatten(1, (num_kv_heads, -1)).float()
        scores = (grouped @ k.float().unsqueeze(2).mT).flatten(1, 2) * scale
        if routing.causal:
            future = key_pos > (routing.q_offset + idx)[:, None]
            scores = scores.masked_fill(future, -math.inf)
        weight = F.pad(scores.softmax(-1), (0, short))
        # One more column, of weight 0, for "no block".
        mass = F.pad(weight.unflatten(-1, (-1, routing.block_size)).sum(-1), (0, 1))
        own = _own_blocks(routing)[idx, None].expand(batch, num_heads, -1, 1)
        chosen = torch.cat([routing.blocks[:, :, idx].long(), own], dim=-1)
        total += mass.gather(-1, chosen).sum(dim=(-1, -2))
    return total / rows


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
    routing = _as_set(routing)
    buckets = min(buckets, routing.q_len)
    own = _own_blocks(routing)
    rows = torch.arange(routing.q_len, device=own.device) * buckets // routing.q_len
    listed = torch.cat([routing.blocks, own[:, None].expand(*routing.blocks.shape[:3], 1)], dim=-1)
    counts = _histogram(listed, rows, buckets, routing.num_blocks)
    return counts / rows.bincount()[:, None]


def _as_set(routing: Routing) -> Routing:
    """Return the routing as a set: each chosen block once, without the own block."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    return routing.as_set()


def _own_blocks(routing: Routing) -> Tensor:
    """Return the number of each query's own block, int64 `[Q]`."""
    if routing.tables is not None:
        raise ValueError(
            "routing must be of one sequence a row, got documents or padding: "
            "look at sequences one by one"
        )
    position = torch.arange(routing.q_len, device=routing.blocks.device) + routing.q_offset
    return position // routing.block_size


def _block_sizes(routing: Routing) -> Tensor:
    """Return the number of keys of each block, int64 `[N]`."""
    start = torch.arange(routing.num_blocks, device=routing.blocks.device) * routing.block_size
    return (routing.kv_len - start).clamp(max=routing.block_size)


def _histogram(blocks: Tensor, rows: Tensor, num_rows: int, num_blocks: int) -> Tensor:
    """Count blocks `[B, Hq, Q, K]` by the rows `[Q]` of their queries: int64 `[B, Hq, R, N]`."""
    width = num_blocks + 1  # the last column counts "no block"
    place = (blocks + rows[:, None] * width).flatten(2)
    counts = place.new_zeros(*place.shape[:2], num_rows * width)
    counts.scatter_add_(2, place, torch.ones_like(place))
    return counts.unflatten(2, (num_rows, width))[..., :-1]
