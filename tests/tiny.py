"""Every architecture of transformers that takes tokens, built tiny and random.

`architectures` finds the model classes, `build` makes one from the names of its config's fields,
`call` runs it on tokens.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

LAYERS = 4

_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 61),
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "emb_dim"), 64),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "embedding_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_hidden_size", "projector_hidden_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"), 16),
    "qk_nope_head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    # Tokens are drawn from 3 to 56.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("image_token_id", "image_token_index"), 57),
    **dict.fromkeys(("video_token_id", "video_token_index"), 58),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 59),
    "fpn_hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "image_size": 16,
    "patch_size": 8,
}
"""Fields of configs by name; a field takes the size if its default is an int or None."""

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16}
_OVERRIDES: dict[str, dict[str, Any]] = {
    # Rotary positions in three parts, whose sizes the models have defaults of their own for.
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [48, 48],
    },
    "glm4v_moe_text": {
        "rope_parameters": _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    },
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "hunyuan_vl_text": {"rope_parameters": _MROPE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    # Attention in every other layer.
    "bamba": {"attn_layer_indices": [1, 3]} | _MAMBA,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2} | _MAMBA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    # Experts.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "zaya": {"num_experts_per_tok": 1},
    # Attention of a kind.
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"head_dim": 0, "qk_rope_head_dim": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 4096},
    # Many layers or wide ones, under names of their own.
    "dac": {"encoder_hidden_size": 4},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "muse_spark_audio": {"hidden_sizes": [16] * 4, "depths": [1] * 4, "out_hidden_size": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 1, "depths": [1] * 7},
    # Parts that must fit together.
    "chameleon": {"vocabulary_map": {"<image>": 60}},
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},  # in place of timm's
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite_docling_vision": {"out_hidden_size": 64},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "inkling2_vision": {"text_hidden_size": 64},
    "kyutai_speech_to_text": {"audio_pad_token_id": 60},
    "mimi": {"upsample_groups": 64},
    "molmo2_adapter": {"vision_feature_layer": [-1], "text_hidden_size": 64},
    "muse_spark": {"out_hidden_size": 64},
    "nemotron3_5_asr": {"blank_token_id": 60},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 60},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "videoprism_vision_model": {"image_size": 36},
    "xmod": {"default_language": "en_XX"},
}
"""Fields by model type, where `_SIZES` is not enough; of a sub-config, those of its own."""

_WITH_IMAGES = (
    "AltCLIPModel",
    "ChineseCLIPModel",
    "CLIPModel",
    "CLIPSegModel",
    "MetaClip2Model",
    "Owlv2Model",
    "OwlViTModel",
    "SiglipModel",
    "Sam3Model",
    "Sam3LiteTextModel",
    "Blip2ForConditionalGeneration",
)
_WINDOWED = ("sliding_attention", "chunked_attention", "local_attention", "local", "swa")


class NotBuilt(Exception):
    """An architecture that cannot be built or fed here."""


def architectures() -> tuple[list[str], dict[str, str]]:
    """Return the model classes that take tokens and use the attention interface.

    Of a model type it is the causal or multimodal language model, else the base model. The second
    result says of the other classes why they are left out.
    """
    chosen, left_out = set(), {}
    mappings = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )
    for model_type in dict.fromkeys(key for mapping in mappings for key in mapping):
        names: Any = next(mapping[model_type] for mapping in mappings if model_type in mapping)
        name = names if isinstance(names, str) else names[0]
        cls = getattr(transformers, name, None)
        if cls is None or not issubclass(cls, PreTrainedModel):
            left_out[name] = "transformers does not export it here"
        elif not (cls._supports_attention_backend or _names_interface(cls)):
            left_out[name] = "attention of its own"
        elif "input_ids" not in inspect.signature(cls.forward).parameters:
            left_out[name] = "takes no tokens"
        else:
            chosen.add(name)
    return sorted(chosen, key=str.lower), left_out


def _names_interface(cls: type[Any]) -> bool:
    return hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS")


def tiny_config(config_class: type[Any], **more: Any) -> Any:
    """Return a config of few and small layers, made from the names of its class's fields.

    `more` are further fields, which win.
    """
    default = config_class()
    fields = inspect.signature(config_class).parameters
    options: dict[str, Any] = {
        key: _SIZES[key]
        for key in fields
        if key in _SIZES and _is_size(_value(default, fields, key))
    }
    types = _value(default, fields, "layer_types")
    if types:
        kinds = ["full_attention" if kind in _WINDOWED else kind for kind in types]
        kinds = list(dict.fromkeys(kinds))
        options["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    for key in ("sliding_window", "attention_chunk_size"):
        if isinstance(_value(default, fields, key), int):
            windowed = types or "None" not in str(fields[key].annotation)
            options[key] = 4096 if windowed else None
    rope = _value(default, fields, "rope_parameters")
    if isinstance(rope, dict):
        options["rope_parameters"] = _tiny_rope(rope)
    if "kv_lora_rank" in fields:
        options["num_key_value_heads"] = 4  # latent attention has as many as query heads
    options |= _OVERRIDES.get(config_class.model_type, {}) | more
    for key in config_class.sub_configs:
        own: dict[str, Any] = dict(options.get(key, {}))
        model_type = own.pop("model_type", None)
        part: Any = CONFIG_MAPPING[model_type] if model_type else type(getattr(default, key, None))
        if issubclass(part, PreTrainedConfig):
            options[key] = tiny_config(part, **own)
    return config_class(**options)


def _value(default: Any, fields: Mapping[str, Any], key: str) -> Any:
    """Return the default of a field, the declared one where an instance has none."""
    if key not in fields:
        return ()
    try:
        return getattr(default, key)
    except (AttributeError, RuntimeError):  # the latter if layers differ in it
        return fields[key].default


def _is_size(default: Any) -> bool:
    return default is None or (isinstance(default, int) and not isinstance(default, bool))


def _tiny_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Cut the sections of rotary dimensions down to those of a head of 16."""
    rope = {
        key: _tiny_rope(each) if isinstance(each, dict) else each for key, each in rope.items()
    }
    if "mrope_section" in rope:
        half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
        parts = len(rope["mrope_section"])
        rope["mrope_section"] = [half // parts + (i < half % parts) for i in range(parts)]
    return rope


def build(name: str) -> Any:
    """Return the model, in float32, with weights far from uniform attention.

    Raises:
        NotBuilt: The config or the model cannot be made.
    """
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    try:
        model = model_class(tiny_config(model_class.config_class)).eval()
    except Exception as error:
        raise NotBuilt(one_line(error)) from error
    model.set_experts_implementation("batched_mm")  # the one that never looks at values
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 57, (batch, length), generator=torch.Generator().manual_seed(1))


