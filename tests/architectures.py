"""`apply` over every architecture of transformers that uses its attention interface.

    python -m tests.architectures --jobs 2
    python -m tests.architectures --only Llama Gemma3 --properties dense packed

Each architecture is built tiny and random from its own config class. A property of it is right,
refused (a ValueError or TypeError of moba_flex's own), or wrong; see `PROPERTIES`.
"""

import argparse
import copy
import inspect
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import moba_flex
from moba_flex import MoBAConfig
from moba_flex.integrations.transformers import NAME, apply

LENGTH = 45
SHORT = 37  # a padded row's real tokens
DOCUMENTS = (19, 26)
LAYERS = 4
ALL = MoBAConfig(8, 7, cached="dense")  # covers LENGTH and what is generated
SPARSE = MoBAConfig(8, 2)
OWN = MoBAConfig(8, 1)
TOLERANCE = 2e-4  # of the largest output; other results differ by far more

# --- building ------------------------------------------------------------------------------------

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
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
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"), 16),
    "qk_nope_head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "attn_pdrop"), 0.0),
    "fpn_hidden_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
"""Fields of configs by name; a field takes the size only if its default is of the same kind."""

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), {"rope_parameters": _MROPE}),
    **dict.fromkeys(("qwen2_5_omni_text", "glm4v_text"), {"rope_parameters": _MROPE}),
    **dict.fromkeys(("glm_image_text", "glm_ocr_text"), {"rope_parameters": _MROPE}),
    **dict.fromkeys(("paddleocr_vl_text", "hunyuan_vl_text"), {"rope_parameters": _MROPE}),
    "glm4v_moe_text": {
        "rope_parameters": _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mimi": {"upsample_groups": 64},
    "kyutai_speech_to_text": {"audio_pad_token_id": 60},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "esmc": {"num_key_value_heads": 4},
    "glm5_next_text": {"head_dim": 0, "qk_rope_head_dim": 0},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 60}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": _MROPE,
            "sliding_attention": _MROPE,
        }
    },
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    },
    **dict.fromkeys(
        ("gradium_phonon_tts", "pocket_tts"), {"flow_head_config": {"condition_dim": 64}}
    ),
    "granite_docling_vision": {"out_hidden_size": 64},
    "inkling2_vision": {"text_hidden_size": 64},
    "molmo2_adapter": {"vision_feature_layer": [-1], "text_hidden_size": 64},
    "muse_spark_audio": {"out_hidden_size": 64},
    "muse_spark": {"out_hidden_size": 64},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "step3p5": {"sliding_window": 4096},
    **dict.fromkeys(
        ("fast_vlm", "perception_lm", "gemma3n"),
        {"vision_config": {"model_type": "clip_vision_model"}},  # in place of one of timm's
    ),
    "ernie4_5_vl_moe_text": {
        "rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [48, 48],
    },
    "granite4_vision": {"spatial_target_layers": [0, 1, 2, 3], "downsample_rate": "1/2"},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    **dict.fromkeys(
        ("nemotron3_5_transcribe_word_timestamp", "nemotron3_5_asr"), {"blank_token_id": 60}
    ),
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
    """An architecture that this script cannot build or feed."""


@dataclass(frozen=True)
class Architecture:
    """A model class, by name."""

    name: str

    @property
    def model(self) -> type[Any]:
        return getattr(transformers, self.name)


def architectures() -> tuple[list[Architecture], dict[str, str]]:
    """Return those that take tokens and use the attention interface; and why others are left out.

    Of a model type it is the causal or multimodal language model, else the base model.
    """
    chosen: dict[str, Architecture] = {}
    left_out = {}
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
            chosen.setdefault(name, Architecture(name))
    return sorted(chosen.values(), key=lambda each: each.name.lower()), left_out


def _names_interface(cls: type[Any]) -> bool:
    return hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS")


