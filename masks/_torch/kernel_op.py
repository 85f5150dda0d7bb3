"""Functions that launch Triton kernels: as ops where PyTorch must see them, else as plain calls.

A graph, a dispatch mode or a tensor subclass must see an op. Eager code on plain tensors needs
none, and the overhead of an op would exceed the time of a short sequence on a GPU. Triton, too,
spends time: it looks up a kernel by all arguments of each launch, and asks each tensor for its
address. So a plain call records its compiled kernels, and calls with tensors of the same shapes,
strides and dtypes reuse them. If the function only allocates and launches, they do not even run
it: a `_Program` launches the kernels with addresses in one workspace. The kernels of a first call
are compiled and loaded in parallel.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import TraceableTritonKernelWrapper
from torch._library.custom_ops import CustomOpDef
from torch.library import triton_op
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime._async_compile import active_mode

from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks._torch.gradients import only_once, with_gradient

F = TypeVar("F", bound=Callable[..., Any])
_Launch = tuple[Callable[..., None], tuple[Any, ...]]
"""The launcher of a compiled kernel over a grid, and the kernel's compile-time arguments."""

aten = torch.ops.aten
# A function that calls no ops but these only allocates.
_ALLOCATE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
_ALLOCATE_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}

# Types of arguments that no op must see.
_PLAIN = {Tensor, torch.nn.Parameter, int, float, bool, tuple, NoneType}
_MOST_LAYOUTS = 16384
_ALIGNED = 512  # bytes, as PyTorch's allocator aligns
# By function and `_layout` of its arguments: what to run instead.
_known: dict[tuple[Any, ...], Callable[[tuple[Any, ...]], Any]] = {}


class _Call:
    """The launches of a plain call of a function.

    Attributes:
        replay: The recorded launches that are still to come; None if none were recorded.
        record: The launches of this call, if none were recorded before.
        given: The arguments of these launches.
        awaited: Kernels that are being compiled. Once there is one, the call launches nothing
            more, and only goes on in order to find the other kernels to compile.
    """

    def __init__(self, replay: Iterator[_Launch] | None = None) -> None:
        self.replay = replay
        self.record: list[_Launch] = []
        self.given: list[tuple[Any, ...]] = []
        self.awaited: list[Any] = []

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call the function."""
        _running.call = self
        try:
            return function(*args)
        finally:
            _running.call = None  # plain calls within this one are part of it

    def find(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Find a kernel in a first call, launch it, and note it down."""
        if isinstance(kernel, TraceableTritonKernelWrapper):  # of PyTorch's `wrap_triton`
            kernel = kernel.kernel
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled is None:  # Triton's interpreter compiles nothing
            kernel[grid](*args, **options)
            return
        if isinstance(compiled, triton.FutureKernel):
            self.awaited.append(compiled)
        if not self.awaited:
            run = _launcher(compiled, (*grid, 1, 1)[:3])
            constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
            run(_current_stream(), *args, *constants)
            self.record.append((run, constants))
            self.given.append(args)


