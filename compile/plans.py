"""The plans: several ways to compute the same function."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moba_flex.compile.cpu import attend_modded, attend_parts, attend_portable, show_spoilt
from moba_flex.compile.flex import attend
from moba_flex.compile.merge import gather_rows, merge_parts
from moba_flex.masks.block_mask import routing_to_block_mask
from moba_flex.masks.blocks import LONGEST
from moba_flex.masks.exporting import is_exporting, record
from moba_flex.masks.inputs import finite
from moba_flex.masks.layout import Tables
from moba_flex.masks.mods import Mods
from moba_flex.masks.regroup import regroup
from moba_flex.masks.router import choose_blocks
from moba_flex.masks.routing import Routing
from moba_flex.masks.tiles import (
    TILE,
    lay_out_keys,
    own_block_mask,
    regrouped_origin,
    routed_block_mask,
)

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with PyTorch for CUDA
if _HAS_TRITON:
    import triton

    from moba_flex.compile.fused import attend_fused

Result = tuple[Tensor, Tensor | None]


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    lse: bool,
    tables: Tables | None = None,
    mods: Mods | None = None,
) -> Result:
    """Attend to everything: each sequence is one block. Tables are of blocks of `LONGEST` keys."""
    q, scale = _scaled_up(q, scale)
    if tables is None and mods is None and _is_plain(q, k, causal=causal, lse=lse):
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        return out, None
    # The one block of a sequence is the own block of its queries, and no other is left to choose.
    q_len, kv_len = q.shape[2], k.shape[2]
    if not _as_on_cpu(q) and tables is None and mods is None and not causal:
        return attend(q, k, v, None, scale, lse=True)
    none = q.new_empty((*q.shape[:3], 0), dtype=torch.int32)
    # A number of keys that varies would be part of a mask_mod.
    routing = Routing(none, LONGEST, q_len, kv_len, causal, tables)
    return routed(q, k, v, routing, scale=scale, mods=mods)


def _scaled_up(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a positive scale that give the same scores.

    PyTorch's flash attention on CPU, for one, scales what it has masked: -inf would become inf.
    """
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def _is_plain(q: Tensor, k: Tensor, *, causal: bool, lse: bool) -> bool:
    """Whether `scaled_dot_product_attention` serves.

    It returns no lse, and masks from top left. On CPU a later key that is not finite would spoil
    queries that do not see it, and few keys would hide from others what is not.
    """
    if _as_on_cpu(q) and (causal or not is_exporting()):
        return False
    return not lse and (not causal or q.shape[2] == k.shape[2])


def _as_on_cpu(q: Tensor) -> bool:
    """Whether the engines for CPU serve: on meta the shapes of what they return."""
    return q.device.type in ("cpu", "meta")


