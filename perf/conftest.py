"""Options of the benchmarks, and what goes into their JSON."""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.logger import PytestBenchmarkWarning

from perf.peers import PEERS
from perf.shapes import PARTS, ROWS, STAGES, TINY, Shape
from perf.tables import CUDNN, FLASH, OURS
from perf.timing import copy_rate, machine_info, matmul_rate

# Implementations and stages that are timed in some groups of rows; in the others all are.
_FEW = (OURS, FLASH, CUDNN)
ONLY = {
    "variants": (_FEW, STAGES),
    "heads": (_FEW, STAGES),
    "sweep": (_FEW, STAGES + PARTS),
    "dense": (_FEW, STAGES),
    "map": (_FEW, ("forward+backward",)),
    "layouts": ((OURS,), STAGES),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moba_flex")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption(
        "--device", choices=ROWS, default=default, help=f"where to run (here: {default})"
    )
    group.addoption(
        "--rows",
        action="append",
        help="time this group of shapes, such as variants, sweep or map (default: main; "
        "tiny with --benchmark-disable)",
    )
    group.addoption(
        "--shape", action="append", help="time this shape, such as 16K/512/3, of any group"
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
    device, shapes = config.getoption("device"), config.getoption("shape")
    known = ROWS[device] | {"tiny": [TINY]}
    default = ["tiny" if config.getoption("benchmark_disable") else "main"]
    groups = config.getoption("rows") or (list(known) if shapes else default)
    check_known("--rows", groups, known)
    available = [shape.name for group in groups for shape in known[group]]
    names = shapes or available
    check_known("--shape", names, available)
    marks = [pytest.mark.cuda] if device == "cuda" else []
    params = [
        pytest.param(rows, shape, peer, stage, id=f"{shape.name}-{peer}-{stage}", marks=marks)
        for rows in groups
        for shape, peer, stage in timed(rows, known[rows])
        if shape.name in names
    ]
    metafunc.parametrize(("rows", "shape", "peer", "stage"), params)


def check_known(option: str, asked: Iterable[str], known: Iterable[str]) -> None:
    if unknown := set(asked) - set(known):
        raise pytest.UsageError(f"{option} must be one of {', '.join(known)}, got {unknown.pop()}")


def timed(rows: str, shapes: list[Shape]) -> Iterator[tuple[Shape, str, str]]:
    """Yield what is timed of a group: shape, implementation and stage.

    Dense attention costs the same for all `block_size` and `top_k`: in a group that has shapes of
    it, dense implementations are timed at those alone.
    """
    peers, stages = ONLY.get(rows, (PEERS, STAGES + PARTS))
    apart = any(shape.dense for shape in shapes)
    for shape, peer, stage in itertools.product(shapes, peers, stages):
        if apart and shape.dense == PEERS[peer].sparse:
            continue
        if stage in STAGES or peer == OURS:
            yield shape, peer, stage


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


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    device = torch.device(config.getoption("device"))
    dtypes = sorted({bench["extra_info"]["dtype"] for bench in output_json["benchmarks"]})
    matmul = {name: matmul_rate(device, getattr(torch, name)) for name in dtypes}
    copy = copy_rate(device)
    output_json["machine_info"] |= {"matmul_flops": matmul, "copy_bytes": copy}
    for bench in output_json["benchmarks"]:
        stats, extra = bench["stats"], bench["extra_info"]
        stats.pop("data", None)  # every single round
        bench.pop("params")  # extra_info tells them
        if "flops" in extra:
            extra["tflops"] = extra["flops"] / stats["median"] / 1e12
            limit = max(extra["operations"] / matmul[extra["dtype"]], extra["bytes"] / copy)
            extra["limit_share"] = limit / stats["median"]
