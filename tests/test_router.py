"""The router against the oracle's gate, on CPU and, interpreted, the CUDA kernel."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moba_flex import Routing, moba_attention_reference, route
from moba_flex.masks import pool as pool_module
from moba_flex.masks import router
from moba_flex.masks.layout import Layout, make_tables
from moba_flex.masks.pool import pool
from moba_flex.masks.request import Gate
from tests.case import MEMORY, lay_out
from tests.helpers import (
    Case,
    assert_gate_is_right,
    cases,
    chosen_blocks,
    needs_interpreter,
    run_script,
)


@settings(max_examples=4 * settings().max_examples)
@given(case=cases())
def test_route_chooses_what_the_contract_says(case: Case) -> None:
    q, k, v = case.inputs()
    routing = route(q, k, **case.gate)
    blocks = chosen_blocks(routing)
    assert routing.blocks.dtype == torch.int32
    assert (routing.blocks.diff(dim=3) >= 0).all(), "ascending"
    assert_gate_is_right(case, q, k, blocks)
    if case.ties:  # every number is exact, so that equality is too
        assert torch.equal(blocks, moba_attention_reference(q, k, v, **case.gate).blocks)


@settings(max_examples=settings().max_examples // 3 + 1)
@given(case=cases(max_len=200, dtypes=[torch.float32, torch.float16]))
def test_kernel_chooses_what_the_contract_says(case: Case) -> None:
    q, k, v = case.inputs()
    blocks = launch_kernel(q, k, case)
    assert (blocks.diff(dim=3) >= 0).all(), "ascending"
    chosen = chosen_blocks(Routing(blocks, case.block_size, case.q_len, case.kv_len, case.causal))
    assert_gate_is_right(case, q, k, chosen)
    if has_exact_ties(case):
        assert torch.equal(chosen, moba_attention_reference(q, k, v, **case.gate).blocks)


def has_exact_ties(case: Case) -> bool:
    """Whether affinities are exact, so that equal ones are equal in any order of summation.

    The means of small integers are, over a power of two of keys: a short last block is something
    else, but only without causality does anybody choose it.
    """
    last = case.kv_len % case.block_size
    return case.ties and (case.causal or last & (last - 1) == 0)


def launch_kernel(q: Tensor, k: Tensor, case: Case) -> Tensor:
    """Run the CUDA kernel: on CUDA for real, on CPU interpreted."""
    if not q.is_cuda:
        needs_interpreter()
    return choose_by_kernel(q, k, **case.gate)


def choose_by_kernel(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    from moba_flex.masks.router_kernel import choose_triton

    gate = Gate(**options)
    layout = over(k, gate.block_size, q.shape[2])
    # The kernel that pools has a test of its own, and takes ten times as long, interpreted.
    block_keys = pool(k, layout)
    picks = min(gate.top_k, layout.num_blocks) - 1
    numbers = picks, gate.block_size, gate.sink_blocks, gate.local_blocks
    return choose_triton(q, block_keys, numbers, gate.causal, None, layout.q_offset, None)


def over(k: Tensor, block_size: int, q_len: int = 1) -> Layout:
    return Layout(q_len, k.shape[2], block_size, causal=True)


def test_no_more_scores_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = Case(num_kv_heads=2, group=3, q_len=500, kv_len=600).inputs()
    whole = route(q, k, block_size=10, top_k=4).blocks
    sizes = []
    top_blocks = router._top_blocks

    def record(affinity: Tensor, *args: Any) -> Tensor:
        sizes.append(affinity.numel())
        return top_blocks(affinity, *args)

    monkeypatch.setattr(router, "_CPU_CHUNK", 5_000)
    monkeypatch.setattr(router, "_top_blocks", record)
    assert torch.equal(route(q, k, block_size=10, top_k=4).blocks, whole)
    assert len(sizes) > 10
    assert max(sizes) <= 5_000


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_and_inf_stay_in_range_and_in_their_rows(
    value: float, causal: bool, kernel: bool
) -> None:
    case = Case(q_len=150, kv_len=200, block_size=8, top_k=5, causal=causal)
    q, k, _ = case.inputs()

    def choose() -> Tensor:
        return launch_kernel(q, k, case) if kernel else route(q, k, **case.gate).blocks

    clean = choose()
    q[0, 0, 7] = value
    poisoned_query = choose()
    same = torch.arange(150) != 7
    assert torch.equal(poisoned_query[:, :, same], clean[:, :, same])
    k[0, 0, 3, 5] = value
    k[0, 0, 90:95] = value
    for blocks in (poisoned_query, choose()):
        assert (blocks >= 0).all()
        assert (blocks <= 25).all()
        counts = (blocks < 25).sum(-1)
        own = torch.arange(50, 200) // 8
        assert torch.equal(counts[0, 0], own.clamp(max=4) if causal else torch.full((150,), 4))
        assert ((blocks.diff(dim=3) > 0) | (blocks[..., 1:] == 25)).all(), "no block twice"


@pytest.mark.parametrize("kernel", [False, True])
def test_nan_ranks_last(kernel: bool) -> None:
    case = Case(q_len=80, kv_len=80, block_size=8, top_k=9)
    q, k, _ = case.inputs()
    k[0, 0, 24:32] = math.nan
    blocks = launch_kernel(q, k, case) if kernel else route(q, k, **case.gate).blocks
    last = blocks[0, 0, 72:]  # nine candidates, eight picks
    assert not (last == 3).any()
    assert (blocks[0, 0, 64:72] == 3).any(-1).all(), "no better one is left"


@pytest.mark.parametrize("kernel", [False, True])
def test_signed_zeros_tie(kernel: bool) -> None:
    case = Case(q_len=40, kv_len=40, block_size=8, top_k=3)
    q, k, _ = case.inputs()
    q[:] = 1.0
    k[:] = 0.0
    k[0, 0, 24:32] = -0.0
    blocks = launch_kernel(q, k, case) if kernel else route(q, k, **case.gate).blocks
    assert blocks[0, 0, 39].tolist() == [2, 3]
    k[0, 0, 16:24] = 0.0
    k[0, 0, 8:16] = -0.0
    blocks = launch_kernel(q, k, case) if kernel else route(q, k, **case.gate).blocks
    assert blocks[0, 0, 39].tolist() == [2, 3]


def test_block_keys_are_means_rounded_once() -> None:
    k = torch.randn(2, 3, 100, 16, dtype=torch.bfloat16)
    keys = pool(k, over(k, 32))
    assert keys.dtype == torch.bfloat16
    assert keys.shape == (2, 3, 4, 16)
    exact = torch.stack([part.double().mean(2) for part in k.split(32, dim=2)], dim=2)
    half_step = torch.finfo(torch.bfloat16).eps / 2
    assert ((keys.double() - exact).abs() <= exact.abs() * half_step * 1.001).all()


def means_in_order(k: Tensor, block_size: int) -> Tensor:
    """Return the block keys of the contract: one addition in float32 after another."""
    means = []
    for part in k.split(block_size, dim=2):
        total = torch.zeros_like(part[:, :, 0], dtype=torch.float32)
        for key in part.float().unbind(2):
            total = total + key
        means.append((total / part.shape[2]).to(k.dtype))
    return torch.stack(means, dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 300), st.integers(1, 130)
    ),
    block_size=st.integers(1, 140),
    memory=st.sampled_from(MEMORY),
    seed=st.integers(0, 2**32 - 1),
)
def test_block_keys_have_the_bits_of_sums_in_order(
    dtype: torch.dtype, sizes: tuple[int, ...], block_size: int, memory: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Of many sizes, so that every addition rounds.
    k = torch.randn(sizes, generator=generator) * torch.randn(sizes, generator=generator).exp()
    k = lay_out(k.to(dtype), memory)
    want = means_in_order(k, block_size)
    plain = over(k, block_size)
    assert torch.equal(pool(k, plain), want)
    at = plain.coordinates(k.device)
    located = plain.with_tables(torch.stack(at[:4]), torch.stack(at[4:]))
    assert torch.equal(pool(k, located), want)


def test_kernel_and_chunks_give_the_bits_of_sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_interpreter()
    from moba_flex.masks.pool_kernel import pool_triton

    k = torch.randn(2, 2, 60, 24) * torch.randn(2, 2, 60, 24).exp()
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.arange(60) >= torch.tensor([[0], [33]])
    for block_size in (1, 7, 16, 59, 160):
        want = means_in_order(k, block_size)
        assert torch.equal(pool_triton(k, block_size, want.shape[2], None), want)
        assert torch.equal(pool_triton(strided, block_size, want.shape[2], None), want)
        tables = make_tables(60, 60, block_size, True, key_mask=mask)
        assert tables is not None
        padded = pool(k, tables)
        alone = means_in_order(k[1:, :, 33:], block_size)
        assert torch.equal(padded[1:, :, : alone.shape[2]], alone)
        num_blocks = tables.num_blocks
        assert torch.equal(pool_triton(k, block_size, num_blocks, tables.extents), padded)
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "_POOL_CHUNK", 60 * 24)
            assert torch.equal(pool(k, over(k, block_size)), want)
            assert torch.equal(pool(k, tables), padded)


def test_later_keys_never_matter() -> None:
    q, k, _ = Case(q_len=200, kv_len=200, block_size=16, top_k=4).inputs()
    before = route(q, k, block_size=16, top_k=4).blocks
    k[:, :, 112:] = torch.randn_like(k[:, :, 112:])
    after = route(q, k, block_size=16, top_k=4).blocks
    # A query may look at blocks wholly before its own: those up to key 112 are as they were.
    assert torch.equal(before[:, :, :128], after[:, :, :128])
    assert not torch.equal(before, after)


def test_transposed_inputs_route_alike() -> None:
    q, k, _ = Case(batch=2, num_kv_heads=2, group=2, q_len=90, kv_len=90).inputs()
    strided_q = q.transpose(1, 2).contiguous().transpose(1, 2)
    strided_k = k.transpose(1, 2).contiguous().transpose(1, 2)
    case = Case(q_len=90, kv_len=90, block_size=16, top_k=3)
    expected = route(q, k, **case.gate).blocks
    assert torch.equal(route(strided_q, strided_k, **case.gate).blocks, expected)
    assert torch.equal(launch_kernel(strided_q, strided_k, case), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_gate_kernel_chooses_like_the_cpu(causal: bool) -> None:
    needs_interpreter()
    q, k = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 90, 16)
    q, k = (x.round() for x in (q, k))  # sums of small integers are exact
    k[:, :, 80:] = 0  # as is the mean of a short block
    gate: dict[str, Any] = {"block_size": 16, "top_k": 4, "sink_blocks": 1, "causal": causal}
    expected = route(q, k, **gate).blocks
    assert torch.equal(choose_by_kernel(q, k, **gate), expected)
    gate = {"block_size": 16, "top_k": 1, "causal": causal}
    assert choose_by_kernel(q, k, **gate).shape == (2, 4, 70, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about NaN
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, "full") for kind in ("plain", "ties", "not finite", "forced", "tables")),
        *((kind, "short") for kind in ("not causal", "many", "heads", "forced")),
        ("plain", "paired"),
    ],
)
def test_sifting_chooses_like_the_cpu(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    needs_interpreter()
    if (kind, way) == ("plain", "full"):
        request.getfixturevalue("replays")
    from moba_flex.masks import router_kernel

    for tile in ("_SIFT_TILE_Q", "_TILE_Q"):
        monkeypatch.setattr(router_kernel, tile, 32)
    monkeypatch.setattr(router_kernel, "_SIFT_BLOCKS", 0)
    monkeypatch.setattr(router_kernel, "_FULL_BLOCKS", 99 if way == "full" else 0)
    monkeypatch.setattr(router_kernel, "_PAIRED_BLOCKS", 0 if way == "paired" else 99)
    q, keys = torch.randn(1, 2 if kind == "heads" else 1, 50, 16), torch.randn(1, 1, 70, 16)
    # Small integers: their products and sums are exact.
    q, keys = ((x * (1 if kind == "ties" else 8)).round().half() for x in (q, keys))
    if kind == "not finite":
        q[:, :, ::9, 1] = math.nan
        q[:, :, 5::11, 2] = math.inf
        keys[:, :, 7] = math.nan
        keys[:, :, 20::31, 3] = -math.inf
    numbers = [5, 3, 0, 0]
    if kind == "forced":
        numbers[2:] = 2, 1
    if kind == "many":
        numbers[0] = 11
    head_top_k = torch.tensor([1, 6]) if kind == "heads" else None
    queries = None
    if kind == "tables":
        position = torch.arange(50)
        own = position + 20
        queries = torch.stack([position, own, own // 40 * 40, own - 1]).int()[:, None]
    others = tuple(numbers), kind != "not causal", head_top_k, 160, queries
    expected = router.choose_cpu(q, keys, *others)
    assert torch.equal(router_kernel.choose_triton(q, keys, *others), expected)


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """For real: what the interpreter runs may still not compile."""
    for kernel in run_script("compile_for_hopper.py"):
        assert kernel["code"] > 0
        assert kernel["shared"] <= 227 * 1024, "what one program may have on Hopper"
