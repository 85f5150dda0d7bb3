"""The routed plan's engine on CPU: PyTorch's flash attention, part by part.

Compiled FlexAttention has no backward and returns no log-sum-exp on CPU; flash attention does
both. A part is a set of queries and a contiguous range of keys, read in place; parts merge by
log-sum-exp. Backward needs no derivative of the merge: flash attention's backward, given the
merged output and the merged log-sum-exp, yields the exact share of each part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.modded import attend_by_products, gradients_by_products
from moba_flex.compile.parts import cut, shapes_of_attention, shapes_of_gradients, spoilt_by
from moba_flex.masks.gradients import with_gradient
from moba_flex.masks.inputs import all_finite, dense_vectors, finite
from moba_flex.masks.mods import Mods
from moba_flex.masks.routing import Routing

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Columns for the gradient of lse: one is needed, and as many keep vectors aligned, which matrix
# products need to round alike wherever a vector lies.
_EXTRA = 16


def _spoilt(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Tensor | None:
    """Say which queries are not finite or see a key or a value that is not; None if all are.

    Flash attention multiplies what it masks by zero, which would leave NaN in other rows, and
    takes rows of NaN for rows of zeros if there are fewer than 16 keys (pytorch/pytorch#141128).
    So it is given finite numbers, and these rows are computed apart.
    """
    return None if all_finite(q, k, v) else spoilt_by(q, k, v, routing)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys: outputs `[..., D]`, log-sum-exps `[...]`."""
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    merged = torch.lerp(out, part.to(out.dtype), weight)
    return merged, torch.logaddexp(lse, part_lse)


@torch.library.custom_op("moba_flex::attend_cpu", mutates_args=(), device_types="cpu")
def attend_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the own block and to the chosen ones.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        blocks: Chosen blocks, int32 `[B, Hq, Q, K - 1]`, as in `Routing`.
        block_size: Keys per block.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores.
        queries: Of `Tables`, if rows are packed documents or are padded.
        extents: Likewise.

    Returns:
        Output `[B, Hq, Q, Dv]` and log-sum-exp `[B, Hq, Q]` (float32, float64 for float64 inputs).
    """
    routing = Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
    spoilt = _spoilt(q, k, v, routing)
    if spoilt is not None:
        apart = attend_by_products(q, k, v, routing, Mods(), scale)
        q, k, v = map(finite, (q, k, v))
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    v_dim, width = v.shape[3], max(q.shape[3], v.shape[3])
    q, k, v = q.contiguous(), *dense_vectors(k, v)
    q, k, v = (_widen(x, width) for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=exact)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=exact)
    for part in cut(routing, k.shape[1]):
        places = part.queries, part.keys, part.keys
        inputs = (place.take(x) for place, x in zip(places, (q, k, v), strict=True))
        attended = _flash(*inputs, 0.0, part.causal, scale=scale)
        if not part.first:
            attended = _merge(part.queries.take(out), part.queries.take(lse), *attended)
        part.queries.put(out, attended[0])
        part.queries.put(lse, attended[1])
    out = out[..., :v_dim].to(q.dtype).contiguous()
    if spoilt is not None:
        out, lse = (
            torch.where(spoilt.unsqueeze(3), apart[0], out),
            torch.where(spoilt, apart[1], lse),
        )
    return out, lse


def _widen(x: Tensor, width: int) -> Tensor:
    """Append zeros to vectors: flash attention takes queries, keys and values of one head_dim."""
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))


@torch.library.custom_op("moba_flex::attend_cpu_backward", mutates_args=(), device_types="cpu")
def attend_cpu_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend_cpu` with respect to `q`, `k` and `v`."""
    routing = Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
    results = grad, grad_lse, out, lse
    spoilt = _spoilt(q, k, v, routing)
    if spoilt is None:
        return _by_flash(*results, q, k, v, routing, scale)
    clean = finite(q), finite(k), finite(v)
    whole = _by_flash(*_without(spoilt, *results), *clean, routing, scale)
    grad, grad_lse, out, lse = _without(~spoilt, *results)
    apart = gradients_by_products(grad, grad_lse, q, k, v, out, lse, routing, Mods(), scale)
    dq, dk, dv = (x + y for x, y in zip(whole, apart, strict=True))
    return dq, dk, dv


def _without(
    rows: Tensor, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return gradients and results that leave some rows `[B, Hq, Q]` without any share."""
    grad, out = (x.masked_fill(rows.unsqueeze(3), 0.0) for x in (grad, out))
    grad_lse = None if grad_lse is None else grad_lse.masked_fill(rows, 0.0)
    return grad, grad_lse, out, lse.masked_fill(rows, torch.inf)


def _by_flash(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = q.shape[3], k.shape[3], v.shape[3]
    width = max(dims)
    extra = 0 if grad_lse is None else _EXTRA
    grad, q, k, v, out = (_widen(x, width + extra) for x in (grad, q, k, v, out))
    if grad_lse is not None:
        # A part's share of the score gradient is p * (grad @ v - grad @ out). A column of ones in
        # v, of zeros in out and of grad_lse in grad adds grad_lse to it: the derivative of lse.
        grad[..., width], v[..., width] = grad_lse, 1.0
    q, grad, out, lse = (x.contiguous() for x in (q, grad, out, lse))
    k, v = dense_vectors(k, v)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    for part in cut(routing, k.shape[1]):
        part_q, part_grad, part_out, part_lse = (part.queries.take(x) for x in (q, grad, out, lse))
        # Over the heads of a group flash attention would sum in the dtype of k: eight heads of
        # bfloat16 lose two bits.
        keys = [part.keys.take(x) for x in (k, v)]
        group = part_q.shape[1] // keys[0].shape[1]
        keys = [x.repeat_interleave(group, dim=1) for x in keys]
        part_dq, *part_dkv = _flash_backward(
            part_grad, part_q, *keys, part_out, part_lse, 0.0, part.causal, scale=scale
        )
        part.queries.add(dq, part_dq)
        for x, part_dx in zip((dk, dv), part_dkv, strict=True):
            part.keys.add(x, part_dx.unflatten(1, (-1, group)).sum(2, dtype=x.dtype))
    grads = (x[..., :dim].to(q.dtype) for x, dim in zip((dq, dk, dv), dims, strict=True))
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


attend_cpu.register_fake(shapes_of_attention)
attend_cpu_backward.register_fake(shapes_of_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, *ctx.options, queries, extents = inputs
    ctx.save_for_backward(q, k, v, blocks, *output, queries, extents)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, queries, extents = ctx.saved_tensors
    grad = torch.zeros_like(saved[4]) if grad is None else grad
    grads = attend_cpu_backward(grad, grad_lse, *saved, *ctx.options, queries, extents)
    return *grads, None, None, None, None, None, None


attend_parts = with_gradient(attend_cpu, setup_context=_save, backward=_backward)


@torch.library.custom_op("moba_flex::show_spoilt", mutates_args=(), device_types="cpu")
def show_spoilt(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Return what FlexAttention gave for values made finite, with NaN where that is a lie.

    On CPU it gives zeros for rows of NaN. No compiler looks into an op: FlexAttention's template
    there takes no operation behind it into its loops, and does not compile with one.

    Args:
        out: Its output, `[B, Hq, Q, Dv]`.
        q: Queries, as they were given, like all that follow.
        k: Keys.
        v: Values.
        blocks: Chosen blocks, as of `attend_cpu`, like all that follow.
        block_size: Keys per block.
        causal: Whether a query sees only keys at its position and before.
        queries: Of `Tables`.
        extents: Likewise.
        seen: Whether a query sees, under a `mask_mod`, a key or a value that is not finite, and
            whether it sees any: not 0 if so, `[B, Hq, Q, 2 or more]`.
    """
    if all_finite(q, k, v):
        return out.clone()
    if seen is None:
        spoilt = spoilt_by(
            q, k, v, Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
        )
    else:
        spoilt = (seen[..., 0] > 0) | (~q.isfinite().all(3) & (seen[..., 1] > 0))
    return out.masked_fill(spoilt.unsqueeze(3), torch.nan)


@show_spoilt.register_fake
def _shape_of_output(out: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(out)


def _gradient_of_output(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, *(None,) * 9


show_spoilt.register_autograd(_gradient_of_output)
