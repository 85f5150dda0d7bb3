"""The oracle against the contract, spelled out token by token in Python."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import moba_attention_reference
from tests.helpers import Case, cases


def attend_token_by_token(
    q: Tensor, k: Tensor, v: Tensor, case: Case, row: int
) -> tuple[Tensor, Tensor, list[list[set[int]]]]:
    """Compute one row in plain Python: output `[Hq, Q, Dv]`, lse, and the blocks chosen."""
    score_mod, mask_mod = case.score_mod(case.captured()), case.mask_mod()
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    chosen: list[list[set[int]]] = [[set() for _ in range(case.q_len)] for _ in range(q.shape[0])]
    first = 0
    for q_start, q_stop, k_start, k_stop in case.spans()[row if case.pads is not None else 0]:
        starts = list(range(k_start, k_stop, case.block_size))
        for head in range(q.shape[0]):
            keys, values = k[head // case.group], v[head // case.group]
            means = [
                keys[n : min(n + case.block_size, k_stop)].float().mean(0).to(k.dtype)
                for n in starts
            ]
            for i in range(q_start, q_stop):
                after = i + 1 - q_stop + k_stop if case.docs else i + 1 + case.offset
                own = (after - 1 - k_start) // case.block_size
                others = [
                    n for n in range(len(starts)) if n < own or (not case.causal and n > own)
                ]
                forced = [
                    n for n in others if n < case.sink_blocks or 0 < own - n <= case.local_blocks
                ]
                affinity = {
                    n: (q[head, i].double() @ means[n].double()).float().item() for n in others
                }
                ranked = sorted(others, key=lambda n: (n in forced, affinity[n], n), reverse=True)
                top_k = case.head_top_k[head] if case.head_top_k else case.top_k
                blocks = {own, *ranked[: top_k - 1]}
                chosen[head][i] = {first + n for n in blocks}
                scores, seen = [], []
                for j in range(k_start, after if case.causal else k_stop):
                    place = [torch.tensor(x) for x in (row, head, i, j)]
                    if (j - k_start) // case.block_size not in blocks:
                        continue
                    if mask_mod is not None and not mask_mod(*place):
                        continue
                    score = (keys[j].double() @ q[head, i].double()) * case.factor
                    if case.softcap is not None:
                        score = case.softcap * torch.tanh(score / case.softcap)
                    if score_mod is not None:
                        score = score_mod(score, *place)
                    scores.append(score)
                    seen.append(j)
                if seen:
                    weights = torch.softmax(torch.stack(scores), 0)
                    out[head, i] = weights @ values[seen].double()
                    lse[head, i] = torch.stack(scores).logsumexp(0)
        first += len(starts)
    return out, lse, chosen


@st.composite
def requests(draw: st.DrawFn) -> Case:
    """Draw a small request of any kind."""
    case = draw(cases(max_len=24))
    v_dim, softcap = draw(st.sampled_from([None, 5])), draw(st.sampled_from([None, 2.0]))
    score, mask = (
        draw(st.sampled_from(["", "alibi+relative"])),
        draw(st.sampled_from(["", "window:3", "random:0.5"])),
    )
    case = replace(case, v_dim=v_dim, softcap=softcap, score=score, mask=mask)
    if draw(st.booleans()):
        least = 1 + case.sink_blocks + case.local_blocks
        numbers = st.tuples(*[st.integers(least, case.top_k)] * case.num_heads)
        case = replace(case, head_top_k=draw(numbers))
    layout = draw(st.sampled_from(["", "docs", "pads"]))
    if layout == "docs":
        docs = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        q_docs = draw(st.one_of(st.none(), st.tuples(*(st.integers(0, n) for n in docs))))
        return replace(case, docs=(*docs,), q_docs=q_docs)
    if layout == "pads":
        pad = st.integers(0, case.kv_len)
        return replace(case, pads=(*draw(st.lists(st.tuples(pad, pad), min_size=1, max_size=2)),))
    return case


@given(case=requests())
def test_oracle_is_the_contract(case: Case) -> None:
    q, k, v = case.inputs()
    result = moba_attention_reference(
        q,
        k,
        v,
        **case.gate,
        **case.layout,
        scale=case.scale,
        softcap=case.softcap,
        score_mod=case.score_mod(case.captured()),
        mask_mod=case.mask_mod(),
        dtype=torch.float64,
    )
    for b in range(case.batch):
        out, lse, chosen = attend_token_by_token(q[b], k[b], v[b], case, b)
        for head, rows in enumerate(chosen):
            for i, blocks in enumerate(rows):
                assert set(result.blocks[b, head, i].nonzero().flatten().tolist()) == blocks
        torch.testing.assert_close(result.out[b], out, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.lse[b], lse, rtol=1e-9, atol=1e-9)


def test_gradients_of_rows_that_see_nothing_are_zero() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False, False, True, True, True, False]])
    out, lse, _ = moba_attention_reference(
        q,
        k,
        v,
        block_size=2,
        top_k=2,
        key_mask=mask,
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx != 3,
    )
    assert (lse == -math.inf).flatten().tolist() == [True, True, False, True, False, True]
    dq, dk, dv = torch.autograd.grad(out.square().sum() + lse[lse > -math.inf].sum(), (q, k, v))
    for x in (dq, dk, dv):
        assert x.isfinite().all()
    assert (dq[0, 0, [0, 1, 3, 5]] == 0).all()
    for x in (dk, dv):
        assert (x[0, 0, [0, 1, 5]] == 0).all()


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
