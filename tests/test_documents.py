"""Packed documents behave like separate calls, and padded rows like the unpadded row."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import moba_attention, moba_attention_reference, route
from moba_flex.compile import cpu, cpu_parts
from moba_flex.masks import router
from moba_flex.masks.layout import make_tables
from moba_flex.masks.pool import pool
from tests.case import Case, Span
from tests.helpers import assert_matches_oracle, attention, cases, chosen_blocks, route_case

EXAMPLES = settings().max_examples


@st.composite
def laid_out(draw: st.DrawFn, *, max_len: int = 500) -> Case:
    """Draw a request of packed documents or padded rows."""
    case = draw(cases(max_len=max_len))
    if draw(st.booleans()):
        left, right = (st.integers(0, case.kv_len) for _ in range(2))
        pads = draw(st.lists(st.tuples(left, right), min_size=1, max_size=case.batch))
        return replace(case, pads=(*pads,), head_top_k=head_top_k(draw, case))
    lengths = st.integers(0, 3), st.integers(0, case.block_size + 1), st.integers(0, max_len // 4)
    docs = draw(st.lists(st.one_of(*lengths), min_size=1, max_size=8).filter(any))
    q_docs = draw(st.one_of(st.none(), st.tuples(*(st.integers(0, n) for n in docs)).filter(any)))
    tail = draw(st.sampled_from([(0, 0), (0, 0), (3, 3), (0, 7), (20, 50)]))
    case = replace(case, docs=(*docs,), q_docs=q_docs, tail=tail)
    return replace(case, head_top_k=head_top_k(draw, case))


def head_top_k(draw: st.DrawFn, case: Case) -> tuple[int, ...] | None:
    if draw(st.integers(0, 3)):
        return None
    number = st.integers(1 + case.sink_blocks + case.local_blocks, case.top_k)
    return draw(st.tuples(*[number] * case.num_heads))


@pytest.mark.usefixtures("poison")
@settings(max_examples=2 * EXAMPLES)
@given(case=laid_out())
def test_routed_is_the_oracle(case: Case) -> None:
    assert_matches_oracle("routed, laid out", case, attention(case, "routed"))


@pytest.mark.usefixtures("poison")
@given(case=laid_out())
def test_dense_is_the_oracle(case: Case) -> None:
    case = replace(case, top_k=case.kv_len + 4, head_top_k=None)
    assert_matches_oracle("dense, laid out", case, attention(case, "dense"))


@settings(max_examples=2 * EXAMPLES)
@given(case=laid_out())
def test_route_breaks_ties_like_the_oracle(case: Case) -> None:
    case = replace(case, ties=True, block_size=2 ** (case.block_size.bit_length() - 1))
    q, k, v = case.inputs()
    # Small blocks' means are exact where they have a power of two of keys: let all keys of a
    # block be equal, and they always are.
    k = k.index_select(2, _first_of_block(case)) if case.pads is None else k
    routing = route_case(case, q, k)
    if case.pads is None:
        expected = moba_attention_reference(q, k, v, **case.gate, **case.layout).blocks
        assert torch.equal(chosen_blocks(routing), expected)
    assert routing.blocks.dtype == torch.int32
    assert (routing.blocks.diff(dim=3) >= 0).all(), "ascending"


def _first_of_block(case: Case) -> Tensor:
    """Return for each key the first key of its block; padding, which has no block, for itself."""
    block = case.places.key_block[0]
    in_block = block >= 0
    first = torch.searchsorted(block[in_block], block)
    return first.where(in_block, torch.arange(len(block)))


def separately(case: Case, q: Tensor, k: Tensor, v: Tensor, span: Span, row: slice) -> Any:
    """Attend in a call of its own, as one document."""
    q_start, q_stop, k_start, k_stop = span
    queries, keys = slice(q_start, q_stop), slice(k_start, k_stop)
    layout: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, k_stop - k_start]),
        "cu_seqlens_q": torch.tensor([0, q_stop - q_start]),
    }
    aux = AuxRequest(lse=True)
    some_q, some_k, some_v = q[row, :, queries], k[row, :, keys], v[row, :, keys]
    out, lse = moba_attention(
        some_q, some_k, some_v, **case.gate, **layout, plan="routed", return_aux=aux
    )
    assert lse.lse is not None
    return out, lse.lse, *torch.autograd.grad(out.square().sum() + lse.lse.sum(), (q, k, v))


@given(case=laid_out(max_len=200))
def test_together_is_separately_to_the_bit(case: Case) -> None:
    # Where queries are missing, own blocks are parts that merge, and PyTorch rounds elementwise
    # functions by where in a tensor an element lies.
    case = replace(case, q_len=case.kv_len, q_docs=None)
    q, k, v = (x.requires_grad_() for x in case.inputs())
    aux = AuxRequest(lse=True)
    out, lse = moba_attention(q, k, v, **case.gate, **case.layout, plan="routed", return_aux=aux)
    assert lse.lse is not None
    sees = torch.isfinite(lse.lse)
    loss = out.square().sum() + lse.lse[sees].sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    for row, spans in enumerate(case.spans()):
        rows = slice(row, row + 1) if case.pads is not None else slice(0, case.batch)
        for span in spans:
            if span.q_start == span.q_stop:
                continue
            alone = separately(case, q, k, v, span, rows)
            queries, keys = slice(span.q_start, span.q_stop), slice(span.k_start, span.k_stop)
            assert torch.equal(out[rows, :, queries], alone[0])
            assert torch.equal(lse.lse[rows, :, queries], alone[1])
            for x, y, place in zip(grads, alone[2:], (queries, keys, keys), strict=True):
                assert torch.equal(x[rows, :, place], y[rows, :, place])


def test_separately_is_a_plain_call() -> None:
    docs = (130, 1, 64, 0, 7, 200)
    q, k, v = torch.randn(3, 2, 4, sum(docs), 16)
    starts = torch.tensor((0, *docs)).cumsum(0)
    gate: dict[str, Any] = {"block_size": 16, "top_k": 3}
    packed = moba_attention(q, k, v, **gate, cu_seqlens=starts)
    for start, stop in pairwise(starts.tolist()):
        if start < stop:
            some = (x[:, :, start:stop] for x in (q, k, v))
            torch.testing.assert_close(packed[:, :, start:stop], moba_attention(*some, **gate))
    mask = torch.zeros(2, sum(docs), dtype=torch.bool)
    mask[0, 100:], mask[1, 30:250] = True, True
    padded = moba_attention(q, k, v, **gate, key_mask=mask)
    for row in range(2):
        some = (x[row : row + 1, :, mask[row]] for x in (q, k, v))
        torch.testing.assert_close(
            padded[row : row + 1, :, mask[row]], moba_attention(*some, **gate)
        )
        assert (padded[row, :, ~mask[row]] == 0).all()


def test_covering_top_k_is_causal_attention_within_documents() -> None:
    q, k, v = torch.randn(3, 1, 2, 150, 16)
    starts = torch.tensor([0, 100, 150])
    # Seven blocks cover the longest document, and not all keys: that is the routed plan.
    for plan in ("auto", "dense", "routed"):
        out = moba_attention(q, k, v, block_size=15, top_k=7, cu_seqlens=starts, plan=plan)
        for start, stop in ((0, 100), (100, 150)):
            span = slice(start, stop)
            expected = scaled_dot_product_attention(
                q[:, :, span], k[:, :, span], v[:, :, span], is_causal=True
            )
            torch.testing.assert_close(out[:, :, span], expected)


@pytest.mark.parametrize("top_k", [3, 20])
def test_what_lies_in_padding_never_matters(top_k: int) -> None:
    q, k, v = torch.randn(3, 3, 2, 120, 16)
    mask = torch.zeros(3, 120, dtype=torch.bool)
    mask[0, 17:], mask[1, :90] = True, True  # and a row that is all padding

    def run() -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, aux = moba_attention(
            *inputs,
            block_size=16,
            top_k=top_k,
            key_mask=mask,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        loss = out.sum() + aux.lse[mask.unsqueeze(1).expand_as(aux.lse)].sum()
        return [out, aux.lse, *torch.autograd.grad(loss, inputs)]

    before = run()
    for x in (q, k, v):
        x.transpose(1, 2)[~mask] = math.nan
    for x, y in zip(before, run(), strict=True):
        assert torch.equal(x, y)
    out, lse, *grads = before
    for x in (out, *grads):
        assert (x.transpose(1, 2)[~mask] == 0).all()
    assert (lse.transpose(1, 2)[~mask] == -math.inf).all()


def test_documents_see_nothing_of_each_other() -> None:
    q, k, v = torch.randn(3, 1, 2, 200, 16)
    starts = torch.tensor([0, 60, 60, 140, 200])
    before = moba_attention(q, k, v, block_size=16, top_k=3, cu_seqlens=starts)
    for x in (q, k, v):
        x[:, :, 60:140] = math.nan
    after = moba_attention(q, k, v, block_size=16, top_k=3, cu_seqlens=starts)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert torch.equal(before[:, :, 140:], after[:, :, 140:])
    assert after[:, :, 60:140].isnan().all()


def test_work_on_thousands_of_documents_is_that_on_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores: list[int] = []
    top_blocks = router._top_blocks

    def record(affinity: Tensor, *args: Any) -> Tensor:
        scores.append(affinity.numel())
        return top_blocks(affinity, *args)

    monkeypatch.setattr(router, "_top_blocks", record)
    docs, block_size = 5000, 8
    lengths = torch.randint(0, 2 * block_size + 1, (docs,))
    tokens = int(lengths.sum())
    case = Case(docs=(*lengths.tolist(),), block_size=block_size, top_k=3)
    q, k, v = case.inputs()
    routing = route_case(case, q, k)
    # No more candidates at a time than a chunk of queries has blocks.
    assert 0 < sum(scores) <= tokens * 2 * router._LEAST_CHUNK / block_size
    own = sum(1 for part in cpu_parts.cut(routing, 1) if part.first)
    assert own <= 2 * block_size, "documents of one length are one part"
    out = moba_attention(q, k, v, block_size=block_size, top_k=3, **case.layout)
    shape = torch.bincount(lengths).argmax()
    some = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    for document in (lengths == shape).nonzero().flatten()[:20].tolist():
        span = slice(int(some[document]), int(some[document + 1]))
        expected = scaled_dot_product_attention(
            q[:, :, span], k[:, :, span], v[:, :, span], is_causal=True
        )
        torch.testing.assert_close(out[:, :, span], expected)


def test_each_head_has_its_own_top_k() -> None:
    q, (k, v) = torch.randn(1, 6, 150, 16), torch.randn(2, 1, 2, 150, 16)
    numbers = [1, 2, 3, 4, 5, 4]
    out = moba_attention(q, k, v, block_size=16, top_k=5, head_top_k=torch.tensor(numbers))
    for head, number in enumerate(numbers):
        alone = moba_attention(q, k, v, block_size=16, top_k=number)
        torch.testing.assert_close(out[:, head], alone[:, head])


@pytest.mark.parametrize("kind", ["docs", "pads", "heads"])
def test_one_graph_for_any_layout(kind: str) -> None:
    """Neither lengths nor where documents lie nor the blocks of a head make a new graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return moba_attention(q, k, v, block_size=16, top_k=3, **options)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for length, number in ((90, 3), (150, 4), (333, 7), (210, 5)):
        lengths = [length - 5 * number, *[5] * number]
        case = Case(batch=2, group=2, q_len=length, kv_len=length)
        if kind == "docs":
            case = replace(case, docs=(*lengths,))
        elif kind == "pads":
            case = replace(case, pads=((number, 0), (length // 2, 2 * number)))
        options = case.layout
        if kind == "heads":
            options["head_top_k"] = torch.tensor([1 + number % 3, 2])
        q, k, v = inputs = [x.requires_grad_() for x in case.inputs()]
        out, expected = compiled(q, k, v, options), attend(q, k, v, options)
        torch.testing.assert_close(out, expected)
        weight = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, weight)
        for x, y in zip(grads, torch.autograd.grad(expected, inputs, weight), strict=True):
            torch.testing.assert_close(x, y)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("causal", [True, False])
def test_ops_keep_the_rules_of_torch_library(causal: bool) -> None:
    for layout in ({"docs": (30, 0, 41)}, {"pads": ((3, 9), (71, 0))}):
        case = Case(2, 1, 2, 71, 71, 16, 8, 3, causal=causal, **layout)
        q, k, v = (x.requires_grad_() for x in case.inputs())
        tables = make_tables(71, 71, 8, causal, **case.layout)
        assert tables is not None
        place = tables.queries, tables.extents
        gate = (
            q.detach(),
            pool(k.detach(), tables),
            (2, 8, 1, 0),
            causal,
            torch.tensor([2, 3]),
            0,
            tables.queries,
        )
        torch.library.opcheck(router.choose_cpu, gate)
        attend: Any = cpu.attend_cpu
        options = (router.choose_cpu(*gate), *place, 8, causal, 0.3, 0.0)
        torch.library.opcheck(attend.op, (q, k, v, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_keys_are_means_of_each_block(dtype: torch.dtype) -> None:
    for layout in ({"docs": (30, 0, 1, 7, 41)}, {"pads": ((3, 9), (79, 0), (0, 0))}):
        case = Case(3, 2, 1, 79, 79, 16, 8, dtype=dtype, **layout)
        _, k, _ = case.inputs()
        tables = make_tables(79, 79, 8, True, **case.layout)
        assert tables is not None
        keys = pool(k, tables)
        assert keys.dtype == dtype
        assert keys.shape == (3, 2, tables.num_blocks, 16)
        for b in range(3):
            block = case.places.key_block[b % case.places.key_block.shape[0]]
            for n in range(tables.num_blocks):
                inside = k[b, :, block == n].double()
                exact = inside.mean(1) if inside.shape[1] else torch.zeros(2, 16)
                # Rounded once, from sums of eight terms in float32.
                step = exact.abs() * torch.finfo(dtype).eps / 2
                slack = inside.abs().sum(1) * torch.finfo(torch.float32).eps
                assert ((keys[b, :, n].double() - exact).abs() <= step + slack).all()


def test_sinks_are_the_first_blocks_of_a_document() -> None:
    docs = 40, 44
    q, k, _ = torch.randn(3, 1, 2, sum(docs), 16)
    mask = torch.arange(sum(docs))[None] >= 40
    layouts: list[tuple[dict[str, Any], int]] = [
        ({"cu_seqlens": torch.tensor([0, 40, 84])}, 10),
        ({"key_mask": mask}, 0),
    ]
    for layout, first in layouts:
        tables = make_tables(84, 84, 4, True, **layout)
        routing = route(q, k, block_size=4, top_k=5, sink_blocks=2, local_blocks=1, tables=tables)
        blocks = chosen_blocks(routing)
        for i in range(60, 84):
            own = first + (i - 40) // 4
            assert blocks[:, :, i, [first, first + 1, own - 1, own]].all()
            assert (blocks[:, :, i].sum(-1) == 5).all()
