"""Preparation of inputs: memory layout, dtype and finiteness."""

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moba_flex.masks._torch.exporting import is_traced


def numbers_beside(x: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Return numbers as an int64 tensor `[n]` on the device of `x`, copied there once."""
    if is_traced():
        return torch.tensor(numbers, device=x.device)
    if type(x) is Tensor and torch._C._len_torch_dispatch_stack() == 0:
        return _kept_numbers(numbers, x.device)
    if isinstance(x, FakeTensor):  # `new_tensor` would return a real tensor
        return x.new_empty(len(numbers), dtype=torch.int64)
    return x.new_tensor(numbers, dtype=torch.int64)


@lru_cache(maxsize=1024)
def _kept_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def dense_vectors(*tensors: Tensor) -> list[Tensor]:
    """Return tensors `[B, H, length, D]` with contiguous vectors that do not overlap.

    Kernels need contiguous vectors, and 16-bit matrix products refuse vectors that overlap.
    """
    return [
        x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous() for x in tensors
    ]


def contiguous(x: Tensor) -> Tensor:
    """Return `x` contiguous, as FlexAttention needs it, in compiled graphs too.

    In a graph `x.contiguous()` is not enough: inductor may give the copy the strides of `x`. It
    keeps the strides of `as_strided`. On CPU these are not enough either, since FlexAttention's
    template ignores the storage offset of a view: there an op copies `x`.
    """
    if not is_traced():
        return x.contiguous()
    if x.device.type == "cpu":
        return copy_cpu(x)
    made: Tensor = _Contiguous.apply(x)  # type: ignore[no-untyped-call]
    return made


@torch.library.custom_op("moba_flex::copy_cpu", mutates_args=(), device_types="cpu")
def copy_cpu(x: Tensor) -> Tensor:
    """Copy `x` to contiguous memory of its own, whose layout inductor does not change."""
    return x.clone(memory_format=torch.contiguous_format)


@copy_cpu.register_fake
def _shape_of_copy(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


copy_cpu.register_autograd(lambda ctx, grad: grad)


class _Contiguous(torch.autograd.Function):
    """Contiguous strides by `as_strided`, but without its gradient, which would copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        strides = [prod(x.shape[i + 1 :]) for i in range(x.ndim)]
        return x.contiguous().as_strided(x.shape, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def all_finite(*tensors: Tensor) -> bool:
    """Say whether all numbers in tensors are finite; a finite sum proves it without a mask."""
    return all(
        bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())
        or bool(x.isfinite().all())
        for x in tensors
    )


def finite(x: Tensor) -> Tensor:
    """Return `x` with 0 for non-finite values."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def cast_by_autocast(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in the dtype that autocast gives to `scaled_dot_product_attention`."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    # The checks refuse anything but tensors of floating-point numbers, later.
    return [
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    ]
