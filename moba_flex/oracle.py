"""The contract in code: Mixture of Block Attention as a plain masked softmax.

Nothing here is fast and nothing here is shared with the rest of the library, which is held to it
by the tests.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """What the oracle returns.

    Attributes:
        out: Attention output, `[B, Hq, Q, D]`, in the computing dtype.
        lse: Natural-log sum of exponentials of the scaled scores of each row, `[B, Hq, Q]`.
        blocks: The chosen blocks, own block included, bool `[B, Hq, Q, N]`.
    """

    out: Tensor
    lse: Tensor
    blocks: Tensor


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
    dtype: torch.dtype = torch.float32,
    blocks: Tensor | None = None,
) -> ReferenceOutput:
    """Compute Mixture of Block Attention the slow, obvious way.

    Every query attends, in one joint softmax, to the tokens of its own block and of the `top_k -
    1` blocks whose mean key it likes best (arXiv 2502.13189, section 2.2). Memory is `O(Q * KV)`.

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
        dtype: Computing dtype of scores, softmax and output.
        blocks: A choice to use instead of the gate's own, bool `[B, Hq, Q, N]`.

    Returns:
        Output, log-sum-exp and the chosen blocks. Differentiable in `q`, `k`, `v`; the gate
        carries no gradient.
    """
    q_len, kv_len, head_dim = q.shape[2], k.shape[2], q.shape[3]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q_pos = torch.arange(kv_len - q_len, kv_len, device=q.device)
    kv_pos = torch.arange(kv_len, device=q.device)

    if blocks is None:
        with torch.no_grad():
            blocks = _gate(
                q, k, q_pos // block_size, block_size, top_k, sink_blocks, local_blocks, causal
            )
    mask = blocks[..., kv_pos // block_size]
    if causal:
        mask = mask & (kv_pos <= q_pos[:, None])

    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = (q.to(dtype) @ k.to(dtype).mT) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(dim=-1)
    out = scores.softmax(dim=-1) @ v.to(dtype)
    return ReferenceOutput(out, lse, blocks)


def _gate(
    q: Tensor,
    k: Tensor,
    own: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Tensor:
    """Choose blocks, bool `[B, H, Q, N]`, for q `[B, H, Q, D]` and k `[B, H, KV, D]`."""
    means = [part.float().mean(dim=2).to(k.dtype) for part in k.split(block_size, dim=2)]
    num_blocks = len(means)
    # Products and sums in float64 leave one rounding, to float32, so that equal block keys give
    # equal affinities.
    affinity = (q.double() @ torch.stack(means, dim=2).double().mT).float()
    largest = torch.finfo(torch.float32).max
    affinity = affinity.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)

    block = torch.arange(num_blocks, device=q.device)
    own = own[:, None]
    candidate = block < own if causal else block != own
    forced = (block < sink_blocks) | ((block < own) & (block >= own - local_blocks))
    affinity = affinity.masked_fill(forced & candidate, math.inf).masked_fill(
        ~candidate, -math.inf
    )

    # A stable sort of the blocks from last to first puts the more recent of two equals in front.
    best = affinity.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., : top_k - 1]
    chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, num_blocks - 1 - best, True)
    return chosen & candidate | (block == own)
