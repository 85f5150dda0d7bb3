"""Argument parsing, output and errors of the command `moba-flex`: any error is one line."""

import argparse
import contextlib
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from moba_flex.compile.outside import reason

TRACEBACK = "MOBA_FLEX_TRACEBACK"
"""The environment variable that, if set, adds tracebacks to errors."""

_MOST = 2**63 - 1  # PyTorch's largest int


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Print the message as one line, and exit with 2."""
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def guarded(parser: Parser, argv: list[str]) -> int:
    """Parse arguments, run the command that they name, and print any error as one line.

    Returns:
        The exit code: 0; 2 after an error; 130 after Ctrl-C.
    """
    name = parser.prog
    with _streams():
        try:
            try:
                arguments = parser.parse_args(argv)
            except SystemExit:
                say("")  # flushes, and raises if the help could not be written
                raise
            name = f"{name} {arguments.command}"
            return int(arguments.run(arguments))
        except SystemExit:
            raise
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
        except BaseException as error:  # pyo3's PanicException is no Exception
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            print(f"{name}: error: {_told(error)}", file=sys.stderr)
            return 2


def say(text: str, end: str = "\n") -> None:
    """Print text to stdout, then `end` unless the text is empty, and flush.

    Raises:
        OSError: stdout cannot be written to.
    """
    # Characters outside the terminal's encoding become escapes.
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, end=end if text else "", flush=True)
    except OSError as error:
        _mute(sys.stdout)
        raise OSError(f"stdout must be writable, got {error.strerror}") from error


def integer(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Return a parser of ints from `least` to `most`."""

    def parse(value: str) -> int:
        sign = "-" if least < 0 and value.startswith("-") else ""
        digits = value.removeprefix(sign)
        digits = digits.lstrip("0") or digits[-1:]
        number = least - 1
        if re.fullmatch("[0-9]+", digits):  # `int` would accept digits of other scripts
            number = int(sign + digits[: len(str(most)) + 1])
        if least <= number <= most:
            return number
        need = f"at most {most}" if number > most else f"at least {least}"
        shown = value if len(value) <= 40 else f"{value[:40]}..."
        raise argparse.ArgumentTypeError(f"must be an int of {need}, got {shown!r}")

    return parse


def positive(value: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if 0 < number < math.inf:
        return number
    shown = value if len(value) <= 40 else f"{value[:40]}..."
    raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {shown!r}")


def need(extra: str, *packages: str) -> None:
    """Raise if a package of an extra is missing.

    Raises:
        ImportError: A package is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{package} is missing: pip install "moba-flex[{extra}]"')


def _told(error: BaseException) -> str:
    """Return the message of an error for the user."""
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        return (
            f"memory must hold model and text, got {reason(error)}: "
            "take fewer tokens or a smaller model"
        )
    if _is_ours(error) and str(error):
        return " ".join(str(error).split())
    return f"{reason(error)} ({TRACEBACK}=1 shows where)"


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised in moba_flex, so that its message says what to do."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "")
    return module.split(".")[0] in ("moba_flex", "__main__")


class _Lossy:
    """A stream that drops text instead of raising: notes and progress bars must stop no run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write and flush the text, or drop it."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            _mute(self._stream)
        return len(text)

    def flush(self) -> None:
        """Flush, and ignore errors."""
        self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Replace stdout and stderr if they are closed, and let writes to stderr never raise."""
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w"))
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(null))
        stack.enter_context(contextlib.redirect_stderr(cast(IO[str], _Lossy(sys.stderr or null))))
        yield


def _mute(stream: IO[str]) -> None:
    """Redirect a broken stream to the null device, or Python would raise again at exit."""
    with contextlib.suppress(OSError, ValueError):  # the stream has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
