"""`attn_implementation="moba_flex"` for Hugging Face models.

    model = AutoModelForCausalLM.from_pretrained(...)
    apply(model, MoBAConfig(block_size=512, top_k=3, dense_layers=(0, -1)))

Prefill and training are Mixture of Block Attention. What it cannot compute exactly, such as
padding, packed documents, sliding windows or dropout, raises a ValueError that says what to do
instead; nothing falls back silently.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from moba_flex.attention import moba_attention
from moba_flex.config import MoBAConfig

Model = TypeVar("Model", bound=PreTrainedModel)

NAME = "moba_flex"
"""The `attn_implementation`, and the attribute of a model's config that holds the options."""

Observer = Callable[[int | None, Tensor, Tensor, Tensor, float | None, MoBAConfig], None]
"""Called with `layer_idx`, q `[B, Hq, Q, D]`, k and v `[B, Hkv, Q, D]`, scale and config."""

_default: MoBAConfig | None = None
_observers: list[Observer] = []

# What else transformers may hand to an attention function. None of it may be ignored.
_UNSUPPORTED = {
    "softcap": "no soft cap on the scores",
    "s_aux": "no learned attention sinks",
    "sinks": "no learned attention sinks",
    "position_bias": "no position bias on the scores",
    "head_mask": "no head mask",
    "cu_seq_lens_q": "one document a row",
    "cu_seq_lens_k": "one document a row",
    "indices": "no other sparse attention",
    "block_indices": "no other sparse attention",
    "cache": "no paged cache",
    "output_attentions": "output_attentions=False, for attention weights are never formed",
}


def register(default: MoBAConfig | None = None) -> None:
    """Make `attn_implementation="moba_flex"` known to transformers.

    Args:
        default: Options for models whose config carries none.
    """
    global _default
    _default = default
    _register()


def apply(model: Model, config: MoBAConfig) -> Model:
    """Switch a model to Mixture of Block Attention, in place.

    The options go into `model.config.moba_flex`, so that `save_pretrained` keeps them: reload with
    `from_pretrained(..., attn_implementation="moba_flex")` after `register()`. Of a multimodal
    model the text part is switched.

    Args:
        model: A decoder that uses the attention interface of transformers.
        config: The options.

    Returns:
        `model`.

    Raises:
        TypeError: `config` is no MoBAConfig.
        ValueError: The model has cross-attention, does not use the attention interface, or lacks
            a layer that the options name.
    """
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")
    _check_decoder(model.config)
    _register()
    text = model.config.get_text_config()
    config.is_dense(0, text.num_hidden_layers)  # raises for a layer that the model lacks
    # Without this flag a model may take the name and go on with an attention of its own.
    if model._supports_attention_backend:
        parts = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
        model.set_attn_implementation({parts[0]: NAME} if parts else NAME)
    if text._attn_implementation != NAME:
        raise ValueError(
            f"model must use the attention interface of transformers, got {type(model).__name__}: "
            "call moba_attention in its attention layer instead"
        )
    setattr(text, NAME, config.to_dict())
    return model


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call `observer` before each MoBA call of any model inside the `with` block.

    Dense layers, cached calls and compiled models do not call it.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _options(model_config: PreTrainedConfig) -> MoBAConfig:
    options = getattr(model_config, NAME, None)
    if options is not None:
        return MoBAConfig.from_dict(options)
    if _default is None:
        raise ValueError(
            f"{type(model_config).__name__} must carry MoBA options, got none: "
            "call moba_flex.integrations.transformers.apply(model, MoBAConfig(...))"
        )
    return _default


def _check_decoder(model_config: PreTrainedConfig) -> None:
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(model_config, name, False):
            raise ValueError(f"model must be a decoder without cross-attention, got {name}=True")


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend: q `[B, Hq, Q, D]`, k and v `[B, Hkv, KV, D]` to `[B, Q, Hq, D]`."""
    model_config: Any = module.config
    config = _options(model_config)
    _check_decoder(model_config)
    for name, need in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f"attention must have {need}, got {name}: use attn_implementation='eager'"
            )

    layer_idx: int | None = getattr(module, "layer_idx", None)
    q_len, kv_len = query.shape[2], key.shape[2]
    dense = layer_idx is not None and config.is_dense(layer_idx, model_config.num_hidden_layers)
    if dense or (q_len != kv_len and config.cached == "dense"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )

    if q_len != kv_len:
        raise ValueError(
            f"queries must be as many as keys, got {q_len} queries and {kv_len} keys of a cache: "
            "pass use_cache=False, or set cached='dense' to attend to all keys in such calls"
        )
    if sliding_window is not None:
        raise ValueError(
            f"layer {layer_idx} must have full attention, got sliding_window={sliding_window}: "
            "name it in dense_layers to leave it as it is"
        )
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be None or [B, KV] of ones, "
            f"got a mask of shape {tuple(attention_mask.shape)}: use attn_implementation='sdpa'"
        )
    if dropout:
        raise ValueError(
            f"attention dropout must be 0, got {dropout}: set config.attention_dropout to 0"
        )

    if not torch.compiler.is_compiling():
        for observer in _observers:
            observer(layer_idx, query, key, value, scaling, config)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = moba_attention(
        query,
        key,
        value,
        block_size=config.block_size,
        top_k=config.top_k,
        sink_blocks=config.sink_blocks,
        local_blocks=config.local_blocks,
        causal=causal,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(
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
    """Return None for a call that may be routed: square, and nothing masked but the future.

    A windowed or cached call gets transformers' own mask, which `_attention` passes on or refuses.
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
        # Compiled, transformers cannot look at position_ids and always takes them for packed ones.
        rows = torch.arange(batch_size, device=device)[:, None]
        positions = torch.arange(q_length, device=device)[None, :]
        _require(
            mask_function(rows, rows * 0, positions, positions * 0),
            "position_ids must hold one document a row, got packed documents: "
            "give each a row of its own",
        )
    if attention_mask is not None:
        _require(
            attention_mask,
            "attention_mask must be all ones, got padding: "
            "leave the mask out if padding is on the right, run rows one by one if on the left",
        )
    return None


def _require(condition: Tensor, message: str) -> None:
    """Raise unless all of `condition` holds; a compiled graph asserts it, as it cannot look."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        raise ValueError(message)
