"""Use any router: MoBA's attention over blocks that something else has chosen.

python tests/examples/plug_in_a_router.py [--tokens 1024]

A router only has to list block numbers. Here it scores blocks by their largest keys instead of
their mean, first for each query head, then once for all query heads that share a key/value head.
"""

import argparse

import torch
from torch import Tensor

from moba_flex import Routing, moba_attention_reference, routed_attention

BLOCK_SIZE, TOP_K = 64, 4


def affinity_to_peaks(q: Tensor, k: Tensor) -> Tensor:
    """Return how well each query likes each block, `[B, Hkv, Hq / Hkv, Q, N]`."""
    peaks = k.unflatten(2, (-1, BLOCK_SIZE)).amax(3)  # [B, Hkv, N, D]
    affinity = q.unflatten(1, (k.shape[1], -1)) @ peaks.unsqueeze(2).mT
    own = torch.arange(q.shape[2])[:, None] // BLOCK_SIZE
    return affinity.masked_fill(torch.arange(peaks.shape[2]) >= own, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """Attend to listed blocks, `[B, Hq or Hkv, Q, K]`.

    A list is a set, and the query's own block is in it. Early queries have fewer than K blocks
    before them; whatever else topk lists for them lies in the future and is ignored.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    routing = Routing(blocks, block_size=BLOCK_SIZE, q_len=q_len, kv_len=kv_len, causal=True)
    return routed_attention(q, k, v, routing)


def expect(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """Return what the naive reference says, given the same choice as a mask `[B, Hq, Q, N]`."""
    num_blocks = k.shape[2] // BLOCK_SIZE
    own = torch.arange(q.shape[2])[:, None] // BLOCK_SIZE
    chosen = (torch.arange(num_blocks) == own).expand(*blocks.shape[:3], -1)
    chosen = chosen.scatter(3, blocks, True).repeat_interleave(q.shape[1] // blocks.shape[1], 1)
    return moba_attention_reference(q, k, v, block_size=BLOCK_SIZE, top_k=TOP_K, blocks=chosen).out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {BLOCK_SIZE}")
    tokens = parser.parse_args().tokens
    torch.manual_seed(0)
    q = torch.randn(2, 8, tokens, 32, requires_grad=True)  # 8 query heads
    k, v = torch.randn(2, 2, 2, tokens, 32)  # 2 key/value heads
    affinity = affinity_to_peaks(q, k).detach()
    for name, blocks in {
        "query head": affinity.topk(TOP_K - 1).indices.flatten(1, 2),
        "key/value head": affinity.sum(2).topk(TOP_K - 1).indices,
    }.items():
        out = attend(q, k, v, blocks)
        error = (out - expect(q, k, v, blocks)).abs().max().item()
        print(f"lists per {name}, {tuple(blocks.shape)}: largest error {error:.1e}")
    out.sum().backward()  # gradients reach q, k and v, and not the choice
