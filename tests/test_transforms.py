"""What PyTorch has beside calls and backward: `torch.func`, tangents, meta, default devices."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.flop_counter import FlopCounterMode

from moba_flex import MoBAAttention, create_moba_block_mask, moba_attention
from moba_flex.compile.plans import PlanName
from tests.case import Case
from tests.helpers import DEVICES

CASE = Case(2, 2, 2, 90, 100)
TANGENTS = "q, k and v must have no tangents, got some from forward-mode AD"
TWICE = "moba_attention must be differentiated once, got a second derivative"


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - 0.1 * (h + 1) * (q_idx - kv_idx)


def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx < 50


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"top_k": 7},
    "softcap": {"softcap": 3.0},
    "functions": {"score_mod": alibi, "mask_mod": near},
    "documents": {
        "cu_seqlens": torch.tensor([0, 30, 100]),
        "cu_seqlens_q": torch.tensor([0, 25, 90]),
    },
    "padding": {"key_mask": torch.arange(100) >= torch.tensor([[0], [20]])},
    "heads": {"head_top_k": torch.tensor([1, 2, 3, 2])},
}
requests = pytest.mark.parametrize("name", REQUESTS)
devices = pytest.mark.parametrize("device", DEVICES)
WITH_FLEX = {"functions"}  # what FlexAttention alone serves on CUDA


def loss_of(name: str, device: str) -> Callable[..., Tensor]:
    """Return a function of q, k and v that sums up output and log-sum-exp."""
    tensors = {key: x.to(device) for key, x in REQUESTS[name].items() if isinstance(x, Tensor)}
    options: dict[str, Any] = {"block_size": 16, "top_k": 3, **REQUESTS[name], **tensors}
    weight = torch.randn(2, 4, 90, CASE.head_dim, device=device)

    def loss(q: Tensor, k: Tensor, v: Tensor, plan: PlanName | Literal["auto"] = "auto") -> Tensor:
        aux_request = AuxRequest(lse=True)
        out, aux = moba_attention(q, k, v, plan=plan, return_aux=aux_request, **options)
        assert aux.lse is not None
        return (out * weight).sum() + aux.lse.nan_to_num(0, 0, 0).square().sum()

    return loss


def plain_loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return moba_attention(q, k, v, block_size=16, top_k=3).square().sum()


@devices
@requests
def test_gradients_of_torch_func(name: str, device: str) -> None:
    loss, inputs = loss_of(name, device), replace(CASE, device=device).inputs()
    if device == "cuda" and name in WITH_FLEX:
        with pytest.raises(ValueError, match=r"plan must be one without FlexAttention under"):
            torch.func.grad(loss)(*inputs)
        return
    # Dense attention is FlexAttention's there, so "auto" goes on to the next plan.
    plan: PlanName | Literal["auto"] = "fused" if device == "cuda" and name == "dense" else "auto"
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves, plan), leaves)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    (one,) = torch.func.grad(loss, argnums=(1,))(*inputs)
    value, pull, *_ = torch.func.vjp(loss, *inputs)
    assert torch.equal(value, loss(*inputs, plan))
    for x, y, z in zip(got, pull(torch.ones((), device=device)), want, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(y, z)
    assert torch.equal(one, want[1])


def test_functional_modules() -> None:
    linear, attention, x = nn.Linear(16, 16), MoBAAttention(16, 3), torch.randn(1, 4, 70, 16)
    parameters: dict[str, Tensor] = dict(linear.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(linear, parameters, (x,))
        return attention(y, y[:, :2], y[:, 2:]).square().sum()

    want = torch.autograd.grad(loss(parameters), list(parameters.values()))
    got = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    for a, b in zip(got.values(), want, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_func_does_not_reach_what_a_function_captures() -> None:
    q, k, v = CASE.inputs()

    def loss(slopes: Tensor) -> Tensor:
        options: dict[str, Any] = {"block_size": 16, "top_k": 3}
        mod = lambda score, b, h, q_idx, kv_idx: score * slopes[h]  # noqa: E731
        return moba_attention(q, k, v, score_mod=mod, **options).sum()

    with pytest.raises(ValueError, match=r"score_mod must capture no tensor that torch.func"):
        torch.func.grad(loss)(torch.rand(4))


def test_flex_attention_under_torch_func_is_refused() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=16, top_k=3, plan="masked").sum()

    with pytest.raises(ValueError, match=r"plan must be one without FlexAttention under torch"):
        torch.func.grad(loss)(*CASE.inputs())


@devices
@requests
def test_tangents_are_refused(name: str, device: str) -> None:
    loss, inputs = loss_of(name, device), replace(CASE, device=device).inputs()
    for place in range(3):
        mixed = list(inputs)
        with forward_ad.dual_level():
            mixed[place] = forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
            with pytest.raises(ValueError, match=TANGENTS):
                loss(*mixed)
    with pytest.raises(ValueError, match=TANGENTS):
        torch.func.jvp(loss, inputs, inputs)
    with pytest.raises(ValueError, match=TANGENTS):
        torch.func.jvp(torch.func.grad(loss), inputs, inputs)


def test_tangents_are_refused_in_a_graph() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def tangent(*inputs: Tensor) -> Any:
        return torch.func.jvp(plain_loss, inputs, inputs)

    with pytest.raises(Exception, match=TANGENTS):
        tangent(*CASE.inputs())


@devices
@requests
def test_second_derivatives_are_refused(name: str, device: str) -> None:
    """Also where the first has constant weights, which autograd may take for all there is."""
    loss, plain = loss_of(name, device), replace(CASE, device=device).inputs()
    inputs = [x.clone().requires_grad_() for x in plain]
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad([x.square().sum() for x in first], inputs)
    if device == "cpu" or name not in WITH_FLEX:
        second = torch.func.grad(lambda *x: torch.func.grad(loss)(*x).square().sum())
        with pytest.raises(NotImplementedError, match=TWICE):
            second(*plain)


@requests
def test_meta_tensors_have_shapes_alone(name: str) -> None:
    inputs = [x.to("meta").requires_grad_() for x in CASE.inputs()]
    result = loss_of(name, "meta")(*inputs)
    assert (result.device.type, result.shape) == ("meta", ())
    for x, grad in zip(inputs, torch.autograd.grad(result, inputs), strict=True):
        assert (grad.device.type, grad.shape) == ("meta", x.shape)


@requests
def test_a_default_device_is_not_that_of_the_inputs(name: str) -> None:
    loss, inputs = loss_of(name, "cpu"), [x.requires_grad_() for x in CASE.inputs()]
    want = torch.autograd.grad(loss(*inputs), inputs)
    with torch.device("meta"):
        got = torch.autograd.grad(loss(*inputs), inputs)
    assert all(map(torch.equal, got, want))


def test_a_mask_of_meta_tensors() -> None:
    q, k = torch.empty(1, 2, 300, 16, device="meta"), torch.empty(1, 1, 400, 16, device="meta")
    mask = create_moba_block_mask(q, k, block_size=64, top_k=3)
    assert mask.shape == (1, 2, 300, 400)
    assert mask.kv_indices.device.type == "meta"


@pytest.mark.parametrize("name", ["plain", "dense", "softcap", "functions"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_under_a_dispatch_mode(name: str, value: float) -> None:
    """Within an op that a mode dispatched, vmap raises.

    PyTorch sets such a mode for the first call of a compiled function, too.
    """
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, 100, 16))
    with torch.no_grad():
        v[0, 0, 40] = v[1, 1, 3] = value
    options: dict[str, Any] = {"block_size": 16, "top_k": 3, **REQUESTS[name]}

    def attend() -> tuple[Tensor, ...]:
        out = moba_attention(q, k, v, **options)
        return out, *torch.autograd.grad(out[:, :, :3].sum(), (q, k, v))

    expected = attend()
    assert not expected[0].isfinite().all()
    with FlopCounterMode(display=False):
        found = attend()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
    if name != "functions":  # as part of a graph those are compiled with it
        compiled = torch.compile(lambda: moba_attention(q, k, v, **options), backend="aot_eager")
        torch.testing.assert_close(compiled(), expected[0], equal_nan=True)
