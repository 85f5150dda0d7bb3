"""Functions that launch kernels: what sees an op, and what is remembered of a launch."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Event, get_ident
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import wrap_triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile
from triton.runtime._async_compile import active_mode
from triton.runtime.jit import JITFunction

from moba_flex import moba_attention
from moba_flex.masks._torch import kernel_op as module
from moba_flex.masks._torch.exporting import is_exporting, is_traced
from moba_flex.masks._torch.kernel_op import kernel_op, launch

LOOKED_UP: list[tuple[tuple[int, ...], dict[str, Any]]] = []
LAUNCHED: list[tuple[Any, ...]] = []
LOADED_BY: list[int] = []


class Kernel:
    """Stands for a Triton kernel: notes down what is looked up, and what is launched.

    Attributes:
        compiled: By tile, what it is compiled to or, as Triton 3.7 has it, what compiles it.
        compile: Called with the tile to compile for.
    """

    arg_names = ("x", "out", "x_place", "out_place", "number", "TILE")
    compiled: dict[int, Any]
    compile: Callable[[int], Any]

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        LOOKED_UP.append((grid, options))
        tile, mode = options["TILE"], active_mode.get()
        if self.compiled.get(tile) is None:
            self.compiled[tile] = (
                self.finish(tile)
                if mode is None
                else mode.submit(
                    tile,
                    lambda: self.finish(tile),
                    lambda compiled: self.compiled.update({tile: compiled}),
                )
            )
        return self.compiled[tile]

    def finish(self, tile: int) -> Any:
        self.compile(tile)
        return Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(x: Tensor, out: Tensor, *args: Any, **options: Any) -> None:
            torch.add(x, args[-1], out=out)  # as an op that fakes have too

        return run


class Compiled:
    """Stands for a compiled kernel, which takes compile-time arguments in place."""

    function = packed_metadata = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        LOADED_BY.append(get_ident())
        return lambda *args: self.run(*grid, *6 * [None], *args)

    def run(self, *args: Any) -> None:
        x, out, x_place, out_place, number, tile = args[9:]
        LAUNCHED.append((*args[:3], number, tile))
        numbers_at(out, *out_place)[:] = numbers_at(x, *x_place) + number


def numbers_at(x: Tensor | int, size: int, stride: int, item: int) -> Any:
    """Return the numbers of a tensor, or at an address, seen by no op."""
    address = x if isinstance(x, int) else x.data_ptr()
    memory: Any = (ctypes.c_char * (((size - 1) * stride + 1) * item)).from_address(address)
    numbers: Any = np.frombuffer(memory, dtype=f"f{item}")
    return numbers[::stride]


KERNEL = Kernel()


class NoGPU:
    """A driver of Triton for a GPU that there is not: kernels are compiled, and none is run."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 3, 4, 1024),  # a module, a function, numbers
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            LAUNCHED.append(args[:3])
            description, enter = args[6:8]
            if enter is not None:
                enter(description)

        return launch


def fill(out_ptr, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, NUMBER)


FILL = JITFunction(fill)  # compiled for real: `triton.jit` might make one to interpret


@kernel_op("moba_flex_test::filled")
def filled(x: Tensor, number: int) -> Tensor:
    out = torch.empty_like(x)
    launch(wrap_triton(FILL), (1,), out, NUMBER=number)
    return out


@kernel_op("moba_flex_test::add_twice")
def add_twice(x: Tensor, number: int) -> Tensor:
    between, out = torch.empty_like(x), torch.empty_like(x)
    add(x, between, number, (1, 1, 1), number + 1)
    add(between, out, number, (2, 1, 1), number + 2)
    return out


def add(x: Tensor, out: Tensor, number: int, grid: tuple[int, ...], tile: int) -> None:
    places = [(*y.shape, *y.stride(), y.element_size()) for y in (x, out)]
    launch(KERNEL, grid, x, out, *places, number, TILE=tile, num_warps=4)


@kernel_op("moba_flex_test::add_four_times")
def add_four_times(x: Tensor, number: int) -> Tensor:
    return add_twice(add_twice(x, number), number + 2)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


