"""Where the blocks lie, and what stands for them at the gate."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Number = TypeVar("Number", int, Tensor)


def ceil_div(length: Number, size: int) -> Number:
    """Return how many blocks of `size` cover `length` positions; the last may be short."""
    return (length + size - 1) // size


def pool_keys(k: Tensor, block_size: int) -> Tensor:
    """Average the keys of each block: the block keys of the gate (arXiv 2502.13189, equation 6).

    Args:
        k: Keys, `[B, Hkv, KV, D]`.
        block_size: Keys per block.

    Returns:
        `[B, Hkv, N, D]`, accumulated in float32 and rounded to the dtype of `k`. A short last
        block is averaged over the keys that it has.
    """
    batch, num_heads, kv_len, head_dim = k.shape
    num_blocks = ceil_div(kv_len, block_size)
    blocks = F.pad(k, (0, 0, 0, num_blocks * block_size - kv_len))
    total = blocks.view(batch, num_heads, num_blocks, block_size, head_dim).sum(
        3, dtype=torch.float32
    )
    start = torch.arange(num_blocks, device=k.device) * block_size
    return (total / (kv_len - start).clamp(max=block_size)[:, None]).to(k.dtype)
