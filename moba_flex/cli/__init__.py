"""The command `moba-flex`, and its subcommand `eval`."""

import argparse
import sys
from collections.abc import Sequence
from itertools import product

from moba_flex.cli import generation, inspection, packages, runs
from moba_flex.cli.door import TRACEBACK, Parser, guarded, integer, need
from moba_flex.compile.package import own_version

_EVAL = """\
Run a language model over a text with dense attention, then with Mixture of Block Attention at
several settings, without training. Print what share of the attention is computed, what that does
to the perplexity of the text's second half, and what the gate chose; write the figures to
moba_eval.json and a picture to moba_eval.png. All combinations of the values given are run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments of the command; if None, those of the process.

    Returns:
        The exit code: 0; 2 after an error; 130 after Ctrl-C.
    """
    return guarded(_parser(), list(sys.argv[1:] if argv is None else argv))


def _parser() -> Parser:
    parser = Parser(
        prog="moba-flex",
        description="Mixture of Block Attention for PyTorch FlexAttention.",
        epilog=f"Errors are one line; with {TRACEBACK}=1 in the environment, with a traceback.",
    )
    parser.add_argument("--version", action="version", version=f"moba-flex {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    job = commands.add_parser(
        "eval",
        help="measure what Mixture of Block Attention does to a language model",
        description=_EVAL,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    job.set_defaults(run=_eval)
    runs.add_text(job)
    gate = job.add_argument_group("gate, one or more values each")
    several = {"--block-size": [64], "--top-k": [4, 8, 12, 16], "--sink-blocks": [0, 1]}
    for option, least, _, meaning in runs.GATE:
        gate.add_argument(
            option,
            type=integer(least),
            nargs="+",
            metavar="N",
            default=several.get(option, [0]),
            help=meaning,
        )
    runs.add_place(job)
    inspection.add_command(commands)
    generation.add_command(commands)
    packages.add_commands(commands)
    return parser


def _eval(arguments: argparse.Namespace) -> int:
    need("hf", "transformers", "tqdm")
    need("plot", "matplotlib")
    # Arguments are checked before the model loads.
    from moba_flex.config import MoBAConfig

    grid = product(
        arguments.block_size, arguments.sink_blocks, arguments.local_blocks, arguments.top_k
    )
    configs = [MoBAConfig(size, top_k, sink, local) for size, sink, local, top_k in grid]
    if not configs:  # argparse reads `--top-k=--` as an empty list
        raise ValueError("options of the gate must have values, got one without")
    files = runs.check_files(arguments, "eval")
    loaded = runs.load(arguments, configs)

    from moba_flex.cli import evaluate, report

    found = evaluate.evaluate(
        loaded.model,
        loaded.ids,
        configs,
        model_name=loaded.model_name,
        text_name=loaded.text_name,
    )
    runs.write(found, files, (report.save_json, report.save_plot), report.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
