"""The gate: which blocks each query attends to."""

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import while_loop

from moba_flex.masks.blocks import ceil_div, pool_keys
from moba_flex.masks.checks import (
    check_bool,
    check_gate,
    check_head_top_k,
    check_qk,
    check_tables,
)
from moba_flex.masks.exporting import is_exporting
from moba_flex.masks.layout import Tables, plain_queries, plain_tables
from moba_flex.masks.routing import Routing

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.router_kernel import gate_triton

# Scores held at a time by the gate on CPU: 2**22 of them are 32 MiB of float64.
_CPU_CHUNK = 1 << 22
# Queries that are worth a step of the gate, however short their documents are.
_LEAST_CHUNK = 256
# Queries of a head whose scores an exported gate holds at a time.
_CHUNK = 512


def route(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    head_top_k: Tensor | None = None,
    tables: Tables | None = None,
) -> Routing:
    """Choose the blocks with the highest affinity (arXiv 2502.13189, equations 5 to 7).

    The affinity of a query and a block is the raw dot product of the query and the block's mean
    key. Candidates are the blocks wholly before the query's own (any other block if not causal).
    Of two equal affinities the more recent block wins; NaN counts as lowest. No gradient flows
    through the choice.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included; more than there are means all.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one that are always chosen; they count in
            `top_k`.
        causal: Whether only past blocks are candidates.
        head_top_k: Of each head the blocks that it attends to, int `[Hq]`, each at most `top_k`;
            None for `top_k` everywhere.
        tables: Where blocks lie, if rows are packed documents or are padded.

    Returns:
        The routing; of each query it lists the `min(top_k, ceil(KV / block_size)) - 1` blocks
        beside its own.

    Raises:
        ValueError: A shape, a device or an option is out of range, or the tables are of another
            request.
        TypeError: An argument has the wrong type.
    """
    check_qk(q, k)
    gate = check_gate(block_size, top_k, sink_blocks, local_blocks)
    check_head_top_k(head_top_k, q, *gate[1:])
    causal = check_bool("causal", causal)
    check_tables(tables, q, k, gate[0], causal)
    return choose_blocks(q, k, *gate, causal, head_top_k, tables)


def choose_blocks(
    q: Tensor,
    k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
    head_top_k: Tensor | None,
    tables: Tables | None,
) -> Routing:
    """Do what `route` does, of arguments that are checked."""
    with torch.no_grad():
        most, exporting = ceil_div(k.shape[2], block_size), is_exporting()
        if exporting and not isinstance(most, int):
            picks = top_k - 1  # whatever the length: picks that find no block are "none"
        else:
            # A number also under dynamic shapes, where `min` and `int` would leave an expression.
            picks = (top_k if top_k <= most else len(range(most)) or 1) - 1
        options = block_size, picks, sink_blocks, local_blocks, causal
        located = () if tables is None else (tables.queries, tables.extents)
        if q.is_cuda:
            blocks = gate_triton(q, k, *options, head_top_k, *located)
        elif exporting:  # of plain rows: see `check_export`
            blocks = gate_portable(q, k, *options)
        else:
            blocks = gate_cpu(q, k, *options, head_top_k, *located)
    return Routing(blocks, block_size, q.shape[2], k.shape[2], causal, tables)


