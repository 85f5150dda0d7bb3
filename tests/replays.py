"""Replays of plain calls, held to the calls themselves without a GPU: kernels are interpreted."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moba_flex.masks._torch import kernel_op


class Replays:
    """Makes each plain call run twice, the second time by its program on copies of its arguments.

    Attributes:
        number: How many replays were compared.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.number = 0
        self.first_call = kernel_op._first_call
        patch.setattr(kernel_op._Call, "find", launch_by_address)
        patch.setattr(kernel_op, "_current_stream", lambda: None)
        patch.setattr(kernel_op, "_first_call", self.compare)
        patch.setattr(kernel_op, "_known", {})

    def compare(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, None]:
        """Stand for `_first_call`; nothing is remembered, so that each call is a first one."""
        copies = tuple(copied(x) if isinstance(x, Tensor) else x for x in args)
        result, replay = self.first_call(function, args)
        if replay is not None and replay.__name__ == "run":  # that of a program
            again = replay(copies)
            torch.testing.assert_close((again, copies), (result, args), **EXACT)
            self.number += 1
        return result, None


EXACT: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}


def copied(x: Tensor) -> Tensor:
    """Return a tensor of the same values, strides and alignment in other memory."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def launch_by_address(
    call: Any, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Stand for `_Call.find`: interpret a kernel, of which replays know addresses alone."""
    kernel = getattr(kernel, "kernel", kernel)
    kinds = [(x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else None for x in args]
    options = {name: x for name, x in options.items() if name != "maxnreg"}

    def run(stream: None, *given: Any) -> None:
        tensors = []
        for x, kind in zip(given, kinds, strict=True):
            if kind is not None and isinstance(x, int):
                dtype, shape, stride = kind
                if 0 in shape:
                    tensors.append(torch.empty_strided(shape, stride, dtype=dtype))
                    continue
                most = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
                memory = (ctypes.c_char * (most * dtype.itemsize)).from_address(x)
                x = torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)
            tensors.append(x)
        with _disable_current_modes():
            kernel[grid](*tensors, **options)

    run(None, *args)
    call.record.append((run, ()))
    call.given.append(args)
