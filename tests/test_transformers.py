"""Tests of `moba_flex.integrations.transformers` on tiny random models."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import transformers
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from moba_flex import moba_attention_reference
from moba_flex.cli.pretrained import load_model
from moba_flex.config import MoBAConfig
from moba_flex.integrations import transformers as integration
from moba_flex.integrations.transformers import apply, observe, register

LENGTH = 45
SMALL = MoBAConfig(block_size=8, top_k=2)
ALL = MoBAConfig(block_size=8, top_k=6)  # covers LENGTH
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    "initializer_range": 0.5,  # far from uniform attention
}
FULL = ["full_attention"] * 3


def build(name: str, **options: Any) -> Any:
    """Return a random causal language model, the same one every time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    suffix = "ForCausalLM" if hasattr(transformers, f"{name}ForCausalLM") else "Model"
    return getattr(transformers, f"{name}{suffix}")(config).eval()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_default() -> Iterator[None]:
    yield
    register(None)


@pytest.fixture
def reference() -> Iterator[str]:
    """Register the oracle as an attention implementation of its own."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any) -> Any:
        out = moba_attention_reference(
            q,
            k,
            v,
            block_size=SMALL.block_size,
            top_k=SMALL.top_k,
            scale=rest["scaling"],
            dtype=torch.float64,
        ).out
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("reference", attention)
    yield "reference"
    del transformers.AttentionInterface._global_mapping["reference"]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma"])
def test_is_dense_attention_if_top_k_covers_everything(name: str) -> None:
    model = build(name)
    dense = model(tokens()).logits
    torch.testing.assert_close(apply(model, ALL)(tokens()).logits, dense)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma"])
def test_is_what_the_oracle_computes(name: str, reference: str) -> None:
    model, ones = build(name).double(), torch.ones_like(tokens())
    dense = model(tokens()).logits
    model.set_attn_implementation(reference)
    want = model(tokens()).logits
    got = apply(model, SMALL)(tokens(), attention_mask=ones).logits
    # The norms compute in float32 even in a float64 model.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - dense).abs().max() > 0.1


@torch.no_grad()
def test_options_are_read_once_and_after_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, too, deep in a table."""
    number, read = 0, MoBAConfig.from_dict

    def count(options: Any) -> MoBAConfig:
        nonlocal number
        number += 1
        return read(options)

    table = ((1, 1, 1, 1),) * 3
    models = [apply(build("Llama"), replace(SMALL, head_top_k=table)) for _ in range(2)]
    monkeypatch.setattr(MoBAConfig, "from_dict", count)
    monkeypatch.setattr(integration, "_last", None)
    for model in models:
        sparse = model(tokens()).logits
    assert number == 1
    options = models[0].config.moba_flex
    options["head_top_k"][2][0] = SMALL.top_k
    changed = models[0](tokens()).logits
    assert number == 2
    torch.testing.assert_close(models[1](tokens()).logits, sparse)
    again = apply(build("Llama"), replace(SMALL, head_top_k=(*table[1:], (SMALL.top_k, 1, 1, 1))))
    torch.testing.assert_close(changed, again(tokens()).logits)
    assert (changed - sparse).abs().max() > 1e-3
    options["head_top_k"][2][0] = "2"
    with pytest.raises(TypeError, match="head_top_k must be an int, got str"):
        models[0](tokens())


def test_dense_layers_stay_dense() -> None:
    model = build("Llama")
    dense = model(tokens()).logits
    apply(model, MoBAConfig(8, 2, dense_layers=(0, 1, -1)))
    torch.testing.assert_close(model(tokens()).logits, dense, rtol=0, atol=0)


def test_observers_see_the_layers_that_route() -> None:
    model = apply(build("Llama"), MoBAConfig(8, 2, dense_layers=(-2,)))
    seen: list[Any] = []
    with observe(lambda *call: seen.append(call)):
        model(tokens())
    model(tokens())
    assert [call[0] for call in seen] == [0, 2]
    _, q, k, v, scale, config, layout = seen[0]
    assert layout == {}
    assert q.shape == (2, 4, LENGTH, 8)
    assert k.shape == v.shape == (2, 2, LENGTH, 8)
    assert scale == 8**-0.5
    assert config == MoBAConfig(8, 2, dense_layers=(-2,))


