"""The cache: any sequence of changes gives what one call over the keys that remain gives."""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moba_flex import make_tables, moba_attention, moba_attention_reference, route
from moba_flex.cache import BlockCache, PagedCache, cached_attention
from moba_flex.compile import plans
from moba_flex.compile.decode import decode_cpu
from moba_flex.masks.append import append
from moba_flex.masks.layout import LONGEST, Layout, Slots, ceil_div, locate_slots
from moba_flex.masks.pool import pool
from moba_flex.masks.request import Gate, gated_request
from moba_flex.masks.router import choose, numbers_of
from tests.case import Case
from tests.helpers import DEVICES, cases, needs_interpreter

MOST = 200  # slots of a cache of fixed length


@dataclass
class Truth:
    """The keys that each row should hold, and the slots where they should lie.

    Attributes:
        k: Keys of each row, `[Hkv, n, D]`.
        v: Values of each row, `[Hkv, n, Dv]`.
        start: Slot of each row's first key.
        stop: The slot after each row's last.
    """

    k: list[Tensor]
    v: list[Tensor]
    start: list[int]
    stop: list[int] = field(default_factory=list)

    def select(self, rows: list[int]) -> None:
        self.k, self.v = [self.k[i] for i in rows], [self.v[i] for i in rows]
        self.start, self.stop = [self.start[i] for i in rows], [self.stop[i] for i in rows]


def run(
    seed: int, device: str = "cpu", plans: tuple[str, ...] = ("auto", "routed", "decode")
) -> None:
    """Draw changes of a cache, and compare it after each with what it should hold."""
    rng, torch_seed = Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.bfloat16])
    kv_heads, group, block_size = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 9)
    dim, value_dim = rng.choice([16, 32]), rng.choice([16, 32])
    max_len = MOST if rng.random() < 0.5 else None

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch_seed).to(device, dtype)

    cache = BlockCache(block_size, max_len)
    start = [rng.choice([0, 0, rng.randint(0, 7)]) for _ in range(rng.randint(1, 3))]
    in_pages = rng.random() < 0.3
    if in_pages:
        cache, start = some_pages(rng, block_size, len(start), device), [0] * len(start)
    nothing = (
        [draw(kv_heads, 0, dim) for _ in start],
        [draw(kv_heads, 0, value_dim) for _ in start],
    )
    truth = Truth(*nothing, start, [0] * len(start))
    lowered = [False] * len(start)  # by rows: its last block may have lost keys
    for step in range(rng.randint(1, 8)):
        batch = len(truth.k)
        others = ["crop"] if in_pages else ["crop", "select", "repeat"]
        change = rng.choice(["append"] * 5 + others) if step else "append"
        if change == "append":
            num_new = rng.choice([1, 1, 2, 5, rng.randint(1, 25)])
            if max(truth.stop) + num_new > MOST:
                continue
            counts = [num_new] * batch
            if ragged := rng.random() < 0.3:
                counts = [rng.randint(0, num_new) for _ in counts]
            k, v = draw(batch, kv_heads, num_new, dim), draw(batch, kv_heads, num_new, value_dim)
            named = torch.tensor(counts) if ragged else None
            given: dict[str, Any] = {}
            if step and rng.random() < 0.5:
                given = {"k": k, "v": v, "counts": named}
            else:
                first = None if step or in_pages else torch.tensor(truth.start)
                cache.append(k, v, counts=named, start=first)
            for b, count in enumerate(counts):
                skip = min(max(truth.start[b] - truth.stop[b], 0), count)  # padding on the left
                truth.k[b] = torch.cat((truth.k[b], k[b, :, skip:count]), dim=1)
                truth.v[b] = torch.cat((truth.v[b], v[b, :, skip:count]), dim=1)
                truth.stop[b] += count
                lowered[b] &= count == 0
            q = draw(batch, kv_heads * group, num_new, dim)
            check_attention(rng, cache, truth, q, counts, rng.choice(plans), given)
        elif change == "crop":
            tokens = [rng.randint(0, min(12, x.shape[1])) for x in truth.k]
            if in_pages and rng.random() < 0.5:
                cache.stop.sub_(torch.tensor(tokens, device=device))
            elif rng.random() < 0.5:
                tokens = [min(tokens)] * batch
                cache.crop(tokens[0])
            else:
                cache.crop(torch.tensor(tokens))
            lowered = [True] * batch
            for b, number in enumerate(tokens):
                left = truth.k[b].shape[1] - number
                truth.k[b], truth.v[b] = truth.k[b][:, :left], truth.v[b][:, :left]
                truth.stop[b] -= number
        elif change == "select":
            rows = [
                rng.randrange(batch) for _ in range(rng.choice([batch, rng.randint(1, batch)]))
            ]
            cache.select(torch.tensor(rows))
            truth.select(rows)
            lowered = [lowered[row] for row in rows]
        elif batch < 4:
            cache.repeat(2)
            truth.select([b for b in range(batch) for _ in range(2)])
            lowered = [x for x in lowered for _ in range(2)]
        check_contents(cache, truth, lowered)


def some_pages(rng: Random, block_size: int, batch: int, device: str) -> BlockCache:
    """Return rows without keys whose pages lie anywhere; a table names no page behind them."""
    page_size = block_size * rng.randint(1, 4)
    width = MOST // page_size + 1
    pages = rng.sample(range(batch * width + 3), batch * width)
    table = torch.tensor(pages, dtype=torch.int32, device=device).view(batch, width)
    table = torch.cat((table, torch.full_like(table[:, :2], rng.choice([-1, 10**6]))), dim=1)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    return PagedCache(batch * width + 3, page_size, block_size).rows(table, lengths)


