"""Functions that launch kernels: what sees an op, and what is remembered of a launch."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime._async_compile import active_mode

from moba_flex.masks import kernel_op as module
from moba_flex.masks.kernel_op import kernel_op, launch

LOOKED_UP: list[tuple[tuple[int, ...], dict[str, Any]]] = []
LAUNCHED: list[tuple[Any, ...]] = []
LOADED_BY: list[int] = []


class Kernel:
    """Stands for a Triton kernel: notes down what is looked up, and what is launched.

    Attributes:
        compiled: Tiles that it is compiled for.
        compile: Called with the tile to compile for.
    """

    arg_names = ("x", "out", "number", "TILE")
    compiled: set[int]
    compile: Callable[[int], Any]

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        LOOKED_UP.append((grid, options))
        tile = options["TILE"]
        mode = active_mode.get()
        if tile not in self.compiled and mode is not None:
            return mode.submit(tile, lambda: self.finish(tile), lambda _: self.compiled.add(tile))
        return Compiled() if tile in self.compiled else self.finish(tile)

    def finish(self, tile: int) -> Any:
        self.compile(tile)
        return Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            Compiled()[grid](*args, options["TILE"])

        return run


class Compiled:
    """Stands for a compiled kernel, which takes compile-time arguments in place."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        LOADED_BY.append(get_ident())

        def run(x: Tensor, out: Tensor, number: int, tile: int) -> None:
            LAUNCHED.append((*grid, number, tile))
            torch.add(x, number, out=out)

        return run


KERNEL = Kernel()


@kernel_op("moba_flex_test::add_twice")
def add_twice(x: Tensor, number: int) -> Tensor:
    out = torch.empty_like(x)
    launch(KERNEL, (1, 1, 1), x, out, number, TILE=number + 1, num_warps=4)
    launch(KERNEL, (2, 1, 1), out, out, number, TILE=number + 2, num_warps=4)
    return out


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
def fresh() -> None:
    LOOKED_UP.clear()
    LAUNCHED.clear()
    LOADED_BY.clear()
    module._known.clear()
    KERNEL.compiled = set(range(10))


def test_the_second_call_looks_nothing_up() -> None:
    for number in range(3):
        x = torch.randn(5)
        torch.testing.assert_close(add_twice(x, 3), x + 6)
        assert len(LOOKED_UP) == 2
        assert LAUNCHED[2 * number :] == [(1, 1, 1, 3, 4), (2, 1, 1, 3, 5)]


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
        patch.setattr(Compiled, "__getitem__", lambda *_: fail)
        with pytest.raises(RuntimeError, match="no memory"):
            add_twice(torch.randn(5), 3)
    x = torch.randn(5)
    torch.testing.assert_close(add_twice(x, 3), x + 6)


@pytest.mark.parametrize("compiled", [set(), {4}, {5}])
def test_kernels_are_compiled_and_loaded_side_by_side(compiled: set[int]) -> None:
    missing = 2 - len(compiled)
    together = Barrier(missing)
    KERNEL.compiled = compiled
    KERNEL.compile = lambda _: together.wait(timeout=30)
    x = torch.randn(5)
    torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert KERNEL.compiled == {4, 5}
    assert sum(thread != get_ident() for thread in LOADED_BY) == missing
    assert LAUNCHED[-2:] == [(1, 1, 1, 3, 4), (2, 1, 1, 3, 5)]
    LOOKED_UP.clear()
    torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert not LOOKED_UP


def test_functions_within_a_function_are_part_of_it() -> None:
    together = Barrier(4)
    KERNEL.compiled = set()
    KERNEL.compile = lambda _: together.wait(timeout=30)
    x = torch.randn(5)
    for _ in range(2):
        torch.testing.assert_close(add_four_times(x, 3), x + 16)
    assert LAUNCHED == 2 * [(1, 1, 1, 3, 4), (2, 1, 1, 3, 5), (1, 1, 1, 5, 6), (2, 1, 1, 5, 7)]
    assert len(module._known) == 1


def test_what_cannot_be_compiled_raises_its_error() -> None:
    def fail(tile: int) -> None:
        raise RuntimeError(f"no tile of {tile}")

    KERNEL.compiled, KERNEL.compile = {4}, fail
    x = torch.randn(5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no tile of 5"):
            add_twice(x, 3)
    KERNEL.compile = lambda _: None
    torch.testing.assert_close(add_twice(x, 3), x + 6)


def test_a_callers_own_threads_compile() -> None:
    KERNEL.compiled, KERNEL.compile = set(), lambda _: None
    x = torch.randn(5)
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
        torch.testing.assert_close(add_twice(x, 3), x + 6)
    assert KERNEL.compiled == {4, 5}


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