def test_observers_leave_after_an_error() -> None:
    model = apply(build("Llama"), SMALL)

    def fail(*call: Any) -> None:
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"), observe(fail):
        model(tokens())
    model(tokens())


def test_sliding_layers_may_stay_as_they_are() -> None:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    model = build("Gemma3Text", layer_types=layers, sliding_window=8)
    dense = model(tokens())[0]
    apply(model, MoBAConfig(8, 6, dense_layers=(0, 2)))
    torch.testing.assert_close(model(tokens())[0], dense)


def test_bidirectional_models_choose_among_all_blocks() -> None:
    model = build("ModernBert", pad_token_id=0, global_attn_every_n_layers=1, layer_types=FULL)
    dense = model(tokens())[0]
    torch.testing.assert_close(apply(model, ALL)(tokens())[0], dense)
    later = tokens()
    later[:, -1] = 5
    assert not torch.equal(model(later)[0][:, 0], model(tokens())[0][:, 0])


def test_a_decoder_may_be_run_bidirectionally() -> None:
    model = build("Llama")
    dense = model(tokens(), is_causal=False).logits
    torch.testing.assert_close(apply(model, ALL)(tokens(), is_causal=False).logits, dense)


def test_a_multimodal_model_switches_its_text_part(tmp_path: Path) -> None:
    text, vision = (
        transformers.LlamaConfig(**SIZES),
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    model: Any = transformers.LlavaForConditionalGeneration(config)
    model.eval()
    x = tokens() % 59 + 1
    dense = model(input_ids=x).logits
    apply(model, ALL).save_pretrained(tmp_path)
    again: Any = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, again):
        assert one.config.text_config._attn_implementation == "moba_flex"
        assert one.config.vision_config._attn_implementation != "moba_flex"
        torch.testing.assert_close(one(input_ids=x).logits, dense)


def test_a_text_part_may_lie_deep_in_a_model() -> None:
    config: Any = transformers.Qwen2_5OmniConfig()
    thinker = config.thinker_config
    thinker.text_config.num_hidden_layers = thinker.vision_config.depth = 1
    thinker.audio_config.encoder_layers = config.talker_config.num_hidden_layers = 1
    with torch.device("meta"):
        apply(transformers.Qwen2_5OmniForConditionalGeneration(config), SMALL)
    parts = thinker.text_config, thinker.vision_config, thinker.audio_config, config.talker_config
    used = [part._attn_implementation == "moba_flex" for part in parts]
    assert used == [True, False, False, False]


