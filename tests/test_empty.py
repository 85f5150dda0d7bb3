"""No batch, no queries, no keys: every door gives what there is of nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from moba_flex import (
    MoBAAttention,
    choose_plan,
    create_moba_block_mask,
    diagnostics,
    make_tables,
    moba_attention,
    moba_attention_reference,
    patterns,
    route,
    routed_attention,
)
from tests.helpers import DEVICES

SIZES = [(2, 0, 0), (0, 5, 5), (0, 0, 0), (2, 0, 7)]  # of batch, queries and keys
PATTERNS: dict[str, dict[str, int]] = {
    "sliding_window": {},
    "sink_window": {"sink_blocks": 2},
    "global_local": {"every": 2},
    "strided": {"stride": 2},
}


def layouts(batch: int, q_len: int, kv_len: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield all that may be said of such rows."""
    yield {}
    ones = torch.ones(batch, kv_len, dtype=torch.bool, device=device)
    yield {"key_mask": ones}
    yield {"key_mask": ~ones}

    def starts(*edges: int) -> Tensor:
        return torch.tensor(edges, device=device)

    yield {"cu_seqlens": starts(0, kv_len), "cu_seqlens_q": starts(0, q_len)}
    if q_len == kv_len:
        yield from ({"cu_seqlens": starts(*x)} for x in ([0, kv_len], [0, 0], [0, 0, kv_len]))


def inputs(batch: int, q_len: int, kv_len: int, device: str) -> list[Tensor]:
    shapes = (batch, 4, q_len, 16), (batch, 2, kv_len, 16), (batch, 2, kv_len, 32)
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_the_oracle(sizes: tuple[int, int, int], causal: bool, device: str) -> None:
    q, k, v = inputs(*sizes, device)
    for layout in layouts(*sizes, device):
        for plan, top_k in (("auto", 2), ("dense", 9), ("routed", 2)):
            gate: dict[str, Any] = {"block_size": 4, "top_k": top_k, "causal": causal}
            request: dict[str, Any] = {**gate, **layout, "plan": plan}
            out, aux = moba_attention(q, k, v, **request, return_aux=AuxRequest(lse=True))
            want = moba_attention_reference(q, k, v, **gate, **layout)
            torch.testing.assert_close(out, want.out, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(aux.lse, want.lse, atol=1e-3, rtol=1e-3)
            assert aux.lse is not None
            grads = torch.autograd.grad(out.sum() + aux.lse.clamp(min=0).sum(), (q, k, v))
            assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
        attended = MoBAAttention(4, 2, causal=causal)(q, k, v, **layout)
        assert attended.shape == (sizes[0], 4, sizes[1], 32)
        assert choose_plan(q, k, v, **gate, **layout) in ("dense", "routed", "fused")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_routings_and_masks_are_empty(
    sizes: tuple[int, int, int], causal: bool, device: str
) -> None:
    q, k, v = inputs(*sizes, device)
    gate: dict[str, Any] = {"block_size": 4, "causal": causal}
    for layout in layouts(*sizes, device):
        tables = make_tables(*sizes[1:], 4, causal, **layout)
        found = [route(q, k, **gate, top_k=2, tables=tables)]
        for name, options in PATTERNS.items():
            pattern = getattr(patterns, name)
            found.append(pattern(q, k, **gate, **options, local_blocks=1, **layout))
        for routing in found:
            assert routing.blocks.shape[:3] == q.shape[:3]
            assert routed_attention(q, k, v, routing).shape == (sizes[0], 4, sizes[1], 32)
        mask = create_moba_block_mask(q, k, **gate, top_k=2, **layout)
        assert mask.shape == (sizes[0], 4, *sizes[1:])
        if not layout:
            for name in ("load", "load_imbalance", "routing_entropy", "routing_map"):
                assert getattr(diagnostics, name)(found[0]).shape[:2] == (sizes[0], 4)
            assert diagnostics.attention_recall(q, k, found[0]).shape == (sizes[0], 4)
