"""What differs when `torch.export` looks on: one graph serves every length, and runs no Python."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import statically_known_true

Call = tuple[tuple[str, str | int | bool], ...]
"""The plan and the options of a call, by name."""

_calls: ContextVar[Counter[Call] | None] = ContextVar("calls", default=None)


def is_traced() -> bool:
    """Say whether the calling thread makes a graph.

    While one thread makes a graph, `torch.compiler.is_compiling` says yes in all of them: its flag
    belongs to the process. The context of a graph that is being made belongs to its thread.
    """
    if torch.compiler.is_dynamo_compiling():  # which cannot trace what follows
        return True
    return torch.compiler.is_compiling() and TracingContext.try_get() is not None


def is_exporting() -> bool:
    """Say whether `torch.export` is looking on.

    In a graph of torch.compile the answer of PyTorch 2.11 is always yes.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting() and is_traced()


def holds(condition: bool) -> bool:
    """Say whether a condition on lengths holds; under export, whether it does at every length.

    Else export would decide for the lengths of the example, and the package refuse others.
    """
    if is_exporting():
        return statically_known_true(condition)
    return condition


@contextmanager
def recorded() -> Iterator[Counter[Call]]:
    """Count the calls, by plan and options, that are traced inside the `with` block."""
    calls: Counter[Call] = Counter()
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def record(**options: str | int | bool) -> None:
    """Note a call down, if that is asked for."""
    if not is_exporting():
        return  # torch.compile cannot look at a ContextVar
    calls = _calls.get()
    if calls is not None:
        calls[tuple(options.items())] += 1
