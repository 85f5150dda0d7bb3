"""Every plan against the oracle, and the laws that hold between requests."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import choose_plan, moba_attention, moba_attention_reference, route
from moba_flex.compile import plans
from tests.helpers import (
    Case,
    assert_matches_oracle,
    attend_by_lists,
    attention,
    cases,
    chosen_blocks,
)

EXAMPLES = settings().max_examples


@pytest.mark.usefixtures("poison")
@settings(max_examples=2 * EXAMPLES)
@given(case=cases())
def test_routed_is_the_oracle(case: Case) -> None:
    assert_matches_oracle("routed", case, attention(case, "routed"))


@pytest.mark.usefixtures("poison")
@given(case=cases())
def test_dense_is_the_oracle(case: Case) -> None:
    case = replace(case, top_k=-(-case.kv_len // case.block_size) + case.top_k)
    assert_matches_oracle("dense", case, attention(case, "dense"))
    assert_matches_oracle("dense, no lse", case, attention(case, "dense", lse=False))


@pytest.mark.usefixtures("poison")
@given(case=cases())
def test_auto_is_the_oracle(case: Case) -> None:
    assert_matches_oracle("auto", case, attention(case, "auto", lse=False))


@given(case=cases(max_len=220, min_block=24, groups=(1, 3)))
def test_flex_form_of_routed_is_the_oracle(case: Case) -> None:
    """The form that runs on CUDA, its two FlexAttention calls read from their lists."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
        return plans._routed_flex(q, k, v, route(q, k, **case.gate), scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "attend", attend_by_lists)
        assert_matches_oracle("routed, flex form", case, attend)


@given(case=cases(max_len=400))
def test_masked_by_lists_is_the_oracle(case: Case) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
        return plans.masked(q, k, v, route(q, k, **case.gate), scale=scale, lse=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "attend", attend_by_lists)
        assert_matches_oracle("masked, by lists", case, attend)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_masked_is_the_oracle(causal: bool, dtype: torch.dtype) -> None:
    """The compiled kernel on CPU, at lengths that share one dynamic graph."""
    base = Case(2, 2, 3, 130, 130, 24, 37, 3, sink_blocks=1, causal=causal, dtype=dtype)
    torch._dynamo.utils.counters.clear()
    for q_len, kv_len in ((130, 130), (350, 350), (257, 400), (513, 513), (200, 1200), (90, 700)):
        case = replace(base, q_len=q_len, kv_len=kv_len, seed=kv_len)
        assert_matches_oracle("masked", case, attention(case, "masked", lse=False), backward=False)
    # All the same lengths, or q_len == kv_len, or neither: nothing else makes a graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("plan", ["auto", "dense", "routed"])
@pytest.mark.parametrize(("block_size", "top_k"), [(50, 6), (300, 1), (1000, 1), (7, 43)])
def test_covering_top_k_is_causal_attention(block_size: int, top_k: int, plan: Any) -> None:
    q, k, v = torch.randn(3, 2, 4, 300, 16)
    out = moba_attention(q, k, v, block_size=block_size, top_k=top_k, plan=plan)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_small_top_k_is_not_causal_attention(top_k: int) -> None:
    q, k, v = torch.randn(3, 2, 4, 300, 16)
    out = moba_attention(q, k, v, block_size=20, top_k=top_k)
    assert relative_error(out, scaled_dot_product_attention(q, k, v, is_causal=True)) > 0.1


def test_top_k_of_one_is_the_own_block_alone() -> None:
    q, k, v = torch.randn(3, 2, 4, 96, 16)
    out = moba_attention(q, k, v, block_size=16, top_k=1)
    q, k, v = (x.unflatten(2, (6, 16)) for x in (q, k, v))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).flatten(2, 3)
    torch.testing.assert_close(out, expected)


def test_later_keys_and_values_never_matter() -> None:
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    before = moba_attention(q, k, v, block_size=32, top_k=3)
    k[:, :, 200:], v[:, :, 200:] = torch.randn(2, 1, 2, 100, 16)
    after = moba_attention(q, k, v, block_size=32, top_k=3)
    torch.testing.assert_close(after[:, :, :200], before[:, :, :200])
    assert relative_error(after[:, :, 200:], before[:, :, 200:]) > 0.1


def test_last_queries_alone_are_the_last_rows() -> None:
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    whole = moba_attention(q, k, v, block_size=32, top_k=3)
    for q_len in (1, 37, 128, 299):
        part = moba_attention(q[:, :, -q_len:], k, v, block_size=32, top_k=3)
        torch.testing.assert_close(part, whole[:, :, -q_len:])


def test_permuting_heads_commutes() -> None:
    q, k, v = torch.randn(3, 1, 6, 200, 16)
    order = torch.randperm(6)
    out = moba_attention(q, k, v, block_size=16, top_k=3)
    permuted = moba_attention(q[:, order], k[:, order], v[:, order], block_size=16, top_k=3)
    torch.testing.assert_close(permuted, out[:, order])


