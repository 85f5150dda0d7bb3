"""What callers pass, made ready."""

import torch
from torch import Tensor


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
