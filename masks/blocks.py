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


def pool_extents(k: Tensor, extents: Tensor) -> Tensor:
    """Average the keys of each block, as `pool_keys` does, on CPU and wherever blocks lie.

    Args:
        k: Keys, `[B, Hkv, KV, D]`.
        extents: First key of each block and the key after its last, int `[2, R, N]`: blocks
            follow each other without gaps, and what is no block is empty.

    Returns:
        `[B, Hkv, N, D]`; zeros for what is no block.
    """
    batch, num_heads, _, head_dim = k.shape
    rows = extents.shape[1]
    pooled = []
    for row, (start, stop) in enumerate(extents.unbind(1)):
        keys = k if rows == 1 else k[row : row + 1]
        bags = keys.permute(2, 0, 1, 3).flatten(1).float()
        place = torch.arange(int(start[0]), int(stop[-1]))
        total = F.embedding_bag(place, bags, start - start[:1], mode="sum")
        mean = total / (stop - start).clamp(min=1).unsqueeze(1)
        pooled.append(mean.to(k.dtype).view(-1, batch // rows, num_heads, head_dim))
    return torch.cat(pooled, dim=1).permute(1, 2, 0, 3)
