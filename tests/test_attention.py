"""Every plan against the oracle, and the laws that hold between requests."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from moba_flex import choose_plan, moba_attention, moba_attention_reference, route
from moba_flex.compile import decode, plans
from moba_flex.masks.request import gated_request
from tests.helpers import (
    Case,
    assert_matches_oracle,
    attend_by_lists,
    attention,
    cases,
    chosen_blocks,
    uncompiled,
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
        return uncompiled(plans._attend_regrouped)(
            gated_request(q, k, v, **case.gate, scale=case.scale)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "attend", attend_by_lists)
        assert_matches_oracle("routed, flex form", case, attend)


@given(case=cases(max_len=400))
def test_masked_by_lists_is_the_oracle(case: Case) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        lse = AuxRequest(lse=True)
        request = gated_request(q, k, v, **case.gate, scale=case.scale, return_aux=lse)
        return uncompiled(plans._attend_masked)(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "attend", attend_by_lists)
        assert_matches_oracle("masked, by lists", case, attend)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("causal", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_masked_is_the_oracle(causal: bool, dtype: torch.dtype) -> None:
    """The compiled kernel on CPU, at lengths that share one dynamic graph.

    A graph takes seconds to compile; the fuzzer draws the other two pairs too.
    """
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
    q, k, v = torch.randn(3, 1, 2, 40, 4, dtype=torch.float64, requires_grad=True)

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
    assert torch.equal(out, clean)


@pytest.mark.parametrize("plan", ["routed", "dense"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_not_finite_stays_with_those_who_see_it(
    name: str, value: float, plan: Any
) -> None:
    q, k, v = torch.randn(3, 1, 2, 200, 16)
    gate: dict[str, Any] = {"block_size": 200 if plan == "dense" else 40, "top_k": 2}

    def run() -> tuple[Tensor, Tensor]:
        some_q = q.clone().requires_grad_()
        out = moba_attention(some_q, k, v, **gate, plan=plan)
        return out, *torch.autograd.grad(out[:, :, :90].sum(), some_q)

    clean = run()
    # In the middle of a block, with queries before it in the same tile of any kernel.
    {"k": k, "v": v}[name][0, 1, 90, 3] = value
    spoiled = run()
    assert not spoiled[0][0, 1, 90:120].isfinite().all()
    for x, y in zip(spoiled, clean, strict=True):
        torch.testing.assert_close(x[:, 0], y[:, 0])
        torch.testing.assert_close(x[:, :, :90], y[:, :, :90])
        if plan == "routed":  # what is cut elsewhere is the own block alone
            assert torch.equal(x[:, 0, 120:], y[:, 0, 120:])
            assert torch.equal(x[:, :, :80], y[:, :, :80])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["q", "k", "v", "q*", "k*", "v*"])
@pytest.mark.parametrize("mods", [{}, {"softcap": 3.0}, {"score": "relative", "mask": "window:9"}])
def test_what_is_not_finite_shows_to_those_who_see_it(
    name: str, value: str, mods: dict[str, Any]
) -> None:
    """Also where parts have fewer keys than PyTorch's kernel needs to see it, and in gradients."""
    for block_size, more in ((1, {}), (8, {"docs": (3, 0, 20, 17)}), (24, {"causal": False})):
        options: dict[str, Any] = {"block_size": block_size, "top_k": 2, **more, **mods}
        case = Case(2, 2, 2, 40, 40, plants=(f"{name}={value}",), **options)
        assert_matches_oracle("planted", case, attention(case, "routed"))
        if not case.score and not case.mask:
            inferred = replace(case, grads="")
            # Tiles of few queries each, and tiles of one query.
            for few in (inferred, replace(inferred, q_len=3, docs=None)):
                with torch.no_grad():
                    assert_matches_oracle("planted, decode", few, attention(few, "decode"))
        dense = replace(case, top_k=40, lse=False)
        assert_matches_oracle("planted, dense", dense, attention(dense, "dense", lse=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_decode_in_16_bits_uses_flash_attention_if_nobody_asks_for_lse(
    dtype: torch.dtype, q_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(2, 2, 2, q_len, 90, 64, 24, 3, dtype=dtype, grads="", lse=False)
    monkeypatch.setattr(decode, "_MOST_MASKED", 0)
    for plants in (("k=nan",), ("v=inf",)):
        planted = replace(case, plants=plants)
        assert_matches_oracle("planted", planted, attention(planted, "decode"), backward=False)
    products = Mock(wraps=decode._multiply)
    monkeypatch.setattr(decode, "_multiply", products)
    for lse in (False, True):
        asked = replace(case, lse=lse)
        assert_matches_oracle("16 bits", asked, attention(asked, "decode"), backward=False)
        assert products.called == lse


@pytest.mark.usefixtures("poison")
@given(
    case=cases(max_len=200, dtypes=[torch.float32, torch.float16]),
    q_len=st.integers(1, 20),
    lse=st.booleans(),
)
def test_decode_copies_the_chosen_keys(case: Case, q_len: int, lse: bool) -> None:
    """However short the cache; also where a tile needs more memory than is kept."""
    case = replace(case, q_len=min(q_len, case.kv_len), grads="", lse=lse)
    for room in (decode._memory.rooms, torch.empty(2, 512, dtype=torch.uint8)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "_MOST_MASKED", 0)
            patch.setattr(decode._memory, "rooms", room)
            assert_matches_oracle("copies", case, attention(case, "decode"), backward=False)


@pytest.mark.parametrize("q_len", [1, 3, 20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": torch.bfloat16},
        {"head_top_k": (3, 1, 2, 2)},
        {"block_size": 2**30, "top_k": 1},
        {"group": 1, "memory": ("0132", "0132", "0132")},
    ],
)
def test_decode_attends_to_all_keys_of_a_short_cache(
    q_len: int, causal: bool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"block_size": 16, "top_k": 3, "causal": causal, **more}
    case = replace(Case(2, 2, 2, q_len, 115, 64, grads="", lse=False), **options)
    for plants in (("k=nan",), ("v*=inf",), ("k*=-inf",)):
        planted = replace(case, plants=plants)
        assert_matches_oracle("planted", planted, attention(planted, "decode"), backward=False)
    monkeypatch.setattr(decode, "_cut", Mock(side_effect=AssertionError("copies keys")))
    assert_matches_oracle("short cache", case, attention(case, "decode"), backward=False)


def test_decode_shows_nan_of_the_one_key_that_a_query_sees() -> None:
    """Behind 512 keys, in a piece of its own, where flash attention would hide it."""
    q, k, v = torch.randn(3, 1, 2, 513, 16)
    k[0, 1, 512] = torch.nan
    out = moba_attention(q[:, :, -1:], k, v, block_size=128, top_k=1, plan="decode")
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("plan", ["routed", "dense"])
def test_scales_that_are_not_positive(scale: float, plan: Any) -> None:
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 100, 16)]
    gate: dict[str, Any] = {"block_size": 16, "top_k": 3 if plan == "routed" else 7}
    out = moba_attention(*inputs, **gate, scale=scale, plan=plan)
    expected = moba_attention_reference(*inputs, **gate, scale=scale).out
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    for x, y in zip(grads, torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("v_dim", [5, 16, 40])
@pytest.mark.parametrize("plan", ["routed", "dense"])
def test_values_may_have_another_head_dim(v_dim: int, plan: Any) -> None:
    inputs = [
        torch.randn(2, heads, 90, dim, requires_grad=True)
        for heads, dim in ((4, 16), (2, 16), (2, v_dim))
    ]
    gate: dict[str, Any] = {"block_size": 16, "top_k": 3 if plan == "routed" else 6}
    out, aux = moba_attention(*inputs, **gate, plan=plan, return_aux=AuxRequest(lse=True))
    expected, lse, _ = moba_attention_reference(*inputs, **gate)
    assert aux.lse is not None
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux.lse, lse)
    weights = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, aux.lse), inputs, weights)
    for x, y in zip(grads, torch.autograd.grad((expected, lse), inputs, weights), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("sizes", [(0, 7), (2, 0), (0, 0)])
def test_nothing_in_is_nothing_out(sizes: tuple[int, int]) -> None:
    batch, q_len = sizes
    q = torch.randn(batch, 4, q_len, 8, requires_grad=True)
    k, v = (torch.randn(batch, 2, 7, n, requires_grad=True) for n in (8, 5))
    documents = {"cu_seqlens": torch.tensor([0, 7]), "cu_seqlens_q": torch.tensor([0, q_len])}
    for options in ({}, {"softcap": 2.0}, documents, {"plan": "dense", "top_k": 4}):
        some: dict[str, Any] = {"block_size": 2, "top_k": 2} | options
        out, aux = moba_attention(q, k, v, **some, return_aux=AuxRequest(lse=True))
        assert out.shape == (batch, 4, q_len, 5)
        assert aux.lse is not None
        assert aux.lse.shape == (batch, 4, q_len)
        for x in torch.autograd.grad(out.sum() + aux.lse.sum(), (q, k, v)):
            assert (x == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"top_k": 9}])
