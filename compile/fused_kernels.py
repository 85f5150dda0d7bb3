"""Triton kernels of the fused plan: the queries of a block are gathered inside the load.

Scores are in units of log2, `score * scale * log2(e)`, so that each exponential is one `exp2`. A
*list* is one key/value head of one row of the batch; its *rows* are `(head in group) * Q + query`,
and its *pairs* lie in the order of `moba_flex.masks.regroup.Pairs`. A launch handles some of the
lists, from `first_list` on. Partial results (*parts*), which one kernel writes and a later one
reads, belong to the lists of that launch.

With SHARED, the heads of a group share one choice: rows are `query * group + (head in group)`, and
an entry of `Pairs.row` or `Pairs.rank` stands for all rows of a query, which follow each other.

With TABLES, `queries` and `extents` of `moba_flex.masks.layout.Layout` say where blocks lie. A
block may then hold fewer keys than `block_size`, or none, and a query may see no key. Kernels load
the extents inline: if a helper loads them, PyTorch's mutation analysis marks the extents tensor as
written, because the addresses of stores depend on it.
"""

import triton
import triton.language as tl

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = [
    "first_list",
    "group",
    "kv_len",
    "num_blocks",
    "num_kv_heads",
    "num_pairs",
    "num_spills",
    "num_tiles",
    "picks",
    "block_size",
    "q_len",
    "share",
    "table_rows",
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
    ptr, head, query, stride_h, stride_m, GROUPED: tl.constexpr, D: tl.constexpr
):
    """Return pointers to the vectors of some rows of a list; `ptr` points to its first vector."""
    start = query.to(tl.int64) * stride_m
    if GROUPED:
        start += head.to(tl.int64) * stride_h
    return ptr + start[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _load_vectors(ptrs, HEAD_DIM: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load vectors, without a mask where none is needed."""
    if HEAD_DIM == D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(tl.arange(0, D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    row_ptr, list_id, pair, exists, group, q_len, num_pairs, GROUPED: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Return the heads in their group, and the queries, of some pairs of a list."""
    row_ptr += list_id.to(tl.int64) * _num_entries(num_pairs, group, SHARED)
    if SHARED:  # one entry for the whole group
        return pair % group, tl.load(row_ptr + pair // group, exists)
    row = tl.load(row_ptr + pair, exists)
    if GROUPED:
        return row // q_len, row % q_len
    return row, row  # there is one head, whose number nobody reads


@triton.jit
def _own_rows(group, q_len, picks, SHARED: tl.constexpr, TILE_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the local list, heads, queries and rows of a program, and their first entries."""
    at = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    if SHARED:  # all heads of a few queries
        local_list, head_in_group, query, row = tl.program_id(1), at % group, at // group, at
        entry = query.to(tl.int64) * picks
    else:
        local_list, head_in_group = tl.program_id(1) // group, tl.program_id(1) % group
        query, row = at, head_in_group * q_len + at
        entry = row.to(tl.int64) * picks
    return local_list, head_in_group, query, row, entry


@triton.jit
def _num_entries(num_pairs, group, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many entries of `Pairs.row` and `Pairs.rank` a list has."""
    return num_pairs // group if SHARED else num_pairs


@triton.jit
def _load_ranks(ptrs, exists, head_in_group, group, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the ranks of pairs, -1 for none; those of a group follow each other."""
    rank = tl.load(ptrs, mask=exists, other=-1)
    if SHARED:
        rank = tl.where(rank >= 0, rank * group + head_in_group, -1)
    return rank


@triton.jit
def _cap(score, scale, cap, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return soft-capped scores in units of log2, as is `cap`, and the slope of the cap."""
    x = score * (scale / cap)
    tanh = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    if PRECISION == "ieee":  # near 0 the difference cancels: use Taylor's series
        y = x * x
        series = y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        tanh = tl.where(y < 0.0625, x + x * series, tanh)
    return cap * tanh, 1.0 - tanh * tanh


@triton.jit
def _finite(x):  # type: ignore[no-untyped-def]
    """Return vectors with zeros for non-finite values, and which vectors had any, `[length]`."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    spoilt = tl.max((~finite).to(tl.int32), 1) > 0
    return tl.where(finite, x, 0.0).to(x.dtype), spoilt


@triton.jit
def _no_sums(TILE_M: tl.constexpr, DV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a softmax over no keys: the weighted sum of values, the maximum, the total weight."""
    acc, total = tl.zeros([TILE_M, DV], tl.float32), tl.zeros([TILE_M], tl.float32)
    return acc, tl.full([TILE_M], -float("inf"), tl.float32), total


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    q, acc, top, total, k, v, at, reach, low, high, scale, cap,
    MASKED: tl.constexpr, CLEAN: tl.constexpr, SOFTCAP: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys, from `at` on, to a softmax.

    `top`, which is subtracted from scores, becomes their maximum in tiles that begin before
    `reach`. In later tiles it stays, which saves two fifths of the instructions. A weight may then
    be more than 1, and it is infinite if its score is higher than `top` by 128 or more:
    `_overflowed` finds such sums.

    With MASKED, each row sees the keys `low..high` alone. The scale must not be negative.

    A non-finite value makes rows NaN even if they do not see it, since their weight of zero times
    NaN is NaN. With CLEAN, only rows that see it become NaN.
    """
    score = tl.dot(q, k.T, input_precision=PRECISION)
    if SOFTCAP:
        score, _ = _cap(score, scale, cap, PRECISION)
        scale = 1.0
    if MASKED:
        key = (at + tl.arange(0, TILE_N))[None, :]
        seen = (key >= low[:, None]) & (key < high[:, None])
        score = tl.where(seen, score * scale, -float("inf"))
        scale = 1.0
    if at < reach:
        higher = tl.maximum(top, tl.max(score, 1) * scale)
        decay = tl.exp2(top - _shift(higher, MASKED))
        acc *= decay[:, None]
        total *= decay
        top = higher
    weight = tl.exp2(score * scale - _shift(top, MASKED)[:, None])
    total += tl.sum(weight, 1)
    if CLEAN:
        v, spoilt = _finite(v)
        weight = tl.where(seen & spoilt[None, :], float("nan"), weight)
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _shift(top, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what is subtracted from scores: 0 where a row has seen no key yet."""
    return tl.where(top == -float("inf"), 0.0, top) if MASKED else top


@triton.jit
def _reach(start, stop, v_ptr):  # type: ignore[no-untyped-def]
    """Return up to where `top` grows: to the end for float16, whose weights end at 65504."""
    return stop if v_ptr.dtype.element_ty == tl.float16 else start + 1


@triton.jit
def _overflowed(acc, total):  # type: ignore[no-untyped-def]
    """Whether a sum of a softmax is not finite, or a total so large that its inverse may be 0."""
    spoilt = tl.sum(acc * 0.0, 1) != 0.0
    return tl.max((spoilt | (total > 2.0**120)).to(tl.int32)) > 0


@triton.jit
def _next_keys(at, stop, low, high):  # type: ignore[no-untyped-def]
    """Return the first key from `at` on that any row sees, or `stop`."""
    return tl.min(tl.where(high > at, tl.maximum(low, at), stop))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, stop, reach, low, high, scale,
    cap,
    MASKED: tl.constexpr, CLEAN: tl.constexpr, ISLANDS: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add keys `start..stop` to a softmax, see `_attend_tile`.

    With ISLANDS, stretches of keys that no row sees are skipped.
    """
    if ISLANDS:
        at = start
        while at < stop:
            k = _load_keys(k_ptr, stride_kn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
            v = _load_keys(v_ptr, stride_vn, at, stop, VALUE_DIM, DV, TILE_N, MASKED)
            acc, top, total = _attend_tile(
                q, acc, top, total, k, v, at, reach, low, high, scale, cap, MASKED, CLEAN,
                SOFTCAP, TILE_N, PRECISION,
            )  # fmt: skip
            at = _next_keys(at + TILE_N, stop, low, high)
    else:
        for at in tl.range(start, stop, TILE_N, num_stages=STAGES):
            k = _load_keys(k_ptr, stride_kn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
            v = _load_keys(v_ptr, stride_vn, at, stop, VALUE_DIM, DV, TILE_N, MASKED)
            acc, top, total = _attend_tile(
                q, acc, top, total, k, v, at, reach, low, high, scale, cap, MASKED, CLEAN,
                SOFTCAP, TILE_N, PRECISION,
            )  # fmt: skip
    return acc, top, total


@triton.jit
def _attend_tile_backward(  # type: ignore[no-untyped-def]
    q, grad, lse, delta, dq, k, v, at, low, high, scale, cap,
    MASKED: tl.constexpr, CLEAN: tl.constexpr, SOFTCAP: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of a tile of keys to dq / scale; see `_attend_tile`."""
    score = tl.dot(q, k.T, input_precision=PRECISION)
    if SOFTCAP:
        score, slope = _cap(score, scale, cap, PRECISION)
    else:
        score, slope = score * scale, 1.0
    weight = tl.exp2(score - lse[:, None])
    dweight = tl.dot(grad, v.T, input_precision=PRECISION)
    dscore = weight * (dweight - delta[:, None]) * slope
    if MASKED:
        key = (at + tl.arange(0, TILE_N))[None, :]
        dscore = tl.where((key >= low[:, None]) & (key < high[:, None]), dscore, 0.0)
    if CLEAN:  # rows that see non-finite keys are NaN already, by their scores
        k, _ = _finite(k)
    return tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _attend_backward(  # type: ignore[no-untyped-def]
    q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, start, stop, low, high, scale,
    cap,
    MASKED: tl.constexpr, CLEAN: tl.constexpr, ISLANDS: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the contribution of keys `start..stop` to dq / scale; see `_attend`."""
    if ISLANDS:
        at = start
        while at < stop:
            k = _load_keys(k_ptr, stride_kn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
            v = _load_keys(v_ptr, stride_vn, at, stop, VALUE_DIM, DV, TILE_N, MASKED)
            dq = _attend_tile_backward(
                q, grad, lse, delta, dq, k, v, at, low, high, scale, cap, MASKED, CLEAN, SOFTCAP,
                TILE_N, PRECISION,
            )  # fmt: skip
            at = _next_keys(at + TILE_N, stop, low, high)
    else:
        for at in tl.range(start, stop, TILE_N, num_stages=STAGES):
            k = _load_keys(k_ptr, stride_kn, at, stop, HEAD_DIM, D, TILE_N, MASKED)
            v = _load_keys(v_ptr, stride_vn, at, stop, VALUE_DIM, DV, TILE_N, MASKED)
            dq = _attend_tile_backward(
                q, grad, lse, delta, dq, k, v, at, low, high, scale, cap, MASKED, CLEAN, SOFTCAP,
                TILE_N, PRECISION,
            )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=_SIZES)
def pair_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, row_ptr, first_pair_ptr, tile_block_ptr,
    first_tile_ptr, extents_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, cap, table_rows, num_tiles,
    TAIL: tl.constexpr, GROUPED: tl.constexpr, SHARED: tl.constexpr, TABLES: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr,
    DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of pairs to the block that they chose, and write their parts."""
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)  # float64 if traced
    list_id = first_list + tl.program_id(1)
    block = tl.load(tile_block_ptr + list_id * num_tiles + tl.program_id(0))
    if block >= num_blocks:
        return
    entry = list_id * (num_blocks + 1) + block
    within = tl.program_id(0) - tl.load(first_tile_ptr + entry)
    pair = tl.load(first_pair_ptr + entry) + within * TILE_M + tl.arange(0, TILE_M)
    exists = pair < tl.load(first_pair_ptr + entry + 1)
    head_in_group, query = _load_rows(
        row_ptr, list_id, pair, exists, group, q_len, num_pairs, GROUPED, SHARED
    )
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    dim = tl.arange(0, D)
    q_ptr += batch * stride_qb + head * group * stride_qh
    q_ptrs = _rows_to_ptrs(q_ptr, head_in_group, query, stride_qh, stride_qm, GROUPED, D)
    q = tl.load(q_ptrs, mask=exists[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    acc, top, total = _no_sums(TILE_M, DV)  # to a loop Triton takes only what exists before it
    start = block * block_size
    stop = tl.minimum(start + block_size, kv_len)
    if TABLES:
        extents_ptr += batch % table_rows * num_blocks + block
        start, stop = tl.load(extents_ptr), tl.load(extents_ptr + table_rows * num_blocks)
    whole = start + (stop - start) // TILE_N * TILE_N if TAIL else stop
    low = tl.zeros([TILE_M], tl.int32) + start
    high = tl.zeros([TILE_M], tl.int32) + stop
    # The maximum of the first tile will do for all tiles, or else that of all.
    reach, again = _reach(start, stop, v_ptr), True
    while again:
        acc, top, total = _no_sums(TILE_M, DV)
        acc, top, total = _attend(
            q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, reach, low,
            high, scale, cap, False, False, False, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N,
            PRECISION, STAGES,
        )  # fmt: skip
        if TAIL:
            acc, top, total = _attend(
                q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, reach, low,
                high, scale, cap, True, False, False, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N,
                PRECISION, STAGES,
            )  # fmt: skip
        again = (reach < stop) & _overflowed(acc, total)
        reach = stop
    place = tl.program_id(1).to(tl.int64) * num_pairs + pair
    part = acc * (1.0 / total)[:, None]
    value_dim = tl.arange(0, DV)
    tl.store(
        part_ptr + place[:, None] * VALUE_DIM + value_dim[None, :],
        part.to(part_ptr.dtype.element_ty),
        mask=exists[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
    tl.store(part_lse_ptr + place, top + tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def block_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, row_ptr, first_pair_ptr, tile_block_ptr,
    first_tile_ptr, extents_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, cap, table_rows, num_tiles, share,
    TAIL: tl.constexpr, GROUPED: tl.constexpr, SHARED: tl.constexpr, TABLES: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr,
    DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with up to `share` pairs to a block of at most `TILE_N` keys, which stays loaded."""
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)  # float64 if traced
    list_id = first_list + tl.program_id(1)
    block = tl.load(tile_block_ptr + list_id * num_tiles + tl.program_id(0))
    if block >= num_blocks:
        return
    entry = list_id * (num_blocks + 1) + block
    within = tl.program_id(0) - tl.load(first_tile_ptr + entry)
    first = tl.load(first_pair_ptr + entry) + within * share
    last = tl.minimum(first + share, tl.load(first_pair_ptr + entry + 1)) - 1
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * group * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    start = block * block_size
    stop = tl.minimum(start + block_size, kv_len)
    if TABLES:
        extents_ptr += batch % table_rows * num_blocks + block
        start, stop = tl.load(extents_ptr), tl.load(extents_ptr + table_rows * num_blocks)
    k = _load_keys(k_ptr, stride_kn, start, stop, HEAD_DIM, D, TILE_N, TAIL)
    v = _load_keys(v_ptr, stride_vn, start, stop, VALUE_DIM, DV, TILE_N, TAIL)
    value_dim = tl.arange(0, DV)[None, :]
    seen = (start + tl.arange(0, TILE_N) < stop)[None, :]
    place = tl.program_id(1).to(tl.int64) * num_pairs
    for at in tl.range(first, last + 1, TILE_M, num_stages=STAGES):
        # Past the end the last pair is done again: the same values are written once more.
        pair = tl.minimum(at + tl.arange(0, TILE_M), last)
        head_in_group, query = _load_rows(
            row_ptr, list_id, pair, None, group, q_len, num_pairs, GROUPED, SHARED
        )
        q_ptrs = _rows_to_ptrs(q_ptr, head_in_group, query, stride_qh, stride_qm, GROUPED, D)
        q = _load_vectors(q_ptrs, HEAD_DIM, D)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        factor = scale
        if SOFTCAP:
            score, _ = _cap(score, scale, cap, PRECISION)
            factor = 1.0
        top = tl.max(tl.where(seen, score, -float("inf")) if TAIL else score, 1) * factor
        weight = tl.exp2(score * factor - top[:, None])
        if TAIL:
            weight = tl.where(seen, weight, 0.0)
        total = tl.sum(weight, 1)
        part = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        part_ptrs = part_ptr + (place + pair)[:, None] * VALUE_DIM + value_dim
        part = part.to(part_ptr.dtype.element_ty)
        if VALUE_DIM == DV:
            tl.store(part_ptrs, part)
        else:
            tl.store(part_ptrs, part, mask=value_dim < VALUE_DIM)
        tl.store(part_lse_ptr + place + pair, top + tl.log2(total))


@triton.jit
def _own_keys(  # type: ignore[no-untyped-def]
    query, queries_ptr, extents_ptr, batch, q_len, kv_len, num_blocks, block_size, table_rows,
    TILE_N: tl.constexpr, TABLES: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
    TILE_M: tl.constexpr,
):  # fmt: skip
    """Return `low, high, start, whole, stop`: the keys of own blocks that a tile of queries sees.

    Each query sees `low..high` of its own block. All queries see `start..whole`, and some see keys
    of `whole..stop`. Rows past the last query repeat the last query.
    """
    last_query = tl.minimum(query, q_len - 1)
    if TABLES:
        queries_ptr += batch % table_rows * q_len + last_query
        extents_ptr += batch % table_rows * num_blocks
        own = tl.load(queries_ptr + table_rows * q_len)
        known = own < num_blocks
        low = tl.load(extents_ptr + own, mask=known, other=0)
        if CAUSAL:
            high = tl.load(queries_ptr) + 1
        else:
            high = tl.load(extents_ptr + table_rows * num_blocks + own, mask=known, other=0)
        start, stop = tl.min(tl.where(high > low, low, kv_len)), tl.max(high)
        whole = start
        if tl.min(own) == tl.max(own):
            whole += tl.maximum(tl.min(high) - start, 0) // TILE_N * TILE_N
    else:
        position = last_query + kv_len - q_len
        low = position // block_size * block_size
        high = position + 1 if CAUSAL else tl.minimum(low + block_size, kv_len)
        first = tl.min(position)
        last = tl.max(position) if SHARED else tl.minimum(first + TILE_M, kv_len) - 1
        start = first // block_size * block_size
        last_start = last // block_size * block_size
        stop = last + 1 if CAUSAL else tl.minimum(last_start + block_size, kv_len)
        seen = first + 1 if CAUSAL else stop
        whole = tl.where(start == last_start, start + (seen - start) // TILE_N * TILE_N, start)
    return low, high, start, whole, stop


@triton.jit(do_not_specialize=_SIZES)
def own_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, rank_ptr, queries_ptr, extents_ptr, out_ptr,
    lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_ob, stride_oh, stride_om,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, cap, table_rows,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, MERGE: tl.constexpr, TABLES: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr,
    DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of queries to their own blocks; with MERGE, merge the parts of pairs."""
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)  # float64 if traced
    local_list, head_in_group, query, _, entry = _own_rows(group, q_len, picks, SHARED, TILE_M)
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    q_head = head * group + head_in_group
    dim = tl.arange(0, D)
    inside = (query < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = query[:, None].to(tl.int64)
    q_heads = q_head[:, None] if SHARED else q_head
    q_ptrs = q_ptr + batch * stride_qb + q_heads * stride_qh + offset * stride_qm + dim[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    acc, top, total = _no_sums(TILE_M, DV)
    low, high, start, whole, stop = _own_keys(
        query, queries_ptr, extents_ptr, batch, q_len, kv_len, num_blocks, block_size,
        table_rows, TILE_N, TABLES, CAUSAL, SHARED, TILE_M,
    )  # fmt: skip
    # If all rows see the first key, the maximum of the first tile will do.
    reach = stop if TABLES else tl.where(tl.max(low) == start, _reach(start, stop, v_ptr), stop)
    acc, top, total = _attend(
        q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, reach, low, high,
        scale, cap, False, False, False, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
        STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, reach, low, high,
        scale, cap, True, False, TABLES, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
        STAGES,
    )  # fmt: skip
    if _overflowed(acc, total):
        acc, top, total = _no_sums(TILE_M, DV)
        acc, top, total = _attend(
            q, acc, top, total, k_ptr, v_ptr, stride_kn, stride_vn, start, stop, stop, low, high,
            scale, cap, True, True, True, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
            STAGES,
        )  # fmt: skip

    value_dim = tl.arange(0, DV)[None, :]
    highest = top
    if MERGE:
        rank_ptr += list_id.to(tl.int64) * _num_entries(num_pairs, group, SHARED) + entry
        part_start = local_list.to(tl.int64) * num_pairs
        # The merged maximum comes first, so that `acc` is scaled only once.
        for pick in range(picks):
            rank = _load_ranks(rank_ptr + pick, query < q_len, head_in_group, group, SHARED)
            part_lse = tl.load(
                part_lse_ptr + part_start + rank, mask=rank >= 0, other=-float("inf")
            )
            highest = tl.maximum(highest, part_lse)
        shift = highest
        if TABLES:  # a row may see no key
            shift = tl.where(highest == -float("inf"), 0.0, highest)
        decay = tl.exp2(top - shift)
        acc, total = acc * decay[:, None], total * decay
        for pick in range(picks):
            rank = _load_ranks(rank_ptr + pick, query < q_len, head_in_group, group, SHARED)
            exists, place = rank >= 0, part_start + rank
            part_lse = tl.load(part_lse_ptr + place, mask=exists, other=-float("inf"))
            part_ptrs = part_ptr + place[:, None] * VALUE_DIM + value_dim
            part = tl.load(part_ptrs, mask=exists[:, None] & (value_dim < VALUE_DIM), other=0.0)
            weight = tl.exp2(part_lse - shift)
            acc += part.to(tl.float32) * weight[:, None]
            total += weight

    out_ptrs = out_ptr + batch * stride_ob + q_heads * stride_oh + offset * stride_om + value_dim
    if TABLES or not MERGE:  # there may be no weight at all, or none before the parts'
        out = acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    else:
        out = acc * (1.0 / total)[:, None]
    inside = (query < q_len)[:, None] & (value_dim < VALUE_DIM)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse_ptrs = lse_ptr + (batch * num_kv_heads * group + q_head) * q_len + query
    tl.store(lse_ptrs, (highest + tl.log2(total)) * LN_2, mask=query < q_len)


@triton.jit(do_not_specialize=_SIZES)
def merge_forward_kernel(  # type: ignore[no-untyped-def]
    part_ptr, part_lse_ptr, rank_ptr, out_ptr, lse_ptr, stride_ob, stride_oh, stride_om,
    first_list, num_kv_heads, group, q_len, num_pairs, picks,
    SHARED: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr, TILE_M: tl.constexpr,
    PICKS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a tile of rows with the output of their own blocks.

    Apart from `own_forward_kernel` it needs few registers, so that many loads are on their way.
    """
    local_list, head_in_group, query, _, entry = _own_rows(group, q_len, picks, SHARED, TILE_M)
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    q_head = (list_id % num_kv_heads).to(tl.int64) * group + head_in_group
    exists, pick = query < q_len, tl.arange(0, PICKS)
    rank_ptr += list_id.to(tl.int64) * _num_entries(num_pairs, group, SHARED) + entry
    part_start = local_list.to(tl.int64) * num_pairs
    listed = exists[:, None] & (pick < picks)[None, :]
    heads = head_in_group[:, None] if SHARED else head_in_group
    ranks = _load_ranks(rank_ptr[:, None] + pick[None, :], listed, heads, group, SHARED)
    ptrs = part_lse_ptr + part_start + ranks
    part_lses = tl.load(ptrs, mask=ranks >= 0, other=-float("inf"))
    lse_ptrs = lse_ptr + (batch * num_kv_heads * group + q_head) * q_len + query
    lse = tl.load(lse_ptrs, mask=exists, other=0.0) * LOG2_E
    highest = tl.maximum(lse, tl.max(part_lses, 1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # a row may see no key
    own_weight = tl.exp2(lse - shift)
    total = own_weight + tl.sum(tl.exp2(part_lses - shift[:, None]), 1)
    scale = 1.0 / tl.where(total == 0, 1.0, total)

    value_dim = tl.arange(0, DV)[None, :]
    q_heads = q_head[:, None] if SHARED else q_head
    out_ptrs = out_ptr + batch * stride_ob + q_heads * stride_oh
    out_ptrs += query[:, None].to(tl.int64) * stride_om + value_dim
    inside = exists[:, None] & (value_dim < VALUE_DIM)
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32) * (own_weight * scale)[:, None]
    for number in range(picks):
        rank = _load_ranks(rank_ptr + number, exists, head_in_group, group, SHARED)
        found, place = rank >= 0, part_start + rank
        part_lse = tl.load(part_lse_ptr + place, mask=found, other=-float("inf"))
        part_ptrs = part_ptr + place[:, None] * VALUE_DIM + value_dim
        part = tl.load(part_ptrs, mask=found[:, None] & (value_dim < VALUE_DIM), other=0.0)
        out += part.to(tl.float32) * (tl.exp2(part_lse - shift) * scale)[:, None]
    tl.debug_barrier()  # all threads have read what is written over
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptrs, (highest + tl.log2(total)) * LN_2, mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def merge_dq_kernel(  # type: ignore[no-untyped-def]
    part_ptr, rank_ptr, dq_ptr, stride_dqb, stride_dqh, stride_dqm,
    first_list, num_kv_heads, group, q_len, num_pairs, picks, scale,
    SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Add the parts of a tile of rows to the dq of their own blocks."""
    scale = tl.cast(scale, tl.float32)  # float64 if traced
    local_list, head_in_group, query, _, entry = _own_rows(group, q_len, picks, SHARED, TILE_M)
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    q_head = (list_id % num_kv_heads).to(tl.int64) * group + head_in_group
    exists, dim = query < q_len, tl.arange(0, D)[None, :]
    rank_ptr += list_id.to(tl.int64) * _num_entries(num_pairs, group, SHARED) + entry
    part_start = local_list.to(tl.int64) * num_pairs
    total = tl.zeros([TILE_M, D], tl.float32)
    for number in range(picks):
        rank = _load_ranks(rank_ptr + number, exists, head_in_group, group, SHARED)
        part_ptrs = part_ptr + (part_start + rank)[:, None] * HEAD_DIM + dim
        found = (rank >= 0)[:, None] & (dim < HEAD_DIM)
        total += tl.load(part_ptrs, mask=found, other=0.0).to(tl.float32)
    q_heads = q_head[:, None] if SHARED else q_head
    dq_ptrs = dq_ptr + batch * stride_dqb + q_heads * stride_dqh
    dq_ptrs += query[:, None].to(tl.int64) * stride_dqm + dim
    inside = exists[:, None] & (dim < HEAD_DIM)
    dq = tl.load(dq_ptrs, mask=inside, other=0.0).to(tl.float32) + total * (scale * LN_2)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _stats(lse, delta, query, head):  # type: ignore[no-untyped-def]
    """Pack the stats of rows or pairs into four integers each, so that one is a 16-byte load."""
    field = tl.arange(0, 4)[None, :]
    lse, delta = lse.to(tl.int32, bitcast=True), delta.to(tl.int32, bitcast=True)
    floats = tl.where(field == 0, lse[:, None], delta[:, None])
    return tl.where(field < 2, floats, tl.where(field == 2, query[:, None], head))


@triton.jit
def _unpack(stats):  # type: ignore[no-untyped-def]
    """Return log-sum-exp in units of log2, delta, and a row's query and head in the group."""
    field = tl.arange(0, 4)[None, :]
    lse = tl.sum(tl.where(field == 0, stats, 0), 1).to(tl.float32, bitcast=True)
    delta = tl.sum(tl.where(field == 1, stats, 0), 1).to(tl.float32, bitcast=True)
    query = tl.sum(tl.where(field == 2, stats, 0), 1)
    return lse, delta, query, tl.sum(tl.where(field == 3, stats, 0), 1)


@triton.jit(do_not_specialize=_SIZES)
def stats_kernel(  # type: ignore[no-untyped-def]
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, rank_ptr, stats_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    first_list, num_kv_heads, group, q_len, picks,
    LSE: tl.constexpr, SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    TILE_M: tl.constexpr,
):  # fmt: skip
    """Write the stats of each row, and after those of all rows a copy for each pair.

    The stats are log-sum-exp, delta, query and head in the group. Delta is subtracted from the
    gradient of each weight: `out @ grad - grad_lse`. With the copies, kernels that walk the pairs
    read stats in order.
    """
    local_list, head_in_group, query, row, entry = _own_rows(group, q_len, picks, SHARED, TILE_M)
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    h = (list_id % num_kv_heads * group + head_in_group).to(tl.int64)
    num_heads = num_kv_heads * group
    heads, dim = h[:, None] if SHARED else h, tl.arange(0, D)
    exists = query < q_len
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    offset = query[:, None].to(tl.int64)
    out_ptrs = out_ptr + batch * stride_ob + heads * stride_oh + offset * stride_om + dim[None, :]
    grad_ptrs = grad_ptr + batch * stride_gb + heads * stride_gh + offset * stride_gm
    grad_ptrs += dim[None, :]
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    place = (batch * num_heads + h) * q_len + query
    if LSE:
        delta -= tl.load(grad_lse_ptr + place, mask=exists, other=0.0)
    lse = tl.load(lse_ptr + place, mask=exists, other=0.0) * LOG2_E
    rows = group * q_len
    heads = head_in_group[:, None] if SHARED else head_in_group
    stats, field = _stats(lse, delta, query, heads), tl.arange(0, 4)[None, :]
    stats_ptr += local_list.to(tl.int64) * rows * (picks + 1) * 4
    rank_ptr += list_id.to(tl.int64) * _num_entries(rows, group, SHARED) * picks + entry
    tl.store(stats_ptr + row[:, None].to(tl.int64) * 4 + field, stats, mask=exists[:, None])
    for pick in range(picks):
        # Not by `_load_ranks`: the addresses of stores depend on it, see above.
        rank = tl.load(rank_ptr + pick, mask=exists, other=-1)[:, None]
        if SHARED:
            rank = tl.where(rank >= 0, rank * group + head_in_group[:, None], -1)
        tl.store(stats_ptr + (rows + rank).to(tl.int64) * 4 + field, stats, mask=rank >= 0)


@triton.jit(do_not_specialize=_SIZES)
def pair_dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, part_ptr, first_pair_ptr, tile_block_ptr,
    first_tile_ptr, extents_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gm,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, cap, table_rows, num_tiles,
    TAIL: tl.constexpr, GROUPED: tl.constexpr, SHARED: tl.constexpr, TABLES: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr,
    DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write each pair's part of dq / scale."""
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)  # float64 if traced
    list_id = first_list + tl.program_id(1)
    block = tl.load(tile_block_ptr + list_id * num_tiles + tl.program_id(0))
    if block >= num_blocks:
        return
    entry = list_id * (num_blocks + 1) + block
    within = tl.program_id(0) - tl.load(first_tile_ptr + entry)
    pair = tl.load(first_pair_ptr + entry) + within * TILE_M + tl.arange(0, TILE_M)
    exists = pair < tl.load(first_pair_ptr + entry + 1)
    rows = group * q_len
    place = tl.program_id(1).to(tl.int64) * (rows + num_pairs) + rows + pair
    stats_ptrs = stats_ptr + place[:, None] * 4 + tl.arange(0, 4)[None, :]
    stats = tl.load(stats_ptrs, mask=exists[:, None], other=0)
    lse, delta, query, head_in_group = _unpack(stats)
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    dim = tl.arange(0, D)
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    q_ptr += batch * stride_qb + head * group * stride_qh
    grad_ptr += batch * stride_gb + head * group * stride_gh
    q_ptrs = _rows_to_ptrs(q_ptr, head_in_group, query, stride_qh, stride_qm, GROUPED, D)
    grad_ptrs = _rows_to_ptrs(grad_ptr, head_in_group, query, stride_gh, stride_gm, GROUPED, DV)
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    grad_inside = exists[:, None] & (tl.arange(0, DV) < VALUE_DIM)[None, :]
    grad = tl.load(grad_ptrs, mask=grad_inside, other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    dq = tl.zeros([TILE_M, D], tl.float32)
    start = block * block_size
    stop = tl.minimum(start + block_size, kv_len)
    if TABLES:
        extents_ptr += batch % table_rows * num_blocks + block
        start, stop = tl.load(extents_ptr), tl.load(extents_ptr + table_rows * num_blocks)
    whole = start + (stop - start) // TILE_N * TILE_N if TAIL else stop
    low = tl.zeros([TILE_M], tl.int32) + start
    high = tl.zeros([TILE_M], tl.int32) + stop
    dq = _attend_backward(
        q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, low, high,
        scale, cap, False, False, False, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
        STAGES,
    )  # fmt: skip
    if TAIL:
        dq = _attend_backward(
            q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, low, high,
            scale, cap, True, False, False, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
            STAGES,
        )  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * num_pairs + pair
    part_ptrs = part_ptr + place[:, None] * HEAD_DIM + dim[None, :]
    tl.store(part_ptrs, dq.to(part_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def own_dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, queries_ptr, extents_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gm, stride_dqb, stride_dqh, stride_dqm,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, cap, table_rows,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, TABLES: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq of a tile of queries for their own blocks; `merge_dq_kernel` adds that of pairs."""
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)  # float64 if traced
    local_list, head_in_group, query, row, _ = _own_rows(group, q_len, picks, SHARED, TILE_M)
    list_id = first_list + local_list
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    q_head = head * group + head_in_group
    dim = tl.arange(0, D)
    exists = query < q_len
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    offset = query[:, None].to(tl.int64)
    q_heads = q_head[:, None] if SHARED else q_head
    q_ptrs = q_ptr + batch * stride_qb + q_heads * stride_qh + offset * stride_qm + dim[None, :]
    value_dim = tl.arange(0, DV)[None, :]
    g_ptrs = grad_ptr + batch * stride_gb + q_heads * stride_gh + offset * stride_gm + value_dim
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    grad = tl.load(g_ptrs, mask=exists[:, None] & (value_dim < VALUE_DIM), other=0.0)
    place = local_list.to(tl.int64) * (group * q_len + num_pairs) + row
    stats_ptrs = stats_ptr + place[:, None] * 4 + tl.arange(0, 4)[None, :]
    lse, delta, _, _ = _unpack(tl.load(stats_ptrs, mask=exists[:, None], other=0))
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    dq = tl.zeros([TILE_M, D], tl.float32)
    low, high, start, whole, stop = _own_keys(
        query, queries_ptr, extents_ptr, batch, q_len, kv_len, num_blocks, block_size,
        table_rows, TILE_N, TABLES, CAUSAL, SHARED, TILE_M,
    )  # fmt: skip
    dq = _attend_backward(
        q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, start, whole, low, high,
        scale, cap, False, False, False, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
        STAGES,
    )  # fmt: skip
    dq = _attend_backward(
        q, grad, lse, delta, dq, k_ptr, v_ptr, stride_kn, stride_vn, whole, stop, low, high,
        scale, cap, True, False, TABLES, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_N, PRECISION,
        STAGES,
    )  # fmt: skip
    if tl.max((dq != dq).to(tl.int32)) > 0:
        dq = _attend_backward(
            q, grad, lse, delta, tl.zeros([TILE_M, D], tl.float32), k_ptr, v_ptr, stride_kn,
            stride_vn, start, stop, low, high, scale, cap, True, True, True, SOFTCAP, HEAD_DIM, D,
            VALUE_DIM, DV, TILE_N, PRECISION, STAGES,
        )  # fmt: skip

    dq_ptrs = dq_ptr + batch * stride_dqb + q_heads * stride_dqh + offset * stride_dqm
    dq = dq * (scale * LN_2)
    tl.store(dq_ptrs + dim[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(  # type: ignore[no-untyped-def]
    dk, dv, k, v, first, stop, own_start, own_stop, q_ptr, grad_ptr, stats_ptr, part_ptr,
    stride_qh, stride_qm, stride_gh, stride_gm, group, q_len, scale, cap, key, offset,
    MASKED: tl.constexpr, WRITE_DQ: tl.constexpr, GROUPED: tl.constexpr, SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr,
    DV: tl.constexpr, TILE_M: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the contributions of pairs and of own rows to dk / scale and dv.

    These are the pairs `first..stop` and the queries `own_start..own_stop` of each head. One loop
    does both, because each loop waits for its first loads. With MASKED, a row attends to the keys
    up to its query's position. With WRITE_DQ, each pair's part of dq is written.
    """
    dim, rows = tl.arange(0, D), group * q_len
    heads = group
    if SHARED:  # rows of a few queries follow each other
        own_start, own_stop, heads = own_start * group, own_stop * group, 1
    pair_steps, own_steps = tl.cdiv(stop - first, TILE_M), tl.cdiv(own_stop - own_start, TILE_M)
    for step in tl.range(0, pair_steps + heads * own_steps, num_stages=STAGES):
        is_pair = step < pair_steps
        own_step = step - pair_steps
        start, end = own_start, own_stop
        if GROUPED and not SHARED:
            head = own_step // tl.maximum(own_steps, 1)
            own_step -= head * own_steps
            start, end = start + head * q_len, end + head * q_len
        # In the stats, pairs come after the rows.
        at = tl.where(is_pair, rows + first + step * TILE_M, start + own_step * TILE_M)
        end = tl.where(is_pair, rows + stop, end)
        place = at + tl.arange(0, TILE_M)
        exists = place < end
        # Past the end the last row is read again, which is cheaper than a mask: with lse = inf its
        # weights are exp2(-inf) = 0.
        stats_ptrs = stats_ptr + tl.minimum(place, end - 1)[:, None].to(tl.int64) * 4
        stats = tl.load(stats_ptrs + tl.arange(0, 4)[None, :])
        lse, delta, query, head_in_group = _unpack(stats)
        lse = tl.where(exists, lse, float("inf"))
        q_ptrs = _rows_to_ptrs(q_ptr, head_in_group, query, stride_qh, stride_qm, GROUPED, D)
        grad_ptrs = _rows_to_ptrs(
            grad_ptr, head_in_group, query, stride_gh, stride_gm, GROUPED, DV
        )
        q = _load_vectors(q_ptrs, HEAD_DIM, D)
        grad = _load_vectors(grad_ptrs, VALUE_DIM, DV)
        score = tl.dot(k, q.T, input_precision=PRECISION)
        dweight = tl.dot(v, grad.T, input_precision=PRECISION)
        if SOFTCAP:
            score, slope = _cap(score, scale, cap, PRECISION)
        else:
            score, slope = score * scale, 1.0
        weight = tl.exp2(score - lse[None, :])
        if MASKED:
            weight = tl.where(key[:, None] <= (query + offset)[None, :], weight, 0.0)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dscore = (weight * (dweight - delta[None, :]) * slope).to(q.dtype)
        dk = tl.dot(dscore, q, dk, input_precision=PRECISION)
        if WRITE_DQ:
            dq = tl.dot(dscore.T, k, input_precision=PRECISION)
            pair = (place - rows)[:, None]
            part_ptrs = part_ptr + pair.to(tl.int64) * HEAD_DIM + dim[None, :]
            written = (exists & is_pair)[:, None] & (dim < HEAD_DIM)[None, :]
            tl.store(part_ptrs, dq.to(part_ptr.dtype.element_ty), mask=written)
    return dk, dv


@triton.jit
def _spill_places(  # type: ignore[no-untyped-def]
    slot, within, num_spills, tiles_per_block, D: tl.constexpr, DV: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    """Return where the sums of dk and of dv of a tile of keys lie; see `dkv_kernel`.

    Each list has `2 * num_spills` slots: one for each spilled share and, from `num_spills` on, one
    for the first share of each block that spills.
    """
    keys = tiles_per_block * TILE_N
    place = (tl.program_id(1) * 2 * num_spills + slot).to(tl.int64) * keys * (D + DV)
    key = (within + tl.arange(0, TILE_N))[:, None]
    dk_places = place + key * D + tl.arange(0, D)[None, :]
    dv_places = place + keys * D + key * DV + tl.arange(0, DV)[None, :]
    return dk_places, dv_places


@triton.jit(do_not_specialize=_SIZES)
def dkv_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, part_ptr, first_pair_ptr, spill_block_ptr,
    first_spill_ptr, queries_ptr, extents_ptr, owners_ptr, spill_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb,
    stride_dvh, stride_dvn,
    first_list, num_kv_heads, group, q_len, kv_len, num_blocks, block_size, num_pairs, picks,
    scale, cap, table_rows, num_spills, tiles_per_block, share,
    CAUSAL: tl.constexpr, WRITE_DQ: tl.constexpr, GROUPED: tl.constexpr, SHARED: tl.constexpr,
    TABLES: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    VALUE_DIM: tl.constexpr, DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a tile of keys, which lies within one block.

    A program handles the first `share` pairs of the block and the queries whose own block it is.
    If more queries chose the block, each further share of its pairs spills to a program of its
    own; these programs start first. `dkv_sum_kernel` adds up the sums of such a block.
    """
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)  # float64 if traced
    list_id = first_list + tl.program_id(1)
    item = tl.program_id(0) // tiles_per_block
    within = tl.program_id(0) % tiles_per_block * TILE_N
    first_pair_ptr += list_id * (num_blocks + 1)
    first_spill_ptr += list_id * (num_blocks + 1)
    block, slot, number = item - num_spills, item, 0
    if item < num_spills:
        block = tl.load(spill_block_ptr + list_id * num_spills + item)
        if block >= num_blocks:
            return
        number = item - tl.load(first_spill_ptr + block) + 1
    else:
        slot = num_spills + tl.load(first_spill_ptr + block)
    shared = tl.load(first_spill_ptr + block) < tl.load(first_spill_ptr + block + 1)
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    block_start = block * block_size
    block_stop = tl.minimum(block_start + block_size, kv_len)
    # The queries whose own block this is; query i is at position i + offset.
    offset = kv_len - q_len
    own_first = tl.maximum(block_start - offset, 0)
    own_after = tl.maximum(block_stop - offset, own_first)
    if TABLES:
        entry = batch % table_rows * num_blocks + block
        block_start = tl.load(extents_ptr + entry)
        block_stop = tl.load(extents_ptr + table_rows * num_blocks + entry)
        own_first = tl.load(owners_ptr + entry)
        own_after = tl.load(owners_ptr + table_rows * num_blocks + entry)
        position_ptr = queries_ptr + batch % table_rows * q_len + own_first
        offset = tl.load(position_ptr, mask=own_first < own_after, other=0) - own_first
    start = block_start + within
    if start >= block_stop:
        return
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k = _load_keys(k_ptr, stride_kn, start, block_stop, HEAD_DIM, D, TILE_N, True)
    v = _load_keys(v_ptr, stride_vn, start, block_stop, VALUE_DIM, DV, TILE_N, True)
    q_ptr += batch * stride_qb + head * group * stride_qh
    grad_ptr += batch * stride_gb + head * group * stride_gh
    stats_ptr += tl.program_id(1).to(tl.int64) * (group * q_len + num_pairs) * 4
    part_ptr += tl.program_id(1).to(tl.int64) * num_pairs * HEAD_DIM

    dk = tl.zeros([TILE_N, D], tl.float32)
    dv = tl.zeros([TILE_N, DV], tl.float32)
    first = tl.load(first_pair_ptr + block) + number * share
    stop = tl.minimum(first + share, tl.load(first_pair_ptr + block + 1))
    # If causal, queries before the first key of the tile see none of its keys, those up to
    # `see_all` some, and the others all.
    key = start + tl.arange(0, TILE_N)
    own_start = tl.maximum(start - offset, own_first) if CAUSAL else own_first
    own_stop = tl.maximum(own_after, own_start) if number == 0 else own_start
    see_all = own_start
    if CAUSAL:
        see_all = tl.minimum(tl.maximum(start + TILE_N - offset, own_start), own_stop)
        dk, dv = _add_rows(
            dk, dv, k, v, 0, 0, own_start, see_all, q_ptr, grad_ptr, stats_ptr, part_ptr,
            stride_qh, stride_qm, stride_gh, stride_gm, group, q_len, scale, cap, key, offset,
            True, False, GROUPED, SHARED, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_M, PRECISION,
            STAGES,
        )  # fmt: skip
    dk, dv = _add_rows(
        dk, dv, k, v, first, stop, see_all, own_stop, q_ptr, grad_ptr, stats_ptr, part_ptr,
        stride_qh, stride_qm, stride_gh, stride_gm, group, q_len, scale, cap, key, offset, False,
        WRITE_DQ, GROUPED, SHARED, SOFTCAP, HEAD_DIM, D, VALUE_DIM, DV, TILE_M, PRECISION, STAGES,
    )  # fmt: skip

    if shared:
        dk_places, dv_places = _spill_places(
            slot, within, num_spills, tiles_per_block, D, DV, TILE_N
        )
        tl.store(spill_ptr + dk_places, dk)
        tl.store(spill_ptr + dv_places, dv)
    else:
        dim, value_dim = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
        row, exists = key[:, None].to(tl.int64), (key < block_stop)[:, None]
        dk_ptrs = dk_ptr + batch * stride_dkb + head * stride_dkh + row * stride_dkn + dim
        dv_ptrs = dv_ptr + batch * stride_dvb + head * stride_dvh + row * stride_dvn + value_dim
        scaled = (dk * (scale * LN_2)).to(dk_ptr.dtype.element_ty)
        tl.store(dk_ptrs, scaled, mask=exists & (dim < HEAD_DIM))
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=exists & (value_dim < VALUE_DIM))


@triton.jit(do_not_specialize=_SIZES)
def dkv_sum_kernel(  # type: ignore[no-untyped-def]
    spill_block_ptr, first_spill_ptr, extents_ptr, spill_ptr, dk_ptr, dv_ptr,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    first_list, num_kv_heads, kv_len, num_blocks, block_size, scale, table_rows, num_spills,
    tiles_per_block,
    TABLES: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr,
    DV: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Add up the shares' sums of dk and dv of a block, in the program of its first spill."""
    scale = tl.cast(scale, tl.float32)  # float64 if traced
    list_id = first_list + tl.program_id(1)
    item = tl.program_id(0) // tiles_per_block
    within = tl.program_id(0) % tiles_per_block * TILE_N
    block = tl.load(spill_block_ptr + list_id * num_spills + item)
    if block >= num_blocks:
        return
    first_spill_ptr += list_id * (num_blocks + 1)
    if item > tl.load(first_spill_ptr + block):
        return
    dk_places, dv_places = _spill_places(
        num_spills + item, within, num_spills, tiles_per_block, D, DV, TILE_N
    )
    dk, dv = tl.load(spill_ptr + dk_places), tl.load(spill_ptr + dv_places)
    for spill in range(item, tl.load(first_spill_ptr + block + 1)):
        dk_places, dv_places = _spill_places(
            spill, within, num_spills, tiles_per_block, D, DV, TILE_N
        )
        dk += tl.load(spill_ptr + dk_places)
        dv += tl.load(spill_ptr + dv_places)
    batch = (list_id // num_kv_heads).to(tl.int64)
    head = (list_id % num_kv_heads).to(tl.int64)
    block_start = block * block_size
    block_stop = tl.minimum(block_start + block_size, kv_len)
    if TABLES:
        extents_ptr += batch % table_rows * num_blocks + block
        block_start = tl.load(extents_ptr)
        block_stop = tl.load(extents_ptr + table_rows * num_blocks)
    key = block_start + within + tl.arange(0, TILE_N)[:, None]
    row, exists = key.to(tl.int64), key < block_stop
    dim, value_dim = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    dk_ptrs = dk_ptr + batch * stride_dkb + head * stride_dkh + row * stride_dkn + dim
    dv_ptrs = dv_ptr + batch * stride_dvb + head * stride_dvh + row * stride_dvn + value_dim
    scaled = (dk * (scale * LN_2)).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptrs, scaled, mask=exists & (dim < HEAD_DIM))
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=exists & (value_dim < VALUE_DIM))
