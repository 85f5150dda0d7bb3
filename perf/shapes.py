"""The shapes that are timed, and how much attention each of them needs."""

from dataclasses import dataclass

import torch


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

    @property
    def selected_pairs(self) -> int:
        """(query, key) pairs that MoBA attends to, over all sequences and query heads.

        Whatever the gate chooses, it is that many: the own block up to the query, and `top_k - 1`
        whole blocks before it, or as many as there are.
        """
        pairs = 0
        for start in range(0, self.seq_len, self.block_size):
            queries = min(self.block_size, self.seq_len - start)
            own = queries * (queries + 1) // 2
            past = min(start, (self.top_k - 1) * self.block_size)
            pairs += own + queries * past
        return pairs * self.batch * self.num_heads

    @property
    def density(self) -> float:
        """Share of the causal pairs that MoBA attends to."""
        causal_pairs = self.seq_len * (self.seq_len + 1) // 2
        return self.selected_pairs / (causal_pairs * self.batch * self.num_heads)

    def flops(self, stage: str) -> float:
        """Operations of a stage: two matrix products a selected pair forward, five backward.

        The count is the same for every implementation: what a dense one computes besides is
        work that the problem does not need.
        """
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[stage]
        return 2.0 * products * self.head_dim * self.selected_pairs


def _gpu(name: str, seq_len: int, block_size: int, top_k: int) -> Shape:
    return Shape(name, 1, 16, 16, seq_len, 128, block_size, top_k, torch.bfloat16)


def _cpu(name: str, seq_len: int) -> Shape:
    return Shape(name, 1, 4, 4, seq_len, 64, 512, 3, torch.float32)


TINY = Shape("tiny", 2, 4, 2, 320, 32, 64, 3, torch.float32)
ROWS = {
    "cuda": [
        _gpu("16K/512/3", 16 * 1024, 512, 3),
        _gpu("64K/512/3", 64 * 1024, 512, 3),
        _gpu("64K/128/8", 64 * 1024, 128, 8),
    ],
    "cpu": [
        _cpu("8K/512/3", 8 * 1024),
        _cpu("16K/512/3", 16 * 1024),
        _cpu("32K/512/3", 32 * 1024),
    ],
}
