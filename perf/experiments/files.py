"""Files that several processes read and write at the same time."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file so that a reader, and a process that is killed, leave the old one or the new.

    Args:
        path: The file; its folder is made.
        fill: Writes the contents to the path that it is called with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fill(fresh)
    os.replace(fresh, path)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file."""
    text = json.dumps(value, indent=1) + "\n"
    write(path, lambda fresh: fresh.write_text(text))


def save(value: Any, path: Path) -> None:
    """Write tensors by `torch.save`."""
    write(path, lambda fresh: torch.save(value, fresh))


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file in the `with` block; the system frees it if the process dies.

    Args:
        path: The file, which stays.
        wait: Whether to wait for it.

    Yields:
        Whether it is held: always, if it was waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        yield held
