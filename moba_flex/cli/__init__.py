"""The command `moba-flex`, and its subcommand `eval`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from moba_flex.cli import generation, packages
from moba_flex.cli.door import TRACEBACK, Parser, guarded, integer, need, say
from moba_flex.compile.outside import check_output, reason, whole_file
from moba_flex.compile.package import MOST_TOKENS, own_version

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
        "--seq-len",
        type=integer(2, MOST_TOKENS),
        metavar="N",
        default=4096,
        help="tokens of the text to use",
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
            option, type=integer(least), nargs="+", metavar="N", default=default, help=meaning
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
    generation.add_command(commands)
    packages.add_commands(commands)
    return parser


def _eval(arguments: argparse.Namespace) -> int:
    need("hf", "transformers", "tqdm")
    need("plot", "matplotlib")
    options = {"model": None, "text": None, "device": None, "dtype": None, **vars(arguments)}
    text: Path | None = options["text"]
    # Arguments are checked before the model loads.
    from moba_flex.config import MoBAConfig

    grid = product(
        arguments.block_size, arguments.sink_blocks, arguments.local_blocks, arguments.top_k
    )
    configs = [MoBAConfig(size, top_k, sink, local) for size, sink, local, top_k in grid]
    if not configs:  # argparse reads `--top-k=--` as an empty list
        raise ValueError("options of the gate must have values, got one without")
    if text is not None and not os.path.isfile(text):
        raise ValueError(f"--text must be a file, got {str(text)!r}")
    out: Path = arguments.out
    if os.path.exists(out) and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {str(out)!r}")
    files = out / "moba_eval.json", out / "moba_eval.png"
    for file in files:
        check_output("--out", file)

    import huggingface_hub
    import torch
    import transformers

    from moba_flex.cli import evaluate, pretrained, report

    # Only main reports errors.
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    device = evaluate.check_device(options["device"])
    dtype = options["dtype"] or ("float32" if device.type == "cpu" else "bfloat16")
    name: str | None = options["model"]
    evaluate.check_sizes(pretrained.load_config(name), arguments.seq_len, configs)
    ids = evaluate.read_tokens(pretrained.load_tokenizer(name), text, arguments.seq_len)
    found = evaluate.evaluate(
        pretrained.load_model(name, dtype=getattr(torch, dtype)).to(device),
        ids.to(device),
        configs,
        model_name=pretrained.NAME if name is None else Path(name).resolve().name,
        text_name="Python's help topics" if text is None else text.name,
    )
    # Files come first, since the terminal may be gone. If one cannot be written, the rest still
    # is.
    failed = []
    for file, save in zip(files, (report.save_json, report.save_plot), strict=True):
        try:
            with whole_file(file) as fresh:
                save(found, fresh)
        except Exception as error:
            failed.append(f"{file}: {reason(error)}")
    say(report.table(found))
    if failed:
        raise OSError(f"results must be written to files, got {'; '.join(failed)}")
    say(f"\nwrote {files[0]} and {files[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
