"""Measure how often queries choose the same blocks, in a real model and a real text.

    python -m perf.agreement --out perf/results/agreement_smollm2.json

A share is the number of distinct blocks that some queries chose, over the sum of the blocks that
each chose: 1 if all choices differ; 1/3 if three queries choose alike. Own blocks count as chosen.
The queries are those of the text's last positions: the heads of a group at one position, or
consecutive positions of one head, as in speculative decoding.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from moba_flex import MoBAConfig, route
from moba_flex.cli.pretrained import NAME, load
from moba_flex.integrations.transformers import apply, observe

GATES = ((128, 8), (64, 8))
CONSECUTIVE = (2, 4, 8)


def distinct_share(blocks: Tensor) -> float:
    """Return distinct blocks over chosen ones; the choices to unite lie in the last dimension."""
    ordered = blocks.sort(dim=-1).values
    distinct = (ordered[..., 1:] != ordered[..., :-1]).sum() + ordered[..., 0].numel()
    return float(distinct / ordered.numel())


def shares(q: Tensor, k: Tensor, gate: MoBAConfig, positions: int) -> dict[str, float]:
    """Return the shares of one layer.

    Args:
        q: Queries, `[1, Hq, L, D]`.
        k: Keys, `[1, Hkv, L, D]`.
        gate: The gate.
        positions: How many of the last queries to look at.
    """
    size, queries = gate.block_size, q[:, :, -positions:]
    chosen = route(
        queries, k, block_size=size, top_k=gate.top_k, sink_blocks=gate.sink_blocks
    ).blocks
    own = torch.arange(k.shape[2] - positions, k.shape[2]) // size
    own = own.int()[:, None].expand(*chosen.shape[:3], 1)
    blocks = torch.cat((chosen, own), dim=3)[0]
    by_group = blocks.unflatten(0, (k.shape[1], -1)).permute(0, 2, 1, 3).flatten(2)
    found = {"group": distinct_share(by_group)}
    for number in CONSECUTIVE:
        whole = blocks[:, : positions // number * number]
        found[f"consecutive {number}"] = distinct_share(
            whole.unflatten(1, (-1, number)).flatten(2)
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.agreement", description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    model, tokenizer = load(dtype=torch.float32)
    text = "\n\n".join(topics.values())
    ids = torch.tensor([tokenizer(text, verbose=False).input_ids[: options.tokens]])
    rows: list[dict[str, Any]] = []
    for block_size, top_k in GATES:
        gate = MoBAConfig(block_size=block_size, top_k=top_k, sink_blocks=1)
        layers: list[dict[str, float]] = []

        def note(
            layer: int | None,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            scale: float | None,
            config: MoBAConfig,
            layout: dict[str, Tensor],
            layers: list[dict[str, float]] = layers,
        ) -> None:
            layers.append(shares(q, k, config, options.positions))

        apply(model, gate)
        with observe(note), torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
        for name in layers[0]:
            values = [x[name] for x in layers]
            numbers = {"mean": sum(values) / len(values), "least": min(values)}
            numbers |= {"most": max(values)}
            row = {"gate": f"{block_size}/{top_k}, sink 1", "union": name}
            rows.append(row | {x: round(y, 4) for x, y in numbers.items()})
            rows[-1]["layers"] = [round(x, 4) for x in values]
            print(json.dumps({x: y for x, y in rows[-1].items() if x != "layers"}), flush=True)
    if options.out:
        about = {"model": NAME, "tokens": ids.shape[1], "positions": options.positions}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
