"""`moba_attention`: one function, and the plans that compute it."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from moba_flex.compile.flex import compiled
from moba_flex.compile.limits import FUSED_HEAD_DIM, check_export, check_flex, check_fused
from moba_flex.compile.plans import run, run_given, uses_flex
from moba_flex.masks.blocks import LONGEST, ceil_div
from moba_flex.masks.checks import (
    check_aux,
    check_bool,
    check_gate,
    check_head_top_k,
    check_layout,
    check_mods,
    check_qkv,
    check_routing,
    check_scale,
    check_softcap,
    check_transforms,
    longest_sequence,
)
from moba_flex.masks.exporting import holds, is_exporting, is_traced
from moba_flex.masks.inputs import cast_by_autocast
from moba_flex.masks.layout import Layout, Tables, make_tables
from moba_flex.masks.mods import MaskMod, Mods, ScoreMod
from moba_flex.masks.routing import Routing

Plan = Literal["dense", "fused", "routed", "masked"]

_PLANS: tuple[Plan, ...] = ("dense", "fused", "routed", "masked")


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    head_top_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Plan | Literal["auto"] = "auto",
    return_aux: None = None,
) -> Tensor: ...
@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    head_top_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Plan | Literal["auto"] = "auto",
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    head_top_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Plan | Literal["auto"] = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend with every query to the `top_k` key blocks that it likes best.

    This is Mixture of Block Attention (arXiv 2502.13189).

    The keys are cut into blocks of `block_size`. Every query, in every head, attends to its own
    block and to those of the other `top_k - 1` whose mean key has the largest dot product with it,
    in one joint softmax. If `top_k` blocks cover all keys this is exact attention. The result is
    differentiable; the choice carries no gradient.

    Packed documents behave like separate calls, and padded rows like the unpadded row. A query
    that sees nothing, being padding or by `mask_mod`, gets zeros and a log-sum-exp of -inf.

    Under `torch.compile` the call becomes part of the caller's graph, without a break. Called from
    eager code, plans that are made of FlexAttention compile themselves, once for each set of
    options; the plan "fused", which "auto" takes on CUDA, has nothing to compile but its kernels.
    Under autocast q, k and v are cast as for `scaled_dot_product_attention`.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        v: Values, `[B, Hkv, KV, Dv]`.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one that are always chosen; they count in
            `top_k`.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores; `1 / sqrt(D)` if None. The gate never uses it.
        head_top_k: Of each head the blocks that its queries attend to, int `[Hq]`, each from `1 +
            sink_blocks + local_blocks` to `top_k`; None for `top_k` in all.
        cu_seqlens: Where the documents of every row start, and the end `KV`, int `[docs + 1]`:
            blocks are counted from each document's start, and no query sees another document.
        cu_seqlens_q: Where the queries of each document start, and the end `Q`, likewise, if not
            where the keys do. They are the last of the document's positions.
        key_mask: True for the keys that are not padding, bool `[B, KV]`, in one run a row; blocks
            are counted from the first. Not together with `cu_seqlens`.
        softcap: Scores become `softcap * tanh(score / softcap)`, before `score_mod`.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)`, as FlexAttention takes it, in positions
            within the tensors given, whatever the plan. The gate does not see it.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx)`, likewise: hides keys after routing.
        plan: How to compute it. All plans give the same result; "auto" takes what `choose_plan`
            says.
        return_aux: What to return beside the output: `AuxRequest(lse=True)` for the log-sum-exp
            of the scores, float32 `[B, Hq, Q]` (float64 for float64 inputs), differentiable.

    Returns:
        The output `[B, Hq, Q, Dv]`, or with `return_aux` the output and an `AuxOutput`.

    Raises:
        ValueError: A shape, a device or an option is out of range, or the plan cannot serve the
            request.
        TypeError: An argument has the wrong type.
    """
    q, k, v = cast_by_autocast(q, k, v)
    mods = _mods(softcap, score_mod, mask_mod)
    check_transforms(q, k, v)
    check_qkv(q, k, v)
    block_size, top_k, sink_blocks, local_blocks = check_gate(
        block_size, top_k, sink_blocks, local_blocks
    )
    check_head_top_k(head_top_k, q, top_k, sink_blocks, local_blocks)
    causal, scale = check_bool("causal", causal), check_scale(scale)
    check_layout(q, k, cu_seqlens, cu_seqlens_q, key_mask)
    chosen = _choose(q, k, v, block_size, top_k, head_top_k, mods) if plan == "auto" else plan
    if chosen not in _PLANS:
        raise ValueError(f"plan must be one of {('auto', *_PLANS)}, got {plan!r}")
    if plan == "dense":
        longest = longest_sequence(k.shape[2], cu_seqlens, key_mask)
        _check_dense(block_size, top_k, head_top_k, longest)

    layout: Layout = {"cu_seqlens": cu_seqlens, "cu_seqlens_q": cu_seqlens_q, "key_mask": key_mask}
    size = LONGEST if chosen == "dense" else block_size
    tables = make_tables(q.shape[2], k.shape[2], size, causal, **layout)
    options: dict[str, Any] = {
        "block_size": block_size,
        "top_k": top_k,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
    }
    tensors = {"head_top_k": head_top_k, **_located(tables)}
    return _execute(run, q, k, v, tensors, options, chosen, causal, scale, mods, return_aux)


