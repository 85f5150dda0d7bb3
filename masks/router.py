"""The gate: which blocks each query attends to."""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import while_loop

from moba_flex.masks._torch.exporting import is_exporting
from moba_flex.masks.checks import check_qk, check_tables
from moba_flex.masks.layout import Layout, ceil_div, plain_coordinates
from moba_flex.masks.pool import pool
from moba_flex.masks.request import Gate, GateOptions, Request
from moba_flex.masks.routing import Routing

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.router_kernel import choose_triton

# Up to so many queries of a key/value head, products with block keys as the first factor are
# several times as fast.
_FEW_ROWS = 64
# Scores held at a time by the gate on CPU: 2**22 of them are 32 MiB of float64.
_CPU_CHUNK = 1 << 22
# Queries that are worth a step of the gate, however short their documents are.
_LEAST_CHUNK = 256
# Queries of a head whose scores an exported gate holds at a time.
_CHUNK = 512


def route(
    q: Tensor, k: Tensor, *, tables: Layout | None = None, **options: Unpack[GateOptions]
) -> Routing:
    """Choose the blocks with the highest affinity (arXiv 2502.13189, equations 5 to 7).

    The affinity of a query and a block is the raw dot product of the query and the block's mean
    key. Candidates are the blocks wholly before the query's own (any other block if not causal).
    Of two equal affinities the more recent block wins; NaN counts as lowest. No gradient flows
    through the choice.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        tables: Where blocks lie, as of `make_tables`, if rows are packed documents or are padded.
        options: `block_size`, `top_k`, `sink_blocks`, `local_blocks`, `causal` and `head_top_k`,
            as of `moba_flex.moba_attention`.

    Returns:
        The routing; for each query it lists the `min(top_k, ceil(KV / block_size)) - 1` blocks
        beside its own.

    Raises:
        ValueError: A shape, a device or an option is out of range, or the tables are of another
            request.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
        >>> route(q, k, block_size=8, top_k=3).blocks.shape
        torch.Size([1, 2, 64, 2])
    """
    check_qk(q, k)
    gate = Gate(**options)
    gate.check_heads(q)
    check_tables("tables", tables, q, k, gate)
    layout = tables or Layout(q.shape[2], k.shape[2], gate.block_size, gate.causal)
    return choose(q, pool(k, layout), gate, layout)


def route_request(request: Request) -> Routing:
    """Return which blocks each head attends to: those that are named, or those of the gate."""
    if request.routing is not None:
        return request.routing.for_heads(request.q.shape[1])
    q, gate, layout = request.q, request.gate, request.find_layout()
    assert gate is not None
    if gate.top_k == 1:  # own blocks alone
        return Routing.over(layout, q.new_empty((*q.shape[:3], 0), dtype=torch.int32))
    block_keys = request.block_keys
    if block_keys is None:
        block_keys = pool(request.k, layout)
    return choose(q, block_keys, gate, layout)


def choose(q: Tensor, block_keys: Tensor, gate: Gate, layout: Layout) -> Routing:
    """Choose the blocks whose keys have the highest affinity; see `route`.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        block_keys: Mean keys, `[B, Hkv, N, D]`.
        gate: How many blocks to choose.
        layout: Where queries and blocks lie.
    """
    blocks = choose_by_numbers(q, block_keys, numbers_of(gate, layout), gate.head_top_k, layout)
    return Routing.over(layout, blocks)


def choose_by_numbers(
    q: Tensor,
    block_keys: Tensor,
    numbers: tuple[int, int, int, int],
    head_top_k: Tensor | None,
    layout: Layout,
) -> Tensor:
    """Return the `blocks` of `choose`; `numbers` are those of `numbers_of`."""
    with torch.no_grad():
        if is_exporting() and not q.is_cuda:  # rows are plain: see compile/plans.py
            return choose_portable(q, block_keys, layout, numbers)
        choose_here = choose_triton if q.is_cuda else choose_cpu
        place = layout.q_offset, layout.queries
        return choose_here(q, block_keys, numbers, layout.causal, head_top_k, *place)


def numbers_of(gate: Gate, layout: Layout) -> tuple[int, int, int, int]:
    """Return how many blocks to choose at most, and three numbers of the gate."""
    return _picks(gate, layout), gate.block_size, gate.sink_blocks, gate.local_blocks


