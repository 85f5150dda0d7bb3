"""Questions about tracing and export; an exported graph serves every length and runs no Python."""

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
    """Say whether the calling thread is tracing a graph.

    `torch.compiler.is_compiling` reads a flag of the process: it is true in all threads while one
    of them traces. The tracing context belongs to one thread.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace the next line
        return True
    return torch.compiler.is_compiling() and TracingContext.try_get() is not None


def is_exporting() -> bool:
    """Say whether the calling thread traces for `torch.export`.

    In PyTorch 2.11 `torch.compiler.is_exporting` is true in graphs of torch.compile too.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting() and is_traced()


def holds(condition: bool) -> bool:
    """Say whether a condition on lengths holds; under export, whether it holds at every length.

    Export would otherwise decide for the lengths of the example, and the package would refuse
    others.
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
    """Count a call, inside the `with` block of `recorded`."""
    if not is_exporting():
        return  # torch.compile cannot trace a ContextVar
    calls = _calls.get()
    if calls is not None:
        calls[tuple(options.items())] += 1
