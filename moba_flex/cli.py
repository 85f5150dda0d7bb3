"""The command `moba-flex`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

from moba_flex import cli_export
from moba_flex.cli_export import at_least, need
from moba_flex.compile.package import own_version

_EVAL = """\
Run a language model over a text with dense attention, then with Mixture of Block Attention at
several settings, without training. Print what share of the attention is computed, what that does
to the perplexity of the text's second half, and what the gate chose; write the figures to
moba_eval.json and a picture to moba_eval.png. All combinations of the values given are run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; those of the process if None.

    Returns:
        The exit code: 0, or 2 for an error in what the user gave.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"moba-flex {arguments.command}: error: {reason}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moba-flex", description="Mixture of Block Attention for PyTorch FlexAttention."
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
    source = job.add_argument_group("model and text")
    source.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        default=argparse.SUPPRESS,
        help="folder or Hugging Face id of a causal language model (default: "
        "SmolLM2-135M-Instruct, 93 MB, downloaded once)",
    )
    source.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="text file, UTF-8 (default: the help topics of Python)",
    )
    source.add_argument(
        "--seq-len", type=at_least(2), metavar="N", default=4096, help="tokens of the text to use"
    )
    gate = job.add_argument_group("gate, one or more values each")
    for option, least, default, meaning in (
        ("--block-size", 1, [64], "keys in a block"),
        (
            "--top-k",
            1,
            [4, 8, 12, 16],
            "blocks a query attends to, its own included",
        ),
        ("--sink-blocks", 0, [0, 1], "first blocks, always attended to; they count in top-k"),
        ("--local-blocks", 0, [0], "blocks right before the own one, as --sink-blocks"),
    ):
        gate.add_argument(
            option, type=at_least(least), nargs="+", metavar="N", default=default, help=meaning
        )
    place = job.add_argument_group("machine and output")
    place.add_argument(
        "--device", default=argparse.SUPPRESS, help="cpu or cuda (default: cuda if there is one)"
    )
    place.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=argparse.SUPPRESS,
        help="of the model (default: float32 on cpu, bfloat16 on cuda)",
    )
    place.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(), help="folder for the two files"
    )
    cli_export.add_commands(commands)
    return parser


def _eval(arguments: argparse.Namespace) -> int:
    need("hf", "transformers", "tqdm")
    need("plot", "matplotlib")
    options = {"model": None, "text": None, "device": None, "dtype": None, **vars(arguments)}
    text: Path | None = options["text"]
    # What can be wrong is found before the model loads.
    from moba_flex.config import MoBAConfig

    grid = product(
        arguments.block_size, arguments.sink_blocks, arguments.local_blocks, arguments.top_k
    )
    configs = [MoBAConfig(size, top_k, sink, local) for size, sink, local, top_k in grid]
    if text is not None and not text.is_file():
        raise ValueError(f"--text must be a file, got {str(text)!r}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out must be a folder, got {str(arguments.out)!r}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    import huggingface_hub
    import torch
    import transformers

    from moba_flex import evaluate, pretrained, report

    # What goes wrong is said once, by main.
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    device = evaluate.check_device(options["device"])
    dtype = options["dtype"] or ("float32" if device.type == "cpu" else "bfloat16")
    model, tokenizer = evaluate.load_model(options["model"], device, getattr(torch, dtype))
    ids = evaluate.read_tokens(tokenizer, text, arguments.seq_len).to(device)
    found = evaluate.evaluate(
        model,
        ids,
        configs,
        model_name=pretrained.NAME if options["model"] is None else Path(options["model"]).name,
        text_name="Python's help topics" if text is None else text.name,
    )
    print(report.table(found))
    report.save_json(found, arguments.out / "moba_eval.json")
    report.save_plot(found, arguments.out / "moba_eval.png")
    print(f"\nwrote {arguments.out / 'moba_eval.json'} and {arguments.out / 'moba_eval.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
