"""The oracle against the contract, spelled out token by token in Python."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import moba_attention_reference
from tests.helpers import Case, cases


def attend_token_by_token(
    q: Tensor, k: Tensor, v: Tensor, case: Case
) -> tuple[Tensor, list[list[set[int]]]]:
    """Compute one sequence in plain Python floats: output `[Hq, Q, D]` and the blocks chosen."""
    size, kv_len = case.block_size, case.kv_len
    num_blocks = -(-kv_len // size)
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    out = torch.zeros(q.shape, dtype=torch.float64)
    chosen: list[list[set[int]]] = []
    for head in range(q.shape[0]):
        keys, values = k[head // case.group], v[head // case.group]
        means = [
            keys[n * size : (n + 1) * size].float().mean(0).to(k.dtype) for n in range(num_blocks)
        ]
        chosen.append([])
        for i in range(case.q_len):
            position = kv_len - case.q_len + i
            own = position // size
            others = [n for n in range(num_blocks) if (n < own if case.causal else n != own)]
            forced = [
                n for n in others if n < case.sink_blocks or 0 < own - n <= case.local_blocks
            ]
            affinity = {
                n: (q[head, i].double() @ means[n].double()).float().item() for n in others
            }
            ranked = sorted(others, key=lambda n: (n in forced, affinity[n], n), reverse=True)
            blocks = {own, *ranked[: case.top_k - 1]}
            chosen[head].append(blocks)
            seen = [
                j
                for j in range(kv_len)
                if j // size in blocks and (j <= position or not case.causal)
            ]
            weights = torch.softmax((keys[seen].double() @ q[head, i].double()) * scale, 0)
            out[head, i] = weights @ values[seen].double()
    return out, chosen


@given(case=cases(max_len=24))
def test_oracle_is_the_contract(case: Case) -> None:
    q, k, v = case.inputs()
    result = moba_attention_reference(q, k, v, **case.gate, scale=case.scale, dtype=torch.float64)
    for b in range(case.batch):
        out, chosen = attend_token_by_token(q[b], k[b], v[b], case)
        for head, rows in enumerate(chosen):
            for i, blocks in enumerate(rows):
                assert set(result.blocks[b, head, i].nonzero().flatten().tolist()) == blocks
        torch.testing.assert_close(result.out[b], out, rtol=1e-9, atol=1e-9)


def test_covering_top_k_is_causal_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    result = moba_attention_reference(q, k, v, block_size=10, top_k=5)
    torch.testing.assert_close(result.out, scaled_dot_product_attention(q, k, v, is_causal=True))


def test_lse_is_that_of_the_chosen_scores() -> None:
    q, k, v = torch.randn(3, 1, 1, 20, 16, dtype=torch.float64)
    result = moba_attention_reference(q, k, v, block_size=20, top_k=1, dtype=torch.float64)
    scores = (q @ k.mT / 4).masked_fill(~torch.ones(20, 20).tril().bool(), -math.inf)
    torch.testing.assert_close(result.lse, scores.logsumexp(-1))


def test_given_blocks_replace_the_gate() -> None:
    q, k, v = torch.randn(3, 1, 1, 8, 16)
    blocks = torch.zeros(1, 1, 8, 4, dtype=torch.bool)
    blocks[..., 0] = True
    result = moba_attention_reference(q, k, v, block_size=2, top_k=1, blocks=blocks, causal=False)
    expected = scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2])
    torch.testing.assert_close(result.out, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_equal_affinities_choose_the_more_recent_block(causal: bool) -> None:
    q = torch.ones(1, 1, 12, 16)
    chosen = moba_attention_reference(q, q, q, block_size=2, top_k=3, causal=causal).blocks
    assert chosen[0, 0, 9].nonzero().flatten().tolist() == ([2, 3, 4] if causal else [3, 4, 5])
