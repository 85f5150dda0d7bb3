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

from moba_flex.compile.parts import cut
from moba_flex.masks.gradients import with_gradient
from moba_flex.masks.inputs import dense_vectors
from moba_flex.masks.routing import Routing

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Columns for the gradient of lse: one is needed, and as many keep vectors aligned, which matrix
# products need to round alike wherever a vector lies.
_EXTRA = 16


def _hidden(k: Tensor, v: Tensor) -> Tensor | None:
    """Say which keys must not meet queries that do not see them: those that are not finite.

    Flash attention multiplies what it masks by zero, which would leave NaN.
    """
    if k.sum().isfinite() and v.sum().isfinite():
        return None
    return ~(k.isfinite().all(3) & v.isfinite().all(3)).all(1)


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
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    v_dim, width = v.shape[3], max(q.shape[3], v.shape[3])
    q, k, v = q.contiguous(), *dense_vectors(k, v)
    q, k, v = (_widen(x, width) for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=exact)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=exact)
    for part in cut(routing, k.shape[1], _hidden(k, v)):
        places = part.queries, part.keys, part.keys
        inputs = (place.take(x) for place, x in zip(places, (q, k, v), strict=True))
        attended = _flash(*inputs, 0.0, part.causal, scale=scale)
        if not part.first:
            attended = _merge(part.queries.take(out), part.queries.take(lse), *attended)
        part.queries.put(out, attended[0])
        part.queries.put(lse, attended[1])
    return out[..., :v_dim].to(q.dtype).contiguous(), lse


def _widen(x: Tensor, width: int) -> Tensor:
    """Append zeros to vectors: flash attention takes queries, keys and values of one head_dim."""
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))


@attend_cpu.register_fake
def shapes_of_attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, not computed, of an op that attends."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=exact)


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
    dims = q.shape[3], k.shape[3], v.shape[3]
    width = max(dims)
    routing = Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
    extra = 0 if grad_lse is None else _EXTRA
    grad, q, k, v, out = (_widen(x, width + extra) for x in (grad, q, k, v, out))
    if grad_lse is not None:
        # A part's share of the score gradient is p * (grad @ v - grad @ out). A column of ones in
        # v, of zeros in out and of grad_lse in grad adds grad_lse to it: the derivative of lse.
        grad[..., width], v[..., width] = grad_lse, 1.0
    q, grad, out, lse = (x.contiguous() for x in (q, grad, out, lse))
    k, v = dense_vectors(k, v)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    for part in cut(routing, k.shape[1], _hidden(k, v)):
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


@attend_cpu_backward.register_fake
def shapes_of_gradients(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`, not computed, of such an op's backward."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