def check_contents(cache: BlockCache, truth: Truth, lowered: list[bool]) -> None:
    """Compare lengths, keys, and block keys, the latter bit by bit with those of one call.

    Where lengths were `lowered`, only those of full blocks: an append adds the others up anew.
    """
    assert cache.stop.tolist() == truth.stop
    for b, (k, start, stop) in enumerate(zip(truth.k, truth.start, truth.stop, strict=True)):
        if k.shape[1] == 0:
            continue
        assert torch.equal(cache.keys[b, :, start:stop], k)
        want = pool(k[None], Layout(1, k.shape[1], cache.block_size, True))[0]
        if lowered[b]:
            want = want[:, : k.shape[1] // cache.block_size]
        assert torch.equal(cache.block_keys[b, :, : want.shape[1]], want)


def check_attention(
    rng: Random,
    cache: BlockCache,
    truth: Truth,
    q: Tensor,
    counts: list[int],
    plan: Any,
    given: dict[str, Any],
) -> None:
    """Compare attention from the newest queries of each row with the oracle's of that row.

    Their keys may be `given`, not yet appended.
    """
    batch, num_heads, q_len, _ = q.shape
    top_k = rng.randint(1, 5)
    head_top_k = None
    if rng.random() < 0.4:  # each row its own
        numbers = [[rng.randint(1, top_k) for _ in range(num_heads)] for _ in range(batch)]
        head_top_k = torch.tensor(numbers, device=q.device)
    sink_blocks = 1 if top_k > 1 and head_top_k is None and rng.random() < 0.3 else 0
    options: dict[str, Any] = {"top_k": top_k, "sink_blocks": sink_blocks}
    options["softcap"] = rng.choice([None, None, 3.0])
    got = cached_attention(q, cache, head_top_k=head_top_k, plan=plan, **given, **options)
    cap = options.pop("softcap")
    if cap is not None:
        options["score_mod"] = lambda score, *_: cap * torch.tanh(score / cap)
    for b, count in enumerate(counts):
        real = min(count, truth.k[b].shape[1])
        want = got.new_zeros(num_heads, q_len, got.shape[3], dtype=torch.float64)
        if real:
            new = slice(count - real, count)
            want[:, new] = moba_attention_reference(
                q[b : b + 1, :, new],
                truth.k[b][None],
                truth.v[b][None],
                block_size=cache.block_size,
                head_top_k=None if head_top_k is None else head_top_k[b],
                **options,
            )[0]
        bound = 2e-5 if q.dtype == torch.float32 else 4e-2
        torch.testing.assert_close(got[b].double(), want, rtol=0, atol=bound)


@pytest.mark.usefixtures("poison")
@given(seed=st.integers(0, 2**32 - 1))
def test_any_changes_give_what_remains(seed: int) -> None:
    run(seed)


@pytest.mark.cuda
@pytest.mark.usefixtures("poison")
@given(seed=st.integers(0, 2**32 - 1))
def test_any_changes_give_what_remains_on_cuda(seed: int) -> None:
    run(seed, "cuda", ("auto", "decode"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_of_a_prompt_are_one_pass(chunk: int, device: str) -> None:
    k, v = (torch.randn(1, 2, 1100, 32, device=device) for _ in range(2))
    q = torch.randn(1, 4, 1100, 32, device=device)
    want = moba_attention(q, k, v, block_size=32, top_k=3)
    cache, outs = BlockCache(32), []
    first = 1000 if chunk == 1 else 0  # token by token behind a long prompt
    if first:
        cache.append(k[:, :, :first], v[:, :, :first])
    for at in range(first, 1100, chunk):
        some = slice(at, at + chunk)
        cache.append(k[:, :, some], v[:, :, some])
        outs.append(cached_attention(q[:, :, some], cache, top_k=3))
    torch.testing.assert_close(torch.cat(outs, dim=2), want[:, :, first:])


@pytest.mark.parametrize("device", DEVICES)
def test_other_slots_are_never_read(device: str) -> None:
    """Neither those behind the last key, nor those before the first."""
    cache = BlockCache(8, max_len=100)
    k = torch.randn(2, 2, 50, 16, device=device)
    k[1, :, :5] = float("nan")
    cache.append(k, k, start=torch.tensor([0, 5]))
    cache.keys[:, :, 50:] = cache.values[:, :, 50:] = float("nan")
    cache.block_keys[:, :, 7:] = float("nan")
    q = torch.randn(2, 4, 3, 16, device=device)
    plans: Any = ("auto", "routed") if device == "cpu" else ("auto", "decode")
    for plan in plans:
        got = cached_attention(q, cache, top_k=3, plan=plan)
        for b, first in enumerate((0, 5)):
            row = (x[b : b + 1] for x in (q, k[:, :, first:], k[:, :, first:]))
            want = moba_attention(*row, block_size=8, top_k=3)
            torch.testing.assert_close(got[b], want[0])


def test_memory_of_block_keys_is_small() -> None:
    cache = BlockCache(128, max_len=4096)
    cache.append(*torch.randn(2, 1, 2, 1, 64, dtype=torch.bfloat16))
    memory = cache.memory()
    # 128 keys and values have one sum, one number and one block key.
    assert memory["blocks"] / memory["keys and values"] == (6 * 64 + 4) / (4 * 64 * 128)


def test_a_cache_of_fixed_length_keeps_its_memory() -> None:
    cache = BlockCache(8, max_len=64)
    cache.append(*torch.randn(2, 2, 2, 20, 16))
    places = [x.data_ptr() for x in cache.tensors]
    cache.append(*torch.randn(2, 2, 2, 5, 16))
    cache.crop(3)
    cache.select(torch.tensor([1, 0]))
    cache.reset()
    cache.append(*torch.randn(2, 2, 2, 5, 16))
    assert [x.data_ptr() for x in cache.tensors] == places
    assert cache.stop.tolist() == [5, 5]


@pytest.mark.parametrize("in_one_call", [True, False])
def test_steps_are_one_graph(in_one_call: bool) -> None:
    """Of append and attention; lengths grow without a graph anew."""
    cache = BlockCache(8, max_len=64)
    k, v = torch.randn(2, 1, 2, 50, 16)
    cache.append(k[:, :, :20], v[:, :, :20])
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if in_one_call:
            return cached_attention(q, cache, k, v, top_k=3)
        cache.append(k, v)
        return cached_attention(q, cache, top_k=3)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for at in range(20, 50):
        q = torch.randn(1, 4, 1, 16)
        got = compiled(q, k[:, :, at : at + 1], v[:, :, at : at + 1])
        some = slice(0, at + 1)
        want = moba_attention(q, k[:, :, some], v[:, :, some], block_size=8, top_k=3)
        torch.testing.assert_close(got, want)
    assert graphs == 1


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_not_matter_which_pages_rows_take(dtype: torch.dtype, device: str) -> None:
    """Bit for bit; rows that start alike share full pages."""
    k, v = torch.randn(2, 2, 2, 100, 32).to(device, dtype)
    k[1, :, :64], v[1, :, :64] = k[0, :, :64], v[0, :, :64]
    q = torch.randn(2, 4, 2, 32).to(device, dtype)
    results = []
    for first, second in (([0, 1, 2, 3], [4, 5, 6, 7]), ([9, 3, 5, 0], [9, 3, 8, 1])):
        table = torch.tensor([first, second], device=device).int()
        rows = PagedCache(10, 32, 16).rows(table, torch.zeros_like(table[:, 0]))
        rows.append(k[:, :, :96], v[:, :, :96])
        for at in range(96, 100):
            rows.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        results.append(cached_attention(q, rows, top_k=3))
    cache = BlockCache(16)
    cache.append(k, v)
    assert torch.equal(*results)
    # Two ways to attend round 16-bit numbers differently.
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    want = cached_attention(q, cache, top_k=3)
    torch.testing.assert_close(results[0], want, rtol=bound, atol=bound)


def test_a_crop_of_nothing_needs_no_keys() -> None:
    cache = BlockCache(8)
    cache.crop(0)
    with pytest.raises(ValueError, match="cache must hold keys"):
        cache.crop(1)


@pytest.mark.parametrize("max_len", [None, 40])
def test_a_cache_has_no_rows_before_its_first_keys(max_len: int | None) -> None:
    cache = BlockCache(8, max_len)
    cache.reset()
    cache.repeat(2)
    cache.select(torch.tensor([1, 0]))
    assert cache.start.tolist() == cache.stop.tolist() == cache.slots(1).stop.tolist() == []
    cache.append(*torch.ones(2, 3, 2, 5, 16))
    assert (cache.start.tolist(), cache.stop.tolist()) == ([0, 0, 0], [5, 5, 5])


def test_rows_of_pages_see_what_others_allocated() -> None:
    rows = paged(lengths=torch.tensor([3, 4], dtype=torch.int32))
    rows.reset()  # before there is memory
    assert rows.stop.tolist() == [0, 0]
    with pytest.raises(ValueError, match="rows must keep their pages"):
        rows.repeat(2)
    others = rows._cache.rows(rows._table, rows.stop)
    rows.append(*torch.ones(2, 2, 2, 5, 16))
    assert others.memory() == rows.memory() == rows._cache.memory()
    others.reset()
    assert rows.stop.tolist() == [0, 0]


def test_only_tensors_of_a_cache_are_marked_as_staying() -> None:
    """Lengths and pages are the caller's; graphs that append keep all that they write to."""
    table, lengths = torch.arange(4).int().view(2, 2), torch.zeros(2, dtype=torch.int32)
    cache = PagedCache(4, 16, 8)
    early, late = cache.rows(table, lengths), cache.rows(table, lengths)
    early.append(*torch.ones(2, 2, 2, 5, 16))
    late.append(*torch.ones(2, 2, 2, 5, 16))
    fixed = small(40)
    fixed.select(torch.tensor([0]))
    for rows in (early, late, cache.rows(table, lengths), fixed):
        assert all(hasattr(x, "_dynamo_static_input_type") for x in rows.tensors)
    for x in (table, lengths):
        assert not hasattr(x, "_dynamo_static_input_type")
    assert lengths.tolist() == [10, 10]  # which is the memory of `stop`
    lengths.sub_(1)
    assert late.stop.tolist() == [9, 9]


def test_compiled_steps_read_the_callers_lengths() -> None:
    """Before and after an append to the same memory."""
    k, v = torch.randn(2, 2, 2, 30, 16)
    rows = paged(lengths=(lengths := torch.zeros(2, dtype=torch.int32)))
    rows.append(k[:, :, :20], v[:, :, :20])

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        place = lengths.clone()
        return cached_attention(q, rows, k, v, top_k=2), place, lengths - place

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for at in range(20, 25):
        q, new = torch.randn(2, 4, 1, 16), slice(at, at + 1)
        got, place, more = compiled(q, k[:, :, new], v[:, :, new], lengths)
        want = moba_attention(q, k[:, :, : at + 1], v[:, :, : at + 1], block_size=8, top_k=2)
        torch.testing.assert_close(got, want)
        assert (place.tolist(), more.tolist()) == ([at, at], [1, 1])


def test_a_crop_leaves_pages_as_they_are() -> None:
    """So that other rows that share a page go on."""
    k, v = torch.randn(2, 1, 2, 32, 16)
    q = torch.randn(1, 2, 1, 16)
    cache, table = PagedCache(3, 16, 16), torch.tensor([[0, 1]]).int()
    rows = cache.rows(table, torch.zeros(1, dtype=torch.int32))
    rows.append(k, v)
    others = cache.rows(table, rows.stop.clone())
    rows.crop(20)
    want = moba_attention(q, k, v, block_size=16, top_k=2)
    torch.testing.assert_close(cached_attention(q, others, top_k=2), want)
    want = moba_attention(q, k[:, :, :12], v[:, :, :12], block_size=16, top_k=2)
    torch.testing.assert_close(cached_attention(q, rows, top_k=2), want)


def test_what_is_refused_changes_nothing() -> None:
    """An append that names a page that there is not; the rows of before go on."""
    k, v = torch.randn(2, 2, 2, 40, 16)
    q = torch.randn(2, 2, 1, 16)
    table = torch.arange(6).int().view(2, 3)
    rows = PagedCache(6, 16, 8).rows(table, torch.zeros(2, dtype=torch.int32))
    rows.append(k[:, :, :6], v[:, :, :6])
    table[1, 0] = 9
    with pytest.raises(ValueError, match="must name pages"):
        rows.append(k[:, :, 6:], v[:, :, 6:])
    table[1, 0] = 3
    rows.append(k[:, :, 6:], v[:, :, 6:])
    want = moba_attention(q, k, v, block_size=8, top_k=2)
    torch.testing.assert_close(cached_attention(q, rows, top_k=2), want)


def test_rows_of_pages_may_be_made_at_any_time() -> None:
    """Before others allocate the memory, and for an empty batch."""
    cache = PagedCache(4, 16, 8)
    table, lengths = torch.arange(2).int().view(1, 2), torch.zeros(1, dtype=torch.int32)
    first, second = cache.rows(table, lengths), cache.rows(table, lengths)
    first.append(*torch.randn(2, 1, 2, 5, 16))
    q = torch.randn(1, 2, 1, 16)
    assert torch.equal(*(cached_attention(q, rows, top_k=2) for rows in (first, second)))
    nobody = PagedCache(4, 16, 8).rows(table[:0], lengths[:0])
    nobody.append(*torch.randn(2, 0, 2, 5, 16))
    assert cached_attention(q[:0], nobody, top_k=2).shape == (0, 2, 1, 16)


def test_counts_are_the_callers() -> None:
    """They may be changed afterwards, and may be the cache's own lengths."""
    k, v = torch.randn(2, 1, 2, 8, 16)
    q = torch.randn(1, 2, 4, 16)
    want = moba_attention(q, k, v, block_size=2, top_k=2)
    for own in (False, True):
        cache = BlockCache(2)
        cache.append(k[:, :, :4], v[:, :, :4])
        counts = cache.stop if own else torch.tensor([4], dtype=torch.int32)
        cache.append(k[:, :, 4:], v[:, :, 4:], counts=counts)
        if not own:
            counts.zero_()
        torch.testing.assert_close(cached_attention(q, cache, top_k=2), want)


def test_a_page_holds_few_bytes_of_block_keys() -> None:
    rows = paged()
    rows.append(*torch.randn(2, 2, 2, 5, 16))
    sizes = rows._cache.memory()
    assert sizes == {"keys and values": 2 * 4 * 2 * 16 * 16 * 4, "blocks": 4 * 2 * 2 * 33 * 4}


@pytest.mark.usefixtures("poison")
@settings(max_examples=settings().max_examples // 3 + 1)
@given(
    # The interpreter multiplies bfloat16 as integers.
    case=cases(max_len=60, min_block=2, dtypes=[torch.float32, torch.float16]),
    q_len=st.integers(1, 4),
    left=st.integers(0, 20),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_kernel_decodes_as_cpu_does(case: Case, q_len: int, left: int, softcap: float) -> None:
    """In Triton's interpreter; some rows have padding before the first key."""
    needs_interpreter()
    kernels: Any = import_module("moba_flex.compile.decode_kernels")
    case = replace(case, q_len=min(q_len, case.kv_len))
    q, k, v = case.inputs()
    tables = None
    if left:
        mask = torch.arange(case.kv_len) >= torch.full((case.batch, 1), left)
        tables = make_tables(case.q_len, case.kv_len, case.block_size, case.causal, key_mask=mask)
    routing = route(q, k, **case.gate, tables=tables)
    got = kernels.decode_triton(q, k, v, *routing.parts, 0.3, softcap)
    want = decode_cpu(q, k, v, *routing.parts, 0.3, softcap)
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@pytest.mark.usefixtures("poison")
@settings(max_examples=settings().max_examples // 4 + 1)
@given(
    case=cases(max_len=90, min_block=6, dtypes=[torch.float32, torch.float16]),
    q_len=st.integers(1, 4),
    cached=st.booleans(),
    named=st.booleans(),
    ends=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 90)), min_size=4, max_size=4),
    by_head=st.booleans(),
    apart=st.sampled_from([0, 4, 64]),
)
def test_kernels_choose_and_decode_as_cpu_does(
    case: Case,
    q_len: int,
    cached: bool,
    named: bool,
    ends: list[tuple[int, int]],
    by_head: bool,
    apart: int,
) -> None:
    """In Triton's interpreter; slots of a cache that hold no key, and their blocks, hold NaN."""
    needs_interpreter()
    kernels: Any = import_module("moba_flex.compile.decode_kernels")
    case = replace(case, q_len=min(q_len, case.kv_len))
    q, k, v = case.inputs()
    gate = Gate(**case.gate)
    if by_head:
        numbers = torch.randint(gate.least_top_k, gate.top_k + 1, q.shape[:2])
        gate = replace(gate, head_top_k=numbers)
    layout, slots = Layout(case.q_len, case.kv_len, case.block_size, case.causal), None
    if cached:
        start, stop = torch.tensor(ends[: case.batch]).clamp(max=case.kv_len).int().T
        slots = Slots(None, start, torch.maximum(start, stop))
        layout = locate_slots(layout, slots)
        if named:  # one query fewer, and padding
            slots = Slots(slots.stop - case.q_len + 1, *slots[1:])
            layout = locate_slots(layout, slots)
    block_keys = pool(k, layout)
    want = decode_cpu(q, k, v, *choose(q, block_keys, gate, layout).parts, 0.3, 2.0)
    if slots is not None:
        slot = torch.arange(case.kv_len)
        unused = (slot < slots.start[:, None]) | (slot >= slots.stop[:, None])
        k, v = (x.masked_fill(unused[:, None, :, None], math.nan) for x in (k, v))
        number = torch.arange(block_keys.shape[2]) * case.block_size
        empty = number >= (slots.stop - slots.start)[:, None]
        block_keys = block_keys.masked_fill(empty[:, None, :, None], math.nan)
    with pytest.MonkeyPatch.context() as patch:
        if apart:  # programs of their own choose, which have so many lanes
            patch.setattr(kernels, "_MOST_CHOOSING", 0)
            patch.setattr(kernels, "_LANES", apart)
            patch.setattr(kernels, "_HELD", 2 * apart)
        options = numbers_of(gate, layout), gate.causal, gate.head_top_k, 0.3, 2.0
        rows = slots or (None, None, None)
        got = kernels.decode_few_triton(q, k, v, block_keys, *rows, None, None, *options)
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@pytest.mark.usefixtures("poison", "replays")
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=settings().max_examples // 8 + 1)
def test_kernels_read_and_write_pages(seed: int) -> None:
    """In Triton's interpreter, as they read and write rows in one piece, bit by bit."""
    needs_interpreter()
    decode: Any = import_module("moba_flex.compile.decode_kernels").decode_few_triton
    append_triton: Any = import_module("moba_flex.masks.append_kernel").append_triton
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, block_size = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 6)
    page_size, width, q_len = block_size * rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3)
    slots, num_pages = page_size * width, batch * width + 2

    def room(pages: int, length: int) -> list[Tensor]:
        sizes = (length, 16), (length, 24), (length // block_size, 17), (length // block_size, 16)
        return [torch.empty(pages, heads, n, dim) for n, dim in sizes]

    pages = rng.sample(range(num_pages), batch * width)
    table = torch.tensor(pages, dtype=torch.int32).view(batch, width)
    ends = [torch.zeros(3, batch, dtype=torch.int32) for _ in range(2)]
    memory = room(batch, slots), room(num_pages, page_size)
    for _ in range(3):
        num_new = rng.randint(0, slots - int(ends[0][1].max()))
        counts = torch.tensor([rng.randint(0, num_new) for _ in range(batch)]).int()
        new = [torch.randn(batch, heads, num_new, n, generator=generator) for n in (16, 24)]
        for tensors, rows, where in zip(memory, ends, (None, table), strict=True):
            append_triton(*tensors, *new, *rows, counts, where, block_size)
    assert torch.equal(*ends)
    q = torch.randn(batch, heads * 2, q_len, 16, generator=generator)
    options = (rng.randint(0, 3), block_size, 0, 0), True, None, 0.3, 0.0
    got = [
        decode(q, keys, values, block_keys, None, *rows[:2], where, None, *options)
        for (keys, values, _, block_keys), rows, where in zip(
            memory, ends, (None, table), strict=True
        )
    ]
    for x, y in zip(*got, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("poison", "replays")
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=settings().max_examples // 16 + 1)
def test_a_step_appends_and_then_decodes(seed: int) -> None:
    """In Triton's interpreter, bit by bit what two kernels do; all counters end at zero."""
    needs_interpreter()
    kernels: Any = import_module("moba_flex.compile.decode_kernels")
    append_triton: Any = import_module("moba_flex.masks.append_kernel").append_triton
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, block_size = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 5)
    page_size = block_size * rng.randint(1, 3)
    width = 2 + ceil_div(20, page_size)
    table, pages, length = None, batch, page_size * width
    if rng.random() < 0.5:
        pages, length = batch * width + 1, page_size
        numbers = rng.sample(range(pages), batch * width)
        table = torch.tensor(numbers, dtype=torch.int32).view(batch, width)
    sizes = (length, 16), (length, 24), (length // block_size, 17), (length // block_size, 16)
    caches = [[torch.empty(pages, heads, n, dim) for n, dim in sizes] for _ in range(2)]
    left = 0 if table is not None else rng.randint(0, 7)
    start = torch.tensor([rng.randint(0, left) for _ in range(batch)], dtype=torch.int32)
    ends = [torch.zeros(batch, dtype=torch.int32) for _ in range(2)]
    counters = [torch.zeros(batch, 1 + heads * 9, dtype=torch.int32) for _ in range(2)]

    def drawn(num_heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(batch, num_heads, length, dim, generator=generator)

    prompt = left + rng.randint(0, page_size * 2)
    for cache, stop, zeros in zip(caches, ends, counters, strict=True):
        generator.manual_seed(seed)
        new = drawn(heads, prompt, 16), drawn(heads, prompt, 24)
        append_triton(*cache, *new, start, stop, zeros, None, table, block_size)
    top_k = rng.randint(0, 3), block_size, rng.randint(0, 1), rng.randint(0, 1)
    by_head = torch.randint(1, 5, (heads * 2,), generator=generator)
    gate = top_k, rng.choice([None, by_head])
    with pytest.MonkeyPatch.context() as patch:
        if rng.random() < 0.5:
            patch.setattr(kernels, "_MOST_CHOOSING", 0)
        for _ in range(2):
            num_new = rng.randint(1, 4)
            some = torch.tensor([rng.randint(0, num_new) for _ in range(batch)]).int()
            counts = rng.choice([None, some])
            q, k, v = (
                drawn(n, num_new, dim) for n, dim in ((heads * 2, 16), (heads, 16), (heads, 24))
            )
            (cache, other), (stop, stop_of_other) = caches, ends
            got = kernels.decode_step_triton(
                q, k, v, *cache, start, stop, counters[0], counts, table, *gate, 0.3, 2.0
            )
            low = stop_of_other.clone()
            append_triton(
                *other, k, v, start, stop_of_other, counters[1], counts, table, block_size
            )
            keys, values, _, block_keys = other
            place = low, start, stop_of_other, table, counters[1]
            want = kernels.decode_few_triton(
                q, keys, values, block_keys, *place, gate[0], True, gate[1], 0.3, 2.0
            )
            assert torch.equal(stop, stop_of_other)
            for x, y in zip((*got, *cache), (*want, *other), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
            assert not any(x.any() for x in counters)


def test_the_kernel_that_chooses_has_counters_for_so_many_blocks() -> None:
    q, k = (torch.empty(1, 1, n, 16, device="meta") for n in (1, 2**21))
    asked = [gated_request(q, k, k, block_size=size, top_k=3) for size in (1, 2)]
    assert [plans._chooses_in_kernel(x) for x in asked] == [False, True]


def test_kernel_appends_as_cpu_does() -> None:
    """Bit by bit, in Triton's interpreter; blocks of padding before the first key too."""
    needs_interpreter()
    kernel: Any = import_module("moba_flex.masks.append_kernel")
    for counts in (None, torch.tensor([0, 11], dtype=torch.int32)):
        results = []
        engines: Any = append, kernel.append_triton
        for here in engines:
            torch.manual_seed(0)
            k, v = torch.randn(2, 2, 3, 20, 16), torch.randn(2, 2, 3, 20, 24)
            tensors = [
                torch.zeros(2, 3, 64, 16),
                torch.zeros(2, 3, 64, 24),
                torch.zeros(2, 3, 16, 17),
                torch.zeros(2, 3, 16, 16),
            ]
            start, stop = torch.tensor([[9, 0], [0, 0]], dtype=torch.int32)
            arrived = torch.zeros_like(start)
            for some_k, some_v in zip(k, v, strict=True):
                here(*tensors, some_k, some_v, start, stop, arrived, counts, None, 4)
                stop.sub_(3).clamp_(min=0)  # takes a part of a block back, which is added up anew
            assert stop.tolist() == ([34, 34] if counts is None else [0, 16])
            assert arrived.tolist() == [0, 0]
            results.append(tensors)
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("poison")
@given(seed=st.integers(0, 2**32 - 1), causal=st.booleans(), named=st.booleans())
def test_kernel_locates_slots_as_cpu_does(seed: int, causal: bool, named: bool) -> None:
    """In Triton's interpreter; rows may be empty, and queries may lie anywhere."""
    needs_interpreter()
    locate: Any = import_module("moba_flex.masks.layout_kernel").locate_triton
    rng = Random(seed)
    batch, kv_len = rng.randint(1, 3), rng.randint(1, rng.choice([5, 40, 600]))
    q_len, block_size = rng.randint(1, kv_len), rng.choice([1, 2, 7, 16, 100, LONGEST])
    start, stop = (torch.tensor(rng.choices(range(kv_len + 1), k=batch)).int() for _ in range(2))
    query = torch.tensor(rng.choices(range(-5, kv_len + 5), k=batch)).int() if named else None
    plain = Layout(q_len, kv_len, block_size, causal)
    want = locate_slots(plain, Slots(query, start, stop)).coordinates("cpu")
    queries, extents = locate(start, stop, query, q_len, plain.num_blocks, block_size, causal)
    for x, y in zip((*queries, *extents), want, strict=True):
        assert torch.equal(x, y)


def small(max_len: int | None = None) -> BlockCache:
    cache = BlockCache(8, max_len)
    cache.append(*torch.randn(2, 2, 2, 20, 16))
    return cache


def ragged() -> BlockCache:
    cache = small()
    cache.append(*torch.randn(2, 2, 2, 5, 16), counts=torch.tensor([3, 5]))
    return cache


def paged(**changes: Any) -> Any:
    """Return rows of two pages each."""
    table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
    given: dict[str, Any] = {"block_table": table, "lengths": torch.zeros(2, dtype=torch.int32)}
    return PagedCache(4, 16, 8).rows(**{**given, **changes})


class Step(torch.nn.Module):
    """A step over a cache."""

    def __init__(self, cache: BlockCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, q: Tensor, k: Tensor) -> Any:
        self.cache.append(k, k)
        return cached_attention(q, self.cache, top_k=2)


def beyond(lengths: Tensor, page: int = 0) -> Any:
    """Return rows of pages whose lengths were changed."""
    table = torch.tensor([[1, page], [2, 3]], dtype=torch.int32)
    rows = PagedCache(4, 16, 8).rows(table, torch.zeros(2, dtype=torch.int32))
    rows.append(*torch.ones(2, 2, 2, 1, 16))
    rows.stop.copy_(lengths)
    return rows


READS: list[Callable[[BlockCache], Any]] = [  # need a key
    lambda cache: cache.keys,
    lambda cache: cache.values,
    lambda cache: cache.block_keys,
    lambda cache: cache.tensors,
    lambda cache: cache.counters,
    lambda cache: cache.read(torch.ones(2, 2, 1, 16)),
    lambda cache: cache.start_at(torch.tensor([0, 1])),
    lambda cache: cache.crop(torch.tensor([0, 1])),
    lambda cache: cached_attention(torch.ones(2, 2, 1, 16), cache, top_k=2),
]
CACHE_ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    *(
        (
            lambda given=given: cached_attention(
                torch.ones(2, 2, 1, 16), small(), top_k=2, **given
            ),
            ValueError,
            "k and v must be given together, and with counts, got None for one",
        )
        for given in (
            {"k": torch.ones(2, 2, 1, 16)},
            {"v": torch.ones(2, 2, 1, 16)},
            {"counts": torch.tensor([1, 0])},
        )
    ),
    (
        lambda: PagedCache(4, 20, 8),
        ValueError,
        "page_size must be a multiple of block_size = 8, got 20",
    ),
    (
        lambda: paged(lengths=[0, 0]),
        TypeError,
        "lengths must be a Tensor of torch.int32, got <class 'list'>",
    ),
    (
        lambda: paged(block_table=torch.tensor([1, 0]).int()),
        ValueError,
        "block_table must have shape ('B', 'W'), got (2,)",
    ),
    (
        lambda: paged(lengths=torch.zeros(3, dtype=torch.int32)),
        ValueError,
        "lengths must be one number for each row of block_table, on its device, got (3,) on cpu "
        "beside (2, 2) on cpu",
    ),
    (
        lambda: paged().append(*torch.ones(2, 2, 2, 33, 16)),
        ValueError,
        "block_table must name pages for the slots of each row, got 2 of 16 slots for 33 keys",
    ),
    (
        lambda: paged(block_table=torch.full((2, 2), -1).int()).append(
            *torch.ones(2, 2, 2, 1, 16)
        ),
        ValueError,
        "block_table must name pages from 0 to 3, got [-1]",
    ),
    (
        lambda: paged(block_table=torch.zeros(2, 0).int()),
        ValueError,
        "block_table must name at least one page, got shape [B, 0]",
    ),
    (
        lambda: paged(lengths=torch.zeros(4).int()[::2]),
        ValueError,
        "lengths must be contiguous, got strides (2,): use .contiguous()",
    ),
    (
        lambda: cached_attention(
            torch.ones(2, 2, 1, 16), beyond(torch.tensor([33, 0]).int()), top_k=2
        ),
        ValueError,
        "lengths must be from 0 to the 32 slots of a row, got [33, 0]",
    ),
    (
        lambda: beyond(torch.tensor([17, 0]).int(), page=9).crop(1),
        ValueError,
        "block_table must name pages from 0 to 3, got [9]",
    ),
    (
        lambda: cached_attention(torch.ones(2, 2, 1, 16), PagedCache(4, 16, 8), top_k=2),  # type: ignore[call-overload]
        TypeError,
        "cache must be a BlockCache, or the rows of a PagedCache, got PagedCache",
    ),
    (
        lambda: BlockCache(8).append(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16).int()),
        TypeError,
        "k and v must hold floating-point numbers on one device, got torch.float32 on cpu and "
        "torch.int32 on cpu",
    ),
    (
        lambda: small().select(torch.ones(2)),
        TypeError,
        "rows must be a Tensor of torch.int32 or torch.int64, got torch.float32",
    ),
    (
        lambda: small().select(torch.ones(1, 1).int()),
        ValueError,
        "rows must have shape [B'], got (1, 1)",
    ),
    (
        lambda: small().select(torch.tensor([0, -1])),
        ValueError,
        "rows must be from 0 to 1, got [0, -1]",
    ),
    (
        lambda: torch.export.export(
            Step(small()), (torch.ones(2, 4, 1, 16), torch.ones(2, 2, 1, 16)), strict=False
        ),
        ValueError,
        "cache must be used in eager or compiled code, got torch.export: a package holds no cache",
    ),
    (lambda: small().repeat(0), ValueError, "repeats must be at least 1, got 0"),
    (
        lambda: paged().append(*torch.ones(2, 2, 2, 1, 16), start=torch.zeros(2).int()),
        ValueError,
        "start must be None for rows of pages, got a Tensor: leave padding out by counts",
    ),
    (
        lambda: paged().select(torch.tensor([1, 0])),
        ValueError,
        "rows must keep their pages, got a selection: change block_table and lengths",
    ),
    *(
        (
            lambda call=call: call(BlockCache(8)),
            ValueError,
            "cache must hold keys, got an empty one: append some",
        )
        for call in READS
    ),
    (
        lambda: paged().append(*torch.ones(2, 1, 2, 1, 16)),
        ValueError,
        "k must have 2 rows on cpu like lengths, got shape (1, 2, 1, 16) on cpu",
    ),
    (
        lambda: paged().append(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16, device="meta")),
        ValueError,
        "v must have 2 rows on cpu like lengths, got shape (2, 2, 1, 16) on meta",
    ),
    (
        lambda: small().append(torch.ones(2, 2, 16), torch.ones(2, 2, 16)),
        ValueError,
        "k must have shape [B, Hkv, T, D], got (2, 2, 16)",
    ),
    (
        lambda: small().append(torch.ones(2, 2, 1, 16), torch.ones(2, 1, 1, 16)),
        ValueError,
        "v must have shape [B, Hkv, T, Dv] like k, got (2, 1, 1, 16) beside (2, 2, 1, 16)",
    ),
    (
        lambda: small().append(*torch.ones(2, 2, 2, 1, 16, dtype=torch.float16)),
        ValueError,
        "k must have shape (2, 2, 'T', 16), torch.float32 on cpu like the cache, got "
        "(2, 2, 1, 16), torch.float16 on cpu",
    ),
    (
        lambda: small().append(*torch.ones(2, 2, 2, 1, 16), counts=torch.ones(2)),
        TypeError,
        "counts must be a Tensor of integers, got torch.float32",
    ),
    (
        lambda: small().append(*torch.ones(2, 2, 2, 1, 16), counts=torch.ones(1).int()),
        ValueError,
        "counts must have shape [B] = (2,), got (1,)",
    ),
    (
        lambda: small(21).append(*torch.ones(2, 2, 2, 2, 16)),
        ValueError,
        "max_len must be at least the slots of each row, got 21 for 22 slots: make a longer cache",
    ),
    (lambda: small().crop(21), ValueError, "tokens must be at most the slots of a row, got 21"),
    (lambda: small().crop(-1), ValueError, "tokens must be at least 0, got -1"),
    (
        lambda: small().append(*torch.ones(2, 2, 2, 1, 16), counts=torch.tensor([0, 2])),
        ValueError,
        "counts must be from 0 to 1, got [0, 2]",
    ),
    (
        lambda: small().append(*torch.ones(2, 2, 2, 1, 16), start=torch.tensor([0, 3])),
        ValueError,
        "start must stay as it is for rows that have keys, got another: reset the cache first",
    ),
    (
        lambda: small().append(*torch.ones(2, 2, 2, 1, 16, requires_grad=True)),
        ValueError,
        "k and v must need no gradients in a cache, got some that do: use torch.no_grad(), or "
        "call moba_attention with all keys",
    ),
    (
        lambda: cached_attention(torch.ones(2, 2, 1, 16), ragged(), top_k=2),
        ValueError,
        "q must have the 5 queries of the keys that were appended with counts, got 1",
    ),
    (
        lambda: cached_attention(
            torch.ones(2, 2, 1, 16), small(), top_k=2, plan="decode", score_mod=lambda s, *_: s
        ),
        ValueError,
        "score_mod must be None for plan='decode', got a function: let plan be 'routed'",
    ),
    (
        lambda: cached_attention(
            torch.ones(2, 2, 1, 16, requires_grad=True), small(), top_k=2, plan="decode"
        ),
        ValueError,
        "q, k and v must need no gradients for plan='decode', got some that do: let plan be "
        "'auto', or use torch.no_grad()",
    ),
    (
        lambda: moba_attention(
            *torch.ones(3, 1, 1, 1, 16, device="meta"), block_size=2, top_k=1, plan="decode"
        ),
        ValueError,
        "q must be on cpu or cuda, and not in a package, for plan='decode', got meta: "
        "let plan be 'auto'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CACHE_ERRORS)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_a_refused_append_changes_nothing() -> None:
    cache = small(21)
    before = cache.start.clone(), cache.stop.clone(), cache.keys[:, :, :20].clone()
    refused: list[dict[str, Any]] = [{}, {"start": torch.tensor([1, 0])}]
    for options in refused:
        with pytest.raises(ValueError, match="must"):
            cache.append(*torch.randn(2, 2, 2, 2, 16), **options)
    for x, y in zip((cache.start, cache.stop, cache.keys[:, :, :20]), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("max_len", [None, 20])
@pytest.mark.parametrize(
    ("in_one_call", "refused"),
    [
        (False, {"counts": torch.ones(3)}),
        (False, {"counts": torch.tensor([1, 2])}),
        (False, {"counts": torch.tensor([1, 2, 5])}),
        (False, {"start": torch.tensor([0, 1])}),
        (False, {"start": torch.tensor([0, 1, -1])}),
        (False, {"start": torch.tensor([0, 1, 2]), "counts": torch.tensor([1, 2, 5])}),
        (True, {"counts": torch.tensor([1, 2])}),
        (True, {"top_k": 0}),
        (True, {"plan": "fused"}),
        (True, {}),  # q is a batch of another dtype
    ],
)
def test_a_refused_first_append_fixes_nothing(
    in_one_call: bool, refused: dict[str, Any], max_len: int | None
) -> None:
    """Neither rows, heads, dims nor a dtype; another append may come first."""
    cache = BlockCache(8, max_len)
    k, v = torch.ones(2, 3, 1, 4, 8, dtype=torch.float16)
    call: Callable[..., Any] = cache.append
    if in_one_call:
        call = partial(cached_attention, torch.ones(3, 1, 4, 8), cache, top_k=2)
    with pytest.raises((TypeError, ValueError), match="must"):
        call(k, v, **refused)
    assert cache.stop.tolist() == []
    k, v = torch.randn(2, 2, 2, 20, 16)
    q = torch.randn(2, 4, 1, 16)
    want = moba_attention(q, k, v, block_size=8, top_k=2)
    torch.testing.assert_close(cached_attention(q, cache, k, v, top_k=2), want)


@pytest.mark.parametrize(
    "refused",
    [
        torch.ones(2, 3, 1, 4, 8, dtype=torch.float16),  # other rows
        torch.ones(2, 2, 1, 33, 8, dtype=torch.float16),  # more keys than slots
        torch.ones(2, 2, 1, 20, 8, dtype=torch.float16),  # needs a page that there is not
    ],
)
def test_a_refused_first_append_allocates_no_pages(refused: Tensor) -> None:
    rows = paged(block_table=(table := torch.tensor([[1, 9], [2, 3]]).int()))
    with pytest.raises(ValueError, match="must"):
        rows.append(*refused)
    assert rows._cache.memory() == {"keys and values": 0, "blocks": 0}
    table[0, 1] = 0
    k, v = torch.randn(2, 2, 2, 20, 16)
    q = torch.randn(2, 4, 1, 16)
    want = moba_attention(q, k, v, block_size=8, top_k=2)
    torch.testing.assert_close(cached_attention(q, rows, k, v, top_k=2), want)


@pytest.mark.parametrize("kind", ["growing", "fixed", "paged"])
@pytest.mark.parametrize("step", ["append", "attend", "crop"])
@torch.no_grad()  # an interrupt may keep the mode from being set back
def test_an_interrupt_leaves_all_of_a_step_or_none(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes, on CPU: keys, lengths and block keys fit each other."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, 45, 16, generator=generator)
    q = torch.randn(2, 4, 3, 16, generator=generator)
    few, many = slice(0, 20), slice(20, 23)
    monkeypatch.setattr("moba_flex.cache._ROOM", 0)  # a cache that grows has to grow

    def run(at: int) -> bool:
        """Interrupt the step at this of the lines that it runs; return whether it has so many."""
        cache = paged() if kind == "paged" else BlockCache(8, 45 if kind == "fixed" else None)
        cache.append(k[:, :, few], v[:, :, few])
        left, new = at, (k[:, :, many], v[:, :, many])

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.endswith(("moba_flex/cache.py", "masks/append.py")):
                return None
            left -= event == "line"
            if left == 0 and event == "line":
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            if step == "append":
                cache.append(*new)
            elif step == "attend":
                cached_attention(q, cache, *new, top_k=2)
            else:
                cache.crop(3)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        length = int(cache.stop[0])
        assert cache.stop.tolist() == [length, length]
        assert length in (20, 17 if step == "crop" else 23)
        for low, high in ((length, length + 1), (length + 1, length + 6)):
            cache.append(k[:, :, low:high], v[:, :, low:high])
            got = cached_attention(q[:, :, :1], cache, top_k=2)
            want = moba_attention(
                q[:, :, :1], k[:, :, :high], v[:, :, :high], block_size=8, top_k=2
            )
            torch.testing.assert_close(got, want)
            assert torch.equal(cache.keys[:, :, :high], k[:, :, :high])
            blocks = pool(k[:, :, :high], Layout(1, high, 8, True))
            assert torch.equal(cache.block_keys[:, :, : blocks.shape[2]], blocks)
        return left <= 0

    at = 1
    while run(at):
        at += 1
    assert at > 5


def raises(*_: Tensor) -> Tensor:
    raise ZeroDivisionError("must not be asked")


@pytest.mark.parametrize("max_len", [None, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"plan": "dense"},
        {"softcap": -1.0},
        {"sink_blocks": 5},
        {"counts": torch.tensor([1, 2])},  # for 3 queries
        {"score_mod": raises},
        {"plan": "fused", "mask_mod": raises},
    ],
)
def test_a_refused_call_appends_nothing(max_len: int | None, options: dict[str, Any]) -> None:
    cache, q, new = small(max_len), torch.randn(2, 2, 3, 16), torch.randn(2, 2, 2, 2, 16)
    kept = cache.keys[:, :, :20].clone(), cache.values[:, :, :20].clone()
    with pytest.raises((ValueError, ZeroDivisionError), match="must"):
        cached_attention(q, cache, *new, top_k=2, **options)
    assert cache.stop.tolist() == [20, 20]
    k, v = (torch.cat(x, dim=2) for x in zip(kept, new, strict=True))
    got = cached_attention(q, cache, *new, top_k=3)
    want = moba_attention(q, k, v, block_size=8, top_k=3)
    torch.testing.assert_close(got, want)
    assert torch.equal(got, cached_attention(q, cache, top_k=3))


def test_more_queries_than_keys_are_refused() -> None:
    cache = small()
    with pytest.raises(ValueError, match="must have at most as many positions as k, 21"):
        cached_attention(torch.randn(2, 2, 22, 16), cache, *torch.randn(2, 2, 2, 1, 16), top_k=2)
    assert cache.stop.tolist() == [20, 20]


def test_a_plan_counts_the_blocks_that_there_are() -> None:
    """Not those of memory that a cache has set aside."""
    cache, new = small(), torch.randn(2, 2, 2, 1, 16)
    q = torch.randn(2, 2, 1, 16)
    got = cached_attention(q, cache, *new, top_k=3, plan="dense")
    torch.testing.assert_close(got, cached_attention(q, cache, top_k=3))


def test_a_cache_made_in_inference_mode_serves_outside_of_it() -> None:
    for max_len in (None, 64):
        with torch.inference_mode():
            cache = small(max_len)
            cache.select(torch.tensor([1, 0]))
        cache.append(*torch.randn(2, 2, 2, 1, 16))
        assert cached_attention(torch.randn(2, 4, 1, 16), cache, top_k=2).isfinite().all()
