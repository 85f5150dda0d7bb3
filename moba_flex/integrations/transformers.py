"""`attn_implementation="moba_flex"` for Hugging Face models.

    model = AutoModelForCausalLM.from_pretrained(...)
    apply(model, MoBAConfig(block_size=512, top_k=3, dense_layers=(0, -1)))

Prefill and training are then Mixture of Block Attention. Supported are

- padded batches (`attention_mask` `[B, KV]`), where blocks start at the first real token of a row;
- packed documents, where blocks start at the first token of a document: `position_ids` that
  restart, or `cu_seq_lens_q` and `cu_seq_lens_k`, as from `DataCollatorWithFlattening`, which a
  compiled model needs;
- soft caps (Gemma 2) and learned sinks (GPT-OSS);
- models that choose blocks themselves and hand the attention their `block_indices` (MiniMax-M3):
  such layers attend to these blocks, and the gate serves the model's other layers.

A layer with a sliding window has few keys to choose from: name it in `dense_layers`, and it keeps
its own attention. Calls that cannot be computed exactly, such as with dropout or with the caller's
own mask, raise a ValueError with a remedy; nothing falls back silently.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_flex.attention import attend, moba_attention
from moba_flex.config import MoBAConfig
from moba_flex.integrations.cache import adopt, blocks_of
from moba_flex.integrations.layout import (
    Layout,
    has_hooks,
    layout_of,
    listen,
    mask,
    one_row,
    require,
    running_cache,
    slots_of,
)
from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks._torch.inputs import cast_by_autocast, numbers_beside
from moba_flex.masks.checks import is_readable
from moba_flex.masks.layout import Layout as BlockLayout
from moba_flex.masks.layout import Slots, ceil_div, locate, locate_slots
from moba_flex.masks.request import Request, cached_request, given_request
from moba_flex.masks.routing import Routing

Model = TypeVar("Model", bound=PreTrainedModel)

_logger = logging.getLogger(__name__)

NAME = "moba_flex"
"""The `attn_implementation`, and the attribute of a model's config that holds the options.

To import this module makes the name known to transformers.
"""

Observer = Callable[[int | None, Tensor, Tensor, Tensor, float | None, MoBAConfig, Layout], None]
"""Called with `layer_idx`, q `[B, Hq, Q, D]`, k and v `[B, Hkv, Q, D]`, scale, config and layout.

