"""Export to CUDA up to the compiler, with no GPU; a script of `test_export.py`."""

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import bound_sympy

from moba_flex import moba_attention
from moba_flex.compile.exporter import _check_ops, _specs, _trace
from tests.trace_fused import NoDriver


class Parts(nn.Module):
    """Attention by itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=64, top_k=4)


class Padded(nn.Module):
    """Attention of rows with padding, in several launches."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=64, top_k=9, key_mask=key_mask)


def most(size: int | torch.SymInt, program: ExportedProgram) -> int:
    """Return what the compiler takes for the largest value of a size."""
    if isinstance(size, int):
        return size
    return int(bound_sympy(size.node.expr, dict(program.range_constraints)).upper)


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    with FakeTensorMode():
        q, k, v = (torch.empty(1, h, 600, 64, device="cuda").half() for h in (4, 2, 2))
        key_mask = torch.empty(1, 600, device="cuda", dtype=torch.bool)
        scans: list[int | torch.SymInt] = []  # how many values are summed up
        cumsum = Tensor.cumsum

        def noted(x: Tensor, *args: Any, **options: Any) -> Tensor:
            scans.append(x.numel())
            return cumsum(x, *args, **options)

        with patch.object(Tensor, "cumsum", noted):
            program, calls = _trace(Parts().eval(), (q, k, v), True, False)
        padded, _ = _trace(Padded().eval(), (q, k, v, key_mask), True, False)
        rows = tuple(torch.cat((x, x)) for x in (q, k, v, key_mask))
        batched, _ = _trace(Padded().eval(), rows, True, True)
    _check_ops(program)
    _check_ops(padded)
    targets = [node.target for node in program.graph.nodes]
    batches = [spec.varying[0] for spec in _specs(batched)]
    lengths = {size for spec in _specs(program) for size in spec.varying}
    found = {
        "ops": [str(x).rsplit(".", 1)[0] for x in targets if "moba_flex." in str(x)],
        "lengths": [bounds for _, *bounds in lengths],
        "padded": [symbol for spec in _specs(padded) for symbol, _, _ in spec.varying],
        "batches": [symbol for symbol, *_ in batches],
        "of_a_batch": batches[0][1:],
        "scans": [most(size, program) for size in scans],
        "plan": calls[0]["plan"],
    }
    json.dump(found, sys.stdout)
