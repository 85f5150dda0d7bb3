"""A clock that waits for the device, what the machine is, and how fast."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

ROOT = Path(__file__).parents[1]


def synced_clock() -> float:
    """Read the clock once the device has finished all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def captured(call: Callable[[], T], times: int = 1) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return a CUDA graph of `times` calls, and what the last of them returned."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            found = call()
    return graph, found


def l2_flusher(device: torch.device) -> Callable[[], None]:
    """Make a function that empties the L2 cache, so that no round finds its inputs there."""
    if device.type != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


def peak_mib(
    run: Callable[..., object], args: tuple[Any, ...], device: torch.device
) -> float | None:
    """Measure the most memory a call holds beyond what was held before, in MiB; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*args)
    torch.cuda.synchronize()
    return float((torch.cuda.max_memory_allocated() - before) / 2**20)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product."""
    size = 16384 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b)


@cache
def copy_rate(device: torch.device) -> float:
    """Measure the bytes per second, read or written, of a large copy."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def _seconds(run: Callable[[], object], rounds: int = 11) -> float:
    """Time a call; the median leaves out that the first rounds are slower."""
    times = []
    for _ in range(rounds):
        start = synced_clock()
        run()
        times.append(synced_clock() - start)
    return statistics.median(times)


def machine_info(device: torch.device) -> dict[str, str | int | None]:
    """Describe what decides a timing: the processors, the versions and the commit."""
    info: dict[str, str | int | None] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        info |= {"gpu": torch.cuda.get_device_name(device), "driver": _output(*query)}
    return info


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.machine()}, {cores} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()
