"""What callers pass, made ready."""

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moba_flex.masks.exporting import is_traced


def numbers_beside(x: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Return numbers as an int64 tensor `[n]` on the device of `x`, copied there once."""
    if is_traced():
        return torch.tensor(numbers, device=x.device)
    if type(x) is Tensor and torch._C._len_torch_dispatch_stack() == 0:
        return _kept_numbers(numbers, x.device)
    if isinstance(x, FakeTensor):  # `new_tensor` would return one that is not
        return x.new_empty(len(numbers), dtype=torch.int64)
    return x.new_tensor(numbers, dtype=torch.int64)


@lru_cache(maxsize=1024)
def _kept_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def dense_vectors(*tensors: Tensor) -> list[Tensor]:
    """Return tensors `[B, H, length, D]` whose vectors lie in one piece, as kernels take them.

    And each behind the one before: matrix products of 16 bits refuse vectors that overlap.
    """
    return [
        x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous() for x in tensors
    ]


def contiguous(x: Tensor) -> Tensor:
    """Return `x` as FlexAttention takes it: contiguous, in compiled graphs too.

    There `x.contiguous()` is no more than a wish: the compiler lays out the copy in the order of
    `x`, and kernels that ask for no order get that one. Strides that are asked for are kept. On
    CPU they are not enough: FlexAttention's template forgets where in its memory a view begins.
    """
    if not is_traced():
        return x.contiguous()
    if x.device.type == "cpu":
        return copy_cpu(x)
    made: Tensor = _Contiguous.apply(x)  # type: ignore[no-untyped-call]
    return made


@torch.library.custom_op("moba_flex::copy_cpu", mutates_args=(), device_types="cpu")
def copy_cpu(x: Tensor) -> Tensor:
    """Copy `x` to memory of its own, which no compiler lays out."""
    return x.clone(memory_format=torch.contiguous_format)


@copy_cpu.register_fake
def _shape_of_copy(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


copy_cpu.register_autograd(lambda ctx, grad: grad)


class _Contiguous(torch.autograd.Function):
    """Asks for strides without the gradient of `as_strided`, which copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        strides = [prod(x.shape[i + 1 :]) for i in range(x.ndim)]
        return x.contiguous().as_strided(x.shape, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def all_finite(*tensors: Tensor) -> bool:
    """Say whether tensors hold nothing but finite numbers, by their sums if those are finite."""
    return all(
        bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())
        or bool(x.isfinite().all())
        for x in tensors
    )


def finite(x: Tensor) -> Tensor:
    """Return `x` with 0 for what is not finite."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def cast_by_autocast(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in the dtype that autocast gives to `scaled_dot_product_attention`."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    # What is no tensor of floating-point numbers is for the checks to refuse.
    return [
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    ]
