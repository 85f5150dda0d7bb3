"""Doors to what lies outside: files to write, devices, and other libraries' errors."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_LONGEST = 500


def check_output(name: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written to `path`; try it, and leave nothing behind.

    Raises:
        ValueError: Something else lies there, or the folder that it would lie in, or the nearest
            one that exists, cannot be written to.
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
    """Yield another name in the folder of `path`; what is written there ends up at `path`.

    If the `with` block raises, what lay at `path` before still does.
    """
    target = Path(os.path.realpath(path))  # a symlink stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fresh = Path(folder, target.name)
        yield fresh
        os.replace(fresh, target)


def check_device(device: str | torch.device | None) -> torch.device:
    """Return a device to run on; None is the best one that the machine has.

    Raises:
        ValueError: It is neither a CPU nor a CUDA device, or the machine lacks it.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        place = torch.device(chosen)
        torch.empty(0, device=place)
        usable = place.type in ("cpu", "cuda")
    except Exception:  # unknown to PyTorch, not built in, no driver: each has a class of its own
        usable = False
    if not usable:
        raise ValueError(
            f"device must be cpu or a CUDA device of this machine, got {str(device)!r}"
        )
    return torch.device("cpu") if place.type == "cpu" else place  # tensors do not number CPUs


def reason(error: BaseException) -> str:
    """Return what another library says went wrong, as one line that is not too long."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
