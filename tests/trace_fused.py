"""Trace the fused plan, forward and backward, with no GPU; a script of `test_compile.py`."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget

from moba_flex import moba_attention
from moba_flex.compile.decode_kernels import decode_step_triton

WRITTEN: dict[str, set[str]] = {}


class NoDriver:
    """Says what to compile for."""

    def get_current_target(self) -> GPUTarget:
        """Return a Hopper GPU."""
        return GPUTarget("cuda", 90, 32)


def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., list[Any]]:
    """Note what PyTorch believes that each kernel writes to; the graph computes nothing."""
    for node in graph.graph.nodes:
        if "tensors_to_clone" in node.kwargs:
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            written = WRITTEN.setdefault(kernel.fn.__name__, set())
            written.update(node.kwargs["tensors_to_clone"])
    (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args

    def hint(size: int | torch.SymInt) -> int:
        """Read a size without making it part of the graph."""
        return size if isinstance(size, int) else int(size.node.hint)

    def nothing(output: Any) -> Callable[[], Any]:
        value = output.meta["val"] if output is not None else None
        if isinstance(value, Tensor):
            sizes = [hint(size) for size in value.shape]
            return partial(torch.zeros, sizes, dtype=value.dtype)
        number = hint(value) if isinstance(value, torch.SymInt) else value
        return lambda: number

    results = [nothing(output) for output in outputs]

    def run(args: list[Any]) -> list[Any]:
        args.clear()
        return [make() for make in results]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def attend(q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int) -> Tensor:
    return moba_attention(q, k, v, block_size=block_size, top_k=top_k, plan="fused")


def count_graphs(block_size: int, top_k: int, dynamic: bool | None) -> int:
    """Trace calls of many lengths and return how many graphs they make.

    Of a dynamic one all sizes are symbols, what kernels are compiled for too.
    """
    torch._dynamo.reset()
    counters.clear()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (1024, 700, 1999, 2048, 1100, 5000):
        q, k, v = (torch.zeros(1, heads, length, 64, requires_grad=True) for heads in (4, 1, 1))
        compiled(q, k, v, block_size, top_k)
    return int(counters["stats"]["unique_graphs"])


def trace_a_step() -> None:
    """Trace a step of decode, appended to its cache in one kernel."""
    shapes = (8, 1, 64), (2, 1, 64), (2, 1, 64), (2, 512, 64), (2, 512, 64), (2, 8, 65), (2, 8, 64)
    tensors = [torch.zeros(1, *shape) for shape in shapes]
    numbers = [torch.zeros(shape, dtype=torch.int32) for shape in (1, 1, (1, 200))]

    def step(*given: Tensor) -> tuple[Tensor, Tensor]:
        op: Any = decode_step_triton
        result: tuple[Tensor, Tensor] = op(*given, None, None, (3, 64, 0, 0), None, 1.0, 0.0)
        return result

    torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=record))(
        *tensors, *numbers
    )


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    # The plan is for CUDA; here the tensors are not, and nothing runs.
    with (
        patch("moba_flex.compile.plans.interpreted", lambda: True),
        patch("moba_flex.masks.regroup._has_kernels", lambda device: True),
    ):
        graphs = [  # one tile and several; many picks, whose parts are merged apart, and few
            count_graphs(block_size, top_k, dynamic)
            for block_size, top_k in ((32, 4), (256, 3))
            for dynamic in (None, True)
        ]
    trace_a_step()
    found = {name: sorted(written) for name, written in WRITTEN.items()}
    print(json.dumps({"graphs": graphs, "written": found}))
