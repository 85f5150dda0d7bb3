"""Where the sequences of a batch lie, and where their blocks do.

This is the only place that turns lengths, documents and padding into positions and block numbers.
"""

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

if importlib.util.find_spec("triton") is not None:  # it comes with the CUDA builds of PyTorch
    from moba_flex.masks.layout_kernel import locate_triton

Number = TypeVar("Number", int, Tensor)

LONGEST = 2**30
"""No sequence is longer, so that positions, and a block or two past them, fit into int32."""


def ceil_div(length: Number, size: int) -> Number:
    """Return how many blocks of `size` cover `length` positions; the last may be short."""
    return (length + size - 1) // size


class RowOptions(TypedDict, total=False):
    """Options for rows that hold several documents, or a sequence and padding.

    Attributes:
        cu_seqlens: Where the documents of every row start, and where the last one ends, int `[docs
            + 1]`. Keys behind the last document are padding.
        cu_seqlens_q: Where the queries of each document start, likewise; None if queries start
            where keys do. The queries of a document are the last of its positions.
        key_mask: True for the keys that are not padding, bool `[B, KV]`: one run a row, or none.
    """

    cu_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    key_mask: Tensor | None


class Coordinates(NamedTuple):
    """Positions and block numbers as tensors, int32; `R` is 1 where all rows are alike, else `B`.

    Two documents of 3 and 1 tokens, in blocks of 2 keys, have 3 blocks; `N` is 4, the most that 4
    tokens in 2 documents can have:

        token      0  1  2 | 3         block    0  1  2  3
        position   0  1  2 | 3         start    0  2  3  4
        own        0  0  1 | 2         stop     2  3  4  4
        oldest     0  0  0 | 2
        newest    -1 -1  0 | 1

    Token 2 may choose block 0; token 3 may choose none, since 1 lies before 2.

    Attributes:
        position: Place of each query among the keys, `[R, Q]`; -1 for padding.
        own: Block of that place; `N` for padding.
        oldest: First block that the query may choose.
        newest: Last block that the query may choose; none if it lies before `oldest`.
        start: First key of each block, `[R, N]`. Blocks follow each other without gaps.
        stop: The key after the last of each block; numbers that no block has are empty, at the
            end.
    """

    position: Tensor
    own: Tensor
    oldest: Tensor
    newest: Tensor
    start: Tensor
    stop: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the queries and the blocks of a batch lie.

    `make_tables` makes those of packed documents and of padded rows.

    Rows that are one sequence each need no tensors: arithmetic on the numbers below tells all.
    Packed documents and padded rows carry `queries` and `extents`, which kernels read.

    Example:
        >>> Layout(q_len=3, kv_len=5, block_size=2, causal=True).coordinates("cpu").own.tolist()
        [[1, 1, 2]]

    Attributes:
        q_len: Number of queries, `Q`.
        kv_len: Number of keys, `KV`. Queries of a plain row are the last of these positions.
        block_size: Keys per block.
        causal: Whether only blocks before the own one can be chosen.
        queries: `position`, `own`, `oldest` and `newest` of `Coordinates`, int32 `[4, R, Q]`; None
            for plain rows.
        extents: `start` and `stop` of `Coordinates`, int32 `[2, R, N]`; None for plain rows.
    """

    q_len: int
    kv_len: int
    block_size: int
    causal: bool
    queries: Tensor | None = None
    extents: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """`N`, which is also the number that stands for no block."""
        if self.extents is not None:
            return self.extents.shape[2]
        return ceil_div(self.kv_len, self.block_size)

    @property
    def q_offset(self) -> int:
        """Position of the first query of a plain row."""
        return self.kv_len - self.q_len

    def with_tables(self, queries: Tensor | None, extents: Tensor | None) -> "Layout":
        """Return the layout of the same sizes and options that carries these tensors."""
        return Layout(self.q_len, self.kv_len, self.block_size, self.causal, queries, extents)

    def part(self, start: int, stop: int, device: torch.device | str) -> "Layout":
        """Return the layout of the queries `start..stop` alone.

        Where rows are plain and causal, it is of the keys up to the last of these queries.
        """
        q_len = stop - start
        if self.extents is None and self.causal:
            return Layout(q_len, self.q_offset + stop, self.block_size, True)
        at = self.coordinates(device)
        queries = torch.stack(at[:4])[:, :, start:stop]
        sizes = q_len, self.kv_len, self.block_size, self.causal
        return Layout(*sizes, queries, torch.stack(at[4:]))

    def coordinates(self, device: torch.device | str) -> Coordinates:
        """Return positions and block numbers as tensors, for plain rows too."""
        if self.queries is not None and self.extents is not None:
            return Coordinates(*self.queries, *self.extents)
        start = torch.arange(self.num_blocks, device=device) * self.block_size
        position = torch.arange(self.q_offset, self.kv_len, device=device)
        # No `clamp`: PyTorch 2.11 does not compile a least number that becomes part of an index.
        stop = start + self.block_size
        stop = stop.where(stop < self.kv_len, self.kv_len)
        columns = *plain_coordinates(position, start, self.causal), start, stop
        return Coordinates(*(x.int().unsqueeze(0) for x in columns))


class Slots(NamedTuple):
    """Where the keys of each row of a cache lie, and where its queries do; int `[B]` each.

    Attributes:
        query: Slot of the first query; None if the queries are those of the last keys. Queries
            outside of `start` to `stop` are padding.
        start: Slot of the first key.
        stop: The slot after the last key.
    """

    query: Tensor | None
    start: Tensor
    stop: Tensor


class NewKeys(NamedTuple):
    """Keys and values that a plan is to append to a cache before it attends.

    Attributes:
        keys: Keys, `[B, Hkv, T, D]`.
        values: Values, `[B, Hkv, T, Dv]`.
        counts: How many of the `T` each row takes, int32 `[B]`; None for all.
        sums: Sums of the cache's blocks, as of `append`.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor | None
    sums: Tensor


