"""Experiment 4: SmolLM2-135M, trained on with MoBA and with full attention.

    python -m perf.experiments.continued --preset small --seeds 1 --minutes 4

The model reads validation text with each number of blocks before any training, then after equally
many steps with full attention and with MoBA. Its weights, of 93 MB, are those of `moba-flex`:
without a network, put their file into `$MOBA_FLEX_CACHE`, or name a folder by --model.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moba_flex import MoBAConfig
from moba_flex.cli.pretrained import NAME, load_model
from perf.experiments.data import Corpus, load_corpus
from perf.experiments.files import lock
from perf.experiments.model import FULL, Arm
from perf.experiments.runs import (
    Column,
    Preset,
    Study,
    Text,
    add_text_options,
    make_parser,
    milliseconds,
    pick_arms,
    preset_of,
)

SPARSE = Arm("moba", 128, 8, sink_blocks=1)
ARMS = (FULL, SPARSE)
TOP_KS = (4, 8, 16, 32)
LR = 1e-4
PRESETS = {
    "tiny": Preset(0, 0, 0, 0, 128, 2, 4, shrink=16, windows=2),
    "small": Preset(0, 0, 0, 0, 8192, 4, 100, windows=16),  # 3 million tokens
    "medium": Preset(0, 0, 0, 0, 8192, 8, 300, windows=32),
}


class Pretrained(nn.Module):
    """A model of transformers whose attention is an arm: full, or MoBA."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.arm = FULL

    @property
    def arm(self) -> Arm:
        """How it attends."""
        return self._arm

    @arm.setter
    def arm(self, arm: Arm) -> None:
        if arm == getattr(self, "_arm", None):
            return
        if arm.kind == "full":
            self.model.set_attn_implementation("sdpa")
        elif arm.kind == "moba" and not arm.is_shared:
            from moba_flex.integrations.transformers import apply

            layers = tuple(range(-arm.dense_layers, 0))
            config = MoBAConfig(arm.block_size, arm.top_k, arm.sink_blocks, dense_layers=layers)
            apply(self.model, config)
        else:
            raise ValueError(f"arm must be full or plain MoBA for {NAME}, got {arm.name}")
        self._arm = arm

    def attended(self, length: int) -> float:
        """Return how many keys a query attends to, averaged over a sequence and layers."""
        layers = self.model.config.num_hidden_layers
        dense = min(self.arm.dense_layers, layers)
        keys = (layers - dense) * self.arm.attended(length) + dense * FULL.attended(length)
        return keys / layers

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, L, vocab]`."""
        return self.model(input_ids=ids, use_cache=False).logits


class PretrainedText(Text):
    """To go on with text from the weights of a model."""

    def __init__(self, corpus: Corpus, name: str | None) -> None:
        super().__init__(corpus)
        self.name, self.loaded = name, None
        self.facts = corpus.facts | {"model": name or NAME}

    def make_model(self, preset: Preset, arm: Arm) -> nn.Module:
        """Return the model as it was loaded; only once is its file decoded, in half a minute."""
        if arm.key_conv:
            raise ValueError(f"arm must be without convolution for {NAME}, got {arm.name}")
        if self.loaded is None:
            self.loaded = load_model(self.name, dtype=torch.float32)
        return Pretrained(copy.deepcopy(self.loaded))


def measure(study: Study, text: Text, model: Any) -> dict[str, Any]:
    """Return perplexities with each number of blocks, and with full attention."""
    found: dict[str, Any] = {}
    for name, arm in [(str(top_k), replace(SPARSE, top_k=top_k)) for top_k in TOP_KS] + [
        ("full", FULL)
    ]:
        model.arm = study.preset.fit(arm)
        numbers = study.measure_text(text, model)
        found[name] = numbers | {"perplexity": math.exp(numbers["loss"])}
    routing = found[str(SPARSE.top_k)]["routing"]
    return {"at": found, "loss": found["full"]["loss"], "routing": routing}


def at(name: str) -> Column:
    """Return the column of a number of blocks."""
    return Column(f"at {name}", lambda row: row["at"][name]["perplexity"], ".3f")


COLUMNS = [
    *(at(str(top_k)) for top_k in TOP_KS),
    at("full"),
    Column("ms a step", milliseconds, ".1f"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("continued", __doc__, PRESETS)
    add_text_options(parser, "smollm2")
    parser.add_argument("--model", help="a folder or Hub id with this vocabulary")
    options = parser.parse_args(arguments)
    preset = preset_of(options, PRESETS)
    corpus = load_corpus(options.tokens, options.folder, options.megabytes)
    text = PretrainedText(corpus, options.model)
    arms = pick_arms([preset.fit(arm) for arm in ARMS], options.arms)
    study = Study("continued", options, preset, text, arms, LR)
    with lock(options.folder / f"{options.out.name}.before.lock"):
        study.save()
        if "before" not in study.document:
            study.document["before"] = measure(study, text, study.make_model(FULL, 0))
            study.save()
    before = study.document["before"]["at"]
    print("perplexity before:", {name: round(x["perplexity"], 3) for name, x in before.items()})
    study.run(lambda model, arm: measure(study, text, model), COLUMNS)


if __name__ == "__main__":
    main()
