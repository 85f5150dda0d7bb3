"""Experiment 8: the time of a training step, end to end, arm beside arm in one process.

    python -m perf.experiments.steps --preset long --seeds 5

One model takes steps of training with each arm by turns, so that all arms meet the same clocks and
temperatures. A round, which counts as a seed does elsewhere, gives each arm the median of a few
steps. The model has just begun to train, at the lowest rate. Full attention runs on the fastest
backend of PyTorch that takes the request, cuDNN's before flash.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from perf.experiments.language import ARMS
from perf.experiments.runs import Column, Study, add_text_options, key, make_parser, study_text
from perf.experiments.train import make_optimizer, train_step
from perf.timing import synced_clock

WARM = 3  # steps of an arm before its first round
TIMED = 5  # steps of a round
COLUMNS = [
    Column("attended keys", key("attended"), ".0f"),
    Column("ms a step", lambda row: 1e3 * row["step_seconds"], ".1f"),
    Column("tokens a second", key("tokens_per_second"), ".0f"),
    Column("MiB", key("peak_mib"), ".0f"),
]


def measure(study: Study) -> None:
    """Time rounds until the minutes are over."""
    preset, device = study.preset, study.device
    batches = study.task.batches(0, preset)
    numbers = itertools.count()
    models: dict[int, tuple[Any, torch.optim.Optimizer]] = {}  # by what weights do not share
    warm: set[str] = set()

    def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
        ids, targets = (x.to(device) for x in batches(next(numbers)))
        start = synced_clock()
        train_step(model, optimizer, ids, targets, study.recipe.clip)
        return synced_clock() - start

    for turn in range(study.options.seeds):
        for arm in study.arms:
            if study.has(arm, turn):
                continue
            if study.is_over:
                return
            if arm.key_conv not in models:
                made = study.make_model(arm, 0).train()
                recipe = replace(study.recipe, lr=study.recipe.rate(0))
                models[arm.key_conv] = made, make_optimizer(made, recipe)
            model, optimizer = models[arm.key_conv]
            model.arm = arm
            for _ in range(0 if arm.name in warm else WARM):
                step(model, optimizer)
            warm.add(arm.name)
            on_gpu = device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            times = [step(model, optimizer) for _ in range(TIMED)]
            peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None
            seconds = statistics.median(times)
            study.add(
                {
                    "arm": arm.name,
                    "seed": turn,
                    "step_seconds": seconds,
                    "tokens_per_second": preset.batch * preset.seq_len / seconds,
                    "peak_mib": peak,
                    "attended": model.attended(preset.seq_len),
                    "train_seconds": sum(times),
                    "parameters": sum(weight.numel() for weight in model.parameters()),
                }
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("steps", __doc__)
    add_text_options(parser)
    arms = [arm for arm in ARMS if not arm.full_share]
    study, _ = study_text("steps", parser.parse_args(arguments), arms)
    measure(study)
    study.tell(COLUMNS)


if __name__ == "__main__":
    main()
