"""Options of the benchmarks, and what goes into their JSON."""

import warnings
from typing import Any

import pytest
import torch
from pytest_benchmark.logger import PytestBenchmarkWarning

from perf.shapes import ROWS, TINY
from perf.timing import machine_info


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moba_flex")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption(
        "--device", choices=ROWS, default=default, help=f"where to run (here: {default})"
    )
    group.addoption(
        "--shape",
        action="append",
        help="time this shape, such as 16K/512/3 or tiny (default: each of the device's; "
        "only the tiny one with --benchmark-disable)",
    )
    group.addoption(
        "--seconds", type=float, default=5.0, help="time a benchmark for about this long"
    )


def pytest_configure() -> None:
    # As an error, the plugin's warning at the end of a run would bury the run's own report.
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = config.getoption("device")
    known = {shape.name: shape for shape in [*ROWS[device], TINY]}
    disabled = config.getoption("benchmark_disable")
    default = [TINY.name] if disabled else [shape.name for shape in ROWS[device]]
    names = config.getoption("shape") or default
    if unknown := set(names) - set(known):
        raise pytest.UsageError(f"--shape must be one of {', '.join(known)}, got {unknown.pop()}")
    marks = [pytest.mark.cuda] if device == "cuda" else []
    params = [pytest.param(known[name], id=name, marks=marks) for name in names]
    metafunc.parametrize("shape", params, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            # A peer's warning says nothing about its time.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("device"))


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return dict(machine_info(torch.device(config.getoption("device"))))


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {}  # the machine's description holds the commit


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for bench in output_json["benchmarks"]:
        stats, extra = bench["stats"], bench["extra_info"]
        stats.pop("data", None)  # every single round
        bench.pop("params")  # extra_info tells them
        extra["tflops"] = extra["flops"] / stats["median"] / 1e12
