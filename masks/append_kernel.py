"""Append keys and values to a cache on CUDA: one launch writes them and updates block keys."""

import triton
import triton.language as tl
from torch import Tensor

from moba_flex.masks._torch.exporting import is_traced
from moba_flex.masks._torch.kernel_op import kernel_op, launch, power_of_2, wrap_triton
from moba_flex.masks.pool_kernel import add_keys

# The most keys that are loaded at a time.
_MOST_AHEAD = 64

# Arguments that vary with lengths: Triton would compile anew where 16 divides them.
_SIZES = [
    "num_heads", "num_new", "touched", "num_blocks", "block_size", "num_slots", "page_size",
    "num_pages", "table_width", "stride_counter",
]  # fmt: skip


@triton.jit
def append_block(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, sums_ptr, block_keys_ptr, k_ptr, v_ptr, table_ptr,
    stride_keys_b, stride_keys_h, stride_keys_n, stride_keys_d,
    stride_values_b, stride_values_h, stride_values_n, stride_values_d,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    batch, head, number, first, low, high,
    num_heads, num_blocks, block_size, num_slots, page_size, num_pages, table_width,
    PAGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write those of the new keys and values that lie in one block, and add up its keys in order.

    The new keys go to the slots from `low` to `high` of a row, whose first key is in slot `first`.
    The block is the `number`-th of those that they touch.
    """
    tl.device_assert(high <= num_slots, "max_len must be at least the slots of each row")
    high = tl.minimum(high, num_slots)
    # Blocks before `first` hold padding alone, and count down from -1.
    shifted = low - first
    block = shifted // block_size - (shifted % block_size < 0).to(tl.int32) + number
    begin = first + block * block_size
    dim, value_dim = tl.arange(0, HEAD_DIM_PADDED), tl.arange(0, VALUE_DIM_PADDED)
    where, number_of_block, moved = batch, block, tl.zeros_like(batch)
    if PAGED:  # a page holds whole blocks
        page = begin // page_size
        table_ptr += batch * table_width + page
        where = tl.load(table_ptr, mask=begin < high, other=0).to(tl.int64)
        tl.device_assert((where >= 0) & (where < num_pages), "block_table must name pages")
        number_of_block, moved = block % num_blocks, page.to(tl.int64) * page_size
    keys_ptr += where * stride_keys_b + head * stride_keys_h
    values_ptr += where * stride_values_b + head * stride_values_h
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh

    out = (where * num_heads + head) * num_blocks + number_of_block
    block_keys_ptr += out * HEAD_DIM + dim
    sums_ptr += out * (HEAD_DIM + 1)
    from_slot, to_slot = tl.maximum(begin, low), tl.minimum(begin + block_size, high)
    going_on = (block >= 0) & (from_slot > begin) & (from_slot < to_slot)
    total = tl.load(sums_ptr + dim, mask=going_on & (dim < HEAD_DIM), other=0.0)
    added = tl.load(sums_ptr + HEAD_DIM, mask=going_on, other=0.0)
    if going_on & (added != (from_slot - begin).to(tl.float32)):  # lengths were changed since
        total = add_keys(
            tl.zeros_like(total), keys_ptr + dim * stride_keys_d, stride_keys_n, begin - moved,
            from_slot - moved, dim < HEAD_DIM, AHEAD,
        )  # fmt: skip
    total = add_keys(
        total, k_ptr + dim * stride_kd, stride_kn, from_slot - low, to_slot - low, dim < HEAD_DIM,
        AHEAD,
    )  # fmt: skip
    for at in range(from_slot, to_slot, AHEAD):
        slot = at + tl.arange(0, AHEAD).to(tl.int64)
        new, place = (slot - low)[:, None], (slot - moved)[:, None]
        exists = (slot < to_slot)[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(k_ptr + new * stride_kn + dim[None, :] * stride_kd, mask=exists)
        exists_value = (slot < to_slot)[:, None] & (value_dim < VALUE_DIM)[None, :]
        value_ptrs = v_ptr + new * stride_vn + value_dim[None, :] * stride_vd
        value = tl.load(value_ptrs, mask=exists_value)
        key_ptrs = keys_ptr + place * stride_keys_n + dim[None, :] * stride_keys_d
        tl.store(key_ptrs, key, mask=exists)
        value_ptrs = values_ptr + place * stride_values_n + value_dim[None, :] * stride_values_d
        tl.store(value_ptrs, value, mask=exists_value)
    count = tl.maximum(to_slot - begin, 1).to(tl.float32)
    written = (block >= 0) & (from_slot < to_slot)
    tl.store(sums_ptr + dim, total, mask=written & (dim < HEAD_DIM))
    tl.store(sums_ptr + HEAD_DIM, count, mask=written)
    # Triton's own division of float32 is approximate.
    mean = tl.div_rn(total, count + tl.zeros_like(total))
    mean = mean.to(block_keys_ptr.dtype.element_ty)
    tl.store(block_keys_ptr, mean, mask=written & (dim < HEAD_DIM))


@triton.jit(do_not_specialize=_SIZES, debug=True)  # for its assertions
def append_kernel(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, sums_ptr, block_keys_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, counts_ptr,
    counter_ptr, table_ptr,
    stride_keys_b, stride_keys_h, stride_keys_n, stride_keys_d,
    stride_values_b, stride_values_h, stride_values_n, stride_values_d,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, num_new, touched, num_blocks, block_size, num_slots, page_size, num_pages,
    table_width, stride_counter,
    COUNTS: tl.constexpr, PAGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Append to one block.

    The last program of a row of the batch moves its `stop`, which all others have read by then.
    """
    index = tl.program_id(0) // touched
    batch = (index // num_heads).to(tl.int64)
    head = (index % num_heads).to(tl.int64)
    first, low = tl.load(start_ptr + batch), tl.load(stop_ptr + batch)
    high = low + num_new
    if COUNTS:
        high = low + tl.load(counts_ptr + batch)
    append_block(
        keys_ptr, values_ptr, sums_ptr, block_keys_ptr, k_ptr, v_ptr, table_ptr,
        stride_keys_b, stride_keys_h, stride_keys_n, stride_keys_d,
        stride_values_b, stride_values_h, stride_values_n, stride_values_d,
        stride_kb, stride_kh, stride_kn, stride_kd,
        stride_vb, stride_vh, stride_vn, stride_vd,
        batch, head, tl.program_id(0) % touched, first, low, high,
        num_heads, num_blocks, block_size, num_slots, page_size, num_pages, table_width,
        PAGED, HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED, AHEAD,
    )  # fmt: skip
    counter_ptr += batch * stride_counter
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1) == num_heads * touched - 1:
        tl.store(stop_ptr + batch, high)
        tl.store(counter_ptr, 0)


def blocks_touched(num_new: int, block_size: int) -> int:
    """Return as many blocks as `num_new` slots can touch, wherever they lie."""
    return (num_new + block_size - 2) // block_size + 1


def keys_ahead(num_new: int, block_size: int) -> int:
    """Return how many keys to load at a time."""
    return min(_MOST_AHEAD, power_of_2(min(num_new, block_size)))


@kernel_op(
    "moba_flex::append_triton",
    mutates=("keys", "values", "sums", "block_keys", "stop", "counters"),
)
def append_triton(
    keys: Tensor,
    values: Tensor,
    sums: Tensor,
    block_keys: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    counters: Tensor,
    counts: Tensor | None,
    table: Tensor | None,
    block_size: int,
) -> None:
    """Do what `moba_flex.masks.append.append` says."""
    batch, num_heads, num_new, head_dim = k.shape
    value_dim, width = v.shape[3], 1 if table is None else table.shape[1]
    if batch * num_heads * num_new == 0:
        return
    touched, ahead = blocks_touched(num_new, block_size), keys_ahead(num_new, block_size)
    launch(
        wrap_triton(append_kernel),
        (touched * batch * num_heads,),
        *(keys, values, sums, block_keys, k, v, start, stop),
        start if counts is None else counts,  # a placeholder, which the kernel does not read
        counters,
        start if table is None else table.contiguous(),
        *(stride for x in (keys, values, k, v) for stride in x.stride()),
        num_heads,
        num_new,
        touched,
        sums.shape[2],
        block_size,
        keys.shape[2] * width,
        keys.shape[2],
        keys.shape[0],
        width,
        counters.stride(0),
        COUNTS=counts is not None,
        PAGED=table is not None,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=power_of_2(head_dim),
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=power_of_2(value_dim),
        AHEAD=ahead,
        num_warps=4 if ahead > 8 else 1,
        # Else `debug` checks each sum of integers too.
        **({} if is_traced() else {"sanitize_overflow": False}),
    )
