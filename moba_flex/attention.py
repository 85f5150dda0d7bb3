"""`moba_attention`: one function, and the plans that compute it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, Unpack, overload

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from moba_flex.compile.plans import Plan as AnyPlan
from moba_flex.compile.plans import PlanName, Result, find_plan
from moba_flex.masks._torch.exporting import is_traced, record
from moba_flex.masks._torch.inputs import cast_by_autocast
from moba_flex.masks.checks import check_whole_sequence
from moba_flex.masks.mods import MaskMod, ScoreMod
from moba_flex.masks.request import (
    Options,
    Request,
    ScoreOptions,
    gated_request,
    given_request,
)
from moba_flex.masks.routing import Routing

Plan = PlanName

_watchers: list[Callable[[Request], None]] = []


class _Options(Options, total=False):
    """Options of `moba_attention`."""

    plan: Plan | Literal["auto"]


class _RoutedOptions(ScoreOptions, total=False):
    """Options of `routed_attention`."""

    plan: Literal["auto", "fused", "routed", "masked"]


@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_aux: None = None, **options: Unpack[_Options]
) -> Tensor: ...
@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_aux: AuxRequest, **options: Unpack[_Options]
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

    Example:
        >>> q = torch.randn(2, 8, 1000, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 2, 1000, 64)
        >>> out = moba_attention(q, k, v, block_size=64, top_k=4)
        >>> out.sum().backward()
        >>> out.shape, q.grad.shape
        (torch.Size([2, 8, 1000, 64]), torch.Size([2, 8, 1000, 64]))
    """
    q, k, v = cast_by_autocast(q, k, v)
    request = gated_request(
        q,
        k,
        v,
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=causal,
        head_top_k=head_top_k,
        cu_seqlens=cu_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        key_mask=key_mask,
        scale=scale,
        softcap=softcap,
        score_mod=score_mod,
        mask_mod=mask_mod,
        return_aux=return_aux,
    )
    return attend(request, plan, return_aux)


@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    return_aux: None = None,
    **options: Unpack[_RoutedOptions],
) -> Tensor: ...
@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    return_aux: AuxRequest,
    **options: Unpack[_RoutedOptions],
) -> tuple[Tensor, AuxOutput]: ...
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    plan: Literal["auto", "fused", "routed", "masked"] = "auto",
    return_aux: AuxRequest | None = None,
    **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend with every query to its own block and to those that a given routing says.

    The routing is one of `moba_flex.masks.patterns`, of `route`, or the caller's own.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        routing: Which blocks each query attends to.
        plan: How to compute it.
        return_aux: What to return beside the output, as of `moba_attention`.
        options: `scale`, `softcap`, `score_mod` and `mask_mod`, as of `moba_attention`.

    Returns:
        The output `[B, Hq, Q, Dv]`, or with `return_aux` the output and an `AuxOutput`.

    Raises:
        ValueError: A shape, a device or an option is out of range, or the plan cannot serve the
            request.
        TypeError: An argument has the wrong type.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 256, 32)
        >>> blocks = torch.zeros(1, 4, 256, 1, dtype=torch.int64)  # the first block, and the own
        >>> routing = Routing(blocks, block_size=64, q_len=256, kv_len=256, causal=True)
        >>> routed_attention(q, k, v, routing).shape
        torch.Size([1, 4, 256, 32])
    """
    q, k, v = cast_by_autocast(q, k, v)
    request = given_request(q, k, v, routing, return_aux=return_aux, **options)
    return attend(request, plan, return_aux)


def choose_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    return_aux: AuxRequest | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Say which plan `moba_attention(..., plan="auto")` takes; nothing is computed.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`; None if they have the head_dim of `k`.
        return_aux: What to return beside the output.
        options: Those of `moba_attention`.

    Returns:
        "dense" if `top_k` blocks cover all keys, in every head; else "decode" on CPU, for at most
        64 queries without gradients and mods; else "fused" on CUDA, for head
        dims of at most 256 and neither `score_mod` nor `mask_mod`; else "routed".

    Raises:
        ValueError: A shape or an option is out of range, or no plan can serve the request.
        TypeError: An argument has the wrong type.

    Example:
        >>> q = k = torch.randn(1, 2, 256, 64)
        >>> choose_plan(q, k, block_size=64, top_k=2)
        'routed'
    """
    v = k if v is None else v
    request = gated_request(q, k, v, return_aux=return_aux, **options)
    return find_plan("auto", request).name


def attend(
    request: Request, name: str, return_aux: AuxRequest | None
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend by the plan of a name, and return what is asked for."""
    check_whole_sequence()
    return attend_by(find_plan(name, request), request, return_aux)


@contextlib.contextmanager
def watch(watcher: Callable[[Request], None]) -> Iterator[None]:
    """Call `watcher` after each request that is routed, inside the `with` block.

    Requests of compiled graphs do not call it.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def attend_by(
    plan: AnyPlan, request: Request, return_aux: AuxRequest | None
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend by a plan that can serve the request, and return what is asked for."""
    if not plan.reads_pages:
        request = request.joined()
    gate, device = request.gate, request.q.device.type
    if gate is not None:
        record(
            plan=plan.name,
            block_size=gate.block_size,
            top_k=gate.top_k,
            sink_blocks=gate.sink_blocks,
            local_blocks=gate.local_blocks,
            causal=gate.causal,
        )
    # Inputs are cast already: within the plan, autocast would round the scores.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        empty = statically_known_true(request.q.numel() == 0)
        out, lse = _attend_nothing(request) if empty else plan(request)
    if not is_traced() and plan.name != "dense":
        for watcher in _watchers:
            watcher(request)
    return out if return_aux is None else (out, AuxOutput(lse=lse if request.lse else None))


def _attend_nothing(request: Request) -> Result:
    """Return the output and the log-sum-exps of no queries, or of an empty batch."""
    q, v = request.q, request.v
    none = q[..., 0] + 0 * (request.k.sum() + v.sum())
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return none.unsqueeze(3).expand(*q.shape[:3], v.shape[3]), none.to(exact)
