"""Tests of `moba_flex.diagnostics`, each against a count by hand."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moba_flex import (
    BlockCache,
    MoBAAttention,
    cached_attention,
    diagnostics,
    make_tables,
    moba_attention,
    patterns,
)
from moba_flex.masks.router import route
from moba_flex.masks.routing import Routing

Case = tuple[Tensor, Tensor, Routing]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw queries, keys and their routing, of all shapes and layouts that a call may have."""
    kv_len = draw(st.integers(1, 40))
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    causal, kind = draw(st.booleans()), draw(st.sampled_from(["plain", "packed", "padded"]))
    q_len = kv_len if kind == "packed" else draw(st.integers(1, kv_len))
    tables = None
    if kind == "packed":
        ends = sorted(draw(st.sets(st.integers(1, kv_len), min_size=1, max_size=4)))
        tables = make_tables(kv_len, kv_len, size, causal, cu_seqlens=torch.tensor([0, *ends]))
    elif kind == "padded":
        first = torch.tensor(draw(st.lists(st.integers(0, kv_len), min_size=2, max_size=2)))
        after = first + torch.tensor(
            draw(st.lists(st.integers(0, kv_len), min_size=2, max_size=2))
        )
        key = torch.arange(kv_len)
        mask = (key >= first[:, None]) & (key < after[:, None])
        tables = make_tables(q_len, kv_len, size, causal, key_mask=mask)
    q = torch.randn(2, num_kv_heads * group, q_len, 4, generator=generator)
    k = torch.randn(2, num_kv_heads, kv_len, 4, generator=generator)
    by_head = draw(st.none() | st.lists(st.integers(1, top_k), min_size=4, max_size=4))
    numbers = None if by_head is None else torch.tensor(by_head[: q.shape[1]])
    gate: Any = {"block_size": size, "top_k": top_k, "causal": causal, "head_top_k": numbers}
    return q, k, route(q, k, tables=tables, **gate)


class Query(NamedTuple):
    """The keys that a query of one head sees, and the blocks that it chooses."""

    head: tuple[int, int]
    number: int
    own: int
    candidates: list[int]
    chosen: list[int]
    visible: set[int]
    keys: dict[int, set[int]]  # visible keys of each block


def queries(routing: Routing) -> Iterator[Query]:
    """Yield the queries that are no padding."""
    at = routing.layout.coordinates("cpu")
    batch, num_heads, q_len, _ = routing.blocks.shape
    for b in range(batch):
        row = min(b, at.own.shape[0] - 1)
        columns = [x[row].tolist() for x in at]
        for i in range(q_len):
            position, own, oldest, newest = (x[i] for x in columns[:4])
            if own == routing.num_blocks:
                continue
            last = own if routing.causal else newest
            keys = {
                n: {
                    key
                    for key in range(columns[4][n], columns[5][n])
                    if not routing.causal or key <= position
                }
                for n in range(oldest, last + 1)
            }
            candidates = [n for n in range(oldest, newest + 1) if n != own]
            visible = set().union(*keys.values())
            for h in range(num_heads):
                chosen = [n for n in routing.blocks[b, h, i].tolist() if n < routing.num_blocks]
                yield Query((b, h), i, own, candidates, chosen, visible, keys)


def by_head(routing: Routing) -> dict[tuple[int, int], list[Query]]:
    """Return the queries of each head."""
    batch, num_heads = routing.blocks.shape[:2]
    found: dict[tuple[int, int], list[Query]] = {
        (b, h): [] for b in range(batch) for h in range(num_heads)
    }
    for query in queries(routing):
        found[query.head].append(query)
    return found


def check(routing: Routing, got: Tensor, measure: Any, **bounds: float) -> None:
    """Compare a measure with that of the queries of each head."""
    for head, found in by_head(routing).items():
        want = torch.as_tensor(measure(found))
        torch.testing.assert_close(
            got[head].double(), want.double(), equal_nan=True, atol=1e-5, rtol=1e-5
        )


def ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


@settings(deadline=None)
@given(cases())
def test_density_is_the_share_of_pairs(case: Case) -> None:
    *_, routing = case
    pairs = visible = 0
    for query in queries(routing):
        pairs += sum(len(query.keys[n]) for n in {*query.chosen, query.own})
        visible += len(query.visible)
    assert diagnostics.density(routing) == pytest.approx(ratio(pairs, visible), nan_ok=True)


