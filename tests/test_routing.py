"""A given routing is a set of blocks, whatever its lists hold, on every plan."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from moba_flex import Routing, diagnostics, moba_attention, route, routed_attention
from tests.case import Case
from tests.helpers import assert_matches_oracle, attention, layouts, needs_interpreter

LISTS = ["given:0", "given:1", "given:4", "shared:3", "shared:9"]


@pytest.mark.usefixtures("poison")
@settings(max_examples=2 * settings().max_examples)
@given(case=layouts(max_len=300, groups=(1, 3)), lists=st.sampled_from(LISTS))
def test_lists_of_any_numbers_are_sets(case: Case, lists: str) -> None:
    case = replace(case, pattern=lists)
    assert_matches_oracle("given lists", case, attention(case, "routed"))


@pytest.mark.usefixtures("poison")
@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide) .*:RuntimeWarning")
@settings(max_examples=settings().max_examples // 4 + 1)
@given(
    case=layouts(max_len=100, min_block=5, groups=(1, 3), dtypes=[torch.float32]),
    lists=st.sampled_from(LISTS),
)
def test_kernels_take_lists_of_any_numbers(case: Case, lists: str) -> None:
    needs_interpreter()
    case = replace(case, pattern=lists)
    assert_matches_oracle("given lists, interpreted", case, attention(case, "fused"))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"docs": (100, 1, 0, 149), "tail": (0, 6)}])
@pytest.mark.parametrize("causal", [True, False])
def test_the_masked_plan_takes_lists_of_any_numbers(layout: dict[str, Any], causal: bool) -> None:
    case = Case(1, 2, 2, 256, 256, block_size=20, pattern="given:5", causal=causal, **layout)
    case = replace(case, grads="", lse=False)
    assert_matches_oracle("given lists, masked", case, attention(case, "masked"), backward=False)


def spoiled(routing: Routing, own: Tensor, dtype: torch.dtype = torch.int64) -> Routing:
    """Return the same routing with its lists turned round, and entries that change nothing."""
    blocks = routing.blocks.to(dtype)
    own = own.expand(*blocks.shape[:3], 1).to(dtype)
    none = torch.full_like(own, -1), torch.full_like(own, routing.num_blocks)
    future = [own + 1, own + 3] if routing.causal else []
    lists = torch.cat((blocks.flip(-1), own, blocks, *none, *future, own), dim=-1)
    return replace(routing, blocks=lists)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.int8])
@pytest.mark.parametrize("causal", [True, False])
def test_entries_that_change_nothing_change_no_bit(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in Case(2, 2, 2, 150, 170).inputs())
    routing = route(q, k, block_size=16, top_k=4, causal=causal)
    own = torch.arange(20, 170)[:, None] // 16
    aux = AuxRequest(lse=True)
    results = []
    for given_routing in (routing, spoiled(routing, own, dtype)):
        out, more = routed_attention(q, k, v, given_routing, return_aux=aux)
        assert more.lse is not None
        grads = torch.autograd.grad(out.square().sum() + more.lse.sum(), (q, k, v))
        results.append((out, more.lse, *grads))
    want = moba_attention(q, k, v, block_size=16, top_k=4, causal=causal)
    assert torch.equal(results[0][0], want)
    assert all(map(torch.equal, *results))


def test_lists_of_a_key_value_head_are_those_of_its_query_heads() -> None:
    q, k, v = Case(2, 2, 3, 90, 90).inputs()
    lists = torch.randint(-2, 12, (2, 2, 90, 5))
    by_group = Routing(lists, 8, 90, 90, True)
    by_head = Routing(lists.repeat_interleave(3, dim=1), 8, 90, 90, True)
    out = routed_attention(q, k, v, by_group)
    assert torch.equal(out, routed_attention(q, k, v, by_head))
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(out, compiled(q, k, v, by_group))


def test_diagnostics_take_sets() -> None:
    q, k, _ = Case(1, 2, 2, 100, 100).inputs()
    routing = route(q, k, block_size=8, top_k=4)
    same = spoiled(routing, torch.arange(100)[:, None] // 8)
    for name in ("density", "load", "load_imbalance", "routing_entropy", "routing_map"):
        measure = getattr(diagnostics, name)
        torch.testing.assert_close(measure(same), measure(routing), rtol=0, atol=0)
    recall = diagnostics.attention_recall
    torch.testing.assert_close(recall(q, k, same), recall(q, k, routing))
