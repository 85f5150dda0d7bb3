"""What callers pass, made ready."""

from functools import lru_cache

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
    """Return tensors `[B, H, length, D]` whose vectors lie in one piece, as kernels take them."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


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
