"""Attention to a sequence that is cut among ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from moba_flex.attention import Plan, attend_by, moba_attention
from moba_flex.compile.plans import find_plan
from moba_flex.distributed.collectives import Group, agree, gather, process_group, swap
from moba_flex.masks._torch.inputs import cast_by_autocast
from moba_flex.masks.checks import check_int, check_layout
from moba_flex.masks.layout import LONGEST, Layout, RowOptions, ceil_div, locate
from moba_flex.masks.mods import Mods
from moba_flex.masks.pool import pool
from moba_flex.masks.request import Gate, Options, Request, gated_request
from moba_flex.masks.router import route_request


class _UlyssesOptions(Options, total=False):
    """Options of `ulysses_attention`."""

    plan: Plan | Literal["auto"]


class _ContextOptions(Options, total=False):
    """Options of `context_parallel_attention`."""

    plan: Literal["auto", "fused", "routed", "masked"]


@overload
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    return_aux: None = None,
    **options: Unpack[_UlyssesOptions],
) -> Tensor: ...
@overload
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    return_aux: AuxRequest,
    **options: Unpack[_UlyssesOptions],
) -> tuple[Tensor, AuxOutput]: ...
@torch.compiler.disable  # type: ignore[untyped-decorator]
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    return_aux: AuxRequest | None = None,
    **options: Unpack[_UlyssesOptions],
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend to a sequence that is cut among ranks, each rank doing some heads of it.

    An all-to-all turns parts of the sequence into parts of the heads, `moba_attention` attends,
    and another all-to-all turns the output back (DeepSpeed-Ulysses, arXiv 2309.14509). Key/value
    heads that are fewer than ranks go to all ranks whose query heads use them.

    Rank `r` holds the `r`-th part of the sequence, of `L` positions. Parts may differ in length.

    Args:
        q: Queries, `[B, Hq, L, D]`, with `Hq` a multiple of the number of ranks.
        k: Keys, `[B, Hkv, L, D]`, where `Hkv` is a multiple of the number of ranks or divides it.
        v: Values, `[B, Hkv, L, Dv]`.
        group: The ranks; None for all.
        return_aux: What to return beside the output.
        options: Those of `moba_flex.moba_attention`, the same on all ranks. `cu_seqlens`,
            `key_mask`, `head_top_k` and functions are about the whole sequence and all heads. A
            tensor that `score_mod` captures gets this rank's share of its gradient.

    Returns:
        The output of this rank's positions, `[B, Hq, L, Dv]`, or with `return_aux` the output and
        an `AuxOutput`.

    Raises:
        ValueError: An argument is out of range, or not the same on every rank.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 1, 4, 256, 32)
        >>> ulysses_attention(q, k, v, group=None, block_size=64, top_k=2).shape
        torch.Size([1, 4, 256, 32])
        >>> dist.destroy_process_group()
    """
    ranks = process_group(group)
    size, rank = ranks.size(), ranks.rank()
    lengths, request = _agree("ulysses_attention", ranks, q, k, v, return_aux, options)
    q, k, v = request.q, request.k, request.v
    if k.shape[1] < size:
        k, v = (x.repeat_interleave(size // k.shape[1], dim=1) for x in (k, v))
    q, k, v = _to_heads((q, k, v), lengths, ranks)

    heads = q.shape[1]
    mods = _moved(request.mods, h=rank * heads)
    options["score_mod"], options["mask_mod"] = mods.score_mod, mods.mask_mod
    if (head_top_k := options.get("head_top_k")) is not None:
        options["head_top_k"] = head_top_k[..., rank * heads : (rank + 1) * heads]
    out, aux = moba_attention(q, k, v, return_aux=AuxRequest(lse=request.lse), **options)
    out = _to_sequence(out, lengths, ranks)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=None if aux.lse is None else _to_sequence(aux.lse, lengths, ranks))


def _check_heads(request: Request, size: int) -> None:
    """Raise unless heads can be shared among ranks."""
    num_heads, num_kv_heads = request.q.shape[1], request.k.shape[1]
    if num_heads % size:
        raise ValueError(
            f"q must have a multiple of {size} heads, the number of ranks, got {num_heads}: use "
            "fewer ranks or context_parallel_attention"
        )
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"k must have a number of heads that is a multiple of {size}, the number of ranks, or "
            f"divides it, got {num_kv_heads}: use fewer ranks or context_parallel_attention"
        )


