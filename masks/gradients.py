"""Gradients of ops and of functions, under autograd and under `torch.func`.

PyTorch's own way to give an op a gradient serves autograd and graphs; transforms of `torch.func`
do not know it. And `once_differentiable` takes a second derivative for zero where the first one's
weights are constants: here it is refused in every case.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from moba_flex.masks.exporting import is_traced

Save = Callable[..., None]
Formula = Callable[..., Any]


def with_gradient(
    op: CustomOpDef, *, setup_context: Save, backward: Formula
) -> Callable[..., Any]:
    """Give an op a gradient, and return what calls it.

    Args:
        op: The op.
        setup_context: Saves for backward, as of `CustomOpDef.register_autograd`.
        backward: The gradient's formula, likewise.
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
    """Return the gradient by a formula, for `backward` of an autograd.Function.

    Args:
        formula: Takes `ctx` and `grads`.
        ctx: What was saved.
        grads: The gradients of the outputs.
    """
    if not torch.is_grad_enabled():  # nobody asks for a second derivative
        return formula(ctx, *grads)
    once: Formula = _Once.apply
    return once(formula, ctx, len(grads), *grads, *ctx.saved_tensors)


class _Once(torch.autograd.Function):
    """A gradient that has none."""

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
    """What was saved, with the tensors of the level of `torch.func` at which a formula runs."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Any, ...]) -> None:
        self._ctx = ctx
        self.saved_tensors = saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
