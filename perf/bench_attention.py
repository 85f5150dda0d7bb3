"""Times attention forward, backward and both, for every implementation in the same run.

    pytest perf --benchmark-json=perf/results/attention_NAME.json

Inputs are random, which is the hardest case for a block mask, unless the shape says otherwise:
neighbouring queries choose unrelated blocks. Of moba_flex, the parts of its forward pass are timed
too. The clock waits for the device. Between two readings short calls follow each other, as in a
program: the processor prepares one while the device computes another.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from moba_flex import route
from moba_flex.compile.plans import find_plan
from moba_flex.masks.regroup import sort_pairs
from moba_flex.masks.request import given_request
from perf.check import check
from perf.peers import PEERS, Attention, Unavailable
from perf.shapes import PARTS, STAGES, Shape, draw
from perf.timing import l2_flusher, peak_mib, synced_clock

Call = tuple[tuple[Tensor, ...], dict[str, object]]
ROUND = 0.01  # seconds that a round lasts at least


@dataclass
class Subject:
    """An implementation that is set up for a shape.

    Attributes:
        attend: The implementation.
        inputs: q, k and v, in the memory layout that it wants.
        found: What the check said, by whether it included the gradients.
    """

    attend: Attention
    inputs: list[Tensor]
    found: dict[bool, dict[str, float]] = field(default_factory=dict)


_held: dict[tuple[str, Shape], Subject] = {}


@pytest.mark.benchmark(timer=synced_clock)
def bench_attention(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    device: torch.device,
    rows: str,
    shape: Shape,
    peer: str,
    stage: str,
) -> None:
    trains = "backward" in stage
    if trains and device.type not in PEERS[peer].trains_on:
        pytest.skip(f"{peer} has no backward on {device.type}")
    try:
        subject = set_up(peer, shape, device)
        q, k, v = (x.detach().requires_grad_(trains) for x in subject.inputs)
        attend = subject.attend
        if trains not in subject.found:
            subject.found[trains] = check(attend, q, k, v, shape, sparse=PEERS[peer].sparse)
        stages = part_calls(shape, q, k, v) if stage in PARTS else stage_calls(attend, q, k, v)
        run, flush = stages[stage], l2_flusher(device)

        def prepare() -> Call:
            args = (attend(q, k, v),) if stage == "backward" else ()
            flush()
            return args, {}

        peak = peak_mib(run, prepare()[0], device)
        calls = math.ceil(ROUND / seconds_of(run, prepare()))
        rounds = count_rounds(run, prepare, calls, request.config.getoption("seconds"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{peer} runs out of memory at {shape.name}")
    benchmark.group = f"{shape.name} {stage}"
    benchmark.extra_info.update(
        **describe(shape, stage),
        rows=rows,
        peer=peer,
        stage=stage,
        peak_mib=peak,
        calls=calls,
        **subject.found[trains],
    )
    # What is above warmed it up.
    if calls == 1:
        benchmark.pedantic(run, setup=prepare, rounds=rounds)
    else:
        benchmark.pedantic(run, args=prepare()[0], rounds=rounds, iterations=calls)


def set_up(peer: str, shape: Shape, device: torch.device) -> Subject:
    """Set a peer up for a shape and make its inputs, once for all stages."""
    if (peer, shape) not in _held:
        _held.clear()  # before the next one takes memory
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()  # each shape is compiled for itself, as in a program of only one
        inputs = list(draw(shape, device))
        if PEERS[peer].packed:
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        _held[peer, shape] = Subject(PEERS[peer].setup(shape, device), inputs)
    return _held[peer, shape]


def stage_calls(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Callable[..., object]]:
    """Return what to time of an implementation; "backward" takes the output."""
    grad = torch.randn_like(q)

    def backward(out: Tensor, again: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=again)

    return {
        "forward": lambda: attend(q, k, v),
        "backward": lambda out: backward(out, True),
        "forward+backward": lambda: backward(attend(q, k, v), False),
    }


def part_calls(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[..., object]]:
    """Return what to time of the plan that moba_flex takes by itself."""
    options: dict[str, Any] = {"block_size": shape.block_size, "top_k": shape.top_k}
    routing = route(q, k, **options)
    given = given_request(q, k, v, routing)
    plan = find_plan("auto", given)
    return {
        "route": lambda: route(q, k, **options),
        "regroup": lambda: sort_pairs(routing, shape.num_kv_heads),
        "attend": lambda: plan(given),
    }


def describe(shape: Shape, stage: str) -> dict[str, Any]:
    """Return a shape's sizes and what a stage of it amounts to, as JSON takes it."""
    facts = asdict(shape) | {"density": shape.density}
    facts |= {"shape": facts.pop("name"), "dtype": str(shape.dtype).removeprefix("torch.")}
    if stage in STAGES:
        work = {"operations": shape.operations(stage), "bytes": shape.bytes(stage)}
        facts |= work | {"flops": shape.flops(stage)}
    return facts


def seconds_of(run: Callable[..., object], call: Call) -> float:
    """Time one call, alone."""
    start = synced_clock()
    run(*call[0])
    return synced_clock() - start


def count_rounds(
    run: Callable[..., object],
    prepare: Callable[[], Call],
    calls: int,
    seconds: float,
    most: int = 50,
) -> int:
    """Choose how many rounds to time, preparations included, from one that is not recorded."""
    start = synced_clock()
    call = prepare()
    for _ in range(calls):
        run(*call[0])
    return max(3, min(most, round(seconds / (synced_clock() - start))))
