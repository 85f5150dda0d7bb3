"""The routed plan on CPU in PyTorch's own ops, for programs that run without Python.

What `moba_flex.compile.cpu` does part by part, in Python, is here two calls of PyTorch's flash
attention: one of all own blocks, one of tiles of regrouped queries, each with the keys of its
block beside it. Copies are as large as `q` for each block that a query chooses; scores are never
held.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.merge import gather_rows, merge_parts
from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.regroup import Regrouping, regroup
from moba_flex.masks.router import Routing

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Tiles of a block's queries have as many rows as it has keys, so that keys are copied no more than
# queries; fewer rows than this would starve the matrix products.
_LEAST_TILE = 64


def attend_portable(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the own block and to the chosen ones; forward alone.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, D]`.
        routing: The chosen blocks.
        scale: Factor on the scores.

    Returns:
        Output `[B, Hq, Q, D]` and log-sum-exp `[B, Hq, Q]` in float32.
    """
    q_len, size = routing.q_len, routing.block_size
    # Whole blocks of queries are many more than a few.
    few = isinstance(q_len, int) and isinstance(size, int) and 2 * q_len <= size
    own_out, own_lse = (_own_few if few else _own)(q, k, v, routing, scale)
    if routing.blocks.shape[3] == 0:
        return own_out, own_lse

    batch, num_kv_heads, _, head_dim = k.shape
    groups = regroup(routing, num_kv_heads, max(size, _LEAST_TILE))
    rows = q.reshape(batch, num_kv_heads, -1, head_dim)
    routed = _chosen(gather_rows(rows, groups), k, v, routing, groups, scale)
    own = own_out.reshape(rows.shape), own_lse.reshape(rows.shape[:3])
    out, lse = merge_parts(*own, *routed, groups)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _own(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with blocks of queries to their own keys, all blocks at once."""
    batch, _, q_len, head_dim = q.shape
    size, kv_len = routing.block_size, routing.kv_len
    start = routing.q_offset // size * size  # of the first query's block
    front = routing.q_offset - start
    blocks = ceil_div(kv_len - start, size)

    def by_block(x: Tensor, before: int) -> Tensor:
        x = F.pad(x, (0, 0, before, blocks * size - before - x.shape[2]))
        return x.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)

    def by_head(x: Tensor) -> Tensor:
        x = x.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
        # Not a slice, whose bounds would have to be proved in range of every length.
        return x.index_select(2, front + torch.arange(q_len, device=x.device))

    keys = (by_block(x[:, :, start:], 0) for x in (k, v))
    bias = None
    if not routing.causal:  # else no query sees what lies behind the last key
        block = torch.arange(blocks, device=q.device)[:, None] * size + start
        bias = _bias(block + torch.arange(size, device=q.device) < kv_len, q.dtype)
        bias = bias.repeat(batch, 1)[:, None, None]
    out, lse = _flash(
        by_block(q, front), *keys, 0.0, routing.causal, attn_mask=bias, scale=scale
    )
    return by_head(out), by_head(lse)


def _own_few(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with fewer queries than a block has keys to the one or two blocks they lie in."""
    size, kv_len, offset = routing.block_size, routing.kv_len, routing.q_offset
    start = offset // size * size
    key = start + torch.arange(kv_len - start, device=q.device)
    position = (offset + torch.arange(routing.q_len, device=q.device))[:, None]
    seen = key // size == position // size
    if routing.causal:
        seen = seen & (key <= position)
    keys = (x[:, :, start:] for x in (k, v))
    out, lse = _flash(q, *keys, 0.0, False, attn_mask=_bias(seen, q.dtype), scale=scale)
    return out, lse


def _chosen(
    slots: Tensor, k: Tensor, v: Tensor, routing: Routing, groups: Regrouping, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with the queries in each tile of slots `[B, Hkv, S, D]` to the block they chose."""
    batch, num_kv_heads, kv_len, head_dim = k.shape
    size, num_blocks = routing.block_size, routing.num_blocks
    tiles = groups.tile_block.shape[2]
    lists = torch.arange(batch * num_kv_heads, device=k.device)
    block = groups.tile_block.flatten(0, 1).long()
    place = (block + lists[:, None] * num_blocks).flatten()

    def beside(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, num_blocks * size - kv_len))
        return x.reshape(-1, size, head_dim)[place].unsqueeze(1)

    bias = None
    if not routing.causal:  # else a block that is chosen is whole
        key = block.flatten()[:, None] * size + torch.arange(size, device=k.device)
        bias = _bias(key < kv_len, k.dtype)[:, None, None]
    queries = slots.reshape(batch * num_kv_heads * tiles, 1, -1, head_dim)
    out, lse = _flash(queries, beside(k), beside(v), 0.0, False, attn_mask=bias, scale=scale)
    return out.reshape(slots.shape), lse.reshape(slots.shape[:3])


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what flash attention adds to the scores of keys that are seen, and of others."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, -torch.inf)