def _picks(gate: Gate, layout: Layout) -> int:
    """Return how many blocks beside its own a query has room for."""
    most = ceil_div(layout.kv_len, gate.block_size)
    if is_exporting() and not isinstance(most, int):
        return gate.top_k - 1  # at any length: picks that find no block are "none"
    # A number under dynamic shapes too, where `min` and `int` would leave an expression.
    return (gate.top_k if gate.top_k <= most else len(range(most)) or 1) - 1


@torch.library.custom_op("moba_flex::choose_cpu", mutates_args=(), device_types="cpu")
def choose_cpu(
    q: Tensor,
    block_keys: Tensor,
    numbers: Sequence[int],
    causal: bool,
    head_top_k: Tensor | None,
    q_offset: int,
    queries: Tensor | None,
) -> Tensor:
    """Choose blocks besides the own one, for a chunk of queries at a time.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        block_keys: Mean keys, `[B, Hkv, N, D]`.
        numbers: How many blocks to choose at most, and `block_size`, `sink_blocks` and
            `local_blocks` of the gate.
        causal: Whether only blocks before the own one are candidates.
        head_top_k: Blocks that each head attends to, its own included, int `[Hq]` or `[B, Hq]`.
        q_offset: Position of the first query, if rows are plain.
        queries: Those of `Layout`, if rows are packed documents or are padded.

    Returns:
        int32 `[B, Hq, Q, picks]`, ascending; the number of blocks, `N`, stands for none.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, num_blocks = block_keys.shape[1:3]
    picks, block_size, sink_blocks, local_blocks = numbers
    forced = sink_blocks, local_blocks
    chosen = q.new_full((batch, num_heads, q_len, picks), num_blocks, dtype=torch.int32)
    if chosen.numel() == 0:
        return chosen
    plain = queries is None
    if queries is None:
        position = torch.arange(q_offset, q_offset + q_len)
        starts = torch.arange(num_blocks) * block_size
        queries = torch.stack(plain_coordinates(position, starts, causal)).unsqueeze(1)
    grouped = q.view(batch, num_kv_heads, -1, q_len, head_dim)
    # float64 leaves one rounding, to float32, so that equal block keys tie whatever kernel BLAS
    # picks for a column.
    exact_keys = block_keys.double()
    candidates = _Candidates(*forced, causal, head_top_k, num_blocks, plain)
    for start, stop, low, high in _chunks(queries, batch * num_heads, block_size):
        rows, keys = grouped[:, :, :, start:stop].double(), exact_keys[:, :, low:high]
        if (stop - start) * rows.shape[2] <= _FEW_ROWS:
            affinity = (keys @ rows.flatten(2, 3).mT).mT.float().contiguous()
            affinity = affinity.unflatten(2, rows.shape[2:4])
        else:
            affinity = (rows @ keys.mT.unsqueeze(2)).float()
        width = min(picks, high - low)
        some = queries[:, :, start:stop]
        best = _top_blocks(affinity.flatten(1, 2), some, low, width, candidates)
        chosen[:, :, start:stop, : best.shape[3]] = best
    return chosen


@choose_cpu.register_fake
def _shape_of_choice(q: Tensor, block_keys: Tensor, numbers: Sequence[int], *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], numbers[0]), dtype=torch.int32)


def _chunks(queries: Tensor, lists: int, block_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut queries into chunks, and say for each which blocks low..high hold all candidates.

    A chunk of many documents is about as long as the longest, so that few scores are of a query
    and a block that belong to different ones.
    """
    _, _, oldest, newest = queries
    most = int((newest - oldest).max()) + 1  # candidates of one query
    if most <= 0:
        return
    limit = max(1, _CPU_CHUNK // (lists * most))
    size = min(limit, max(_LEAST_CHUNK, most * block_size))
    for start in range(0, queries.shape[2], size):
        stop = min(start + size, queries.shape[2])
        any_candidate = (oldest <= newest)[:, start:stop]
        if any_candidate.any():
            low = int(oldest[:, start:stop][any_candidate].min())
            high = int(newest[:, start:stop][any_candidate].max()) + 1
            yield start, stop, low, high


class _Candidates(NamedTuple):
    """Which blocks can be chosen, and which must.

    Attributes:
        sink_blocks: First blocks of a sequence that are forced.
        local_blocks: Blocks before the own one that are forced.
        causal: Whether only blocks before the own one are candidates.
        head_top_k: Blocks that each head attends to, int `[Hq]` or `[B, Hq]`.
        none: The number that stands for no block.
        plain: Whether rows are one sequence each, so that the first block is the oldest candidate
            of every query.
    """

    sink_blocks: int
    local_blocks: int
    causal: bool
    head_top_k: Tensor | None
    none: int
    plain: bool


def _top_blocks(
    affinity: Tensor, queries: Tensor, low: int, width: int, candidates: _Candidates
) -> Tensor:
    """Return the `width` best blocks of each row of `affinity`, ascending, `none` last.

    Affinity and block number make one integer key, in which no two blocks are equal and the more
    recent of two equal affinities is the larger.

    Args:
        affinity: That of queries and blocks from `low` on, `[B, Hq, Q, n]`.
        queries: Those of `Layout`, `[4, R, Q]`.
        low: Number of the first block.
        width: Blocks to return, at most `n`.
        candidates: Which blocks can be chosen.
    """
    largest = torch.finfo(torch.float32).max
    # Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0.
    bits = (
        affinity.nan_to_num_(nan=-largest, posinf=largest, neginf=-largest)
        .add_(0.0)
        .view(torch.int32)
    )
    block = torch.arange(low, low + affinity.shape[-1])
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | block
    _, own, oldest, newest = queries.long()[:, :, None, :, None]
    if candidates.sink_blocks or candidates.local_blocks:
        forced = (block < own) & (block >= own - candidates.local_blocks)
        forced = forced | (block < oldest + candidates.sink_blocks)
        key = torch.where(forced, torch.iinfo(torch.int64).max - 0xFFFFFFFF | block, key)
    candidate = block <= newest
    if not candidates.causal:
        candidate = candidate & (block != own)
    if not candidates.plain and (oldest > low).any():
        candidate = candidate & (block >= oldest)
    lowest = torch.iinfo(torch.int64).min
    key = torch.where(candidate, key, lowest)
    best = key.topk(width, dim=-1, sorted=candidates.head_top_k is not None).values
    none = best == lowest
    if candidates.head_top_k is not None:
        none = none | (torch.arange(width) >= candidates.head_top_k[..., None, None] - 1)
    best = torch.where(none, candidates.none, best & 0xFFFFFFFF)
    return best.int().sort(dim=-1).values


def choose_portable(
    q: Tensor, block_keys: Tensor, layout: Layout, numbers: Sequence[int]
) -> Tensor:
    """Do what `choose_cpu` does, for as many picks as there may be blocks at some length."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, num_blocks = block_keys.shape[1:3]
    picks, block_size, sink_blocks, local_blocks = numbers
    forced = sink_blocks, local_blocks
    q_offset, causal = layout.q_offset, layout.causal
    # Columns that are no candidates: then every length has `picks` of them.
    columns = F.pad(block_keys, (0, 0, 0, picks)).double().mT.unsqueeze(2)
    grouped = q.reshape(batch, num_kv_heads, -1, q_len, head_dim)
    candidates = _Candidates(*forced, causal, None, num_blocks, plain=True)
    starts = torch.arange(num_blocks, device=q.device) * block_size

    def choose_chunk(some: Tensor, first: int | Tensor) -> Tensor:
        position = torch.arange(some.shape[3], device=q.device) + first + q_offset
        queries = torch.stack(plain_coordinates(position, starts, causal)).unsqueeze(1)
        affinity = (some.double() @ columns).float().flatten(1, 2)
        return _top_blocks(affinity, queries, 0, picks, candidates)

    if isinstance(q_len, int) and q_len <= _CHUNK:
        return choose_chunk(grouped, 0)
    chunks = ceil_div(q_len, _CHUNK)
    padded = F.pad(grouped, (0, 0, 0, chunks * _CHUNK - q_len))

    def more(chunk: Tensor, chosen: Tensor) -> Tensor:
        return chunk < chunks

    def step(chunk: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        first = chunk * _CHUNK
        rows = torch.arange(_CHUNK, device=q.device) + first
        best = choose_chunk(padded.index_select(3, rows), first)
        return chunk + 1, chosen.index_copy(2, rows, best)

    start = torch.zeros((), dtype=torch.int64, device=q.device)
    room = q.new_zeros((batch, num_heads, chunks * _CHUNK, picks), dtype=torch.int32)
    _, chosen = while_loop(more, step, (start, room))
    # Not a slice, whose length would be an expression that slows down the compiler in all that
    # follows.
    return chosen.index_select(2, torch.arange(q_len, device=q.device))