def test_trains() -> None:
    model: Any = build("Llama").train()
    model(tokens(), labels=tokens()).loss.backward()
    dense = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = apply(model, ALL)(tokens(), labels=tokens()).loss
    loss.backward()
    for got, want in zip(model.parameters(), dense, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model: Any = apply(build("Llama"), SMALL).train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for got, want in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(got.grad, want)


@pytest.mark.parametrize("mask", [None, torch.ones(2, LENGTH, dtype=torch.int64)])
def test_compiles_into_one_graph(mask: Tensor | None) -> None:
    model = apply(build("Llama"), SMALL)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(tokens(), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got, model(tokens()).logits)


def test_a_saved_model_keeps_its_options(tmp_path: Path) -> None:
    rows = ((2, 3, 2, 2),) * 3
    config = MoBAConfig(8, 3, 1, dense_layers=(-1,), cached="dense", head_top_k=rows)
    model = apply(build("Llama"), config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["moba_flex"] == config.to_dict()
    load: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    again, want = load(tmp_path), model(tokens()).logits
    for reloaded in (again, load(tmp_path, attn_implementation="moba_flex"), apply(again)):
        torch.testing.assert_close(reloaded(tokens()).logits, want)
    dense = load(tmp_path, attn_implementation="sdpa")
    torch.testing.assert_close(dense(tokens()).logits, build("Llama")(tokens()).logits)
    torch.testing.assert_close(apply(dense)(tokens()).logits, want)
    # The command's models have no gate before it sets one.
    assert load_model(str(tmp_path)).config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="LlamaConfig must carry MoBA options, got none"):
        apply(build("Llama"))


def test_a_saved_model_is_no_dense_one_where_nobody_knows_its_attention(tmp_path: Path) -> None:
    apply(build("Llama"), SMALL).save_pretrained(tmp_path)
    code = (
        "import sys, transformers as t\n"
        "for name in ({'attn_implementation': 'sdpa'}, {}):\n"
        "    t.AutoModelForCausalLM.from_pretrained(sys.argv[1], **name)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert 'ValueError: Specified `attn_implementation="moba_flex"` is not support' in done.stderr
    assert "line 3" in done.stderr


def test_a_model_without_hooks_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = apply(build("Qwen3"), SMALL)
    model.save_pretrained(tmp_path)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    integration._warn_once.cache_clear()
    model(tokens())
    assert not caplog.messages
    for _ in range(2):
        again(tokens())
    (message,) = caplog.messages
    assert message.startswith("a model of Qwen3Config runs moba_flex as it was loaded, without")
    assert message.endswith("call moba_flex.integrations.transformers.apply(model)")
    apply(again).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == "moba_flex"


def test_a_default_serves_models_without_options(tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    register(SMALL)
    load: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation="moba_flex")
    want = apply(build("Llama"), SMALL)(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, want)
    register(None)
    with pytest.raises(ValueError, match="LlamaConfig must carry MoBA options, got none: call"):
        model(tokens())


# Cached calls.


def cached_dense() -> Any:
    return apply(build("Llama"), MoBAConfig(8, 2, cached="dense"))


@pytest.mark.parametrize("steps", [1, 5])
def test_calls_with_a_cache_are_dense(steps: int) -> None:
    model, x = cached_dense(), tokens()
    calls: list[Any] = []
    with observe(lambda *call: calls.append(call)):
        first = model(x[:, :-steps], use_cache=True)
        second = model(x[:, -steps:], past_key_values=first.past_key_values)
    assert len(calls) == 3  # the first call, with an empty cache, is MoBA in every layer

    caches = model(x[:, :-steps], use_cache=True).past_key_values
    model.set_attn_implementation("sdpa")
    want = model(x[:, -steps:], past_key_values=caches).logits
    torch.testing.assert_close(second.logits, want)


@pytest.mark.parametrize("steps", [1, 5])
def test_calls_with_a_static_cache_are_those_with_another(steps: int) -> None:
    """The prompt is routed; calls behind it are dense. So they are after a reset."""
    model, x = cached_dense().double(), tokens()
    static = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    for cache in (static, DynamicCache(), static):
        first = model(x[:, :-steps], past_key_values=cache).logits
        second = model(x[:, -steps:], past_key_values=cache).logits
        if cache is static:
            wants = first, second
            static.reset()  # type: ignore[no-untyped-call]
        else:
            torch.testing.assert_close((first, second), wants)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_generates(options: dict[str, Any]) -> None:
    generate = {"max_new_tokens": 5, "do_sample": False, **options}
    mask = torch.ones_like(tokens())
    want = build("Llama").generate(tokens(), attention_mask=mask, **generate)
    model = apply(build("Llama"), MoBAConfig(8, 20, cached="dense"))
    torch.testing.assert_close(model.generate(tokens(), attention_mask=mask, **generate), want)


def test_generates_without_a_cache_by_moba_alone() -> None:
    model = apply(build("Llama"), SMALL)
    got = model.generate(tokens(), max_new_tokens=4, do_sample=False, use_cache=False)
    want = tokens()
    for _ in range(4):
        want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], dim=1)
    torch.testing.assert_close(got, want)


# What is refused.


