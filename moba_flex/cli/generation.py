"""The command `moba-flex generate`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from moba_flex.cli import runs
from moba_flex.cli.door import integer, need, positive
from moba_flex.compile.outside import check_output, reason, whole_file
from moba_flex.compile.package import MOST_TOKENS

_GENERATE = """\
Continue a text with a language model under Mixture of Block Attention, by the likeliest tokens or
by samples. The text goes to stdout as it comes; the figures of prefill, decode and memory go to
stderr at the end. Texts of at most top-k blocks are as with dense attention."""


def add_command(commands: Any) -> None:
    """Add the command `generate` to those of `moba-flex`."""
    job = commands.add_parser(
        "generate",
        help="continue a text, with figures of prefill and decode",
        description=_GENERATE,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    job.set_defaults(run=_generate)
    source = job.add_argument_group("model and prompt")
    source.add_argument(
        "--prompt",
        type=Path,
        metavar="FILE",
        required=True,
        default=argparse.SUPPRESS,
        help="text file to continue, UTF-8; - for stdin",
    )
    runs.add_model(source)
    gate = job.add_argument_group("gate")
    for option, least, default, meaning in runs.GATE:
        gate.add_argument(option, type=integer(least), metavar="N", default=default, help=meaning)
    runs.add_dense_layers(gate)
    gate.add_argument(
        "--layer-top-k",
        type=integer(1),
        nargs="+",
        metavar="N",
        default=argparse.SUPPRESS,
        help="top-k of each layer, at most --top-k (default: --top-k in all)",
    )
    gate.add_argument(
        "--decode",
        choices=("route", "dense"),
        default="route",
        help="attention of the new tokens: as in the prompt, or to all keys",
    )
    gate.add_argument(
        "--decode-top-k",
        type=integer(1),
        metavar="N",
        default=argparse.SUPPRESS,
        help="top-k of the new tokens, in all layers (default: as in the prompt)",
    )
    text = job.add_argument_group("text")
    text.add_argument(
        "--max-new-tokens",
        type=integer(1, MOST_TOKENS),
        metavar="N",
        default=128,
        help="tokens to add at most",
    )
    text.add_argument(
        "--temperature",
        type=positive,
        metavar="T",
        default=argparse.SUPPRESS,
        help="take samples at this temperature (default: the likeliest token)",
    )
    text.add_argument(
        "--seed", type=integer(0), metavar="N", default=0, help="seed of the samples"
    )
    text.add_argument(
        "--compare",
        action="store_true",
        default=argparse.SUPPRESS,
        help="run dense attention before it, on the same prompt",
    )
    place = job.add_argument_group("machine and output")
    place.add_argument(
        "--chunk",
        type=integer(1, MOST_TOKENS),
        metavar="N",
        default=argparse.SUPPRESS,
        help="tokens of the prompt in one call, to save memory (default: all)",
    )
    runs.add_machine(place)
    place.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="file for texts and figures (default: none)",
    )


_ABSENT = {
    **dict.fromkeys(("model", "dense_layers", "layer_top_k", "decode_top_k", "temperature")),
    **dict.fromkeys(("chunk", "device", "dtype", "json")),
    "compare": False,
}


def _generate(arguments: argparse.Namespace) -> int:
    need("hf", "transformers", "tqdm")
    options: dict[str, Any] = {**_ABSENT, **vars(arguments)}
    # Arguments are checked before the model loads.
    from moba_flex.config import MoBAConfig

    config = MoBAConfig(
        arguments.block_size,
        arguments.top_k,
        arguments.sink_blocks,
        arguments.local_blocks,
        dense_layers=tuple(options["dense_layers"] or ()),
        cached=arguments.decode,
        layer_top_k=options["layer_top_k"],
        decode_top_k=options["decode_top_k"],
    )
    prompt: Path = arguments.prompt
    if str(prompt) != "-" and (not os.path.exists(prompt) or prompt.is_dir()):
        raise ValueError(f"--prompt must be a file or -, got {str(prompt)!r}")
    json: Path | None = options["json"]
    if json is not None:
        check_output("--json", json)

    from moba_flex.cli import generate, pretrained, report

    device, dtype = runs.find_machine(options)
    name: str | None = options["model"]
    model_config = pretrained.load_config(name)
    if config.dense_layers or config.layer_top_k:
        text = model_config.get_text_config()
        config.check_model(text.num_hidden_layers, text.num_attention_heads)
    tokenizer = pretrained.load_tokenizer(name)
    ids = generate.read_prompt(tokenizer, prompt)
    generate.check_length(model_config, ids.shape[1], arguments.max_new_tokens)
    found = generate.generate(
        pretrained.load_model(name, dtype=dtype).to(device),
        tokenizer,
        ids.to(device),
        [None, config] if options["compare"] else [config],
        generate.Settings(
            arguments.max_new_tokens, options["chunk"], options["temperature"], arguments.seed
        ),
        model_name=runs.short_name(name),
    )
    print(f"\n{generate.table(found)}", file=sys.stderr)
    if json is not None:
        try:
            with whole_file(json) as fresh:
                report.save_json(found, fresh)
        except Exception as error:
            raise OSError(
                f"results must be written to files, got {json}: {reason(error)}"
            ) from error
        print(f"\nwrote {json}", file=sys.stderr)
    return 0
