"""Run a package with PyTorch alone; a script of `test_export.py`."""

import json
import sys
from importlib.abc import MetaPathFinder
from typing import Any

import torch


class NoMoba(MetaPathFinder):
    """Lets nobody import moba_flex."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse the module."""
        if name.split(".")[0] == "moba_flex":
            raise ImportError(name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NoMoba())
    package, cases = sys.argv[1:]
    run = torch._inductor.aoti_load_package(package)
    worst = []
    for inputs, want in torch.load(cases):
        worst.append((run(*inputs) - want).abs().max().item())
    assert "moba_flex" not in sys.modules
    print(json.dumps(worst))
