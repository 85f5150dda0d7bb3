"""The routed plan on CPU in PyTorch's own ops, for programs that run without Python.

What `moba_flex.compile.cpu` does part by part, in Python, is here two calls of PyTorch's flash
attention: one of all own blocks, one of tiles of regrouped queries, each with the keys of its
block beside it. Copies are as large as `q` for each block that a query chooses; scores are never
held.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.parts import spoilt_by
from moba_flex.masks.inputs import finite
from moba_flex.masks.layout import ceil_div
from moba_flex.masks.regroup import sort_pairs
from moba_flex.masks.routing import Routing

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
    # Flash attention here spoils rows and hides NaN (`compile/cpu.py`): rows that see what is not
    # finite are NaN.
    out, lse = _attend(finite(q), finite(k), finite(v), routing, scale)
    spoilt = spoilt_by(q, k, v, routing)
    return out.masked_fill(spoilt.unsqueeze(3), torch.nan), lse.masked_fill(spoilt, torch.nan)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    q_len, size = routing.q_len, routing.block_size
    # Whole blocks of queries are many more than a few.
    few = isinstance(q_len, int) and isinstance(size, int) and 2 * q_len <= size
    own_out, own_lse = (_own_few if few else _own)(q, k, v, routing, scale)
    if routing.blocks.shape[3] == 0:
        return own_out, own_lse

    pair_out, pair_lse = _chosen(q, k, v, routing, scale)
    largest = torch.maximum(own_lse, pair_lse.amax(-1))
    own_weight = torch.exp(own_lse - largest).unsqueeze(-1)
    pair_weight = torch.exp(pair_lse - largest.unsqueeze(-1)).unsqueeze(-1)
    total = own_weight + pair_weight.sum(-2)
    mixed = own_out * own_weight + (pair_out * pair_weight).sum(-2)
    return (mixed / total).to(q.dtype), largest + total.squeeze(-1).log()


def _own(q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with blocks of queries to their own keys, all blocks at once."""
    batch, _, q_len, _ = q.shape
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
    out, lse = _flash(by_block(q, front), *keys, 0.0, routing.causal, attn_mask=bias, scale=scale)
    return by_head(out), by_head(lse)


def _own_few(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with fewer queries than a block has keys to the one or two blocks they lie in."""
    size, kv_len, offset = routing.block_size, routing.kv_len, routing.q_offset
    start = offset // size * size
    key = start + torch.arange(kv_len - start, device=q.device)
    position = (offset + torch.arange(routing.q_len, device=q.device))[:, None]
    middle = start + size
    seen = (key < middle) == (position < middle)
    if routing.causal:
        seen = seen & (key <= position)
    keys = (x[:, :, start:] for x in (k, v))
    out, lse = _flash(q, *keys, 0.0, False, attn_mask=_bias(seen, q.dtype), scale=scale)
    return out, lse


def _chosen(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with each query to each of its blocks: `[B, Hq, Q, K - 1, D]`, `[B, Hq, Q, K - 1]`.

    Tiles hold queries that chose the same block of the same key/value head. The lists of all heads
    are one list, so that there are just as many tiles as are filled.
    """
    batch, num_kv_heads, kv_len, head_dim = k.shape
    size, num_blocks = routing.block_size, routing.num_blocks
    lists, tile = batch * num_kv_heads, max(size, _LEAST_TILE)
    pairs = sort_pairs(routing, num_kv_heads)
    count = pairs.first.diff(dim=2).flatten().long()  # by list and block, as all below
    first_pair = pairs.first[..., :-1].flatten() + _per_list(lists, pairs.row.shape[2], num_blocks)
    stop = ceil_div(count, tile).cumsum(0)
    first_tile = stop - ceil_div(count, tile)
    # One number that the device finds, not an expression of the length that it would be at worst;
    # a last tile that is empty, for there may be none but that.
    tiles = cast(int, (stop[-1] + 1).item())
    torch._check(tiles >= 1)

    number = torch.arange(tiles, device=k.device)
    place = torch.searchsorted(stop, number, right=True).clamp(max=lists * num_blocks - 1)
    lane = torch.arange(tile, device=k.device)
    within = ((number - first_tile[place]) * tile).unsqueeze(1) + lane
    filled = within < count[place].unsqueeze(1)
    rank = torch.where(filled, within + first_pair[place].unsqueeze(1), 0)
    per_list = q.shape[1] // num_kv_heads * routing.q_len
    row = pairs.row.flatten()[rank] + (place // num_blocks * per_list).unsqueeze(1)
    slots = q.reshape(-1, head_dim)[row.flatten()].view(tiles, 1, tile, head_dim)

    def beside(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, num_blocks * size - kv_len))
        return x.reshape(-1, size, head_dim)[place].unsqueeze(1)

    bias = None
    if not routing.causal:  # else a block that is chosen is whole
        key = (place % num_blocks * size).unsqueeze(1) + torch.arange(size, device=k.device)
        bias = _bias(key < kv_len, k.dtype)[:, None, None]
    out, lse = _flash(slots, beside(k), beside(v), 0.0, False, attn_mask=bias, scale=scale)

    chosen = routing.blocks.reshape(lists, -1).clamp(max=num_blocks - 1).long()
    chosen = (chosen + torch.arange(lists, device=k.device)[:, None] * num_blocks).flatten()
    rank = pairs.rank.flatten()
    slot = rank - pairs.first[..., :-1].flatten()[chosen] + first_tile[chosen] * tile
    slot = torch.where(rank >= 0, slot, 0)
    pair_lse = torch.where(rank >= 0, lse.flatten()[slot], -torch.inf)
    # Chosen, and not weighted by zero: where there is no pair there may be NaN.
    pair_out = torch.where((rank >= 0).unsqueeze(1), out.view(-1, head_dim)[slot].float(), 0.0)
    shape = routing.blocks.shape
    return pair_out.view(*shape, head_dim), pair_lse.view(shape)


def _per_list(lists: int, step: int, repeats: int) -> Tensor:
    """Return multiples of `step`, one for each list, each `repeats` times."""
    start = torch.arange(lists, device="cpu") * step
    return start.unsqueeze(1).expand(lists, repeats).flatten()


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what flash attention adds to the scores of keys that are seen, and of others."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, -torch.inf)