def tiny_config(config_class: type[Any], **more: Any) -> Any:
    """Return a config of few and small layers, made from the names of its class's fields.

    `more` are further fields, which win.
    """
    default = config_class()
    fields = inspect.signature(config_class).parameters
    options = {
        key: _SIZES[key]
        for key in fields
        if key in _SIZES and _same_kind(_value(default, fields, key), _SIZES[key])
    }
    types = _value(default, fields, "layer_types")
    if types:
        kinds = ["full_attention" if kind in _WINDOWED else kind for kind in types]
        kinds = list(dict.fromkeys(kinds))
        options["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    for key in ("sliding_window", "attention_chunk_size"):
        if isinstance(_value(default, fields, key), int):
            options[key] = 4096
    rope = _value(default, fields, "rope_parameters")
    if isinstance(rope, dict):
        options["rope_parameters"] = _tiny_rope(rope)
    if "kv_lora_rank" in fields:
        options["num_key_value_heads"] = 4  # latent attention has as many as query heads
    options |= _OVERRIDES.get(config_class.model_type, {}) | more
    for key in config_class.sub_configs:
        own = dict(options.get(key, {}))
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


def _same_kind(default: Any, size: Any) -> bool:
    if default is None or size is None:
        return not isinstance(default, (list, tuple, dict))
    if isinstance(size, float):
        return isinstance(default, (int, float)) and not isinstance(default, bool)
    return isinstance(default, type(size)) and not isinstance(default, bool)


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


def build(architecture: Architecture) -> Any:
    """Return the model, in float32, with weights far from uniform attention.

    Raises:
        NotBuilt: The config or the model cannot be made.
    """
    torch.manual_seed(0)
    try:
        config = tiny_config(architecture.model.config_class)
        model = architecture.model(config).eval()
        model.set_experts_implementation("batched_mm")  # the only one without a look at values
    except Exception as error:
        raise NotBuilt(_line(error)) from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model.requires_grad_(True)


# --- calling -------------------------------------------------------------------------------------


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 57, (batch, length), generator=torch.Generator().manual_seed(1))


