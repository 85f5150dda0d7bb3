"""Tables of documents and padding against loops over them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moba_flex.masks.layout import Layout, make_tables
from tests.case import Case


@st.composite
def layouts(draw: st.DrawFn) -> Case:
    """Draw documents, with as many queries as keys or fewer, or padded rows."""
    block_size, causal = draw(st.integers(1, 9)), draw(st.booleans())
    lengths = st.lists(st.sampled_from([0, 1, 1, 2, 5, 9, 18, 40]), min_size=1, max_size=8)
    if draw(st.booleans()):
        docs = draw(lengths)
        q_docs = [draw(st.integers(0, n)) for n in docs] if draw(st.booleans()) else docs
        tail = draw(st.sampled_from([(0, 0), (3, 3), (0, 7), (4, 30)]))
        case = Case(block_size=block_size, causal=causal)
        return replace(case, docs=tuple(docs), q_docs=tuple(q_docs), tail=tail)
    kv_len = draw(st.integers(1, 50))
    pads = st.tuples(st.integers(0, 60), st.integers(0, 60))
    return Case(
        batch=3,
        q_len=draw(st.integers(1, kv_len)),
        kv_len=kv_len,
        block_size=block_size,
        causal=causal,
        pads=(*draw(st.lists(pads, min_size=1, max_size=3)),),
    )


def tables_of(case: Case) -> Layout:
    tables = make_tables(case.q_len, case.kv_len, case.block_size, case.causal, **case.layout)
    assert tables is not None
    return tables


@given(case=layouts())
def test_tables_say_where_things_lie(case: Case) -> None:
    tables, places = tables_of(case), case.places
    none, at = tables.num_blocks, tables.coordinates("cpu")
    assert {x.dtype for x in at} == {torch.int32}
    position, own, oldest, newest = (x.long() for x in at[:4])
    real = places.own >= 0
    assert torch.equal(position, places.position.where(real, -1))
    assert torch.equal(own, places.own.where(real, none))
    last = (own if case.causal else places.after) - 1
    assert torch.equal(oldest[real], places.first[real])
    assert torch.equal(newest[real], last[real])
    assert (newest < oldest)[~real].all(), "padding has no candidates"

    start, stop = at.start.long(), at.stop.long()
    assert (start <= stop).all()
    assert torch.equal(start[:, 1:], stop[:, :-1]), "blocks follow each other"
    key, block = torch.arange(case.kv_len), torch.arange(none)
    inside = (key >= start.unsqueeze(2)) & (key < stop.unsqueeze(2))
    assert torch.equal(inside, block[:, None] == places.key_block.unsqueeze(1))


def test_plain_tables_are_those_of_one_document() -> None:
    for causal in (True, False):
        case = Case(block_size=7, causal=causal, docs=(40,), q_docs=(13,))
        layout, packed = Layout(13, 40, 7, causal), tables_of(case).coordinates("cpu")
        plain = layout.coordinates("cpu")
        for name in ("position", "own", "oldest", "newest"):
            assert torch.equal(getattr(plain, name), getattr(packed, name))
        for name in ("start", "stop"):
            found = getattr(packed, name)
            assert torch.equal(getattr(plain, name), found[:, : layout.num_blocks])
            assert (found[:, layout.num_blocks :] == 40).all(), "no block"


def test_rows_of_one_sequence_have_no_tables() -> None:
    assert make_tables(3, 5, 2, True) is None
    assert make_tables(3, 5, 2, True, cu_seqlens=None, key_mask=None) is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtype_of_cu_seqlens(dtype: torch.dtype) -> None:
    starts = torch.tensor([0, 3, 3, 10], dtype=dtype)
    tables = make_tables(10, 10, 4, True, cu_seqlens=starts)
    assert tables is not None
    at = tables.coordinates("cpu")
    assert at.own[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert at.start.tolist() == [[0, 3, 7, 10, 10]]
    assert at.stop.tolist() == [[3, 7, 10, 10, 10]]


@pytest.mark.parametrize("causal", [True, False])
def test_what_lies_behind_the_last_document_is_padding(causal: bool) -> None:
    tables = make_tables(9, 12, 4, causal, cu_seqlens=cu(0, 3, 8), cu_seqlens_q=cu(0, 2, 6))
    assert tables is not None
    at = tables.coordinates("cpu")
    position, own, oldest, newest = (x[0] for x in at[:4])
    assert position.tolist() == [1, 2, 4, 5, 6, 7, -1, -1, -1]
    assert own.tolist() == [0, 0, 1, 1, 1, 2] + [tables.num_blocks] * 3
    assert (newest < oldest)[6:].all()
    assert at.start.tolist() == [[0, 3, 7, 8, 8]]
    assert at.stop.tolist() == [[3, 7, 8, 8, 8]]


def cu(*starts: int) -> torch.Tensor:
    return torch.tensor(starts, dtype=torch.int32)
