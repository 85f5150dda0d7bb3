"""What each plan can serve."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moba_flex.compile.plans import interpreted
from moba_flex.masks.gradients import is_transformed
from moba_flex.masks.mods import Mods

# What FlexAttention and this library compile kernels for.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSED_HEAD_DIM = 256


def check_flex(q: Tensor, k: Tensor, v: Tensor, lse: bool, plan: str) -> None:
    """Raise if FlexAttention on the device of `q` cannot do what is asked."""
    device = q.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"q must be on cpu or cuda for plan={plan!r}, got {device}")
    if is_transformed():
        raise ValueError(
            f"plan must be one without FlexAttention under torch.func, got {plan!r} on {device}: "
            "let plan be 'auto', or use backward"
        )
    _check_dtype(q)
    for name, x in (("q", q), ("v", v)):
        if device == "cuda" and x.shape[3] < 16:
            raise ValueError(
                f"{name} must have a head_dim of at least 16 on cuda, got {x.shape[3]}: pad it"
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


def check_fused(q: Tensor, v: Tensor, mods: Mods | None) -> None:
    """Raise if the kernels of the fused plan cannot do what is asked."""
    if q.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"q must be on cuda for plan='fused', got {q.device.type}: let plan be 'auto'"
        )
    _check_dtype(q)
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] > FUSED_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head_dim of at most {FUSED_HEAD_DIM} for plan='fused', got "
                f"{x.shape[3]}: let plan be 'routed'"
            )
    for name in ("score_mod", "mask_mod"):
        if mods is not None and getattr(mods, name) is not None:
            raise ValueError(
                f"{name} must be None for plan='fused', got a function: let plan be 'routed'"
            )


def check_export(q: Tensor, tensors: Mapping[str, object], mods: Mods | None) -> None:
    """Raise if a package cannot do what is asked.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        tensors: What else there may be, None or not, by name.
        mods: Changes to scores.
    """
    _check_dtype(q)  # PyTorch 2.11 miscompiles the gate of float64 inputs
    if q.device.type != "cpu":
        return
    names = {
        "queries": "cu_seqlens and key_mask",
        "extents": "cu_seqlens and key_mask",
        "blocks": "routing",
        "mods": "softcap, score_mod and mask_mod",
    }
    for name, given in {**tensors, "mods": mods}.items():
        if given is not None:
            name = names.get(name, name)
            raise ValueError(
                f"{name} must be None in a package for cpu, got some: export for cuda"
            )


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in _KERNEL_DTYPES:
        names = " or ".join(map(str, _KERNEL_DTYPES))
        raise TypeError(f"q must be {names} on {q.device.type}, got {q.dtype}: convert q, k and v")