@settings(deadline=None)
@given(cases())
def test_load_counts_choices_besides_the_own_block(case: Case) -> None:
    *_, routing = case

    def measure(found: list[Query]) -> list[int]:
        counts = Counter(n for query in found for n in query.chosen)
        return [counts[n] for n in range(routing.num_blocks)]

    check(routing, diagnostics.load(routing), measure)


def expected_load(found: list[Query], num_blocks: int) -> list[float]:
    expected = [0.0] * num_blocks
    for query in found:
        for n in query.candidates:
            expected[n] += len(query.chosen) / len(query.candidates)
    return expected


@settings(deadline=None)
@given(cases())
def test_load_is_compared_to_the_expected(case: Case) -> None:
    *_, routing = case

    def imbalance(found: list[Query]) -> float:
        most = max([0.0, *expected_load(found, routing.num_blocks)])
        counts = Counter(n for query in found for n in query.chosen)
        return max(counts.values()) / most if most else 1.0

    def gini(found: list[Query]) -> float:
        counts = Counter(n for query in found for n in query.chosen)
        expected = expected_load(found, routing.num_blocks)
        pairs = [(counts[n], x) for n, x in enumerate(expected) if x > 0]
        total = sum(x for _, x in pairs)
        # Half the mean difference of relative loads, blocks weighted by their expected load.
        difference = sum(abs(a * y - b * x) for a, x in pairs for b, y in pairs)
        return difference / (2 * total**2) if total else 0.0

    check(routing, diagnostics.load_imbalance(routing), imbalance)
    check(routing, diagnostics.load_gini(routing), gini)


