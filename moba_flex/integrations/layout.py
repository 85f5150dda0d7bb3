"""Padding and packed documents of a transformers model, as arguments of `moba_attention`.

A caller may mark documents in several ways (*signals*, such as `position_ids`), and few of them
reach every attention layer. So the hooks of `listen` record the signals that a model is called
with. `mask`, which transformers calls in each forward, turns them into one layout. Transformers
passes this to the layers as their `attention_mask`, also when activation checkpointing runs a
layer again.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from moba_flex.masks.checks import is_readable, is_seen
from moba_flex.masks.layout import Slots

Layout = dict[str, Tensor]
"""The arguments of `moba_attention` that say where documents or padding lie."""

Signals = dict[str, Any]
"""The arguments of a forward that mark documents, by the names in `_SIGNALS`; None is left out."""

_SIGNALS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


class _Running(threading.local):
    """Arguments of the decoder call that runs in this thread; None if no such call runs.

    Attributes:
        signals: The signals.
        cache: The cache of keys and values.
        first: Slot of each row's first key in the cache, int `[B]`, if the mask tells.

    Not a ContextVar, which torch.compile cannot trace.
    """

    def __init__(self) -> None:
        self.signals: Signals | None = None
        self.cache: Any = None
        self.first: Tensor | None = None


_running = _Running()


@dataclass(frozen=True)
class _Enter:
    """A forward pre-hook that records signals and prepares the cache.

    Attributes:
        parameters: Names of the forward's arguments.
        prepare: Called with the decoder, its cache and its paged cache, if it has one of them.
    """

    parameters: tuple[str, ...]
    prepare: Callable[[nn.Module, Any, Any], None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        _running.signals = _signals(given)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            _running.signals["attention_mask"] = mask
        _running.cache, paged = given.get("past_key_values"), given.get("cache")
        if _running.cache is not None:
            _running.first = _first_slots(mask)
        if _running.cache is not None or paged is not None:
            self.prepare(module, _running.cache, paged)


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forget the recorded signals, after a forward."""
    _running.signals = _running.cache = _running.first = None


def running_cache() -> Any:
    """Return the cache of the decoder that runs in this thread; None if it has none."""
    return _running.cache


def first_slots() -> Tensor | None:
    """Return the slot of each row's first key in that cache, int `[B]`, if its mask tells."""
    return _running.first


