"""Experiment 2: needle and multi-query associative recall.

    python -m perf.experiments.retrieval --preset small --seeds 3 --minutes 4

A sequence of noise holds pairs of a key and a value at random places. At its end some keys are
repeated, and the model has to predict their values: chance is 1 / 128. One pair is a needle in a
haystack, many are associative recall. Accuracy is told by the number of pairs, by the distance to
the pair as a share of the sequence, and by the number of blocks that are read at inference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perf.experiments.language import LARGE, SMALL
from perf.experiments.model import FULL, Arm, Decoder
from perf.experiments.runs import (
    Column,
    Preset,
    Study,
    key,
    make_parser,
    milliseconds,
    pick_arms,
    preset_of,
)
from perf.experiments.train import IGNORED, Batches, routing_statistics

KINDS = 128  # of noise, of keys and of values
DISTANCES = 4  # equal parts of the sequence
TOP_KS = (2, 4, 8, 16)
LR = 2e-3
PRESETS = {
    "tiny": Preset(32, 2, 4, 2, 128, 4, 10, shrink=16, windows=4),
    "small": Preset(256, 4, 4, 2, 2048, 32, 500, shrink=4, windows=64),
    "medium": Preset(384, 6, 6, 2, 8192, 16, 1500, windows=64),
}
ARMS = (
    FULL,
    LARGE,
    SMALL,
    replace(SMALL, kind="window"),
    replace(SMALL, kind="sink window"),
    replace(SMALL, kind="global local"),
    replace(SMALL, dense_layers=1),
)


@dataclass(frozen=True)
class Recall:
    """A batch of sequences.

    Attributes:
        ids: Tokens, `[B, L]`.
        targets: The value at each repeated key, else `IGNORED`, `[B, L]`.
        distances: Of each repeated key to its pair, else 0, `[B, L]`.
    """

    ids: Tensor
    targets: Tensor
    distances: Tensor


def pair_counts(length: int) -> tuple[int, int, int]:
    """Return the numbers of pairs: a needle, few and many."""
    return 1, max(2, length // 256), max(4, length // 32)


def draw(batch: int, length: int, pairs: int, generator: torch.Generator) -> Recall:
    """Draw sequences with as many pairs; each pair is asked for once."""
    most = pair_counts(length)[-1]
    if not 1 <= pairs <= min(most, KINDS):
        raise ValueError(f"pairs must lie in 1..{min(most, KINDS)}, got {pairs}")
    body = length - 2 * most

    def numbers(most: int) -> Tensor:
        """Return different numbers for each sequence, `[B, pairs]`."""
        return torch.rand(batch, most, generator=generator).argsort(1)[:, :pairs]

    ids = torch.randint(KINDS, (batch, length), generator=generator)
    targets, distances = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    keys = KINDS + numbers(KINDS)
    values = 2 * KINDS + torch.randint(KINDS, keys.shape, generator=generator)
    places = 2 * numbers(body // 2)
    asked = (body + 2 * torch.arange(pairs)).expand(batch, -1)
    for at in (places, asked):
        ids.scatter_(1, at, keys)
        ids.scatter_(1, at + 1, values)
    targets.scatter_(1, asked, values)
    distances.scatter_(1, asked, asked - places)
    return Recall(ids, targets, distances)


class RecallTask:
    """To predict values of keys; each step holds another number of pairs, by turns."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"task": "recall", "kinds": KINDS}

    def make_model(self, preset: Preset, arm: Arm) -> nn.Module:
        """Return a decoder."""
        return Decoder(preset.sizes(3 * KINDS, arm))

    def batches(self, seed: int, preset: Preset) -> Batches:
        """Return sequences that no other step has."""
        counts = pair_counts(preset.seq_len)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(1_000_003 * seed + step)
            pairs = counts[-1 - step % len(counts)]
            drawn = draw(preset.batch, preset.seq_len, pairs, generator)
            return drawn.ids, drawn.targets

        return batch


def accuracy(study: Study, model: nn.Module) -> dict[str, Any]:
    """Return the accuracy by number of pairs, and by distance where there are many."""
    preset, rows = study.preset, []
    for pairs in pair_counts(preset.seq_len):
        generator = torch.Generator().manual_seed(-pairs)
        windows = preset.windows * (4 if pairs == 1 else 1)  # a needle is one question
        drawn = draw(windows, preset.seq_len, pairs, generator)
        right, distances = [], []
        for part in torch.arange(windows).split(preset.batch):
            ids = drawn.ids[part].to(study.device)
            model.eval()
            with (
                torch.no_grad(),
                torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda),
            ):
                said = model(ids).argmax(2).cpu()
            asked = drawn.targets[part] != IGNORED
            right.append((said == drawn.targets[part])[asked].double())
            distances.append(drawn.distances[part][asked])
        hits = torch.cat(right)
        where = torch.cat(distances) * DISTANCES // preset.seq_len
        by_distance = [
            float(hits[where == part].mean()) if (where == part).any() else None
            for part in range(DISTANCES)
        ]
        rows.append({"pairs": pairs, "accuracy": float(hits.mean()), "by_distance": by_distance})
    return {"by_pairs": rows, "accuracy": rows[-1]["accuracy"], "needle": rows[0]["accuracy"]}


def measure(study: Study, model: Any, arm: Arm) -> dict[str, Any]:
    """Return accuracies, of arms that choose by content with other numbers of blocks too."""
    generator = torch.Generator().manual_seed(0)
    drawn = draw(1, study.preset.seq_len, pair_counts(study.preset.seq_len)[-1], generator)
    routing = routing_statistics(model, drawn.ids.to(study.device))
    found = accuracy(study, model) | {"routing": routing}
    found["attended"] = model.attended(study.preset.seq_len)
    if arm.kind in ("full", "moba"):
        found["at"] = {}
        for top_k in TOP_KS:
            fitted = study.preset.fit(SMALL) if arm.kind == "full" else arm
            model.arm = replace(fitted, top_k=top_k)
            found["at"][str(top_k)] = accuracy(study, model)
    return found


def far(row: Any) -> float | None:
    """Return the accuracy on the most distant pairs."""
    return row["by_pairs"][-1]["by_distance"][-1]


COLUMNS = [
    Column("needle", key("needle"), ".3f"),
    Column("few pairs", lambda row: row["by_pairs"][1]["accuracy"], ".3f"),
    Column("many pairs", key("accuracy"), ".3f"),
    Column("many pairs, farthest quarter", far, ".3f"),
    Column("attended keys", key("attended"), ".0f"),
    Column("ms a step", milliseconds, ".1f"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser("retrieval", __doc__, PRESETS).parse_args(arguments)
    preset, task = preset_of(options, PRESETS), RecallTask()
    arms = pick_arms([preset.fit(arm) for arm in ARMS], options.arms)
    study = Study("retrieval", options, preset, task, arms, LR)
    study.run(lambda model, arm: measure(study, model, arm), COLUMNS)


if __name__ == "__main__":
    main()