def times(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.factor, None


@kernel_op("moba_flex_test::times", setup_context=save, backward=times)
def multiplied(x: Tensor, factor: int) -> Tensor:
    return x * factor


@kernel_op(
    "moba_flex_test::squared",
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
)
def squared(x: Tensor) -> Tensor:
    return x * x


class Watch(TorchDispatchMode):
    """Sees the names of ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU())
    LOOKED_UP.clear()
    LAUNCHED.clear()
    LOADED_BY.clear()
    module._known.clear()
    KERNEL.compiled = dict.fromkeys(range(10), Compiled())


def test_the_second_call_looks_nothing_up() -> None:
    for number in range(3):
        x = torch.randn(5)
        torch.testing.assert_close(add_twice(x, 3), x + 6)
        assert len(LOOKED_UP) == 2
        assert LAUNCHED[2 * number :] == [(1, 1, 1, 3, 4), (2, 1, 1, 3, 5)]


def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return y + 2 with zeros from 4 on, x + 8 and ones, by way of memory of its own."""
    total, more, ones = torch.zeros_like(x), torch.zeros(4, *x.shape), torch.empty_like(x)
    add(x, more[1], 1, (1, 1, 1), 1)
    add(y, more[0], 2, (1, 1, 1), 1)
    add(more[0][:4], total[:4], 0, (1, 1, 1), 1)
    add(more[1], more[2], 3, (1, 1, 1), 1)
    add(more[3], more[3], 1, (1, 1, 1), 1)
    add(more[3], ones, 0, (1, 1, 1), 1)
    out = torch.empty_like(x)
    add(more[2], out, 4, (1, 1, 1), 1)
    return total, None, out, ones


@pytest.mark.parametrize("apart", [False, True])
def test_a_replay_runs_no_python_of_the_function(apart: bool) -> None:
    """Arguments may lie in one tensor in the first call, and in two later, or the reverse."""
    runs = []

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        runs.append(x)
        return both(x, y)

    call = module._remember_launches(function)
    for turn in range(4):
        together = torch.randn(2, 8)
        x, y = together if (turn == 0) != apart else (x.clone() for x in together)
        total, none, out, ones = call(x, y)
        assert none is None
        torch.testing.assert_close(total, torch.cat([y[:4] + 2, torch.zeros(4)]))
        torch.testing.assert_close(ones, torch.ones(8))
        torch.testing.assert_close(out, x + 8)
        kept = [z.clone() for z in (total, out)]
        call(torch.randn(8), torch.randn(8))  # writes to other memory
        torch.testing.assert_close([total, out], kept)
    assert len(runs) == 1


def test_a_replay_may_return_nothing() -> None:
    """As of a function that writes to its arguments."""
    runs = []

    def function(x: Tensor, out: Tensor) -> None:
        runs.append(x)
        add(x, out, 2, (1, 1, 1), 1)

    call = module._remember_launches(function)
    for _ in range(3):
        x, out = torch.randn(8), torch.empty(8)
        assert call(x, out) is None
        torch.testing.assert_close(out, x + 2)
    assert len(runs) == 1


def view_of_an_argument(x: Tensor, y: Tensor) -> Tensor:
    add(x, x, 1, (1, 1, 1), 1)
    return x[1:]


def sum_of_torch(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(x + y, out, 1, (1, 1, 1), 1)
    return out


def views_of_arguments(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(y[:], out, 1, (1, 1, 1), 1)
    return out


def front_of_memory(x: Tensor, y: Tensor) -> Tensor:
    memory = x.new_empty(16)
    add(memory, memory, 0, (1, 1, 1), 1)  # of more than what is returned
    add(y, memory[:8], 1, (1, 1, 1), 1)
    return memory[:8]


def tensor_from_elsewhere(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(torch.tensor([1.0] * 8), out, 1, (1, 1, 1), 1)
    return out


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (view_of_an_argument, lambda x, y: x[1:] + 1),
        (sum_of_torch, lambda x, y: x + y + 1),
        (views_of_arguments, lambda x, y: y + 1),
        (front_of_memory, lambda x, y: y + 1),
        (tensor_from_elsewhere, lambda x, y: 2 + 0 * x),
    ],
)
def test_what_addresses_do_not_tell_is_run_again(
    function: Callable[..., Tensor], want: Callable[..., Tensor]
) -> None:
    call = module._remember_launches(function)
    for turn in range(4):
        together = torch.randn(2, 8)
        x, y = together if turn == 0 else (x.clone() for x in together)
        expected = want(x.clone(), y.clone())
        torch.testing.assert_close(call(x, y), expected)
    assert len(LOOKED_UP) == (2 if function is front_of_memory else 1)


def test_one_tensor_may_stand_for_two_arguments() -> None:
    call = module._remember_launches(both)
    for turn in range(3):
        x, y = torch.randn(8), torch.randn(8)
        y = x if turn == 0 else y
        total, _, out, _ = call(x, y)
        torch.testing.assert_close(total[:4], y[:4] + 2)
        torch.testing.assert_close(out, x + 8)


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.randn(6),
        lambda: torch.randn(10)[::2],
        lambda: torch.randn(5, dtype=torch.float64),
        lambda: torch.randn(6)[1:],  # of another alignment
    ],
)
def test_another_layout_is_looked_up(other: Callable[[], Tensor]) -> None:
    add_twice(torch.randn(5), 3)
    x = other()
    torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert len(LOOKED_UP) == 4
    torch.testing.assert_close(add_twice(x, 2), x + 4)
    assert len(LOOKED_UP) == 6


