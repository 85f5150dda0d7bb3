"""What callers pass, made ready."""

from torch import Tensor


def dense_vectors(*tensors: Tensor) -> list[Tensor]:
    """Return tensors `[B, H, length, D]` whose vectors lie in one piece, as kernels take them."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]
