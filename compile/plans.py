"""The plans: several ways to compute the same function."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.cpu import attend_cpu
from moba_flex.compile.flex import attend
from moba_flex.compile.merge import gather_rows, merge_parts
from moba_flex.compile.portable import attend_portable
from moba_flex.masks.block_mask import routing_to_block_mask
from moba_flex.masks.exporting import record
from moba_flex.masks.regroup import regroup
from moba_flex.masks.router import Routing, route
from moba_flex.masks.tiles import TILE, KeyLayout, own_block_mask, routed_block_mask

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with PyTorch for CUDA
if _HAS_TRITON:
    import triton

    from moba_flex.compile.fused import attend_fused

Result = tuple[Tensor, Tensor | None]


def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, lse: bool) -> Result:
    """Attend to everything: all blocks are chosen."""
    if _is_plain(q, k, causal=causal, lse=lse):
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        return out, None
    # One block holds all keys, so it is the own block of every query, and no other is left to
    # choose.
    q_len, kv_len = q.shape[2], k.shape[2]
    if q.device.type == "cpu":
        none = q.new_empty((*q.shape[:3], 0), dtype=torch.int32)
        return routed(q, k, v, Routing(none, kv_len, q_len, kv_len, causal), scale=scale)
    if not causal:
        return attend(q, k, v, None, scale, lse=True)
    # Longer than any sequence, and a number: a length that varies would be part of the mask_mod.
    layout = KeyLayout.of(2**30, kv_len, causal)
    return attend(q, k, v, own_block_mask(q_len, layout, causal, q.device), scale, lse=True)


def _is_plain(q: Tensor, k: Tensor, *, causal: bool, lse: bool) -> bool:
    """Whether `scaled_dot_product_attention` serves: no lse, causal masks from top left."""
    return not lse and (not causal or q.shape[2] == k.shape[2])


def uses_flex(plan: str, q: Tensor, k: Tensor, *, causal: bool, lse: bool) -> bool:
    """Whether a plan calls FlexAttention, which must be compiled."""
    if plan == "dense" and _is_plain(q, k, causal=causal, lse=lse):
        return False
    return plan == "masked" or (plan != "fused" and q.device.type != "cpu")


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes tensors on CPU."""
    return _HAS_TRITON and bool(triton.knobs.runtime.interpret)


def masked(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, scale: float, lse: bool
) -> Result:
    """Attend in natural order; FlexAttention skips the tiles that no query chose."""
    return attend(q, k, v, routing_to_block_mask(routing), scale, lse=lse)


def routed(q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, scale: float) -> Result:
    """Attend to the own blocks and to the chosen ones, part by part, and merge."""
    if q.device.type == "cpu":
        if torch.compiler.is_exporting():
            return attend_portable(q, k, v, routing, scale=scale)
        blocks, block_size = routing.blocks, routing.block_size
        out, lse = attend_cpu(q, k, v, blocks, block_size, routing.causal, scale)
        return out, lse
    return _routed_flex(q, k, v, routing, scale=scale)


def _routed_flex(q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, scale: float) -> Result:
    """Attend to the own blocks in natural order and to the chosen ones in regrouped order."""
    batch, _, q_len, head_dim = q.shape
    layout = KeyLayout.of(routing.block_size, routing.kv_len, routing.causal)
    k, v = layout.pad(k), layout.pad(v)
    own_mask = own_block_mask(q_len, layout, routing.causal, q.device)
    own_out, own_lse = attend(q, k, v, own_mask, scale, lse=True)
    if routing.blocks.shape[3] == 0:
        return own_out, own_lse

    groups = regroup(routing, k.shape[1], TILE)
    rows = q.reshape(batch, k.shape[1], -1, head_dim)
    slots = gather_rows(rows, groups)
    routed_out, routed_lse = attend(
        slots, k, v, routed_block_mask(groups, layout), scale, lse=True
    )

    own_out, own_lse = own_out.reshape(rows.shape), own_lse.reshape(rows.shape[:3])
    out, lse = merge_parts(own_out, own_lse, routed_out, routed_lse, groups)
    return out.view(q.shape), lse.view(q.shape[:3])


def fused(q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, scale: float) -> Result:
    """Do what `routed` does, with regrouping and merge inside of Triton kernels."""
    blocks, block_size = routing.blocks, routing.block_size
    out, lse, *_ = attend_fused(q, k, v, blocks, block_size, routing.causal, scale)
    return out, lse


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: str,
    block_size: int,
    top_k: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
    scale: float,
    lse: bool,
) -> Result:
    """Route and attend by the plan of this name, with the options of `moba_flex.moba_attention`.

    Returns:
        Output `[B, Hq, Q, D]`, and log-sum-exp `[B, Hq, Q]` or, if not asked for, possibly None.
    """
    record(
        plan=plan,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=causal,
    )
    if plan == "dense":
        return dense(q, k, v, causal=causal, scale=scale, lse=lse)
    routing = route(
        q,
        k,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=causal,
    )
    if plan == "masked":
        return masked(q, k, v, routing, scale=scale, lse=lse)
    if plan == "fused":
        return fused(q, k, v, routing, scale=scale)
    return routed(q, k, v, routing, scale=scale)
