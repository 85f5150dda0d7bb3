"""Fixed patterns as gates: what they choose depends on places alone. Baselines for the router.

Each returns a `Routing` for `moba_flex.routed_attention`, in any layout. The own block is always
attended to. Blocks are counted within each document, or from the first key of a padded row.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from moba_flex.masks.checks import check_bool, check_int, check_layout, check_qk
from moba_flex.masks.layout import LONGEST, Layout, RowOptions, ceil_div, locate
from moba_flex.masks.routing import Routing


class _Options(RowOptions, total=False):
    """`causal`, and what the rows hold; see `moba_flex.moba_attention`."""

    causal: bool


def sliding_window(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    local_blocks: int,
    **options: Unpack[_Options],
) -> Routing:
    """Choose the blocks nearest to the own one.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`.
        block_size: Keys per block.
        local_blocks: Blocks right before the own one, and as many right after it if not causal.
        options: `causal` (True if left out), `cu_seqlens`, `cu_seqlens_q` and `key_mask`, as of
            `moba_flex.moba_attention`.

    Returns:
        The routing.

    Raises:
        ValueError: A size or an option is out of range.
        TypeError: An argument has the wrong type.

    Example:
        >>> q = k = torch.randn(1, 1, 8, 4)
        >>> routing = sliding_window(q, k, block_size=2, local_blocks=1)
        >>> routing.blocks[0, 0, -1].tolist()  # by the last query, in block 3 of 0 to 3
        [2]
    """
    block_size, _, local_blocks = _sizes(q, k, block_size, local_blocks=local_blocks)
    distances = _window(local_blocks, options)
    return _route(q, k, block_size, options, distances=distances)


def sink_window(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    **options: Unpack[_Options],
) -> Routing:
    """Choose the first blocks and those nearest to the own one (StreamingLLM, arXiv 2309.17453).

    Arguments are those of `sliding_window`, and `sink_blocks`: how many first blocks.

    Example:
        >>> q = k = torch.randn(1, 1, 8, 4)
        >>> routing = sink_window(q, k, block_size=2, sink_blocks=1, local_blocks=1)
        >>> routing.blocks[0, 0, -1].tolist()  # by the last query, in block 3 of 0 to 3
        [0, 2]
    """
    block_size, _, sink_blocks, local_blocks = _sizes(
        q, k, block_size, sink_blocks=sink_blocks, local_blocks=local_blocks
    )
    distances, numbers = _window(local_blocks, options), range(sink_blocks)
    return _route(q, k, block_size, options, distances=distances, numbers=numbers)


def global_local(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    every: int,
    local_blocks: int,
    **options: Unpack[_Options],
) -> Routing:
    """Choose the global blocks and those nearest to the own one (Longformer, arXiv 2004.05150).

    Arguments are those of `sliding_window`, and `every`: the first block of every so many is
    global, the same ones for all queries.

    Example:
        >>> q = k = torch.randn(1, 1, 8, 4)
        >>> routing = global_local(q, k, block_size=2, every=2, local_blocks=0)
        >>> routing.blocks[0, 0, -1].tolist()  # by the last query, in block 3 of 0 to 3
        [0, 2]
    """
    block_size, most, every, local_blocks = _sizes(
        q, k, block_size, every=every, local_blocks=local_blocks
    )
    distances, numbers = _window(local_blocks, options), range(0, most, every)
    return _route(q, k, block_size, options, distances=distances, numbers=numbers)


def strided(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    stride: int,
    local_blocks: int,
    **options: Unpack[_Options],
) -> Routing:
    """Choose blocks at equal distances from the own one (Sparse Transformers, arXiv 1904.10509).

    Arguments are those of `sliding_window`, and `stride`: blocks whose distance from the own one
    is a multiple of it are chosen, beside the nearest.

    Example:
        >>> q = k = torch.randn(1, 1, 8, 4)
        >>> routing = strided(q, k, block_size=2, stride=2, local_blocks=0)
        >>> routing.blocks[0, 0, -1].tolist()  # by the last query, in block 3 of 0 to 3
        [1]
    """
    block_size, most, stride, local_blocks = _sizes(
        q, k, block_size, stride=stride, local_blocks=local_blocks
    )
    steps = range(stride, most, stride)
    distances = set(_window(local_blocks, options)) | {-step for step in steps}
    distances |= set() if options.get("causal", True) else set(steps)
    return _route(q, k, block_size, options, distances=sorted(distances))


def _sizes(q: Tensor, k: Tensor, block_size: int, **options: int) -> tuple[int, ...]:
    """Check sizes and options.

    Returns:
        `block_size`, the most blocks that a sequence can have, and the options in their order,
        none larger than that.
    """
    check_qk(q, k)
    block_size = check_int("block_size", block_size, 1)
    most = ceil_div(k.shape[2], block_size)
    least = {"every": 1, "stride": 1}
    checked = (check_int(name, x, least.get(name, 0)) for name, x in options.items())
    return min(block_size, LONGEST), most, *(min(x, max(most, 1)) for x in checked)


def _window(local_blocks: int, options: _Options) -> list[int]:
    """Return the distances from the own block to its neighbours."""
    causal = options.get("causal", True)
    distances = range(-local_blocks, 1 if causal else local_blocks + 1)
    return [distance for distance in distances if distance]


def _route(
    q: Tensor,
    k: Tensor,
    block_size: int,
    options: _Options,
    *,
    distances: Sequence[int],
    numbers: Sequence[int] = (),
) -> Routing:
    """Choose blocks at distances from the own one, and blocks by their numbers in a sequence."""
    causal = check_bool("causal", options.pop("causal", True))
    rows: RowOptions = options
    check_layout(q, k, **rows)
    device = q.device
    layout = locate(Layout(q.shape[2], k.shape[2], block_size, causal), rows)
    at = layout.coordinates(device)
    own, oldest = at.own.unsqueeze(2), at.oldest.unsqueeze(2)

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    near, known = own + column(distances), oldest + column(numbers)
    blocks = torch.cat((near, known.expand(*near.shape[:2], -1)), dim=2)
    blocks = blocks.unsqueeze(1).expand(q.shape[0], -1, -1, -1)
    return Routing.over(layout, blocks).as_set(q.shape[1])
