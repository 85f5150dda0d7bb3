"""Where the blocks of packed documents and of padded rows lie, and which each query may choose."""

from typing import NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_flex.masks.blocks import ceil_div


class Layout(TypedDict, total=False):
    """What a caller says of rows that are more or less than one sequence.

    Attributes:
        cu_seqlens: Where documents start, as of `document_tables`.
        cu_seqlens_q: Where their queries start; where their keys do if None.
        key_mask: Which keys are real, as of `padded_tables`.
    """

    cu_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    key_mask: Tensor | None


class Tables(NamedTuple):
    """Queries and blocks by number, where arithmetic on positions alone does not tell.

    `R` is the batch size, or 1 where all rows are alike. Blocks are numbered in the order of their
    keys; there are at most `N`. A query that sees nothing, being padding, has the position -1, the
    own block `N`, and no candidates.

    Attributes:
        queries: Of each query its position among the keys, its own block, and the first and the
            last block that it may choose (none if that is before the first), int32 `[4, R, Q]`.
        extents: Of each block its first key and the key after its last, int32 `[2, R, N]`; blocks
            follow each other without gaps, and what is no block is empty, at the end.
        block_size: Keys per block.
        causal: Whether only blocks before the own one can be chosen.
        kv_len: Number of keys.
    """

    queries: Tensor
    extents: Tensor
    block_size: int
    causal: bool
    kv_len: int

    @property
    def num_blocks(self) -> int:
        """`N`, the number that stands for no block."""
        return self.extents.shape[2]

    @classmethod
    def of_parts(
        cls,
        queries: Tensor | None,
        extents: Tensor | None,
        block_size: int,
        causal: bool,
        kv_len: int,
    ) -> "Tables | None":
        """Put together what a graph or an op got one by one; None if there are no tensors."""
        if queries is None or extents is None:
            return None
        return cls(queries, extents, block_size, causal, kv_len)


def make_tables(
    q_len: int, kv_len: int, block_size: int, causal: bool, **layout: Unpack[Layout]
) -> Tables | None:
    """Return the tables of packed documents or of padded rows; None if the rows are neither.

    Args:
        q_len: Number of queries.
        kv_len: Number of keys.
        block_size: Keys per block.
        causal: Whether only blocks before the own one can be chosen.
        layout: What the rows are.
    """
    cu_seqlens, key_mask = layout.get("cu_seqlens"), layout.get("key_mask")
    if cu_seqlens is not None:
        starts = layout.get("cu_seqlens_q")
        starts = cu_seqlens if starts is None else starts
        return document_tables(starts, cu_seqlens, q_len, kv_len, block_size, causal)
    if key_mask is not None:
        return padded_tables(key_mask, q_len, block_size, causal)
    return None


def plain_tables(
    q_len: int, kv_len: int, block_size: int, causal: bool, device: torch.device
) -> Tables:
    """Return the tables `R = 1` of one sequence a row, of which queries are the last positions."""
    start = torch.arange(ceil_div(kv_len, block_size), device=device) * block_size
    position = torch.arange(kv_len - q_len, kv_len, device=device)
    queries = plain_queries(position, start, causal)
    # No `clamp`: PyTorch 2.11 does not compile a least number that becomes part of an index.
    stop = start + block_size
    extents = torch.stack((start, stop.where(stop < kv_len, kv_len)))
    queries, extents = (x.int().unsqueeze(1) for x in (queries, extents))
    return Tables(queries, extents, block_size, causal, kv_len)


def plain_queries(position: Tensor, start: Tensor, causal: bool) -> Tensor:
    """Return what `Tables` say of queries at positions `[n]` of one sequence, int `[4, n]`.

    Args:
        position: The positions.
        start: Where the blocks start, `[N]`.
        causal: Whether only blocks before the own one can be chosen.
    """
    # By search, since PyTorch 2.13 compiles a division of all of a range, on CPU, to a loop over
    # whole multiples that leaves the rest unwritten.
    own = torch.bucketize(position, start, right=True) - 1
    newest = own - 1 if causal else torch.full_like(own, start.shape[0] - 1)
    return torch.stack((position, own, torch.zeros_like(own), newest))


