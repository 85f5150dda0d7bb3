"""Is an implementation right? Asked before it is timed, on a sample of the queries.

The reference here is written apart from the library, in float64, for a few queries only, so that
it reaches lengths at which a whole reference would not fit.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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

Index = tuple[slice, slice]


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
    rows = torch.linspace(shape.padding, shape.seq_len - 1, QUERIES, device=q.device)
    rows = rows.long().unique()
    keys = number_keys(shape, block_size, q.device)

    def reference(q_rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = gate(q_rows, k, rows, keys, top_k)
        return attend_rows(q_rows, k, v, rows, blocks, keys.block, shape.softcap)

    out = attend(q, k, v)
    assert not out[:, :, : shape.padding].any(), "padding must get zeros, got others"
    expected = torch.empty_like(out[:, :, rows], dtype=torch.float64)
    with torch.no_grad():
        for of_q, of_k in by_head(q, k):
            expected[of_q] = reference(q[of_q][:, :, rows], k[of_k], v[of_k])
    error = (out[:, :, rows].detach() - expected).norm(dim=-1) / expected.norm(dim=-1)
    right = error < tolerance
    share = float(right.float().mean())
    median = float(error.median())
    assert share >= RIGHT_ROWS, f"{share:.1%} of the queries are right; median error {median:.2g}"
    if out.requires_grad:
        grad_rows = (torch.randn_like(expected) * right[..., None]).to(out.dtype)
        grad_out = torch.zeros_like(out).index_copy_(2, rows, grad_rows)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out)

        def gradients() -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
            for of_q, of_k in by_head(q, k):
                of_head = (q[of_q][:, :, rows], k[of_k], v[of_k])
                leaves = [x.detach().requires_grad_() for x in of_head]
                grad = grad_rows[of_q].double()
                exact = torch.autograd.grad(reference(*leaves), leaves, grad)
                yield (dq[of_q][:, :, rows], dk[of_k], dv[of_k]), exact

        for name, grad_error in zip("qkv", relative_errors(gradients()), strict=True):
            assert grad_error < tolerance, f"the gradient of {name} is off by {grad_error:.2g}"
    return {"error": median, "right_rows": share}


def by_head(q: Tensor, k: Tensor) -> Iterator[tuple[Index, Index]]:
    """Yield where each key head of each sequence lies: its `G` query heads, and itself.

    Head by head, what is computed in float64 fits at any length.
    """
    group = q.shape[1] // k.shape[1]
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            batch = slice(b, b + 1)
            yield (batch, slice(h * group, (h + 1) * group)), (batch, slice(h, h + 1))


class Keys(NamedTuple):
    """Of each key its block and its document, int `[S]`. Padding is a document of its own."""

    block: Tensor
    document: Tensor


def number_keys(shape: Shape, block_size: int, device: torch.device) -> Keys:
    """Number the blocks of a row, which start anew at the start of each document."""
    starts = sorted({0, *range(shape.padding, shape.seq_len, shape.length)})
    position = torch.arange(shape.seq_len, device=device)
    start = torch.tensor(starts, device=device)
    document = torch.bucketize(position, start, right=True) - 1
    begins = (position - start[document]) % block_size == 0
    return Keys(begins.cumsum(0) - 1, document)


def gate(q: Tensor, k: Tensor, rows: Tensor, keys: Keys, top_k: int) -> Tensor:
    """Choose blocks for some queries (arXiv 2502.13189, equations 5 to 7).

    Args:
        q: The `R` queries of a key head, `[1, G, R, D]`.
        k: Its keys, `[1, 1, S, D]`.
        rows: Positions of the queries, `[R]`.
        keys: Where blocks and documents lie.
        top_k: Blocks a query attends to, its own included.

    Returns:
        The others' numbers, int `[1, G, R, K - 1]`; the number of blocks stands for none.
    """
    with torch.no_grad():
        block, document = keys
        size = block.bincount()
        total = k.new_zeros(1, 1, len(size), k.shape[3], dtype=torch.float64)
        means = total.index_add(2, block, k.double()) / size[:, None]
        affinity = q.double() @ means.to(k.dtype).double().mT
        number, first = torch.arange(len(size), device=k.device), size.cumsum(0) - size
        past = (number < block[rows, None]) & (document[first] == document[rows, None])
        best = affinity.masked_fill(~past, -math.inf).topk(min(top_k, len(size)) - 1)
        return best.indices.masked_fill(best.values == -math.inf, len(size))


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    blocks: Tensor,
    block: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Attend, in float64, with some queries to their own blocks and to chosen ones.

    Args:
        q: The `R` queries of a key head, `[1, G, R, D]`.
        k: Its keys, `[1, 1, S, D]`.
        v: Its values, `[1, 1, S, D]`.
        rows: Positions of the queries, `[R]`.
        blocks: What `gate` returns.
        block: The block of each key, int `[S]`.
        softcap: What scores are capped at, if they are.

    Returns:
        Outputs, `[1, G, R, D]`.
    """
    positions = torch.arange(k.shape[2], device=k.device)
    chosen = torch.zeros(*q.shape[:3], int(block[-1]) + 2, dtype=torch.bool, device=k.device)
    chosen.scatter_(3, blocks.long(), True)
    mask = (chosen[..., block] | (block == block[rows, None])) & (positions <= rows[:, None])
    logits = q.double() @ k.double().mT / math.sqrt(k.shape[3])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~mask, -math.inf).softmax(-1) @ v.double()


def relative_errors(heads: Iterable[tuple[Iterable[Tensor], Iterable[Tensor]]]) -> list[float]:
    """Compare several tensors that come head by head, each time as `(actual, exact)`."""
    squares = torch.tensor(
        [
            [
                [float((x.double() - y).square().sum()), float(y.double().square().sum())]
                for x, y in zip(actual, exact, strict=True)
            ]
            for actual, exact in heads
        ],
        dtype=torch.float64,
    )
    wrong, whole = squares.sum(0).unbind(-1)
    return list((wrong / whole).sqrt().tolist())