def _to_heads(
    tensors: tuple[Tensor, ...], lengths: list[int], group: dist.ProcessGroup
) -> list[Tensor]:
    """Return some heads of the whole sequence, given all heads of a part; in one collective."""
    size = group.size()
    by_rank = zip(*(x.chunk(size, dim=1) for x in tensors), strict=True)
    sent = [torch.cat([x.reshape(-1) for x in heads]) for heads in by_rank]
    shapes = [
        [(x.shape[0], x.shape[1] // size, length, x.shape[3]) for x in tensors]
        for length in lengths
    ]
    numbers = [[prod(shape) for shape in of_rank] for of_rank in shapes]
    received = swap(sent, [(sum(x),) for x in numbers], group)
    parts = [
        [x.view(shape) for x, shape in zip(flat.split(sizes), of_rank, strict=True)]
        for flat, sizes, of_rank in zip(received, numbers, shapes, strict=True)
    ]
    return [torch.cat(x, dim=2) for x in zip(*parts, strict=True)]


def _to_sequence(x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """Return all heads of this rank's part, given some heads of the sequence `[B, H, S, ...]`."""
    shape = *x.shape[:2], lengths[group.rank()], *x.shape[3:]
    return torch.cat(swap(x.split(lengths, dim=2), [shape] * group.size(), group), dim=1)


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    return_aux: None = None,
    **options: Unpack[_ContextOptions],
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    return_aux: AuxRequest,
    **options: Unpack[_ContextOptions],
) -> tuple[Tensor, AuxOutput]: ...
@torch.compiler.disable  # type: ignore[untyped-decorator]
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    return_aux: AuxRequest | None = None,
    **options: Unpack[_ContextOptions],
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend to a sequence that is cut among ranks, each rank doing its own queries.

    Keys and values are gathered from all ranks; in backward their gradients are added up where
    they belong, in the order of the ranks. The gate compares all blocks of the sequence, so that
    each query chooses what it would choose in one process.

    Rank `r` of `W` holds chunks `r` and `2W - 1 - r` of `2W`, as `shard_sequence` cuts them: if
    causal, queries at the start see few keys and those at the end many, and ranks get some of
    both.

    Args:
        q: Queries of this rank's positions, `[B, Hq, L, D]`.
        k: Keys, `[B, Hkv, L, D]`, with `Hq` a multiple of `Hkv`; any number of heads.
        v: Values, `[B, Hkv, L, Dv]`.
        group: The ranks; None for all.
        return_aux: What to return beside the output.
        options: Those of `moba_flex.routed_attention` and of the gate, the same on all ranks.
            `cu_seqlens`, `key_mask` and functions are about the whole sequence. A tensor that
            `score_mod` captures gets this rank's share of its gradient.

    Returns:
        The output of this rank's positions, `[B, Hq, L, Dv]`, or with `return_aux` the output and
        an `AuxOutput`.

    Raises:
        ValueError: An argument is out of range, or not the same on every rank.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q, k, v = (shard_sequence(x, None) for x in torch.randn(3, 1, 4, 256, 32))
        >>> out = context_parallel_attention(q, k, v, group=None, block_size=64, top_k=2)
        >>> unshard_sequence(out, None).shape
        torch.Size([1, 4, 256, 32])
        >>> dist.destroy_process_group()
    """
    ranks = process_group(group)
    lengths, request = _agree("context_parallel_attention", ranks, q, k, v, return_aux, options)
    q, gate, rows = request.q, request.gate, _rows(options)
    assert gate is not None
    shards = _Shards.of(lengths)
    both = shards.join(torch.cat((request.k, request.v), dim=3), 2, ranks)
    k, v = both.split((q.shape[3], request.v.shape[3]), dim=3)
    check_layout(k, k, **rows)

    if gate.covers(shards.length):  # one block holds all keys, and no other is left to choose
        gate = Gate(LONGEST, 1, causal=gate.causal)
    sizes = shards.length, shards.length
    whole = locate(Layout(*sizes, gate.block_size, gate.causal), rows)
    block_keys = None if gate.top_k == 1 else pool(k, whole)
    chunks = shards.chunks(ranks.rank())
    parts = q.split([stop - start for start, stop in chunks], dim=2)
    plan, aux = options.get("plan", "auto"), AuxRequest(lse=request.lse)
    attend: Callable[..., Any] = attend_by
    attended = []
    for part, (start, stop) in zip(parts, chunks, strict=True):
        layout = whole.part(start, stop, q.device)
        keys, values = (x[:, :, : layout.kv_len] for x in (k, v))
        compared = None if block_keys is None else block_keys[:, :, : layout.num_blocks]
        given = part.contiguous(), keys, values, request.scale
        mods = _moved(request.mods, q_idx=start)
        gated = Request(*given, gate, None, None, layout, None, compared, mods=mods)
        routed = None, route_request(gated), None, layout
        asked = Request(*given, *routed, mods=mods, lse=request.lse)
        attended.append(attend(find_plan(plan, asked), asked, aux))
    out = torch.cat([x[0] for x in attended], dim=2)
    if return_aux is None:
        return out
    lse = torch.cat([x[1].lse for x in attended], dim=2) if request.lse else None
    return out, AuxOutput(lse=lse)


def shard_sequence(x: Tensor, group: Group, *, dim: int = 2) -> Tensor:
    """Return this rank's part of a sequence, as `context_parallel_attention` takes it.

    The sequence is cut into `2W` chunks for `W` ranks, as `torch.tensor_split` does, and rank `r`
    gets chunks `r` and `2W - 1 - r`. Chunks differ by one position at most, and nothing is padded:

        9 positions, 2 ranks    rank 0: 0 1 2 | 7 8    rank 1: 3 4 | 5 6

    Token ids, positions and labels are cut alike.

    Args:
        x: The whole sequence, the same on all ranks, any shape.
        group: The ranks; None for all.
        dim: The dimension of the positions.

    Returns:
        A tensor like `x` with this rank's positions along `dim`, differentiable.

    Raises:
        TypeError: `group` is neither a process group nor a mesh.
        ValueError: `group` is a mesh of several dimensions, or does not hold this rank.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard_sequence(torch.arange(9), None, dim=0)
        tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])
        >>> dist.destroy_process_group()
    """
    ranks = process_group(group)
    shards = _Shards(x.shape[dim], ranks.size())
    chunks = shards.chunks(ranks.rank())
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in chunks], dim=dim)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def unshard_sequence(x: Tensor, group: Group, *, dim: int = 2) -> Tensor:
    """Return the whole sequence on every rank, given the parts that `shard_sequence` makes.

    No gradient flows through it: compute the loss of each part, and add up the losses.

    Args:
        x: This rank's part.
        group: The ranks; None for all.
        dim: The dimension of the positions.

    Returns:
        The whole sequence.

    Raises:
        TypeError: `group` is neither a process group nor a mesh.
        ValueError: `group` is a mesh of several dimensions or does not hold this rank, or parts do
            not fit each other.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> unshard_sequence(torch.arange(9), None, dim=0)
        tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])
        >>> dist.destroy_process_group()
    """
    ranks = process_group(group)

    def describe() -> tuple[int, dict[str, Any], None]:
        others = [n for i, n in enumerate(x.shape) if i != dim % x.dim()]
        facts = {"call": "unshard_sequence", "other dimensions of x": others}
        return x.shape[dim], facts | {"dim": dim % x.dim(), "dtype of x": x.dtype}, None

    lengths, _ = agree(ranks, describe)
    with torch.no_grad():
        return _Shards.of(lengths).join(x, dim, ranks)


@dataclass(frozen=True)
class _Shards:
    """A sequence cut among ranks, head and tail: rank `r` of `W` has chunks `r` and `2W - 1 - r`.

    Attributes:
        length: Positions of the sequence.
        ranks: Number of ranks, `W`.
    """

    length: int
    ranks: int

    @classmethod
    def of(cls, lengths: list[int]) -> "_Shards":
        """Return the shards of these lengths.

        Raises:
            ValueError: No sequence is cut into these.
        """
        shards = cls(sum(lengths), len(lengths))
        if lengths != shards.lengths:
            raise ValueError(
                f"ranks must hold {shards.lengths} of {shards.length} positions, got {lengths}: "
                "cut the sequence by shard_sequence"
            )
        return shards

    def chunks(self, rank: int) -> list[tuple[int, int]]:
        """Return where the two chunks of a rank start and stop."""
        size, longer = divmod(self.length, 2 * self.ranks)
        edges = [number * size + min(number, longer) for number in range(2 * self.ranks + 1)]
        return [(edges[x], edges[x + 1]) for x in (rank, 2 * self.ranks - 1 - rank)]

    @property
    def lengths(self) -> list[int]:
        """How many positions each rank has."""
        chunks = map(self.chunks, range(self.ranks))
        return [sum(stop - start for start, stop in of_rank) for of_rank in chunks]

    def join(self, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        """Return the whole sequence, given this rank's part; differentiable."""
        dim = dim % x.dim()
        missing = max(self.lengths) - x.shape[dim]
        every = gather(F.pad(x, (*(0, 0) * (x.dim() - 1 - dim), 0, missing)), group)
        pieces: dict[int, Tensor] = {}
        for rank in range(self.ranks):
            sizes = [stop - start for start, stop in self.chunks(rank)]
            head, tail, _ = every[rank].split((*sizes, max(self.lengths) - sum(sizes)), dim)
            pieces |= {rank: head, 2 * self.ranks - 1 - rank: tail}
        return torch.cat([pieces[number] for number in sorted(pieces)], dim)


