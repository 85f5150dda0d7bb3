"""`moba_attention`: one function, and the plans that compute it."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from moba_flex.compile.flex import compiled
from moba_flex.compile.plans import interpreted, run, uses_flex
from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.checks import check_gate, check_qk, check_qkv
from moba_flex.masks.exporting import holds

Plan = Literal["dense", "fused", "routed", "masked"]

_PLANS: tuple[Plan, ...] = ("dense", "fused", "routed", "masked")
# What FlexAttention and this library compile kernels for.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FUSED_HEAD_DIM = 256


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
    plan: Plan | Literal["auto"] = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend with every query to the `top_k` key blocks that it likes best.

    This is Mixture of Block Attention (arXiv 2502.13189).

    The keys are cut into blocks of `block_size`. Every query, in every head, attends to its own
    block and to those of the other `top_k - 1` whose mean key has the largest dot product with it,
    in one joint softmax. If `top_k` blocks cover all keys this is exact attention. The result is
    differentiable; the choice carries no gradient.

    Under `torch.compile` the call becomes part of the caller's graph, without a break. Called from
    eager code, plans that are made of FlexAttention compile themselves, once for each set of
    options; the plan "fused", which "auto" takes on CUDA, has nothing to compile but its kernels.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        v: Values, `[B, Hkv, KV, D]`.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one that are always chosen; they count in
            `top_k`.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores; `1 / sqrt(D)` if None. The gate never uses it.
        plan: How to compute it. All plans give the same result; "auto" takes what `choose_plan`
            says.
        return_aux: What to return beside the output: `AuxRequest(lse=True)` for the log-sum-exp
            of the scaled scores, float32 `[B, Hq, Q]` (float64 for float64 inputs),
            differentiable.

    Returns:
        The output `[B, Hq, Q, D]`, or with `return_aux` the output and an `AuxOutput`.

    Raises:
        ValueError: A shape, a device or an option is out of range, or the plan cannot serve the
            request.
        TypeError: An argument has the wrong type.
    """
    if not torch.compiler.is_compiling():
        check_qkv(q, k, v)
        check_gate(block_size, top_k, sink_blocks, local_blocks)
    if return_aux is not None and return_aux.max_scores:
        raise ValueError("return_aux must ask for lse alone, got max_scores=True")
    lse = return_aux is not None and return_aux.lse
    if plan == "auto":
        plan = choose_plan(q, k, block_size=block_size, top_k=top_k)
    elif plan not in _PLANS:
        raise ValueError(f"plan must be one of {('auto', *_PLANS)}, got {plan!r}")
    num_blocks = ceil_div(k.shape[2], block_size)
    if plan == "dense" and not holds(top_k >= num_blocks):
        raise ValueError(
            f"top_k must cover all {num_blocks} blocks for plan='dense', got {top_k}: "
            "raise top_k, or let plan be 'auto'"
        )
    flex = uses_flex(plan, q, k, causal=causal, lse=lse)
    if flex:
        _check_flex(q, k, v, lse)
    if plan == "fused":
        _check_fused(q)
    if torch.compiler.is_exporting():
        _check_dtype(q)  # PyTorch 2.11 miscompiles the gate of float64 inputs
        # What the graph may take for granted, and a package checks.
        torch._check(v.shape[2] == k.shape[2])
        torch._check(q.shape[2] <= k.shape[2])

    options: dict[str, Any] = {
        "plan": plan,
        "block_size": block_size,
        "top_k": top_k,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "causal": causal,
        "scale": 1 / math.sqrt(q.shape[3]) if scale is None else scale,
        "lse": lse,
    }
    if flex and not torch.compiler.is_compiling():
        grads = torch.is_grad_enabled(), q.requires_grad, k.requires_grad, v.requires_grad
        kind = q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], *grads
        out, out_lse = compiled(run, kind, **options)(q, k, v)
    else:
        out, out_lse = run(q, k, v, **options)
    return out if return_aux is None else (out, AuxOutput(lse=out_lse if lse else None))


def choose_plan(q: Tensor, k: Tensor, *, block_size: int, top_k: int) -> Plan:
    """Say which plan `moba_attention(..., plan="auto")` takes; nothing is computed.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.

    Returns:
        "dense" if `top_k` blocks cover all keys; else "fused" on CUDA, for a head_dim of at most
        256, and "routed" elsewhere.

    Raises:
        ValueError: A shape or an option is out of range.
        TypeError: An argument has the wrong type.
    """
    if not torch.compiler.is_compiling():
        check_qk(q, k)
        check_gate(block_size, top_k, 0, 0)
    if holds(top_k >= ceil_div(k.shape[2], block_size)):
        return "dense"
    return "fused" if q.device.type == "cuda" and q.shape[3] <= _FUSED_HEAD_DIM else "routed"


def _check_flex(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> None:
    """Raise if FlexAttention on the device of `q` cannot do what is asked."""
    device = q.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"q must be on cpu or cuda, got {device}")
    _check_dtype(q)
    if device == "cuda" and q.shape[3] < 16:
        raise ValueError(
            f"q must have a head_dim of at least 16 on cuda, got {q.shape[3]}: pad it"
        )
    largest = max(x.numel() for x in (q, k, v))
    if device == "cuda" and largest >= 2**31:  # such a call ended in an illegal memory access
        raise ValueError(
            f"q, k and v must have fewer than 2**31 elements each on cuda, got {largest}: "
            "split the batch or the heads"
        )
    if device == "cpu":
        if lse:
            raise ValueError("plan must be 'routed' or 'dense' to return lse on cpu, got 'masked'")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                "plan must be 'routed' or 'dense' for gradients on cpu, got 'masked': "
                "FlexAttention has no backward there; for inference use torch.no_grad()"
            )


def _check_fused(q: Tensor) -> None:
    """Raise if the kernels of the fused plan cannot do what is asked."""
    if q.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"q must be on cuda for plan='fused', got {q.device.type}: let plan be 'auto'"
        )
    _check_dtype(q)
    if q.shape[3] > _FUSED_HEAD_DIM:
        raise ValueError(
            f"q must have a head_dim of at most {_FUSED_HEAD_DIM} for plan='fused', got "
            f"{q.shape[3]}: let plan be 'routed'"
        )


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in _KERNEL_DTYPES:
        names = " or ".join(map(str, _KERNEL_DTYPES))
        raise TypeError(f"q must be {names} on {q.device.type}, got {q.dtype}: convert q, k and v")