def test_autocast_casts_like_scaled_dot_product_attention(options: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 130, 16))
    gate: dict[str, Any] = {"block_size": 16, "top_k": 3} | options
    low = (x.bfloat16() for x in (q, k, v))
    expected = moba_attention(*low, **gate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = scaled_dot_product_attention(q, k, v)
        out, aux = moba_attention(
            q, k, v.double().float(), **gate, return_aux=AuxRequest(lse=True)
        )
        mixed = moba_attention(q, k.bfloat16(), v, **gate)
        exact = moba_attention(q.double(), k.double(), v.double(), **gate)
    assert out.dtype == reference.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    assert exact.dtype == torch.float64
    assert aux.lse is not None
    assert aux.lse.dtype == torch.float32
    for x in torch.autograd.grad(out.sum(), (q, k, v)):
        assert x.dtype == torch.float32


def test_activation_checkpointing() -> None:
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 130, 16)]

    def attend(*qkv: Tensor) -> Tensor:
        return moba_attention(*qkv, block_size=16, top_k=3, softcap=9.0).sin()

    expected = torch.autograd.grad(attend(*inputs).sum(), inputs)
    for reentrant in (False, True):
        out = checkpoint(attend, *inputs, use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        for x in inputs:
            x.grad = None
        out.sum().backward()
        for x, y in zip(inputs, expected, strict=True):
            assert x.grad is not None
            assert torch.equal(x.grad, y)


def test_vmap_is_refused() -> None:
    q = torch.randn(3, 1, 2, 20, 16)

    def attend(q: Tensor) -> Tensor:
        return moba_attention(q, q, q, block_size=16, top_k=1)

    message = "q, k and v must be plain tensors, got some under torch.func.vmap"
    for call in (
        torch.func.vmap(attend),
        torch.func.vmap(torch.func.grad(lambda q: attend(q).sum())),
    ):
        with pytest.raises(ValueError, match=message):
            call(q)


def test_choose_plan() -> None:
    few, q, k = (torch.randn(1, *shape, 16) for shape in ((4, 64), (4, 128), (2, 256)))
    assert choose_plan(few, k, block_size=64, top_k=3) == "decode"
    assert choose_plan(few.requires_grad_(), k, block_size=64, top_k=3) == "routed"
    assert choose_plan(q, k, block_size=64, top_k=3) == "routed"
    assert choose_plan(q, k, block_size=64, top_k=4) == "dense"
    assert choose_plan(q, k, block_size=256, top_k=1) == "dense"
    assert choose_plan(q, k, block_size=64, top_k=4, head_top_k=torch.tensor([4] * 4)) == "routed"
    on_meta = q.to("meta"), k.to("meta")
    assert choose_plan(*on_meta, block_size=64, top_k=3) == "routed"
    with FakeTensorMode():
        for head_dim, plan in ((16, "fused"), (256, "fused"), (320, "routed")):
            x = torch.empty(1, 2, 256, head_dim, device="cuda")
            assert choose_plan(x, x, block_size=64, top_k=3) == plan
            assert choose_plan(x, x, block_size=64, top_k=4) == "dense"
        x = torch.empty(1, 2, 256, 64, device="cuda")
        wide = torch.empty(1, 2, 256, 320, device="cuda")
        assert choose_plan(x, x, wide, block_size=64, top_k=3) == "routed"
        mods: list[dict[str, Any]] = [
            {"score_mod": lambda score, b, h, q_idx, kv_idx: score},
            {"mask_mod": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx},
        ]
        for mod in mods:
            assert choose_plan(x, x, block_size=64, top_k=3, **mod) == "routed"
