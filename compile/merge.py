"""Between natural and regrouped order, forward and backward by gathers alone.

Every regrouping is a permutation of pairs whose inverse is known, so what autograd would do with
an atomic scatter is a gather with the inverse: deterministic, and several times faster on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from moba_flex.masks.regroup import Regrouping


def gather_rows(x: Tensor, groups: Regrouping) -> Tensor:
    """Put rows into slots: `[B, Hkv, R, D]` to `[B, Hkv, S, D]`, zeros in empty slots."""
    out: Tensor = _GatherRows.apply(x, groups.row, groups.slot)  # type: ignore[no-untyped-call]
    return out


def merge_parts(
    own_out: Tensor, own_lse: Tensor, routed_out: Tensor, routed_lse: Tensor, groups: Regrouping
) -> tuple[Tensor, Tensor]:
    """Join attention to the own block and attention of the pairs into one softmax.

    Args:
        own_out: Output of each row's own block, `[B, Hkv, R, D]`.
        own_lse: Log-sum-exp of each row's own block, `[B, Hkv, R]`.
        routed_out: Output of the pair in each slot, `[B, Hkv, S, D]`.
        routed_lse: Log-sum-exp of the pair in each slot, `[B, Hkv, S]`.
        groups: Where the pairs lie.

    Returns:
        Output `[B, Hkv, R, D]` and log-sum-exp `[B, Hkv, R]` over all.
    """
    parts = own_out, own_lse, routed_out, routed_lse
    merged: tuple[Tensor, Tensor] = _MergeParts.apply(  # type: ignore[no-untyped-call]
        *parts, groups.row, groups.slot
    )
    return merged


def _take(x: Tensor, index: Tensor, default: float = 0.0) -> Tensor:
    """Take values of `x` `[B, H, n]` at `index`, in float32; `default` where it is -1."""
    taken = x.gather(2, index.flatten(2).long().clamp(min=0)).view(index.shape)
    return torch.where(index >= 0, taken.float(), default)


def _take_vectors(x: Tensor, index: Tensor) -> Tensor:
    """Take vectors of `x` `[B, H, n, D]` at `index`, in float32; 0 where it is -1.

    Zero, and not the product with a zero weight: a slot that holds nothing may hold NaN.
    """
    at = index.flatten(2).long().clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
    taken = x.gather(2, at).view(*index.shape, x.shape[3])
    return torch.where(index.unsqueeze(-1) >= 0, taken.float(), 0.0)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return _take_vectors(x, row).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        return _take_vectors(grad, slot).sum(3).to(grad.dtype), None, None


class _MergeParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own_out: Tensor,
        own_lse: Tensor,
        routed_out: Tensor,
        routed_lse: Tensor,
        row: Tensor,
        slot: Tensor,
    ) -> tuple[Tensor, Tensor]:
        pair_lse = _take(routed_lse, slot, default=-torch.inf)
        largest = torch.maximum(own_lse, pair_lse.amax(3))
        own_weight = torch.exp(own_lse - largest)
        pair_weight = torch.exp(pair_lse - largest.unsqueeze(3))
        total = own_weight + pair_weight.sum(3)
        out = own_out * own_weight.unsqueeze(3)
        out = out + (_take_vectors(routed_out, slot) * pair_weight.unsqueeze(4)).sum(3)
        out = (out / total.unsqueeze(3)).to(own_out.dtype)
        lse = largest + torch.log(total)
        ctx.save_for_backward(own_out, own_lse, routed_out, routed_lse, row, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        own_out, own_lse, routed_out, routed_lse, row, out, lse = ctx.saved_tensors
        # With w = exp(part_lse - lse): d out / d part_out = w, and d out / d part_lse = w *
        # (part_out - out).
        gain = grad_lse - (grad.float() * out.float()).sum(3)
        own_weight = torch.exp(own_lse - lse)
        own_grad = (grad * own_weight.unsqueeze(3)).to(own_out.dtype)
        own_grad_lse = own_weight * ((grad.float() * own_out.float()).sum(3) + gain)

        weight = torch.where(row >= 0, torch.exp(routed_lse - _take(lse, row)), 0.0)
        row_grad = _take_vectors(grad, row)
        routed_grad = (row_grad * weight.unsqueeze(3)).to(routed_out.dtype)
        routed_grad_lse = weight * ((row_grad * routed_out.float()).sum(3) + _take(gain, row))
        return (
            own_grad,
            own_grad_lse,
            routed_grad,
            torch.where(row >= 0, routed_grad_lse, 0.0),
            None,
            None,
        )