def test_grouped_heads_are_repeated_keys() -> None:
    q, (k, v) = torch.randn(1, 6, 200, 16), torch.randn(2, 1, 2, 200, 16)
    out = moba_attention(q, k, v, block_size=16, top_k=3)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    torch.testing.assert_close(moba_attention(q, k, v, block_size=16, top_k=3), out)


def test_scale_changes_the_weights_and_not_the_gate() -> None:
    q, k, v = torch.randn(3, 1, 2, 200, 16, dtype=torch.float64)
    out = moba_attention(q, k, v, block_size=16, top_k=3, scale=0.1)
    scaled = moba_attention(q * 0.4, k, v, block_size=16, top_k=3)
    torch.testing.assert_close(out, scaled)


def test_sink_and_local_blocks_are_chosen() -> None:
    q, k, _ = torch.randn(3, 1, 2, 200, 16)
    routing = route(q, k, block_size=10, top_k=5, sink_blocks=2, local_blocks=1)
    blocks = chosen_blocks(routing)
    for i in range(50, 200):
        assert blocks[:, :, i, [0, 1, i // 10 - 1, i // 10]].all()
        assert (blocks[:, :, i].sum(-1) == 5).all()


def test_gradient_of_the_gate_is_none_and_of_attention_exact() -> None:
    q, k, v = torch.randn(3, 1, 2, 60, 8, dtype=torch.float64, requires_grad=True)

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        aux = AuxRequest(lse=True)
        out, lse = moba_attention(*qkv, block_size=8, top_k=3, return_aux=aux)
        assert lse.lse is not None
        return out, lse.lse

    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_of_any_subset(needs: tuple[bool, bool, bool]) -> None:
    inputs = [
        x.requires_grad_(need) for x, need in zip(torch.randn(3, 1, 2, 90, 16), needs, strict=True)
    ]
    q, k, v = inputs
    moba_attention(q, k, v, block_size=16, top_k=3).sum().backward()
    expected = [x.detach().requires_grad_() for x in inputs]
    moba_attention(*expected, block_size=16, top_k=3).sum().backward()
    for x, y, need in zip(inputs, expected, needs, strict=True):
        assert (x.grad is not None) == need
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad)


def test_second_run_is_bitwise_equal() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        qkv = [x.requires_grad_() for x in torch.randn(3, 2, 4, 333, 16)]
        out = moba_attention(*qkv, block_size=32, top_k=4)
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("plan", ["auto", "routed"])
def test_transposed_layout(plan: Any) -> None:
    """Tensors as Hugging Face models pass them: heads and positions transposed."""
    q, k, v = (x.transpose(1, 2) for x in torch.randn(3, 2, 300, 4, 16))
    expected = moba_attention_reference(q, k, v, block_size=32, top_k=3).out
    out = moba_attention(q, k, v, block_size=32, top_k=3, plan=plan)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("plan", ["auto", "routed", "dense"])
def test_vectors_in_pieces(plan: Any) -> None:
    """Head dims whose elements do not lie next to each other."""
    inputs = [x.mT.contiguous().mT.requires_grad_() for x in torch.randn(3, 2, 4, 100, 16)]
    gate: dict[str, Any] = {"block_size": 32, "top_k": 4 if plan == "dense" else 2}
    out = moba_attention(*inputs, **gate, plan=plan)
    expected = moba_attention_reference(*inputs, **gate).out
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    for x, y in zip(grads, torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(x, y)


def test_nan_in_a_query_stays_in_its_row() -> None:
    q, k, v = torch.randn(3, 1, 2, 200, 16)
    clean = moba_attention(q, k, v, block_size=16, top_k=3)
    q[0, 0, 50] = math.nan
    out = moba_attention(q, k, v, block_size=16, top_k=3)
    assert out[0, 0, 50].isnan().all()
    out[0, 0, 50] = clean[0, 0, 50]
    torch.testing.assert_close(out, clean)


def test_choose_plan() -> None:
    q, k = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 256, 16)
    assert choose_plan(q, k, block_size=64, top_k=3) == "routed"
    assert choose_plan(q, k, block_size=64, top_k=4) == "dense"
    assert choose_plan(q, k, block_size=256, top_k=1) == "dense"
    on_meta = q.to("meta"), k.to("meta")
    assert choose_plan(*on_meta, block_size=64, top_k=3) == "routed"
    with FakeTensorMode():
        for head_dim, plan in ((16, "fused"), (256, "fused"), (320, "routed")):
            x = torch.empty(1, 2, 256, head_dim, device="cuda")
            assert choose_plan(x, x, block_size=64, top_k=3) == plan
            assert choose_plan(x, x, block_size=64, top_k=4) == "dense"
