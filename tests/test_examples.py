"""The scripts of tests/examples run, and show what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(folder: Path, name: str, *arguments: str, processes: int | None = None) -> str:
    """Run an example in a folder, as a user does, and return what it prints."""
    launcher = [sys.executable]
    if processes is not None:
        port = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
        launcher += ["-m", "torch.distributed.run", *port, "--nproc-per-node", str(processes)]
    command = [*launcher, str(ROOT / "tests" / "examples" / name), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_any_router_agrees_with_the_reference(tmp_path: Path) -> None:
    printed = run(tmp_path, "plug_in_a_router.py", "--tokens", "512")
    errors = [float(error) for error in re.findall(r"largest error (\S+)", printed)]
    assert len(errors) == 2
    assert max(errors) < 1e-5


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    printed = run(tmp_path, "train_a_small_model.py", "--steps", "41")
    steps = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed)]
    sparse, dense = (
        float(re.search(rf"{name}.*: loss (\S+)", printed)[1])  # type: ignore[index]
        for name in ("MoBA", "dense")
    )
    assert len(steps) == 3
    assert steps[0] > 9 > 7 > steps[-1]
    assert max(sparse, dense) < 7
    assert sparse != dense


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_routing_map_is_a_picture(tmp_path: Path) -> None:
    printed = run(tmp_path, "plot_a_routing_map.py", "map.png", "--words", "1024")
    assert re.search(r"density \d+\.\d%, entropy 0\.\d\d", printed)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.slow
def test_training_on_several_processes_continues(tmp_path: Path) -> None:
    """Training on two processes that stops and continues is training on one without a stop."""

    def losses(folder: str, steps: int, processes: int) -> list[float]:
        name = "train_on_several_processes.py"
        printed = run(tmp_path, name, folder, "--steps", str(steps), processes=processes)
        return [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed)]

    whole = losses("whole", 20, 1)
    assert len(whole) == 20
    assert whole[0] > 5 > 4 > whole[-1]
    assert losses("stopped", 10, 2) == pytest.approx(whole[:10], abs=0.005)
    assert losses("stopped", 20, 2) == pytest.approx(whole[10:], abs=0.005)
