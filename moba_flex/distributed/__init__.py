"""Mixture of Block Attention on several GPUs or processes, by `torch.distributed`.

Three ways to share the work, which all compute what one process computes:

- `ulysses_attention`: ranks hold parts of the sequence, and swap them for heads to attend.
- `context_parallel_attention`: ranks hold parts of the sequence, and gather keys and values.
- `HeadParallel` and `tensor_parallel_plan`: ranks hold heads, as in tensor parallelism.

A group is a `ProcessGroup`, a `DeviceMesh` of one dimension, or None for all ranks. All its ranks
must call alike, also in backward. Arguments are compared first, by 24 bytes from each rank, so
that a difference is an error on every rank; the comparison waits for the device only where the
group has no backend for CPU. Where a rank stops or never calls, the others get an error of the
process group, once its timeout is over. Under `torch.compile` the calls break the graph.
"""

from moba_flex.distributed.heads import HeadParallel, tensor_parallel_plan
from moba_flex.distributed.sequence import (
    Traffic,
    communication_bytes,
    context_parallel_attention,
    shard_sequence,
    ulysses_attention,
    unshard_sequence,
)

__all__ = [
    "HeadParallel",
    "Traffic",
    "communication_bytes",
    "context_parallel_attention",
    "shard_sequence",
    "tensor_parallel_plan",
    "ulysses_attention",
    "unshard_sequence",
]
