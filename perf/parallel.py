"""Time attention that several processes share, beside one process and dense attention.

    torchrun --nproc-per-node 2 -m perf.parallel --out perf/results/parallel_2.json

Each rank holds its part of one sequence. Milliseconds are those of the slowest rank, the least of
several rounds; routing and communication are inside. "one" is rank 0 alone with the whole
sequence, and the efficiency of W ranks is its time over W times theirs. Dense attention is
PyTorch's context parallel of scaled_dot_product_attention, and `ulysses_attention` with blocks
that cover all keys. Bytes are what a rank sends in forward, and again in backward.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from moba_flex import moba_attention
from moba_flex.distributed import (
    communication_bytes,
    context_parallel_attention,
    shard_sequence,
    ulysses_attention,
)
from perf.timing import machine_info, synced_clock

HEADS, KV_HEADS, DIM = 32, 8, 128
GATES = ((128, 8), (512, 3))

Step = Callable[[], Tensor]
"""Returns the output of one call, whose backward is timed too."""


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks that torchrun started, and yield this rank's device."""
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def measure(step: Step, inputs: Sequence[Tensor], rounds: int, device: torch.device) -> Any:
    """Return milliseconds of forward and of both ways, and the most memory of a rank, in MiB.

    Args:
        step: What is timed.
        inputs: Tensors whose gradients are computed.
        rounds: Rounds after one that compiles.
        device: Where it runs.
    """
    best = [float("inf")] * 2
    for number in range(rounds + 1):
        for x in inputs:
            x.grad = None
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        start = synced_clock()
        out = step()
        forward = synced_clock() - start
        out.backward(torch.ones_like(out))
        times = torch.tensor([forward, synced_clock() - start])
        dist.all_reduce(times, dist.ReduceOp.MAX)
        if number:
            best = [min(x, y) for x, y in zip(best, times.tolist(), strict=True)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    most = torch.tensor(peak / 2**20)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"forward": 1e3 * best[0], "both": 1e3 * best[1], "MiB": most.item()}


def alone(step: Step, inputs: Sequence[Tensor], rounds: int, device: torch.device) -> Any:
    """Do what `measure` does, on rank 0 alone."""

    def nothing() -> Tensor:
        return torch.zeros((), requires_grad=True)

    first = dist.get_rank() == 0
    return measure(step if first else nothing, inputs if first else [], rounds, device)


def compare(
    seq_len: int, gate: tuple[int, int], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return figures of one sequence length and gate."""
    block_size, top_k = gate
    ranks, group = dist.get_world_size(), dist.group.WORLD
    heads, kv_heads, dim = options.heads, options.kv_heads, options.dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the same sequence on all ranks
    whole = [
        torch.randn(1, n, seq_len, dim, generator=generator, dtype=dtype, device=device)
        for n in (heads, kv_heads, kv_heads)
    ]
    row: dict[str, Any] = {"seq_len": seq_len, "gate": f"{block_size}/{top_k}", "ranks": ranks}
    sent = communication_bytes(
        ranks=ranks,
        seq_len=seq_len,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        dtype=dtype,
    )
    row["bytes"] = sent._asdict()
    moba: dict[str, Any] = {"block_size": block_size, "top_k": top_k}
    covering: dict[str, Any] = {"block_size": block_size, "top_k": -(-seq_len // block_size)}
    rounds = options.rounds

    def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in tensors]

    if seq_len <= options.one_up_to:
        mine = leaves(whole)
        row["one"] = alone(lambda: moba_attention(*mine, **moba), mine, rounds, device)
        del mine
    parts = leaves([shard_sequence(x, group) for x in whole])
    cut = leaves([x.tensor_split(ranks, dim=2)[dist.get_rank()] for x in whole])
    if seq_len > options.dense_up_to:
        whole = []
    ways: dict[str, tuple[Callable[..., Tensor], list[Tensor], dict[str, Any]]] = {
        "context parallel": (context_parallel_attention, parts, moba),
        "ulysses": (ulysses_attention, cut, moba),
    }
    if whole:
        ways["ulysses, dense"] = (ulysses_attention, cut, covering)
    for name, (attend, inputs, given) in ways.items():
        row[name] = measure(lambda: attend(*inputs, group=group, **given), inputs, rounds, device)  # noqa: B023
    if whole and device.type == "cuda":  # its ring takes no attention of a CPU
        row["PyTorch's context parallel, dense"] = _dense(whole, rounds, device)
    if "one" in row:
        for name in ("context parallel", "ulysses"):
            shares = {x: row["one"][x] / ranks / row[name][x] for x in ("forward", "both")}
            row[name]["efficiency"] = shares
    return row


def _dense(whole: list[Tensor], rounds: int, device: torch.device) -> Any:
    """Measure PyTorch's own context parallel, which takes as many key heads as query heads."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    q, k, v = whole
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    buffers = [q, k, v]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        q, k, v = (x.detach().requires_grad_() for x in buffers)

        def step() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return measure(step, (q, k, v), rounds, device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.parallel", description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2**16, 2**18, 2**20])
    parser.add_argument("--one-up-to", type=int, default=2**20, help="longest for one process")
    parser.add_argument("--dense-up-to", type=int, default=2**18, help="longest for dense ways")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    with process_group() as device:
        for seq_len in options.seq_len:
            for gate in GATES:
                rows.append(compare(seq_len, gate, options, device))
                if dist.get_rank() == 0:
                    print(json.dumps(rows[-1]), flush=True)
        if options.out and dist.get_rank() == 0:
            about = {"machine": machine_info(device), "rows": rows}
            options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
