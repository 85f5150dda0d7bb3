"""Times attention forward, backward and both, for every implementation in the same run.

    pytest perf --benchmark-json=perf/results/attention_NAME.json

Keys, values and queries are random, which is the hardest case for a block mask: neighbouring
queries choose unrelated blocks.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from perf.check import check
from perf.peers import PEERS, Attention, Unavailable
from perf.shapes import Shape
from perf.timing import l2_flusher, peak_mib, synced_clock

Call = tuple[tuple[Tensor, ...], dict[str, object]]


@pytest.mark.parametrize("stage", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.benchmark(timer=synced_clock)
def bench_attention(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    device: torch.device,
    shape: Shape,
    peer: str,
    stage: str,
) -> None:
    trains = stage != "forward"
    if trains and device.type not in PEERS[peer].trains_on:
        pytest.skip(f"{peer} has no backward on {device.type}")
    try:
        attend, inputs = set_up(peer, shape, device)
        q, k, v = (x.detach().requires_grad_(trains) for x in inputs)
        found = check(attend, q, k, v, shape, sparse=PEERS[peer].sparse)
        run, prepare = stage_calls(attend, q, k, v, stage, l2_flusher(device))
        peak = peak_mib(run, prepare()[0], device)
        rounds = count_rounds(run, prepare, request.config.getoption("seconds"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{peer} runs out of memory at {shape.name}")
    benchmark.group = f"{shape.name} {stage}"
    benchmark.extra_info.update(
        shape=shape.name,
        peer=peer,
        stage=stage,
        batch=shape.batch,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        seq_len=shape.seq_len,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        top_k=shape.top_k,
        dtype=str(shape.dtype).removeprefix("torch."),
        density=shape.density,
        flops=shape.flops(stage),
        peak_mib=peak,
        **found,
    )
    benchmark.pedantic(run, setup=prepare, rounds=rounds)  # the rounds above warmed it up


@lru_cache(maxsize=1)
def set_up(peer: str, shape: Shape, device: torch.device) -> tuple[Attention, list[Tensor]]:
    """Set a peer up for a shape, and make its inputs in the memory layout that it wants."""
    torch._dynamo.reset()  # each shape is compiled for itself, as in a program that has only one
    torch.manual_seed(0)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    sizes = [(shape.batch, count, shape.seq_len, shape.head_dim) for count in heads]
    inputs = [torch.randn(size, dtype=shape.dtype, device=device) for size in sizes]
    if PEERS[peer].packed:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    return PEERS[peer].setup(shape, device), inputs


def stage_calls(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, stage: str, flush: Callable[[], None]
) -> tuple[Callable[..., object], Callable[[], Call]]:
    """Return what to time, and what to do before each round, which yields its arguments."""
    grad = torch.randn_like(q)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), grad)

    def prepare() -> Call:
        args = (attend(q, k, v),) if stage == "backward" else ()
        flush()
        return args, {}

    calls: dict[str, Callable[..., object]] = {
        "forward": lambda: attend(q, k, v),
        "backward": backward,
        "forward+backward": lambda: backward(attend(q, k, v)),
    }
    return calls[stage], prepare


def count_rounds(
    run: Callable[..., object], prepare: Callable[[], Call], seconds: float, most: int = 50
) -> int:
    """Choose how many rounds to time, preparations included, from one that is not recorded."""
    start = synced_clock()
    run(*prepare()[0])
    return max(3, min(most, round(seconds / (synced_clock() - start))))