def listen(decoder: nn.Module, prepare: Callable[[nn.Module, Any, Any], None]) -> None:
    """Record the signals that a decoder is called with, and let `prepare` see its caches."""
    # A constant key: `register_forward_pre_hook` makes a new one for each model, for which
    # torch.compile would compile anew.
    key: Any = "moba_flex"
    parameters = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    decoder._forward_pre_hooks[key] = _Enter(parameters, prepare)
    decoder._forward_pre_hooks_with_kwargs[key] = True
    decoder._forward_hooks[key] = _leave
    decoder._forward_hooks_always_called[key] = True


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
    """Return the mask of a call; its shape and dtype tell `layout_of` what it means.

    In a model that listens:

    - int `[1, 1, 1, 0]`: no documents and no padding.
    - bool `[B, 1, 1, KV]`: False for padding, as `key_mask` of `moba_attention`.
    - int `[docs + 1]`: `cu_seqlens` of packed documents, with the rows laid one after another.
    - int `[2, 1, docs + 1]`: `cu_seqlens_q` and `cu_seqlens`, if these differ.

    In another model: None or bool `[B, KV]`, for padding. Each layer then looks for signals among
    its own arguments.

    In both:

    - int `[3, B, 1, 1]`, in a call with cached keys: the `Slots` of the cache.
    - transformers' own mask `[B, 1, Q, KV]`, in a windowed call, or a cached one with a mask
      function of the model's own. The attention passes it on or refuses it.
    """
    signals = _running.signals
    if signals is not None and not _fits(signals, q_length):
        signals = None
    if signals is not None:
        # Accelerate moves a model's inputs to its device only after the hook.
        signals = {
            name: x.to(device) if isinstance(x, Tensor) else x for name, x in signals.items()
        }
        if "attention_mask" in signals:
            numbers = signals.pop("attention_mask")
            require(
                (numbers == 0) | (numbers == 1),
                "attention_mask must hold zeros and ones, got other numbers: number documents by "
                "seq_idx, or pass position_ids that restart",
            )
    sizes = batch_size, q_length
    real = None if attention_mask is None else attention_mask[:, -q_length:]
    # A tensor is the offset of a StaticCache; with as many keys as queries the cache is empty.
    shifted = isinstance(q_offset, int) and q_offset != 0
    cached = q_length != kv_length or shifted
    if local_size is not None or cached:
        if signals and cached:
            _refuse_documents_beside_cache(signals, real, sizes, kv_length)
        if cached and local_size is None and mask_function is causal_mask_function:
            return _mask_of_slots(attention_mask, batch_size, q_length, q_offset, device)
        if not cached and signals and (starts := _starts(signals, real, sizes)) is not None:
            _refuse_other_keys(signals)
            mask_function = _apart(mask_function, starts, real)
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        pairs = sdpa_mask(
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
        return pairs if pairs is not None or cached or signals is None else _nothing(device)

    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    # transformers marks packed documents by and_masks(...). Other functions cannot be inspected.
    if not plain and (use_vmap or getattr(mask_function, "__name__", "") != "and_mask"):
        raise ValueError(
            "attention must be plain causal or bidirectional, got a mask function of the "
            "model's own: use attn_implementation='sdpa'"
        )
    if real is not None and is_readable(real) and bool(real.all()):
        real = None
    if real is not None:
        require(
            (real.int().diff(dim=1) == 1).sum(1) + real[:, 0] <= 1,
            "attention_mask must hold one run of ones a row, got several: pad on the left, on the "
            "right or on both sides",
        )
    if signals is None:
        return real
    layout = _layout(signals, real, sizes)
    if "cu_seqlens_q" in layout:
        return torch.stack((layout["cu_seqlens_q"], layout["cu_seqlens"])).unsqueeze(1)
    if "cu_seqlens" in layout:
        return layout["cu_seqlens"]
    return _nothing(device) if real is None else real[:, None, None, :]


def layout_of(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
    sliding_window: int | None = None,
) -> tuple[Layout, Tensor | None]:
    """Return where documents or padding lie, and the mask `[B, 1, Q, KV]` of the call, if any.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        mask: The result of `mask`, or the caller's own mask `[B, 1, Q, KV]`, which overrides all
            signals.
        kwargs: Further arguments of the layer.
        sliding_window: The sliding window of the layer.

    Raises:
        ValueError: Signals contradict each other, or none reaches the layer.
        TypeError: A signal has the wrong type.
    """
    sizes, cached = (q.shape[0], q.shape[2]), q.shape[2] != k.shape[2]
    if mask is not None and mask.dtype == torch.int32:
        if mask.dim() == 4 and mask.shape[0] == 1:
            return {}, None
        if mask.dim() == 3:
            return {"cu_seqlens_q": mask[0, 0], "cu_seqlens": mask[1, 0]}, None
        if mask.dim() == 1:
            return {"cu_seqlens": mask}, None
    signals = _signals(kwargs)
    if mask is not None and mask.dim() == 4:
        if mask.dtype == torch.bool and mask.shape[2] == 1 and not cached:
            return {"key_mask": mask[:, 0, 0]}, None
        if sliding_window is not None and not cached and mask.dtype == torch.bool:
            # If `mask` got no signals, the window may reach into another document.
            starts = _marks(signals, None, sizes)
            if starts is not None:
                _refuse_other_keys(signals)
                document = starts.cumsum(1)[:, None]
                mask = mask & (document.unsqueeze(3) == document.unsqueeze(2))
        return {}, mask
    if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool or cached):
        raise ValueError(
            "attention_mask must come from the mask functions of transformers, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}: use attn_implementation='sdpa'"
        )
    if cached:
        _refuse_documents_beside_cache(signals, None, sizes, k.shape[2])
        return {}, None
    if not signals:
        raise ValueError(
            "position_ids must reach the attention layers, got none, so that packed documents "
            "would not be seen: call moba_flex.integrations.transformers.apply"
        )
    layout = _layout(signals, mask, sizes)
    return ({"key_mask": mask} if mask is not None and not layout else layout), None


def has_hooks(mask: Tensor | None) -> bool:
    """Whether the model of a layer listens.

    Args:
        mask: The layer's mask. Activation checkpointing runs layers outside of their model, and
            then the mask alone tells.
    """
    return _running.signals is not None or (mask is not None and mask.dim() != 2)


def slots_of(mask: Tensor | None) -> Slots | None:
    """Return where a cached call's keys and queries lie, if its mask comes from `mask`."""
    if mask is None or mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[0] != 3:
        return None
    return Slots(*mask[:, :, 0, 0])


