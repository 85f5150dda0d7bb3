"""Append keys and values to a cache, and keep its block keys up to date."""

import importlib.util

import torch
from torch import Tensor

from moba_flex.masks.layout import ceil_div, join_pages
from moba_flex.masks.pool import sum_blocks

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.append_kernel import append_triton

MOST_ROWS = 64
"""Queries that share a key/value head, up to which one op chooses blocks and attends."""


def count_programs(rows: Tensor, num_kv_heads: int) -> Tensor:
    """Return zeros in which the programs of kernels count, for the rows of a cache."""
    return rows.new_zeros(rows.shape[0], 1 + num_kv_heads * (1 + MOST_ROWS), dtype=torch.int32)


def append(
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
    """Write keys and values into a cache, and add the keys to the sums of their blocks.

    A block's keys are added in float32, one after another, in whatever chunks they come. So block
    keys have the bits that `pool` gives them. Each sum has the number of its keys beside it. If
    `stop` was lowered since, a block holds fewer keys, and `append` adds these up anew.

    Args:
        keys: The cache's keys, `[B, Hkv, S, D]`; written to.
        values: The cache's values, `[B, Hkv, S, Dv]`; written to.
        sums: Sums of each block's keys, and their numbers, float32 `[B, Hkv, N, D + 1]`; written
            to.
        block_keys: Mean keys of the blocks, `[B, Hkv, N, D]`; written to.
        k: New keys, `[B, Hkv, T, D]`.
        v: New values, `[B, Hkv, T, Dv]`.
        start: Slot of each row's first key, int32 `[B]`. What lies before it is no key.
        stop: Slot of each row that the first new key goes to, int32 `[B]`; moved behind the last.
        counters: Zeros, int32 `[B, ...]`, in which programs of the kernel count themselves.
        counts: How many of the new keys each row takes, int32 `[B]`; None for all.
        table: Page of each `page_size` slots of a row, int32 `[B, W]`. The first four tensors then
            hold pages, `[P, Hkv, page_size, D]` and the like. None for rows in one piece.
        block_size: Keys per block.
    """
    here = append_triton if k.is_cuda else append_cpu
    with torch.no_grad():
        here(
            keys, values, sums, block_keys, k, v, start, stop, counters, counts, table, block_size
        )


@torch.library.custom_op(
    "moba_flex::append_cpu",
    mutates_args=("keys", "values", "sums", "block_keys", "stop", "counters"),
    device_types="cpu",
)
def append_cpu(
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
    """Do what `append` says, row by row."""
    num_new, memory, page_size = k.shape[2], (keys, values, sums, block_keys), keys.shape[2]
    taken = [num_new] * k.shape[0] if counts is None else counts.tolist()
    places = list(zip(start.tolist(), stop.tolist(), taken, strict=True))
    pages_of = []
    if table is not None:  # the pages that are written to, checked before any is
        for row, (_, low, count) in zip(table.long(), places, strict=True):
            pages = row[low // page_size : ceil_div(low + count, page_size)] if count else row[:0]
            require_pages(pages, keys.shape[0])
            pages_of.append(pages)
    for b, (first, low, count) in enumerate(places):
        if count == 0:
            continue
        if table is None:
            rows = tuple(x[b] for x in memory)
        else:
            pages, low = pages_of[b], low % page_size
            rows = tuple(join_pages(x, pages) for x in memory)
        rows[0][:, low : low + count] = k[b, :, :count]
        rows[1][:, low : low + count] = v[b, :, :count]
        skip = max(first - low, 0)  # padding before the first key
        if skip < count:
            keys = rows[0][:, first : low + count]
            _add(rows[2], rows[3], keys, low + skip - first, block_size)
        if table is not None:
            for x, row in zip(memory, rows, strict=True):
                x[pages] = row.unflatten(1, (pages.shape[0], -1)).transpose(0, 1)
    stop += num_new if counts is None else counts


def require_pages(pages: Tensor, num_pages: int) -> None:
    """Raise unless `pages` are numbers of pages.

    Raises:
        ValueError: There is no such page.
    """
    wrong = pages[(pages < 0) | (pages >= num_pages)]
    if wrong.numel():
        raise ValueError(
            f"block_table must name pages from 0 to {num_pages - 1}, got {wrong.tolist()}"
        )


@append_cpu.register_fake
def _nothing_to_return(*_: object) -> None:
    return None


def _add(sums: Tensor, block_keys: Tensor, keys: Tensor, place: int, block_size: int) -> None:
    """Add keys of one row to sums `[Hkv, N, D + 1]` and block keys `[Hkv, N, D]`.

    Args:
        sums: Written to.
        block_keys: Written to.
        keys: All keys of the row, `[Hkv, T, D]`.
        place: Number of keys before the new ones.
        block_size: Keys per block.
    """
    block, within = divmod(place, block_size)
    if within and bool((sums[:, block, -1] != within).any()):
        place, within = place - within, 0
    new = keys[:, place:].float()
    last = ceil_div(place + new.shape[1], block_size)
    before = sums[:, block : block + 1, :-1] if within else torch.zeros_like(new[:, :1])
    number: Tensor | int
    if new.shape[1] == 1:  # in a third of the time
        total, number = before + new, within + 1
    else:
        edges = torch.arange(block, last + 1) * block_size - place + 1
        edges[0], edges[-1] = 0, new.shape[1] + 1
        total = sum_blocks(torch.cat((before, new), dim=1), edges.expand(new.shape[0], -1))
        number = edges.diff()[:, None]
        number[0] += within - 1
    # An interrupt between the two leaves numbers that the next append does not expect, so that it
    # adds up anew.
    sums[:, block:last, -1:] = number
    sums[:, block:last, :-1] = total
    block_keys[:, block:last] = total / number
