"""The routed plan's engine on CPU: attention part by part, merged by log-sum-exp.

Compiled FlexAttention has no backward and returns no log-sum-exp on CPU. PyTorch's flash attention
does both, and serves plain calls; matrix products (`cpu_products.py`) serve those with mods.
Backward needs no derivative of the merge: what either computes of a part, given the merged output
and the merged log-sum-exp, is the part's exact share in the gradients.

Values that are not finite: flash attention multiplies hidden keys by zero, which would leave NaN
in rows that do not see them, and gives zeros for rows of NaN among fewer than 16 keys
(pytorch/pytorch#141128). It is given finite numbers, and rows that see others are computed by
products. What those rows show is found by attention to marks (`_show_nonfinite`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.compile.cpu_parts import Part, Results, cut, sees_nonfinite
from moba_flex.compile.cpu_products import captured_by, gradients_of_products, products
from moba_flex.compile.engine import attention_op
from moba_flex.masks._torch.gradients import only_once
from moba_flex.masks._torch.inputs import all_finite, dense_vectors, finite
from moba_flex.masks.layout import Layout, ceil_div
from moba_flex.masks.mods import Mods
from moba_flex.masks.regroup import sort_pairs
from moba_flex.masks.routing import Routing

flash_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Columns for the gradient of lse: one is needed, and as many keep vectors aligned, which matrix
# products need to round alike wherever a vector lies.
_EXTRA = 16

# Tiles of the exported form have as many queries as a block has keys, so that keys are copied no
# more than queries; fewer than this would starve the matrix products.
_LEAST_TILE = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, mods: Mods, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the own block and to the chosen ones.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        routing: The choice of blocks.
        mods: Changes to scores and masks.
        scale: Factor on the scores, before the changes.

    Returns:
        Output `[B, Hq, Q, Dv]` and log-sum-exp `[B, Hq, Q]` (float32, float64 for float64 inputs).
        A query that sees nothing has output 0 and log-sum-exp -inf.
    """
    q, (k, v) = q.contiguous(), dense_vectors(k, v)
    if all_finite(q, k, v):
        attend = flash(q, k, v, scale) if mods.none else products(q, k, v, mods, scale)
        return _attend(attend, q, v, routing)
    out, lse = _attend(products(q, k, finite(v), mods, scale), q, v, routing)
    _show_nonfinite(out, lse, q, k, v, routing, mods, scale)
    if mods.none:  # rows that see finite values alone keep the bits of flash attention
        bad, (q, k, v) = sees_nonfinite(q, k, v, routing), map(finite, (q, k, v))
        clean_out, clean_lse = _attend(flash(q, k, v, scale), q, v, routing)
        out, lse = out.where(bad.unsqueeze(3), clean_out), lse.where(bad, clean_lse)
    return out, lse


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    mods: Mods,
    scale: float,
    captured: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the gradients of q, k and v, and of the tensors that `score_mod` captures."""
    q, (k, v) = q.contiguous(), dense_vectors(k, v)
    results = Results(grad, grad_lse, out, lse)
    grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
    captured_grads = [torch.zeros_like(x) for x in captured]
    if mods.none:
        bad, finites = None, (q, k, v)
        if not all_finite(q, k, v):
            bad, finites = sees_nonfinite(q, k, v, routing), (finite(q), finite(k), finite(v))
        clean = results if bad is None else results.without(bad)
        _add_shares(grads, flash_gradients(clean, *finites, scale), routing)
        if bad is None:
            return [x.to(q.dtype) for x in grads]
        results = results.without(~bad)
    shares = gradients_of_products(results, q, k, v, mods, scale, captured, captured_grads)
    _add_shares(grads, shares, routing)
    return [x.to(q.dtype) for x in grads] + captured_grads


def _attend(
    attend: Callable[[Part], tuple[Tensor, Tensor]], q: Tensor, v: Tensor, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Merge what `attend` returns of each part."""
    exact = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=exact)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=exact)
    for part in cut(routing, v.shape[1]):
        attended = attend(part)
        if not part.first:
            attended = _merge(part.queries.take(out), part.queries.take(lse), *attended)
        part.queries.put(out, attended[0])
        part.queries.put(lse, attended[1])
    return out.to(q.dtype), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys: outputs `[..., D]`, log-sum-exps `[...]`."""
    # Clamped, so that a part that sees nothing weighs nothing, also beside another.
    least = torch.finfo(lse.dtype).min
    weight = torch.sigmoid(part_lse - lse.clamp(min=least)).unsqueeze(-1)
    return torch.lerp(out, part.to(out.dtype), weight), torch.logaddexp(lse, part_lse)


def _add_shares(
    grads: list[Tensor], differentiate: Callable[[Part], list[Tensor]], routing: Routing
) -> None:
    """Add the shares of each part to the gradients of q, k and v."""
    for part in cut(routing, grads[1].shape[1]):
        places = part.queries, part.keys, part.keys
        for place, x, share in zip(places, grads, differentiate(part), strict=True):
            place.add(x, share)


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Callable[[Part], tuple[Tensor, Tensor]]:
    """Return a function that attends within a part, by flash attention."""
    v_dim, width = v.shape[3], max(q.shape[3], v.shape[3])
    q, k, v = (widen(x, width) for x in (q, k, v))

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        keys = part.keys.take(k), part.keys.take(v)
        out, lse = flash_op(part.queries.take(q), *keys, 0.0, part.causal, scale=scale)
        return out[..., :v_dim], lse

    return attend


def flash_gradients(
    results: Results, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Callable[[Part], list[Tensor]]:
    """Return a function that computes the shares of a part in the gradients of q, k and v."""
    grad, grad_lse, out, lse = results
    dims = q.shape[3], k.shape[3], v.shape[3]
    width = max(dims)
    extra = 0 if grad_lse is None else _EXTRA
    grad, q, k, v, out = (widen(x, width + extra) for x in (grad, q, k, v, out))
    if grad_lse is not None:
        # A part's share of the score gradient is p * (grad @ v - grad @ out). A column of ones in
        # v, of zeros in out and of grad_lse in grad adds grad_lse to it: the derivative of lse.
        grad[..., width], v[..., width] = grad_lse, 1.0
    grad, out, lse = (x.contiguous() for x in (grad, out, lse))

    def differentiate(part: Part) -> list[Tensor]:
        part_q, part_grad, part_out, part_lse = map(part.queries.take, (q, grad, out, lse))
        # Over the heads of a group flash attention would sum in the dtype of k: eight heads of
        # bfloat16 lose two bits.
        keys = [part.keys.take(x) for x in (k, v)]
        group = part_q.shape[1] // keys[0].shape[1]
        keys = [x.repeat_interleave(group, dim=1) for x in keys]
        options = 0.0, part.causal
        dq, *dkv = _flash_backward(
            part_grad, part_q, *keys, part_out, part_lse, *options, scale=scale
        )
        dk, dv = (x.unflatten(1, (-1, group)).sum(2, dtype=lse.dtype) for x in dkv)
        return [x[..., :dim] for x, dim in zip((dq, dk, dv), dims, strict=True)]

    return differentiate


def widen(x: Tensor, width: int) -> Tensor:
    """Append zeros to vectors: flash attention takes queries, keys and values of one head_dim."""
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))


def _show_nonfinite(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    mods: Mods,
    scale: float,
) -> None:
    """Write infinities and NaN to `out`, computed of finite values, as one softmax yields them.

    In products a hidden key's weight of 0 would meet them. Instead we look for them by attention
    to marks in place of values: a query sees a marked key if the result is more than 0.
    """
    exact = partial(torch.Tensor.to, dtype=lse.dtype)
    bad_key = ~k.isfinite().all(3, keepdim=True)
    infinite = v.isinf()
    kinds = v.isnan(), v == math.inf, v == -math.inf, bad_key, torch.ones_like(bad_key)
    marks = exact(torch.cat(kinds, dim=3))
    alike = torch.zeros_like(q, dtype=lse.dtype), torch.zeros_like(k, dtype=lse.dtype)
    attend = products(*alike, marks, Mods(mask_mod=mods.mask_mod), 1.0)
    seen = _attend(attend, alike[0], marks, routing)[0] > 0
    nan, up, down = seen[..., :-2].chunk(3, dim=3)
    bad_keys, keys = seen[..., -2:].unbind(3)
    bad = bad_keys | (~q.isfinite().all(3) & keys)
    out += torch.where(up, math.inf, 0.0) - torch.where(down, math.inf, 0.0)
    out.masked_fill_(nan | (bad & (lse == -math.inf)).unsqueeze(3), math.nan)
    if mods.score_mod is None and mods.softcap is not None:
        return  # a soft cap leaves no score at -inf
    if infinite.any():  # a weight of zero, of a score of -inf, times infinity is NaN
        attend = products(q, k, exact(infinite), mods, scale, minus_infinity_alone=True)
        out.masked_fill_(_attend(attend, q, v, routing)[0] > 0, math.nan)


def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, routing, Mods(softcap=softcap or None), scale)


def _backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Tensor, ...],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    routing, mods = Routing.over(layout, *kept), Mods(softcap=softcap or None)
    dq, dk, dv = backward(grad, grad_lse, out, lse, q, k, v, routing, mods, scale)
    return dq, dk, dv


attend_cpu = attention_op("attend_cpu", _forward_op, _backward_op)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="no graph holds a score_mod or a mask_mod on cpu: plan='masked' takes them"
)
def attend_with_functions(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, mods: Mods, scale: float
) -> tuple[Tensor, Tensor]:
    """Do what `forward` does, with gradients; they flow to what `score_mod` captures, too."""
    inputs = q, k, v, routing, mods, scale, *captured_by(mods)
    result: tuple[Tensor, Tensor] = _AttendWithFunctions.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class _AttendWithFunctions(torch.autograd.Function):
    """Attention with functions, which no op takes, and with what they capture."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return forward(*inputs[:6])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *ctx.options = inputs[:6]
        ctx.save_for_backward(*output, q, k, v, *inputs[6:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        return only_once(_gradients_outside, ctx, grad, grad_lse)


def _gradients_outside(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
    out, lse, q, k, v, *captured = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    routing, mods, scale = ctx.options
    grads = backward(grad, grad_lse, out, lse, q, k, v, routing, mods, scale, captured)
    return *grads[:3], None, None, None, *grads[3:]


@torch.library.custom_op("moba_flex::show_spoilt", mutates_args=(), device_types="cpu")
def show_spoilt(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    queries: Tensor | None,
    extents: Tensor | None,
    block_size: int,
    causal: bool,
    seen: Tensor | None = None,
) -> Tensor:
    """Return FlexAttention's output `out`, with NaN in rows that see what is not finite.

    On CPU it gives zeros for rows of NaN, and is given finite values. This is an op because
    FlexAttention's template does not compile with an operation that follows it in its loops.

    The other arguments are those of `attend_cpu`, with q, k and v as they were given. `seen`, if
    there is a `mask_mod`, is more than 0 where a query sees a key or a value that is not finite,
    and where it sees any key: `[B, Hq, Q, 2 or more]`.
    """
    if all_finite(q, k, v):
        return out.clone()
    if seen is None:
        layout = Layout(q.shape[2], k.shape[2], block_size, causal, queries, extents)
        routing = Routing.over(layout, blocks)
        bad = sees_nonfinite(q, k, v, routing)
    else:
        bad = (seen[..., 0] > 0) | (~q.isfinite().all(3) & (seen[..., 1] > 0))
    return out.masked_fill(bad.unsqueeze(3), torch.nan)


show_spoilt.register_fake(lambda out, *_, **__: torch.empty_like(out))
show_spoilt.register_autograd(lambda ctx, grad: (grad, *(None,) * 9))


def attend_portable(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in PyTorch's own ops, for programs that run without Python; forward alone.

    One call of flash attention takes all own blocks, one takes tiles of regrouped queries, each
    with the keys of its block beside it. Copies are as large as `q` for each block that a query
    chooses; scores are never held. Rows that see what is not finite are NaN.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, D]`.
        routing: The chosen blocks, of one sequence a row.
        scale: Factor on the scores.

    Returns:
        Output `[B, Hq, Q, D]` and log-sum-exp `[B, Hq, Q]` in float32.
    """
    bad = sees_nonfinite(q, k, v, routing)
    q, k, v = map(finite, (q, k, v))
    q_len, size = routing.q_len, routing.block_size
    # Whole blocks of queries are many more than a few.
    few = isinstance(q_len, int) and isinstance(size, int) and 2 * q_len <= size
    out, lse = (_own_few if few else _own_blocks)(q, k, v, routing, scale)
    if routing.blocks.shape[3] > 0:
        pair_out, pair_lse = _chosen_tiles(q, k, v, routing, scale)
        lses = torch.cat((lse.unsqueeze(3), pair_lse), dim=3)
        weight = lses.softmax(dim=3).unsqueeze(4)
        mixed = out * weight[..., 0, :] + (pair_out * weight[..., 1:, :]).sum(3)
        out, lse = mixed.to(q.dtype), lses.logsumexp(dim=3)
    return out.masked_fill(bad.unsqueeze(3), torch.nan), lse.masked_fill(bad, torch.nan)


def _own_blocks(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with blocks of queries to their own keys, all blocks at once."""
    batch, _, q_len, _ = q.shape
    size, kv_len = routing.block_size, routing.kv_len
    start = routing.q_offset // size * size  # of the first query's block
    front = routing.q_offset - start
    blocks = ceil_div(kv_len - start, size)

    def by_block(x: Tensor, before: int) -> Tensor:
        x = F.pad(x, (0, 0, before, blocks * size - before - x.shape[2]))
        return x.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)

    def by_head(x: Tensor) -> Tensor:
        x = x.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
        # Not a slice, whose bounds would have to be proved in range of every length.
        return x.index_select(2, front + torch.arange(q_len, device=x.device))

    keys = (by_block(x[:, :, start:], 0) for x in (k, v))
    bias = None
    if not routing.causal:  # else no query sees what lies behind the last key
        block = torch.arange(blocks, device=q.device)[:, None] * size + start
        bias = bias_of(block + torch.arange(size, device=q.device) < kv_len, q.dtype)
        bias = bias.repeat(batch, 1)[:, None, None]
    out, lse = flash_op(
        by_block(q, front), *keys, 0.0, routing.causal, attn_mask=bias, scale=scale
    )
    return by_head(out), by_head(lse)


def _own_few(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with fewer queries than a block has keys to the one or two blocks they lie in."""
    size, kv_len, offset = routing.block_size, routing.kv_len, routing.q_offset
    start = offset // size * size
    key = start + torch.arange(kv_len - start, device=q.device)
    position = (offset + torch.arange(routing.q_len, device=q.device))[:, None]
    middle = start + size
    seen = (key < middle) == (position < middle)
    if routing.causal:
        seen = seen & (key <= position)
    keys = (x[:, :, start:] for x in (k, v))
    out, lse = flash_op(q, *keys, 0.0, False, attn_mask=bias_of(seen, q.dtype), scale=scale)
    return out, lse


def _chosen_tiles(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with each query to each of its blocks: `[B, Hq, Q, K - 1, D]`, `[B, Hq, Q, K - 1]`.

    Tiles hold queries that chose the same block of the same key/value head. The lists of all heads
    are one list, so that there are just as many tiles as are filled.
    """
    batch, num_kv_heads, kv_len, head_dim = k.shape
    size, num_blocks = routing.block_size, routing.num_blocks
    lists, tile = batch * num_kv_heads, max(size, _LEAST_TILE)
    pairs = sort_pairs(routing, num_kv_heads)
    count = pairs.first.diff(dim=2).flatten().long()  # by list and block, as all below
    first = pairs.first[..., :-1].flatten(0, 1)  # within its list
    number_of_list = torch.arange(lists, device=k.device).unsqueeze(1)
    first_pair = (first + number_of_list * pairs.row.shape[2]).flatten()
    stop = ceil_div(count, tile).cumsum(0)
    first_tile = stop - ceil_div(count, tile)
    # One number that the device finds, not an expression of the length that it would be at worst;
    # a last tile that is empty, for there may be none but that.
    tiles = cast(int, (stop[-1] + 1).item())
    torch._check(tiles >= 1)

    number = torch.arange(tiles, device=k.device)
    place = torch.searchsorted(stop, number, right=True).clamp(max=lists * num_blocks - 1)
    lane = torch.arange(tile, device=k.device)
    within = ((number - first_tile[place]) * tile).unsqueeze(1) + lane
    filled = within < count[place].unsqueeze(1)
    rank = torch.where(filled, within + first_pair[place].unsqueeze(1), 0)
    per_list = q.shape[1] // num_kv_heads * routing.q_len
    row = pairs.row.flatten()[rank] + (place // num_blocks * per_list).unsqueeze(1)
    slots = q.reshape(-1, head_dim)[row.flatten()].view(tiles, 1, tile, head_dim)

    def beside(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, num_blocks * size - kv_len))
        return x.reshape(-1, size, head_dim)[place].unsqueeze(1)

    bias = None
    if not routing.causal:  # else a block that is chosen is whole
        key = (place % num_blocks * size).unsqueeze(1) + torch.arange(size, device=k.device)
        bias = bias_of(key < kv_len, k.dtype)[:, None, None]
    out, lse = flash_op(slots, beside(k), beside(v), 0.0, False, attn_mask=bias, scale=scale)

    chosen = routing.blocks.reshape(lists, -1).clamp(max=num_blocks - 1).long()
    chosen = (chosen + number_of_list * num_blocks).flatten()
    rank = pairs.rank.flatten()
    slot = rank - first.flatten()[chosen] + first_tile[chosen] * tile
    slot = torch.where(rank >= 0, slot, 0)
    pair_lse = torch.where(rank >= 0, lse.flatten()[slot], -torch.inf)
    # Chosen, and not weighted by zero: where there is no pair there may be NaN.
    pair_out = torch.where((rank >= 0).unsqueeze(1), out.view(-1, head_dim)[slot].float(), 0.0)
    shape = routing.blocks.shape
    return pair_out.view(*shape, head_dim), pair_lse.view(shape)


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what flash attention adds to the scores of keys that are seen, and of others."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, -torch.inf)
