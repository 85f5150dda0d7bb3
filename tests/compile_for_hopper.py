"""Compile the Triton kernels for a Hopper GPU, there or not; a script of `test_router.py`."""

import json
from typing import Any

import torch
import triton

from moba_flex.compile import decode_kernels as decode
from moba_flex.compile import fused, fused_kernels
from moba_flex.masks import (
    append_kernel,
    layout_kernel,
    pool_kernel,
    regroup_kernel,
    router_kernel,
)
from moba_flex.masks.layout import Layout
from perf.tiles import compile_kernel


def compiled(*arguments: Any) -> dict[str, Any]:
    """Return the bytes of shared memory of a program, and of its machine code."""
    made = compile_kernel(*arguments)
    size = len(made.asm["cubin"])
    return {"name": made.metadata.name, "shared": made.metadata.shared, "code": size}


def gating(head_dim: int, picks: int, everything: bool) -> dict[str, Any]:
    """Return the constants of both kernels of the gate."""
    return {
        "stride_qd": 1,
        "stride_kd": 1,
        "CAUSAL": True,
        "FORCED": everything,
        "BY_HEAD": everything,
        "TABLES": everything,
        "SLOTS": max(2, triton.next_power_of_2(picks)),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
    }


def gate(dtype: torch.dtype, head_dim: int, picks: int, everything: bool) -> dict[str, Any]:
    """Compile the gate, plain or with all that it can do."""
    constants = gating(head_dim, picks, everything) | {
        "TILE_Q": router_kernel._TILE_Q,
        "TILE_N": router_kernel._TILE_N,
        "LISTED": everything,
    }
    return compiled(router_kernel.gate_kernel, dtype, constants, router_kernel._WARPS, 2)


def sift(dtype: torch.dtype, head_dim: int, picks: int, everything: bool) -> dict[str, Any]:
    """Compile the gate's first pass over all queries, plain or with all that it can do."""
    constants = gating(head_dim, picks, everything) | {
        "TILE_Q": router_kernel._SIFT_TILE_Q,
        "TILE_N": router_kernel._SIFT_TILE_N,
        "GROUPS": router_kernel._GROUPS,
        "DEPTH": 3 if everything else 2,
        "FULL": not everything,
        "PAIRED": everything,
        "INDEX_MASK": router_kernel._INDEX_MASK,
        "ASM": True,
    }
    warps, stages = router_kernel._SIFT_WARPS, router_kernel._SIFT_STAGES
    return compiled(router_kernel.sift_kernel, dtype, constants, warps, stages)


def pool(dtype: torch.dtype, head_dim: int, tables: bool) -> dict[str, Any]:
    """Compile the kernel that averages keys."""
    constants = {
        "stride_kd": 1,
        "TABLES": tables,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
        "AHEAD": pool_kernel._AHEAD,
    }
    return compiled(pool_kernel.pool_kernel, dtype, constants, 1, 3)


def sorting() -> list[dict[str, Any]]:
    """Compile the kernels that sort pairs by block."""
    tile, width = regroup_kernel._TILE, regroup_kernel._WIDTH
    kernels = {
        "count": ({"WIDTH": width}, 4),
        "sum": ({"TILE": 64, "WIDTH": regroup_kernel._SUM_WIDTH, "ROOM": 1024}, 4),
        "place": ({"TILE": tile}, 1),
        "tile": ({"WIDTH": width, "ROOM": 16}, 4),
    }
    return [
        compiled(getattr(regroup_kernel, f"{name}_kernel"), torch.int32, constants, warps, 1)
        for name, (constants, warps) in kernels.items()
    ]


def attention(
    dtype: torch.dtype, head_dim: int, block_size: int, everything: bool
) -> list[dict[str, Any]]:
    """Compile the kernels of the fused plan, plain or with all that they can do."""
    q, k = (torch.empty(1, heads, 256, head_dim, dtype=dtype) for heads in (2, 1))
    v, softcap, layout = k, 0.0, Layout(256, 256, block_size, causal=True)
    if everything:
        v, softcap = k[..., : head_dim // 2], 30.0
        layout = layout.with_tables(*(torch.empty(n, 1, 8, dtype=torch.int32) for n in (4, 2)))
    problem = fused._Problem.of(q, k, v, 2, layout, 1.0, softcap, shared=everything)
    found = []
    for name in fused._TILES:
        if name == "block_forward" and not problem.block_stays:
            continue
        tiles, constants = problem.tiles(name), problem.options(name)
        constants |= {"WRITE_DQ": block_size <= tiles.n}
        kernel = getattr(fused_kernels, f"{name}_kernel")
        found.append(compiled(kernel, dtype, constants, tiles.warps, tiles.stages))
    constants = problem.options("own_dq") | {"TILE_M": fused._MERGE_ROWS, "PICKS": 8}
    for kernel in (fused_kernels.merge_forward_kernel, fused_kernels.merge_dq_kernel):
        found.append(compiled(kernel, dtype, constants, fused._MERGE_WARPS, 1))
    return found


def decoding(dtype: torch.dtype, head_dim: int, everything: bool) -> list[dict[str, Any]]:
    """Compile the kernels of the decode plan and of a cache."""
    padded = triton.next_power_of_2(head_dim)
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "D": padded}
    constants |= {"HEAD_DIM_PADDED": padded, "VALUE_DIM_PADDED": padded, "DV": padded}
    constants |= {"CACHED": True, "TABLES": False, "CAUSAL": True, "SCORE": True, "APPEND": True}
    constants |= {"WIDTH": 256, "ROUNDS": 16, "DEPTH": 32, "PARTS": 8, "AHEAD": 8}
    constants |= {"TILE": 64, "TILE_BLOCKS": 32, "ROWS": 64 if everything else 16}
    constants["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
    for name in ("SELECT", "PAGED", "FORCED", "BY_HEAD", "SOFTCAP", "COUNTS"):
        constants[name] = everything
    given = constants | {"SCORE": False, "APPEND": False, "QUERY": everything, "COUNTS": False}
    return [
        compiled(decode.decode_kernel, dtype, constants | {"QUERY": False}, 2, 3),
        compiled(decode.decode_kernel, dtype, given, 2, 3),
        compiled(append_kernel.append_kernel, dtype, constants, 1, 3),
        compiled(
            layout_kernel.locate_kernel, dtype, constants | {"WIDTH": layout_kernel._WIDTH}, 4, 3
        ),
    ]


if __name__ == "__main__":
    cases = [
        (torch.bfloat16, 128, 7, False),
        (torch.float32, 80, 11, True),
        (torch.float16, 256, 63, True),
    ]
    results = [gate(*case) for case in cases]
    results += [sift(torch.bfloat16, 128, 7, False), sift(torch.float16, 80, 11, True)]
    results += [pool(torch.bfloat16, 128, False), pool(torch.float32, 80, True)]
    results += sorting()
    results += decoding(torch.bfloat16, 128, everything=False)
    results += decoding(torch.float32, 80, everything=True)
    results += attention(torch.bfloat16, 128, 128, everything=False)
    results += attention(torch.float16, 80, 100, everything=True)
    print(json.dumps(results))