def call(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return logits `[B, L, vocab]`, or hidden states of a model without a head."""
    out = model(**{"input_ids": ids} | _beside(model, ids) | options)
    out = getattr(out, "text_model_output", out)
    for key in ("logits", "last_hidden_state"):
        value = getattr(out, key, None)
        if isinstance(value, Tensor):
            return value
    raise NotBuilt(f"its output holds {', '.join(out.keys())}")


def _beside(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return what a model needs beside tokens, or in their place."""
    name, batch = type(model).__name__, ids.shape[0]
    vision = getattr(model.config, "vision_config", None)
    image = torch.linspace(-1, 1, 3 * 16 * 16, device=ids.device).view(1, 3, 16, 16)
    images = image.expand(batch, -1, -1, -1)
    if name.startswith("Kyutai"):
        return {"input_ids": ids[..., None].expand(-1, -1, model.config.num_codebooks + 1)}
    if name == "XCLIPModel":
        return {"pixel_values": images[:, None].expand(-1, vision.num_frames, -1, -1, -1)}
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
    if name in _WITH_IMAGES:
        return {"pixel_values": images}
    return {}


def error_of(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest of `want`."""
    if got.shape != want.shape:
        return float("inf")
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-6)
    return float("inf") if error.isnan() else float(error)


def same(got: Tensor, want: Tensor) -> bool:
    return error_of(got, want) <= TOLERANCE


@dataclass(frozen=True)
class Verdict:
    """What an architecture does, in a word or two; `detail` holds a message."""

    kind: str
    detail: str = ""
    wrong: bool = False


def refusal(error: Exception) -> Verdict:
    """Tell an error of moba_flex's own from one that a model raises or that was not meant."""
    frames = traceback.extract_tb(error.__traceback__)
    here = (Path(moba_flex.__file__).parent, Path(moba_flex.__file__).parent.parent / "masks")
    own = any(frames[-1].filename.startswith(str(folder)) for folder in here)
    if own and isinstance(error, (ValueError, TypeError)):
        return Verdict("refused", str(error))
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return Verdict("error", _line(error) + place, wrong=True)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextmanager
def attention(function: Callable[..., Any]) -> Iterator[None]:
    """Put `function` in the place of moba_flex's attention."""
    own = AttentionInterface._global_mapping[NAME]
    AttentionInterface.register(NAME, function)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, own)


def only_itself(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    """Let each token attend to itself alone, so that only other layers mix tokens."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return v[:, :, -q.shape[2] :].transpose(1, 2).contiguous(), None


@dataclass
class Calls:
    """The calls of the attention function, as `(module, layer, output)`."""

    made: list[tuple[nn.Module, int | None, Tensor]] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module, dense: int | None = None) -> Iterator[Calls]:
    """Record calls; the layer `dense`, numbered by its module's name, sees all keys."""
    own, calls = AttentionInterface._global_mapping[NAME], Calls()
    numbers = {module: _number(name) for name, module in model.named_modules()}

    def watch(module: Any, *arguments: Any, **options: Any) -> Any:
        before = getattr(module.config, NAME)
        if dense is not None and numbers[module] == dense:
            setattr(module.config, NAME, ALL.to_dict())
        try:
            result = own(module, *arguments, **options)
        finally:
            setattr(module.config, NAME, before)
        calls.made.append((module, numbers[module], result[0]))
        return result

    with attention(watch):
        yield calls


def _number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


# --- properties ----------------------------------------------------------------------------------


@dataclass
class Subject:
    """A built model before `apply`, and what it computes densely."""

    architecture: Architecture
    model: Any
    dense: Tensor

    def applied(self, config: MoBAConfig) -> Any:
        return apply(copy.deepcopy(self.model), config)

    def takes(self, name: str) -> bool:
        parameters = inspect.signature(self.model.forward).parameters
        return name in parameters or any(
            each.kind is each.VAR_KEYWORD for each in parameters.values()
        )


def dense(subject: Subject) -> Verdict:
    """`top_k` that covers everything gives what the model gave before, and so do its gradients."""
    model = subject.applied(ALL)
    with watched(model) as calls:
        out = call(model, tokens(2, LENGTH))
    if not calls.made:
        return Verdict("attention not called", wrong=True)
    error = error_of(out, subject.dense)
    return Verdict("equal") if error <= TOLERANCE else Verdict("differs", f"{error:.1e}", True)


def sparse(subject: Subject) -> Verdict:
    """A small `top_k` runs forward and backward, contiguous, and is not dense."""
    model = subject.applied(SPARSE)
    with watched(model) as calls:
        out = call(model, tokens(2, LENGTH))
    if any(not result.is_contiguous() for _, _, result in calls.made):
        return Verdict("not contiguous", wrong=True)
    if same(out, subject.dense):
        return Verdict("dense", wrong=True)
    out.float().square().mean().backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not gradients or not all(each.isfinite().all() for each in gradients):
        return Verdict("no finite gradients", wrong=True)
    return Verdict("works")


def dense_layers(subject: Subject) -> Verdict:
    """`dense_layers` leaves all layers, or the one it names, as they were."""
    count = subject.model.config.get_text_config().num_hidden_layers
    everywhere = MoBAConfig(8, 1, dense_layers=tuple(range(count)))
    ids = tokens(2, LENGTH)
    if not same(call(subject.applied(everywhere), ids), subject.dense):
        return Verdict("ignored", wrong=True)
    model = subject.applied(OWN)
    with watched(model) as calls:
        call(model, ids)
    numbers = list(dict.fromkeys(number for _, number, _ in calls.made if number is not None))
    for number in numbers[:2]:
        with watched(model, dense=number):
            want = call(model, ids)
        got = call(subject.applied(MoBAConfig(8, 1, dense_layers=(number,))), ids)
        if not same(got, want):
            return Verdict("another layer", f"layer {number}: {error_of(got, want):.1e}", True)
    return Verdict("honoured")


def _alike(
    subject: Subject, got: Callable[[Any], Tensor], want: Callable[[Any], Tensor], right: str
) -> Verdict:
    """Compare two ways of calling, under a sparse gate.

    If they differ where tokens attend to themselves alone, then other layers than attention tell
    them apart: those of a recurrent model, or positions.
    """
    model = subject.applied(SPARSE)
    expected = want(model)
    error = error_of(got(model), expected)
    if error <= TOLERANCE:
        return Verdict(right)
    with attention(only_itself):
        outside = error_of(got(model), want(model))
    if outside > TOLERANCE:
        return Verdict("differs outside attention", f"{error:.1e}, {outside:.1e} without")
    return Verdict("contaminated", f"{error:.1e}", wrong=True)


def _restarts(batch: int = 1) -> Tensor:
    rows = [DOCUMENTS, DOCUMENTS[::-1]][:batch]
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def _apart(model: Any, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([call(model, part) for part in ids.split(list(lengths), dim=1)], dim=1)


def packed(subject: Subject) -> Verdict:
    """Documents told by positions that restart, in the default call."""
    if not subject.takes("position_ids"):
        return Verdict("not taken")
    ids = tokens(1, LENGTH)
    return _alike(
        subject,
        lambda model: call(model, ids, position_ids=_restarts()),
        lambda model: _apart(model, ids, DOCUMENTS),
        "apart",
    )


def packed_rows(subject: Subject) -> Verdict:
    """Two rows of documents that start at different places."""
    if not subject.takes("position_ids"):
        return Verdict("not taken")
    ids = tokens(2, LENGTH)
    return _alike(
        subject,
        lambda model: call(model, ids, position_ids=_restarts(2)),
        lambda model: torch.cat(
            [_apart(model, ids[:1], DOCUMENTS), _apart(model, ids[1:], DOCUMENTS[::-1])]
        ),
        "apart",
    )


def packed_padded(subject: Subject) -> Verdict:
    """Documents, and padding behind them."""
    if not subject.takes("position_ids"):
        return Verdict("not taken")
    ids, mask = tokens(1, LENGTH), torch.ones(1, LENGTH, dtype=torch.int64)
    mask[:, SHORT:] = 0
    return _alike(
        subject,
        lambda model: call(model, ids, position_ids=_restarts(), attention_mask=mask)[:, :SHORT],
        lambda model: _apart(model, ids[:, :SHORT], (DOCUMENTS[0], SHORT - DOCUMENTS[0])),
        "apart",
    )


def cu_seq_lens(subject: Subject) -> Verdict:
    """Documents told by `cu_seq_lens_q` and `cu_seq_lens_k`, beside positions that restart."""
    if not subject.takes("cu_seq_lens_q"):
        return Verdict("not taken")
    ids = tokens(1, LENGTH)
    starts = torch.tensor([0, DOCUMENTS[0], LENGTH], dtype=torch.int32)
    longest = max(DOCUMENTS)
    options: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    options |= {"max_length_q": longest, "max_length_k": longest}
    if subject.takes("position_ids"):
        options["position_ids"] = _restarts()
    return _alike(
        subject,
        lambda model: call(model, ids, **options),
        lambda model: _apart(model, ids, DOCUMENTS),
        "apart",
    )


def _padded(subject: Subject, left: bool) -> Verdict:
    if not subject.takes("attention_mask"):
        return Verdict("not taken")
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    real = slice(LENGTH - SHORT, None) if left else slice(SHORT)
    mask[0] = 0
    mask[0, real] = 1
    options = {"attention_mask": mask}
    if left and subject.takes("position_ids"):
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return _alike(
        subject,
        lambda model: torch.cat([*call(model, ids, **options).split(1)], 1)[
            :, torch.cat([mask[0].bool(), mask[1].bool()])
        ],
        lambda model: torch.cat([call(model, ids[:1, real]), call(model, ids[1:])], 1),
        "equal",
    )


def right_padding(subject: Subject) -> Verdict:
    """A padded row equals the unpadded one."""
    return _padded(subject, left=False)


def left_padding(subject: Subject) -> Verdict:
    """A row padded on the left, whose positions start at its first token."""
    return _padded(subject, left=True)


def meta(subject: Subject) -> Verdict:
    """A model on the meta device still runs."""
    ids = tokens(2, LENGTH).to("meta")
    model = copy.deepcopy(subject.model).to("meta")
    try:
        want = call(model, ids).shape
    except Exception as error:
        return Verdict("dense fails too", _line(error))
    got = call(apply(model, SPARSE), ids)
    return Verdict("works") if got.shape == want else Verdict("other shape", wrong=True)


def fake(subject: Subject) -> Verdict:
    """A model of fake tensors still runs."""
    with FakeTensorMode():
        ids = torch.zeros(2, LENGTH, dtype=torch.int64)
        try:
            model = subject.architecture.model(copy.deepcopy(subject.model.config)).eval()
            want = call(model, ids).shape
        except Exception as error:
            return Verdict("dense fails too", _line(error))
        got = call(apply(model, SPARSE), ids)
    return Verdict("works") if got.shape == want else Verdict("other shape", wrong=True)


def generate(subject: Subject) -> Verdict:
    """Three new tokens, with a cache; all of `top_k` gives those of dense attention."""
    if not subject.model.can_generate():
        return Verdict("cannot generate")
    ids = tokens(2, LENGTH)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    try:
        want = copy.deepcopy(subject.model).generate(ids, **options)
    except Exception as error:
        return Verdict("dense fails too", _line(error))
    got = subject.applied(ALL).generate(ids, **options)
    return Verdict("equal") if torch.equal(got, want) else Verdict("differs", wrong=True)


PROPERTIES: dict[str, Callable[[Subject], Verdict]] = {
    function.__name__: function
    for function in (
        dense,
        sparse,
        dense_layers,
        packed,
        packed_rows,
        packed_padded,
        cu_seq_lens,
        right_padding,
        left_padding,
        meta,
        fake,
        generate,
    )
}


# --- running -------------------------------------------------------------------------------------


@dataclass
class Result:
    """The verdicts on one architecture, or why there are none."""

    name: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    not_built: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return bool(self.not_built) or any(each.wrong for each in self.verdicts.values())

    def __str__(self) -> str:
        if self.not_built:
            return f"{self.name}: not built: {self.not_built}"
        kinds = [f"{key}={each.kind}" for key, each in self.verdicts.items()]
        lines = [f"{self.name}: {', '.join(kinds)}"]
        lines += [
            f"    {key}: {each.kind}: {each.detail}"
            for key, each in self.verdicts.items()
            if each.wrong
        ]
        return "\n".join(lines)


def check(architecture: Architecture, properties: Sequence[str] = tuple(PROPERTIES)) -> Result:
    """Build an architecture and look at the properties named."""
    result, start = Result(architecture.name), time.monotonic()
    try:
        model = build(architecture)
        try:
            apply(copy.deepcopy(model), ALL)
        except Exception as error:
            result.verdicts = dict.fromkeys(properties, refusal(error))
            return result
        with torch.no_grad():
            subject = Subject(architecture, model, call(model, tokens(2, LENGTH)))
    except Exception as error:
        result.not_built = str(error) if isinstance(error, NotBuilt) else _line(error)
        return result
    for name in properties:
        try:
            with torch.set_grad_enabled(name == "sparse"):
                result.verdicts[name] = PROPERTIES[name](subject)
        except Exception as error:
            result.verdicts[name] = refusal(error)
    result.seconds = time.monotonic() - start
    return result


def table(results: Sequence[Result]) -> str:
    """Return how many architectures are in each class of each property."""
    lines = []
    for name in PROPERTIES:
        counts = Counter(
            ("WRONG: " if verdict.wrong else "") + verdict.kind
            for result in results
            if (verdict := result.verdicts.get(name)) is not None
        )
        if counts:
            kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
            lines.append(f"{name:14} {kinds}")
    not_built = sum(bool(result.not_built) for result in results)
    lines.append(f"{len(results)} architectures, {not_built} of them not built")
    return "\n".join(lines)


def _prepare() -> None:
    """Leave one core to each process, and be quiet."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def _results(
    chosen: Sequence[Architecture], properties: Sequence[str], jobs: int
) -> Iterator[Result]:
    if jobs == 1:
        _prepare()
        for architecture in chosen:
            yield check(architecture, properties)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare) as pool:
        yield from pool.map(check, chosen, [properties] * len(chosen))


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at all architectures; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose name starts so")
    parser.add_argument("--properties", nargs="+", choices=PROPERTIES, default=tuple(PROPERTIES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    options = parser.parse_args(arguments)
    chosen, left_out = architectures()
    if options.only:
        chosen = [each for each in chosen if each.name.startswith(tuple(options.only))]
    start, results = time.monotonic(), []
    for result in _results(chosen, options.properties, options.jobs):
        results.append(result)
        print(result, flush=True)
    print(table(results))
    for reason, count in Counter(left_out.values()).items():
        print(f"{count} model classes left out: {reason}")
    print(f"{time.monotonic() - start:.0f} s with {moba_flex.__file__}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=1))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
