"""Experiment 1: language modelling, MoBA beside full attention and fixed patterns.

    python -m perf.experiments.language --preset small --seeds 3 --minutes 4

Fixed patterns attend to exactly as many keys as the MoBA of their block_size and top_k, at each
position. Losses are in nats a token of the validation packages.
"""

from collections.abc import Sequence
from dataclasses import replace

from perf.experiments.model import FULL, Arm
from perf.experiments.runs import compare_on_text

LARGE = Arm("moba", 512, 3)
SMALL = Arm("moba", 128, 8)
ARMS = (
    FULL,
    LARGE,
    replace(LARGE, kind="window"),
    SMALL,
    replace(SMALL, kind="window"),
    replace(SMALL, kind="sink window"),
    replace(SMALL, kind="global local"),
    replace(SMALL, full_share=0.1),
    replace(SMALL, dense_layers=1),
)


def main(arguments: Sequence[str] | None = None) -> None:
    compare_on_text("language", __doc__, ARMS, arguments)


if __name__ == "__main__":
    main()
