"""Plot which blocks the queries of one head choose.

python tests/examples/plot_a_routing_map.py routing.png [--words 4096]

Queries and keys are averages of random vectors, one for each word, over the last 32 words of
Python's help pages. The second half of the text repeats the first, so that queries there should
choose the blocks that hold the same words.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from moba_flex import route
from moba_flex.diagnostics import density, routing_entropy, routing_map

BLOCK_SIZE, TOP_K, RECENT = 128, 4, 32


def embed(words: list[str], head_dim: int = 64) -> Tensor:
    """Return the average vector of the last `RECENT` words at each word, `[1, 1, Q, D]`."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    vectors = torch.randn(len(numbers), head_dim)[[numbers[word] for word in words]]
    padded = F.pad(vectors.T, (RECENT - 1, 0))
    return F.avg_pool1d(padded, RECENT, stride=1).T[None, None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the picture to write, such as routing.png")
    parser.add_argument("--words", type=int, default=4096)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    half = " ".join(topics.values()).split()[: arguments.words // 2]
    x = embed(half + half)
    routing = route(x, x, block_size=BLOCK_SIZE, top_k=TOP_K)

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    panel = figure.subplots()
    image = panel.imshow(
        routing_map(routing, buckets=128)[0, 0],  # [R, N]: one head of one row
        extent=(0, routing.num_blocks, routing.q_len, 0),
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
    )
    panel.set(title="What is attended to", xlabel="key block", ylabel="query")
    figure.colorbar(image, label="share of queries that attend to the block")
    figure.savefig(arguments.out, dpi=120)
    print(f"density {density(routing):.1%}, entropy {routing_entropy(routing).item():.2f}")
    print(f"wrote {arguments.out}")
