"""What all tests share: poisoned memory, the number of cases, a summary of the worst errors."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # before a kernel is decorated: nothing above imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A package's wrapper runs for microseconds; without optimization it compiles in less time.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

# MOBA_FLEX_EXAMPLES=3000 draws that many cases in each property test instead.
settings.register_profile(
    "moba_flex",
    max_examples=int(os.environ.get("MOBA_FLEX_EXAMPLES", "40")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("moba_flex")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, and refuse what is not deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each plain call of kernels once more, as a replay by addresses alone, and compare."""
    from tests.replays import Replays

    checked = Replays(monkeypatch)
    yield
    assert checked.number


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how near the worst case of each comparison came to its tolerance."""
    from tests.helpers import WORST

    if WORST:
        terminalreporter.section("worst error / tolerance against the float64 oracle")
        for name, (ratio, cases) in sorted(WORST.items()):
            terminalreporter.write_line(f"{name:40} {ratio:5.2f} of 1.00 in {cases} comparisons")
