"""Experiment 3: one set of weights from sparse to dense.

    python -m perf.experiments.density --preset small --seeds 3 --minutes 4

Models trained with full attention, with MoBA, and with MoBA and then full attention read the same
text with each number of blocks. Models that `perf.experiments.language` trained are used again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from perf.experiments.language import SMALL
from perf.experiments.model import FULL
from perf.experiments.runs import (
    Column,
    Study,
    Text,
    add_text_options,
    key,
    make_parser,
    milliseconds,
    study_text,
)

ARMS = (FULL, SMALL, replace(SMALL, full_share=0.1))
TOP_KS = (2, 4, 8, 16, 32)


def measure(study: Study, text: Text, model: Any) -> dict[str, Any]:
    """Return the losses with each number of blocks, and with full attention."""
    found = {}
    for top_k in TOP_KS:
        model.arm = study.preset.fit(replace(SMALL, top_k=top_k))
        found[str(top_k)] = study.measure_text(text, model)
    model.arm = FULL
    found["full"] = study.measure_text(text, model)
    routing = found[str(SMALL.top_k)]["routing"]
    return {"at": found, "loss": found["full"]["loss"], "routing": routing}


def at(top_k: str) -> Column:
    """Return the column of a number of blocks."""
    return Column(f"loss at top_k {top_k}", lambda row: row["at"][top_k]["loss"])


COLUMNS = [
    *(at(str(top_k)) for top_k in TOP_KS),
    Column("loss at full", key("loss")),
    Column("ms a step", milliseconds, ".1f"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("density", __doc__)
    add_text_options(parser)
    study, text = study_text("density", parser.parse_args(arguments), ARMS)

    study.run(lambda model, arm: measure(study, text, model), COLUMNS)


if __name__ == "__main__":
    main()
