"""Export to CUDA up to the compiler, with no GPU; a script of `test_export.py`."""

import json
import sys

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_flex import moba_attention
from moba_flex.compile.export import _check_ops, _specs, _trace
from tests.trace_fused import NoDriver


class Parts(nn.Module):
    """Attention by itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=64, top_k=4)


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    with FakeTensorMode():
        q, k, v = (torch.empty(1, h, 600, 64, device="cuda").half() for h in (4, 2, 2))
        program, calls = _trace(Parts().eval(), (q, k, v), True)
    _check_ops(program)
    targets = [node.target for node in program.graph.nodes]
    lengths = {spec.shape[2] for spec in _specs(program)}
    found = {
        "ops": [str(x).rsplit(".", 1)[0] for x in targets if "moba_flex." in str(x)],
        "lengths": [x[1:] for x in lengths if not isinstance(x, int)],
        "plan": calls[0]["plan"],
    }
    json.dump(found, sys.stdout)
