"""The shapes that are timed, their inputs, and how much work each of them is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

STAGES = ("forward", "backward", "forward+backward")
PARTS = ("route", "regroup", "attend")  # of the forward pass; to regroup is part of attend


@dataclass(frozen=True)
class Shape:
    """One causal self-attention problem with MoBA's two numbers.

    Attributes:
        name: What it is called on the command line and in tables.
        batch: Sequences.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        seq_len: Tokens of a sequence.
        head_dim: Elements of a head.
        block_size: Keys per routed block.
        top_k: Blocks a query attends to, its own included.
        dtype: Of queries, keys and values.
        routing: "uniform" if blocks are chosen evenly; "one" if all queries want the first block;
            "skewed" if 90 % of the queries want the first 5 % of the blocks.
        documents: How many documents of one length each row is packed of; 0 if it is not packed.
        padding: How many tokens at the start of each row are padding.
        softcap: What scores are capped at; None if they are not.
        transposed: Whether memory lies as `[B, S, H, D]`, as a projection leaves it.
    """

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int
    block_size: int
    top_k: int
    dtype: torch.dtype
    routing: Literal["uniform", "one", "skewed"] = "uniform"
    documents: int = 0
    padding: int = 0
    softcap: float | None = None
    transposed: bool = False

    @property
    def dense(self) -> bool:
        """Whether this is dense attention: one block."""
        return self.num_blocks == 1

    @property
    def num_blocks(self) -> int:
        """Blocks of a row, but for what documents cut; the last may be short."""
        return -(-self.seq_len // self.block_size)

    @property
    def length(self) -> int:
        """Tokens that can see each other: of a document, or of a row without its padding."""
        return (self.seq_len - self.padding) // max(1, self.documents)

    @property
    def instances(self) -> int:
        """How often a head attends to so many tokens."""
        return self.batch * self.num_heads * max(1, self.documents)

    @property
    def selected_pairs(self) -> int:
        """(query, key) pairs that MoBA attends to, over all sequences and query heads.

        Whatever the gate chooses, it is that many: the own block up to the query, and `top_k - 1`
        whole blocks before it, or as many as there are.
        """
        pairs = 0
        for start in range(0, self.length, self.block_size):
            queries = min(self.block_size, self.length - start)
            own = queries * (queries + 1) // 2
            past = min(start, (self.top_k - 1) * self.block_size)
            pairs += own + queries * past
        return pairs * self.instances

    @property
    def density(self) -> float:
        """Share of the causal pairs that MoBA attends to."""
        causal_pairs = self.length * (self.length + 1) // 2
        return self.selected_pairs / (causal_pairs * self.instances)

    def flops(self, stage: str) -> float:
        """Operations of a stage: two matrix products a selected pair forward, five backward.

        The count is the same for every implementation: what a dense one computes besides is
        work that the problem does not need.
        """
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[stage]
        return 2.0 * products * self.head_dim * self.selected_pairs

    def operations(self, stage: str) -> float:
        """Operations that MoBA cannot do without: those of a stage, and the scores of its gate."""
        gate = 0
        if stage != "backward":
            candidates = sum(query // self.block_size for query in range(self.length))
            gate = 2 * self.head_dim * candidates * self.instances
        return self.flops(stage) + gate

    def bytes(self, stage: str) -> int:
        """Bytes of inputs and outputs: q, k, v and out; in backward these and four gradients."""
        times = {"forward": 1, "backward": 2, "forward+backward": 3}[stage]
        tokens = self.batch * self.seq_len * 2 * (self.num_heads + self.num_kv_heads)
        return times * tokens * self.head_dim * self.dtype.itemsize


def draw(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw normal queries `[B, Hq, S, D]`, keys and values `[B, Hkv, S, D]` of a shape.

    Unless routing is uniform, the keys of the wanted blocks and the queries that want them are
    shifted along one direction: by so little that attention stays spread, by so much that the
    affinity, 12 more, outdoes that of all other blocks. With a cap, queries are so long that it
    changes the output.
    """
    torch.manual_seed(0)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    sizes = [(shape.batch, count, shape.seq_len, shape.head_dim) for count in heads]
    q, k, v = (torch.randn(size, dtype=shape.dtype, device=device) for size in sizes)
    if shape.routing != "uniform":
        share, blocks = (1.0, 1) if shape.routing == "one" else (0.9, shape.num_blocks // 20)
        direction = shape.head_dim**-0.5  # all elements alike make a vector of length 1
        q += 6 * direction * (torch.rand(shape.seq_len, 1, device=device) < share)
        k[:, :, : blocks * shape.block_size] += 2 * direction
    if shape.softcap is not None:
        q *= shape.softcap / 12  # largest scores of a query about a quarter of the cap
    if shape.transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return q, k, v


def _gpu(thousands: int, block_size: int, top_k: int, note: str = "", **changed: Any) -> Shape:
    """Make a shape of so many times 1,024 tokens, named by its numbers and what is changed."""
    length = f"{thousands}K" if thousands < 1024 else f"{thousands // 1024}M"
    blocks = "dense" if block_size >= thousands * 1024 else f"{block_size}/{top_k}"
    name = f"{length}/{blocks} {note}".rstrip()
    seq_len = thousands * 1024
    usual = Shape(name, 1, 16, 16, seq_len, 128, block_size, top_k, torch.bfloat16)
    return replace(usual, **changed)


def _eight(thousands: int, block_size: int, top_k: int) -> Shape:
    return _gpu(thousands, block_size, top_k, "8:8", num_heads=8, num_kv_heads=8)


def _dense(thousands: int) -> Shape:
    return _eight(thousands, thousands * 1024, 1)


def _cpu(thousands: int, block_size: int, top_k: int, note: str = "", **changed: Any) -> Shape:
    usual = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "dtype": torch.float32}
    return _gpu(thousands, block_size, top_k, note, **usual | changed)


