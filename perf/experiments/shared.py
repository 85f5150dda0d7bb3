"""Experiment 6: selections that several queries share, what they cost and what they give.

    python -m perf.experiments.shared --preset small --seeds 3 --minutes 4

The query heads of a key/value head may choose together, and so may 128 neighbouring queries: then
a mask in natural order (the plan "masked") skips all that was not chosen. Beside the losses, one
call of attention is timed by each plan, forward and backward, the choice included.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from moba_flex import routed_attention
from perf.experiments.language import SMALL
from perf.experiments.model import FULL, Arm
from perf.experiments.runs import (
    TEXT_COLUMNS,
    Column,
    Study,
    add_text_options,
    key,
    make_parser,
    study_text,
)
from perf.timing import synced_clock

NEIGHBOURS = 128
HEADS = replace(SMALL, shared_heads=True)
QUERIES = replace(SMALL, shared_queries=NEIGHBOURS)
ARMS = (FULL, SMALL, HEADS, QUERIES, replace(QUERIES, shared_heads=True))
ROUNDS = 10
COLUMNS = [
    *TEXT_COLUMNS,
    Column("ms of attention", key("attention_ms"), ".2f"),
    Column("ms by a mask", key("masked_ms"), ".2f"),
]


def attention_times(study: Study, arm: Arm) -> dict[str, float | None]:
    """Return the ms of one layer's attention by "auto" and by the plan "masked".

    The plan "masked" has no backward on CPU, and full attention needs no mask: None then.
    """
    preset, device = study.preset, study.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        shape = preset.batch, heads, preset.seq_len, preset.dim // preset.num_heads
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.requires_grad_()

    q, k, v = (random(heads) for heads in (preset.num_heads, *[preset.num_kv_heads] * 2))

    def attend(plan: Literal["auto", "masked"]) -> torch.Tensor:
        if plan == "auto":
            return arm.attend(q, k, v)
        routing = arm.choose(q, k)
        assert routing is not None
        return routed_attention(q, k, v, routing, plan=plan)

    masked = device.type == "cuda" and arm.kind != "full"
    return {
        "attention_ms": timed(lambda: attend("auto").sum().backward()),
        "masked_ms": timed(lambda: attend("masked").sum().backward()) if masked else None,
    }


def timed(run: Callable[[], Any]) -> float:
    """Return the median ms of a call after a first one that compiles."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = synced_clock()
        run()
        times.append(1e3 * (synced_clock() - start))
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("shared", __doc__)
    add_text_options(parser)
    options = parser.parse_args(arguments)
    study, text = study_text("shared", options, ARMS)

    def measure(model: nn.Module, arm: Arm) -> dict[str, Any]:
        losses = study.measure_text(text, model)
        return losses if options.together else losses | attention_times(study, arm)

    study.run(measure, COLUMNS)


if __name__ == "__main__":
    main()
