"""Moves between natural and regrouped order, forward and backward by gathers alone.

A regrouping is a permutation of pairs whose inverse is known. So backward gathers by the inverse,
where autograd would scatter with atomics: gathers are deterministic, and several times faster on a
GPU.

Lists are flattened into one dimension of rows or slots: if the inner dimensions of an intermediate
are odd, inductor pads its strides, and PyTorch 2.11 then reads some intermediates with the
unpadded ones (pytorch/pytorch#194281). Values in one dimension, and vectors in two, have no
strides to pad.
"""

from typing import Any

import torch
from torch import Tensor

from moba_flex.masks.regroup import Regrouping


def gather_rows(x: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """Put rows into slots: `[B, H, R, D]` to `[B, H, S, D]`, zeros in empty slots.

    Args:
        x: The rows.
        row: The row in each slot, `[B, H, S]`; -1 in empty ones.
        slot: The slots of each row, `[B, H, R, n]`; -1 for none.
    """
    out: Tensor = _GatherRows.apply(x, row, slot)  # type: ignore[no-untyped-call]
    return out


def merge_parts(
    own_out: Tensor, own_lse: Tensor, routed_out: Tensor, routed_lse: Tensor, groups: Regrouping
) -> tuple[Tensor, Tensor]:
    """Join attention to the own block and attention of the pairs into one softmax.

    A part that sees no key has log-sum-exp -inf, and its output is not used, even if it is NaN.

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
    """Gather values or vectors from each list, flattened over lists, as float32.

    Args:
        x: Values `[B, H, n]` or vectors `[B, H, n, D]`.
        index: Places `[B, H, ...]` in the list; -1 for none.
        default: The result where there is none; never multiplied by zero, since an empty slot may
            hold NaN.

    Returns:
        Values `[index.numel()]` or vectors `[index.numel(), D]`.
    """
    start = torch.arange(index.shape[0] * index.shape[1], device=index.device) * x.shape[2]
    place = index.clamp(min=0).flatten(0, 1).flatten(1) + start.unsqueeze(1)
    found = (index >= 0).flatten()
    if x.dim() == 4:
        found = found.unsqueeze(1)
    return torch.where(found, x.flatten(0, 2)[place.flatten()].float(), default)


def _weigh(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply values or vectors by weights; a weight of 0 gives 0, even times NaN."""
    weight = weight.view(*weight.shape, *(1,) * (x.dim() - weight.dim()))
    return torch.where(weight == 0, 0.0, x * weight)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return _take(x, row).to(x.dtype).view(*row.shape, x.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        picks = slot.shape[3]
        taken = _take(grad, slot).unflatten(0, (-1, picks))
        return taken.sum(1).to(grad.dtype).view(*slot.shape[:3], grad.shape[3]), None, None


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
        picks, head_dim = slot.shape[3], own_out.shape[3]
        own_flat, own_vectors = own_lse.flatten(), own_out.flatten(0, 2)
        pair_lse = _take(routed_lse, slot, default=-torch.inf).view(-1, picks)
        largest = torch.maximum(own_flat, pair_lse.amax(1))
        largest = torch.where(largest == -torch.inf, 0.0, largest)
        own_weight = torch.exp(own_flat - largest)
        pair_weight = torch.exp(pair_lse - largest.unsqueeze(1))
        total = own_weight + pair_weight.sum(1)
        pair_out = _take(routed_out, slot).view(-1, picks, head_dim)
        mixed = _weigh(pair_out, pair_weight).sum(1) + _weigh(own_vectors, own_weight)
        count = torch.where(total == 0, 1.0, total)
        out = (mixed / count.unsqueeze(1)).to(own_out.dtype).view(own_out.shape)
        lse = (largest + torch.log(total)).view(own_lse.shape)
        ctx.save_for_backward(own_out, own_lse, routed_out, routed_lse, row, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        own_out, own_lse, routed_out, routed_lse, row, out, lse = ctx.saved_tensors
        # With w = exp(part_lse - lse): d out / d part_out = w, and d out / d part_lse = w *
        # (part_out - out).
        vectors = grad.flatten(0, 2)
        gain = grad_lse.flatten() - (vectors.float() * out.flatten(0, 2).float()).sum(1)
        lse = torch.where(lse == -torch.inf, torch.inf, lse)  # rows that see no key: weight 0
        own_weight = torch.exp(own_lse.flatten() - lse.flatten())
        own_grad = (vectors * own_weight.unsqueeze(1)).to(own_out.dtype)
        own_share = (vectors.float() * own_out.flatten(0, 2).float()).sum(1)
        own_grad_lse = _weigh(own_share + gain, own_weight)

        filled = row.flatten() >= 0
        weight = torch.where(filled, torch.exp(routed_lse.flatten() - _take(lse, row)), 0.0)
        row_grad = _take(grad, row)
        routed_grad = (row_grad * weight.unsqueeze(1)).to(routed_out.dtype)
        routed_share = (row_grad * routed_out.flatten(0, 2).float()).sum(1)
        row_gain = _take(gain.view(lse.shape), row)
        routed_grad_lse = _weigh(routed_share + row_gain, weight)
        return (
            own_grad.view(own_out.shape),
            own_grad_lse.view(own_lse.shape),
            routed_grad.view(routed_out.shape),
            routed_grad_lse.view(routed_lse.shape),
            None,
            None,
        )
