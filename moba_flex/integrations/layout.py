"""What transformers says of padding and packed documents, as `moba_attention` takes it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

Layout = dict[str, Tensor]
"""The arguments of `moba_attention` that say where documents or padding lie."""

_seen: tuple[weakref.ref[Tensor], Tensor | None] | None = None


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Say what a call masks.

    None: nothing but the future. Bool `[B, KV]`: padding, as `moba_attention` takes it. Int
    `[docs + 1]`: where packed documents start if the rows are laid one after another; int `[B, Q]`
    in a compiled model: not zero where one starts within a row. `[B, 1, Q, KV]`: a windowed or
    cached call gets transformers' own mask, which the attention passes on or refuses.
    """
    # A tensor is the offset of a StaticCache, which has as many keys as queries only if empty.
    shifted = isinstance(q_offset, int) and q_offset != 0
    if local_size is not None or q_length != kv_length or shifted:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a StaticCache's is a tensor
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )

    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        # Packed documents come as and_masks(...); what comes in other ways cannot be looked into.
        if use_vmap or getattr(mask_function, "__name__", "") != "and_mask":
            raise ValueError(
                "attention must be plain causal or bidirectional, got a mask function of the "
                "model's own: use attn_implementation='sdpa'"
            )
        rows = torch.arange(batch_size, device=device)[:, None]
        positions = torch.arange(q_length, device=device)[None, :]
        before = (positions - 1).clamp(min=0)
        return _documents(~mask_function(rows, rows * 0, positions, before))
    if attention_mask is None:
        return None
    # A compiled graph cannot look, and takes all masks for padding.
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    _require(
        (attention_mask.int().diff(dim=1) == 1).sum(1) + attention_mask[:, 0] <= 1,
        "attention_mask must hold one run of ones a row, got several: pad on the left, on the "
        "right or on both sides",
    )
    return attention_mask


def _documents(starts: Tensor) -> Tensor | None:
    """Return where documents start, given at which positions within a row, bool `[B, Q]`.

    A compiled model, for which transformers takes all position_ids for packed ones, cannot look:
    it returns `starts`, as int.
    """
    if torch.compiler.is_compiling():
        return starts.int()
    if not starts.any():
        return None
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()


def _documents_of(position_ids: Tensor, batch: int) -> Tensor | None:
    """Return where documents start by position_ids `[1 or B, Q]`, which then do not follow on.

    Not all models tell `mask`, and with a cache none does. All layers of a call get the same
    tensor, which is looked at once.
    """
    global _seen
    compiling = torch.compiler.is_compiling()
    if not compiling and _seen is not None and _seen[0]() is position_ids:
        return _seen[1]
    starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0)).expand(batch, -1)
    documents = _documents(starts.clone())
    if not compiling:
        _seen = weakref.ref(position_ids), documents
    return documents


def _require(condition: Tensor, message: str) -> None:
    """Raise unless all of `condition` holds; a compiled graph asserts it, as it cannot look."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        raise ValueError(message)


def layout_of(q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Layout:
    """Return where documents or padding lie, as the caller or `mask` says."""
    starts, q_starts = kwargs.get("cu_seq_lens_k"), kwargs.get("cu_seq_lens_q")
    if starts is None and q_starts is None:
        position_ids = kwargs.get("position_ids")
        sizes = q.shape[2:3], k.shape[2:3]  # of text alone: images have positions of three parts
        if mask is None and position_ids is not None and sizes == (position_ids.shape[1:],) * 2:
            mask = _documents_of(position_ids, q.shape[0])
        if mask is None:
            return {}
        if mask.dtype == torch.bool:
            return {"key_mask": mask}
        if mask.dim() == 1:
            return {"cu_seqlens": mask}
        # How many documents there are, and so what shape cu_seqlens has, a graph cannot ask.
        torch._assert_async(
            ~mask.any(),
            "position_ids must hold one document a row in a compiled model, got packed "
            "documents: pass cu_seq_lens_q and cu_seq_lens_k too",
        )
        return {}

    if not isinstance(starts, Tensor) or not isinstance(q_starts, Tensor):
        raise TypeError(
            "cu_seq_lens_q and cu_seq_lens_k must be Tensors, got "
            f"{type(q_starts).__name__} and {type(starts).__name__}"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q must come with a batch of 1, got {q.shape[0]} rows: "
            "flatten them into one"
        )
    if mask is not None and mask.dtype == torch.bool:
        raise ValueError(
            "attention_mask must be None or all ones beside cu_seq_lens_q, got padding: "
            "leave it out of packed documents"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"cu_seq_lens_q must come with as many queries as keys, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys of a cache: pass use_cache=False"
        )
    return {"cu_seqlens": starts}


def one_row(x: Tensor) -> Tensor:
    """Lay the rows of a batch `[B, H, L, D]` one after another, `[1, H, B * L, D]`."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def within_documents(pairs: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return a mask `[B, 1, L, L]` with other documents masked too; rows are as in `one_row`."""
    batch, _, length, _ = pairs.shape
    place = torch.arange(batch * length, device=pairs.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, place, right=True).view(batch, 1, length)
    return pairs & (document.unsqueeze(3) == document.unsqueeze(2))