def _rows(options: Options) -> RowOptions:
    """Return the options about rows, which are of the whole sequence."""
    return {
        "cu_seqlens": options.get("cu_seqlens"),
        "cu_seqlens_q": options.get("cu_seqlens_q"),
        "key_mask": options.get("key_mask"),
    }


def _moved(mods: Mods, *, h: int = 0, q_idx: int = 0) -> Mods:
    """Return the same changes for heads and queries that are cut out of more."""
    return mods.moved(lambda b, head, q, kv: (b, head + h, q + q_idx, kv)) if mods.ask else mods


def _agree(
    call: str,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    return_aux: AuxRequest | None,
    options: _UlyssesOptions | _ContextOptions,
) -> tuple[list[int], Request]:
    """Return the length of every rank's part, and the checked request of this rank's.

    Raises:
        ValueError: An argument is out of range, or not the same on every rank.
        TypeError: An argument has the wrong type.
    """

    def describe() -> tuple[int, dict[str, Any], Request]:
        cast = cast_by_autocast(q, k, v)
        rest: Any = {name: x for name, x in options.items() if name not in (*rows, "plan")}
        request = gated_request(*cast, **rest, return_aux=return_aux)
        if request.q.shape[2] != request.k.shape[2]:
            raise ValueError(
                f"q must have as many positions as k, {request.k.shape[2]}, got "
                f"{request.q.shape[2]}: each rank holds the same part of both"
            )
        if call == "ulysses_attention":
            _check_heads(request, group.size())
        facts: dict[str, Any] = {"call": call, "gradients": torch.is_grad_enabled()}
        for name, x in (("q", request.q), ("k", request.k), ("v", request.v)):
            facts |= {
                f"batch size of {name}": x.shape[0],
                f"number of heads of {name}": x.shape[1],
                f"head_dim of {name}": x.shape[3],
                f"dtype of {name}": x.dtype,
                f"device type of {name}": x.device.type,
                f"requires_grad of {name}": x.requires_grad,
            }
        facts |= vars(request.gate) | {"scale": request.scale} | vars(request.mods) | rows
        facts |= {"lse": request.lse, "plan": options.get("plan", "auto")}
        return request.q.shape[2], facts, request

    rows = _rows(options)
    return agree(group, describe)