def test_what_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Compiled, "run", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            add_twice(torch.randn(5), 3)
    x = torch.randn(5)
    torch.testing.assert_close(add_twice(x, 3), x + 6)


@pytest.mark.parametrize("compiled", [set(), {4}, {5}])
def test_kernels_are_compiled_and_loaded_side_by_side(compiled: set[int]) -> None:
    missing = 2 - len(compiled)
    together = Barrier(missing)
    KERNEL.compiled = dict.fromkeys(compiled, Compiled())
    KERNEL.compile = lambda _: together.wait(timeout=30)
    x = torch.randn(5)
    torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert set(KERNEL.compiled) == {4, 5}
    assert sum(thread != get_ident() for thread in LOADED_BY) == missing
    assert LAUNCHED[-2:] == [(1, 1, 1, 3, 4), (2, 1, 1, 3, 5)]
    LOOKED_UP.clear()
    torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert not LOOKED_UP


def test_functions_within_a_function_are_part_of_it() -> None:
    together = Barrier(4)
    KERNEL.compiled = {}
    KERNEL.compile = lambda _: together.wait(timeout=30)
    x = torch.randn(5)
    for _ in range(2):
        torch.testing.assert_close(add_four_times(x, 3), x + 16)
    assert LAUNCHED == 2 * [(1, 1, 1, 3, 4), (2, 1, 1, 3, 5), (1, 1, 1, 5, 6), (2, 1, 1, 5, 7)]
    assert len(module._known) == 1


def test_what_cannot_be_compiled_raises_its_error() -> None:
    def fail(tile: int) -> None:
        raise RuntimeError(f"no tile of {tile}")

    KERNEL.compiled, KERNEL.compile = {4: Compiled()}, fail
    x = torch.randn(5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no tile of 5"):
            add_twice(x, 3)
    KERNEL.compile = lambda _: None
    torch.testing.assert_close(add_twice(x, 3), x + 6)


def test_profilers_see_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    filled(torch.randn(5), 1)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [seen.append])
    for _ in range(2):
        filled(torch.randn(5), 1)
    assert [launch.get()["name"] for launch in seen] == 2 * ["fill"]
    assert LAUNCHED == 3 * [(1, 1, 1)]


