"""Public docstrings have examples, and the examples are true.

They see torch, what moba_flex exports, and the public names of the module they are in.
"""

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moba_flex
from moba_flex import compile as compile_package
from moba_flex import distributed

MODULES = (
    "moba_flex.diagnostics",
    "moba_flex.integrations.batching",
    "moba_flex.integrations.transformers",
    "moba_flex.masks.patterns",
)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class by the name that users import it by."""
    for name in moba_flex.__all__:
        yield f"moba_flex.{name}", getattr(moba_flex, name)
    for name in ("export", "load"):
        yield f"moba_flex.compile.{name}", getattr(compile_package, name)
    for name in distributed.__all__:
        yield f"moba_flex.distributed.{name}", getattr(distributed, name)
    for module in MODULES:
        for name, found in vars(importlib.import_module(module)).items():
            if not name.startswith("_") and getattr(found, "__module__", None) == module:
                yield f"{module}.{name}", found


OBJECTS = {
    name: found
    for name, found in public_objects()
    if inspect.isfunction(found) or inspect.isclass(found)
}


def examples(name: str) -> list[doctest.DocTest]:
    """Return the examples of an object and of its methods."""
    found = OBJECTS[name]
    module = inspect.getmodule(found)
    assert module is not None
    names = {key: x for key, x in vars(module).items() if not key.startswith("_")}
    names |= {key: getattr(moba_flex, key) for key in moba_flex.__all__} | {"torch": torch}
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(found, name, module=module, globs=names)
    return [test for test in tests if test.examples]


def test_every_public_name_has_an_example() -> None:
    assert all(examples(name) for name in OBJECTS), [x for x in OBJECTS if not examples(x)]


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_examples_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("moba_flex.integrations.transformers."):
        module = importlib.import_module("moba_flex.integrations.transformers")
        monkeypatch.setattr(module, "_default", None)  # which an example sets
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples(name):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
