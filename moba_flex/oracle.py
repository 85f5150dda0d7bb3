"""The contract in code: Mixture of Block Attention as a plain masked softmax.

Nothing here is fast, and nothing is shared with the rest of the library: the tests compare the
library with it.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """The result of the oracle.

    Attributes:
        out: Attention output, `[B, Hq, Q, Dv]`, in the computing dtype.
        lse: Natural log of the sum of exponentials of each query's scores, `[B, Hq, Q]`.
        blocks: The chosen blocks, own block included, bool `[B, Hq, Q, N]`. For packed documents
            `N` is `KV // block_size + docs`, and blocks are numbered from document to document.
    """

    out: Tensor
    lse: Tensor
    blocks: Tensor


class _Sequence(NamedTuple):
    """A document or an unpadded row: a run of keys, and the queries that see no other keys.

    Attributes:
        row: Row of the batch.
        queries: Range of its queries in the row.
        keys: Range of its keys in the row.
        offset: Position of its first query among its keys.
        first_block: Number of its first block.
    """

    row: int
    queries: slice
    keys: slice
    offset: int
    first_block: int


def moba_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    head_top_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    score_mod: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    blocks: Tensor | None = None,
) -> ReferenceOutput:
    """Compute Mixture of Block Attention the slow, obvious way.

    Every query attends, in one joint softmax, to the tokens of its own block and of the `top_k -
    1` blocks whose mean keys have the largest dot products with it (arXiv 2502.13189, section
    2.2). Memory is `O(Q * KV)`.

    Args:
        q: Queries, `[B, Hq, Q, D]`: the last `Q` of the `KV` positions.
        k: Keys, `[B, Hkv, KV, D]`, with `Hq` a multiple of `Hkv`.
        v: Values, `[B, Hkv, KV, Dv]`.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one that are always chosen; they count in
            `top_k`.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores; `1 / sqrt(D)` if None. The gate never uses it.
        head_top_k: `top_k` of each head, int `[Hq]`, or of each head in each row, `[B, Hq]`.
        cu_seqlens: Where packed documents start, and the end `KV`, int `[docs + 1]`.
        cu_seqlens_q: Where the queries of each document start, if not where its keys do. They are
            the last positions of the document.
        key_mask: True for keys that are not padding, bool `[B, KV]`, in one run per row.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        score_mod: Changes a score after that, given the score, `b`, `h`, `q_idx` and `kv_idx`.
        mask_mod: Says whether a query may see a key, given `b`, `h`, `q_idx` and `kv_idx`.
        dtype: Computing dtype of scores, softmax and output.
        blocks: A choice to use instead of the gate's own, bool `[B, Hq, Q, N]`.

    Returns:
        Output, log-sum-exp and the chosen blocks. A query that sees no key has output 0 and
        log-sum-exp -inf. Differentiable in `q`, `k` and `v`; the gate carries no gradient.

    Example:
        Four tokens, each a block of its own. Every query chooses itself and the earlier key with
        the largest dot product:

        >>> q = torch.ones(1, 1, 4, 1)
        >>> k = torch.tensor([3.0, 1.0, 2.0, 0.0]).view(1, 1, 4, 1)
        >>> out, lse, blocks = moba_attention_reference(q, k, k, block_size=1, top_k=2)
        >>> blocks[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 0, 0, 1]], dtype=torch.int32)
        >>> out.shape, lse.shape
        (torch.Size([1, 1, 4, 1]), torch.Size([1, 1, 4]))
    """
    batch, num_heads, q_len, head_dim = q.shape
    kv_len, docs = k.shape[2], 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_blocks = kv_len // block_size + docs if docs else -(-kv_len // block_size)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    group = num_heads // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    everywhere = torch.full((num_heads,), top_k, device=q.device)
    limit = everywhere if head_top_k is None else head_top_k

    out = torch.zeros(batch, num_heads, q_len, v.shape[3], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    chosen = torch.zeros(*q.shape[:3], num_blocks, dtype=torch.bool, device=q.device)
    for sequence in _sequences(
        batch, q_len, kv_len, block_size, cu_seqlens, cu_seqlens_q, key_mask
    ):
        row, queries, keys, offset, first = sequence
        if queries.start == queries.stop:  # vmap does not map over 0 queries
            continue
        some_q, some_k, some_v = q[row, :, queries], k[row, :, keys], v[row, :, keys]
        q_pos = offset + torch.arange(some_q.shape[1], device=q.device)
        kv_pos = torch.arange(some_k.shape[1], device=q.device)
        own, block = q_pos // block_size, kv_pos // block_size
        numbers = slice(first, first + -(-some_k.shape[1] // block_size))
        if blocks is not None:
            some_blocks = blocks[row, :, queries, numbers]
        else:
            with torch.no_grad():
                numbers_of_heads = limit if limit.dim() == 1 else limit[row]
                gate = numbers_of_heads.to(q.device), sink_blocks, local_blocks, causal
                some_blocks = _gate(some_q, some_k, own, block_size, *gate)
        chosen[row, :, queries, numbers] = some_blocks

        b, h = torch.tensor(row, device=q.device), torch.arange(num_heads, device=q.device)
        places = b, h, q_pos - offset + queries.start, kv_pos + keys.start
        mask = some_blocks[..., block]
        if causal:
            mask = mask & (kv_pos <= q_pos[:, None])
        if mask_mod is not None:
            mask = mask & _over_pairs(mask_mod)(*places)
        scores = (some_q.to(dtype) @ some_k.to(dtype).mT) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if score_mod is not None:
            scores = _over_pairs(score_mod, scores=True)(scores, *places).to(dtype)
        sees = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask, -math.inf).masked_fill(~sees, 0.0)
        weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)
        out[row, :, queries] = weights @ some_v.to(dtype)
        lse[row, :, queries] = scores.logsumexp(dim=-1).masked_fill(~sees.squeeze(-1), -math.inf)
    return ReferenceOutput(out, lse, chosen)


def _sequences(
    batch: int,
    q_len: int,
    kv_len: int,
    block_size: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    key_mask: Tensor | None,
) -> Iterator[_Sequence]:
    """Yield every document of every row, or every row without its padding."""
    for row in range(batch):
        if cu_seqlens is not None:
            starts = cu_seqlens.tolist()
            q_starts = starts if cu_seqlens_q is None else cu_seqlens_q.tolist()
            first_block = 0
            for i in range(len(starts) - 1):
                queries, keys = (slice(x[i], x[i + 1]) for x in (q_starts, starts))
                length = keys.stop - keys.start
                if length:
                    offset = length - (queries.stop - queries.start)
                    yield _Sequence(row, queries, keys, offset, first_block)
                first_block += -(-length // block_size)
            continue
        real = range(kv_len) if key_mask is None else key_mask[row].nonzero().flatten().tolist()
        if len(real) == 0:
            continue
        keys = slice(real[0], real[-1] + 1)
        before = kv_len - q_len
        queries = slice(max(keys.start - before, 0), max(keys.stop - before, 0))
        yield _Sequence(row, queries, keys, before + queries.start - keys.start, 0)


def _over_pairs(mod: Callable[..., Tensor], scores: bool = False) -> Callable[..., Tensor]:
    """Map a mod of one score over h `[H]`, q_idx `[Q]`, kv_idx `[KV]` and all scores."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        mod = torch.vmap(mod, in_dims=(0, *dims) if scores else dims)
    return mod