def _launcher(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return what launches a compiled kernel, given a stream and the kernel's arguments.

    Triton's own function describes each launch to the hooks of profilers even if there are none,
    which takes 1.5 us. It is used where the stream is None.
    """
    launch = compiled.run  # loads the kernel
    kernel = compiled.function, compiled.packed_metadata

    def run(stream: int | None, *args: Any) -> None:
        if stream is None:
            compiled[grid](*args)
        else:
            launch(*grid, stream, *kernel, None, None, None, *args)

    return run


def _current_stream() -> int | None:
    """Return the current stream; None if a profiler wants to hear of launches."""
    knobs, driver = triton.knobs.runtime, triton.runtime.driver.active
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    # A caller may have put a function or None where Triton has a chain of calls.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    stream: int = driver.get_current_stream(driver.get_current_device())
    return stream


class _Running(threading.local):
    call: _Call | None = None


_running = _Running()


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least `n`, where `triton.next_power_of_2` is slow."""
    return 1 << (int(n) - 1).bit_length()


def wrap_triton(kernel: Any) -> Any:
    """Return a kernel for `launch`: as it is in a plain call, else as a graph can hold it.

    `triton_op` finds the kernels of a function by this name in its source. PyTorch's function of
    the name takes 1 to 3 us even where it returns the kernel as it is.
    """
    return torch.library.wrap_triton(kernel) if _running.call is None else kernel


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
        options.pop("maxnreg", None)  # PyTorch's graphs know no such option
        kernel[grid](*args, **options)
    elif call.replay is None:
        call.find(kernel, grid, args, options)
    else:
        run, constants = next(call.replay)
        run(_current_stream(), *args, *constants)


def kernel_op(
    name: str,
    *,
    mutates: tuple[str, ...] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[F], F]:
    """Make a function that launches kernels an op, `call.op`, and a plain call where that will do.

    The kernels and their options may depend only on what `_layout` tells of the arguments.

    Args:
        name: The op's qualified name.
        mutates: Names of the arguments that it writes to.
        setup_context: Saves tensors for backward, as `CustomOpDef.register_autograd` takes it.
        backward: The formula of the gradient, as `CustomOpDef.register_autograd` takes it; None
            for a function without a gradient.
    """

    def decorate(function: F) -> F:
        op = cast(CustomOpDef, triton_op(name, function, mutates_args=mutates))
        watched: Callable[..., Any] = op
        if backward is not None and setup_context is not None:
            watched = with_gradient(op, setup_context=setup_context, backward=backward)
        call = _plain_or(watched, function, setup_context, backward)
        call.op = op  # type: ignore[attr-defined]
        return call

    return decorate


def one_call(setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[[F], F]:
    """Make a function that calls functions of `kernel_op` one plain call, where that will do.

    It is no op: where PyTorch must see ops, it sees those within.

    Args:
        setup_context: Saves tensors for backward, as of `kernel_op`.
        backward: The formula of the gradient, as of `kernel_op`.
    """
    return lambda function: _plain_or(function, function, setup_context, backward)


def _plain_or(
    watched: Callable[..., Any],
    function: F,
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> F:
    """Return what calls `function` plainly where that will do, and else `watched`."""
    plain = differentiable = _remember_launches(function)
    if backward is not None and setup_context is not None:
        differentiable = _differentiable(plain, setup_context, backward)

    @wraps(function)
    def call(*args: Any) -> Any:
        if not is_traced() and _running.call is not None:  # part of the call that runs
            return function(*args)
        if _is_watched(args):
            return watched(*args)
        return differentiable(*args) if _wants_gradient(args) else plain(*args)

    return cast(F, call)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a graph, a mode, a transform or a tensor subclass must see the ops on `args`."""
    return (
        is_traced()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not _PLAIN.issuperset(map(type, args))
    )


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd is to follow a plain call on `args`."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _remember_launches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as a plain call, which records its kernels and then replays them."""

    def run(*args: Any) -> Any:
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run(*args)
        layout = function, device, _layout(args)
        known = _known.get(layout)
        if known is not None:
            return known(args)
        result, replay = _first_call(function, args)
        if replay is not None:
            if len(_known) >= _MOST_LAYOUTS:
                _known.clear()
            _known[layout] = replay
        return result

    return run


def _first_call(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, Callable[[tuple[Any, ...]], Any] | None]:
    """Return the result of a plain call that has no recorded launches, and what replays it."""
    call = _Call()
    with _compiling_side_by_side(args[0]), _Ops() as ops:
        result = call.run(function, args)
    while call.awaited:
        for kernel in call.awaited:
            kernel.result()  # raises what failed in a caller's own threads
        call = _Call()
        with _Ops() as ops:
            result = call.run(function, args)
    launches = call.record
    if not launches:  # the kernels are interpreted
        return result, None
    program = _Program.of(call, args, result, ops) if ops.only_allocates else None
    if program is not None:
        return result, program.run
    return result, lambda args: _Call(iter(launches)).run(function, args)


class _Ops(TorchDispatchMode):
    """Sees whether a function calls ops that do more than allocate.

    Attributes:
        only_allocates: Whether it has called none.
        made: What it has allocated.
        zeros: What of this begins as zeros.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.only_allocates = True
        self.made: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATE_ZEROS:
            self.zeros.append(result)
        if func in _ALLOCATE_ZEROS or func in _ALLOCATE:
            self.made.append(result)
        else:
            self.only_allocates &= func.is_view
        return result


class _Place(NamedTuple):
    """Where an address comes from: the number of a base, and bytes from there on."""

    base: int
    offset: int


class _Program(NamedTuple):
    """The launches of a plain call, with holes for addresses.

    Bases are the tensors among the arguments, the results, and a workspace for everything else.

    Attributes:
        inputs: Places of tensors among the arguments.
        outputs: Size, stride and dtype of each result; None for one that is None.
        single: Whether the function returns one result, and no tuple.
        workspace: Bytes of the workspace.
        zeros: Which results begin as zeros, and which bytes of the workspace.
        device: Where all is.
        launches: Each launch: its launcher, its arguments, and which of these are addresses.
    """

    inputs: tuple[int, ...]
    outputs: tuple[tuple[Any, ...] | None, ...]
    single: bool
    workspace: int
    zeros: tuple[int | slice, ...]
    device: torch.device
    launches: tuple[tuple[Callable[..., None], list[Any], tuple[tuple[int, _Place], ...]], ...]

    @classmethod
    def of(cls, call: _Call, args: tuple[Any, ...], result: Any, ops: _Ops) -> "_Program | None":
        """Return the program of a call; None if other arguments may need another one."""
        results = result if isinstance(result, tuple) else (result,)
        inputs = {i: x for i, x in enumerate(args) if isinstance(x, Tensor)}
        bases = [*inputs.values(), *(x for x in results if x is not None)]
        if len({id(x) for x in bases}) < len(bases):
            return None  # one tensor in two places, where others may have two
        made = {_storage(x) for x in ops.made}
        by_storage: dict[int, int] = {}
        for number, x in enumerate(bases):
            shared = by_storage.setdefault(_storage(x), number) != number
            if number >= len(inputs) and x.numel() and (shared or not _is_whole(x)):
                return None  # a result that is a view
            if shared:  # where two arguments lie in one tensor, others may lie in two
                by_storage[_storage(x)] = -1
        begins = [x.data_ptr() for x in bases]
        workspace, launches, within = 0, [], {}
        for (run, constants), given in zip(call.record, call.given, strict=True):
            template, holes = [*given, *constants], []
            for place, x in enumerate(given):
                if not isinstance(x, Tensor):
                    continue
                storage = _storage(x)
                base = next((i for i, y in enumerate(bases) if x is y), by_storage.get(storage))
                if base == -1:
                    return None
                if base is None:
                    if x.numel() and storage not in made:
                        return None  # a tensor from elsewhere
                    base = len(bases)
                    if storage not in within:
                        within[storage] = workspace
                        nbytes = x.untyped_storage().nbytes()
                        workspace += -(-nbytes // _ALIGNED) * _ALIGNED
                    offset = within[storage] + x.data_ptr() - storage
                else:
                    offset = x.data_ptr() - begins[base]
                template[place] = None
                holes.append((place, _Place(base, offset)))
            launches.append((run, template, tuple(holes)))
        numbers = {_storage(x): i for i, x in enumerate(results) if x is not None}
        cleared: list[int | slice] = []
        for x in ops.zeros:
            storage = _storage(x)
            if storage in numbers:
                cleared.append(numbers[storage])
            elif storage in within:
                start = within[storage]
                cleared.append(slice(start, start + x.untyped_storage().nbytes()))
        return cls(
            tuple(inputs),
            tuple(x if x is None else (x.shape, x.stride(), x.dtype) for x in results),
            not isinstance(result, tuple),
            workspace,
            tuple(cleared),
            args[0].device,
            tuple(launches),
        )

    def run(self, args: tuple[Any, ...]) -> Any:
        """Launch the kernels for other arguments of the same layout."""
        device = self.device
        results: list[Any] = [
            x if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device=device)
            for x in self.outputs
        ]
        bases = [args[i].data_ptr() for i in self.inputs]
        bases += [x.data_ptr() for x in results if x is not None]
        # Freed when this returns: what reuses the memory comes later on the stream.
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        bases.append(workspace.data_ptr())
        for place in self.zeros:
            (results[place] if isinstance(place, int) else workspace[place]).zero_()
        stream = _current_stream()
        for run, given, holes in self.launches:
            filled = given[:]
            for place, (base, offset) in holes:
                filled[place] = bases[base] + offset
            run(stream, *filled)
        return results[0] if self.single else tuple(results)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _is_whole(x: Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.storage_offset() == 0 and x.untyped_storage().nbytes() == span * x.element_size()


class _Loaders(ThreadPoolExecutor):
    """Threads that also load the kernels that they compile, so that the first launch need not.

    Triton 3.7 keeps a failed future forever, even if the cause, such as a full disk, passes. So a
    failure returns None here, and the calling thread compiles the kernel again and raises.
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
    """Compile kernels in threads, unless the caller has set up Triton's threads already."""
    if active_mode.get() is not None:
        yield
        return
    try:
        with _Loaders(example) as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        active_mode.set(None)  # Triton forgets to if an interrupt ends its wait


def _layout(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the properties of arguments that Triton specializes kernels for.

    Tensors that the function allocates itself need no entry: all are aligned alike.
    """
    return tuple(
        [
            (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x
            for x in args
        ]
    )


def _differentiable(
    function: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Give a function a gradient, for autograd alone.

    The kind of autograd.Function that `torch.func` accepts, as in `with_gradient`, takes 6 us more
    per call.
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
