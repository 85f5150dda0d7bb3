"""The decode plan on CUDA: each program attends from one query to a few keys of one chosen block.

A second kernel merges the parts of each query. The number of launches and of programs depends on
shapes alone, so that a CUDA graph holds a step while lengths grow.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moba_flex.compile.fused_kernels import _cap
from moba_flex.masks._torch.inputs import dense_vectors
from moba_flex.masks._torch.kernel_op import kernel_op, launch
from moba_flex.masks.layout import Layout, ceil_div

_TILE_KEYS = 128
_TILE_PARTS = 32

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = [
    "num_heads", "group", "q_len", "kv_len", "num_blocks", "block_size", "picks", "tiles",
    "table_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, blocks_ptr, queries_ptr, extents_ptr, part_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    num_heads, group, q_len, kv_len, num_blocks, block_size, picks, tiles, table_rows,
    scale, cap,
    TABLES: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Attend from one query to up to `TILE` keys of its `slot`-th block; the last is its own."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, tile = part // tiles, part % tiles
    query, head = row % q_len, row // q_len % num_heads
    batch = row // q_len // num_heads
    if TABLES:
        queries_ptr += batch % table_rows * q_len + query
        position = tl.load(queries_ptr)
        own = tl.load(queries_ptr + table_rows * q_len)
    else:
        position = (kv_len - q_len + query).to(tl.int32)
        own = position // block_size
    block = own
    if slot < picks:
        block = tl.load(blocks_ptr + row * picks + slot)
    exists = (block >= 0) & (block < num_blocks)
    if TABLES:
        extents_ptr += batch % table_rows * num_blocks + block
        start = tl.load(extents_ptr, mask=exists, other=0)
        stop = tl.load(extents_ptr + table_rows * num_blocks, mask=exists, other=0)
    else:
        start = block * block_size
        stop = tl.minimum(start + block_size, kv_len)
    if CAUSAL:
        stop = tl.minimum(stop, position + 1)
    key = start + tile * TILE + tl.arange(0, TILE)
    seen = exists & (key < stop)
    dim, value_dim = tl.arange(0, D), tl.arange(0, DV)
    q_ptr += batch * stride_qb + head * stride_qh + query * stride_qm
    q = tl.load(q_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    key = key.to(tl.int64)[:, None]
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    some = seen[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + key * stride_kn + dim[None, :], mask=some, other=0.0)
    some = seen[:, None] & (value_dim < VALUE_DIM)[None, :]
    v = tl.load(v_ptr + key * stride_vn + value_dim[None, :], mask=some, other=0.0)
    score = tl.sum(k.to(tl.float32) * q[None, :], 1)
    if SOFTCAP:
        score, _ = _cap(score, scale, cap, PRECISION)
    else:
        score *= scale
    score = tl.where(seen, score, -float("inf"))
    top = tl.max(score, 0)
    weight = tl.exp2(score - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, 0)
    total = tl.where(total == 0.0, 1.0, total)  # of no keys, whose log-sum-exp is -inf by `top`
    out = tl.sum(weight[:, None] * v.to(tl.float32), 0) / total
    place = row * tl.num_programs(1) + part
    tl.store(part_ptr + place * VALUE_DIM + value_dim, out, mask=value_dim < VALUE_DIM)
    tl.store(part_lse_ptr + place, top + tl.log2(total))


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(  # type: ignore[no-untyped-def]
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, parts,
    VALUE_DIM: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query."""
    row, value_dim = tl.program_id(0).to(tl.int64), tl.arange(0, DV)
    part_ptr += row * parts * VALUE_DIM
    part_lse_ptr += row * parts
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    out = tl.zeros([DV], tl.float32)
    for at in range(0, parts, TILE):
        part = at + tl.arange(0, TILE)
        lse = tl.load(part_lse_ptr + part, mask=part < parts, other=-float("inf"))
        higher = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(lse - shift)
        decay = tl.exp2(top - shift)
        some = (weight > 0.0)[:, None] & (value_dim < VALUE_DIM)[None, :]
        places = part[:, None] * VALUE_DIM + value_dim[None, :]
        value = tl.load(part_ptr + places, mask=some, other=0.0)
        out = out * decay + tl.sum(weight[:, None] * value, 0)
        total = total * decay + tl.sum(weight, 0)
        top = higher
    total = tl.where(total == 0.0, 1.0, total)
    out /= total
    out_ptrs = out_ptr + row * VALUE_DIM + value_dim
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=value_dim < VALUE_DIM)
    tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)


@kernel_op("moba_flex::decode_triton")
def decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    queries: Tensor | None,
    extents: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Do what `decode_cpu` does."""
    layout = Layout(q.shape[2], k.shape[2], block_size, causal, queries, extents)
    q, k, v = dense_vectors(q, k, v)
    batch, num_heads, q_len, head_dim = q.shape
    picks, value_dim, rows = blocks.shape[3], v.shape[3], batch * num_heads * q_len
    out = q.new_empty(batch, num_heads, q_len, value_dim)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    if rows == 0:
        return out, lse
    tile = min(_TILE_KEYS, triton.next_power_of_2(block_size))
    tiles = ceil_div(block_size, tile)
    parts = (picks + 1) * tiles
    part = q.new_empty(rows, parts, value_dim, dtype=torch.float32)
    part_lse = q.new_empty(rows, parts, dtype=torch.float32)
    # Placeholders, which a kernel without TABLES does not read.
    if queries is None or extents is None:
        queries = extents = blocks
    padded = triton.next_power_of_2(value_dim)
    launch(
        wrap_triton(attend_kernel),
        (rows, parts),
        *(q, k, v, blocks, queries, extents, part, part_lse),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        num_heads,
        num_heads // k.shape[1],
        q_len,
        k.shape[2],
        layout.num_blocks,
        block_size,
        picks,
        tiles,
        1 if layout.extents is None else layout.extents.shape[1],
        scale / math.log(2),
        softcap / math.log(2),
        TABLES=layout.extents is not None,
        CAUSAL=causal,
        SOFTCAP=softcap > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        HEAD_DIM=head_dim,
        D=triton.next_power_of_2(head_dim),
        VALUE_DIM=value_dim,
        DV=padded,
        TILE=tile,
        num_warps=4,
    )
    launch(
        wrap_triton(merge_kernel),
        (rows,),
        *(part, part_lse, out, lse, parts),
        VALUE_DIM=value_dim,
        DV=padded,
        TILE=_TILE_PARTS,
        num_warps=2,
    )
    return out, lse