def test_triton_forgets_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    x = torch.randn(5)
    filled(x, 1)
    assert LAUNCHED == [(1, 1, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(FILL, "compile", fail)
        with pytest.raises(OSError, match="No space left"):
            filled(x, 2)
    filled(x, 2)
    assert LAUNCHED == 2 * [(1, 1, 1)]


def test_an_interrupt_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(futures: Any) -> None:
        raise KeyboardInterrupt

    KERNEL.compiled, KERNEL.compile = {}, lambda _: None
    x = torch.randn(5)
    with monkeypatch.context() as patch:
        patch.setattr(_async_compile, "as_completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_twice(x, 3)
    assert active_mode.get() is None
    torch.testing.assert_close(add_twice(x, 3), x + 6)
    torch.testing.assert_close(add_twice(x, 4), x + 8)


def test_a_callers_own_threads_compile() -> None:
    KERNEL.compiled, KERNEL.compile = {}, lambda _: None
    x = torch.randn(5)
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
        torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert set(KERNEL.compiled) == {4, 5}


def test_threads_make_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, of layouts of their own and of one that they share; few are remembered."""
    monkeypatch.setattr(module, "_MOST_LAYOUTS", 3)
    KERNEL.compiled, KERNEL.compile = {}, lambda _: None
    together = Barrier(6)

    def call(thread: int) -> None:
        together.wait(timeout=30)
        for number in range(40):
            x = torch.randn(5 if number % 2 else 5 + thread)
            torch.testing.assert_close(add_four_times(x, number), x + 4 * number + 4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(call, range(6)))
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def elsewhere(function: Callable[[Callable[[], None]], Any]) -> Iterator[None]:
    """Call a function in another thread, which waits where it calls its argument."""
    there, done = Event(), Event()

    def pause() -> None:
        there.set()
        assert done.wait(timeout=60)

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(function, pause)
        try:
            assert there.wait(timeout=60)
            yield
        finally:
            done.set()
        result.result()


def test_a_plain_call_is_seen_by_its_thread_alone() -> None:
    def call(pause: Callable[[], None]) -> None:
        KERNEL.compile = lambda tile: pause() if tile == 24 else None
        x = torch.randn(5)
        torch.testing.assert_close(add_twice(x, 23), x + 46)

    KERNEL.compiled = {}
    with elsewhere(call):
        assert is_wrap_triton_enabled()
        assert active_mode.get() is None
        assert module._running.call is None
        x = torch.randn(5)
        torch.testing.assert_close(add_twice(x, 3), x + 6)


def compile_graph(pause: Callable[[], None]) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        pause()
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))


def export_graph(pause: Callable[[], None]) -> None:
    class Pausing(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert is_exporting()
            pause()
            return x + 1

    torch.export.export(Pausing(), (torch.ones(3),), strict=False)


@pytest.mark.parametrize("make_graph", [compile_graph, export_graph])
def test_a_graph_that_another_thread_makes_changes_nothing(make_graph: Any) -> None:
    x = torch.randn(1, 1, 12, 8)
    wrong = torch.tensor([0, 9, 3, 12], dtype=torch.int32)
    with elsewhere(make_graph):
        assert not is_traced()
        assert not is_exporting()
        assert not module._is_watched((x,))
        grad = torch.func.grad(lambda x: squared(x).sum())(x)
        torch.testing.assert_close(grad, 2 * x)
        with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
            moba_attention(x, x, x, block_size=4, top_k=2, cu_seqlens=wrong)


def test_modes_see_an_op() -> None:
    with Watch() as watch:
        add_twice(torch.randn(5), 3)
        multiplied(torch.randn(5), 3)
    assert "moba_flex_test.add_twice.default" in watch.seen
    assert "moba_flex_test.times.default" in watch.seen


def test_fake_tensors_are_not_remembered() -> None:
    with FakeTensorMode():
        out = multiplied(torch.empty(5, 7), 3)
        add_twice(torch.empty(5), 3)
    assert out.shape == (5, 7)
    assert not module._known


def test_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(multiplied(x, 3).sum(), x)
    torch.testing.assert_close(grad, torch.full((5,), 3.0))


def test_gradient_by_torch_func() -> None:
    x = torch.randn(5)
    grad = torch.func.grad(lambda x: multiplied(x, 3).sum())(x)
    torch.testing.assert_close(grad, torch.full((5,), 3.0))


def test_second_derivatives_are_refused() -> None:
    """Of a sum the weights are constants, which autograd would take for all there is."""
    x = torch.randn(5, requires_grad=True)
    for loss in (squared(x).sum(), squared(x).square().sum()):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="must be differentiated once"):
            grad.sum().backward()
