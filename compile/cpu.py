"""The routed plan's engine on CPU: PyTorch's flash attention, part by part.

Compiled FlexAttention has no backward and returns no log-sum-exp on CPU; flash attention does
both. A part is a set of queries and a contiguous range of keys, read in place; parts merge by
log-sum-exp. Backward needs no derivative of the merge: flash attention's backward, given the
merged output and the merged log-sum-exp, yields the exact share of each part.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.inputs import dense_vectors
from moba_flex.masks.regroup import sort_pairs
from moba_flex.masks.router import Routing

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Rows of one call. Its key gradients are sums in the dtype of the inputs; over calls they are sums
# in float32.
_MAX_ROWS = 2048


class _Part(NamedTuple):
    """One call of flash attention.

    Attributes:
        view: Views `[B, Hq, Q, ...]` as `[b, h, n, ...]`, where the queries of this part are.
        keys: Views `[B, Hkv, KV, D]` as `[b, h, m, D]`, the keys of this part.
        causal: Whether the first query sees the first key alone, the second two, and so on.
        rows: Which of the `n` are queries of this part, int `[r]`; None for all.
    """

    view: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    causal: bool = False
    rows: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """Return what `x` holds for the queries."""
        return self.view(x) if self.rows is None else self.view(x).index_select(2, self.rows)

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write to where `take` reads."""
        if self.rows is None:
            self.view(x).copy_(value)
        else:
            self.view(x).index_copy_(2, self.rows, value)

    def add(self, x: Tensor, value: Tensor) -> None:
        """Add to where `take` reads; no row comes twice."""
        if self.rows is None:
            self.view(x).add_(value)
        else:
            self.view(x).index_add_(2, self.rows, value.to(x.dtype))


def _parts(routing: Routing, num_kv_heads: int) -> Iterator[_Part]:
    """Cut attention into parts: queries and their own blocks, blocks and who chose them."""
    size, offset = routing.block_size, routing.q_offset
    q_len, kv_len = routing.q_len, routing.kv_len
    # Queries whole_start..whole_stop fill their blocks; before and after, blocks lack queries.
    whole_start = min(-(-offset // size) * size, kv_len) - offset
    whole_stop = max(whole_start, kv_len // size * size - offset)
    for start, stop in ((0, whole_start), (whole_stop, q_len)):
        position = offset + start
        block_start = position // size * size
        if start == stop:
            continue
        if not routing.causal:
            yield _span(start, stop, block_start, min(block_start + size, kv_len))
            continue
        if block_start < position:
            yield _span(start, stop, block_start, position)
        yield _span(start, stop, position, offset + stop, causal=True)

    batch, num_heads, _, picks = routing.blocks.shape
    if whole_start < whole_stop:
        for b in range(batch):
            yield _whole_blocks(b, whole_start, whole_stop, offset, size, routing.causal)
    if picks:
        pairs = sort_pairs(routing, num_kv_heads)
        first = pairs.first.tolist()
        for b, h, block in pairs.first.diff(dim=2).nonzero().tolist():
            rows = pairs.row[b, h, first[b][h][block] : first[b][h][block + 1]].long()
            k_start, k_stop = block * size, min((block + 1) * size, kv_len)
            for some in rows.split(_MAX_ROWS):
                yield _chosen_block(b, h, num_heads // num_kv_heads, k_start, k_stop, some)


def _span(start: int, stop: int, k_start: int, k_stop: int, causal: bool = False) -> _Part:
    """Queries `start..stop` and keys `k_start..k_stop` of every head."""
    return _Part(lambda x: x[:, :, start:stop], lambda x: x[:, :, k_start:k_stop], causal)


def _whole_blocks(b: int, start: int, stop: int, offset: int, size: int, causal: bool) -> _Part:
    """Queries `start..stop` of one sequence, which are blocks, each with its own keys."""

    def by_block(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, size)).transpose(0, 1)

    return _Part(
        lambda x: by_block(x[b, :, start:stop]),
        lambda x: by_block(x[b, :, offset + start : offset + stop]),
        causal,
    )


def _chosen_block(b: int, h: int, group: int, k_start: int, k_stop: int, rows: Tensor) -> _Part:
    """One block of a key/value head, and the rows of its `group` query heads that chose it."""
    return _Part(
        lambda x: x[b, h * group : (h + 1) * group].view(1, 1, -1, *x.shape[3:]),
        lambda x: x[b : b + 1, h : h + 1, k_start:k_stop],
        rows=rows,
    )


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
    if queries is not None or extents is not None:
        raise NotImplementedError("plan='routed' on cpu serves no documents or padding yet")
    routing = Routing(blocks, block_size, q.shape[2], k.shape[2], causal)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.contiguous(), *dense_vectors(k, v)
    out = torch.zeros(q.shape, dtype=exact)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=exact)
    for part in _parts(routing, k.shape[1]):
        attended = _flash(part.take(q), part.keys(k), part.keys(v), 0.0, part.causal, scale=scale)
        merged_out, merged_lse = _merge(part.take(out), part.take(lse), *attended)
        part.put(out, merged_out)
        part.put(lse, merged_lse)
    return out.to(q.dtype), lse


@attend_cpu.register_fake
def _(
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
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=exact)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend_cpu` with respect to `q`, `k` and `v`."""
    head_dim = q.shape[3]
    routing = Routing(blocks, block_size, q.shape[2], k.shape[2], causal)
    if grad_lse is not None:
        # A part's share of the score gradient is p * (grad @ v - grad @ out). A column of ones in
        # v, of zeros in out and of grad_lse in grad adds grad_lse to it: the derivative of lse.
        grad = torch.cat((grad, grad_lse.unsqueeze(-1).to(grad.dtype)), dim=-1)
        q, k, out = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(out, (0, 1))
        v = F.pad(v, (0, 1), value=1.0)
    q, grad, out, lse = (x.contiguous() for x in (q, grad, out, lse))
    k, v = dense_vectors(k, v)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    for part in _parts(routing, k.shape[1]):
        part_q, part_grad, part_out, part_lse = (part.take(x) for x in (q, grad, out, lse))
        # Over the heads of a group flash attention would sum in the dtype of k: eight heads of
        # bfloat16 lose two bits.
        group = part_q.shape[1] // part.keys(k).shape[1]
        keys = (part.keys(x).repeat_interleave(group, dim=1) for x in (k, v))
        part_dq, part_dk, part_dv = _flash_backward(
            part_grad, part_q, *keys, part_out, part_lse, 0.0, part.causal, scale=scale
        )
        part.add(dq, part_dq)
        part.keys(dk).add_(part_dk.unflatten(1, (-1, group)).sum(2, dtype=dk.dtype))
        part.keys(dv).add_(part_dv.unflatten(1, (-1, group)).sum(2, dtype=dv.dtype))
    dq, dk, dv = (x[..., :head_dim].to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


@attend_cpu_backward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.causal, ctx.scale, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, blocks, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    grads = attend_cpu_backward(
        grad, grad_lse, q, k, v, blocks, out, lse, ctx.block_size, ctx.causal, ctx.scale
    )
    return *grads, None, None, None, None, None, None


attend_cpu.register_autograd(_backward, setup_context=_save)
