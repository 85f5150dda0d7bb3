"""The commands `moba-flex export` and `moba-flex run`."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from moba_flex.cli.door import integer, need, say
from moba_flex.compile.outside import reason
from moba_flex.compile.package import MOST_TOKENS, Package, load

_EXPORT = """\
Compile a language model with Mixture of Block Attention into one .pt2 file that PyTorch runs
without moba_flex, transformers or Python. It takes token ids [1, length] and gives the logits of
the next token. Unless --no-check says otherwise, it is run beside the model afterwards, at other
lengths than that of the example."""

_RUN = """\
Continue a text with a package that `moba-flex export` made, token by token, each the likeliest. A
package holds no cache: each token takes a forward pass over all tokens before it. `moba-flex
generate` keeps a cache."""


def add_commands(commands: Any) -> None:
    """Add the commands `export` and `run` to those of `moba-flex`."""
    _add_export(commands)
    job = commands.add_parser("run", help="run a package", description=_RUN)
    job.set_defaults(run=_run)
    job.add_argument("package", type=Path, metavar="PT2", help="the package")
    job.add_argument("--text", required=True, metavar="TEXT", help="what to continue")
    _add_model(job, "folder or Hugging Face id of the tokenizer")
    job.add_argument(
        "--tokens",
        type=integer(1, MOST_TOKENS),
        metavar="N",
        default=20,
        help="tokens to add (default: 20)",
    )


def _add_export(commands: Any) -> None:
    job = commands.add_parser(
        "export",
        help="compile a language model into one file that runs without Python",
        description=_EXPORT,
    )
    job.set_defaults(run=_export)
    _add_model(job, "folder or Hugging Face id of a causal language model")
    job.add_argument("--out", type=Path, required=True, metavar="PT2", help="file to write")
    # MOST_TOKENS bounds all options, since no text has more tokens or blocks.
    for option, least, default, meaning in (
        ("--block-size", 1, 64, "keys in a block"),
        ("--top-k", 1, 8, "blocks a query attends to, its own included"),
        ("--sink-blocks", 0, 1, "first blocks, always attended to; they count in top-k"),
        ("--local-blocks", 0, 0, "blocks right before the own one, likewise"),
        ("--seq-len", 2, 512, "tokens of the example"),
    ):
        job.add_argument(
            option,
            type=integer(least, MOST_TOKENS),
            metavar="N",
            default=default,
            help=f"{meaning} (default: {default})",
        )
    job.add_argument("--static", action="store_true", help="take texts of --seq-len tokens alone")
    job.add_argument("--no-check", action="store_true", help="do not run the package afterwards")
    job.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    job.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="of the model (default: float32 on cpu, bfloat16 on cuda)",
    )


def _add_model(job: argparse.ArgumentParser, meaning: str) -> None:
    job.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        default=None,
        help=f"{meaning} (default: SmolLM2-135M-Instruct, 93 MB, downloaded once)",
    )


def _export(arguments: argparse.Namespace) -> int:
    need("hf", "transformers", "tqdm")
    from moba_flex.compile import exporter
    from moba_flex.config import MoBAConfig

    # Arguments are checked before the model loads.
    path = exporter.check_path(arguments.out)
    gate = arguments.block_size, arguments.top_k, arguments.sink_blocks, arguments.local_blocks
    config = MoBAConfig(*gate)
    exporter.check_compiler()

    import torch
    import transformers

    from moba_flex.cli import evaluate, pretrained
    from moba_flex.integrations.prefill import Prefill
    from moba_flex.integrations.transformers import apply

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    device = evaluate.check_device(arguments.device)
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    pretrained.load_config(arguments.model)
    model = pretrained.load_model(arguments.model, dtype=getattr(torch, dtype)).to(device)
    prefill = Prefill(apply(model, config)).eval()
    example = torch.zeros(1, arguments.seq_len, dtype=torch.int64, device=device)
    began = time.perf_counter()
    exporter.export(prefill, example, path=path, dynamic_length=not arguments.static)
    seconds, size = time.perf_counter() - began, path.stat().st_size / 1e6
    say(f"wrote {path}: {size:.0f} MB in {seconds:.0f} s")
    if not arguments.no_check:
        _check(prefill, path, arguments)
    return 0


def _check(model: Any, path: Path, arguments: argparse.Namespace) -> None:
    """Compare package and model on random tokens, at other lengths if the package takes them."""
    import torch

    from moba_flex.compile.exporter import worst_error

    weight = next(model.parameters())
    package, seq_len = load(path, device=weight.device), arguments.seq_len
    most = torch.finfo(weight.dtype).eps ** 0.5  # half of the digits may be lost over all layers
    lengths = (seq_len,) if arguments.static else (1, seq_len // 2 + 1, 2 * seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    for length in lengths:
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(weight.device)
        error = worst_error(model, package, [ids])
        say(f"{length} tokens: off by {error:.1e} of the model's largest logit")
        if not error <= most:
            raise ValueError(
                f"the package must be within {most:.1e} of the model, got {error:.1e} at {length} "
                f"tokens: {path} is not to be trusted"
            )


def _run(arguments: argparse.Namespace) -> int:
    need("hf", "transformers")
    try:
        arguments.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--text must be UTF-8, got {arguments.text!r}") from error
    package = load(arguments.package)

    import torch
    import transformers

    from moba_flex.cli import pretrained

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    tokenizer = pretrained.load_tokenizer(arguments.model)
    ids = tokenizer(arguments.text, return_tensors="pt").input_ids.to(package.device)
    if ids.shape[1] == 0:
        raise ValueError("--text must have at least one token, got none")
    _check_room(package, ids.shape[1], arguments.tokens)
    began = time.perf_counter()
    try:
        for _ in range(arguments.tokens):
            ids = torch.cat((ids, package(ids).argmax(-1, keepdim=True)), 1)
    except RuntimeError as error:
        raise ValueError(
            f"package must take these tokens and return logits [1, V], got {reason(error)}: "
            "is --model the model that was exported?"
        ) from error
    seconds = time.perf_counter() - began
    say(tokenizer.decode(ids[0], skip_special_tokens=True))
    print(f"{arguments.tokens} tokens in {seconds:.2f} s", file=sys.stderr)
    return 0


def _check_room(package: Package, length: int, tokens: int) -> None:
    """Raise unless the package takes texts of all lengths that `tokens` more tokens need."""
    shapes = [spec.shape for spec in package.metadata.inputs]
    if [len(shape) for shape in shapes] != [2]:
        raise ValueError(
            f"package must take token ids [1, length] alone, got one that takes {shapes}: "
            "make it with moba-flex export"
        )
    size = shapes[0][1]
    least, most = (size, size) if isinstance(size, int) else size[1:]
    last = length + tokens - 1
    if not least <= length <= last <= most:
        raise ValueError(
            f"--text and --tokens must make lengths from {least} to {most} for this package, got "
            f"{length} to {last}"
        )
