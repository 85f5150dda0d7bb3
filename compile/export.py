"""Packages: a module with MoBA as one `.pt2` file, which PyTorch runs without moba_flex or Python.

`torch.export` traces the module, AOTInductor compiles it. On CUDA the package holds the Triton
kernels of the plan "fused". The custom ops of the plan "routed" on CPU are Python, so that a
package holds what `moba_flex.masks.router.gate_portable` and `attend_portable` of
`moba_flex.compile.cpu` do in their place, with the same result.
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
from moba_flex.compile.package import Metadata, Package, Spec, length_dim, load
from moba_flex.masks.exporting import recorded

__all__ = ["Package", "check_path", "export", "load", "worst_error"]

MOST_TOKENS = 2**20
_MOST_ROWS = 2**10

# What is changed in PyTorch and in Python's warnings for an export concerns the whole process.
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

    The package takes what `example` is like, runs forward alone, and needs neither Python nor
    moba_flex: `moba_flex.compile.load(path)` or `torch._inductor.aoti_load_package(path)` load it
    in Python, `torch::inductor::AOTIModelPackageLoader` in C++ (`compile/cpp/`). It takes
    contiguous tensors: `load` makes them so, the others trust that they are.

    A dynamic length is dimension 2 of inputs of 4 dimensions, `[B, H, length, D]`, and dimension 1
    of others, `[B, length, ...]`; a package then serves every length from 1 to 2**20. A dynamic
    batch is dimension 0 of inputs of 2 dimensions and more, from 1 to 2**10. Inputs whose sizes
    the module does not need to be equal keep sizes of their own, so that fewer queries than keys
    are served too. Inputs of one dimension keep their size.

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
    """
    target = check_path(path)
    inputs = _check_example(example, dynamic_length, dynamic_batch)
    _check_module(module)
    if device is not None:
        device = check_device(device)
        module, inputs = module.to(device), tuple(x.to(device) for x in inputs)
    place = _check_places(module, inputs)
    check_compiler()
    # A package reads its inputs as the example's lay, whatever it is given.
    inputs = tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in inputs)
    if dynamic_batch and any(x.dim() > 1 and x.shape[0] == 1 for x in inputs):
        # Of one row the trace takes for granted that there is one.
        inputs = tuple(_enlarged(x, 0, 1) for x in inputs)

    with _exporting:
        program, attention = _trace(module, inputs, dynamic_length, dynamic_batch)
        specs = _specs(program)
        block_size = max(int(call["block_size"]) for call in attention)
        if any(most <= block_size for spec in specs for _, _, most in spec.varying):
            # Of an example of one block the trace takes for granted that there is one.
            longer = tuple(_enlarged(x, length_dim(x), 2 * block_size) for x in inputs)
            program, attention = _trace(module, longer, dynamic_length, dynamic_batch)
            specs = _specs(program)
        if dynamic_batch:
            _check_batch(specs)
        _check_ops(program)
        metadata = Metadata.of(attention, specs, place)
        configs = {
            "aot_inductor.metadata": metadata.to_strings(),
            # Padded strides are read with the old ones in PyTorch 2.11 (pytorch/pytorch#194281).
            "comprehensive_padding": False,
            # Else what is rounded to 16 bits and then widened is not rounded at all: block keys
            # and queries of the gate are, and other blocks would be chosen.
            "emulate_precision_casts": True,
        }
        with whole_file(target) as fresh, warnings.catch_warnings(), writers_told_apart():
            warnings.simplefilter("ignore", FutureWarning)  # of what PyTorch itself does
            torch._inductor.aoti_compile_and_package(
                program, package_path=os.fspath(fresh), inductor_configs=configs
            )
    return target


@contextmanager
def writers_told_apart() -> Iterator[None]:
    """Let AOTInductor know for good the buffers that it writes C++ to.

    Before 2.13 it knows them by the id of a bound method that lives for one call. Of a model of
    many layers some get the id of another one, and what they declare is missing elsewhere.
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
        ValueError: It cannot.
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
    """Raise unless there is a C++ compiler, which packages for CPU and for CUDA are made with.

    Raises:
        ValueError: There is none.
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
    """Return which dimensions of an input vary, and up to what."""
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
    # Else PyTorch takes a size of 1 for another kind of size, and lengths for 2 or more.
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
    """Let PyTorch forget the loops that it compiled for exports before this one.

    torch.export has torch.compile trace a `while_loop`, which asks why those of before do not
    serve: a size that is to vary is asked whether it is the size of then, and becomes it.
    """
    for code in while_loop.__code__.co_consts:
        if isinstance(code, CodeType):
            torch._dynamo.eval_frame.remove_from_cache(code)


def _enlarged(x: Tensor, dim: int, more: int) -> Tensor:
    """Return an input that is larger, if its size may vary; its values play no part."""
    if x.dim() <= 1:
        return x
    shape = list(x.shape)
    shape[dim] += more
    return x.new_zeros(shape)


def _check_batch(specs: list[Spec]) -> None:
    """Raise if the graph takes some batch sizes alone."""
    for spec in specs:
        size = spec.shape[0]
        if len(spec.shape) > 1 and (isinstance(size, int) or size[1:] != (1, _MOST_ROWS)):
            only = size if isinstance(size, int) else f"{size[1]} to {size[2]}"
            raise ValueError(
                f"module must take any batch, got one whose {spec.name} takes {only}: "
                "pass dynamic_batch=False"
            )


def _check_ops(program: ExportedProgram) -> None:
    """Raise if running the graph would take Python."""
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
    """Read what the graph takes: for sizes that vary, the symbol, and its least and most."""
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