A batch of packed documents comes flattened into one row, with `B` of 1.
"""

_default: MoBAConfig | None = None
_last: tuple[dict[str, Any], MoBAConfig] | None = None  # options that were read, and their config
_observers: list[Observer] = []

# Arguments that transformers may pass to an attention function, and what is needed instead.
_UNSUPPORTED = {
    "sinks": "learned sinks as s_aux alone",
    "position_bias": "no position bias on the scores",
    "head_mask": "no head mask",
    "indices": "no other sparse attention",
    "cache": "no paged cache outside of moba_flex.integrations.batching.continuous_batching",
    "output_attentions": "output_attentions=False, for attention weights are never formed",
}

# Arguments of layers that attention does not need, or that repeat others. Only these are ignored.
_IGNORED = {
    *("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("use_cache", "cache_position", "past_key_values", "past_key_value", "cache_params"),
    *("input_ids", "inputs_embeds", "token_type_ids", "per_layer_inputs", "position_embeddings"),
    *("labels", "shift_labels", "num_items_in_batch", "ignore_index", "vocab_size"),
    *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
    *("debug_io", "deterministic", "kernel_options"),
}
_IGNORED_OF_MEDIA = (
    *("pixel_", "image_", "images_", "video_", "vision_", "visual_", "spatial_", "deepstack_"),
    *("audio_", "input_features", "input_values", "feature_", "mm_"),
)

# Parts of attention layers that choose keys or change scores, and read the mask to do so.
_OWN_SPARSE = ("indexer", "compressor", "prepare_dynamic_mask")


def register(default: MoBAConfig | None = None) -> None:
    """Let models whose config carries no options have `attn_implementation="moba_flex"`.

    Args:
        default: Options for such models; None for an error.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register(MoBAConfig(block_size=16, top_k=2))
        >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2)
        >>> config = LlamaConfig(**sizes, **heads, attn_implementation="moba_flex")
        >>> model = LlamaForCausalLM(config)
        >>> model(torch.randint(64, (1, 100))).logits.shape
        torch.Size([1, 100, 64])
    """
    global _default
    _default = default


def apply(model: Model, config: MoBAConfig | None = None) -> Model:
    """Switch a model to Mixture of Block Attention, in place.

    In a multimodal model only the text part is switched.

    The options go into `model.config.moba_flex`, and the attention's name into
    `model.config.attn_implementation`, so that `save_pretrained` keeps both and `from_pretrained`
    reads them. A saved model never loads as a dense one by accident:

    - Where this module was not imported, `from_pretrained` raises the ValueError of transformers
      that `attn_implementation="moba_flex"` is not supported.
    - Where it was imported, the model loads with this attention, but without the hooks of `apply`.
      Then a cache keeps no block keys, and layers see packed documents only if the model passes on
      the arguments that mark them; if it passes on none, they raise. The first call warns of this
      in the log, and `apply(model)` sets the hooks.
    - `from_pretrained(..., attn_implementation="sdpa")` loads it as a dense model. To save it as
      one, delete both attributes of the config.

    Args:
        model: A decoder that uses the attention interface of transformers.
        config: The options; if None, those of the saved model.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no model of transformers, or `config` no MoBAConfig.
        ValueError: The model has cross-attention or a sparse attention of its own, does not use
            the attention interface, or lacks layers or heads that the options name, or the
            `layer_idx` by which to find its layers; or it chooses blocks itself, and the options
            say otherwise.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        >>> model = apply(model, MoBAConfig(block_size=16, top_k=2, dense_layers=(-1,)))
        >>> model(torch.randint(64, (1, 100))).logits.shape
        torch.Size([1, 100, 64])
        >>> model.config.moba_flex["top_k"]
        2
    """
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TypeError(
            f"model must be a model of transformers, got {type(model).__name__}: "
            "call apply before the model is wrapped, or with what is wrapped"
        )
    text = model.config.get_text_config()
    for name in ("num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(text, name, None), int):
            raise ValueError(
                f"model must have one decoder, got {type(model).__name__}, whose config has no "
                f"{name}: apply to the decoder in it"
            )
    if config is None:
        config = _options(text)
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")
    _check_decoder(model.config)
    config.check_model(text.num_hidden_layers, text.num_attention_heads)
    _check_layers(model, text, config)
    # Without this flag, a model may accept the name but keep its own attention.
    if model._supports_attention_backend:
        try:
            model.set_attn_implementation(_name_for(text, model.config))
        except ValueError as error:
            raise ValueError(
                f"model must let its attention be chosen, got {type(model).__name__}: {error}"
            ) from error
    if text._attn_implementation != NAME:
        raise ValueError(
            f"model must use the attention interface of transformers, got {type(model).__name__}: "
            "call moba_attention in its attention layer instead"
        )
    setattr(text, NAME, config.to_dict())
    model.config.attn_implementation = _name_for(text, model.config)
    for decoder in _decoders(model, text):
        listen(decoder, _prepare_cache)
    return model


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call `observer` before each MoBA call of any model inside the `with` block.

    Dense layers, cached calls and compiled models do not call it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        >>> model = apply(model, MoBAConfig(block_size=16, top_k=2))
        >>> def note(layer_idx, q, k, v, scale, config, layout):
        ...     print(layer_idx, tuple(q.shape), tuple(k.shape))
        >>> with observe(note):
        ...     logits = model(torch.randint(64, (1, 100))).logits
        0 (1, 4, 100, 8) (1, 2, 100, 8)
        1 (1, 4, 100, 8) (1, 2, 100, 8)
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _prepare_cache(decoder: Any, cache: Any, paged: Any) -> None:
    """Let the cache of a forward keep block keys."""
    text = decoder.config.get_text_config()
    if paged is not None and "flash" in text._attn_implementation and hasattr(text, NAME):
        raise ValueError(
            f"attention must not be switched for continuous batching, got "
            f"{text._attn_implementation!r}: call generate_batch within moba_flex.integrations."
            "batching.continuous_batching(model), or delete config.moba_flex for dense attention"
        )
    if text._attn_implementation != NAME:  # switched to another one since
        return
    adopt(cache, _options(text), text.num_hidden_layers)


def _options(model_config: PreTrainedConfig) -> MoBAConfig:
    """Return the options that a model's config carries, or those of `register`."""
    options = getattr(model_config, NAME, None)
    if options is not None:
        # A graph would depend on what other models read.
        return MoBAConfig.from_dict(options) if is_traced() else _read(options)
    if _default is None:
        raise ValueError(
            f"{type(model_config).__name__} must carry MoBA options, got none: "
            "call moba_flex.integrations.transformers.apply(model, MoBAConfig(...))"
        )
    return _default