def _mask_of_slots(
    attention_mask: Tensor | None,
    batch: int,
    q_len: int,
    q_offset: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    """Return `Slots` as a mask, int32 `[3, B, 1, 1]`; models may slice it."""
    query = torch.as_tensor(q_offset, device=device).int().expand(batch)
    start = torch.zeros_like(query) if attention_mask is None else _first_slots(attention_mask)
    assert start is not None
    start, stop = start.to(query.device), query + q_len
    if attention_mask is not None:
        slot = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        outside = (slot < start[:, None]) | (slot >= stop[:, None])
        require(
            outside | (attention_mask != 0),
            "attention_mask must hold ones from the first token on in a call with cached keys, "
            "got zeros between: pad on the left",
            wait=False,
        )
    return torch.stack((query, start, stop))[:, :, None, None]


def _first_slots(mask: Any) -> Tensor | None:
    """Return the slot of each row's first key, int32 `[B]`, if a mask of some kind tells."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if (slots := slots_of(mask)) is not None:
        return slots.start
    if mask.dim() != 2:
        return None
    return F.pad((mask != 0).int(), (0, 1), value=1).argmax(dim=1).int()


def one_row(x: Tensor) -> Tensor:
    """Lay the rows of a batch `[B, H, L, D]` one after another, `[1, H, B * L, D]`."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _signals(given: dict[str, Any]) -> Signals:
    return {name: given[name] for name in _SIGNALS if given.get(name) is not None}


def _nothing(device: torch.device | str) -> Tensor:
    """Return the mask that means no documents and no padding; models may slice it."""
    return torch.empty(1, 1, 1, 0, dtype=torch.int32, device=device)


def _fits(signals: Signals, length: int) -> bool:
    """Whether signals belong to a call of `length` tokens, not to an interrupted earlier one."""
    told = (signals.get(name) for name in _SIGNALS[:2])
    return all(x.shape[-1] == length for x in told if isinstance(x, Tensor))


def require(condition: Tensor, message: str, *, wait: bool = True) -> None:
    """Raise unless all of `condition` holds.

    If it cannot be read, or the host shall not wait for a GPU, the device asserts it.
    """
    if not (is_readable(condition) if wait else is_seen(condition)):
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        raise ValueError(message)


def _layout(signals: Signals, real: Tensor | None, sizes: tuple[int, int]) -> Layout:
    """Return the layout of packed documents; empty if no row holds several, even with padding.

    Args:
        signals: The signals.
        real: True for tokens that are not padding, bool `[B, L]`; None if there is no padding.
        sizes: B and L.
    """
    starts = _starts(signals, real, sizes)
    if "cu_seq_lens_k" in signals:
        keys, queries = signals["cu_seq_lens_k"].int(), signals["cu_seq_lens_q"].int()
        same = signals["cu_seq_lens_k"] is signals["cu_seq_lens_q"]
        same = same or (is_readable(keys) and torch.equal(keys, queries))
        return {"cu_seqlens": keys} if same else {"cu_seqlens_q": queries, "cu_seqlens": keys}
    if starts is None:
        return {}
    cuts = starts.clone()
    cuts[:, 0] = True
    if real is not None:  # each run of padding becomes a document
        cuts[:, 1:] |= real[:, 1:] != real[:, :-1]
    return {
        "cu_seqlens": F.pad(cuts.flatten().nonzero().flatten(), (0, 1), value=cuts.numel()).int()
    }


def _starts(signals: Signals, real: Tensor | None, sizes: tuple[int, int]) -> Tensor | None:
    """Return `_marks`, or None if no document starts behind another one.

    A graph cannot read how many documents there are, and so takes them from cu_seq_lens alone.
    """
    starts = _marks(signals, real, sizes)
    if starts is None or "cu_seq_lens_k" in signals:
        return starts
    if is_readable(starts):
        return starts if bool(starts.any()) else None
    require(
        ~starts,
        "position_ids must hold one document a row in a compiled model, got packed documents: "
        "pass cu_seq_lens_q and cu_seq_lens_k too",
    )
    return None


def _marks(signals: Signals, real: Tensor | None, sizes: tuple[int, int]) -> Tensor | None:
    """Return where a document starts behind another one in its row, bool `[B, L]`.

    Raises:
        ValueError: Two signals contradict each other.
        TypeError: A signal is no Tensor.
    """
    marks: Tensor | None = None
    within = None if real is None else real & F.pad(real[:, :-1], (1, 0))
    if "cu_seq_lens_q" in signals or "cu_seq_lens_k" in signals:
        marks, within = _marks_of_cu_seq_lens(signals, sizes)
        if real is not None:
            require(
                real | ~within,
                "attention_mask must be None or all ones beside cu_seq_lens_q, got padding: "
                "leave it out of packed documents",
            )
    for name in ("seq_idx", "position_ids"):
        if name not in signals:
            continue
        found = _marks_of(name, signals[name], sizes)
        if within is not None:
            found = found & within
        if marks is None:
            marks = found
            continue
        agree = (found == (marks if within is None else marks & within)).all()
        # Positions without a restart mark nothing: models fill them in if the caller gives none.
        require(
            agree | ~found.any() if name == "position_ids" else agree,
            f"{name} must start documents where cu_seq_lens_q or seq_idx does, got other places: "
            "pass one of them",
        )
    return marks


def _marks_of(name: str, x: Any, sizes: tuple[int, int]) -> Tensor:
    """Return where position_ids do not rise by 1, or where seq_idx changes, bool `[B, L]`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dim() == 3 and x.shape[0] == 4:
        x = x[0]  # row 0 holds positions in the text, rows 1 to 3 those in time, height and width
    if x.dim() not in (2, 3) or x.shape[-1] != sizes[1] or x.shape[-2] not in (1, sizes[0]):
        raise ValueError(
            f"{name} must have shape [B, L] = {sizes}, or three parts of it, got {tuple(x.shape)}"
        )
    if x.dim() == 3:  # positions in time, height and width need not rise by 1
        starts = (x[..., 1:] == 0).all(0)
    else:
        starts = x.diff(dim=1) != (1 if name == "position_ids" else 0)
    return F.pad(starts, (1, 0)).expand(sizes)


def _marks_of_cu_seq_lens(signals: Signals, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return where documents start behind another, and what lies before the last one's end."""
    queries, keys = signals.get("cu_seq_lens_q"), signals.get("cu_seq_lens_k")
    if not isinstance(keys, Tensor) or not isinstance(queries, Tensor):
        raise TypeError(
            "cu_seq_lens_q and cu_seq_lens_k must be Tensors, got "
            f"{type(queries).__name__} and {type(keys).__name__}"
        )
    if sizes[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q must come with a batch of 1, got {sizes[0]} rows: "
            "flatten them into one"
        )
    if queries.shape != keys.shape or queries.dim() != 1:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must have the same shape [documents + 1], got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    places = torch.arange(sizes[1], device=queries.device)
    starts = F.pad(torch.zeros_like(places, dtype=torch.bool), (0, 1))
    starts = starts.index_fill(0, queries.clamp(0, sizes[1]).long(), True)[:-1] & (places > 0)
    return starts[None], (places < queries[-1])[None]


def _refuse_documents_beside_cache(
    signals: Signals, real: Tensor | None, sizes: tuple[int, int], kv_len: int
) -> None:
    """Raise if a call with cached keys has signals of packed documents."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in signals:
            raise ValueError(
                f"{name} must come with as many queries as keys, got {sizes[1]} queries and "
                f"{kv_len} keys of a cache: pass use_cache=False"
            )
    if sizes[1] > 1 and (marks := _marks(signals, real, sizes)) is not None:
        require(
            ~marks,
            "position_ids must go on in a call with cached keys, got packed documents: "
            "pass use_cache=False",
        )


def _refuse_other_keys(signals: Signals) -> None:
    """Raise if queries and keys of documents differ, which the mask of a window cannot express."""
    queries: Tensor | None = signals.get("cu_seq_lens_q")
    if queries is not None:
        require(
            queries.eq(signals["cu_seq_lens_k"]),
            "cu_seq_lens_q must equal cu_seq_lens_k in a layer with a window, got other places",
        )


def _apart(
    mask_function: Callable[..., Any], starts: Tensor, real: Tensor | None
) -> Callable[..., Any]:
    """Return `mask_function`, confined to documents unless transformers has done so already."""
    batch, length = starts.shape
    rows = torch.arange(batch, device=starts.device)[:, None]
    places = torch.arange(length, device=starts.device)[None, :]
    crosses = (mask_function(rows, rows * 0, places, (places - 1).clamp(min=0)) & starts).any()
    document = starts.cumsum(1)
    # Chunked attention counts from the start of a document; for transformers that follows padding.
    padding = rows * 0 if real is None else (real.cumsum(1) == 0).sum(1, keepdim=True)
    first = torch.where(starts | (places == padding), places, 0).cummax(1).values
    position = (places - first + padding).clamp(max=length - 1)

    def within(batch: Any, head: Any, q: Any, k: Any) -> Any:
        same = document[batch, q] == document[batch, k]
        moved = mask_function(batch, head, position[batch, q], position[batch, k])
        return torch.where(crosses, same & moved, mask_function(batch, head, q, k))

    return within