class Pages(NamedTuple):
    """A cache whose slots lie in pages, each of whole blocks.

    Attributes:
        keys: Keys of all pages, `[P, Hkv, page_size, D]`.
        values: Values of all pages, `[P, Hkv, page_size, Dv]`.
        block_keys: Mean keys of the blocks of all pages, `[P, Hkv, page_size / block_size, D]`.
        table: Page of each `page_size` slots of a row, int32 `[B, W]`; where a row has no keys,
            anything.
    """

    keys: Tensor
    values: Tensor
    block_keys: Tensor
    table: Tensor

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and block keys of the rows, each in one piece: a copy."""
        table = self.table.long().clamp(0, self.keys.shape[0] - 1)
        keys, values = join_pages(self.keys, table), join_pages(self.values, table)
        return keys, values, join_pages(self.block_keys, table)


def join_pages(x: Tensor, table: Tensor) -> Tensor:
    """Return the pages of `x`, `[P, Hkv, n, D]`, that a table `[..., W]` names, in one piece.

    Its shape is `[..., Hkv, W * n, D]`.
    """
    return x[table].transpose(-4, -3).flatten(-3, -2)


def locate_slots(plain: Layout, slots: Slots) -> Layout:
    """Return the layout of the same sizes and options, for rows of a cache."""
    if slots.start.is_cuda:
        sizes = plain.q_len, plain.num_blocks, plain.block_size
        tables = locate_triton(slots.start, slots.stop, slots.query, *sizes, plain.causal)
        return plain.with_tables(*tables)
    start, stop = slots.start.unsqueeze(1), slots.stop.unsqueeze(1)
    query = stop - plain.q_len if slots.query is None else slots.query.unsqueeze(1)
    offset = torch.arange(plain.q_len, device=start.device)
    return _between(plain, query + offset, start, stop)


def locate(plain: Layout, rows: RowOptions) -> Layout:
    """Return the layout of the same sizes and options, for what the rows of a batch hold."""
    cu_seqlens, key_mask = rows.get("cu_seqlens"), rows.get("key_mask")
    if cu_seqlens is not None:
        starts = rows.get("cu_seqlens_q")
        return _packed(plain, cu_seqlens if starts is None else starts, cu_seqlens)
    return plain if key_mask is None else _padded(plain, key_mask)


def make_tables(
    q_len: int, kv_len: int, block_size: int, causal: bool, **rows: Unpack[RowOptions]
) -> Layout | None:
    """Return the layout of packed documents or of padded rows; None if the rows are neither.

    Args:
        q_len: Number of queries.
        kv_len: Number of keys.
        block_size: Keys per block.
        causal: Whether only blocks before the own one can be chosen.
        rows: `cu_seqlens`, `cu_seqlens_q` and `key_mask`, as of `moba_flex.moba_attention`.

    Example:
        >>> import torch
        >>> layout = make_tables(4, 4, 2, True, cu_seqlens=torch.tensor([0, 3, 4]))
        >>> layout.num_blocks, layout.coordinates("cpu").own.tolist()
        (4, [[0, 0, 1, 2]])
    """
    layout = locate(Layout(q_len, kv_len, block_size, causal), rows)
    return None if layout.extents is None else layout


def plain_coordinates(position: Tensor, start: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Return position, own, oldest and newest of queries of one sequence, int `[n]` each.

    Args:
        position: Places of the queries, int `[n]`.
        start: First key of each block, `[N]`.
        causal: Whether only blocks before the own one can be chosen.
    """
    # A search, since PyTorch 2.13 compiles a division of a whole range for CPU into a loop over
    # full vectors, and leaves the rest of the result unwritten.
    own = torch.bucketize(position, start, right=True) - 1
    newest = own - 1 if causal else torch.full_like(own, start.shape[0] - 1)
    return position, own, torch.zeros_like(own), newest