def _read(options: dict[str, Any]) -> MoBAConfig:
    """Return the config of options as `to_dict` writes them.

    Each layer asks in each step. A comparison with the options of the last call sees every change,
    and takes a fraction of the time to check a table of all layers and heads.
    """
    global _last
    last = _last  # which another thread may replace
    if last is None or last[0] != options:
        last = _last = copy.deepcopy(options), MoBAConfig.from_dict(options)
    return last[1]


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _name_for(text: PreTrainedConfig, whole: PreTrainedConfig) -> Any:
    """Return the argument of `set_attn_implementation` that gives `NAME` to `text` alone."""
    if whole is text:
        return NAME
    for key in whole.sub_configs:
        part = getattr(whole, key, None)
        if isinstance(part, PreTrainedConfig) and (name := _name_for(text, part)) is not None:
            return {key: name}
    return None


def _check_decoder(model_config: PreTrainedConfig) -> None:
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(model_config, name, False):
            raise ValueError(f"model must be a decoder without cross-attention, got {name}=True")


def _check_layers(model: nn.Module, text: PreTrainedConfig, config: MoBAConfig) -> None:
    """Raise unless `config` can be applied to the attention layers of a model."""
    layers = [x for x in model.modules() if getattr(x, "config", None) is text and _attends(x)]
    for layer in layers:
        hands_on = "block_indices" in inspect.unwrap(type(layer).forward).__code__.co_varnames
        if hands_on and getattr(layer, "indexer", None) is not None:
            _check_choice(layer, config, text.num_hidden_layers)
            continue
        for part in _OWN_SPARSE:
            if getattr(layer, part, None) is not None:
                raise ValueError(
                    "model must have no sparse attention of its own, got "
                    f"{type(layer).__name__}.{part}: use attn_implementation='eager'"
                )
    for name in ("dense_layers", "head_top_k", "layer_top_k"):
        if not getattr(config, name):
            continue
        for layer in layers:
            if not isinstance(getattr(layer, "layer_idx", None), int):
                raise ValueError(
                    f"{name} must be empty for a model whose layers have no layer_idx, got some "
                    f"for {type(layer).__name__}: leave it out"
                )


def _decoders(model: nn.Module, text: PreTrainedConfig) -> list[nn.Module]:
    """Return the innermost submodels whose config is `text`."""
    models = [
        x
        for x in model.modules()
        if isinstance(x, PreTrainedModel) and x.config.get_text_config() is text
    ]
    outer = {id(x) for x in models for y in models if y is not x and y in set(x.modules())}
    return [x for x in models if id(x) not in outer]


