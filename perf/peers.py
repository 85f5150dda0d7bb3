"""Every implementation that is timed: one function each, which sets it up for a shape.

A peer takes the shape and the device and returns `attention(q, k, v) -> out` over `[B, H, S, D]`.
One that cannot run there raises `Unavailable` with the reason. Routing is always inside.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import create_moba_block_mask, moba_attention
from moba_flex.compile.flex import repeatable
from moba_flex.masks.layout import RowOptions
from perf.shapes import Shape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Setup = Callable[[Shape, torch.device], Attention]


class Unavailable(Exception):
    """Says why a peer cannot run here."""


@dataclass(frozen=True)
class Peer:
    """An implementation to time.

    Attributes:
        setup: Makes its attention function.
        sparse: Whether it computes MoBA; if not, dense causal attention.
        packed: Whether it wants `[B, S, H, D]` memory: its inputs are laid out so beforehand.
        trains_on: Devices on which it has a backward.
    """

    setup: Setup
    sparse: bool
    packed: bool = False
    trains_on: tuple[str, ...] = ("cpu", "cuda")


def moba_flex(shape: Shape, device: torch.device) -> Attention:
    """Set up the plan that this library takes by itself."""
    return _moba_flex(shape, device, "auto")


def moba_flex_routed(shape: Shape, device: torch.device) -> Attention:
    """Set up this library's plan that is made of FlexAttention."""
    if device.type != "cuda":
        raise Unavailable("on CPU this is what moba_flex takes by itself")
    return _moba_flex(shape, device, "routed")


def _moba_flex(shape: Shape, device: torch.device, plan: Literal["auto", "routed"]) -> Attention:
    options: dict[str, Any] = {"block_size": shape.block_size, "top_k": shape.top_k}
    options |= {"softcap": shape.softcap, **layout(shape, device)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, plan=plan, **options)

    return attend


def layout(shape: Shape, device: torch.device) -> RowOptions:
    """Return what tells moba_flex that a row is packed of documents, or padded."""
    if shape.documents:
        starts = range(0, shape.seq_len + 1, shape.length)
        return {"cu_seqlens": torch.tensor(starts, dtype=torch.int32, device=device)}
    if shape.padding:
        real = torch.arange(shape.seq_len, device=device) >= shape.padding
        return {"key_mask": real.repeat(shape.batch, 1)}
    return {}


def flex_moba(shape: Shape, device: torch.device) -> Attention:
    """Set up FlexAttention over this library's block mask, queries in natural order."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_moba_block_mask(q, k, block_size=shape.block_size, top_k=shape.top_k)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=is_grouped(shape))
        assert isinstance(out, Tensor)
        return out

    return _compiled(attend)


def flex_causal(shape: Shape, device: torch.device) -> Attention:
    """Set up FlexAttention over a causal block mask, which is made once, outside the clock."""
    mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
        None,
        None,
        shape.seq_len,
        shape.seq_len,
        device=str(device),
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=is_grouped(shape))
        assert isinstance(out, Tensor)
        return out

    return _compiled(attend)


def _compiled(attend: Attention) -> Attention:
    # Backward is timed many times.
    return torch.compile(attend, fullgraph=True, dynamic=False, backend=repeatable)


def sdpa_flash(shape: Shape, device: torch.device) -> Attention:
    """Set up PyTorch's flash attention, the default on CPU."""
    return _sdpa(shape, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(shape: Shape, device: torch.device) -> Attention:
    """Set up cuDNN's attention through PyTorch."""
    if device.type != "cuda":
        raise Unavailable("cuDNN needs a CUDA device")
    return _sdpa(shape, SDPBackend.CUDNN_ATTENTION)


def _sdpa(shape: Shape, backend: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=is_grouped(shape)
                )
        except RuntimeError as reason:
            if "No available kernel" not in str(reason):
                raise
            raise Unavailable(f"{backend} takes no such inputs") from reason

    return attend


def flash_moba(shape: Shape, device: torch.device) -> Attention:
    """Set up FlashMoBA (mit-han-lab/flash-moba)."""
    attend = _imported("flash_moba", "flash_moba_varlen_func", device)
    starts = _starts(shape, device)
    length = shape.seq_len
    sizes = (starts, starts, length, length, shape.block_size, shape.top_k)
    return _packed(shape, lambda q, k, v: attend(q, k, v, *sizes, causal=True))


def moonshot_moba(shape: Shape, device: torch.device) -> Attention:
    """Set up the original (MoonshotAI/MoBA, its efficient version)."""
    attend = _imported("moba.moba_efficient", "moba_attn_varlen", device)
    if is_grouped(shape):
        raise Unavailable("MoonshotAI/MoBA wants as many key heads as query heads")
    sizes = (_starts(shape, device), shape.seq_len, shape.block_size, shape.top_k)
    return _packed(shape, lambda q, k, v: attend(q, k, v, *sizes))


def flag_attention(shape: Shape, device: torch.device) -> Attention:
    """Set up FlagAttention's Triton MoBA (flagos-ai/FlagAttention)."""
    attend = _imported("flag_attn.FLA.moba", "parallel_moba", device)
    sizes = (_starts(shape, device), shape.seq_len, shape.block_size, shape.top_k)
    return _packed(shape, lambda q, k, v: attend(q, k, v, *sizes))


def fla(shape: Shape, device: torch.device) -> Attention:
    """Set up flash-linear-attention's MoBA (fla-org/flash-linear-attention)."""
    attend = _imported("fla.ops.moba", "parallel_moba", device)
    if is_grouped(shape):
        raise Unavailable("flash-linear-attention wants as many key heads as query heads")
    sizes = (_starts(shape, device), shape.seq_len, shape.block_size, shape.top_k)
    return _packed(shape, lambda q, k, v: attend(q[None], k[None], v[None], *sizes)[0])


PEERS = {
    "moba_flex": Peer(moba_flex, sparse=True),
    "moba_flex, plan routed": Peer(moba_flex_routed, sparse=True),
    "FlexAttention, MoBA mask": Peer(flex_moba, sparse=True, trains_on=("cuda",)),
    "FlexAttention, causal": Peer(flex_causal, sparse=False, trains_on=("cuda",)),
    "SDPA flash, causal": Peer(sdpa_flash, sparse=False),
    "SDPA cuDNN, causal": Peer(sdpa_cudnn, sparse=False),
    "FlashMoBA": Peer(flash_moba, sparse=True, packed=True),
    "MoonshotAI MoBA": Peer(moonshot_moba, sparse=True, packed=True),
    "FlagAttention": Peer(flag_attention, sparse=True, packed=True),
    "flash-linear-attention": Peer(fla, sparse=True, packed=True),
}


def is_grouped(shape: Shape) -> bool:
    """Say whether query heads share key heads."""
    return shape.num_heads != shape.num_kv_heads


def _imported(module: str, name: str, device: torch.device) -> Callable[..., Any]:
    if device.type != "cuda":
        raise Unavailable(f"{module} needs a CUDA device")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as reason:
        raise Unavailable(f"{module} is not installed: {reason}") from reason
    return function


def _starts(shape: Shape, device: torch.device) -> Tensor:
    """First token of each sequence of the pack, and the end."""
    ends = (shape.batch + 1) * shape.seq_len
    return torch.arange(0, ends, shape.seq_len, dtype=torch.int32, device=device)


def _packed(shape: Shape, attend: Attention) -> Attention:
    """Pass `[B * S, H, D]`, a view of inputs whose memory is `[B, S, H, D]`."""

    def attend_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)))
        return out.unflatten(0, (shape.batch, shape.seq_len)).transpose(1, 2)

    return attend_packed