def uses_flex(
    plan: str, q: Tensor, k: Tensor, *, causal: bool, lse: bool, changed: bool = False
) -> bool:
    """Whether a plan calls FlexAttention, which must be compiled.

    Args:
        plan: Its name.
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        causal: Whether a query sees only keys at its position and before.
        lse: Whether log-sum-exps are asked for.
        changed: Whether there are tables or mods.
    """
    if plan == "dense" and not changed and _is_plain(q, k, causal=causal, lse=lse):
        return False
    return plan == "masked" or (plan != "fused" and not _as_on_cpu(q))


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes tensors on CPU."""
    return _HAS_TRITON and bool(triton.knobs.runtime.interpret)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float,
    lse: bool,
    mods: Mods | None = None,
) -> Result:
    """Attend in natural order; FlexAttention skips the tiles that no query chose."""
    mods = mods or Mods()
    mask = routing_to_block_mask(routing, mods.on_masks())
    if not _as_on_cpu(q):
        return attend(q, k, v, mask, scale, lse=lse, score_mod=mods.on_scores())
    out, no_lse = attend(q, k, finite(v), mask, scale, lse=lse, score_mod=mods.on_scores())
    bad_key = None
    if mods.mask_mod is not None:
        # What a query sees under it, FlexAttention knows: of equal weights none is 0.
        bad_key = ~(k.isfinite().all(3, keepdim=True) & v.isfinite().all(3, keepdim=True))
        marks = torch.cat((bad_key, torch.ones_like(bad_key)), dim=3).to(q.dtype)
        bad_key = attend(q * 0, k * 0, F.pad(marks, (0, 14)), mask, scale, lse=False)[0]
    blocks, block_size = routing.blocks, routing.block_size
    options = block_size, routing.causal, *routing.located
    return show_spoilt(out, q, k, v, blocks, *options, bad_key), no_lse


def routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float,
    mods: Mods | None = None,
) -> Result:
    """Attend to the own blocks and to the chosen ones, part by part, and merge."""
    if not _as_on_cpu(q):
        return _routed_flex(q, k, v, routing, scale=scale, mods=mods)
    if is_exporting():  # of plain rows: see `check_export`
        return attend_portable(q, k, v, routing, scale=scale)
    if mods is not None and not (q.is_meta or isinstance(q, FakeTensor)):  # no scores to change
        return attend_modded(q, k, v, routing, mods, scale)
    options = routing.block_size, routing.causal, scale
    out, lse = attend_parts(q, k, v, routing.blocks, *options, *routing.located)
    return out, lse


def _routed_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float,
    mods: Mods | None = None,
) -> Result:
    """Attend to the own blocks in natural order and to the chosen ones in regrouped order."""
    mods = mods or Mods()
    own_mask = own_block_mask(routing, mods.on_masks())
    own_out, own_lse = attend(q, k, v, own_mask, scale, lse=True, score_mod=mods.on_scores())
    if routing.blocks.shape[3] == 0:
        return own_out, own_lse

    batch, num_kv_heads = k.shape[:2]
    rows = q.reshape(batch, num_kv_heads, -1, q.shape[3])
    layout, routing = lay_out_keys(routing)
    groups = regroup(routing, num_kv_heads, TILE)
    if (places := layout.places_of(k)) is not None:
        k, v = (gather_rows(x, *places) for x in (k, v))
    if mods.ask:
        group = q.shape[1] // num_kv_heads
        mods = mods.moved(regrouped_origin(groups, layout, q.shape[2], group))
    routed_out, routed_lse = attend(
        gather_rows(rows, groups.row, groups.slot),
        k,
        v,
        routed_block_mask(groups, layout, mods.on_masks()),
        scale,
        lse=True,
        score_mod=mods.on_scores(),
    )

    own_out, own_lse = own_out.reshape(*rows.shape[:3], -1), own_lse.reshape(rows.shape[:3])
    out, lse = merge_parts(own_out, own_lse, routed_out, routed_lse, groups)
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float,
    mods: Mods | None = None,
) -> Result:
    """Do what `routed` does, with regrouping and merge inside of Triton kernels."""
    softcap = 0.0 if mods is None or mods.softcap is None else float(mods.softcap)
    blocks, block_size = routing.blocks, routing.block_size
    options = block_size, routing.causal, scale, softcap
    out, lse, *_ = attend_fused(q, k, v, blocks, *options, *routing.located)
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
    head_top_k: Tensor | None = None,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
    mods: Mods | None = None,
) -> Result:
    """Route and attend by the plan of this name, with the options of `moba_flex.moba_attention`.

    Returns:
        Output `[B, Hq, Q, Dv]`, and log-sum-exp `[B, Hq, Q]` or, if not asked for, possibly None.
    """
    record(
        plan=plan,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=causal,
    )
    size = LONGEST if plan == "dense" else block_size
    tables = Tables.of_parts(queries, extents, size, causal, k.shape[2])
    if plan == "dense":
        return dense(q, k, v, causal=causal, scale=scale, lse=lse, tables=tables, mods=mods)
    gate = block_size, top_k, sink_blocks, local_blocks, causal
    routing = choose_blocks(q, k, *gate, head_top_k, tables)
    return follow(q, k, v, routing, plan=plan, scale=scale, lse=lse, mods=mods)


def run_given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: str,
    blocks: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    lse: bool,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
    mods: Mods | None = None,
) -> Result:
    """Attend by the plan of this name to `blocks` `[B, Hq, Q, K - 1]`; returns what `run` does."""
    routing = Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
    return follow(q, k, v, routing, plan=plan, scale=scale, lse=lse, mods=mods)


def follow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    plan: str,
    scale: float,
    lse: bool,
    mods: Mods | None,
) -> Result:
    """Attend to what a routing chose."""
    q, scale = _scaled_up(q, scale)
    if plan == "masked":
        return masked(q, k, v, routing, scale=scale, lse=lse, mods=mods)
    if plan == "fused":
        return fused(q, k, v, routing, scale=scale, mods=mods)
    return routed(q, k, v, routing, scale=scale, mods=mods)