def _attends(module: nn.Module) -> bool:
    """Whether the forward of a module takes its attention function from transformers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with q `[B, Hq, Q, D]`, k and v `[B, Hkv, KV, D]`; return `[B, Q, Hq, D]`.

    `attention_mask` is the result of `mask`, or the caller's own mask `[B, 1, Q, KV]`.
    `block_indices` are the blocks that a model chose itself, int `[B, Hkv, Q, K]`.
    """
    model_config: Any = module.config
    config = _options(model_config)
    _check_decoder(model_config)
    _check_arguments(kwargs)
    layer_idx: int | None = getattr(module, "layer_idx", None)
    if layer_idx is None and config.dense_layers:
        raise ValueError(
            "dense_layers must be empty for layers without layer_idx, got "
            f"{config.dense_layers}: leave it out"
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if getattr(model_config, NAME, None) and not (is_traced() or has_hooks(attention_mask)):
        _warn_once(
            f"a model of {type(model_config).__name__} runs moba_flex as it was loaded, without "
            "hooks: caches keep no block keys, and save_pretrained would not keep the attention: "
            "call moba_flex.integrations.transformers.apply(model)"
        )
    dense = layer_idx is not None and config.is_dense(layer_idx, model_config.num_hidden_layers)
    slots = slots_of(attention_mask)
    cached = _has_cached_keys(config, slots, q_len, kv_len)
    dense = dense or (cached and config.cached == "dense")
    if cached and not dense and config.cached == "refuse":
        raise ValueError(
            f"queries must be as many as keys, got {q_len} queries and {kv_len} keys of a cache: "
            "pass use_cache=False, or let cached be 'route'"
        )
    if cached and not dense and slots is None:
        raise ValueError(
            "attention_mask must come from the mask functions of transformers in a call with "
            f"cached keys, got {'None' if attention_mask is None else 'another'}: pass "
            "use_cache=False, or set cached='dense' to attend to all keys in such calls"
        )
    if slots is not None and dense:
        attention_mask, slots = _pairs_of(slots, q_len, kv_len), None
    if "CrossAttention" in type(module).__name__ and (not dense or q_len == kv_len):
        raise ValueError(
            f"attention must be self-attention, got {type(module).__name__}: "
            "use attn_implementation='sdpa'"
        )
    plain = softcap is None and s_aux is None
    if not dense:
        _check_full(layer_idx, sliding_window)
    if not (dense and plain):
        _check_dropout(dropout)
    if block_indices is not None:
        _check_choice(module, config, model_config.num_hidden_layers)
        _check_dropout(dropout)
        rows: Layout = {}
        if slots is None:
            rows, own_mask = layout_of(query, key, attention_mask, kwargs)
        if slots is None and (own_mask is not None or "cu_seqlens" in rows):
            raise ValueError(
                "attention_mask must be None or [B, KV], of one document a row, beside "
                "block_indices, got another: use attn_implementation='eager'"
            )
        query, key, value = cast_by_autocast(query, key, value)
        blocks = BlockLayout(q_len, kv_len, config.block_size, causal)
        chosen = given_request(
            *(query, key, value),
            _routing_of(block_indices, blocks, slots, rows.get("key_mask")),
            slots=slots,
            scale=scaling,
            softcap=softcap,
            return_aux=AuxRequest(lse=s_aux is not None),
        )
        return _attend(chosen, s_aux), None
    if slots is not None:
        _check_dropout(dropout)
        kept = blocks_of(running_cache(), layer_idx, key, config.block_size, slots.start)
        block_keys = counters = None
        if kept is not None:
            key, value, block_keys, places = kept.read(query)
            if places is None and _are_last(slots, q_len, kv_len):
                slots = None
            counters = kept.counters if query.is_cuda else None
        query, key, value = cast_by_autocast(query, key, value)
        if block_keys is not None:
            block_keys = block_keys.to(query.dtype)
        request = cached_request(
            *(query, key, value, block_keys, slots),
            counters=counters,
            **gate_of(config, layer_idx, query, cached=cached),
            causal=causal,
            scale=scaling,
            softcap=softcap,
            return_aux=AuxRequest(lse=s_aux is not None),
        )
        return _attend(request, s_aux), None
    layout, pairs = layout_of(query, key, attention_mask, kwargs, sliding_window)
    if dense and plain and not layout:
        return sdpa_attention_forward(
            module, query, key, value, pairs, dropout, scaling, is_causal, **kwargs
        )

    if pairs is not None and not dense:
        raise ValueError(
            "attention_mask must be None or [B, KV], "
            f"got a mask of shape {tuple(pairs.shape)}: use attn_implementation='sdpa'"
        )
    _check_dropout(dropout)
    if dense and (pairs is not None or q_len != kv_len):
        out = _attend_to_pairs(query, key, value, pairs, scaling, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None

    shape = query.shape
    if "cu_seqlens" in layout:
        query, key, value = (one_row(x) for x in (query, key, value))
    if not is_traced() and not dense:
        for observer in _observers:
            observer(layer_idx, query, key, value, scaling, config, layout)
    if dense:
        gate = {
            "block_size": config.block_size,
            "top_k": ceil_div(key.shape[2], config.block_size),
        }
    else:
        gate = gate_of(config, layer_idx, query)
    options: dict[str, Any] = {**gate, **layout}
    options |= {"causal": causal, "scale": scaling, "softcap": softcap}
    options["return_aux"] = AuxRequest(lse=s_aux is not None)
    out, aux = moba_attention(query, key, value, **options)
    if s_aux is not None:
        out = _with_sinks(out, aux.lse, s_aux)
    out = out.transpose(1, 2).reshape(shape[0], shape[2], shape[1], -1)
    return out.contiguous(), None


def _check_arguments(given: dict[str, Any], known: Collection[str] = ()) -> None:
    """Raise if an attention function is given arguments that it neither knows nor may ignore."""
    for name, value in given.items():
        if value is None or value is False or name in _IGNORED or name in known:
            continue
        if not name.startswith(_IGNORED_OF_MEDIA):
            need = _UNSUPPORTED.get(name, "no arguments that it does not know")
            raise ValueError(
                f"attention must have {need}, got {name}: use attn_implementation='eager'"
            )


def _check_choice(layer: nn.Module, config: MoBAConfig, num_layers: int) -> None:
    """Raise unless a layer whose model chooses its blocks can attend as `config` says."""
    layer_idx, where = getattr(layer, "layer_idx", None), type(layer).__name__
    size = getattr(getattr(layer, "indexer", None), "block_size", config.block_size)
    if size != config.block_size:
        raise ValueError(
            f"block_size must be that by which {where} chooses blocks, {size}, got "
            f"{config.block_size}: set it to {size}"
        )
    if layer_idx is not None and config.is_dense(layer_idx, num_layers):
        raise ValueError(
            f"dense_layers must name no layer whose model chooses its blocks, got {layer_idx} for "
            f"{where}: leave it out"
        )
    if config.cached != "route":
        raise ValueError(
            f"cached must be 'route' for a model that chooses blocks itself, got "
            f"{config.cached!r} for {where}: leave it out"
        )


def _routing_of(
    blocks: Tensor, plain: BlockLayout, slots: Slots | None, key_mask: Tensor | None
) -> Routing:
    """Return blocks `[B, Hkv, Q, K]` that are counted from slot 0 as a routing.

    A routing holds the own block of each query, so `blocks` must.
    """
    first = None if key_mask is None else key_mask[:, 0]
    layout = locate(plain, {"key_mask": key_mask})
    if slots is not None:
        layout, first = locate_slots(plain, slots), slots.start == 0
    if first is not None:
        require(
            first,
            "attention_mask must start with a token in each row beside block_indices, got "
            "padding: pad on the right",
            wait=False,
        )
    at = layout.coordinates(blocks.device)
    own, padding = at.own[:, None, :, None], at.position[:, None] < 0
    require(
        (blocks == own).any(3) | padding,
        "block_indices must hold the own block of each query, got some without: "
        "use attn_implementation='eager'",
        wait=False,
    )
    return Routing.over(layout, blocks)


def _check_full(layer_idx: int | None, sliding_window: int | None) -> None:
    """Raise if a layer that routes has a window."""
    if sliding_window is not None:
        raise ValueError(
            f"layer {layer_idx} must have full attention, got sliding_window={sliding_window}: "
            "name it in dense_layers to leave it as it is"
        )


def _has_cached_keys(config: MoBAConfig, slots: Slots | None, q_len: int, kv_len: int) -> bool:
    """Whether a call has keys of earlier calls, for options that treat such calls otherwise.

    The first call with a static cache has none, though it has more slots than queries.
    """
    if slots is None or (config.cached == "route" and config.decode_top_k is None):
        return slots is not None or q_len != kv_len
    assert slots.query is not None  # of a mask, which names it
    if q_len == 1:  # the first token attends to itself alone, whatever the options are
        return True
    if not is_readable(slots.query):
        raise ValueError(
            "cached must be 'route', and decode_top_k None, in a graph of several queries and a "
            f"static cache, got {config.cached!r} and {config.decode_top_k}: "
            "leave such calls out of the graph"
        )
    return bool(slots.query.any())


def _are_last(slots: Slots, q_len: int, kv_len: int) -> bool:
    """Whether queries are known to be the last of rows that have all keys, on CPU."""
    if slots.query is None or slots.query.is_cuda or not is_readable(slots.query):
        return False
    return bool(((slots.query == kv_len - q_len) & (slots.stop == kv_len)).all())


def _pairs_of(slots: Slots, q_len: int, kv_len: int) -> Tensor:
    """Return which keys each query sees, bool `[B, 1, Q, KV]`, for attention to all of them."""
    assert slots.query is not None  # of a mask, which names it
    query, start = (x[:, None, None, None] for x in (slots.query, slots.start))
    slot = torch.arange(kv_len, device=query.device)
    position = query + torch.arange(q_len, device=query.device)[:, None]
    return (slot >= start) & (slot <= position)


def _check_dropout(dropout: float) -> None:
    if dropout:
        raise ValueError(
            f"attention dropout must be 0, got {dropout}: set config.attention_dropout to 0"
        )


def gate_of(
    config: MoBAConfig, layer_idx: int | None, q: Tensor, *, cached: bool = False
) -> dict[str, Any]:
    """Return the arguments of `route` for the queries of a layer.

    Args:
        config: The options of the model.
        layer_idx: The layer's number.
        q: Its queries, `[B, Hq, Q, D]`.
        cached: Whether the call has cached keys.

    Raises:
        ValueError: The options have a `head_top_k` or a `layer_top_k`, but the layer has no
            `layer_idx`.

    Example:
        >>> q = torch.randn(1, 2, 8, 4)
        >>> gate = gate_of(MoBAConfig(2, 3, head_top_k=((3, 1), (2, 2))), 0, q)
        >>> gate["top_k"], gate["head_top_k"]
        (3, tensor([3, 1]))
    """
    gate: dict[str, Any] = {
        "block_size": config.block_size,
        "top_k": config.top_k,
        "sink_blocks": config.sink_blocks,
        "local_blocks": config.local_blocks,
    }
    for name in ("head_top_k", "layer_top_k"):
        if getattr(config, name) is not None and layer_idx is None:
            raise ValueError(
                f"{name} must be None for layers without layer_idx, got a table: use top_k"
            )
    if cached and config.decode_top_k is not None:
        gate["top_k"] = config.decode_top_k
    elif config.layer_top_k is not None:
        assert layer_idx is not None
        gate["top_k"] = config.layer_top_k[layer_idx]
    elif config.head_top_k is not None:
        assert layer_idx is not None
        row = config.head_top_k[layer_idx]
        gate["top_k"] = max(row)
        if min(row) < max(row):
            gate["head_top_k"] = numbers_beside(q, row)
    return gate


def _attend(request: Request, s_aux: Tensor | None) -> Tensor:
    """Return the output of a request, `[B, Q, Hq, D]`."""
    out, aux = attend(request, "auto", AuxRequest(lse=s_aux is not None))
    if s_aux is not None:
        assert isinstance(aux, AuxOutput)
        assert aux.lse is not None
        out = _with_sinks(out, aux.lse, s_aux)
    return out.transpose(1, 2).contiguous()


def _with_sinks(out: Tensor, lse: Tensor, s_aux: Tensor) -> Tensor:
    """Reduce `out` by the share of each head's sink `[Hq]`, a score without a value."""
    share = torch.sigmoid(lse - s_aux[:, None].to(lse.dtype))
    return (out * share.unsqueeze(-1)).to(out.dtype)


def _attend_to_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor | None,
    scale: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attend densely under a mask `[B, 1, Q, KV]`, like "eager", for a window or a cache.

    Memory is `O(Q * KV)`, like that of the mask.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT).float() * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if pairs is None:
        # transformers omits the mask for one query, which sees all keys, and for the first queries
        # of a static cache, whose positions are those of the first keys.
        ones = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool)
        pairs = ones if q.shape[2] == 1 else ones.tril()
    if pairs.dtype != torch.bool:
        raise TypeError(
            "attention_mask must be bool for a layer with a soft cap or sinks, got "
            f"{pairs.dtype}: use attn_implementation='eager'"
        )
    scores = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.float()[:, None, None].expand(*scores.shape[:3], 1)
        weight = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weight = scores.softmax(-1)
    return weight.to(v.dtype) @ v


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, mask)