@settings(deadline=None)
@given(cases(), st.sampled_from([None, 1, 3]))
def test_routing_entropy_measures_each_query_block(case: Case, bands: int | None) -> None:
    *_, routing = case

    def measure(found: list[Query]) -> Any:
        choices: dict[int, Counter[int]] = defaultdict(Counter)
        sizes = Counter(query.own for query in found)
        for query in found:
            choices[query.own].update(query.chosen)
        values: list[list[float]] = [[] for _ in range(bands or 1)]
        for query in found:
            total = choices[query.own].total()
            mean = max(1, total / sizes[query.own])
            if not total or mean >= len(query.candidates):
                continue
            counts = torch.tensor([*choices[query.own].values()]).double()
            entropy = torch.distributions.Categorical(probs=counts).entropy()
            scaled = (entropy - math.log(mean)) / (
                math.log(len(query.candidates)) - math.log(mean)
            )
            values[query.number * (bands or 1) // routing.q_len].append(float(scaled))
        if bands is None:
            return sum(values[0]) / max(1, len(values[0]))
        return [ratio(sum(x), len(x)) for x in values]

    got = diagnostics.routing_entropy(routing, bands).nan_to_num()
    assert bool(((got > -1e-5) & (got < 1 + 1e-5)).all())
    check(routing, diagnostics.routing_entropy(routing, bands), measure)


@settings(deadline=None)
@given(cases())
def test_choice_distance_is_the_mean_over_choices(case: Case) -> None:
    *_, routing = case

    def measure(found: list[Query]) -> float:
        distances = [abs(query.own - n) for query in found for n in query.chosen]
        return ratio(sum(distances), len(distances))

    check(routing, diagnostics.choice_distance(routing), measure)


@settings(deadline=None)
@given(cases())
def test_group_union_counts_each_block_of_a_group_once(case: Case) -> None:
    _, k, routing = case
    num_kv_heads = k.shape[1]
    group = routing.blocks.shape[1] // num_kv_heads
    distinct: dict[Any, set[int]] = defaultdict(set)
    listed: Counter[Any] = Counter()
    for query in queries(routing):
        place = query.head[0], query.head[1] // group
        distinct[place, query.number] |= {*query.chosen, query.own}
        listed[place] += len(query.chosen) + 1
    got = diagnostics.group_union(routing, num_kv_heads)
    for b in range(2):
        for h in range(num_kv_heads):
            union = sum(len(x) for (place, _), x in distinct.items() if place == (b, h))
            want = torch.tensor(ratio(union, listed[b, h]))
            torch.testing.assert_close(got[b, h], want, equal_nan=True)


@settings(deadline=None)
@given(cases(), st.integers(1, 50))
def test_tile_fill_compares_with_what_a_tile_visits(case: Case, tile: int) -> None:
    *_, routing = case
    size = [min(tile, routing.q_len - i) for i in range(0, routing.q_len, tile)]

    def measure(found: list[Query]) -> float:
        tiles: dict[int, set[int]] = defaultdict(set)
        for query in found:
            tiles[query.number // tile] |= {*query.chosen, query.own}
        needed = sum(len(query.chosen) + 1 for query in found)
        return ratio(needed, sum(len(x) * size[t] for t, x in tiles.items()))

    check(routing, diagnostics.tile_fill(routing, tile), measure)


@settings(deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_choice_change_is_the_share_that_differs(case: Case, seed: int) -> None:
    q, k, after = case
    other = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
    before = route(
        other, k, block_size=after.block_size, top_k=2, causal=after.causal, tables=after.tables
    )
    got = diagnostics.choice_change(before, after)
    old = by_head(before)
    for head, found in by_head(after).items():
        pairs = [({*x.chosen}, {*y.chosen}) for x, y in zip(old[head], found, strict=True)]
        same = sum(len(x & y) for x, y in pairs)
        most = max(sum(len(x) for x, _ in pairs), sum(len(y) for _, y in pairs))
        want = torch.tensor(1 - ratio(same, most))
        torch.testing.assert_close(got[head], want, equal_nan=True)


@settings(deadline=None)
@given(cases(), st.sampled_from([None, 0.3]))
def test_recall_and_regret_are_weights_of_dense_attention(case: Case, scale: float | None) -> None:
    q, k, routing = case
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ keys.double().mT * (0.5 if scale is None else scale)  # head_dim is 4

    def weights(query: Query) -> tuple[float, float]:
        row = scores[*query.head, query.number]
        seen = sorted(query.visible)
        weight = dict(zip(seen, row[seen].softmax(0).tolist(), strict=True))
        mass = {n: sum(weight[key] for key in x) for n, x in query.keys.items()}
        best = sorted((mass[n] for n in query.candidates), reverse=True)[: len(query.chosen)]
        return mass[query.own] + sum(mass[n] for n in query.chosen), mass[query.own] + sum(best)

    def recall(found: list[Query]) -> float:
        return ratio(sum(weights(query)[0] for query in found), len(found))

    def regret(found: list[Query]) -> float:
        return ratio(sum(best - got for got, best in map(weights, found)), len(found))

    check(routing, diagnostics.attention_recall(q, k, routing, scale=scale), recall)
    check(routing, diagnostics.attention_regret(q, k, routing, scale=scale), regret)


@settings(deadline=None)
@given(cases(), st.integers(1, 50))
def test_routing_map_is_the_share_of_queries(case: Case, buckets: int) -> None:
    *_, routing = case
    buckets = min(buckets, routing.q_len)

    def measure(found: list[Query]) -> Tensor:
        counts, number = torch.zeros(buckets, routing.num_blocks), torch.zeros(buckets, 1)
        for query in found:
            bucket = query.number * buckets // routing.q_len
            counts[bucket, [*query.chosen, query.own]] += 1
            number[bucket] += 1
        return counts / number.clamp(min=1)

    check(routing, diagnostics.routing_map(routing, buckets), measure)


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


@pytest.mark.parametrize("causal", [True, False])
def test_random_routing_is_even_and_disagrees(causal: bool) -> None:
    routing = uniform(4096, 64, 7, causal)
    assert diagnostics.load_imbalance(routing).mean() == pytest.approx(1, abs=0.15)
    assert diagnostics.load_gini(routing).mean() < 0.1
    assert diagnostics.routing_entropy(routing).mean() > 0.95
    assert diagnostics.group_union(routing, 1).item() > 0.5


def test_routing_to_the_first_blocks_is_uneven_and_agrees() -> None:
    own = torch.arange(4096) // 64
    blocks = torch.arange(3).expand(1, 1, 4096, 3)
    blocks = blocks.masked_fill(blocks >= own[:, None], 64).int().sort(-1).values
    routing = Routing(blocks, 64, 4096, 4096, causal=True)
    assert float(diagnostics.load_imbalance(routing)) > 5
    assert float(diagnostics.load_gini(routing)) > 0.6
    assert float(diagnostics.routing_entropy(routing)) == pytest.approx(0, abs=1e-5)


class Layers(nn.Module):
    """Two layers of attention."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(MoBAAttention(block_size=8, top_k=top_k) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, **rows: Any) -> Tensor:
        for layer in self.attention:
            q = layer(q, k, k, **rows)
        return q


def test_collected_measures_are_those_of_the_calls() -> None:
    model, generator = Layers(3), torch.Generator().manual_seed(0)
    rows = [{}, {"cu_seqlens": torch.tensor([0, 20, 50])}]
    with diagnostics.collect(model, rows=1000) as layers:
        q, k = (torch.randn(1, n, 50, 4, generator=generator) for n in (4, 2))
        for some in rows:
            model(q, k, **some)
        moba_attention(q, k, k, block_size=8, top_k=3)  # not of the model
    assert {name: x.calls for name, x in layers.items()} == {"attention.0": 2, "attention.1": 2}
    routings = [
        route(q, k, block_size=8, top_k=3, tables=make_tables(50, 50, 8, True, **some))
        for some in rows
    ]
    means = layers["attention.0"].means()
    assert means.keys() == diagnostics.MEASURES.keys()
    for name, measure in (
        ("density", lambda x: torch.full((1, 4), diagnostics.density(x))),
        ("entropy", diagnostics.routing_entropy),
        ("gini", diagnostics.load_gini),
        ("recall", lambda x: diagnostics.attention_recall(q, k, x)),
        ("union", lambda x: diagnostics.group_union(x, 2)),
    ):
        want = torch.stack([measure(routing)[0] for routing in routings]).double().mean(0)
        torch.testing.assert_close(means[name], want)


def test_all_calls_are_collected_without_a_model() -> None:
    q, k = torch.randn(1, 4, 50, 4), torch.randn(1, 2, 50, 4)
    with diagnostics.collect() as layers:
        moba_attention(q, k, k, block_size=8, top_k=3)
        moba_attention(q, k, k, block_size=8, top_k=7)  # attends to all keys
        with pytest.raises(ValueError, match="top_k"):
            moba_attention(q, k, k, block_size=8, top_k=0)
    moba_attention(q, k, k, block_size=8, top_k=3)
    assert layers["attention"].calls == 1


@pytest.mark.parametrize("in_one_call", [True, False])
def test_calls_with_a_cache_are_collected(in_one_call: bool) -> None:
    q, k = torch.randn(1, 4, 51, 4), torch.randn(1, 2, 51, 4)
    cache, last = BlockCache(8, max_len=70), (q[:, :, 50:], k[:, :, 50:], k[:, :, 50:])
    cache.append(k[:, :, :50], k[:, :, :50])
    with diagnostics.collect() as layers:
        if in_one_call:
            cached_attention(last[0], cache, *last[1:], top_k=3)
        else:
            cache.append(*last[1:])
            cached_attention(last[0], cache, top_k=3)
    want = diagnostics.attention_recall(last[0], k, route(last[0], k, block_size=8, top_k=3))
    torch.testing.assert_close(layers["attention"].means()["recall"], want[0].double())


def test_calls_weigh_as_many_as_their_queries() -> None:
    """One of a single query says nothing of how queries differ; a row of padding says nothing."""
    q, k = torch.randn(2, 4, 50, 4), torch.randn(2, 2, 50, 4)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1] = False
    gate: Any = {"block_size": 8, "top_k": 3}
    with diagnostics.collect() as layers:
        moba_attention(q, k, k, key_mask=mask, **gate)
        moba_attention(q[:1, :, -1:], k[:1], k[:1], **gate)
        moba_attention(q[:0], k[:0], k[:0], **gate)
    means = layers["attention"].means()
    whole, last = route(q[:1], k[:1], **gate), route(q[:1, :, -1:], k[:1], **gate)
    want = diagnostics.load_imbalance(whole)[0].double()
    torch.testing.assert_close(means["imbalance"], want)
    recall = [
        n * diagnostics.attention_recall(q[:1, :, -n:], k[:1], x)[0].double()
        for n, x in ((50, whole), (1, last))
    ]
    torch.testing.assert_close(means["recall"], (recall[0] + recall[1]) / 51)


def test_soft_caps_are_part_of_recall_and_functions_are_not() -> None:
    q, k = 9 * torch.randn(1, 2, 50, 4), torch.randn(1, 2, 50, 4)
    gate: Any = {"block_size": 8, "top_k": 3}
    routing = route(q, k, **gate)
    with diagnostics.collect() as layers:
        moba_attention(q, k, k, softcap=0.5, **gate)
        moba_attention(q, k, k, score_mod=lambda score, *_: -score, **gate)
    want = diagnostics.attention_recall(q, k, routing, softcap=0.5)
    assert (want - diagnostics.attention_recall(q, k, routing)).abs().max() > 1e-3
    torch.testing.assert_close(layers["attention"].means()["recall"], want[0].double())
    assert layers["attention"].calls == 2


def test_threads_and_other_models_do_not_mix() -> None:
    models = [Layers(3) for _ in range(2)]
    q, k = torch.randn(1, 4, 50, 4), torch.randn(1, 2, 50, 4)
    with diagnostics.collect(models[0]) as layers, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: models[n % 2](q, k), range(20)))
    assert {name: x.calls for name, x in layers.items()} == {"attention.0": 10, "attention.1": 10}


def test_what_cannot_be_measured_runs_as_without() -> None:
    q, k = torch.randn(1, 4, 50, 4), torch.randn(1, 2, 50, 4)
    attention = MoBAAttention(block_size=8, top_k=3)
    with diagnostics.collect() as layers:
        attention(*(x.to("meta") for x in (q, k, k)))
        torch.func.grad(lambda x: attention(x, k, k).sum())(q)
        assert not layers
        attention(q, k, k)
        attention(q[:, :2], k, k)  # of other heads
    assert {name: x.calls for name, x in layers.items()} == {
        "attention": 1,
        "attention of 2 heads": 1,
    }


def test_a_hook_that_raises_leaves_names_as_they_are() -> None:
    model = Layers(3)
    q, k = torch.randn(1, 4, 50, 4), torch.randn(1, 2, 50, 4)

    def fail(*_: Any) -> None:
        raise RuntimeError("not today")

    handle = model.attention[1].register_forward_pre_hook(fail)
    with diagnostics.collect(model) as layers:
        with pytest.raises(RuntimeError, match="not today"):
            model(q, k)
        handle.remove()
        model(q, k)
    assert {name: x.calls for name, x in layers.items()} == {"attention.0": 2, "attention.1": 1}


def test_long_blocks_take_no_memory() -> None:
    q = torch.randn(1, 1, 9, 4)
    routing = Routing(torch.zeros(1, 1, 9, 1).int(), 2**30, 9, 9, causal=True)
    torch.testing.assert_close(diagnostics.attention_recall(q, q, routing), torch.ones(1, 1))


def test_gradients_do_not_flow_into_measures() -> None:
    q = torch.randn(1, 2, 40, 4, requires_grad=True)
    with diagnostics.collect() as layers:
        moba_attention(q, q, q, block_size=8, top_k=2).sum().backward()
    assert not any(x.requires_grad for x in layers["attention"].means().values())


def test_changes_are_of_the_same_queries() -> None:
    x = torch.randn(1, 1, 16, 4)
    one, other = (patterns.sliding_window(x, x, block_size=n, local_blocks=1) for n in (2, 4))
    with pytest.raises(ValueError, match="after must have"):
        diagnostics.choice_change(one, other)
    documents = [torch.tensor([0, n, 16]) for n in (4, 8)]
    one, other = (
        patterns.sliding_window(x, x, block_size=2, local_blocks=1, cu_seqlens=docs)
        for docs in documents
    )
    with pytest.raises(ValueError, match="after must be of the same documents"):
        diagnostics.choice_change(one, other)
    with pytest.raises(ValueError, match="num_kv_heads must divide"):
        diagnostics.group_union(one, 2)
