"""The fused plan: routed attention whose kernels gather the queries of a block inside the load.

Pairs of a query and a chosen block are sorted by block. A first kernel attends with tiles of pairs
to their block and writes their partial outputs (*parts*). A second kernel attends with the
queries, in natural order, to their own blocks, and the parts are merged. Backward mirrors them: dk
and dv of a block are sums over the pairs that chose it and the queries inside it, and dq is a sum
of parts. Every sum has a fixed order.

Heads of a group may share one choice. Then the pairs are sorted once for all of them, and each
stands for the rows of the whole group.

The parts of all heads would take as much memory as q for each chosen block. So they are made and
merged for some lists (key/value heads) at a time: as many as fit into the memory of a few copies
of q and, in backward, as keep the device busy.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba_flex.compile.engine import attention_op
from moba_flex.compile.fused_kernels import (
    block_forward_kernel,
    dkv_kernel,
    dkv_sum_kernel,
    merge_dq_kernel,
    merge_forward_kernel,
    own_dq_kernel,
    own_forward_kernel,
    pair_dq_kernel,
    pair_forward_kernel,
    stats_kernel,
)
from moba_flex.masks._torch.inputs import dense_vectors
from moba_flex.masks._torch.kernel_op import launch, one_call, power_of_2, wrap_triton
from moba_flex.masks.layout import Layout, ceil_div
from moba_flex.masks.pool import pool
from moba_flex.masks.regroup import sort_pairs, tile_blocks
from moba_flex.masks.router import choose_by_numbers
from moba_flex.masks.routing import Routing


class _Tiles(NamedTuple):
    """Launch options of a kernel: queries or pairs, keys, warps and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


# By padded head_dim, for 16-bit inputs; measured on an H100 (perf/log.md).
_TILES = {
    "pair_forward": {
        64: _Tiles(128, 64, 4, 3),
        128: _Tiles(128, 32, 4, 3),
        256: _Tiles(64, 32, 4, 2),
    },
    "own_forward": {
        64: _Tiles(64, 64, 4, 3),
        128: _Tiles(128, 32, 4, 3),
        256: _Tiles(64, 32, 4, 2),
    },
    "pair_dq": {64: _Tiles(64, 64, 4, 3), 128: _Tiles(128, 64, 8, 3), 256: _Tiles(128, 32, 8, 2)},
    # For blocks of at most one tile of keys, which stay loaded.
    "block_forward": {
        64: _Tiles(64, 128, 4, 4),
        128: _Tiles(64, 128, 4, 4),
        256: _Tiles(64, 64, 8, 3),
    },
    "own_dq": {64: _Tiles(64, 32, 4, 3), 128: _Tiles(64, 32, 4, 3), 256: _Tiles(128, 32, 8, 2)},
    # Five stages: the queries of a step are loaded two steps ahead, and the stats that say which
    # queries these are two steps before that.
    "dkv": {64: _Tiles(64, 128, 8, 5), 128: _Tiles(64, 128, 8, 5), 256: _Tiles(64, 64, 8, 2)},
}
# For blocks of more than 128 keys, which take several tiles in any case.
_TILES_LONG = {
    "pair_forward": {256: _Tiles(128, 64, 8, 2)},
    "dkv": {64: _Tiles(64, 64, 4, 5)},
}
_TILES_FLOAT32 = {64: _Tiles(32, 32, 4, 1), 128: _Tiles(32, 32, 4, 1), 256: _Tiles(16, 16, 4, 1)}
# For blocks with few pairs each, as in a chunk of a long prompt: small tiles are fuller.
_TILES_FEW = {"pair_forward": {128: _Tiles(64, 32, 4, 3)}}
_FEW_PAIRS = 512
_STATS_ROWS = 64
# Parts are merged in kernels of their own: in tiles of so many rows, unless forward has few.
_MERGE_ROWS = 16
_MERGE_WARPS = 4
_FEW_PICKS = 2
_BLOCK_SHARE = 1024  # pairs of a program that keeps its block
_SMALL_PARTS = 2**28  # bytes of parts that forward makes at once in any case
_MOST_PARTS = 2**30  # the same of backward, if the device is not busy with less
# Of dk and dv: programs that keep the device busy in a launch; how many shares of pairs a launch
# is cut into at most; and the fewest pairs of a share, because its sums cost as much as some.
_BUSY = 2048
_SHARES = 512
_LEAST_SHARE = 3072


