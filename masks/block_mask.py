"""MoBA as a BlockMask in natural order, for any FlexAttention call."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import BlockMask

from moba_flex.masks.layout import Coordinates, RowOptions, ceil_div
from moba_flex.masks.mods import MaskMod
from moba_flex.masks.request import GateOptions, gated_request
from moba_flex.masks.router import route_request
from moba_flex.masks.routing import Routing
from moba_flex.masks.tiles import TILE, capturable, list_tiles, row_of, settled


class MaskOptions(GateOptions, RowOptions, total=False):
    """The options of `moba_flex.moba_attention` that say which keys a query sees."""


def create_moba_block_mask(q: Tensor, k: Tensor, **options: Unpack[MaskOptions]) -> BlockMask:
    """Route `q` over the blocks of `k` and return the choice as a BlockMask.

    The mask is for `flex_attention(q, k, v, block_mask=mask, score_mod=..., enable_gqa=...)` with
    the same `q` and `k`, compiled: uncompiled FlexAttention computes every score. The mask's
    `mask_mod` holds the choice of each query, so the result is Mixture of Block Attention exactly.
    A `score_mod` gets natural positions and does not change the gate. This function works inside
    and outside of `torch.compile`. For fewer than 128 queries on CUDA, `flex_attention` also needs
    `kernel_options={"BACKEND": "TRITON"}`: its decoding kernel may have no tile for such a mask.

    FlexAttention computes a tile of 128 queries by some keys if any of these queries chose any of
    these keys. If neighbouring queries choose differently, that is nearly every tile:
    `moba_flex.moba_attention` has plans that are fast for any choice.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        options: `block_size`, `top_k`, `sink_blocks`, `local_blocks`, `causal`, `head_top_k`,
            `cu_seqlens`, `cu_seqlens_q` and `key_mask`, as in `moba_flex.moba_attention`.

    Returns:
        A BlockMask of shape `[B, Hq, Q, KV]`, with forward and transposed lists.

    Raises:
        ValueError: A size or an option is out of range.
        TypeError: An argument has the wrong type.

    Example:
        >>> q, k = torch.randn(1, 4, 1024, 64), torch.randn(1, 2, 1024, 64)
        >>> mask = create_moba_block_mask(q, k, block_size=128, top_k=3)
        >>> mask.shape, mask.BLOCK_SIZE
        ((1, 4, 1024, 1024), (128, 128))
    """
    request = gated_request(q, k, k, **options)
    return routing_to_block_mask(route_request(request))


def routing_to_block_mask(routing: Routing, mask_mod: MaskMod | None = None) -> BlockMask:
    """Return the BlockMask `[B, Hq, Q, KV]` of the chosen and the own blocks.

    Args:
        routing: The choice of blocks.
        mask_mod: Hides further keys.
    """
    block_size = routing.block_size
    q_len, kv_len = settled(routing.q_len), settled(routing.kv_len)
    # The lists are shortest with one block per mask block. But FlexAttention reads a short last
    # mask block of more than 128 keys past the end of the keys: then mask blocks have 128 keys.
    whole = (
        routing.tables is None
        and statically_known_true(block_size % TILE == 0)
        and statically_known_true(kv_len % block_size == 0)
    )
    kv_tile = block_size if whole else TILE
    partial, full = _tile_table(routing, kv_tile)
    if mask_mod is not None:
        partial, full = partial | full, torch.zeros_like(full)
    attends = (_attends if routing.tables is None else _attends_by_table)(routing)

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = attends(b, h, q_idx, kv_idx)
        return allowed if mask_mod is None else allowed & mask_mod(b, h, q_idx, kv_idx)

    partial_lists, full_lists = (_compress(x) + _compress(x.mT) for x in (partial, full))
    return list_tiles((q_len, kv_len), partial_lists, full_lists, (TILE, kv_tile), sees)


def _attends(routing: Routing) -> MaskMod:
    """Return a mask_mod for own and chosen blocks, if each row is one sequence."""
    block_size, causal, picks = routing.block_size, routing.causal, routing.blocks.shape[3]
    # The blocks ascend already: `topk` only makes them capturable, see `capturable`.
    blocks = routing.blocks.topk(picks, largest=False).values if picks else routing.blocks
    q_len, kv_len = settled(routing.q_len), settled(routing.kv_len)

    def attends(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # q_len and kv_len stay apart: under dynamic shapes a mask_mod on CPU can capture symbols,
        # but no expressions of them.
        position = q_idx + kv_len - q_len
        block = kv_idx // block_size
        chosen = position // block_size == block
        for pick in range(picks):
            # Not `pick` alone: it would become a constant tensor, which torch.export cannot lift.
            chosen = chosen | (blocks[b, h, q_idx, q_idx * 0 + pick] == block)
        return chosen & (kv_idx <= position) if causal else chosen

    return attends


def _attends_by_table(routing: Routing) -> MaskMod:
    """Return a mask_mod for own and chosen blocks, for packed documents or padded rows."""
    causal, at = routing.causal, routing.layout.coordinates(routing.blocks.device)
    # PyTorch 2.11 does not compile a `searchsorted` in a view: `long` makes a copy.
    start, stop = at.start.long(), at.stop.long()
    blocks = _with_own(routing, at)
    picks = blocks.shape[3]
    blocks = blocks.topk(picks, largest=False).values
    position = capturable(at.position)
    # The last block that starts at a key or before it; below, -1 where it ends before. PyTorch
    # 2.11 does not compile a `searchsorted` for values that all rows share: the minimum, which
    # changes nothing, gives each row values of its own.
    key = torch.arange(routing.kv_len, device=start.device)
    block = torch.searchsorted(start, torch.minimum(key, start[:, -1:]), right=True) - 1
    inside = (block >= 0) & (key < stop.gather(1, block.clamp(min=0)))
    block_of_key = capturable(torch.where(inside, block, -1))

    def attends(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, none = row_of(b, block_of_key), q_idx * 0
        block = block_of_key[row, kv_idx, kv_idx * 0]
        chosen = blocks[b, h, q_idx, none] == block
        for pick in range(1, picks):
            chosen = chosen | (blocks[b, h, q_idx, none + pick] == block)
        return chosen & (kv_idx <= position[row, q_idx, none]) if causal else chosen

    return attends


def _with_own(routing: Routing, at: Coordinates) -> Tensor:
    """Return all blocks that each query attends to, the own one last, int32 `[B, Hq, Q, K]`."""
    own = at.own[:, None, :, None].expand(*routing.blocks.shape[:3], 1)
    return torch.cat((routing.blocks, own), dim=3)


def _tile_table(routing: Routing, kv_tile: int) -> tuple[Tensor, Tensor]:
    """Return which tiles are seen partly and which fully, bool `[B, Hq, Q tiles, KV tiles]`."""
    q_len, kv_len, device = routing.q_len, routing.kv_len, routing.blocks.device
    at = routing.layout.coordinates(device)
    batch, num_heads = routing.blocks.shape[:2]
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, kv_tile)
    blocks = _with_own(routing, at)
    index = blocks.long().flatten(1)
    start, stop = (
        F.pad(x, (0, 1)).expand(batch, -1).gather(1, index).view(blocks.shape)
        for x in (at.start, at.stop)
    )
    if routing.causal:  # makes a difference in the own block alone
        stop = torch.minimum(stop, at.position[:, None, :, None] + 1)

    # Count the pairs of a query and a key that see each other, per tile. The keys of a block are
    # the keys before its stop without those before its start. The keys before an end are `kv_tile`
    # in each earlier tile and the rest in its own; `change` holds the differences between
    # successive tiles, and its running sum the counts.
    def per_tile(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, q_tiles * TILE - q_len))
        return x.unflatten(2, (q_tiles, TILE)).flatten(3)

    start, stop = per_tile(start), per_tile(stop)
    change = torch.zeros(batch, num_heads, q_tiles, kv_tiles + 2, dtype=torch.int32, device=device)
    for end, sign in ((stop, 1), (start, -1)):
        tile, rest = end.long() // kv_tile, (end % kv_tile).int()
        change = change.scatter_add(3, tile, sign * (rest - kv_tile))
        change = change.scatter_add(3, tile + 1, -sign * rest)
    pairs = change.cumsum(3, dtype=torch.int32)[..., :kv_tiles]
    queries = (q_len - torch.arange(q_tiles, device=device) * TILE).clamp(max=TILE)
    full = pairs == queries[:, None] * kv_tile
    return (pairs > 0) & ~full, full


def _compress(table: Tensor) -> tuple[Tensor, Tensor]:
    """List the set columns of each row: counts `[..., rows]`, indices `[..., rows, columns]`."""
    columns = table.shape[-1]
    number = torch.arange(columns, device=table.device, dtype=torch.int32)
    # A sort instead of a running count: PyTorch 2.11 fails to compile some scans for CUDA.
    index = torch.where(table, number, columns).sort(dim=-1).values.clamp(max=columns - 1)
    return table.sum(-1), index
