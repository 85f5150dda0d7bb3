"""Tests of `moba_flex.diagnostics`, each against a count by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moba_flex import diagnostics
from moba_flex.masks.router import route
from moba_flex.masks.routing import Routing


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Routing]:
    """Draw queries, keys and their routing, of all shapes that a call may have."""
    kv_len = draw(st.integers(1, 40))
    q_len = draw(st.integers(1, kv_len))
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(2, num_kv_heads * group, q_len, 4, generator=generator)
    k = torch.randn(2, num_kv_heads, kv_len, 4, generator=generator)
    size, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    return q, k, route(q, k, block_size=size, top_k=top_k, causal=draw(st.booleans()))


def attended(routing: Routing) -> Tensor:
    """Return which blocks each query attends to, own ones included, bool `[B, Hq, Q, N]`."""
    batch, num_heads, q_len, _ = routing.blocks.shape
    table = torch.zeros(batch, num_heads, q_len, routing.num_blocks, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, (batch, num_heads, q_len))).tolist():
        b, h, i = index
        chosen = [n for n in routing.blocks[b, h, i].tolist() if n < routing.num_blocks]
        own = (routing.q_offset + i) // routing.block_size
        table[b, h, i, [*chosen, own]] = True
    return table


def visible(routing: Routing) -> Tensor:
    """Return which keys each query can see, bool `[Q, KV]`."""
    position = routing.q_offset + torch.arange(routing.q_len)[:, None]
    keys = torch.arange(routing.kv_len)
    return (keys <= position) | torch.tensor(not routing.causal)


def tokens(routing: Routing) -> Tensor:
    """Return which keys each query attends to, bool `[B, Hq, Q, KV]`."""
    block = torch.arange(routing.kv_len) // routing.block_size
    return attended(routing)[..., block] & visible(routing)


def own_blocks(routing: Routing) -> Tensor:
    return (routing.q_offset + torch.arange(routing.q_len)) // routing.block_size


def uniform(q_len: int, block_size: int, picks: int, causal: bool) -> Routing:
    """Return a routing that chooses at random."""
    num_blocks = math.ceil(q_len / block_size)
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(1, 4, q_len, num_blocks, generator=generator)
    own = (torch.arange(q_len) // block_size)[:, None]
    block = torch.arange(num_blocks)
    score = score.masked_fill(block >= own if causal else block == own, -1)
    best = score.topk(picks, dim=-1)
    blocks = best.indices.masked_fill(best.values < 0, num_blocks).int().sort(-1).values
    return Routing(blocks, block_size, q_len, q_len, causal)


@settings(deadline=None)
@given(cases())
def test_density_is_the_share_of_pairs(case: Any) -> None:
    _, _, routing = case
    pairs = tokens(routing).double().sum((-1, -2)).mean()
    assert diagnostics.density(routing) == pytest.approx(float(pairs / visible(routing).sum()))


@settings(deadline=None)
@given(cases())
def test_load_counts_choices_besides_the_own_block(case: Any) -> None:
    _, _, routing = case
    own = torch.nn.functional.one_hot(own_blocks(routing), routing.num_blocks).bool()
    torch.testing.assert_close(diagnostics.load(routing), (attended(routing) & ~own).sum(2))


@settings(deadline=None)
@given(cases())
def test_load_imbalance_compares_the_largest_load_to_the_expected(case: Any) -> None:
    _, _, routing = case
    blocks = range(routing.num_blocks)
    expected = [0.0 for _ in blocks]
    for own in own_blocks(routing).tolist():
        offered = [n for n in blocks if (n < own if routing.causal else n != own)]
        for n in offered:
            expected[n] += min(routing.blocks.shape[3], len(offered)) / len(offered)
    load = diagnostics.load(routing).amax(-1).float()
    want = load / max(expected) if max(expected) > 0 else torch.ones_like(load)
    torch.testing.assert_close(diagnostics.load_imbalance(routing), want)


@settings(deadline=None)
@given(cases())
def test_routing_entropy_measures_each_query_block(case: Any) -> None:
    _, _, routing = case
    own = own_blocks(routing)
    chosen = attended(routing) & ~torch.nn.functional.one_hot(own, routing.num_blocks).bool()
    picks = routing.blocks.shape[3]
    total, queries = torch.zeros(chosen.shape[:2]), 0
    for block in own.unique().tolist():
        candidates = block if routing.causal else routing.num_blocks - 1
        if not 0 < picks < candidates:
            continue
        counts = chosen[:, :, own == block].sum(2).float()
        entropy = torch.distributions.Categorical(probs=counts).entropy()
        scaled = (entropy - math.log(picks)) / (math.log(candidates) - math.log(picks))
        size = int((own == block).sum())
        total, queries = total + size * scaled, queries + size
    want = total / max(queries, 1)
    torch.testing.assert_close(diagnostics.routing_entropy(routing), want, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(cases(), st.sampled_from([None, 0.3]))
def test_attention_recall_is_the_weight_on_chosen_tokens(case: Any, scale: float | None) -> None:
    q, k, routing = case
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ keys.mT * (0.5 if scale is None else scale)  # head_dim is 4
    weight = scores.masked_fill(~visible(routing), -math.inf).softmax(-1)
    want = (weight * tokens(routing)).sum(-1).mean(-1)
    torch.testing.assert_close(diagnostics.attention_recall(q, k, routing, scale=scale), want)


@settings(deadline=None)
@given(cases(), st.integers(1, 50))
def test_routing_map_is_the_share_of_queries(case: Any, buckets: int) -> None:
    _, _, routing = case
    buckets_used = min(buckets, routing.q_len)
    row = torch.arange(routing.q_len) * buckets_used // routing.q_len
    table = attended(routing).float()
    want = torch.stack([table[:, :, row == r].mean(2) for r in range(buckets_used)], dim=2)
    torch.testing.assert_close(diagnostics.routing_map(routing, buckets), want)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 4, 90, 4), torch.randn(1, 2, 100, 4)
    routing = route(q, k, block_size=7, top_k=4)
    entropy = diagnostics.routing_entropy(routing)
    recall = diagnostics.attention_recall(q, k, routing)
    monkeypatch.setattr(diagnostics, "_CHUNK", 1)
    torch.testing.assert_close(diagnostics.routing_entropy(routing), entropy)
    torch.testing.assert_close(diagnostics.attention_recall(q, k, routing), recall)


def test_recall_of_a_sample_looks_at_evenly_spaced_queries() -> None:
    q, k = torch.randn(1, 1, 101, 4), torch.randn(1, 1, 101, 4)
    routing = route(q, k, block_size=10, top_k=2)
    each = []
    for i in (0, 25, 50, 75, 100):
        query, keys = q[:, :, i : i + 1], k[:, :, : i + 1]
        one = route(query, keys, block_size=10, top_k=2)
        each.append(diagnostics.attention_recall(query, keys, one))
    got = diagnostics.attention_recall(q, k, routing, rows=5)
    torch.testing.assert_close(got, torch.stack(each).mean(0))


@pytest.mark.parametrize("causal", [True, False])
def test_random_routing_is_even_and_disagrees(causal: bool) -> None:
    routing = uniform(4096, 64, 7, causal)
    assert diagnostics.load_imbalance(routing).mean() == pytest.approx(1, abs=0.15)
    assert diagnostics.routing_entropy(routing).mean() > 0.95


def test_routing_to_the_first_blocks_is_uneven_and_agrees() -> None:
    own = torch.arange(4096) // 64
    blocks = torch.arange(3).expand(1, 1, 4096, 3)
    blocks = blocks.masked_fill(blocks >= own[:, None], 64).int().sort(-1).values
    routing = Routing(blocks, 64, 4096, 4096, causal=True)
    assert float(diagnostics.load_imbalance(routing)) > 5
    assert float(diagnostics.routing_entropy(routing)) == pytest.approx(0, abs=1e-5)
