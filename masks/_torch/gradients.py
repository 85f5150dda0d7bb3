"""Gradients of ops and of functions, under autograd and under `torch.func`.

`CustomOpDef.register_autograd` gives an op a gradient under autograd and in graphs, but transforms
of `torch.func` refuse it: there an autograd.Function stands in for the op. A second derivative
must raise an error: `once_differentiable` would return zero instead where the gradients of the
outputs are constants.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from moba_flex.masks._torch.exporting import is_traced

Save = Callable[..., None]
Formula = Callable[..., Any]


def with_gradient(
    op: CustomOpDef, *, setup_context: Save, backward: Formula
) -> Callable[..., Any]:
    """Give an op a gradient, and return a function that calls the op.

    Args:
        op: The op.
        setup_context: Saves tensors for backward, as `CustomOpDef.register_autograd` takes it.
        backward: The formula of the gradient, as `CustomOpDef.register_autograd` takes it.
    """
    op.register_autograd(backward, setup_context=setup_context)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return only_once(backward, ctx, *grads)

    transformed: Callable[..., Any] = Function.apply

    def call(*args: Any) -> Any:
        return transformed(*args) if is_transformed() else op(*args)

    return call


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs, in eager code."""
    if is_traced():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def only_once(formula: Formula, ctx: Any, *grads: Any) -> Any:
    """Return the gradient by a formula; differentiating the result again raises an error.

    Args:
        formula: Takes `ctx` and `grads`.
        ctx: The context of `backward` of an autograd.Function.
        grads: The gradients of the outputs.
    """
    if not torch.is_grad_enabled():  # there can be no second derivative
        return formula(ctx, *grads)
    once: Formula = _Once.apply
    return once(formula, ctx, len(grads), *grads, *ctx.saved_tensors)


class _Once(torch.autograd.Function):
    """A gradient formula that cannot be differentiated itself."""

    @staticmethod
    def forward(formula: Formula, ctx: Any, count: int, *tensors: Any) -> Any:
        return formula(_Saved(ctx, tensors[count:]), *tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "moba_attention must be differentiated once, got a second derivative: it has none"
        )


class _Saved:
    """A context whose saved tensors belong to the `torch.func` level at which the formula runs."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Any, ...]) -> None:
        self._ctx = ctx
        self.saved_tensors = saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