def call(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return logits `[B, L, vocab]`, or hidden states of a model without a head."""
    torch.manual_seed(0)  # diffusion models draw noise
    out = model(**inputs(model, ids), **options)
    for key in ("text_model_output", "text_outputs"):
        out = getattr(out, key, out)
    for key in ("logits", "last_hidden_state"):
        value = getattr(out, key, None)
        if isinstance(value, Tensor):
            return value
    raise NotBuilt(f"its output holds {', '.join(out.keys())}")


def inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """Return the tokens, and what the model cannot do without beside them."""
    return {"input_ids": ids} | _beside(model, ids)


def _beside(model: Any, ids: Tensor) -> dict[str, Any]:
    name, batch = type(model).__name__, ids.shape[0]
    image = torch.linspace(-1, 1, 3 * 16 * 16, device=ids.device).view(1, 3, 16, 16)
    images = image.expand(batch, -1, -1, -1)
    if name.startswith("Kyutai"):
        return {"input_ids": ids[..., None].expand(-1, -1, model.config.num_codebooks + 1)}
    if name == "XCLIPModel":
        frames = model.config.vision_config.num_frames
        return {"pixel_values": images[:, None].expand(-1, frames, -1, -1, -1)}
    if name == "IdeficsForVisionText2Text":
        mask = torch.ones(*ids.shape, 1, dtype=torch.int64, device=ids.device)
        return {"pixel_values": images[:, None], "image_attention_mask": mask}
    if name == "Siglip2Model":
        shape = torch.tensor([[2, 2]], device=ids.device).expand(batch, -1)
        patches = image.view(1, 4, -1).expand(batch, -1, -1)
        mask = torch.ones(batch, 4, dtype=torch.int64, device=ids.device)
        return {"pixel_values": patches, "spatial_shapes": shape, "pixel_attention_mask": mask}
    if name == "Kosmos2ForConditionalGeneration":
        none = torch.zeros_like(ids)
        return {"image_embeds": image.new_zeros(0, 64), "image_embeds_position_mask": none}
    if name.startswith("InstructBlip"):
        video = name.startswith("InstructBlipVideo")
        frames = images[:, None].expand(-1, 4, -1, -1, -1) if video else images
        return {"pixel_values": frames, "qformer_input_ids": ids[:, :4]}
    if name == "VideoPrismClipModel":
        frames = model.config.vision_config.num_frames
        return {"pixel_values_videos": image.new_zeros(batch, frames, 3, 36, 36)}
    if name == "PeAudioModel":
        sound = torch.linspace(-1, 1, 8 * 1920, device=ids.device)
        return {"input_values": sound.expand(batch, 1, -1)}
    if name in _WITH_IMAGES:
        return {"pixel_values": images}
    return {}


def one_line(error: BaseException) -> str:
    """Return the kind of an error and its message, cut to 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