def test_refuses_a_cache() -> None:
    model = apply(build("Llama"), replace(SMALL, cached="refuse"))
    cache = model(tokens(), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    message = (
        "queries must be as many as keys, got 1 queries and 46 keys of a cache: "
        "pass use_cache=False, or let cached be 'route'"
    )
    with pytest.raises(ValueError, match=message):
        model(tokens()[:, :1], past_key_values=cache)
    static = StaticCache(config=model.config, max_cache_len=64)
    model(tokens()[:, :3], past_key_values=static)
    with pytest.raises(ValueError, match="got 45 queries and 64 keys of a cache"):
        model(tokens(), past_key_values=static)


def test_right_padding_needs_no_mask() -> None:
    model, x = apply(build("Llama"), SMALL), tokens()
    want = model(x[:1, :30]).logits
    x[0, 30:] = 0
    torch.testing.assert_close(model(x).logits[:1, :30], want)


def test_refuses_a_mask_of_the_callers_own() -> None:
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    message = r"attention_mask must be None or \[B, KV\], got a mask of shape \(2, 1, 45, 45\)"
    with pytest.raises(ValueError, match=message):
        apply(build("Llama"), SMALL)(tokens(), attention_mask=mask)


@pytest.mark.parametrize("name", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_refuses_mask_functions_of_a_model(name: str) -> None:
    model = apply(build("Llama"), SMALL)
    ids = torch.zeros(2, LENGTH, dtype=torch.int64)
    value: Any = ids if name == "block_sequence_ids" else lambda b, h, q, k: q == k
    with pytest.raises(ValueError, match="got a mask function of the model's own"):
        create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(2, LENGTH, 32),
            attention_mask=None,
            past_key_values=None,
            **{name: value},
        )


def test_refuses_sliding_windows() -> None:
    message = "layer 0 must have full attention, got sliding_window=8: name it in dense_layers"
    with pytest.raises(ValueError, match=message):
        apply(build("Mistral", sliding_window=8), SMALL)(tokens())


def test_refuses_dropout_in_training() -> None:
    model = apply(build("Llama", attention_dropout=0.1), SMALL)
    model(tokens())
    with pytest.raises(ValueError, match=r"attention dropout must be 0, got 0\.1: set"):
        model.train()(tokens())


@pytest.mark.parametrize("name", list(integration._UNSUPPORTED))
def test_refuses_what_it_would_have_to_ignore(name: str) -> None:
    model = apply(build("Llama"), SMALL)
    q = torch.randn(1, 4, 9, 8)
    value: Any = True if name == "output_attentions" else torch.ones(2)
    with pytest.raises(ValueError, match=f"^attention must have .*, got {name}: use"):
        integration._attention(model.model.layers[0].self_attn, q, q, q, None, **{name: value})


def test_refuses_cross_attention() -> None:
    small: dict[str, Any] = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 61,
    }
    encoder_decoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    with pytest.raises(
        ValueError, match="decoder without cross-attention, got is_encoder_decoder"
    ):
        apply(encoder_decoder, SMALL)
    decoder = build("Bert", is_decoder=True, add_cross_attention=True)
    with pytest.raises(
        ValueError, match="decoder without cross-attention, got add_cross_attention"
    ):
        apply(decoder, SMALL)


def test_refuses_layers_of_cross_attention() -> None:
    layers = {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}}
    config = transformers.MllamaTextConfig(**{**SIZES, **layers})
    model: Any = apply(transformers.MllamaForCausalLM(config), SMALL)
    model.eval()(tokens())
    with pytest.raises(ValueError, match="must be self-attention, got MllamaTextCrossAttention"):
        model(tokens(), cross_attention_states=torch.randn(2, LENGTH, 32))


def test_refuses_models_without_the_attention_interface() -> None:
    small: Any = {"vocab_size": 61, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**small))
    message = "model must use the attention interface of transformers, got BloomForCausalLM: call"
    with pytest.raises(ValueError, match=message):
        apply(model, SMALL)