def _layouts(make: Callable[..., Shape], thousands: int) -> list[Shape]:
    """List a plain row, and the same packed of documents, padded, and with a cap."""
    sizes = thousands, 128, 8
    return [
        make(*sizes),
        make(*sizes, "1 document", documents=1),
        make(*sizes, "8 documents", documents=8),
        make(*sizes, "256 documents", documents=256),
        make(*sizes, "1/8 padding", padding=thousands * 1024 // 8),
        make(*sizes, "softcap 50", softcap=50.0),
    ]


def _few_heads() -> list[Shape]:
    """List shapes where key heads are few, and such where many queries choose one block."""
    heads = (8, 1), (16, 2), (16, 4), (32, 8)
    some: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 4}
    return [
        *(
            _gpu(length, 128, 8, f"{q}:{kv}", num_heads=q, num_kv_heads=kv)
            for length in (8, 32, 128)
            for q, kv in heads
        ),
        _gpu(32, 128, 8, "16:4 one block", routing="one", **some),
        _gpu(32, 128, 8, "16:4 skewed", routing="skewed", **some),
        _gpu(32, 128, 8, "16:4 transposed", transposed=True, **some),
    ]


TINY = Shape("tiny", 2, 4, 2, 320, 32, 64, 3, torch.float32)
_LENGTHS = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
ROWS = {
    "cuda": {
        "main": [
            _gpu(8, 512, 3),
            _gpu(16, 512, 3),
            _gpu(64, 512, 3),
            _gpu(64, 128, 8),
            _gpu(64, 128, 8, "32:8", num_heads=32, num_kv_heads=8),
            _gpu(128, 128, 8),
            _gpu(128, 2048, 3),
        ],
        "variants": [
            _gpu(64, 128, 8, "head_dim 64", head_dim=64),
            _gpu(64, 128, 8, "head_dim 256", head_dim=256, num_heads=8, num_kv_heads=8),
            _gpu(64, 128, 8, "float16", dtype=torch.float16),
            _gpu(32, 128, 8, "batch 2", batch=2),
            _gpu(8, 128, 8, "batch 8", batch=8),
            _gpu(64, 128, 8, "one block", routing="one"),
            _gpu(64, 128, 8, "skewed", routing="skewed"),
        ],
        "sweep": [
            *(_eight(length, 512, 3) for length in _LENGTHS),
            *(_eight(length, 128, 8) for length in _LENGTHS),
            _eight(1024, 4096, 12),
            *(_dense(length) for length in _LENGTHS if length <= 256),
        ],
        "dense": [_dense(512), _dense(1024)],  # takes minutes; else it is extrapolated
        "map": [
            _dense(64),
            *(
                _eight(64, block_size, top_k)
                for block_size in (64, 128, 256, 512, 1024, 2048, 4096)
                for top_k in (2, 3, 4, 8, 12, 16)
            ),
        ],
        "layouts": _layouts(_gpu, 64),
        "heads": _few_heads(),
        "errors": [_gpu(32, 128, 8)],
    },
    "cpu": {
        "main": [
            _cpu(8, 512, 3),
            _cpu(16, 512, 3),
            _cpu(32, 512, 3),
        ],
        "layouts": _layouts(_cpu, 8),
    },
}