def _packed(plain: Layout, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Layout:
    """Return the layout of documents that lie one after another in every row.

    Blocks are counted from the start of each document, and a query chooses among those of its own
    document.
    """
    block_size = plain.block_size
    device, cu_q, cu_k = cu_seqlens.device, cu_seqlens_q.int(), cu_seqlens.int()
    per_document = ceil_div(cu_k.diff(), block_size)
    after = per_document.cumsum(0, dtype=torch.int32)  # number of the block after each document
    before = after - per_document
    last_document = after.shape[0] - 1
    # Each document has at most one short block.
    most = plain.kv_len // block_size + after.shape[0]
    block = torch.arange(most, device=device, dtype=torch.int32)
    document = torch.searchsorted(after, block, right=True).clamp(max=last_document)
    start = cu_k[document] + (block - before[document]) * block_size
    stop = torch.minimum(start + block_size, cu_k[document + 1])
    exists = block < after[last_document]
    extents = torch.stack((start, stop)).where(exists, cu_k[last_document + 1])

    query = torch.arange(plain.q_len, device=device, dtype=torch.int32)
    document = (torch.searchsorted(cu_q, query, right=True) - 1).clamp(max=last_document)
    real = query < cu_q[last_document + 1]
    position = query - cu_q[document + 1] + cu_k[document + 1]
    own = before[document] + (position - cu_k[document]) // block_size
    newest = (own if plain.causal else after[document]) - 1
    queries = _queries(real, position, own, before[document], newest, block.shape[0])
    return plain.with_tables(queries.unsqueeze(1), extents.int().unsqueeze(1))


def _padded(plain: Layout, key_mask: Tensor) -> Layout:
    """Return the layout of padded rows, whose blocks are counted from the first real key."""
    # Padded by one column, so that `argmax` finds one where there are no keys.
    first = F.pad(key_mask.int(), (0, 1)).argmax(dim=1, keepdim=True)
    after = first + key_mask.sum(dim=1, keepdim=True)
    position = torch.arange(plain.q_offset, plain.kv_len, device=key_mask.device)
    return _between(plain, position, first, after)


def _between(plain: Layout, position: Tensor, first: Tensor, after: Tensor) -> Layout:
    """Return the layout of rows whose real keys lie in one piece.

    Args:
        plain: Sizes and options.
        position: Places of the queries among the keys, `[Q]` or `[B, Q]`.
        first: Place of the first real key, `[B, 1]`.
        after: The place after the last one, `[B, 1]`.
    """
    block_size, num_blocks = plain.block_size, ceil_div(plain.kv_len, plain.block_size)
    start = first + torch.arange(num_blocks, device=first.device) * block_size
    extents = torch.stack((torch.minimum(start, after), torch.minimum(start + block_size, after)))
    real = (position >= first) & (position < after)
    own = (position - first) // block_size
    newest = own - 1 if plain.causal else ceil_div(after - first, block_size) - 1
    queries = _queries(real, position, own, torch.zeros_like(own), newest, num_blocks)
    return plain.with_tables(queries, extents.int())


def _queries(
    real: Tensor, position: Tensor, own: Tensor, oldest: Tensor, newest: Tensor, num_blocks: int
) -> Tensor:
    """Return the coordinates of queries, int32 `[4, ..., Q]`, where `real` says which exist."""
    columns = (
        position.where(real, -1),
        own.where(real, num_blocks),
        oldest.where(real, 0),
        newest.where(real, -1),
    )
    return torch.stack(columns).int()