def document_tables(
    cu_seqlens_q: Tensor,
    cu_seqlens: Tensor,
    q_len: int,
    kv_len: int,
    block_size: int,
    causal: bool,
) -> Tables:
    """Return the tables `R = 1` of documents that lie one after another.

    Blocks start at the start of each document, and a query chooses among those of its own. What
    lies behind the last document is padding.

    Args:
        cu_seqlens_q: Where the queries of each document start, and the end, int `[docs + 1]`.
        cu_seqlens: Where its keys start, and the end, likewise. The queries of a document are the
            last of its positions.
        q_len: Number of queries.
        kv_len: Number of keys.
        block_size: Keys per block.
        causal: Whether only blocks before the own one can be chosen.
    """
    device, cu_q, cu_k = cu_seqlens.device, cu_seqlens_q.int(), cu_seqlens.int()
    per_document = ceil_div(cu_k.diff(), block_size)
    after = per_document.cumsum(0, dtype=torch.int32)  # number of the block after each document
    before = after - per_document
    last_document = after.shape[0] - 1
    # Each document has at most one short block.
    block = torch.arange(kv_len // block_size + after.shape[0], device=device, dtype=torch.int32)
    document = torch.searchsorted(after, block, right=True).clamp(max=last_document)
    start = cu_k[document] + (block - before[document]) * block_size
    stop = torch.minimum(start + block_size, cu_k[document + 1])
    exists = block < after[last_document]
    extents = torch.stack((start, stop)).where(exists, cu_k[last_document + 1])

    query = torch.arange(q_len, device=device, dtype=torch.int32)
    document = (torch.searchsorted(cu_q, query, right=True) - 1).clamp(max=last_document)
    real = query < cu_q[last_document + 1]
    position = query - cu_q[document + 1] + cu_k[document + 1]
    own = before[document] + (position - cu_k[document]) // block_size
    newest = (own if causal else after[document]) - 1
    queries = _queries(real, position, own, before[document], newest, block.shape[0])
    return Tables(queries.unsqueeze(1), extents.int().unsqueeze(1), block_size, causal, kv_len)


def _queries(
    real: Tensor, position: Tensor, own: Tensor, oldest: Tensor, newest: Tensor, num_blocks: int
) -> Tensor:
    """Return what `Tables` say of queries `[..., Q]`, int32 `[4, ..., Q]`.

    Args:
        real: Which queries are not padding.
        position: Where they are among the keys.
        own: Their own blocks.
        oldest: The first block that each may choose.
        newest: The last one.
        num_blocks: `N`.
    """
    queries = (
        position.where(real, -1),
        own.where(real, num_blocks),
        oldest.where(real, 0),
        newest.where(real, -1),
    )
    return torch.stack(queries).int()


def padded_tables(key_mask: Tensor, q_len: int, block_size: int, causal: bool) -> Tables:
    """Return the tables `R = B` of rows with padding.

    Args:
        key_mask: True for the keys that are not padding, bool `[B, KV]`: one run a row, or none.
        q_len: Number of queries, the last of the positions.
        block_size: Keys per block, counted from each row's first key.
        causal: Whether only blocks before the own one can be chosen.
    """
    kv_len, device = key_mask.shape[1], key_mask.device
    # Padded, so that there is a largest value where there are no keys.
    first = F.pad(key_mask.int(), (0, 1)).argmax(dim=1, keepdim=True)
    after = first + key_mask.sum(dim=1, keepdim=True)
    num_blocks = ceil_div(kv_len, block_size)
    start = first + torch.arange(num_blocks, device=device) * block_size
    extents = torch.stack((torch.minimum(start, after), torch.minimum(start + block_size, after)))

    position = torch.arange(kv_len - q_len, kv_len, device=device)
    real = (position >= first) & (position < after)
    own = (position - first) // block_size
    newest = own - 1 if causal else ceil_div(after - first, block_size) - 1
    queries = _queries(real, position, own, torch.zeros_like(own), newest, num_blocks)
    return Tables(queries, extents.int(), block_size, causal, kv_len)
