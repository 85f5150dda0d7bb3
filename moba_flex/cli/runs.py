"""Arguments, loading and files, which the commands that run a model over a text share."""

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from moba_flex.cli.door import integer, say
from moba_flex.compile.outside import check_output, reason, whole_file
from moba_flex.compile.package import MOST_TOKENS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from moba_flex.config import MoBAConfig

R = TypeVar("R")

GATE = (
    ("--block-size", 1, 64, "keys in a block"),
    ("--top-k", 1, 8, "blocks a query attends to, its own included"),
    ("--sink-blocks", 0, 1, "first blocks, always attended to; they count in top-k"),
    ("--local-blocks", 0, 0, "blocks right before the own one, as --sink-blocks"),
)
"""Options of the gate: name, least value, default, meaning."""

_ABSENT = dict.fromkeys(("model", "text", "device", "dtype"))


class Loaded(NamedTuple):
    """A model on its device, and the text that it is to run over."""

    model: "PreTrainedModel"
    ids: "Tensor"
    model_name: str
    text_name: str


def add_model(group: Any) -> None:
    """Add the argument that names a model."""
    group.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        default=argparse.SUPPRESS,
        help="folder or Hugging Face id of a causal language model (default: "
        "SmolLM2-135M-Instruct, 93 MB, downloaded once)",
    )


def add_dense_layers(group: Any) -> None:
    """Add the argument that names layers with dense attention."""
    group.add_argument(
        "--dense-layers",
        type=integer(-MOST_TOKENS, MOST_TOKENS),  # no model has more layers
        nargs="+",
        metavar="N",
        default=argparse.SUPPRESS,
        help="layers that keep dense attention; -1 is the last (default: none)",
    )


def add_text(job: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model and a text."""
    source = job.add_argument_group("model and text")
    add_model(source)
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


def add_machine(group: Any) -> None:
    """Add the arguments that say where a model runs."""
    group.add_argument(
        "--device", default=argparse.SUPPRESS, help="cpu or cuda (default: cuda if there is one)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=argparse.SUPPRESS,
        help="of the model (default: float32 on cpu, bfloat16 on cuda)",
    )


def add_place(job: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a model runs, and where two files go."""
    place = job.add_argument_group("machine and output")
    add_machine(place)
    place.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(), help="folder for the two files"
    )


def check_files(arguments: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """Return the JSON file and the picture of a command, before the model loads.

    Raises:
        ValueError: There is no such text, or `--out` is no folder.
        OSError: A file cannot be written.
    """
    text: Path | None = vars(arguments).get("text")
    if text is not None and not os.path.isfile(text):
        raise ValueError(f"--text must be a file, got {str(text)!r}")
    out: Path = arguments.out
    if os.path.exists(out) and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {str(out)!r}")
    files = out / f"moba_{name}.json", out / f"moba_{name}.png"
    for file in files:
        check_output("--out", file)
    return files


def find_machine(options: Mapping[str, Any]) -> "tuple[torch.device, torch.dtype]":
    """Return where a model is to run, and in which dtype; transformers reports errors alone.

    Raises:
        ValueError: There is no such device.
    """
    import torch
    import transformers

    from moba_flex.cli.evaluate import check_device

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    device = check_device(options["device"])
    dtype = options["dtype"] or ("float32" if device.type == "cpu" else "bfloat16")
    return device, getattr(torch, dtype)


def short_name(model: str | None) -> str:
    """Return what reports call a model; None is the default one."""
    from moba_flex.cli.pretrained import NAME

    return NAME if model is None else Path(model).resolve().name


def load(arguments: argparse.Namespace, configs: "Sequence[MoBAConfig]") -> Loaded:
    """Load the model and the text that the arguments name.

    Raises:
        ValueError: They do not fit each other or the gates, or cannot be loaded.
    """
    import huggingface_hub

    from moba_flex.cli import evaluate, pretrained

    options = {**_ABSENT, **vars(arguments)}
    # Only main reports errors.
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    device, dtype = find_machine(options)
    name, text = options["model"], options["text"]
    evaluate.check_sizes(pretrained.load_config(name), arguments.seq_len, configs)
    ids = evaluate.read_tokens(pretrained.load_tokenizer(name), text, arguments.seq_len)
    return Loaded(
        pretrained.load_model(name, dtype=dtype).to(device),
        ids.to(device),
        short_name(name),
        "Python's help topics" if text is None else text.name,
    )


def write(
    found: R, files: Sequence[Path], saves: Sequence[Callable[[R, Path], None]], table: str
) -> None:
    """Write results to files, then the table to stdout.

    Files come first, since the terminal may be gone. If one cannot be written, the rest still is.

    Raises:
        OSError: A file cannot be written, or stdout.
    """
    failed = []
    for file, save in zip(files, saves, strict=True):
        try:
            with whole_file(file) as fresh:
                save(found, fresh)
        except Exception as error:
            failed.append(f"{file}: {reason(error)}")
    say(table)
    if failed:
        raise OSError(f"results must be written to files, got {'; '.join(failed)}")
    say(f"\nwrote {' and '.join(str(file) for file in files)}")