def test_refuses_models_whose_attention_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of which transformers refuses another part than the one that is switched."""
    model = build("Llama")

    def refuse(name: Any) -> None:
        raise ValueError("Encoder does not take it")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    message = "model must let its attention be chosen, got LlamaForCausalLM: Encoder does not"
    with pytest.raises(ValueError, match=message):
        apply(model, SMALL)


@pytest.mark.parametrize("wrap", [lambda model: None, torch.nn.DataParallel, lambda _: 3])
def test_refuses_what_is_no_model_of_transformers(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a model of transformers, got \w+: call"):
        apply(wrap(build("Llama")), SMALL)


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa", "HYV4", "AXK2", "Doge"])
def test_refuses_models_with_a_sparse_attention_of_their_own(name: str) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(num_hidden_layers=1)
        model = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match="must have no sparse attention of its own, got"):
        apply(model, SMALL)


@pytest.mark.parametrize(
    "options",
    [{"dense_layers": (0,)}, {"head_top_k": ((2,) * 4,) * 3}, {"layer_top_k": (2,) * 3}],
)
def test_refuses_to_guess_which_layer_one_is(options: dict[str, Any]) -> None:
    sizes: Any = {"vocab_size": 61, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    model: Any = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes))
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} must be empty for a model whose layers have no"):
        apply(model, MoBAConfig(8, 2, **options))
    apply(model.eval(), SMALL)(tokens())


def test_its_output_is_contiguous() -> None:
    module = apply(build("Llama"), SMALL).model.layers[0].self_attn
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    for positions in (torch.arange(9)[None], torch.arange(9)[None] % 5):
        out, _ = integration._attention(module, q, k, k, None, position_ids=positions)
        assert out.is_contiguous()
        assert out.shape == (2, 9, 4, 8)


def test_ignores_what_is_not_meant_for_attention() -> None:
    model = apply(build("Llama"), SMALL)
    rest = {"num_items_in_batch": torch.tensor(3), "token_type_ids": tokens(), "max_length_q": 45}
    torch.testing.assert_close(model(tokens(), **rest).logits, model(tokens()).logits)


def test_refuses_wrong_options() -> None:
    with pytest.raises(TypeError, match="config must be a MoBAConfig, got dict"):
        apply(build("Llama"), {"block_size": 8})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dense_layers must lie in -3\.\.2, got 3"):
        apply(build("Llama"), MoBAConfig(8, 2, dense_layers=(3,)))


# Models that choose blocks themselves.

FIRST = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
M3: dict[str, Any] = {
    **SIZES,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 8,
    "index_topk_blocks": 3,
    "layer_types": FIRST,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}


def minimax(config: MoBAConfig | None = None, **options: Any) -> Any:
    """Return a MiniMax-M3, the same one every time, with its own eager attention or with ours."""
    from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    torch.manual_seed(0)
    own = {"attn_implementation": "eager"}
    model: Any = MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**{**M3, **own, **options}))
    model.eval()
    return model if config is None else apply(model, config)


OWN_CHOICE = MoBAConfig(8, 2, dense_layers=(0,))
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("static", [None, False, True])
def test_blocks_that_a_model_chooses_are_those_of_its_eager_attention(static: bool | None) -> None:
    """Also where the last block is short, and in chunks of any length behind cached keys."""
    models, x = (minimax(), minimax(OWN_CHOICE)), tokens()
    assert (minimax(layer_types=FULL)(x).logits - models[0](x).logits).abs().max() > 0.1
    caches: list[Any] = [
        StaticCache(config=m.config, max_cache_len=50) if static else DynamicCache(config=m.config)
        for m in models
    ]
    if static is None:
        torch.testing.assert_close(models[1](x).logits, models[0](x).logits, **CLOSE)
        return
    with torch.no_grad():
        for part in x.split((30, 1, 1, 9, 4), dim=1):
            want, got = (
                m(part, past_key_values=c).logits for m, c in zip(models, caches, strict=True)
            )
            torch.testing.assert_close(got, want, **CLOSE)


def test_a_model_that_chooses_blocks_trains_and_takes_padding_on_the_right() -> None:
    models, x, mask = (minimax(), minimax(OWN_CHOICE)), tokens(), torch.ones_like(tokens())
    mask[1, 30:] = 0
    logits = [m(x, attention_mask=mask).logits[mask == 1] for m in models]
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    for m in models:
        m(x, labels=x, use_cache=False).loss.backward()
    for want, got in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, **CLOSE)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_a_model_that_chooses_blocks_generates(options: dict[str, Any]) -> None:
    x = tokens()
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    want, got = (
        m.generate(x, attention_mask=torch.ones_like(x), **options)
        for m in (minimax(), minimax(OWN_CHOICE))
    )
    assert torch.equal(got, want)
