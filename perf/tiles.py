"""Compile a kernel of the fused plan with other tiles, tell what it needs, and time it.

    python -m perf.tiles pair_forward 128,32,4,3 128,64,8,2 128,64,8,2,128 [--shape 64K/512/3]

Tiles are queries or pairs, keys, warps and stages, and, if there is a limit, the registers of a
thread. The machine code for a Hopper GPU, there or not, tells the needs of a kernel. Instructions
are those of one step of each loop with matrix products: without the longest stretch that the step
may skip, and with it. Times are medians of whole passes in ms, on a CUDA device.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.testing import do_bench

from moba_flex.compile import decode_kernels, fused, fused_kernels
from moba_flex.masks import router_kernel
from moba_flex.masks._torch import kernel_op
from moba_flex.masks._torch.kernel_op import power_of_2
from moba_flex.masks.layout import Layout
from perf.peers import moba_flex
from perf.shapes import ROWS, Shape, draw

INTS = (
    *("rank", "row", "first", "tile_block", "spill_block", "stats", "queries", "extents"),
    *("owners", "block_ptr", "blocks_ptr", "count", "total", "next", "head_top_k"),
    *("query_ptr", "start_ptr", "stop_ptr", "affinity", "table_ptr", "counter", "done_ptr"),
)
FLOATS = ("lse", "spill_ptr", "sums_ptr")
GATES = (router_kernel.gate_kernel, router_kernel.sift_kernel)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Choice(NamedTuple):
    """Tiles and launch options of a kernel."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """Read numbers between commas."""
        numbers = [int(number) for number in text.split(",")]
        if not 4 <= len(numbers) <= 5:
            raise argparse.ArgumentTypeError(f"tiles must be 4 or 5 numbers, got {text}")
        return cls(*numbers)


class Cost(NamedTuple):
    """The needs of one program of a compiled kernel; `steps` as the function returns them."""

    registers: int
    spilled: int
    shared: int
    steps: list[tuple[int, int]]


def compile_kernel(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    registers: int | None = None,
) -> Any:
    """Compile a kernel for a Hopper GPU, there or not, as for aligned inputs."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("scale", "cap"):
            return "fp32"
        if not name.endswith("_ptr"):
            return "i32"
        if name.startswith(INTS) or (name == "out_ptr" and kernel in GATES):
            return "*i32"
        decodes = kernel is decode_kernels.decode_kernel
        if any(word in name for word in FLOATS) or (decodes and name == "part_ptr"):
            return "*fp32"
        return f"*{DTYPES[dtype]}"

    aligned = [name for name in names if name.endswith("_ptr") or name.startswith("stride")]
    source = ASTSource(
        kernel,
        {name: type_of(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in aligned
            if name not in constants
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    if registers is not None:
        options["maxnreg"] = registers
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def cost(name: str, choice: Choice, shape: Shape) -> Cost:
    """Compile a kernel of the fused plan for a shape, and read what it needs."""
    with using(name, choice):
        sizes = shape.batch, shape.seq_len, shape.head_dim
        q, k = (
            torch.empty(sizes[0], heads, *sizes[1:], dtype=shape.dtype, device="meta")
            for heads in (shape.num_heads, shape.num_kv_heads)
        )
        layout = Layout(shape.seq_len, shape.seq_len, shape.block_size, causal=True)
        problem = fused._Problem.of(q, k, k, shape.top_k - 1, layout, 1.0, 0.0)
        options = problem.options(name)
        if name == "dkv":
            options["WRITE_DQ"] = problem.tiles_per_block == 1
    kernel = getattr(fused_kernels, f"{name}_kernel")
    made = compile_kernel(
        kernel, shape.dtype, options, choice.warps, choice.stages, choice.registers
    )
    return Cost(*resources(made.asm["cubin"]), made.metadata.shared, steps(made.asm["sass"]))


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread, and the bytes that it spills."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def steps(sass: str) -> list[tuple[int, int]]:
    """Return how many instructions one step of each loop with matrix products takes.

    The first number leaves out the longest stretch that a branch in the loop may skip.
    """
    lines = [line.split("\t")[-1].strip(" ;") for line in sass.splitlines()[1:] if line.strip()]
    label = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    jumps = [(at, label.get(line.split()[-1], at)) for at, line in enumerate(lines)]
    found = []
    for last, first in jumps:
        body = lines[first : last + 1]
        if first < last and any("MMA" in line for line in body):
            ahead = [to - at for at, to in jumps[first:last] if at < to <= last]
            whole = sum(not line.endswith(":") for line in body)
            found.append((whole - max(ahead, default=1) + 1, whole))
    return found


@contextmanager
def using(name: str, choice: Choice) -> Iterator[None]:
    """Let a kernel have other tiles."""
    tiles_of, options_of = fused._tiles, fused._options.__wrapped__

    def tiles(kernel: str, kind: Any) -> Any:
        if kernel != name:
            return tiles_of(kernel, kind)
        return fused._Tiles(*choice[:4])._replace(n=min(choice.n, power_of_2(kind.block_size)))

    def options(kernel: str, kind: Any) -> dict[str, Any]:
        limit = {"maxnreg": choice.registers} if kernel == name and choice.registers else {}
        return options_of(kernel, kind) | limit

    with ExitStack() as stack:
        stack.callback(kernel_op._known.clear)
        stack.enter_context(patch.object(fused, "_tiles", tiles))
        stack.enter_context(patch.object(fused, "_options", options))
        kernel_op._known.clear()
        yield


def times(shape: Shape, device: torch.device) -> tuple[float, float]:
    """Return the medians of the forward and of the backward pass, in ms."""
    q, k, v = (x.requires_grad_() for x in draw(shape, device))
    grad = torch.randn_like(q)

    attend = moba_flex(shape, device)
    out = attend(q, k, v)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    forward_ms = do_bench(lambda: attend(q, k, v), return_mode="median")
    return forward_ms, do_bench(backward, return_mode="median")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each choice of tiles."""
    rows = ROWS["cuda"].items()  # `cost` compiles for plain rows, without documents or a soft cap
    shapes = {shape.name: shape for name, of in rows if name != "layouts" for shape in of}
    parser = argparse.ArgumentParser(description="Compile and time a kernel with other tiles.")
    parser.add_argument("kernel", choices=sorted(fused._TILES))
    parser.add_argument("tiles", nargs="+", type=Choice.parse, metavar="M,N,WARPS,STAGES[,REGS]")
    parser.add_argument("--shape", choices=shapes, default="64K/512/3", metavar="SHAPE")
    args = parser.parse_args(arguments)
    shape, timed = shapes[args.shape], torch.cuda.is_available()
    for choice in args.tiles:
        made = cost(args.kernel, choice, shape)
        counts = ", ".join(
            f"{least} to {most}" if least < most else f"{most}" for least, most in made.steps
        )
        print(
            f"{tuple(choice)}: {made.registers} registers, {made.spilled} bytes spilled, "
            f"{made.shared} bytes shared, instructions {counts}"
        )
        if timed:
            with using(args.kernel, choice):
                forward, backward = times(shape, torch.device("cuda"))
            print(f"    forward {forward:.3f} ms, backward {backward:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
