"""The gate: which blocks each query attends to."""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import while_loop

from moba_flex.masks.blocks import ceil_div, pool_keys

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.router_kernel import gate_triton

# Scores held at a time by the gate on CPU: 2**22 of them are 32 MiB of float64.
_CPU_CHUNK = 1 << 22
# Queries of a head whose scores an exported gate holds at a time.
_CHUNK = 512


@dataclass(frozen=True)
class Routing:
    """The blocks that every query chose, and the geometry that gives them meaning.

    Queries are the last `q_len` of `kv_len` positions. The own block of query `i`, number
    `(q_offset + i) // block_size`, is always attended to and is not listed.

    Attributes:
        blocks: The other chosen blocks, int32 `[B, Hq, Q, K - 1]`, ascending; `num_blocks` stands
            for none.
        block_size: Keys per block.
        q_len: Number of queries.
        kv_len: Number of keys.
        causal: Whether a query sees only keys at its position and before.
    """

    blocks: Tensor
    block_size: int
    q_len: int
    kv_len: int
    causal: bool

    @property
    def num_blocks(self) -> int:
        """Number of key blocks, `N`."""
        return ceil_div(self.kv_len, self.block_size)

    @property
    def q_offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len


def route(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
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

    Returns:
        The routing, with `K = min(top_k, N)`.
    """
    with torch.no_grad():
        exporting, num_blocks = torch.compiler.is_exporting(), ceil_div(k.shape[2], block_size)
        if exporting and not isinstance(num_blocks, int):
            picks = top_k - 1  # whatever the length: picks that find no block are "none"
        else:
            # A number also under dynamic shapes, where `min` and `int` would leave an expression.
            picks = (top_k if top_k <= num_blocks else len(range(num_blocks))) - 1
        options = block_size, picks, sink_blocks, local_blocks, causal
        if q.is_cuda:
            blocks = gate_triton(q, k, *options)
        else:
            gate = gate_portable if exporting else gate_cpu
            blocks = gate(q, pool_keys(k, block_size), k.shape[2] - q.shape[2], *options)
    return Routing(blocks, block_size, q.shape[2], k.shape[2], causal)


@torch.library.custom_op("moba_flex::gate_cpu", mutates_args=(), device_types="cpu")
def gate_cpu(
    q: Tensor,
    block_keys: Tensor,
    q_offset: int,
    block_size: int,
    picks: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Tensor:
    """Choose `picks` blocks besides the own one, a chunk of queries at a time.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        block_keys: Block keys, `[B, Hkv, N, D]`.
        q_offset: Position of the first query.
        block_size: Keys per block.
        picks: Blocks to choose.
        sink_blocks: First blocks that are forced.
        local_blocks: Blocks before the own one that are forced.
        causal: Whether only blocks before the own one are candidates.

    Returns:
        int32 `[B, Hq, Q, picks]`, ascending; `N` stands for none.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, num_blocks = block_keys.shape[1:3]
    chosen = q.new_full((batch, num_heads, q_len, picks), num_blocks, dtype=torch.int32)
    if picks == 0:
        return chosen
    grouped = q.view(batch, num_kv_heads, -1, q_len, head_dim)
    # float64 leaves one rounding, to float32, so that equal block keys tie whatever kernel BLAS
    # picks for a column.
    columns = block_keys.double().mT.unsqueeze(2)
    chunk = max(1, _CPU_CHUNK // (batch * num_heads * num_blocks))
    for start in range(0, q_len, chunk):
        stop = min(start + chunk, q_len)
        own = (torch.arange(start, stop) + q_offset) // block_size
        candidates = min(int(own[-1]), num_blocks) if causal else num_blocks
        width = min(picks, candidates)
        if width == 0:
            continue
        affinity = (grouped[:, :, :, start:stop].double() @ columns[..., :candidates]).float()
        best = _top_blocks(
            affinity.flatten(1, 2), own, width, sink_blocks, local_blocks, causal, num_blocks
        )
        chosen[:, :, start:stop, :width] = best
    return chosen


@gate_cpu.register_fake
def _(
    q: Tensor,
    block_keys: Tensor,
    q_offset: int,
    block_size: int,
    picks: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:3], picks), dtype=torch.int32)


def _top_blocks(
    affinity: Tensor,
    own: Tensor,
    width: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
    none: int,
) -> Tensor:
    """Return the `width` best blocks of each row of `affinity`, ascending, `none` last.

    Affinity and block number make one integer key, in which no two blocks are equal and the more
    recent of two equal affinities is the larger.
    """
    largest = torch.finfo(torch.float32).max
    # Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0.
    bits = (
        affinity.nan_to_num_(nan=-largest, posinf=largest, neginf=-largest)
        .add_(0.0)
        .view(torch.int32)
    )
    block = torch.arange(affinity.shape[-1])
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | block
    forced = block < sink_blocks
    if local_blocks:
        forced = forced | ((block < own[:, None]) & (block >= own[:, None] - local_blocks))
    if sink_blocks or local_blocks:
        key = torch.where(forced, torch.iinfo(torch.int64).max - 0xFFFFFFFF | block, key)
    candidate = block < own[:, None] if causal else (block != own[:, None]) & (block < none)
    lowest = torch.iinfo(torch.int64).min
    key = torch.where(candidate, key, lowest)
    best = key.topk(width, dim=-1, sorted=False).values
    best = torch.where(best == lowest, none, best & 0xFFFFFFFF)
    return best.int().sort(dim=-1).values


def gate_portable(
    q: Tensor,
    block_keys: Tensor,
    q_offset: int,
    block_size: int,
    picks: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Tensor:
    """Do what `gate_cpu` does, for as many `picks` as there may be blocks at some length."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, num_blocks = block_keys.shape[1:3]
    # Columns that are no candidates: then every length has `picks` of them.
    columns = F.pad(block_keys, (0, 0, 0, picks)).double().mT.unsqueeze(2)
    grouped = q.reshape(batch, num_kv_heads, -1, q_len, head_dim)

    def choose(some: Tensor, first: int | Tensor) -> Tensor:
        own = (torch.arange(some.shape[3], device=q.device) + first + q_offset) // block_size
        affinity = (some.double() @ columns).float().flatten(1, 2)
        return _top_blocks(affinity, own, picks, sink_blocks, local_blocks, causal, num_blocks)

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
