"""Functions that launch Triton kernels: ops where PyTorch looks on, plain calls where it does not.

A graph, a mode or a tensor subclass must see an op. In eager code between plain tensors nothing
does, and the op's own machinery would take longer than short sequences do on a GPU. For the same
reason a plain call remembers, for tensors laid out as before, the kernels that Triton compiled,
which it would look up by each argument of each launch. The kernels of a call that are not compiled
yet are compiled and loaded side by side.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import set_wrap_triton_enabled
from torch.library import triton_op
from triton.runtime._async_compile import active_mode

from moba_flex.masks.exporting import is_traced
from moba_flex.masks.gradients import is_transformed, only_once, with_gradient

F = TypeVar("F", bound=Callable[..., Any])
_Launch = tuple[Callable[..., None], tuple[Any, ...]]
"""What launches a compiled kernel over a grid, and the kernel's compile-time arguments."""

_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_LAYOUTS = 16384
_known: dict[tuple[Any, ...], list[_Launch]] = {}  # by function and layout of its arguments


class _Call:
    """A plain call of a function, within a `with` statement: what it launches.

    Attributes:
        replay: The launches of an earlier call that are still to come; None for a first call.
        record: The launches of a first call.
        awaited: Kernels that are being compiled. Once there is one, nothing more is launched; the
            call goes on to find what else is to be compiled.
    """

    def __init__(self, replay: Iterator[_Launch] | None = None) -> None:
        self.replay = replay
        self.record: list[_Launch] = []
        self.awaited: list[Any] = []

    def __enter__(self) -> "_Call":
        self._outer, _running.call = _running.call, self
        self._unwrapped = set_wrap_triton_enabled(False)
        self._unwrapped.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._unwrapped.__exit__(*error)
        _running.call = self._outer

    def find(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Find a kernel in a first call, launch it, and note it down."""
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled is None:  # interpreted kernels are not
            kernel[grid](*args, **options)
            return
        if isinstance(compiled, triton.FutureKernel):
            self.awaited.append(compiled)
        if not self.awaited:
            run = compiled[(*grid, 1, 1)[:3]]
            constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
            run(*args, *constants)
            self.record.append((run, constants))


class _Running(threading.local):
    call: _Call | None = None


_running = _Running()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel from a function made by `kernel_op`.

    Args:
        kernel: The kernel, in `wrap_triton`.
        grid: Programs along each axis.
        args: The kernel's arguments.
        options: Its compile-time arguments and launch options.
    """
    call = _running.call
    if call is None:
        kernel[grid](*args, **options)
    elif call.replay is None:
        call.find(kernel, grid, args, options)
    else:
        run, constants = next(call.replay)
        run(*args, *constants)


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
        watched: Callable[..., Any] = op
        plain = differentiable = _remember_launches(function)
        if backward is not None and setup_context is not None:
            watched = with_gradient(op, setup_context=setup_context, backward=backward)
            differentiable = _differentiable(plain, setup_context, backward)

        @wraps(function)
        def call(*args: Any) -> Any:
            if _is_watched(args):
                return watched(*args)
            return differentiable(*args) if _wants_gradient(args) else plain(*args)

        call.op = op  # type: ignore[attr-defined]
        return cast(F, call)

    return decorate


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a graph, a mode, a transform or a tensor's own class sees the ops on `args`."""
    return (
        is_traced()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in args)
    )


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd is to follow a plain call on `args`."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _remember_launches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function outside of an op, from the second time on with its kernels at hand."""

    def run(*args: Any) -> Any:
        if _running.call is not None:  # within another such function
            return function(*args)
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run(*args)
        layout = (function, device, *map(_layout, args))
        launches = _known.get(layout)
        if launches is not None:
            with _Call(iter(launches)):
                return function(*args)
        with _compiling_side_by_side(args[0]), _Call() as call:
            result = function(*args)
        while call.awaited:
            for kernel in call.awaited:
                kernel.result()  # raises what failed in a caller's own threads
            with _Call() as call:
                result = function(*args)
        if call.record:
            if len(_known) >= _MOST_LAYOUTS:
                _known.clear()
            _known[layout] = call.record
        return result

    return run


class _Loaders(ThreadPoolExecutor):
    """Threads that load what they compile. A first launch would, after compiling a stub for it.

    What fails yields None, and the calling thread compiles it again and raises: Triton 3.7 would
    keep a future that failed for good, be the reason a full disk or another that passes.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self._example = example

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def load() -> Any:
            try:
                with torch.cuda.device_of(self._example):
                    kernel = fn(*args, **kwargs)
                    kernel[1, 1, 1]
                    return kernel
            except Exception:
                return None

        return super().submit(load)


@contextmanager
def _compiling_side_by_side(example: Tensor) -> Iterator[None]:
    """Let threads compile the kernels that are asked for, unless a caller has threads for that."""
    if active_mode.get() is not None:
        yield
        return
    try:
        with _Loaders(example) as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        active_mode.set(None)  # which Triton does not where an interrupt ends its wait


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
    """Give a function a gradient.

    The form of an autograd.Function that `torch.func` takes, as `with_gradient` has it, would take
    6 us more a call.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return only_once(backward, ctx, *grads)

    return Function.apply
