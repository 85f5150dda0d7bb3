"""Experiment 5: smaller blocks at equal attended keys.

    python -m perf.experiments.blocks --preset small --seeds 3 --minutes 4

All arms attend to 1,536 keys; the smaller the blocks, the finer the choice.
"""

from collections.abc import Sequence

from perf.experiments.model import FULL, Arm
from perf.experiments.runs import compare_on_text

ARMS = (FULL, *(Arm("moba", size, 1536 // size) for size in (512, 128, 64)))


def main(arguments: Sequence[str] | None = None) -> None:
    compare_on_text("blocks", __doc__, ARMS, arguments)


if __name__ == "__main__":
    main()
