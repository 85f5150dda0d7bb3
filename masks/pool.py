"""Block keys: the mean keys by which the gate compares blocks."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks._torch.exporting import is_exporting
from moba_flex.masks.layout import Layout

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.pool_kernel import pool_triton

# Keys are held in float32 for so many values at a time.
_POOL_CHUNK = 1 << 26


def pool(k: Tensor, layout: Layout) -> Tensor:
    """Average the keys of each block: the block keys of the gate (arXiv 2502.13189, equation 6).

    The keys of a block are added in float32, one after another in their order, and the sum is
    divided as IEEE 754 has it. The result therefore has the same bits on every device, and does
    not depend on where in a tensor a block lies.

    Args:
        k: Keys, `[B, Hkv, KV, D]`.
        layout: Where the blocks lie.

    Returns:
        `[B, Hkv, N, D]` in the dtype of `k`. A short block is averaged over the keys that it has;
        numbers that no block has get zeros. No gradient flows through them.
    """
    place = layout.block_size, layout.num_blocks, layout.extents
    with torch.no_grad():
        if k.is_cuda:
            return pool_triton(k, *place)
        return (_pool if is_exporting() else pool_cpu)(k, *place)


@torch.library.custom_op("moba_flex::pool_cpu", mutates_args=(), device_types="cpu")
def pool_cpu(k: Tensor, block_size: int, num_blocks: int, extents: Tensor | None) -> Tensor:
    """Average the keys of each block, out of a compiler's sight.

    Compiled, the rounding to 16 bits would get lost: Inductor drops a narrowing cast that a
    widening one follows, and the gate widens block keys.
    """
    if k.numel() == 0:
        return k.new_zeros((*k.shape[:2], num_blocks, k.shape[3]))
    return _pool(k, block_size, num_blocks, extents)


@pool_cpu.register_fake
def _shape_of_block_keys(
    k: Tensor, block_size: int, num_blocks: int, extents: Tensor | None
) -> Tensor:
    return k.new_empty((*k.shape[:2], num_blocks, k.shape[3]))


def _pool(k: Tensor, block_size: int, num_blocks: int, extents: Tensor | None) -> Tensor:
    batch, num_heads, kv_len, head_dim = k.shape
    if extents is None:
        edges = torch.arange(num_blocks + 1, device=k.device) * block_size
        edges = edges.where(edges < kv_len, kv_len).expand(batch, -1)
    else:
        edges = torch.cat((extents[0], extents[1, :, -1:]), dim=1).long().expand(batch, -1)
    edges = edges.repeat_interleave(num_heads, dim=0)
    lists = k.reshape(-1, kv_len, head_dim)
    at_once = max(1, _POOL_CHUNK // max(1, kv_len * head_dim)) if isinstance(kv_len, int) else None
    if at_once is None or at_once >= lists.shape[0]:
        total = sum_blocks(lists, edges)
    else:
        parts = zip(lists.split(at_once), edges.split(at_once), strict=True)
        total = torch.cat([sum_blocks(*part) for part in parts])
    mean = total / edges.diff(dim=1).clamp(min=1).unsqueeze(2)
    return mean.to(k.dtype).view(batch, num_heads, num_blocks, head_dim)


def sum_blocks(lists: Tensor, edges: Tensor) -> Tensor:
    """Add up the keys of each block.

    Args:
        lists: Keys, `[L, KV, D]`.
        edges: Where the blocks of each list start, and the last one ends, int64 `[L, N + 1]`.

    Returns:
        float32 `[L, N, D]`.
    """
    num_lists, kv_len, head_dim = lists.shape
    # A bag for each block, and two for the padding before and after the blocks of a list.
    # `embedding_bag` adds the rows of a bag one after another.
    first = torch.arange(num_lists, device=edges.device).unsqueeze(1) * kv_len
    starts = (F.pad(edges, (1, 0)) + first).flatten()
    rows = lists.float().reshape(-1, head_dim)
    row = torch.arange(num_lists * kv_len, device=lists.device)
    total = F.embedding_bag(row, rows, starts, mode="sum")
    return total.view(num_lists, -1, head_dim)[:, 1:-1]
