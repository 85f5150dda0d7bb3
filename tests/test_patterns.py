"""Fixed patterns against their definitions, query by query."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest

from moba_flex import Routing, moba_attention, moba_attention_reference, patterns, routed_attention
from tests.case import Case
from tests.helpers import chosen_blocks
from tests.test_layout import layouts

# Which block `n` of a sequence a query of block `own` attends to, neighbours apart.
FAR: dict[str, tuple[str, Callable[[int, int, int], bool]]] = {
    "sliding_window": ("", lambda n, own, value: False),
    "sink_window": ("sink_blocks", lambda n, own, value: n < value),
    "global_local": ("every", lambda n, own, value: n % value == 0),
    "strided": ("stride", lambda n, own, value: (own - n) % value == 0),
}


def choose(name: str, case: Case, value: int, local_blocks: int) -> Routing:
    q, k, _ = case.inputs()
    option = FAR[name][0]
    options: dict[str, Any] = {option: value} if option else {}
    pattern = getattr(patterns, name)
    routing: Routing = pattern(
        q,
        k,
        block_size=case.block_size,
        local_blocks=local_blocks,
        causal=case.causal,
        **options,
        **case.layout,
    )
    return routing


@given(
    name=st.sampled_from(sorted(FAR)),
    case=layouts(),
    value=st.integers(1, 4),
    local_blocks=st.integers(0, 3),
)
def test_pattern_is_its_definition(name: str, case: Case, value: int, local_blocks: int) -> None:
    case = replace(case, batch=2, group=3)
    routing = choose(name, case, value, local_blocks)
    assert routing.blocks.dtype == torch.int32
    assert routing.blocks.is_contiguous()
    assert (
        (routing.blocks.diff(dim=3) > 0) | (routing.blocks[..., 1:] == routing.num_blocks)
    ).all()
    blocks, places = chosen_blocks(routing), case.places
    rows = places.own.shape[0]
    for b in range(case.batch):
        for i in range(case.q_len):
            own, first, after = (
                int(x[b % rows, i]) for x in (places.own, places.first, places.after)
            )
            expected = set()
            if own >= 0:
                for n in range(first, own + 1 if case.causal else after):
                    near = abs(own - n) <= local_blocks
                    if near or FAR[name][1](n - first, own - first, value):
                        expected.add(n)
                expected.add(own)
            for h in range(3):
                assert set(blocks[b, h, i].nonzero().flatten().tolist()) == expected


def test_a_pattern_that_is_all_is_causal_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 100, 16)
    routing = patterns.global_local(q, k, block_size=8, every=1, local_blocks=0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(routed_attention(q, k, v, routing), expected)


@pytest.mark.parametrize("layout", [{}, {"docs": (50, 1, 0, 37)}, {"pads": ((3, 9), (88, 0))}])
def test_routed_attention_follows_a_routing(layout: dict[str, Any]) -> None:
    case = Case(batch=2, num_kv_heads=2, group=2, q_len=88, kv_len=88, block_size=8, **layout)
    q, k, v = (x.requires_grad_() for x in case.inputs())
    routing = choose("sink_window", case, 2, 1)
    mods: dict[str, Any] = {
        "softcap": 3.0,
        "score_mod": lambda score, b, h, q_idx, kv_idx: score - (q_idx - kv_idx) / 9,
        "mask_mod": lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 25,
    }
    for options in ({}, mods):
        out, aux = routed_attention(
            q, k, v, routing, scale=0.4, return_aux=AuxRequest(lse=True), **options
        )
        expected, lse, _ = moba_attention_reference(
            q,
            k,
            v,
            block_size=8,
            top_k=1,
            scale=0.4,
            blocks=chosen_blocks(routing),
            **case.layout,
            **options,
        )
        torch.testing.assert_close(out, expected)
        assert aux.lse is not None
        torch.testing.assert_close(aux.lse, lse)
        weight = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), weight)
        for x, y in zip(grads, torch.autograd.grad(expected, (q, k, v), weight), strict=True):
            torch.testing.assert_close(x, y)


def test_the_router_that_forces_all_is_a_pattern() -> None:
    q, k, v = torch.randn(3, 1, 2, 90, 16)
    routing = patterns.sink_window(q, k, block_size=8, sink_blocks=1, local_blocks=2)
    out = moba_attention(q, k, v, block_size=8, top_k=4, sink_blocks=1, local_blocks=2)
    assert torch.equal(routed_attention(q, k, v, routing), out)


def test_options_are_checked() -> None:
    q = torch.randn(1, 1, 8, 4)
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: patterns.strided(q, q, block_size=2, stride=0, local_blocks=0),
            "stride must be at least 1, got 0",
        ),
        (
            lambda: patterns.global_local(q, q, block_size=2, every=0, local_blocks=0),
            "every must be at least 1, got 0",
        ),
        (
            lambda: patterns.sink_window(q, q, block_size=2, sink_blocks=-1, local_blocks=0),
            "sink_blocks must be at least 0, got -1",
        ),
        (
            lambda: patterns.sliding_window(q, q, block_size=0, local_blocks=0),
            "block_size must be at least 1, got 0",
        ),
        (
            lambda: patterns.sliding_window(q, q, block_size=1, local_blocks=-1),
            "local_blocks must be at least 0, got -1",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()