def _padded(head_dim: int) -> int:
    return max(16, power_of_2(head_dim))


# Cached: in eager code a short sequence waits for the Python between the launches.
@lru_cache(maxsize=1024)
def _tiles(kernel: str, kind: "_Kind") -> _Tiles:
    if kind.dtype == torch.float32:
        table = _TILES_FLOAT32
    else:
        table = _TILES[kernel] | (_TILES_LONG.get(kernel, {}) if kind.block_size > 128 else {})
        table = table | (_TILES_FEW.get(kernel, {}) if kind.few_pairs else {})
    tiles = table[max(64, _padded(max(kind.head_dim, kind.value_dim)))]
    return tiles._replace(n=max(16, min(tiles.n, power_of_2(kind.block_size))))


@lru_cache(maxsize=1024)
def _options(kernel: str, kind: "_Kind") -> dict[str, Any]:
    tiles = _tiles(kernel, kind)
    options: dict[str, Any] = {
        "HEAD_DIM": kind.head_dim,
        "D": _padded(kind.head_dim),
        "VALUE_DIM": kind.value_dim,
        "DV": _padded(kind.value_dim),
        "TABLES": kind.tables,
        "SOFTCAP": kind.softcap,
        "TILE_M": tiles.m,
        "TILE_N": tiles.n,
        "PRECISION": "ieee" if kind.dtype == torch.float32 else "tf32",
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    if not kernel.startswith("own"):
        options["GROUPED"] = kind.grouped
    options["SHARED"] = kind.shared
    if kernel == "own_forward":
        options["MERGE"] = kind.few_picks
    if kernel.startswith(("pair", "block")):  # a chosen block may be short if it is the last one
        short = not kind.causal or kind.tables
        options["TAIL"] = short or kind.block_size % tiles.n != 0
    else:
        options["CAUSAL"] = kind.causal
    return options


def _are_few(pairs: int, num_blocks: int) -> bool:
    """Whether blocks have few pairs each, on average; False where sizes are symbols."""
    if isinstance(pairs, torch.SymInt) or isinstance(num_blocks, torch.SymInt):
        return False
    return pairs < _FEW_PAIRS * num_blocks


def _share(pairs: int) -> int:
    """Return the most pairs for one program of dk and dv, in a launch of so many.

    The limit keeps a block that many queries chose from delaying the launch.
    """
    share = ceil_div(pairs, _SHARES)
    if isinstance(share, torch.SymInt):
        return torch.sym_max(_LEAST_SHARE, share)
    return max(_LEAST_SHARE, share)


def _lists_at_once(lists: int, picks: int, part_bytes: int) -> int:
    """Return how many lists forward attends with at a time.

    Their parts hold three times q, or few bytes, or they are those of one list.
    """
    if isinstance(lists, torch.SymInt):
        return ceil_div(lists, ceil_div(max(1, picks), 3))
    if not isinstance(part_bytes, torch.SymInt) and lists * part_bytes <= _SMALL_PARTS:
        return lists
    return max(1, min(lists, 3 * lists // max(1, picks)))


def _lists_at_once_backward(lists: int, picks: int, part_bytes: int, programs: int) -> int:
    """Return how many lists backward handles at a time.

    They keep the device busy, with `programs` of dk and dv each; or their parts hold three times
    q, or 1 GiB.
    """
    if any(isinstance(x, torch.SymInt) for x in (lists, part_bytes, programs)):
        return _lists_at_once(lists, picks, part_bytes)
    most = max(3 * lists // max(1, picks), _MOST_PARTS // max(1, part_bytes))
    return max(1, min(lists, most, ceil_div(_BUSY, programs)))


def _first_lists(lists: int, at_once: int, picks: int) -> Sequence[int]:
    """Return the first list of each launch.

    A graph for any batch size has a fixed number of launches, of `at_once` lists each. There the
    last launches may repeat lists of earlier ones, and write the same values again, because a
    launch of no list would be an error.
    """
    if isinstance(lists, torch.SymInt):
        launches = range(ceil_div(max(1, picks), 3))
        return [torch.sym_min(i * at_once, lists - at_once) for i in launches]
    return range(0, lists, at_once)


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of batch, head and position; that of the head_dim is 1."""
    strides: list[int] = []
    for x in tensors:
        strides += x.stride()[:3]
    return strides


class _Kind(NamedTuple):
    """The properties of a call that kernels are compiled for."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    block_size: int
    causal: bool
    grouped: bool
    softcap: bool
    tables: bool
    few_pairs: bool
    few_picks: bool
    shared: bool


class _Problem(NamedTuple):
    """The sizes of a call, and how its kernels are launched: `at_once` lists at a time."""

    kind: _Kind
    lists: int
    num_kv_heads: int
    group: int
    q_len: int
    kv_len: int
    num_blocks: int
    block_size: int
    picks: int
    scale: float
    softcap: float
    table_rows: int
    at_once: int
    part_bytes: int

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        picks: int,
        layout: Layout,
        scale: float,
        softcap: float,
        shared: bool = False,
    ) -> "_Problem":
        """Return the problem of queries, keys, values and a layout."""
        block_size, extents = layout.block_size, layout.extents
        batch, num_heads, q_len, head_dim = q.shape
        num_kv_heads, kv_len = k.shape[1:3]
        group = num_heads // num_kv_heads
        lists, pairs = batch * num_kv_heads, group * q_len * picks
        part_bytes = pairs * max(head_dim, v.shape[3]) * q.element_size()
        kind = _Kind(  # plain numbers, also where sizes are symbols
            q.dtype,
            int(head_dim),
            int(v.shape[3]),
            int(block_size),
            layout.causal,
            grouped=bool(group > 1),
            softcap=bool(softcap > 0),
            tables=extents is not None,
            few_pairs=_are_few(pairs, layout.num_blocks),
            few_picks=bool(picks <= _FEW_PICKS),
            shared=shared,
        )
        return cls(
            kind=kind,
            lists=lists,
            num_kv_heads=num_kv_heads,
            group=group,
            q_len=q_len,
            kv_len=kv_len,
            num_blocks=layout.num_blocks,
            block_size=block_size,
            picks=picks,
            scale=scale,
            softcap=softcap,
            table_rows=1 if extents is None else extents.shape[1],
            at_once=_lists_at_once(lists, picks, part_bytes),
            part_bytes=part_bytes,
        )

    def backward(self) -> "_Problem":
        """Return the problem with the lists at a time of backward."""
        programs = self.num_blocks * self.tiles_per_block
        at_once = _lists_at_once_backward(self.lists, self.picks, self.part_bytes, programs)
        return self._replace(at_once=at_once)

    @property
    def tiles_per_block(self) -> int:
        """Programs of dk and dv for the keys of a block."""
        return ceil_div(self.block_size, self.tiles("dkv").n)

    @property
    def scale_log2(self) -> float:
        """Factor on scores in units of log2."""
        return self.scale / math.log(2)

    @property
    def num_pairs(self) -> int:
        """Pairs of a list, including entries without a block."""
        return self.group * self.q_len * self.picks

    def launches(self) -> Iterator[tuple[int, tuple[int | float, ...]]]:
        """Yield, for each launch, its number of lists and the sizes that kernels take."""
        any_batch = isinstance(self.lists, torch.SymInt)
        sizes = (
            self.num_kv_heads,
            self.group,
            self.q_len,
            self.kv_len,
            self.num_blocks,
            self.block_size,
            self.num_pairs,
            self.picks,
            self.scale_log2,
            self.softcap / math.log(2),
            self.table_rows,
        )
        for first_list in _first_lists(self.lists, self.at_once, self.picks):
            lists = self.at_once if any_batch else min(self.at_once, self.lists - first_list)
            yield lists, (first_list, *sizes)

    @property
    def block_stays(self) -> bool:
        """Whether a program keeps one whole block while it attends with tile after tile."""
        return self.kind.block_size <= self.tiles("block_forward").n

    def own_grid(self, tile: int, lists: int) -> tuple[int, int]:
        """Return the grid of a kernel that takes `tile` rows at a time, in natural order."""
        if self.kind.shared:
            return ceil_div(self.q_len * self.group, tile), lists
        return ceil_div(self.q_len, tile), lists * self.group

    def parts(self, like: Tensor, values: int) -> Tensor:
        """Allocate `values` values for each pair of the lists of a launch."""
        return like.new_empty(self.at_once * self.num_pairs * values)

    def tiles(self, kernel: str) -> _Tiles:
        """Return the tiles of a kernel."""
        return _tiles(kernel, self.kind)

    def options(self, kernel: str) -> dict[str, Any]:
        """Return the compile-time arguments and launch options of a kernel."""
        return _options(kernel, self.kind)


def _backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Tensor, ...],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `kept` are `Pairs.rank` and `Pairs.first`."""
    rank, first = kept
    queries, extents, block_size = layout.queries, layout.extents, layout.block_size
    grad, q, k, v = dense_vectors(grad, q, k, v)
    shared = rank.ndim == 5
    problem = _Problem.of(q, k, v, rank.shape[-1], layout, scale, softcap, shared).backward()
    if queries is None or extents is None:
        queries = extents = owners = rank  # placeholders, not read
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    else:
        owners = _owners(queries[1], extents.shape[2])
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)  # padding belongs to no block
    dq = torch.empty_like(q)

    num_blocks, head_dim, value_dim = problem.num_blocks, *problem.kind[1:3]
    key_tile = problem.tiles("dkv").n
    tiles_per_block = problem.tiles_per_block
    write_dq = tiles_per_block == 1  # then one program alone handles each pair
    gather_dq = problem.picks > 0 and not write_dq
    share = _share(problem.at_once * problem.num_pairs * tiles_per_block)
    spill_block, first_spill = tile_blocks(first, problem.num_pairs, share, skip=1)
    num_spills = spill_block.shape[1]
    slots = problem.at_once * 2 * num_spills  # see `_spill_places`
    width = _padded(head_dim) + _padded(value_dim)
    spill = lse.new_empty(slots * tiles_per_block * key_tile * width)

    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    rows = problem.group * problem.q_len
    stats = lse.new_empty((problem.at_once, rows + problem.num_pairs, 4), dtype=torch.int32)
    part = problem.parts(q, head_dim)
    tiles = None
    for lists, sizes in problem.launches():
        launch(
            wrap_triton(stats_kernel),
            problem.own_grid(_STATS_ROWS, lists),
            *(out, grad, lse, lse if grad_lse is None else grad_lse, rank, stats),
            *_strides(out, grad),
            *(sizes[0], problem.num_kv_heads, problem.group, problem.q_len, problem.picks),
            LSE=grad_lse is not None,
            SHARED=shared,
            HEAD_DIM=value_dim,
            D=_padded(value_dim),
            TILE_M=_STATS_ROWS,
        )
        launch(
            wrap_triton(dkv_kernel),
            ((num_spills + num_blocks) * tiles_per_block, lists),
            *(q, k, v, grad, stats, part, first),
            *(spill_block, first_spill, queries, extents, owners, spill, dk, dv),
            *_strides(q, k, v, grad, dk, dv),
            *sizes,
            num_spills,
            tiles_per_block,
            share,
            WRITE_DQ=write_dq,
            **problem.options("dkv"),
        )
        if problem.picks:
            launch(
                wrap_triton(dkv_sum_kernel),
                (num_spills * tiles_per_block, lists),
                *(spill_block, first_spill, extents, spill, dk, dv),
                *_strides(dk, dv),
                *(sizes[0], problem.num_kv_heads, problem.kv_len, num_blocks, block_size),
                *(problem.scale_log2, problem.table_rows, num_spills, tiles_per_block),
                TABLES=problem.kind.tables,
                HEAD_DIM=head_dim,
                D=_padded(head_dim),
                VALUE_DIM=value_dim,
                DV=_padded(value_dim),
                TILE_N=key_tile,
                num_warps=16,  # fewer warps hold more values per thread: seconds to compile
            )
        if gather_dq:
            # Made only now, while the device is busy with the kernels above.
            tiles = tiles or tile_blocks(first, problem.num_pairs, problem.tiles("pair_dq").m)
            tile_block, first_tile = tiles
            num_tiles = tile_block.shape[1]
            launch(
                wrap_triton(pair_dq_kernel),
                (num_tiles, lists),
                *(q, k, v, grad, stats, part, first, tile_block, first_tile, extents),
                *_strides(q, k, v, grad),
                *sizes,
                num_tiles,
                **problem.options("pair_dq"),
            )
        launch(
            wrap_triton(own_dq_kernel),
            problem.own_grid(problem.tiles("own_dq").m, lists),
            *(q, k, v, grad, stats, queries, extents, dq),
            *_strides(q, k, v, grad, dq),
            *sizes,
            **problem.options("own_dq"),
        )
        if problem.picks:
            launch(
                wrap_triton(merge_dq_kernel),
                problem.own_grid(_MERGE_ROWS, lists),
                *(part, rank, dq),
                *_strides(dq),
                *(sizes[0], problem.num_kv_heads, problem.group, problem.q_len),
                *(problem.num_pairs, problem.picks, problem.scale_log2),
                SHARED=problem.kind.shared,
                HEAD_DIM=head_dim,
                D=_padded(head_dim),
                TILE_M=_MERGE_ROWS,
                num_warps=_MERGE_WARPS,
            )
    return dq, dk, dv


def _owners(own: Tensor, num_blocks: int) -> Tensor:
    """Return, for each block, the first query that lies in it, and the query after the last.

    Args:
        own: Own blocks, int32 `[R, Q]`; queries with the same own block are neighbours.
        num_blocks: `N`, which stands for none.

    Returns:
        int32 `[2, R, N]`.
    """
    q_len = own.shape[1]
    query = torch.arange(q_len, dtype=torch.int32, device=own.device).expand_as(own)
    first = own.new_full((own.shape[0], num_blocks + 1), q_len)
    first = first.scatter_reduce(1, own.long(), query, "amin")
    after = torch.zeros_like(first).scatter_reduce(1, own.long(), query + 1, "amax")
    return torch.stack((first, after))[..., :-1].contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to the own block and to the chosen ones.

    The scale must not be negative, because kernels take the maximum of scores before they scale
    them.

    Returns:
        Output `[B, Hq, Q, Dv]`, log-sum-exp float32 `[B, Hq, Q]`, and `rank` and `first` of the
        `Pairs`, for backward. If the heads of a group share their choice, `rank` has a dimension
        more, `[B, Hkv, 1, Q, K - 1]`, and `first` counts the rows of the whole group.
    """
    q, k, v = dense_vectors(q, k, v)
    layout = routing.layout
    shared = routing.blocks.shape[1] != q.shape[1]
    problem = _Problem.of(q, k, v, routing.blocks.shape[3], layout, scale, softcap, shared)
    pairs = sort_pairs(routing, problem.num_kv_heads)
    queries, extents = layout.queries, layout.extents
    # Placeholders, which kernels without TABLES do not read.
    if queries is None or extents is None:
        queries = extents = pairs.first
    stays = problem.block_stays
    first = pairs.first * problem.group if shared else pairs.first
    if problem.picks:
        tile = _BLOCK_SHARE if stays else problem.tiles("pair_forward").m
        tile_block, first_tile = tile_blocks(first, problem.num_pairs, tile)
        num_tiles = tile_block.shape[1]

    value_dim = problem.kind.value_dim
    out = torch.empty_like(q) if value_dim == q.shape[3] else q.new_empty(*q.shape[:3], value_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    part, part_lse = problem.parts(q, value_dim), problem.parts(lse, 1)
    for lists, sizes in problem.launches():
        if problem.picks:
            launch(
                wrap_triton(block_forward_kernel if stays else pair_forward_kernel),
                (num_tiles, lists),
                *(q, k, v, part, part_lse, pairs.row, first, tile_block, first_tile),
                extents,
                *_strides(q, k, v),
                *sizes,
                num_tiles,
                *((tile,) if stays else ()),
                **problem.options("block_forward" if stays else "pair_forward"),
            )
        launch(
            wrap_triton(own_forward_kernel),
            problem.own_grid(problem.tiles("own_forward").m, lists),
            *(q, k, v, part, part_lse, pairs.rank, queries, extents, out, lse),
            *_strides(q, k, v, out),
            *sizes,
            **problem.options("own_forward"),
        )
        if not problem.kind.few_picks:
            launch(
                wrap_triton(merge_forward_kernel),
                problem.own_grid(_MERGE_ROWS, lists),
                *(part, part_lse, pairs.rank, out, lse),
                *_strides(out),
                *(sizes[0], problem.num_kv_heads, problem.group, problem.q_len),
                *(problem.num_pairs, problem.picks),
                SHARED=problem.kind.shared,
                VALUE_DIM=value_dim,
                DV=_padded(value_dim),
                TILE_M=_MERGE_ROWS,
                PICKS=power_of_2(problem.picks),
                num_warps=_MERGE_WARPS,
            )
    return out, lse, pairs.rank.unsqueeze(2) if shared else pairs.rank, first


attend_fused: Any = attention_op("attend_fused", _forward, _backward, kept=2, kernels=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *qkv, _, _, queries, extents, numbers, causal, scale, softcap = inputs
    place = queries, extents, numbers[1], causal, scale, softcap
    attend_fused.save(ctx, (*qkv, None, *place), output)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return *attend_fused.gradients(ctx, *grads)[:3], *(None,) * 8


@one_call(_save, _gradients)
def choose_and_attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_keys: Tensor | None,
    head_top_k: Tensor | None,
    queries: Tensor | None,
    extents: Tensor | None,
    numbers: tuple[int, int, int, int],
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """Choose blocks and attend to them, in eager code by one replay of all launches.

    Args:
        q: Queries, `[B, Hq, Q, D]`, for the gate too.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        block_keys: Mean keys, `[B, Hkv, N, D]`; None to pool them here.
        head_top_k: That of the gate.
        queries: Those of `Layout`.
        extents: Those of `Layout`.
        numbers: Those of `numbers_of`.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on scores, not negative.
        softcap: Soft cap on scores; 0 for none.

    Returns:
        Output `[B, Hq, Q, Dv]`, log-sum-exp float32 `[B, Hq, Q]`, and what backward keeps.
    """
    layout = Layout(q.shape[2], k.shape[2], numbers[1], causal, queries, extents)
    block_keys = pool(k, layout) if block_keys is None else block_keys
    blocks = choose_by_numbers(q, block_keys, numbers, head_top_k, layout)
    routing = Routing.over(layout, blocks)
    result: tuple[Tensor, ...] = attend_fused(q, k, v, *routing.parts, scale, softcap)
    return result
