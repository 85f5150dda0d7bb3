"""Continuous batching of transformers: the tokens are those of each prompt alone."""

from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers")

from transformers import ContinuousBatchingConfig  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from moba_flex.integrations.batching import continuous_batching  # noqa: E402
from tests.test_generation import MODELS, build, generate  # noqa: E402

NEW = 8
# Chunks of 32 tokens cut the longer prompts, and share steps with the new tokens of others.
PAGES = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 32}


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, 64, (n,), generator=draw).tolist() for n in (50, 3, 17, 120)]


def alone(model: Any) -> list[list[int]]:
    """Return the new tokens of each prompt, without batching."""
    rows = [
        generate(model, torch.tensor([prompt]), max_new_tokens=NEW)[0, len(prompt) :]
        for prompt in prompts()
    ]
    return [row.tolist() for row in rows]


def batched(model: Any, **options: Any) -> list[list[int]]:
    """Return the new tokens of each prompt, by `generate_batch`."""
    ids = {"eos_token_id": -1, "pad_token_id": 0}
    greedy: Any = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, **ids)
    pages = ContinuousBatchingConfig(**{**PAGES, **options})
    outputs = model.generate_batch(prompts(), greedy, pages)
    assert [output.error for output in outputs.values()] == [None] * 4
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_are_those_of_each_prompt_alone(name: str) -> None:
    """Also with soft caps, sinks, and dense layers with a window."""
    model = build(name)
    want = alone(model)
    with continuous_batching(model):
        assert batched(model) == want
    assert alone(model) == want


@pytest.mark.parametrize(
    "options", [{"max_batch_tokens": 1000}, {"q_padding_interval_size": 16}], ids=str
)
def test_steps_of_any_size(options: dict[str, Any]) -> None:
    """Prompts in one piece, and steps that are padded."""
    model = build("Llama")
    with continuous_batching(model):
        assert batched(model, **options) == alone_of_llama()


def alone_of_llama() -> list[list[int]]:
    return alone(build("Llama"))


def test_layers_and_heads_have_their_numbers() -> None:
    model = build("Llama", layer_top_k=(3, 1))
    want = alone(model)
    assert want != alone_of_llama()
    with continuous_batching(model):
        assert batched(model) == want


def test_other_models_keep_the_function_of_transformers() -> None:
    model, dense = build("Llama"), build("Llama")
    dense.set_attn_implementation("eager")
    want, theirs = alone(dense), ALL_ATTENTION_FUNCTIONS["paged|eager"]
    assert want != alone(model)
    with continuous_batching(model):
        with continuous_batching(build("Llama")):
            pass
        assert batched(dense) == want
        assert batched(model) == alone_of_llama()
    assert ALL_ATTENTION_FUNCTIONS["paged|eager"] is theirs


def test_without_the_context_it_is_refused() -> None:
    message = "Implementation moba_flex is not supported for continuous batching"
    with pytest.raises(ValueError, match=message):
        batched(build("Llama"))
