"""Block keys on CUDA: keys are added in order, so that all devices give the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_flex.masks._torch.kernel_op import kernel_op, launch, power_of_2, wrap_triton

# Keys that are loaded at a time.
_AHEAD = 16

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = ["num_heads", "kv_len", "num_blocks", "block_size", "table_rows"]


@triton.jit
def add_keys(total, ptrs, stride, start, stop, within, AHEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the keys from `start` to `stop` to a sum, in their order, `AHEAD` loads at a time."""
    for at in range(start, stop, AHEAD):
        for i in tl.static_range(AHEAD):
            place = tl.cast(at + i, tl.int64) * stride
            key = tl.load(ptrs + place, mask=within & (at + i < stop), other=0.0)
            total += key.to(tl.float32)
    return total


@triton.jit(do_not_specialize=_SIZES)
def pool_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    out_ptr,
    extents_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    num_heads,
    kv_len,
    num_blocks,
    block_size,
    table_rows,
    TABLES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Average the keys of a block in float32, in the order of the keys."""
    block, head = tl.program_id(0), tl.program_id(1)
    start = block * block_size
    stop = tl.minimum(start + block_size, kv_len)
    if TABLES:
        extents_ptr += head // num_heads % table_rows * num_blocks + block
        start, stop = tl.load(extents_ptr), tl.load(extents_ptr + table_rows * num_blocks)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    k_ptr += (head // num_heads).to(tl.int64) * stride_kb
    k_ptr += (head % num_heads).to(tl.int64) * stride_kh
    k_ptrs = k_ptr + dim.to(tl.int64) * stride_kd
    total = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    total = add_keys(total, k_ptrs, stride_kn, start, stop, dim < HEAD_DIM, AHEAD)
    # Triton's own division of float32 is approximate.
    mean = tl.div_rn(total, tl.maximum(stop - start, 1).to(tl.float32) + tl.zeros_like(total))
    out_ptrs = out_ptr + (head.to(tl.int64) * num_blocks + block) * HEAD_DIM + dim
    tl.store(out_ptrs, mean.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@kernel_op("moba_flex::pool_triton")
def pool_triton(k: Tensor, block_size: int, num_blocks: int, extents: Tensor | None) -> Tensor:
    """Average the keys of each block, as `moba_flex.masks.pool.pool` does.

    Args:
        k: Keys, `[B, Hkv, KV, D]`.
        block_size: Keys per block, where `extents` is None.
        num_blocks: `N`.
        extents: First key of each block and the key after its last, int32 `[2, R, N]`.

    Returns:
        `[B, Hkv, N, D]`; zeros for blocks without keys.
    """
    batch, num_heads, kv_len, head_dim = k.shape
    out = torch.empty(batch, num_heads, num_blocks, head_dim, dtype=k.dtype, device=k.device)
    if out.numel():
        launch(
            wrap_triton(pool_kernel),
            (num_blocks, batch * num_heads),
            k,
            out,
            k if extents is None else extents,
            *k.stride(),
            num_heads,
            kv_len,
            num_blocks,
            block_size,
            1 if extents is None else extents.shape[1],
            TABLES=extents is not None,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=power_of_2(head_dim),
            AHEAD=_AHEAD,
            num_warps=1,
        )
    return out
