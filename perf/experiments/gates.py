"""Experiment 7: a gate that also sees how far the keys of a block spread, without any training.

    python -m perf.experiments.gates --length 4096

A block's score is `q . mean + c * sum_d |q_d| (max_d - min_d) / 2`, over the block's keys. With
c = 0 it is the library's gate. SmolLM2-135M reads texts with full attention and with each gate, of
which all choose the first block; the result is the perplexity of the second half of each text. The
texts come with Python and PyTorch. None of them was looked at when the score and c were chosen.
"""

import argparse
import json
import math
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from moba_flex import Routing, routed_attention
from moba_flex.cli.pretrained import NAME, load_model
from perf.experiments.data import File, encode
from perf.experiments.files import write_json
from perf.experiments.runs import Document, spread
from perf.timing import ROOT, machine_info

GATES = ("64/4", "64/8", "128/4")
SPREADS = (0.0, 0.125, 0.25, 0.5)
SINK_BLOCKS = 1
ATTENTION = "moba_flex_experiment"


def choose(q: Tensor, k: Tensor, block_size: int, top_k: int, spread: float) -> Routing:
    """Choose by the mean and the extent of a block's keys, the first block always.

    Args:
        q: Queries, `[B, Hq, L, D]`.
        k: Keys, `[B, Hkv, L, D]`.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        spread: The factor c.
    """
    length = k.shape[2]
    whole = length // block_size  # no query may choose a last block that is short
    keys = k[:, :, : whole * block_size].unflatten(2, (whole, block_size)).double()
    extent = (keys.amax(3) - keys.amin(3)) / 2
    grouped = q.unflatten(1, (k.shape[1], -1)).double()
    scores = grouped @ keys.mean(3).mT[:, :, None]
    scores += spread * (grouped.abs() @ extent.mT[:, :, None])
    block = torch.arange(whole, device=q.device)
    own = torch.arange(length, device=q.device)[:, None] // block_size
    scores = scores.masked_fill(block < SINK_BLOCKS, math.inf).masked_fill(block >= own, -math.inf)
    best = scores.flatten(1, 2).topk(min(top_k - 1, whole), dim=3)
    blocks = best.indices.masked_fill(best.values == -math.inf, -1)
    return Routing(blocks, block_size, length, length, causal=True)


def attend_by(gate: str, spread: float) -> str:
    """Return the name of an attention of transformers that chooses by a gate such as "64/4"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    block_size, top_k = (int(number) for number in gate.split("/"))

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        routing = choose(q, k, block_size, top_k, spread)
        out = routed_attention(q, k, v, routing, scale=options["scaling"])
        return out.transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    return ATTENTION


def read_texts() -> dict[str, str]:
    """Return documents and code by name."""
    from pydoc_data.topics import topics

    help_topics = "\n".join(topics.values())
    python, pytorch = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    files = {
        "_pydecimal.py": python,
        "torch/_torch_docs.py": pytorch.parent,
        "unittest/mock.py": python,
        "idlelib/help.html": python,
        "torch/include/c10/util/SmallVector.h": pytorch.parent,
        "idlelib/NEWS2x.txt": python,
        "asyncio/base_events.py": python,
    }
    texts = {"help topics, second half": help_topics[len(help_topics) // 2 :]}
    return texts | {name: (root / name).read_text("utf-8") for name, root in files.items()}


def loss_of(model: Any, ids: Tensor) -> float:
    """Return the mean loss of the second half of `ids` `[1, L]`, in nats a token."""
    targets = ids[0, ids.shape[1] // 2 :]
    rows = len(targets) + 1
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0, -rows:-1]
    return float(F.cross_entropy(logits.float(), targets).double())


def measure(model: Any, ids: Tensor, gates: Sequence[str], spreads: Sequence[float]) -> list[Any]:
    """Return the losses with full attention, of gate "full", and with each gate and spread."""
    model.set_attn_implementation("sdpa")
    rows = [{"gate": "full", "spread": 0.0, "loss": loss_of(model, ids)}]
    for gate in gates:
        for c in spreads:
            model.set_attn_implementation(attend_by(gate, c))
            rows.append({"gate": gate, "spread": c, "loss": loss_of(model, ids)})
    return rows


def losses(document: Document, gate: str, spread: float) -> list[float]:
    """Return the loss of each text."""
    return [
        row["loss"]
        for text in document["texts"]
        for row in text["runs"]
        if (row["gate"], row["spread"]) == (gate, spread)
    ]


def changes(document: Document, gate: str, spread: float) -> list[float]:
    """Return by how much the loss of each text changes against a spread of 0."""
    pairs = zip(losses(document, gate, spread), losses(document, gate, 0.0), strict=True)
    return [loss - plain for loss, plain in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf.experiments.gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens of each text")
    parser.add_argument("--gates", nargs="+", default=GATES, help="block_size/top_k")
    parser.add_argument("--spreads", type=float, nargs="+", default=SPREADS, help="values of c")
    parser.add_argument("--tokens", choices=("bytes", "smollm2"), default="smollm2")
    parser.add_argument("--model", help="a folder or Hub id with this vocabulary")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    default = ROOT / "perf" / "results" / "experiment_gates.json"
    parser.add_argument("--out", type=Path, default=default, help="results, of earlier runs too")
    options = parser.parse_args(arguments)
    settings = {
        "model": options.model or NAME,
        "tokens": options.tokens,
        "length": options.length,
        "sink_blocks": SINK_BLOCKS,
        "gates": list(options.gates),
        "spreads": sorted({0.0, *options.spreads}),
    }
    document: Document = {"experiment": "gates", "settings": settings, "texts": []}
    if options.out.exists():
        document = json.loads(options.out.read_text())
        if document["settings"] != settings:
            raise SystemExit(
                f"settings must be those of the results in {options.out}, "
                f"{document['settings']}, got {settings}: write to another --out"
            )
    document["machine"] = machine_info(torch.device(options.device))
    numbers = " ".join(f"{c:g}" for c in settings["spreads"])
    document["command"] = (
        f"python -m perf.experiments.gates --length {options.length} "
        f"--gates {' '.join(options.gates)} --spreads {numbers}"
    )
    model = load_model(options.model, dtype=torch.float32).to(options.device)
    done = {text["name"] for text in document["texts"]}
    for name, text in tqdm(read_texts().items(), unit="text"):
        if name in done:
            continue
        start = text[: 8 * options.length]  # few tokens have more characters
        ids, _ = encode([File(name, Path(name), start)], options.tokens)
        part = ids[None, : options.length].long().to(options.device)
        assert part.shape[1] == options.length
        runs = measure(model, part, settings["gates"], settings["spreads"])
        document["texts"].append({"name": name, "runs": runs})
        write_json(document, options.out)
    for gate in settings["gates"]:
        for c in settings["spreads"]:
            perplexity = math.exp(statistics.mean(losses(document, gate, c)))
            print(f"{gate}, c {c}: {perplexity:.3f}, {spread(changes(document, gate, c), '+.4f')}")


if __name__ == "__main__":
    main()
