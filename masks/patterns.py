"""Fixed patterns as gates: what they choose depends on places alone. Baselines for the router.

Each returns a `Routing` for `moba_flex.routed_attention`, in any layout. The own block is always
attended to. Blocks are counted within each document, or from the first key of a padded row.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.blocks import ceil_div
from moba_flex.masks.checks import check_int, check_layout, check_qk
from moba_flex.masks.layout import Layout, make_tables, plain_tables
from moba_flex.masks.router import Routing


def sliding_window(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    local_blocks: int,
    causal: bool = True,
    **layout: Unpack[Layout],
) -> Routing:
    """Choose the blocks nearest to the own one.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`.
        block_size: Keys per block.
        local_blocks: Blocks right before the own one, and as many right after it if not causal.
        causal: Whether a query sees only keys at its position and before.
        layout: `cu_seqlens`, `cu_seqlens_q` and `key_mask`, as of `moba_flex.moba_attention`.

    Returns:
        The routing.

    Raises:
        ValueError: A size or an option is out of range.
        TypeError: An argument has the wrong type.
    """
    return _route(
        q,
        k,
        block_size,
        causal,
        layout,
        distances=_window(local_blocks, causal),
    )


def sink_window(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool = True,
    **layout: Unpack[Layout],
) -> Routing:
    """Choose the first blocks and those nearest to the own one (StreamingLLM, arXiv 2309.17453).

    Arguments are those of `sliding_window`, and `sink_blocks`: how many first blocks.
    """
    check_int("sink_blocks", sink_blocks, 0)
    return _route(
        q,
        k,
        block_size,
        causal,
        layout,
        distances=_window(local_blocks, causal),
        numbers=range(sink_blocks),
    )


def global_local(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    every: int,
    local_blocks: int,
    causal: bool = True,
    **layout: Unpack[Layout],
) -> Routing:
    """Choose the global blocks and those nearest to the own one (Longformer, arXiv 2004.05150).

    Arguments are those of `sliding_window`, and `every`: the first block of every so many is
    global, the same ones for all queries.
    """
    check_int("every", every, 1)
    return _route(
        q,
        k,
        block_size,
        causal,
        layout,
        distances=_window(local_blocks, causal),
        numbers=range(0, _most_blocks(k, block_size), every),
    )


def strided(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    stride: int,
    local_blocks: int,
    causal: bool = True,
    **layout: Unpack[Layout],
) -> Routing:
    """Choose blocks at equal distances from the own one (Sparse Transformers, arXiv 1904.10509).

    Arguments are those of `sliding_window`, and `stride`: blocks whose distance from the own one
    is a multiple of it are chosen, beside the nearest.
    """
    check_int("stride", stride, 1)
    steps = range(stride, _most_blocks(k, block_size), stride)
    distances = set(_window(local_blocks, causal)) | {-step for step in steps}
    return _route(
        q,
        k,
        block_size,
        causal,
        layout,
        distances=sorted(distances if causal else distances | set(steps)),
    )


def _window(local_blocks: int, causal: bool) -> list[int]:
    """Return the distances from the own block to its neighbours."""
    check_int("local_blocks", local_blocks, 0)
    distances = range(-local_blocks, 1 if causal else local_blocks + 1)
    return [distance for distance in distances if distance]


def _most_blocks(k: Tensor, block_size: int) -> int:
    """Return how many blocks the longest sequence can have."""
    check_int("block_size", block_size, 1)
    return ceil_div(k.shape[2], block_size)


def _route(
    q: Tensor,
    k: Tensor,
    block_size: int,
    causal: bool,
    layout: Layout,
    *,
    distances: Sequence[int],
    numbers: Sequence[int] = (),
) -> Routing:
    """Choose blocks at distances from the own one, and blocks by their numbers in a sequence."""
    check_qk(q, k)
    check_int("block_size", block_size, 1)
    check_layout(q, k, **layout)
    sizes, device = (q.shape[2], k.shape[2]), q.device
    tables = make_tables(*sizes, block_size, causal, **layout)
    places = tables or plain_tables(*sizes, block_size, causal, device)
    _, own, oldest, newest = places.queries.unsqueeze(3)

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    near, known = own + column(distances), oldest + column(numbers)
    none = places.num_blocks
    blocks = torch.cat((near, known.expand(*near.shape[:2], -1)), dim=2)
    chosen = (blocks >= oldest) & (blocks <= newest) & (blocks != own)
    blocks = blocks.where(chosen, none).sort(dim=2).values
    # A block that is both near and known counts once.
    again = F.pad(blocks.diff(dim=2) == 0, (1, 0))
    blocks = blocks.masked_fill(again, none).sort(dim=2).values
    width = min(blocks.shape[2], _most_blocks(k, block_size) - 1)
    blocks = blocks[..., :width].unsqueeze(1).expand(*q.shape[:2], -1, -1).contiguous()
    return Routing(blocks, block_size, *sizes, causal, tables)
