"""Packages: a module with MoBA as one `.pt2` file, which PyTorch runs without moba_flex or Python.

`torch.export` traces the module, AOTInductor compiles it. On CUDA the package holds the Triton
kernels of the plan "fused". On CPU the custom ops of the plan "routed" would need Python: the
package holds the ops of `choose_portable` (`masks/router.py`) and `attend_portable`
(`compile/cpu.py`) instead, which give the same result.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._library.triton import triton_ops_to_kernels
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config

from moba_flex.compile.outside import check_device, check_output, reason, whole_file
from moba_flex.compile.package import MOST_TOKENS, Metadata, Package, Spec, length_dim, load
from moba_flex.masks._torch.exporting import recorded

__all__ = ["Package", "check_path", "export", "load", "worst_error"]

_MOST_ROWS = 2**10

# An export changes settings of PyTorch and of Python's warnings, which the whole process shares.
_exporting = threading.Lock()


def export(
    module: nn.Module,
    example: Tensor | Iterable[Tensor],
    *,
    path: str | os.PathLike[str],
    dynamic_length: bool = True,
    dynamic_batch: bool = False,
    device: str | torch.device | None = None,
) -> Path:
    """Compile a module that calls `moba_attention` into a package.

    The package takes inputs like `example`, runs the forward only, and needs neither Python nor
    moba_flex. Load it by `moba_flex.compile.load(path)` or
    `torch._inductor.aoti_load_package(path)` in Python, or by
    `torch::inductor::AOTIModelPackageLoader` in C++ (`compile/cpp/`). It requires contiguous
    tensors: `load` makes inputs contiguous, the other two do not check.

    A dynamic length is dimension 2 of inputs of 4 dimensions, `[B, H, length, D]`, and dimension 1
    of others, `[B, length, ...]`; a package then serves every length from 1 to 2**20. A dynamic
    batch is dimension 0 of inputs of 2 dimensions and more, from 1 to 2**10. Sizes vary
    independently unless the module needs them to be equal, so that a package may take fewer
    queries than keys. Inputs of one dimension keep their size.

    Only one export runs at a time; others wait.

    Args:
        module: The module, in eval mode.
        example: Its inputs, or the only one.
        path: Where to write the package; ends in `.pt2`.
        dynamic_length: Whether the package takes other lengths than those of `example`.
        dynamic_batch: Whether it takes other batch sizes than those of `example`.
        device: "cpu" or "cuda", which module and inputs are moved to; if None, they stay.

    Returns:
        `path`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The module cannot be exported; the message says what to do.

    Example:
        >>> attention = MoBAAttention(block_size=32, top_k=2).eval()
        >>> q = k = v = torch.randn(1, 2, 128, 16)
        >>> path = export(attention, (q, k, v), path="attention.pt2", dynamic_length=False)
        >>> torch.allclose(load(path)(q, k, v), attention(q, k, v), atol=1e-5)
        True
    """
    target = check_path(path)
    inputs = _check_example(example, dynamic_length, dynamic_batch)
    _check_module(module)
    if device is not None:
        device = check_device(device)
        module, inputs = module.to(device), tuple(x.to(device) for x in inputs)
    place = _check_places(module, inputs)
    check_compiler()
    # A package reads its inputs with the strides of the example.
    inputs = tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in inputs)
    if dynamic_batch and any(x.dim() > 1 and x.shape[0] == 1 for x in inputs):
        # The trace specializes a batch of one row.
        inputs = tuple(_enlarged(x, 0, 1) for x in inputs)

    with _exporting:
        program, attention = _trace(module, inputs, dynamic_length, dynamic_batch)
        specs = _specs(program)
        block_size = max(int(call["block_size"]) for call in attention)
        if any(most <= block_size for spec in specs for _, _, most in spec.varying):
            # The trace specializes an example of one block.
            longer = tuple(_enlarged(x, length_dim(x), 2 * block_size) for x in inputs)
            program, attention = _trace(module, longer, dynamic_length, dynamic_batch)
            specs = _specs(program)
        if dynamic_batch:
            _check_batch(specs)
        _check_ops(program)
        metadata = Metadata.of(attention, specs, place)
        configs = {
            "aot_inductor.metadata": metadata.to_strings(),
            # PyTorch 2.11 pads strides, then reads some tensors with the unpadded ones
            # (pytorch/pytorch#194281).
            "comprehensive_padding": False,
            # Otherwise inductor omits a rounding to 16 bits whose result is widened again, as that
            # of the gate's block keys and queries: the gate would choose other blocks.
            "emulate_precision_casts": True,
        }
        with whole_file(target) as fresh, warnings.catch_warnings(), writers_told_apart():
            warnings.simplefilter("ignore", FutureWarning)  # from PyTorch's own code
            torch._inductor.aoti_compile_and_package(
                program, package_path=os.fspath(fresh), inductor_configs=configs
            )
    return target


@contextmanager
def writers_told_apart() -> Iterator[None]:
    """Give each buffer that AOTInductor writes C++ to an identity that lasts.

    Before PyTorch 2.13 the C++ of a model of many layers may lack declarations of arrays.
    `CppWrapperCpu.codegen_int_array_var` tells buffers apart by the `id` of a bound method that
    lives for one call only: once an id recurs, an array counts as declared in the wrong buffer. So
    the bound methods are kept alive here.
    """
    if torch.__version__ >= "2.13":
        yield
        return
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    declare = CppWrapperCpu.codegen_int_array_var
    writers: dict[tuple[int, str], Callable[..., None]] = {}

    def declare_once(
        self: CppWrapperCpu, text: str, write: Callable[..., None], *args: Any, **options: Any
    ) -> str:
        owner = getattr(write, "__self__", write)
        write = writers.setdefault((id(owner), write.__name__), write)
        return declare(self, text, write, *args, **options)

    with patch.object(CppWrapperCpu, "codegen_int_array_var", declare_once):
        yield


def worst_error(
    module: Callable[..., Any], package: Callable[..., Any], inputs: Sequence[Tensor]
) -> float:
    """Run both and return the largest difference of an output, relative to its largest value.

    Raises:
        ValueError: Outputs differ in number or shape, or are not finite in the same places.
    """
    with torch.no_grad():
        pairs = [_leaves(run(*inputs)) for run in (module, package)]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        raise ValueError("outputs of the package must have the shapes of the module's, got others")
    worst = 0.0
    for want, got in zip(*pairs, strict=True):
        if not torch.equal(want.isfinite(), got.isfinite()):
            raise ValueError("outputs of the package must be finite where the module's are")
        want, got = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (want, got))
        error = (want - got).abs().max() / want.abs().max().clamp(
            min=torch.finfo(torch.float64).tiny
        )
        worst = max(worst, error.item())
    return worst


def _leaves(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor)]


def check_path(path: str | os.PathLike[str]) -> Path:
    """Raise unless a package can be written to `path`.

    Raises:
        ValueError: A package cannot be written there.
    """
    target = Path(path)
    if target.suffix == ".onnx":
        raise ValueError(
            "path must end in .pt2, got .onnx: ONNX has no operator for attention over blocks "
            "that are chosen at run time, and what it has would compute all scores"
        )
    if target.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {str(path)!r}")
    check_output("path", target)
    return target


def check_compiler() -> None:
    """Raise unless there is a C++ compiler, which packages for CPU and for CUDA need.

    Raises:
        ValueError: There is no C++ compiler.
    """
    try:
        get_cpp_compiler()
    except Exception as error:
        raise ValueError(
            f"machine must have a C++ compiler to make packages, got none: {reason(error)}: "
            "install g++, or name another one in the environment variable CXX"
        ) from error


def _check_example(
    example: Tensor | Iterable[Tensor], dynamic_length: bool, dynamic_batch: bool
) -> tuple[Tensor, ...]:
    """Return the inputs as a tuple, checked."""
    if not isinstance(example, Iterable):  # as a Tensor is
        raise TypeError(
            f"example must be a Tensor or a sequence of tensors, got {type(example).__name__}"
        )
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs:
        raise ValueError("example must hold a tensor, got none")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"example must hold tensors, got {type(x).__name__}")
        if x.numel() == 0:
            raise ValueError(
                f"example must hold tensors that are not empty, got shape {tuple(x.shape)}"
            )
        for dim, most in _varying(x, dynamic_length, dynamic_batch).items():
            if x.shape[dim] > most:
                raise ValueError(
                    f"example must have at most {most} in dimension {dim}, got shape "
                    f"{tuple(x.shape)}: take a smaller one, the package serves {most} all the same"
                )
    return inputs


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if module.training:
        raise ValueError("module must be in eval mode, got training mode: call module.eval()")


def _check_places(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.device:
    """Return the device of all inputs and parameters."""
    place = inputs[0].device
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {place.type}")
    for x in (*inputs, *module.parameters()):
        if x.device != place:
            raise ValueError(
                f"module and example must be on one device, got {place} and {x.device}: "
                "pass device"
            )
    return place


def _varying(x: Tensor, dynamic_length: bool, dynamic_batch: bool) -> dict[int, int]:
    """Return the dimensions of an input that vary, and the largest size of each."""
    if x.dim() <= 1:
        return {}
    batch = {0: _MOST_ROWS} if dynamic_batch else {}
    return batch | ({length_dim(x): MOST_TOKENS} if dynamic_length else {})


def _trace(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic_length: bool, dynamic_batch: bool
) -> tuple[ExportedProgram, list[dict[str, Any]]]:
    """Return the graph, and the options of the calls of `moba_attention` in it."""
    shapes = tuple(
        {
            dim: Dim.DYNAMIC(min=1, max=most)
            for dim, most in _varying(x, dynamic_length, dynamic_batch).items()
        }
        or None
        for x in inputs
    )
    # Otherwise torch.export specializes sizes of 1, and assumes that dynamic ones are 2 or more.
    sizes = symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    _forget_loops()
    with torch.no_grad(), sizes, recorded() as calls:
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        except torch._dynamo.exc.UserError as error:
            asked = {"length": dynamic_length, "batch": dynamic_batch}
            names = [name for name, varies in asked.items() if varies]
            raise ValueError(
                f"module must take any {' and '.join(names)}, got: {str(error).splitlines()[0]}: "
                f"pass {' or '.join(f'dynamic_{name}=False' for name in names)}"
            ) from error
    if not calls:
        raise ValueError(
            "module must call moba_attention, got a module that does not: "
            "torch.export and AOTInductor take it as it is"
        )
    return program, [dict(call) | {"calls": number} for call, number in calls.items()]


def _forget_loops() -> None:
    """Clear the graphs of `while_loop` that earlier exports left.

    A dynamic size may become the constant that it was in an earlier export: torch.export has
    torch.compile trace a `while_loop`, which compares its sizes with those of the cached graphs,
    and the comparison makes them constants.
    """
    for code in while_loop.__code__.co_consts:
        if isinstance(code, CodeType):
            torch._dynamo.eval_frame.remove_from_cache(code)


def _enlarged(x: Tensor, dim: int, more: int) -> Tensor:
    """Return zeros of the shape of an input, but larger in one dimension, if it may vary."""
    if x.dim() <= 1:
        return x
    shape = list(x.shape)
    shape[dim] += more
    return x.new_zeros(shape)


def _check_batch(specs: list[Spec]) -> None:
    """Raise unless the graph takes every batch size."""
    for spec in specs:
        size = spec.shape[0]
        if len(spec.shape) > 1 and (isinstance(size, int) or size[1:] != (1, _MOST_ROWS)):
            only = size if isinstance(size, int) else f"{size[1]} to {size[2]}"
            raise ValueError(
                f"module must take any batch, got one whose {spec.name} takes {only}: "
                "pass dynamic_batch=False"
            )


def _check_ops(program: ExportedProgram) -> None:
    """Raise if the graph needs Python to run."""
    for node in program.graph.nodes:
        op = node.target
        if isinstance(op, torch._ops.OpOverload):
            name = op._schema.name
            if name in torch._library.custom_ops.OPDEFS and name not in triton_ops_to_kernels:
                raise ValueError(
                    f"module must use ops that run without Python, got {name}, a custom_op: "
                    "write it in PyTorch's ops where torch.compiler.is_exporting()"
                )


def _specs(program: ExportedProgram) -> list[Spec]:
    """Read the inputs of the graph; a size that varies is its symbol, its least and its most."""
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    names = set(program.graph_signature.user_inputs)
    specs = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        x = node.meta["val"]
        sizes: list[int | tuple[str, int, int]] = []
        for size in x.shape:
            if isinstance(size, int):
                sizes.append(size)
            elif str(size) not in ranges:
                raise ValueError(
                    "module must take inputs whose sizes are equal or free, got "
                    f"{node.name} of size {size}: pass dynamic_length=False"
                )
            else:
                bounds = ranges[str(size)]
                sizes.append((str(size), int(bounds.lower), int(bounds.upper)))
        specs.append(Spec(node.name, tuple(sizes), str(x.dtype).removeprefix("torch.")))
    return specs