@torch.library.custom_op("moba_flex::gate_cpu", mutates_args=(), device_types="cpu")
def gate_cpu(
    q: Tensor,
    k: Tensor,
    block_size: int,
    picks: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
    head_top_k: Tensor | None = None,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
) -> Tensor:
    """Choose at most `picks` blocks besides the own one, a chunk of queries at a time.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        block_size: Keys per block.
        picks: Blocks to choose.
        sink_blocks: First blocks of a sequence that are forced.
        local_blocks: Blocks before the own one that are forced.
        causal: Whether only blocks before the own one are candidates.
        head_top_k: Of each head the blocks to attend to, its own included, int `[Hq]`.
        queries: Of `Tables`, if rows are packed documents or are padded.
        extents: Likewise.

    Returns:
        int32 `[B, Hq, Q, picks]`, ascending; the number of blocks, `N`, stands for none.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads = k.shape[1]
    num_blocks = ceil_div(k.shape[2], block_size) if extents is None else extents.shape[2]
    chosen = q.new_full((batch, num_heads, q_len, picks), num_blocks, dtype=torch.int32)
    if chosen.numel() == 0:
        return chosen
    if queries is None or extents is None:
        queries = plain_tables(q_len, k.shape[2], block_size, causal, q.device).queries
    block_keys = pool_keys(k, block_size, extents)
    grouped = q.view(batch, num_kv_heads, -1, q_len, head_dim)
    # float64 leaves one rounding, to float32, so that equal block keys tie whatever kernel BLAS
    # picks for a column.
    columns = block_keys.double().mT.unsqueeze(2)
    gate = _Gate(sink_blocks, local_blocks, causal, head_top_k, num_blocks, extents is None)
    for start, stop, low, high in _chunks(queries, batch * num_heads, block_size):
        affinity = (grouped[:, :, :, start:stop].double() @ columns[..., low:high]).float()
        width = min(picks, high - low)
        best = _top_blocks(affinity.flatten(1, 2), queries[:, :, start:stop], low, width, gate)
        chosen[:, :, start:stop, : best.shape[3]] = best
    return chosen


@gate_cpu.register_fake
def _(
    q: Tensor,
    k: Tensor,
    block_size: int,
    picks: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
    head_top_k: Tensor | None = None,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
) -> Tensor:
    return q.new_empty((*q.shape[:3], picks), dtype=torch.int32)


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


class _Gate(NamedTuple):
    """Options of `gate_cpu`; `none`, the number that stands for no block; whether rows are whole.

    In whole rows, which are one sequence each, the first block is the oldest candidate of all.
    """

    sink_blocks: int
    local_blocks: int
    causal: bool
    head_top_k: Tensor | None
    none: int
    whole_rows: bool


def _top_blocks(affinity: Tensor, queries: Tensor, low: int, width: int, gate: _Gate) -> Tensor:
    """Return the `width` best blocks of each row of `affinity`, ascending, `none` last.

    Affinity and block number make one integer key, in which no two blocks are equal and the more
    recent of two equal affinities is the larger.

    Args:
        affinity: Of queries and blocks from `low` on, `[B, Hq, Q, n]`.
        queries: Of `Tables`, `[4, R, Q]`.
        low: Number of the first block.
        width: Blocks to return, at most `n`.
        gate: What to choose.
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
    if gate.sink_blocks or gate.local_blocks:
        forced = (block < own) & (block >= own - gate.local_blocks)
        forced = forced | (block < oldest + gate.sink_blocks)
        key = torch.where(forced, torch.iinfo(torch.int64).max - 0xFFFFFFFF | block, key)
    candidate = block <= newest
    if not gate.causal:
        candidate = candidate & (block != own)
    if not gate.whole_rows and (oldest > low).any():
        candidate = candidate & (block >= oldest)
    lowest = torch.iinfo(torch.int64).min
    key = torch.where(candidate, key, lowest)
    best = key.topk(width, dim=-1, sorted=gate.head_top_k is not None).values
    none = best == lowest
    if gate.head_top_k is not None:
        none = none | (torch.arange(width) >= gate.head_top_k[:, None, None] - 1)
    best = torch.where(none, gate.none, best & 0xFFFFFFFF)
    return best.int().sort(dim=-1).values


def gate_portable(
    q: Tensor,
    k: Tensor,
    block_size: int,
    picks: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Tensor:
    """Do what `gate_cpu` does, for as many `picks` as there may be blocks at some length."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, q_offset = k.shape[1], k.shape[2] - q_len
    block_keys = pool_keys(k, block_size)
    num_blocks = block_keys.shape[2]
    # Columns that are no candidates: then every length has `picks` of them.
    columns = F.pad(block_keys, (0, 0, 0, picks)).double().mT.unsqueeze(2)
    grouped = q.reshape(batch, num_kv_heads, -1, q_len, head_dim)
    gate = _Gate(sink_blocks, local_blocks, causal, None, num_blocks, whole_rows=True)
    starts = torch.arange(num_blocks, device=q.device) * block_size

    def choose(some: Tensor, first: int | Tensor) -> Tensor:
        position = torch.arange(some.shape[3], device=q.device) + first + q_offset
        queries = plain_queries(position, starts, causal).unsqueeze(1)
        affinity = (some.double() @ columns).float().flatten(1, 2)
        return _top_blocks(affinity, queries, 0, picks, gate)

    if isinstance(q_len, int) and q_len <= _CHUNK:
        return choose(grouped, 0)
    chunks = ceil_div(q_len, _CHUNK)
    padded = F.pad(grouped, (0, 0, 0, chunks * _CHUNK - q_len))

    def more(chunk: Tensor, chosen: Tensor) -> Tensor:
        return chunk < chunks

    def step(chunk: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        first = chunk * _CHUNK
        rows = torch.arange(_CHUNK, device=q.device) + first
        best = choose(padded.index_select(3, rows), first)
        return chunk + 1, chosen.index_copy(2, rows, best)

    start = torch.zeros((), dtype=torch.int64, device=q.device)
    room = q.new_zeros((batch, num_heads, chunks * _CHUNK, picks), dtype=torch.int32)
    _, chosen = while_loop(more, step, (start, room))
    # Not a slice, whose length would be an expression that slows down the compiler in all that
    # follows.
    return chosen.index_select(2, torch.arange(q_len, device=q.device))
