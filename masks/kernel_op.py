"""Functions that launch Triton kernels: ops where PyTorch looks on, plain calls where it does not.

A graph, a mode or a tensor subclass must see an op. In eager code between plain tensors nothing
does, and the op's own machinery would take longer than short sequences do on a GPU. For the same
reason a plain call remembers, for tensors laid out as before, the kernels that Triton compiled,
which it would look up by each argument of each launch.
"""

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable
from torch.library import triton_op

F = TypeVar("F", bound=Callable[..., Any])
_Launch = tuple[Callable[..., None], tuple[Any, ...]]
"""What launches a compiled kernel over a grid, and the kernel's compile-time arguments."""

_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_LAYOUTS = 16384
_known: dict[tuple[Any, ...], list[_Launch]] = {}  # by function and layout of its arguments


class _Call(threading.local):
    """What the function that is running launches.

    Attributes:
        replay: The launches of an earlier call that are still to come.
        record: Where to note down the launches of this one.
    """

    replay: Iterator[_Launch] | None = None
    record: list[_Launch] | None = None


_call = _Call()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel from a function made by `kernel_op`.

    Args:
        kernel: The kernel, in `wrap_triton`.
        grid: Programs along each axis.
        args: The kernel's arguments.
        options: Its compile-time arguments and launch options.
    """
    if _call.replay is not None:
        run, constants = next(_call.replay)
        run(*args, *constants)
        return
    compiled = kernel[grid](*args, **options)
    if _call.record is not None and compiled is not None:  # interpreted kernels are not
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _call.record.append((compiled[(*grid, 1, 1)[:3]], constants))


def kernel_op(
    name: str,
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[F], F]:
    """Make a function that launches kernels an op, `call.op`, and a plain call.

    What it launches, and with which options, must follow from the layout of its arguments.

    Args:
        name: The op's qualified name.
        setup_context: Saves for backward, as of `torch.library.CustomOpDef.register_autograd`.
        backward: The gradient's formula, likewise; None for a function without a gradient.
    """

    def decorate(function: F) -> F:
        op = cast(CustomOpDef, triton_op(name, function, mutates_args=()))
        plain = _remember_launches(function)
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
            plain = _differentiable(plain, cast(Callable[..., None], setup_context), backward)

        @wraps(function)
        def call(*args: Any) -> Any:
            return op(*args) if _is_watched(args) else plain(*args)

        call.op = op  # type: ignore[attr-defined]
        return cast(F, call)

    return decorate


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a graph, a mode, a transform or a tensor's own class sees the ops on `args`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in args)
    )


def _remember_launches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function outside of an op, from the second time on with its kernels at hand."""

    def run(*args: Any) -> Any:
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run(*args)
        layout = (function, device, *map(_layout, args))
        launches = _known.get(layout)
        record: list[_Launch] = []
        outer = _call.replay, _call.record
        _call.replay, _call.record = (None, record) if launches is None else (iter(launches), None)
        try:
            with set_wrap_triton_enabled(False):
                result = function(*args)
        finally:
            _call.replay, _call.record = outer
        if record:
            if len(_known) >= _MOST_LAYOUTS:
                _known.clear()
            _known[layout] = record
        return result

    return run


def _layout(x: Any) -> Any:
    """Return all of an argument that Triton compiles for; allocations are aligned alike."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.data_ptr() % 16
    return x


def _differentiable(
    function: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Give a function a gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return Function.apply
