"""Time attention that several processes share, beside one process and dense attention.

    torchrun --nproc-per-node 2 -m perf.parallel --out perf/results/parallel_2.json

Each rank holds its part of one sequence. Milliseconds are those of the slowest rank, the least of
several rounds; routing and communication are inside. "one" is rank 0 alone with the whole
sequence, and the efficiency of W ranks is its time over W times theirs. Rows of the gate "dense"
are attention to all keys: by PyTorch's context parallel, whose keys and values travel by an
all-gather or around a ring, and by `ulysses_attention` with a block that covers all keys. Bytes
are what a rank sends in forward, and again in backward; MiB is the most that a way takes of
PyTorch's allocator on a rank, with its inputs and gradients.

The file is written anew after each row. A row that would not end within the budget, by the figures
of a shorter sequence, is left out.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method

from moba_flex import moba_attention
from moba_flex.distributed import (
    collectives,
    communication_bytes,
    context_parallel_attention,
    shard_sequence,
    ulysses_attention,
)
from perf.timing import machine_info, synced_clock

HEADS, KV_HEADS, DIM = 32, 8, 128
GATES = ((128, 8), (512, 3))
ENOUGH = 2.0  # seconds of rounds
LONG = 5.0  # seconds of a call that is timed once, if nothing is compiled for it

Step = Callable[[], Tensor]
"""Returns the output of one call, whose backward is timed too."""


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks that torchrun started, and yield this rank's device."""
    local = int(os.environ["LOCAL_RANK"])
    timeout = timedelta(minutes=3)  # the other ranks wait while one compiles
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def measure(
    step: Step,
    inputs: Sequence[Tensor],
    rounds: int,
    device: torch.device,
    *,
    compiled: bool = True,
) -> Any:
    """Return milliseconds of forward and of both ways, and the most memory of a rank, in MiB.

    Args:
        step: What is timed.
        inputs: Tensors whose gradients are computed.
        rounds: Rounds at most, after one that compiles.
        device: Where it runs.
        compiled: Whether the first call compiles anything.
    """
    cuda = device.type == "cuda"
    best, spent, held, timed = [float("inf")] * 2, 0.0, 0, 0
    for number in range(rounds + 1):
        for x in inputs:
            x.grad = None
        if cuda and number < 2:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() - sum(x.nbytes for x in inputs)
        dist.barrier()
        error = ""
        start = synced_clock()
        try:
            out = step()
            forward = synced_clock() - start
            out.backward(torch.ones_like(out))
            times = torch.tensor([forward, synced_clock() - start], dtype=torch.float64)
            del out
        except Exception as raised:  # too little memory, say: other rows go on
            error = f"{type(raised).__name__}: {raised}"[:300]
            times = torch.full((2,), float("inf"), dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        if times[1] == float("inf"):
            for x in inputs:
                x.grad = None
            return {"error": error or "another rank failed"}
        long = not compiled and times[1] > LONG
        if number or long:
            best = [min(x, y) for x, y in zip(best, times.tolist(), strict=True)]
            spent, timed = spent + times[1].item(), timed + 1
        if long or spent > ENOUGH:
            break
    most = torch.tensor((torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else 0.0)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for x in inputs:
        x.grad = None
    figures = {"forward": 1e3 * best[0], "both": 1e3 * best[1], "MiB": most.item()}
    return figures | {"rounds": timed}


def alone(
    step: Step,
    inputs: Sequence[Tensor],
    rounds: int,
    device: torch.device,
    *,
    compiled: bool = True,
) -> Any:
    """Do what `measure` does, on rank 0 alone."""

    def nothing() -> Tensor:
        return torch.zeros((), requires_grad=True)

    first = dist.get_rank() == 0
    given = (step, inputs) if first else (nothing, [])
    return measure(*given, rounds, device, compiled=compiled)


def links(device: torch.device) -> dict[str, Any]:
    """Return milliseconds of collectives, by the bytes that a rank sends."""
    ranks = dist.get_world_size()
    row: dict[str, Any] = {"collectives": {}, "ranks": ranks}
    sizes = (2**10, 2**20, 2**26, 2**29) if device.type == "cuda" else (2**10, 2**20)

    def gather(nbytes: int) -> Callable[[], object]:
        mine = torch.zeros(nbytes // (ranks - 1 or 1), dtype=torch.uint8, device=device)
        every = mine.new_empty(ranks * mine.numel())
        return lambda: collectives._all_gather(every, mine)

    def swap(nbytes: int) -> Callable[[], object]:
        mine = torch.zeros((nbytes // (ranks - 1 or 1)) * ranks, dtype=torch.uint8, device=device)
        got = torch.empty_like(mine)
        return lambda: dist.all_to_all_single(got, mine)

    for name, make in {"all-gather": gather, "all-to-all": swap}.items():
        for nbytes in sizes:
            call = make(nbytes)
            best = float("inf")
            for number in range(7):
                dist.barrier()
                start = synced_clock()
                call()
                taken = torch.tensor(synced_clock() - start)
                dist.all_reduce(taken, dist.ReduceOp.MAX)
                best = min(best, taken.item()) if number > 1 else best
            row["collectives"].setdefault(name, {})[nbytes] = 1e3 * best
    return row


class Sequences:
    """One sequence, the same on all ranks, and what this rank holds of it."""

    def __init__(self, seq_len: int, options: argparse.Namespace, device: torch.device) -> None:
        heads, kv_heads, dim = options.heads, options.kv_heads, options.dim
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.seq_len = seq_len
        self.sizes: dict[str, Any] = {
            "seq_len": seq_len,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
        }
        generator = torch.Generator(device).manual_seed(0)
        made: dict[str, Any] = {"generator": generator, "dtype": self.dtype, "device": device}
        self.whole = [torch.randn(1, n, seq_len, dim, **made) for n in (heads, kv_heads, kv_heads)]

    def row(self, gate: str) -> dict[str, Any]:
        """Return the start of a row: what is timed, and the bytes that a rank sends."""
        ranks = dist.get_world_size()
        sent = communication_bytes(ranks=ranks, dtype=self.dtype, **self.sizes)
        about = self.sizes | {"gate": gate, "ranks": ranks, "dtype": str(self.dtype)}
        return about | {"bytes": sent._asdict()}

    def all(self) -> list[Tensor]:
        """Return the whole sequence as leaves."""
        return _leaves(self.whole)

    def head_tail(self) -> list[Tensor]:
        """Return this rank's two chunks."""
        return _leaves([shard_sequence(x, None) for x in self.whole])

    def cut(self) -> list[Tensor]:
        """Return this rank's part of one piece."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        return _leaves([x.tensor_split(ranks, dim=2)[rank].contiguous() for x in self.whole])


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def compare(
    seq_len: int, gate: tuple[int, int], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return figures of one sequence length and gate."""
    block_size, top_k = gate
    given: dict[str, Any] = {"block_size": block_size, "top_k": top_k}
    sequences, rounds = Sequences(seq_len, options, device), options.rounds
    row = sequences.row(f"{block_size}/{top_k}")
    if seq_len <= options.one_up_to:
        whole = sequences.all()
        row["one"] = alone(lambda: moba_attention(*whole, **given), whole, rounds, device)
    ways: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
        "context parallel": (context_parallel_attention, sequences.head_tail),
        "ulysses": (ulysses_attention, sequences.cut),
    }
    for name, (attend, make) in ways.items():
        inputs = make()
        row[name] = measure(lambda: attend(*inputs, group=None, **given), inputs, rounds, device)  # noqa: B023
    return _with_efficiency(row)


def dense(seq_len: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return figures of dense attention to a sequence."""
    sequences, rounds = Sequences(seq_len, options, device), options.rounds
    row = sequences.row("dense")
    if seq_len <= options.dense_one_up_to:
        q, k, v = whole = sequences.all()

        def one() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        row["one"] = alone(one, whole, rounds, device, compiled=False)
    if device.type == "cuda":  # its ring takes no attention of a CPU
        repeated = {"num_kv_heads": options.heads, "ranks": row["ranks"]}
        sent = communication_bytes(dtype=sequences.dtype, **(sequences.sizes | repeated))
        row["bytes"]["PyTorch"] = sent.context_parallel
        row["PyTorch, all-gather"] = _of_pytorch(sequences.whole, "allgather", rounds, device)
        if seq_len <= options.dense_one_up_to:
            row["PyTorch, ring"] = _of_pytorch(sequences.whole, "alltoall", rounds, device)
    if seq_len <= options.dense_one_up_to:
        inputs = sequences.cut()
        covering: dict[str, Any] = {"block_size": seq_len, "top_k": 1, "group": None}
        row["ulysses"] = measure(
            lambda: ulysses_attention(*inputs, **covering), inputs, rounds, device, compiled=False
        )
    return _with_efficiency(row)


def _with_efficiency(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the efficiency of each way that was timed, if one process was."""
    one = row.get("one", {})
    for name, figures in row.items():
        if name != "one" and "both" in one and isinstance(figures, dict) and "both" in figures:
            shares = {x: one[x] / row["ranks"] / figures[x] for x in ("forward", "both")}
            figures["efficiency"] = shares
    return row


def _of_pytorch(whole: list[Tensor], method: str, rounds: int, device: torch.device) -> Any:
    """Measure PyTorch's own context parallel, which takes as many key heads as query heads."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    set_rotate_method(method)
    q, k, v = whole
    group = q.shape[1] // k.shape[1]
    buffers = [q.clone(), *(x.repeat_interleave(group, dim=1) for x in (k, v))]
    options: dict[str, Any] = {"buffer_seq_dims": [2] * 3, "no_restore_buffers": set(buffers)}
    with context_parallel(mesh, buffers=buffers, **options):
        q, k, v = parts = _leaves(buffers)

        def step() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return measure(step, parts, rounds, device, compiled=False)


def seconds_of(
    rows: Sequence[dict[str, Any]], gate: str, seq_len: int, options: argparse.Namespace
) -> float:
    """Return how long a row takes at most, by that of a shorter sequence; 0 if there is none."""
    shorter = [row for row in rows if row.get("gate") == gate]
    if not shorter:
        return 0.0
    last = max(shorter, key=lambda row: row["seq_len"])
    grown = (seq_len / last["seq_len"]) ** 2
    left_out = {"one", "ulysses", "PyTorch, ring"} if seq_len > options.dense_one_up_to else set()
    seconds = 0.0
    for name, figures in last.items():
        if isinstance(figures, dict) and "both" in figures:
            call = grown * figures["both"] / 1e3
            if gate != "dense":
                seconds += call + min(options.rounds * call, ENOUGH + call)
            elif name not in left_out:
                seconds += call if call > LONG else call + min(options.rounds * call, ENOUGH)
    return seconds


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.parallel", description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2**16, 2**18, 2**20])
    parser.add_argument("--one-up-to", type=int, default=2**20, help="longest for one process")
    parser.add_argument(
        "--dense-one-up-to",
        type=int,
        default=2**18,
        help="longest for one process, Ulysses and the ring, if dense",
    )
    parser.add_argument(
        "--dense-up-to", type=int, default=2**20, help="longest for dense attention"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--out", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    start = time.monotonic()
    with process_group() as device:
        calls: list[tuple[str, int, Callable[[], dict[str, Any]]]] = []
        calls.append(("links", 0, partial(links, device)))
        for n in sorted(options.seq_len):
            for gate in GATES:
                name = f"{gate[0]}/{gate[1]}"
                calls.append((name, n, partial(compare, n, gate, options, device)))
        for n in sorted(options.seq_len):
            if n <= options.dense_up_to:
                calls.append(("dense", n, partial(dense, n, options, device)))
        rows: list[dict[str, Any]] = []
        for name, seq_len, call in calls:
            needed = seconds_of(rows, name, seq_len, options)
            late = torch.tensor(time.monotonic() - start + needed > options.budget)
            dist.broadcast(late, 0)
            if late:
                continue
            began = time.monotonic()
            rows.append(call())
            rows[-1]["seconds"] = time.monotonic() - began
            if dist.get_rank() == 0:
                print(json.dumps(rows[-1]), flush=True)
                if options.out:
                    about = {"machine": machine_info(device), "rows": rows}
                    options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
