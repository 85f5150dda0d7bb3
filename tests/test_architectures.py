"""A sample of `tests.architectures`, each of another kind."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from moba_flex import MoBAConfig
from moba_flex.integrations.transformers import apply
from tests import architectures
from tests.architectures import Result, Verdict, check, refusal, table

# The models' own warnings are none of our business.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = {
    "LlamaForCausalLM": {
        "packed": "apart",
        "dense_layers": "honoured",
        "generate": "equal",
        "generate_sparse": "equal",
    },
    "GptOssForCausalLM": {"packed": "apart"},  # learned sinks, experts
    "DeepseekV3ForCausalLM": {"packed": "apart"},  # latent attention
    "PersimmonForCausalLM": {"packed": "apart"},  # hands position_ids to no layer
    "JetMoeForCausalLM": {"sparse": "works"},  # takes views of what attention returns
    "Lfm3ForCausalLM": {"packed": "differs in other layers"},  # convolutions between layers
    "DistilBertModel": {"dense_layers": "refused"},  # an encoder, its layers without numbers
    "CLIPModel": {"packed": "apart"},  # text beside images
    "Qwen2_5_VLTextModel": {"packed": "apart"},  # positions in three parts
    "DeepseekV32ForCausalLM": {"dense": "refused"},  # sparse attention of its own
    "T5Model": {"dense": "refused"},  # an encoder and a decoder
    "MptForCausalLM": {"dense": "refused"},  # attention of its own
}


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny models are no faster on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SAMPLE)
def test_every_property_is_right_or_refused(name: str) -> None:
    result = check(name)
    assert not result.not_built
    assert not result.wrong, str(result)
    got = {key: result.verdicts[key].kind for key in SAMPLE[name]}
    assert got == SAMPLE[name], str(result)


def test_an_apply_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check("LlamaForCausalLM", ["dense"])  # makes the attention known
    monkeypatch.setattr(architectures, "apply", lambda model, config: model)
    result = check("LlamaForCausalLM", ["dense", "sparse", "packed"])
    kinds = {key: each.kind for key, each in result.verdicts.items()}
    assert kinds == {"dense": "attention not called", "sparse": "dense", "packed": "contaminated"}
    assert result.wrong


def test_an_option_that_is_ignored_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(model: Any, config: MoBAConfig) -> Any:
        return apply(model, replace(config, dense_layers=()))

    monkeypatch.setattr(architectures, "apply", without)
    verdict = check("LlamaForCausalLM", ["dense_layers"]).verdicts["dense_layers"]
    assert (verdict.kind, verdict.wrong) == ("ignored", True)


def test_only_errors_of_our_own_are_refusals() -> None:
    with pytest.raises(ValueError, match="got 'no'") as ours:
        MoBAConfig(8, 2, cached="no")  # type: ignore[arg-type]
    assert refusal(ours.value).kind == "refused"
    with pytest.raises(RuntimeError) as theirs:
        torch.zeros(2) + torch.zeros(3)
    assert refusal(theirs.value).wrong


def test_the_table_counts_and_hides_nothing() -> None:
    results = [
        Result("A", {"dense": Verdict("equal")}),
        Result("B", {"dense": Verdict("differs", "0.5", wrong=True)}),
        Result("C", not_built="no timm"),
    ]
    assert table(results).splitlines() == [
        f"{'dense':17} equal 1, WRONG: differs 1",
        "3 architectures, 1 not built, 1 wrong",
    ]
    assert str(results[2]) == "C: not built: no timm"
