"""Compile the routing kernel for a Hopper GPU, there or not; a script of `test_router.py`."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moba_flex.masks.router_kernel import _TILE_N, _TILE_Q, gate_kernel


def compile_for_hopper(dtype: str, head_dim: int, picks: int, forced: bool) -> dict[str, int]:
    """Return the bytes of shared memory of a program, and of its machine code."""
    constants = {
        "stride_qd": 1,
        "stride_kd": 1,
        "CAUSAL": True,
        "FORCED": forced,
        "PICKS": picks,
        "SLOTS": max(2, triton.next_power_of_2(picks)),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
        "TILE_Q": _TILE_Q,
        "TILE_N": _TILE_N,
    }
    pointers = {"q_ptr": f"*{dtype}", "block_keys_ptr": f"*{dtype}", "out_ptr": "*i32"}
    names = gate_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    source = ASTSource(
        gate_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    kernel = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 2}
    )
    return {"shared": kernel.metadata.shared, "code": len(kernel.asm["cubin"])}


if __name__ == "__main__":
    cases = [("bf16", 128, 7, False), ("fp32", 80, 11, True), ("fp16", 256, 63, True)]
    print(json.dumps([compile_for_hopper(*case) for case in cases]))
