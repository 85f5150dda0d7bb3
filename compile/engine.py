"""Ops that attend to chosen blocks. An engine is two functions; its ops are made of them here.

PyTorch's ops take tensors and numbers alone, so that a `Routing` travels as `blocks`, the tensors
of its layout, `block_size` and `causal`.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, cast

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from moba_flex.masks._torch.gradients import with_gradient
from moba_flex.masks.layout import Layout
from moba_flex.masks.routing import Routing

Forward = Callable[[Tensor, Tensor, Tensor, Routing, float, float], tuple[Tensor, ...]]
"""Takes q, k, v, routing, scale and softcap (0 for none). Returns the output `[B, Hq, Q, Dv]`, the
log-sum-exp `[B, Hq, Q]`, and tensors to keep for backward."""

Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""Takes grad, grad_lse (None if there is none), q, k, v, layout, out, lse, the tensors that
forward keeps (`blocks` if it keeps none), scale and softcap. Returns the gradients of q, k, v."""

_PLACE = {"queries": Tensor | None, "extents": Tensor | None}
_NUMBERS = {"block_size": int, "causal": bool, "scale": float, "softcap": float}


def attention_op(
    name: str, forward: Forward, backward: Backward, *, kept: int = 0, kernels: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """Make an engine's ops, `name` and `name_backward`, and return what calls them.

    Args:
        name: The op's name, without namespace.
        forward: See `Forward`.
        backward: See `Backward`.
        kept: How many tensors forward returns beside output and log-sum-exp.
        kernels: Whether the functions launch Triton kernels; else they run on CPU.

    Returns:
        A differentiable function of q, k, v, the `parts` of a routing, scale and softcap. Its
        attributes `op` and `backward_op` are the ops, `save` and `gradients` those of autograd.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        layout, scale, softcap = _layout_of(q, k, rest)
        return forward(q, k, v, Routing.over(layout, blocks), scale, softcap)

    def attend_backward(
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved, place = rest[:num_saved], rest[num_saved:]
        layout, scale, softcap = _layout_of(q, k, place)
        return backward(grad, grad_lse, q, k, v, layout, out, lse, saved, scale, softcap)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, blocks, queries, extents, *ctx.numbers = inputs
        out, lse, *saved = output
        ctx.save_for_backward(q, k, v, out, lse, *(saved or [blocks]), queries, extents)
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = torch.zeros_like(saved[3]) if grad is None else grad
        grads = call_backward(grad, grad_lse, *saved, *ctx.numbers)
        return *grads, *(None,) * (1 + len(_PLACE) + len(_NUMBERS))

    num_saved = max(1, kept)
    inputs = dict.fromkeys(("q", "k", "v"), Tensor)
    results = dict.fromkeys(("out", "lse"), Tensor)
    saved_names = dict.fromkeys((f"kept_{i}" for i in range(num_saved)), Tensor)
    attend = _with_signature(attend, {**inputs, "blocks": Tensor, **_PLACE, **_NUMBERS}, 2 + kept)
    attend_backward = _with_signature(
        attend_backward,
        {
            "grad": Tensor,
            "grad_lse": Tensor | None,
            **inputs,
            **results,
            **saved_names,
            **_PLACE,
            **_NUMBERS,
        },
        3,
    )
    qualified = f"moba_flex::{name}"
    call_op: Any
    call_backward: Any
    if kernels:
        from moba_flex.masks._torch.kernel_op import kernel_op

        call_backward = kernel_op(f"{qualified}_backward")(attend_backward)
        call_op = kernel_op(qualified, setup_context=save, backward=gradients)(attend)
        op, backward_op = call_op.op, call_backward.op
    else:
        op = _cpu_op(qualified, attend)
        backward_op = _cpu_op(f"{qualified}_backward", attend_backward)
        op.register_fake(shapes_of_attention)
        backward_op.register_fake(_shapes_of_gradients)
        call_backward = backward_op
        call_op = with_gradient(op, setup_context=save, backward=gradients)

    call_op.op, call_op.backward_op = op, backward_op
    call_op.save, call_op.gradients = save, gradients
    return cast(Callable[..., tuple[Tensor, ...]], call_op)


def _layout_of(q: Tensor, k: Tensor, place: tuple[Any, ...]) -> tuple[Layout, float, float]:
    """Read layout, scale and softcap off the last six arguments of an op."""
    queries, extents, block_size, causal, scale, softcap = place
    layout = Layout(q.shape[2], k.shape[2], block_size, causal, queries, extents)
    return layout, scale, softcap


def _with_signature(function: Any, parameters: dict[str, Any], results: int) -> Any:
    """Give a function the signature from which PyTorch reads an op's schema."""
    function.__signature__ = Signature(
        [
            Parameter(x, Parameter.POSITIONAL_OR_KEYWORD, annotation=t)
            for x, t in parameters.items()
        ],
        return_annotation=tuple[(Tensor,) * results],  # type: ignore[misc]
    )
    return function


def _cpu_op(name: str, function: Any) -> CustomOpDef:
    return cast(
        CustomOpDef,
        torch.library.custom_op(name, function, mutates_args=(), device_types="cpu"),
    )


def shapes_of_attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Return an output and a log-sum-exp of the right shapes, as fakes of ops on CPU."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=exact)


def _shapes_of_gradients(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