@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Literal["auto", "fused", "routed", "masked"] = "auto",
    return_aux: None = None,
) -> Tensor: ...
@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Literal["auto", "fused", "routed", "masked"] = "auto",
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    plan: Literal["auto", "fused", "routed", "masked"] = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend with every query to its own block and to those that a given routing says.

    The routing is one of `moba_flex.masks.patterns`, of `route`, or the caller's own.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        routing: Which blocks each query attends to.
        scale: Factor on the scores; `1 / sqrt(D)` if None.
        softcap: As of `moba_attention`, like all that follow.
        score_mod: Changes scores.
        mask_mod: Hides keys.
        plan: How to compute it.
        return_aux: What to return beside the output.

    Returns:
        The output `[B, Hq, Q, Dv]`, or with `return_aux` the output and an `AuxOutput`.

    Raises:
        ValueError: A shape, a device or an option is out of range, or the plan cannot serve the
            request.
        TypeError: An argument has the wrong type.
    """
    q, k, v = cast_by_autocast(q, k, v)
    mods = _mods(softcap, score_mod, mask_mod)
    check_transforms(q, k, v)
    check_qkv(q, k, v)
    check_routing(routing, q, k)
    scale = check_scale(scale)
    chosen = _choose_sparse(q, v, mods) if plan == "auto" else plan
    if chosen not in _PLANS[1:]:
        raise ValueError(f"plan must be one of {('auto', *_PLANS[1:])}, got {plan!r}")
    blocks = routing.as_set(q.shape[1]).blocks
    tensors = {"blocks": blocks, **_located(routing.tables)}
    options = {"block_size": routing.block_size}
    return _execute(
        run_given, q, k, v, tensors, options, chosen, routing.causal, scale, mods, return_aux
    )


def choose_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    head_top_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    return_aux: AuxRequest | None = None,
) -> Plan:
    """Say which plan `moba_attention(..., plan="auto")` takes; nothing is computed.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`; None if they have the head_dim of `k`.
        block_size: Keys per block; this and what follows is as of `moba_attention`.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks that are always chosen.
        local_blocks: Blocks right before the own one that are always chosen.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores.
        head_top_k: Blocks that the queries of each head attend to.
        cu_seqlens: Where documents start.
        cu_seqlens_q: Where their queries start.
        key_mask: Which keys are not padding.
        softcap: Limit of the scores.
        score_mod: What changes scores.
        mask_mod: What hides keys.
        return_aux: What to return beside the output.

    Returns:
        "dense" if `top_k` blocks cover all keys, in every head; else "fused" on CUDA, for head
        dims of at most 256 and neither `score_mod` nor `mask_mod`; else "routed".

    Raises:
        ValueError: A shape or an option is out of range.
        TypeError: An argument has the wrong type.
    """
    v = k if v is None else v
    check_qkv(q, k, v)
    gate = check_gate(block_size, top_k, sink_blocks, local_blocks)
    check_head_top_k(head_top_k, q, *gate[1:])
    check_bool("causal", causal)
    check_scale(scale)
    check_layout(q, k, cu_seqlens, cu_seqlens_q, key_mask)
    check_aux(return_aux)
    mods = _mods(softcap, score_mod, mask_mod)
    return _choose(q, k, v, *gate[:2], head_top_k, mods)


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    top_k: int,
    head_top_k: Tensor | None,
    mods: Mods | None,
) -> Plan:
    if head_top_k is None and holds(top_k >= ceil_div(k.shape[2], block_size)):
        return "dense"
    return _choose_sparse(q, v, mods)


def _choose_sparse(q: Tensor, v: Tensor, mods: Mods | None) -> Plan:
    functions = mods is not None and mods.ask
    small = max(q.shape[3], v.shape[3]) <= FUSED_HEAD_DIM
    return "fused" if q.device.type == "cuda" and small and not functions else "routed"


def _mods(
    softcap: float | None, score_mod: ScoreMod | None, mask_mod: MaskMod | None
) -> Mods | None:
    """Return the changes to scores, checked; None if there are none."""
    mods = Mods(score_mod, mask_mod, check_softcap(softcap))
    if mods == Mods():
        return None
    check_mods(mods)
    return mods


def _located(tables: Tables | None) -> dict[str, Tensor | None]:
    """Return the tensors of tables by name: a graph would take their numbers for symbols."""
    if tables is None:
        return {"queries": None, "extents": None}
    return {"queries": tables.queries, "extents": tables.extents}


def _check_dense(block_size: int, top_k: int, head_top_k: Tensor | None, longest: int) -> None:
    """Raise if not every query is to see all keys, of which there are `longest` at most."""
    if head_top_k is not None:
        raise ValueError(
            "head_top_k must be None for plan='dense', got a Tensor: let plan be 'auto'"
        )
    num_blocks = ceil_div(longest, block_size)
    if not holds(top_k >= num_blocks):
        raise ValueError(
            f"top_k must cover all {num_blocks} blocks for plan='dense', got {top_k}: "
            "raise top_k, or let plan be 'auto'"
        )


def _execute(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: dict[str, Any],
    options: dict[str, Any],
    plan: Plan,
    causal: bool,
    scale: float | None,
    mods: Mods | None,
    return_aux: AuxRequest | None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Call `run` or `run_given`, compiled if the plan needs that, and return what is asked for."""
    lse = check_aux(return_aux)
    changed = tensors["extents"] is not None or mods is not None
    flex = uses_flex(plan, q, k, causal=causal, lse=lse, changed=changed)
    if flex:
        check_flex(q, k, v, lse, plan)
    if plan == "fused":
        check_fused(q, v, mods)
    if is_exporting():
        check_export(q, tensors, mods)

    options = options | {
        "plan": plan,
        "causal": causal,
        "scale": 1 / math.sqrt(q.shape[3]) if scale is None else scale,
        "lse": lse,
    }
    device = q.device.type
    # What is cast is cast: within, autocast would round the scores.
    autocast = torch.is_autocast_enabled(device) if device != "meta" else False
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        if statically_known_true(q.numel() == 0):
            out, out_lse = _nothing(q, k, v)
        elif flex and not is_traced():
            grads = torch.is_grad_enabled(), q.requires_grad, k.requires_grad, v.requires_grad
            sizes = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
            given = tuple(name for name, x in tensors.items() if x is not None)
            kind = q.device, q.dtype, sizes, grads, given
            changes = mods or Mods()
            # PyTorch's C++ template takes the tenth symbol of a graph for the first and a digit.
            static = device == "cpu" and changed
            graph = compiled(function, kind, changes.softcap, static, **options)
            functions = {"score_mod": changes.score_mod, "mask_mod": changes.mask_mod}
            out, out_lse = graph(q, k, v, **functions, **tensors)
        else:
            out, out_lse = function(q, k, v, mods=mods, **tensors, **options)
    return out if return_aux is None else (out, AuxOutput(lse=out_lse if lse else None))


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exps of no queries, or of an empty batch."""
    none = q[..., 0] + 0 * (k.sum() + v.sum())
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return none.unsqueeze(3).expand(*q.shape[:3], v.shape[3]), none.to(exact)
