"""Triton kernels of the fused plan: the queries of a block are gathered inside the load.

Scores are in units of log2, `score * scale * log2(e)`, so that each exponential is one `exp2`. A
*list* is one key/value head of one sequence; its *rows* are `(head in group) * Q + query`, and its
*pairs* lie in the order of `moba_flex.masks.regroup.Pairs`. A launch handles some of the lists,
from `first_list` on; the parts that one kernel leaves for the next are of those lists alone.
"""

import triton
import triton.language as tl

# Arguments that vary with lengths: kernels are not compiled anew for what divides them.
_SIZES = [
    "first_list",
    "group",
    "kv_len",
    "num_blocks",
    "num_heads",
    "num_kv_heads",
    "num_pairs",
    "num_spills",
    "num_tiles",
    "picks",
    "block_size",
    "q_len",
    "share",
    "tiles_per_block",
]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_keys(  # type: ignore[no-untyped-def]
    ptr, stride, start, stop, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load keys or values `start..start + TILE` as `[TILE, D]`, zeros from `stop` on."""
    key, dim = tl.arange(0, TILE), tl.arange(0, D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + key[:, None] * stride + dim[None, :]
    if MASKED:
        inside = (start + key < stop)[:, None] & (dim < HEAD_DIM)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    if HEAD_DIM == D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _rows_to_ptrs(  # type: ignore[no-untyped-def]
    ptr, row, q_len, stride_h, stride_m, GROUPED: tl.constexpr, D: tl.constexpr
):
    """Point at the vectors of rows of a list whose first vector `ptr` points at."""
    if GROUPED:
        head, query = row // q_len, row % q_len
        start = head.to(tl.int64) * stride_h + query.to(tl.int64) * stride_m
    else:
        start = row.to(tl.int64) * stride_m
    return ptr + start[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, stop, low, high, scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add keys `start..stop` to a softmax; with MASKED, those of `low..high` of each row."""
    for at in tl.range(start, stop, TILE_N, num_stages=STAGES):
        k = _load_keys(k_ptr, stride_kn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
        v = _load_keys(v_ptr, stride_vn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
        score = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if MASKED:
            key = (at + tl.arange(0, TILE_N))[None, :]
            score = tl.where((key >= low[:, None]) & (key < high[:, None]), score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # A row under a mask may have seen no key yet.
        shift = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        weight = tl.exp2(score - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _attend_backward(  # type: ignore[no-untyped-def]
    q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, start, stop, low, high, scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to dq, over the scale, what keys `start..stop` contribute."""
    for at in tl.range(start, stop, TILE_N, num_stages=STAGES):
        k = _load_keys(k_ptr, stride_kn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
        v = _load_keys(v_ptr, stride_vn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
        score = tl.dot(q, k.T, input_precision=PRECISION) * scale
        weight = tl.exp2(score - lse[:, None])
        if MASKED:
            key = (at + tl.arange(0, TILE_N))[None, :]
            weight = tl.where((key >= low[:, None]) & (key < high[:, None]), weight, 0.0)
        dweight = tl.dot(grad, v.T, input_precision=PRECISION)
        dscore = weight * (dweight - delta[:, None])
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_SIZES)
def pair_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, row_ptr, first_pair_ptr, tile_block_ptr,
    first_tile_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, num_tiles,
    TAIL: tl.constexpr, GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with the pairs of a tile to the block that they chose."""
    scale = tl.cast(scale, tl.float32)  # torch.compile makes it a double
    list_id = first_list + tl.program_id(1)
    # Not in a function: PyTorch would take what it reads for what the kernel writes to.
    block = tl.load(tile_block_ptr + list_id * num_tiles + tl.program_id(0))
    if block >= num_blocks:
        return
    entry = list_id * (num_blocks + 1) + block
    within = tl.program_id(0) - tl.load(first_tile_ptr + entry)
    pair = tl.load(first_pair_ptr + entry) + within * TILE_M + tl.arange(0, TILE_M)
    exists = pair < tl.load(first_pair_ptr + entry + 1)
    row = tl.load(row_ptr + list_id.to(tl.int64) * num_pairs + pair, mask=exists, other=0)
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    dim = tl.arange(0, D)
    q_ptr += batch * stride_qb + head * group * stride_qh
    q_ptrs = _rows_to_ptrs(q_ptr, row, q_len, stride_qh, stride_qm, GROUPED, D)
    q = tl.load(q_ptrs, mask=exists[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    acc = tl.zeros([TILE_M, D], tl.float32)
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    start = block * block_size
    stop = tl.minimum(start + block_size, kv_len)
    whole = start + (stop - start) // TILE_N * TILE_N if TAIL else stop
    low = tl.zeros([TILE_M], tl.int32) + start
    high = tl.zeros([TILE_M], tl.int32) + stop
    acc, top, total = _attend(
        q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, low, high, scale,
        False, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
    )  # fmt: skip
    if TAIL:
        acc, top, total = _attend(
            q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, low, high,
            scale, True, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
        )  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * num_pairs + pair
    part = acc / total[:, None]
    tl.store(
        part_ptr + place[:, None] * HEAD_DIM + dim[None, :],
        part.to(part_ptr.dtype.element_ty),
        mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
    )
    tl.store(part_lse_ptr + place, top + tl.log2(total), mask=exists)


@triton.jit
def _own_keys(  # type: ignore[no-untyped-def]
    query, q_len, kv_len, block_size,
    TILE_N: tl.constexpr, CAUSAL: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Return the keys of each query's own block that it sees, and those of the tile.

    They are `low..high` of each row; of the tile, `start..whole` are seen by all rows and
    `whole..stop` by some. Rows past the last query count as that one.
    """
    position = tl.minimum(query, q_len - 1) + kv_len - q_len
    low = position // block_size * block_size
    high = position + 1 if CAUSAL else tl.minimum(low + block_size, kv_len)
    first = tl.min(position)
    last = tl.minimum(first + TILE_M, kv_len) - 1
    start = first // block_size * block_size
    last_start = last // block_size * block_size
    stop = last + 1 if CAUSAL else tl.minimum(last_start + block_size, kv_len)
    seen = first + 1 if CAUSAL else stop
    whole = tl.where(start == last_start, start + (seen - start) // TILE_N * TILE_N, start)
    return low, high, start, whole, stop


@triton.jit(do_not_specialize=_SIZES)
def own_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, rank_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_ob, stride_oh, stride_om,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of queries to their own blocks, and merge what their pairs found."""
    scale = tl.cast(scale, tl.float32)  # torch.compile makes it a double
    local_list, head_in_group = tl.program_id(1) // group, tl.program_id(1) % group
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    q_head = head * group + head_in_group
    query, dim = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M), tl.arange(0, D)
    inside = (query < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = query[:, None].to(tl.int64)
    q_ptrs = q_ptr + batch * stride_qb + q_head * stride_qh + offset * stride_qm + dim[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    acc = tl.zeros([TILE_M, D], tl.float32)
    top = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    low, high, start, whole, stop = _own_keys(
        query, q_len, kv_len, block_size, TILE_N, CAUSAL, TILE_M
    )
    acc, top, total = _attend(
        q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, low, high, scale,
        False, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, low, high, scale,
        True, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
    )  # fmt: skip

    row = (head_in_group * q_len + query).to(tl.int64)
    rank_ptr += list_id.to(tl.int64) * num_pairs + row * picks
    part_start = local_list.to(tl.int64) * num_pairs
    for pick in range(picks):
        rank = tl.load(rank_ptr + pick, mask=query < q_len, other=-1)
        exists = rank >= 0
        place = part_start + rank
        part_lse = tl.load(part_lse_ptr + place, mask=exists, other=-float("inf"))
        part_ptrs = part_ptr + place[:, None] * HEAD_DIM + dim[None, :]
        part = tl.load(part_ptrs, mask=exists[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        higher = tl.maximum(top, part_lse)
        decay, weight = tl.exp2(top - higher), tl.exp2(part_lse - higher)
        acc = acc * decay[:, None] + part.to(tl.float32) * weight[:, None]
        total = total * decay + weight
        top = higher

    out_ptrs = out_ptr + batch * stride_ob + q_head * stride_oh + offset * stride_om + dim[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    lse_ptrs = lse_ptr + (batch * num_kv_heads * group + q_head) * q_len + query
    tl.store(lse_ptrs, (top + tl.log2(total)) * LN_2, mask=query < q_len)


@triton.jit(do_not_specialize=_SIZES)
def delta_kernel(  # type: ignore[no-untyped-def]
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, rank_ptr, delta_ptr, pair_lse_ptr, pair_delta_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    num_heads, group, q_len, num_pairs, picks,
    LSE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Write what is subtracted from the gradient of each weight: `out @ grad - grad_lse`.

    It is written once by row and, with the log-sum-exp in units of log2, once by pair, so that
    kernels that walk the pairs read both in order.
    """
    head = tl.program_id(1)
    batch, h = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    query, dim = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M), tl.arange(0, D)
    exists = query < q_len
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    row = query[:, None].to(tl.int64)
    out_ptrs = out_ptr + batch * stride_ob + h * stride_oh + row * stride_om + dim[None, :]
    grad_ptrs = grad_ptr + batch * stride_gb + h * stride_gh + row * stride_gm + dim[None, :]
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    place = head.to(tl.int64) * q_len + query
    if LSE:
        delta -= tl.load(grad_lse_ptr + place, mask=exists, other=0.0)
    tl.store(delta_ptr + place, delta, mask=exists)
    lse = tl.load(lse_ptr + place, mask=exists, other=0.0) * LOG2_E
    pairs = (head // group).to(tl.int64) * num_pairs
    for pick in range(picks):
        rank = tl.load(rank_ptr + place * picks + pick, mask=exists, other=-1)
        tl.store(pair_lse_ptr + pairs + rank, lse, mask=rank >= 0)
        tl.store(pair_delta_ptr + pairs + rank, delta, mask=rank >= 0)


@triton.jit(do_not_specialize=_SIZES)
def pair_dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, pair_lse_ptr, pair_delta_ptr, part_ptr, row_ptr,
    first_pair_ptr, tile_block_ptr, first_tile_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gm,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, num_tiles,
    TAIL: tl.constexpr, GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write each pair's part of dq, over the scale."""
    scale = tl.cast(scale, tl.float32)  # torch.compile makes it a double
    list_id = first_list + tl.program_id(1)
    # Not in a function: PyTorch would take what it reads for what the kernel writes to.
    block = tl.load(tile_block_ptr + list_id * num_tiles + tl.program_id(0))
    if block >= num_blocks:
        return
    entry = list_id * (num_blocks + 1) + block
    within = tl.program_id(0) - tl.load(first_tile_ptr + entry)
    pair = tl.load(first_pair_ptr + entry) + within * TILE_M + tl.arange(0, TILE_M)
    exists = pair < tl.load(first_pair_ptr + entry + 1)
    row = tl.load(row_ptr + list_id.to(tl.int64) * num_pairs + pair, mask=exists, other=0)
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    dim = tl.arange(0, D)
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    q_ptr += batch * stride_qb + head * group * stride_qh
    grad_ptr += batch * stride_gb + head * group * stride_gh
    q_ptrs = _rows_to_ptrs(q_ptr, row, q_len, stride_qh, stride_qm, GROUPED, D)
    grad_ptrs = _rows_to_ptrs(grad_ptr, row, q_len, stride_gh, stride_gm, GROUPED, D)
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    grad = tl.load(grad_ptrs, mask=inside, other=0.0)
    pairs = list_id.to(tl.int64) * num_pairs
    lse = tl.load(pair_lse_ptr + pairs + pair, mask=exists, other=float("inf"))
    delta = tl.load(pair_delta_ptr + pairs + pair, mask=exists, other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    dq = tl.zeros([TILE_M, D], tl.float32)
    start = block * block_size
    stop = tl.minimum(start + block_size, kv_len)
    whole = start + (stop - start) // TILE_N * TILE_N if TAIL else stop
    low = tl.zeros([TILE_M], tl.int32) + start
    high = tl.zeros([TILE_M], tl.int32) + stop
    dq = _attend_backward(
        q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, low, high,
        scale, False, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
    )  # fmt: skip
    if TAIL:
        dq = _attend_backward(
            q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, low, high,
            scale, True, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
        )  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * num_pairs + pair
    part_ptrs = part_ptr + place[:, None] * HEAD_DIM + dim[None, :]
    tl.store(part_ptrs, dq.to(part_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def own_dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, part_ptr, rank_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gm, stride_dqb, stride_dqh, stride_dqm,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq of a tile of queries: that of their own blocks and the sum of their pairs'."""
    scale = tl.cast(scale, tl.float32)  # torch.compile makes it a double
    local_list, head_in_group = tl.program_id(1) // group, tl.program_id(1) % group
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    q_head = head * group + head_in_group
    query, dim = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M), tl.arange(0, D)
    exists = query < q_len
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    offset = query[:, None].to(tl.int64)
    q_ptrs = q_ptr + batch * stride_qb + q_head * stride_qh + offset * stride_qm + dim[None, :]
    g_ptrs = grad_ptr + batch * stride_gb + q_head * stride_gh + offset * stride_gm + dim[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    grad = tl.load(g_ptrs, mask=inside, other=0.0)
    first_row = (batch * num_kv_heads * group + q_head) * q_len
    lse = tl.load(lse_ptr + first_row + query, mask=exists, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + first_row + query, mask=exists, other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    dq = tl.zeros([TILE_M, D], tl.float32)
    low, high, start, whole, stop = _own_keys(
        query, q_len, kv_len, block_size, TILE_N, CAUSAL, TILE_M
    )
    dq = _attend_backward(
        q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, low, high,
        scale, False, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
    )  # fmt: skip
    dq = _attend_backward(
        q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, low, high,
        scale, True, HEAD_DIM, D, TILE_N, PRECISION, STAGES,
    )  # fmt: skip

    row = (head_in_group * q_len + query).to(tl.int64)
    rank_ptr += list_id.to(tl.int64) * num_pairs + row * picks
    part_start = local_list.to(tl.int64) * num_pairs
    for pick in range(picks):
        rank = tl.load(rank_ptr + pick, mask=exists, other=-1)
        part_ptrs = part_ptr + (part_start + rank)[:, None] * HEAD_DIM + dim[None, :]
        found = (rank >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
        dq += tl.load(part_ptrs, mask=found, other=0.0).to(tl.float32)

    dq_ptrs = dq_ptr + batch * stride_dqb + q_head * stride_dqh + offset * stride_dqm
    dq = dq * (scale * LN_2)
    tl.store(dq_ptrs + dim[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(  # type: ignore[no-untyped-def]
    dk, dv, k, v, q, grad, lse, delta, seen, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk, over the scale, and dv what a tile of rows contributes; also return dscore."""
    score = tl.dot(k, q.T, input_precision=PRECISION)
    weight = tl.exp2(score * scale - lse[None, :])
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dweight = tl.dot(v, grad.T, input_precision=PRECISION)
    dscore = (weight * (dweight - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscore, q, dk, input_precision=PRECISION)
    return dk, dv, dscore


@triton.jit
def _add_pairs(  # type: ignore[no-untyped-def]
    dk, dv, k, v, first, stop, q_ptr, grad_ptr, lse_ptr, delta_ptr, row_ptr, part_ptr,
    stride_qh, stride_qm, stride_gh, stride_gm, q_len, scale, WRITE_DQ: tl.constexpr,
    GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_M: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what pairs `first..stop` of a list contribute; write their parts of dq if asked to."""
    dim = tl.arange(0, D)
    for at in tl.range(first, stop, TILE_M, num_stages=STAGES):
        pair = at + tl.arange(0, TILE_M)
        exists = pair < stop
        row = tl.load(row_ptr + pair, mask=exists, other=0)
        inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
        q_ptrs = _rows_to_ptrs(q_ptr, row, q_len, stride_qh, stride_qm, GROUPED, D)
        grad_ptrs = _rows_to_ptrs(grad_ptr, row, q_len, stride_gh, stride_gm, GROUPED, D)
        q = tl.load(q_ptrs, mask=inside, other=0.0)
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        # The weight of a pair that does not exist is exp2(-inf).
        lse = tl.load(lse_ptr + pair, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + pair, mask=exists, other=0.0)
        dk, dv, dscore = _add_rows(
            dk, dv, k, v, q, grad, lse, delta, exists, scale, False, PRECISION
        )
        if WRITE_DQ:
            dq = tl.dot(dscore.T, k, input_precision=PRECISION)
            part_ptrs = part_ptr + pair[:, None].to(tl.int64) * HEAD_DIM + dim[None, :]
            tl.store(part_ptrs, dq.to(part_ptr.dtype.element_ty), mask=inside)
    return dk, dv


@triton.jit(do_not_specialize=_SIZES)
def dkv_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, pair_lse_ptr, pair_delta_ptr, part_ptr,
    row_ptr, first_pair_ptr, spill_block_ptr, first_spill_ptr, spill_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb,
    stride_dvh, stride_dvn,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, num_spills, tiles_per_block, share,
    SPILL: tl.constexpr, CAUSAL: tl.constexpr, WRITE_DQ: tl.constexpr, GROUPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a tile of keys, which lies within one block.

    A program handles the first `share` pairs of the block and the queries whose own block it is.
    Further shares, of blocks that are chosen by many, are those of the programs of an earlier
    launch with SPILL, whose results this one adds in order.
    """
    scale = tl.cast(scale, tl.float32)  # torch.compile makes it a double
    list_id = first_list + tl.program_id(1)
    item = tl.program_id(0) // tiles_per_block
    within = tl.program_id(0) % tiles_per_block * TILE_N
    first_pair_ptr += list_id * (num_blocks + 1)
    first_spill_ptr += list_id * (num_blocks + 1)
    if SPILL:
        block = tl.load(spill_block_ptr + list_id * num_spills + item)
        if block >= num_blocks:
            return
        number = item - tl.load(first_spill_ptr + block) + 1
    else:
        block = item
        number = 0
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    block_start = block * block_size
    block_stop = tl.minimum(block_start + block_size, kv_len)
    start = block_start + within
    if start >= block_stop:
        return
    dim = tl.arange(0, D)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k = _load_keys(k_ptr, stride_kn, start, block_stop, HEAD_DIM, D, TILE_N, True)
    v = _load_keys(v_ptr, stride_vn, start, block_stop, HEAD_DIM, D, TILE_N, True)
    q_ptr += batch * stride_qb + head * group * stride_qh
    grad_ptr += batch * stride_gb + head * group * stride_gh
    first_row = list_id.to(tl.int64) * group * q_len
    lse_ptr += first_row
    delta_ptr += first_row
    spill_width = tiles_per_block * TILE_N
    spill_place = (within + tl.arange(0, TILE_N))[:, None] * D + dim[None, :]
    spill_ptr += tl.program_id(1).to(tl.int64) * num_spills * spill_width * (2 * D)
    dk = tl.zeros([TILE_N, D], tl.float32)
    dv = tl.zeros([TILE_N, D], tl.float32)
    if not SPILL:
        spill_start = tl.load(first_spill_ptr + block)
        spill_stop = tl.load(first_spill_ptr + block + 1)
        for spill in range(spill_start, spill_stop):
            spilled = spill_ptr + tl.cast(spill, tl.int64) * spill_width * (2 * D) + spill_place
            dk += tl.load(spilled)
            dv += tl.load(spilled + spill_width * D)

    first = tl.load(first_pair_ptr + block) + number * share
    stop = tl.minimum(first + share, tl.load(first_pair_ptr + block + 1))
    pairs = list_id.to(tl.int64) * num_pairs
    dk, dv = _add_pairs(
        dk, dv, k, v, first, stop, q_ptr, grad_ptr, pair_lse_ptr + pairs,
        pair_delta_ptr + pairs, row_ptr + pairs,
        part_ptr + tl.program_id(1).to(tl.int64) * num_pairs * HEAD_DIM, stride_qh, stride_qm,
        stride_gh, stride_gm, q_len, scale, WRITE_DQ, GROUPED, HEAD_DIM, D, TILE_M, PRECISION,
        STAGES,
    )  # fmt: skip

    key = start + tl.arange(0, TILE_N)
    if SPILL:
        spill_ptr += item.to(tl.int64) * spill_width * (2 * D)
        tl.store(spill_ptr + spill_place, dk)
        tl.store(spill_ptr + spill_width * D + spill_place, dv)
        return

    # The queries whose own block this is; of a causal block those from the first key on.
    offset = kv_len - q_len
    own_start = tl.maximum((start if CAUSAL else block_start) - offset, 0)
    own_stop = block_stop - offset
    own_tiles = tl.cdiv(tl.maximum(own_stop - own_start, 0), TILE_M)
    for step in tl.range(0, own_tiles * group, num_stages=STAGES):
        head_in_group = step // own_tiles
        query = own_start + step % own_tiles * TILE_M + tl.arange(0, TILE_M)
        exists = query < own_stop
        inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
        row = head_in_group * q_len + query
        q_ptrs = _rows_to_ptrs(q_ptr, row, q_len, stride_qh, stride_qm, GROUPED, D)
        grad_ptrs = _rows_to_ptrs(grad_ptr, row, q_len, stride_gh, stride_gm, GROUPED, D)
        q = tl.load(q_ptrs, mask=inside, other=0.0)
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row, mask=exists, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
        seen = exists[None, :]
        if CAUSAL:
            seen = seen & (key[:, None] <= query[None, :] + offset)
        dk, dv, _ = _add_rows(dk, dv, k, v, q, grad, lse, delta, seen, scale, CAUSAL, PRECISION)

    inside = (key < block_stop)[:, None] & (dim < HEAD_DIM)[None, :]
    place = key[:, None].to(tl.int64)
    dk_ptrs = dk_ptr + batch * stride_dkb + head * stride_dkh + place * stride_dkn + dim[None, :]
    dv_ptrs = dv_ptr + batch * stride_dvb + head * stride_dvh + place * stride_dvn + dim[None, :]
    tl.store(dk_ptrs, (dk * (scale * LN_2)).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=inside)