def _gate(
    q: Tensor,
    k: Tensor,
    own: Tensor,
    block_size: int,
    limit: Tensor,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Tensor:
    """Choose `limit` `[H]` blocks, bool `[H, Q, N]`, for q `[H, Q, D]` and k `[H, KV, D]`."""
    means = [_mean(part).to(k.dtype) for part in k.split(block_size, dim=1)]
    num_blocks = len(means)
    # Products and sums in float64 leave one rounding, to float32, so that equal block keys give
    # equal affinities.
    affinity = (q.double() @ torch.stack(means, dim=1).double().mT).float()
    largest = torch.finfo(torch.float32).max
    affinity = affinity.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)

    block = torch.arange(num_blocks, device=q.device)
    own = own[:, None]
    candidate = block < own if causal else block != own
    forced = (block < sink_blocks) | ((block < own) & (block >= own - local_blocks))
    affinity = affinity.masked_fill(forced & candidate, math.inf).masked_fill(
        ~candidate, -math.inf
    )

    # Blocks are sorted stably, from last to first, so that the more recent of two equals comes
    # first.
    ranked = affinity.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    best = (block < limit[:, None, None] - 1).expand_as(ranked)
    chosen = torch.zeros_like(best).scatter(-1, num_blocks - 1 - ranked, best)
    return chosen & candidate | (block == own)


def _mean(keys: Tensor) -> Tensor:
    """Average keys `[H, n, D]` in float32, added one after another in their order."""
    total = torch.zeros_like(keys[:, 0], dtype=torch.float32)
    for key in keys.float().unbind(1):
        total = total + key
    return total / keys.shape[1]
