"""Checks of output files and devices, safe writing, and other libraries' errors as one line."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_LONGEST = 500


def check_output(name: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written to `path`, by a trial that leaves nothing behind.

    Raises:
        ValueError: `path` is a folder, a device or protected, or its folder, or the nearest parent
            that exists, cannot be written to.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "a device or a pipe"
            raise ValueError(f"{name} must be a file, got {kind}: {str(path)!r}")
        folder = target.parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryDirectory(dir=folder) as room:
            Path(room, target.name).touch()
        protected = target.exists() and not os.access(target, os.W_OK)
    except OSError as error:
        raise ValueError(
            f"{name} must be writable, got {str(path)!r}: {error.strerror}"
        ) from error
    if protected:
        raise ValueError(f"{name} must be writable, got {str(path)!r}: the file is protected")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to `path`; a file written there replaces `path` at the end.

    If the `with` block raises, `path` stays as it was.
    """
    target = Path(os.path.realpath(path))  # a symlink stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fresh = Path(folder, target.name)
        yield fresh
        os.replace(fresh, target)


def check_device(device: str | torch.device | None) -> torch.device:
    """Return a device to run on; None stands for CUDA if the machine has it, else the CPU.

    Raises:
        ValueError: `device` is neither a CPU nor a CUDA device, or the machine lacks it.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        place = torch.device(chosen)
        torch.empty(0, device=place)
        usable = place.type in ("cpu", "cuda")
    except Exception:  # unknown device, not built in, no driver: errors of many classes
        usable = False
    if not usable:
        raise ValueError(
            f"device must be cpu or a CUDA device of this machine, got {str(device)!r}"
        )
    return torch.device("cpu") if place.type == "cpu" else place  # tensors do not number CPUs


def reason(error: BaseException) -> str:
    """Return an error of another library as one line of limited length."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