class Traffic(NamedTuple):
    """Bytes that a rank sends in one call, forward, and the same again in backward.

    Example:
        >>> ways = Traffic(ulysses=96, context_parallel=64)
        >>> min(ways._fields, key=lambda way: getattr(ways, way))
        'context_parallel'

    Attributes:
        ulysses: By `ulysses_attention`.
        context_parallel: By `context_parallel_attention`.
    """

    ulysses: int
    context_parallel: int


def communication_bytes(
    *,
    ranks: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_dim: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """Return how many bytes each way of sharing a sequence costs, so that the cheaper is taken.

    Ulysses sends queries and outputs too, but to one rank each. Context parallel sends keys and
    values to all ranks, which is cheaper on few ranks and with few key/value heads.

    Args:
        ranks: Number of ranks, `W`.
        seq_len: Positions of the whole sequence, a multiple of `2W`, or rounded up to one.
        num_heads: Query heads, `Hq`.
        num_kv_heads: Key/value heads, `Hkv`.
        head_dim: Of queries and keys, `D`.
        v_dim: Of values, `Dv`; `head_dim` if None.
        batch: Rows of the batch.
        dtype: Of q, k and v.

    Returns:
        Bytes that one rank sends to others in forward. Backward sends as many. The sums of checks,
        24 bytes a rank, and a log-sum-exp are left out.

    Raises:
        TypeError: A number is no int.
        ValueError: A number is less than 1.

    Example:
        >>> sizes = dict(seq_len=131072, num_heads=32, num_kv_heads=8, head_dim=128)
        >>> communication_bytes(ranks=2, **sizes)
        Traffic(ulysses=671088640, context_parallel=268435456)
        >>> communication_bytes(ranks=8, **sizes)
        Traffic(ulysses=293601280, context_parallel=469762048)
    """
    v_dim = head_dim if v_dim is None else v_dim
    numbers = {
        "ranks": ranks,
        "seq_len": seq_len,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_dim": v_dim,
        "batch": batch,
    }
    for name, number in numbers.items():
        check_int(name, number, 1)
    vectors = batch * 2 * ceil_div(seq_len, 2 * ranks) * (head_dim + v_dim) * dtype.itemsize
    swapped = vectors * (num_heads + max(num_kv_heads, ranks)) // ranks
    return Traffic(swapped * (ranks - 1), vectors * num_kv_heads * (ranks - 1))
