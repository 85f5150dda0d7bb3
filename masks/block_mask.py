"""MoBA as a BlockMask in natural order, for any FlexAttention call."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import BlockMask

from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.checks import check_gate, check_qk
from moba_flex.masks.router import Routing, route
from moba_flex.masks.tiles import TILE, settled


def create_moba_block_mask(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
) -> BlockMask:
    """Route `q` over the blocks of `k` and return the choice as a BlockMask.

    The mask is for `flex_attention(q, k, v, block_mask=mask, score_mod=..., enable_gqa=...)` with
    the same `q` and `k`, compiled: uncompiled FlexAttention computes every score. Its `mask_mod`
    holds the per-token choice, so the result is Mixture of Block Attention exactly; a `score_mod`
    sees natural positions and does not change the gate. Works inside and outside of
    `torch.compile`. For fewer than 128 queries on CUDA, `flex_attention` also needs
    `kernel_options={"BACKEND": "TRITON"}`: its decoding kernel may have no tile for such a mask.

    A mask block of 128 queries is computed if any of its queries chose it: with unstructured
    routing that is nearly all of them, see `moba_flex.moba_attention` for plans that are fast
    whatever is chosen.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        block_size: Keys per routed block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one that are always chosen; they count in
            `top_k`.
        causal: Whether a query sees only keys at its position and before.

    Returns:
        A BlockMask of shape `[B, Hq, Q, KV]`, forward and transposed lists filled.

    Raises:
        ValueError: A size or an option is out of range.
        TypeError: An argument has the wrong type.
    """
    if not torch.compiler.is_compiling():
        check_qk(q, k)
        check_gate(block_size, top_k, sink_blocks, local_blocks)
    routing = route(
        q,
        k,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=causal,
    )
    return routing_to_block_mask(routing)


def routing_to_block_mask(routing: Routing) -> BlockMask:
    """Return the BlockMask `[B, Hq, Q, KV]` of the chosen and the own blocks."""
    block_size, causal, picks = routing.block_size, routing.causal, routing.blocks.shape[3]
    # The blocks are ascending, so this changes nothing, but the result of `topk` is a buffer in
    # memory. In its place the compiled mask_mod would read an empty buffer, as it was before the
    # routing kernel filled it, and on CPU it would not compile.
    blocks = routing.blocks.topk(picks, largest=False).values if picks else routing.blocks
    q_len, kv_len = settled(routing.q_len), settled(routing.kv_len)
    # One routed block a mask block is the smallest table. FlexAttention reads whole mask blocks of
    # more than 128 keys, past the end of the keys if the last is short: then mask blocks are
    # tiles.
    whole = statically_known_true(block_size % TILE == 0) and statically_known_true(
        kv_len % block_size == 0
    )
    kv_tile = block_size if whole else TILE
    partial, full = _tile_table(routing, kv_tile)

    def attends(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # Lengths one by one: FlexAttention on CPU takes symbols under dynamic shapes, but no
        # expressions of them.
        position = q_idx + kv_len - q_len
        block = kv_idx // block_size
        chosen = position // block_size == block
        for pick in range(picks):
            # A plain integer index would become a tensor constant, which export cannot lift.
            chosen = chosen | (blocks[b, h, q_idx, q_idx * 0 + pick] == block)
        return chosen & (kv_idx <= position) if causal else chosen

    kv_partial, kv_full = _compress(partial), _compress(full)
    q_partial, q_full = _compress(partial.mT), _compress(full.mT)
    return BlockMask(
        (q_len, kv_len),
        *kv_partial,
        *kv_full,
        *q_partial,
        *q_full,
        BLOCK_SIZE=(TILE, kv_tile),
        mask_mod=attends,
    )


def _tile_table(routing: Routing, kv_tile: int) -> tuple[Tensor, Tensor]:
    """Return the tiles to mask and the full ones, bool `[B, Hq, Q tiles, KV tiles]` each."""
    batch, num_heads, q_len, picks = routing.blocks.shape
    device, block_size, num_blocks = routing.blocks.device, routing.block_size, routing.num_blocks
    kv_len, causal = routing.kv_len, routing.causal
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, kv_tile)

    first = routing.q_offset + torch.arange(q_tiles, device=device)[:, None] * TILE
    last = (first + TILE - 1).clamp(max=kv_len - 1)
    start = torch.arange(num_blocks, device=device) * block_size
    # How many queries of each tile attend to each block: to their own one, and to those that they
    # chose.
    own = (torch.minimum(last + 1, start + block_size) - torch.maximum(first, start)).clamp(min=0)
    # Padded with "none"; as a pad value, the number of blocks would become part of the graph.
    tiled = F.pad(routing.blocks - num_blocks, (0, 0, 0, q_tiles * TILE - q_len)) + num_blocks
    tiled = tiled.view(batch, num_heads, q_tiles, TILE * picks).long()
    count = torch.zeros(
        batch, num_heads, q_tiles, num_blocks + 1, dtype=torch.int32, device=device
    )
    count = count.scatter_add(3, tiled, torch.ones_like(tiled, dtype=torch.int32))[..., :-1] + own

    any_query, every_query = count > 0, count == last - first + 1
    if kv_tile == block_size:
        begin = start
    else:
        # A tile meets blocks low..high: any of them chosen, or all of them by all queries.
        begin = torch.arange(kv_tiles, device=device) * kv_tile
        low, high = begin // block_size, (begin + kv_tile - 1).clamp(max=kv_len - 1) // block_size
        spanned = torch.arange((kv_tile + block_size - 2) // block_size + 1, device=device)
        met = torch.minimum(low[:, None] + spanned, high[:, None])
        any_query, every_query = any_query[..., met].any(-1), every_query[..., met].all(-1)
    present = any_query & (begin <= last) if causal else any_query
    full = every_query & (begin + kv_tile <= (first + 1 if causal else kv_len))
    return present & ~full, full


def _compress(table: Tensor) -> tuple[Tensor, Tensor]:
    """List the set columns of each row: counts `[..., rows]`, indices `[..., rows, columns]`."""
    columns = table.shape[-1]
    number = torch.arange(columns, device=table.device, dtype=torch.int32)
    # Sorted, and not placed by a running count: PyTorch 2.11 fails to compile some scans for CUDA.
    index = torch.where(table, number, columns).sort(dim=-1).values.clamp(max=columns - 1)
    return table.sum(-1, dtype=torch.int32), index.contiguous()
