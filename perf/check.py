"""Is an implementation right? Asked before it is timed, on a sample of the queries.

The reference here is written apart from the library, in float64, for a few queries only, so that
it reaches lengths at which a whole reference would not fit.
"""

import math

import torch
from torch import Tensor

from perf.peers import Attention
from perf.shapes import Shape

QUERIES = 32
# Relative error of a query's output, or of a whole gradient, that a right answer stays below.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# The gate decides by rounded scores, and implementations round their block means differently: a
# query with two blocks of nearly the same affinity may take the other one.
RIGHT_ROWS = 0.95


def check(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, shape: Shape, *, sparse: bool
) -> dict[str, float]:
    """Compare an implementation with the reference; its gradients too, if the inputs want them.

    Args:
        attend: The implementation.
        q: Queries, `[B, Hq, S, D]`.
        k: Keys, `[B, Hkv, S, D]`.
        v: Values, `[B, Hkv, S, D]`.
        shape: What the inputs were made from.
        sparse: Whether it should compute MoBA, or else dense causal attention.

    Returns:
        What was found: the median relative error of a query, and the share of right ones.

    Raises:
        AssertionError: If it is wrong.
    """
    tolerance = TOLERANCE[q.dtype]
    block_size, top_k = (shape.block_size, shape.top_k) if sparse else (shape.seq_len, 1)
    rows = torch.linspace(0, shape.seq_len - 1, QUERIES, device=q.device).long()
    out = attend(q, k, v)
    expected = reference_rows(q, k, v, rows, block_size, top_k)
    error = _relative(out[:, :, rows].detach(), expected.detach())
    right = error < tolerance
    share = float(right.float().mean())
    median = float(error.median())
    assert share >= RIGHT_ROWS, f"{share:.1%} of the queries are right; median error {median:.2g}"
    if out.requires_grad:
        grad_rows = torch.randn_like(expected) * right[..., None]
        grad_out = torch.zeros_like(out).index_copy(2, rows, grad_rows.to(out.dtype))
        grads = torch.autograd.grad(out, (q, k, v), grad_out)
        expected_grads = torch.autograd.grad(expected, (q, k, v), grad_out[:, :, rows].double())
        for name, grad, expected_grad in zip("qkv", grads, expected_grads, strict=True):
            grad_error = float(_relative(grad.flatten(), expected_grad.flatten()))
            assert grad_error < tolerance, f"the gradient of {name} is off by {grad_error:.2g}"
    return {"error": median, "right_rows": share}


def reference_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, block_size: int, top_k: int
) -> Tensor:
    """Compute MoBA (arXiv 2502.13189) for some queries of a causal self-attention, in float64.

    Args:
        q: Queries, `[B, Hq, S, D]`.
        k: Keys, `[B, Hkv, S, D]`.
        v: Values, `[B, Hkv, S, D]`.
        rows: Positions of the `R` queries, `[R]`.
        block_size: Keys per routed block.
        top_k: Blocks a query attends to, its own included.

    Returns:
        Outputs, `[B, Hq, R, D]`.
    """
    group = q.shape[1] // k.shape[1]
    rounded_to = k.dtype
    q = q[:, :, rows].double()
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    seq_len, head_dim = k.shape[2:]
    with torch.no_grad():
        means = torch.stack([block.mean(2) for block in k.split(block_size, 2)], 2)
        affinity = q @ means.to(rounded_to).double().mT
        blocks = torch.arange(means.shape[2], device=q.device)
        own = (rows // block_size)[:, None]
        affinity = affinity.masked_fill(blocks == own, math.inf)
        affinity = affinity.masked_fill(blocks > own, -math.inf)
        best = affinity.topk(min(top_k, len(blocks)), -1).indices
        chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, best, True)
        positions = torch.arange(seq_len, device=q.device)
        mask = chosen[..., positions // block_size] & (positions <= rows[:, None])
    logits = (q @ k.mT / math.sqrt(head_dim)).masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
