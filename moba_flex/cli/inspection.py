"""The command `moba-flex inspect`."""

import argparse
from typing import Any

from moba_flex.cli import runs
from moba_flex.cli.door import integer, need

_INSPECT = """\
Run a language model over a text with Mixture of Block Attention, and show what its gate does, by
layer: how much of dense attention's weight the chosen blocks hold and how much the best ones
would, how evenly and how alike the queries choose, and how far away. Write the figures of each
head to moba_inspect.json and a picture to moba_inspect.png."""


def add_command(commands: Any) -> None:
    """Add the command `inspect` to those of `moba-flex`."""
    job = commands.add_parser(
        "inspect",
        help="show what the gate chooses, by layer and head",
        description=_INSPECT,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    job.set_defaults(run=_inspect)
    runs.add_text(job)
    gate = job.add_argument_group("gate")
    for option, least, default, meaning in runs.GATE:
        gate.add_argument(option, type=integer(least), metavar="N", default=default, help=meaning)
    runs.add_dense_layers(gate)
    runs.add_place(job)


def _inspect(arguments: argparse.Namespace) -> int:
    need("hf", "transformers", "tqdm")
    need("plot", "matplotlib")
    # Arguments are checked before the model loads.
    from moba_flex.config import MoBAConfig

    config = MoBAConfig(
        arguments.block_size,
        arguments.top_k,
        arguments.sink_blocks,
        arguments.local_blocks,
        dense_layers=tuple(vars(arguments).get("dense_layers", ())),
    )
    if config.block_size * config.top_k >= arguments.seq_len:
        raise ValueError(
            f"--top-k must leave out some of --seq-len = {arguments.seq_len} tokens, "
            f"got {config.top_k} blocks of {config.block_size}"
        )
    files = runs.check_files(arguments, "inspect")
    loaded = runs.load(arguments, [config])

    from moba_flex.cli import inspector, report

    found = inspector.inspect(loaded, config)
    runs.write(found, files, (report.save_json, inspector.save_plot), inspector.table(found))
    return 0
