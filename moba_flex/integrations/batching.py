"""Continuous batching of transformers (`model.generate_batch`) under Mixture of Block Attention.

transformers gives its paged cache to the attention functions that it knows by name alone: flash
attention, "sdpa" and "paged|eager". `ContinuousBatchingManager.switch_to_cb_friendly_attn` refuses
other names, or replaces them by flash attention where that is installed. So within
`continuous_batching(model)` the function "paged|eager" of that model is ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba_flex.integrations.transformers import (
    NAME,
    _attend,
    _attend_to_pairs,
    _check_arguments,
    _check_full,
    _options,
    gate_of,
)
from moba_flex.masks._torch.inputs import cast_by_autocast
from moba_flex.masks.request import gated_request

_PAGED = "paged|eager"
_KNOWN = {
    *("block_table", "read_index", "write_index", "logits_indices"),
    *("logits_processor_args", "is_causal", "dropout", "sliding_window", "softcap", "s_aux"),
}
_configs: list[Any] = []  # of the models that are within `continuous_batching`


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[None]:
    """Route the calls of `model.generate_batch`, or of a manager, inside the `with` block.

    Each step gathers all keys of all its sequences from the pages, and pools them for the gate,
    since pages hold no block keys. It costs memory and time in proportion to these keys, like
    "paged|eager" and "sdpa" themselves, and transformers makes the mask of queries by keys that
    these need. It uses no CUDA graphs, as with these, unless `use_cuda_graph` asks for them.

    Args:
        model: A text model that `apply` has switched.

    Raises:
        ValueError: The model was not switched, is only a part of its config, or treats calls with
            cached keys otherwise: a step holds sequences with and without them.

    Example:
        >>> from transformers import ContinuousBatchingConfig, GenerationConfig
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from moba_flex import MoBAConfig
        >>> from moba_flex.integrations.transformers import apply
        >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        >>> model = apply(model, MoBAConfig(block_size=16, top_k=2))
        >>> greedy = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
        >>> pages = ContinuousBatchingConfig(page_size=32, num_blocks=8, max_batch_tokens=64)
        >>> with continuous_batching(model):
        ...     outputs = model.generate_batch([[1, 2, 3], [4] * 50], greedy, pages)
        >>> [len(output.generated_tokens) for output in outputs.values()]
        [3, 3]
    """
    config: Any = model.config
    if config.get_text_config() is not config or config._attn_implementation != NAME:
        raise ValueError(
            f"model must be a text model that uses {NAME!r}, got {type(model).__name__} with "
            f"{config._attn_implementation!r}: call apply(model) before"
        )
    options = _options(config)
    if options.cached != "route" or options.decode_top_k is not None:
        raise ValueError(
            "cached must be 'route', and decode_top_k None, in continuous batching, got "
            f"{options.cached!r} and {options.decode_top_k}: a step mixes prompts and new tokens"
        )
    _configs.append(config)
    ALL_ATTENTION_FUNCTIONS[_PAGED] = _attention
    try:
        model.set_attn_implementation(_PAGED)
        yield
    finally:
        model.set_attn_implementation(NAME)
        _configs[:] = [x for x in _configs if x is not config]
        if not _configs:
            del ALL_ATTENTION_FUNCTIONS[_PAGED]  # type: ignore[no-untyped-call]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cache: PagedAttentionCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the keys in the pages of `cache`, like `eager_paged_attention_forward`."""
    config: Any = module.config
    layer_idx: Any = module.layer_idx
    if not any(x is config for x in _configs):
        result: tuple[Tensor, Tensor | None] = eager_paged_attention_forward(
            module, query, key, value, attention_mask, scaling, cache=cache, **kwargs
        )
        return result
    if cache is None:
        raise ValueError(
            "cache must be a paged cache within continuous_batching, got None: "
            "call the model outside of it"
        )
    _check_arguments(kwargs, _KNOWN)
    options = _options(config)
    dense = options.is_dense(layer_idx, config.num_hidden_layers)
    if not dense:
        _check_full(layer_idx, kwargs.get("sliding_window"))
    softcap: float | None = kwargs.get("softcap")
    sinks: Tensor | None = kwargs.get("s_aux")
    # Updates kwargs in place: the layer's own lengths take the place of those of all kinds.
    key, value = cache.update(key, value, layer_idx, kwargs)
    if dense:
        assert attention_mask is not None  # additive, for "paged|eager"
        out = _attend_to_pairs(query, key, value, attention_mask == 0, scaling, softcap, sinks)
        return out.transpose(1, 2).contiguous(), None
    query, key, value = cast_by_autocast(query, key, value)
    request = gated_request(
        *(query, key, value),
        **gate_of(options, layer_idx, query),
        cu_seqlens=kwargs["cu_seq_lens_k"],
        cu_seqlens_q=kwargs["cu_seq_lens_q"],
        scale=scaling,
        softcap=softcap,
        return_aux=AuxRequest(lse=sinks is not None),
    )
    return _attend(request, sinks), None
