"""Record queries, keys and values of a real model, for benchmarks.

    python -m perf.record --layer 15 --out recorded.pt

Texts of equal length go through the model one by one. Their tensors are joined along the sequence,
as if they were one long text; in bfloat16.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from moba_flex import MoBAConfig
from moba_flex.cli.pretrained import load
from moba_flex.integrations.transformers import apply, observe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.record", description=__doc__)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, tokenizer = load(dtype=torch.float32)
    ids = tokenizer("\n\n".join(topics.values()), verbose=False).input_ids
    seen: list[tuple[Tensor, ...]] = []

    def note(layer: int | None, q: Tensor, k: Tensor, v: Tensor, *_: object) -> None:
        if layer == options.layer:
            seen.append(tuple(x.bfloat16() for x in (q, k, v)))

    covering = -(-options.tokens // 128)  # dense attention, so that the gate changes nothing
    apply(model, MoBAConfig(block_size=128, top_k=covering))
    for number in range(options.texts):
        text = ids[number * options.tokens :][: options.tokens]
        with observe(note), torch.no_grad():
            model(torch.tensor([text]), use_cache=False, logits_to_keep=1)
    joined = [torch.cat(x, dim=2) for x in zip(*seen, strict=True)]
    torch.save(dict(zip(("q", "k", "v"), joined, strict=True)), options.out)
    print({name: tuple(x.shape) for name, x in zip("qkv", joined, strict=True)})


if __name__ == "__main__":
    main()
