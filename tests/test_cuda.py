"""The same comparisons on a CUDA device, and what exists there alone."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import (
    Routing,
    create_moba_block_mask,
    make_tables,
    moba_attention,
    moba_attention_reference,
    route,
    routed_attention,
)
from moba_flex.masks.layout import Layout
from moba_flex.masks.pool import pool
from perf.timing import captured
from tests import fuzz
from tests.case import MEMORY, lay_out
from tests.helpers import (
    Case,
    assert_gate_is_right,
    assert_matches_oracle,
    attention,
    cases,
    chosen_blocks,
)
from tests.test_masks import assert_kernels_sort_alike
from tests.test_router import has_exact_ties, launch_kernel, means_in_order

pytestmark = pytest.mark.cuda

BF16, FP16 = torch.bfloat16, torch.float16
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # to shrink a failure takes compilations
# Each compiles once; lengths and values are drawn.
KINDS = {
    "aligned": Case(1, 2, 2, head_dim=64, block_size=128, top_k=3, dtype=BF16),
    "large blocks": Case(1, 1, 4, head_dim=128, block_size=256, top_k=2, dtype=BF16),
    "odd blocks": Case(2, 2, 1, head_dim=64, block_size=100, top_k=4, dtype=BF16),
    "small blocks, forced": Case(
        1, 1, 8, head_dim=64, block_size=24, top_k=6, sink_blocks=1, local_blocks=1, dtype=FP16
    ),
    "not causal": Case(1, 2, 3, head_dim=80, block_size=128, top_k=2, causal=False, dtype=BF16),
    "float32": Case(2, 2, 2, head_dim=64, block_size=100, top_k=4),
    "own block": Case(1, 2, 2, head_dim=64, block_size=96, top_k=1, scale=0.3, dtype=BF16),
}
# The fused plan needs no compilation of graphs, so it can afford more.
FUSED_KINDS = KINDS | {
    "wide heads": Case(1, 1, 2, head_dim=256, block_size=64, top_k=4, dtype=BF16),
    "odd heads": Case(2, 1, 3, head_dim=40, block_size=200, top_k=3, sink_blocks=1, dtype=FP16),
    "float32, not causal": Case(1, 2, 1, head_dim=128, block_size=64, top_k=3, causal=False),
    "tiny blocks": Case(1, 2, 2, head_dim=32, block_size=7, top_k=20, dtype=BF16),
    "no groups": Case(2, 3, 1, head_dim=128, block_size=128, top_k=5, dtype=BF16),
    "several tiles": Case(1, 2, 1, head_dim=128, block_size=384, top_k=3, dtype=FP16),
}
PLANS = [(kind, plan) for kind in KINDS for plan in ("masked", "routed", "auto")]
PLANS += [(kind, "fused") for kind in FUSED_KINDS]
lengths = st.integers(1, 1500).flatmap(
    lambda kv: st.tuples(st.one_of(st.just(kv), st.integers(1, kv)), st.just(kv))
)


@pytest.mark.parametrize(("kind", "plan"), PLANS)
def test_plans_are_the_oracle(kind: str, plan: Any) -> None:
    @settings(
        max_examples=settings().max_examples * (4 if plan == "fused" else 1) // 2, phases=PHASES
    )
    @given(sizes=lengths, ties=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def check(sizes: tuple[int, int], ties: bool, seed: int) -> None:
        q_len, kv_len = sizes
        case = replace(FUSED_KINDS[kind], q_len=q_len, kv_len=kv_len, ties=ties, seed=seed)
        if plan == "auto":  # dense: the others are asked for by name
            case = replace(case, top_k=-(-kv_len // case.block_size) + case.top_k)
        case = replace(case, device="cuda")
        assert_matches_oracle(f"cuda {plan}", case, attention(case, plan))

    check()


@pytest.mark.parametrize("plan", ["routed", "fused"])
@pytest.mark.parametrize("kind", ["aligned", "large blocks"])
def test_whole_tiles_are_the_oracle(kind: str, plan: Any) -> None:
    @settings(max_examples=settings().max_examples // 2, phases=PHASES)
    @given(tiles=st.integers(1, 12), more=st.integers(0, 500), seed=st.integers(0, 2**32 - 1))
    def check(tiles: int, more: int, seed: int) -> None:
        q_len = 128 * tiles
        case = replace(KINDS[kind], q_len=q_len, kv_len=q_len + more, seed=seed, device="cuda")
        assert_matches_oracle(f"cuda {plan}, whole tiles", case, attention(case, plan))

    check()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plan", ["fused", "routed", "masked", "dense", "auto"])
def test_whole_requests_are_the_oracle(plan: str) -> None:
    """Documents, padding, mods and all: some of what `python -m tests.fuzz` draws."""
    count = settings().max_examples * (10 if plan == "fused" else 1)
    seed = int(torch.randint(2**31, ()))
    tally = fuzz.fuzz(range(count), seed, "cuda", (plan,), 0.0)
    assert not tally.failures, f"seed {seed}: {tally.failures}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("plan", ["fused", "routed", "masked", "dense"])
def test_whole_requests_in_a_graph_are_the_oracle(plan: str) -> None:
    """There a compiler chooses how what is computed lies in memory."""
    count, seed = max(2, settings().max_examples // 6), int(torch.randint(2**31, ()))
    tally = fuzz.fuzz(range(count), seed, "cuda", (plan,), 0.0, graph=True)
    assert not tally.failures, f"seed {seed}: {tally.failures}"


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 512])
def test_scores_may_rise_within_a_block(block_size: int, dtype: torch.dtype) -> None:
    """As in `test_fused.py`, by the arithmetic of the device, which flushes very small numbers."""
    position = torch.arange(1500, device="cuda")
    block, past = position // block_size, position <= position[:, None]
    for rise in (20.0, 60.0, 90.0, 127.0, 300.0, -300.0):
        q, k, v = torch.randn(3, 1, 2, 1500, 64, device="cuda")
        q[..., 0], k[..., 0] = 1, position % block_size / block_size * rise
        q, k, v = (x.to(dtype) for x in (q, k, v))
        routing = route(q, k, block_size=block_size, top_k=3)
        got = routed_attention(q, k, v, routing, scale=1.0, plan="fused")
        seen = chosen_blocks(routing)[..., block] & past
        want = scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=seen, scale=1.0
        )
        error = 1e-3 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, want.to(dtype), rtol=error, atol=error)


def documents(count: int, length: int) -> tuple[Tensor, list[slice]]:
    """Cut a length into documents, the first of one token and the second empty."""
    inner = torch.randint(2, length + 1, (count - 2,)).sort().values
    starts = torch.cat((torch.tensor([0, 1, 1]), inner, torch.tensor([length])))
    edges = starts.tolist()
    slices = [slice(a, b) for a, b in pairwise(edges) if a < b]
    return starts.int().cuda(), slices


def test_packed_documents_are_separate_calls() -> None:
    case = replace(FUSED_KINDS["no groups"], batch=1, q_len=3000, kv_len=3000, device="cuda")
    q, k, v = (x.requires_grad_() for x in case.inputs())
    gate: dict[str, Any] = {"block_size": 128, "top_k": 4, "plan": "fused"}
    starts, slices = documents(9, 3000)
    weight = torch.randn_like(q)
    packed = moba_attention(q, k, v, **gate, cu_seqlens=starts)
    apart = torch.cat(
        [moba_attention(*(x[:, :, s] for x in (q, k, v)), **gate) for s in slices], 2
    )
    half_step = torch.finfo(BF16).eps / 2
    pairs = [(packed, apart)]
    pairs += zip(
        *(torch.autograd.grad(x, (q, k, v), weight) for x in (packed, apart)), strict=True
    )
    for x, y in pairs:  # each rounds its parts and its result
        assert (x.float() - y.float()).norm() < 4 * half_step * y.float().norm()


def test_tensors_past_32_bit_offsets() -> None:
    """More than 2**31 elements, positions before heads: offsets within a head pass 2**31 too."""
    q, k, v = (
        torch.randn(1, length, 17, 128, device="cuda", dtype=BF16).transpose(1, 2)
        for length in (256, 1 << 20, 1 << 20)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    gate: dict[str, Any] = {"block_size": 4096, "top_k": 3}
    out = moba_attention(q, k, v, **gate)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    for head in (0, 16):
        alone = [x[:, head : head + 1].detach().requires_grad_() for x in (q, k, v)]
        expected = moba_attention_reference(*alone, **gate).out
        expected_grads = torch.autograd.grad(expected, alone, weight[:, head : head + 1].float())
        pairs = [(out, expected), *zip(grads, expected_grads, strict=True)]
        for actual, exact in pairs:
            assert (actual[:, head : head + 1] - exact).norm() < 0.02 * exact.norm()


@settings(max_examples=10 * settings().max_examples, phases=PHASES)
@given(case=cases(dtypes=[torch.float32, BF16, FP16]))
def test_kernel_chooses_what_the_contract_says(case: Case) -> None:
    case = replace(case, device="cuda")
    q, k, v = case.inputs()
    blocks = launch_kernel(q, k, case)
    assert (blocks.diff(dim=3) >= 0).all()
    routing = Routing(blocks, case.block_size, case.q_len, case.kv_len, case.causal)
    chosen = chosen_blocks(routing)
    assert_gate_is_right(case, q, k, chosen)
    if has_exact_ties(case):
        assert torch.equal(chosen, moba_attention_reference(q, k, v, **case.gate).blocks)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32, torch.float64])
def test_block_keys_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    for block_size in range(1, 131):
        kv_len, head_dim = 3 * block_size + block_size // 2, (40, 64, 128)[block_size % 3]
        k = torch.randn(2, 3, kv_len, head_dim) * torch.randn(2, 3, kv_len, head_dim).exp()
        k = lay_out(k.to(dtype), MEMORY[block_size % len(MEMORY)])
        want, there = means_in_order(k, block_size), lay_out(k.cuda(), MEMORY[block_size % 3])
        plain = Layout(kv_len, kv_len, block_size, causal=True)
        assert torch.equal(pool(k, plain), want)
        assert torch.equal(pool(there, plain).cpu(), want)
        starts = torch.tensor([0, block_size + 1, block_size + 1, kv_len - 1])
        here, on_cuda = (
            make_tables(kv_len, kv_len, block_size, True, cu_seqlens=x)
            for x in (starts, starts.cuda())
        )
        assert here is not None
        assert on_cuda is not None
        assert torch.equal(pool(there, on_cuda).cpu(), pool(k, here))


@settings(max_examples=10 * settings().max_examples, phases=PHASES)
@given(case=cases(), tile=st.integers(1, 200))
def test_kernels_sort_like_the_cpu(case: Case, tile: int) -> None:
    q, k, _ = replace(case, device="cuda").inputs()
    assert_kernels_sort_alike(route(q, k, **case.gate), case.num_kv_heads, tile)


def test_kernels_sort_many_pairs_of_many_blocks() -> None:
    q, k = (
        torch.randn(1, 4, 100_000, 16, device="cuda"),
        torch.randn(1, 2, 100_000, 16, device="cuda"),
    )
    assert_kernels_sort_alike(route(q, k, block_size=20, top_k=9), 2, 128)


def test_launches_are_remembered_for_one_layout_alone() -> None:
    """The same sizes, aligned or not, transposed or not, one after another and again."""
    case = replace(KINDS["aligned"], q_len=600, kv_len=600, device="cuda")

    def lay_out(x: Tensor, kind: int) -> Tensor:
        if kind == 1:  # a multiple of two bytes, and not of sixteen
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if kind == 2 else x

    attend = attention(case, "fused")
    for kind in (0, 1, 2, 0, 1, 2):

        def laid_out(*inputs: Tensor, kind: int = kind) -> tuple[Tensor, Tensor | None]:
            q, k, v = (lay_out(x, kind) for x in inputs)
            return attend(q, k, v)

        assert_matches_oracle("cuda fused, layouts", case, laid_out)


def qkv(length: int, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    case = Case(1, 2, 2, length, length, head_dim=64, dtype=BF16, device="cuda")
    q, k, v = (x.requires_grad_(grad) for x in case.inputs())
    return q, k, v


@pytest.mark.parametrize("plan", ["masked", "routed", "fused"])
def test_forward_and_backward_are_one_graph_for_any_length(plan: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * moba_attention(q, k, v, block_size=128, top_k=3, plan=plan)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True)
    for length in (512, 700, 1024, 1280, 1999, 2048):
        inputs = qkv(length)
        expected = moba_attention_reference(*inputs, block_size=128, top_k=3, dtype=torch.float32)
        out = compiled(*inputs)
        assert (out - 2 * expected.out).norm() < 0.02 * out.norm()
        torch.autograd.grad(out.sum(), inputs)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_odd_static_lengths_in_a_graph(dtype: torch.dtype) -> None:
    """Inductor pads strides of such sizes, and in PyTorch 2.11 reads some of them unpadded."""
    case = Case(2, 2, 2, 700, 1000, head_dim=64, block_size=100, top_k=4, device="cuda")
    case = replace(case, dtype=dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            **case.gate,
            "plan": "routed",
            "return_aux": AuxRequest(lse=True),
        }
        out, aux = moba_attention(q, k, v, **options)
        return out, aux.lse

    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    assert_matches_oracle("cuda routed, static", case, compiled)


def test_one_head_of_keys_and_a_batch() -> None:
    """Lists of one head: each sequence must get its own."""
    case = Case(3, 1, 4, 700, 700, head_dim=64, block_size=128, top_k=3, dtype=BF16, device="cuda")
    assert_matches_oracle("cuda routed, one head", case, attention(case, "routed"))
    padded = replace(case, pads=((0, 0), (300, 0), (0, 250)), softcap=20.0, top_k=6)
    assert_matches_oracle("cuda dense, one head", padded, attention(padded, "dense"))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "v_dim"),
    [(torch.float32, 192, 192), (BF16, 64, 256), (BF16, 96, 256), (FP16, 242, 64)],
)
def test_heads_for_which_flex_attention_has_no_tiles(
    dtype: torch.dtype, head_dim: int, v_dim: int
) -> None:
    case = Case(1, 1, 2, 700, 700, head_dim=head_dim, block_size=128, top_k=3, v_dim=v_dim)
    case = replace(case, dtype=dtype, device="cuda")
    assert_matches_oracle("cuda routed, wide heads", case, attention(case, "routed"))


def test_mask_made_inside_and_outside_of_a_graph() -> None:
    """Inside, the mask_mod captures what the routing kernel writes in the same graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_moba_block_mask(q, k, block_size=64, top_k=3)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    inputs = qkv(1000)
    expected = moba_attention_reference(*inputs, block_size=64, top_k=3).out
    mask = create_moba_block_mask(*inputs[:2], block_size=64, top_k=3)
    outside = torch.compile(flex_attention)(*inputs, block_mask=mask, enable_gqa=True)
    for out in (torch.compile(attend, fullgraph=True)(*inputs), outside):
        assert isinstance(out, Tensor)
        assert (out - expected).norm() < 0.02 * expected.norm()
        torch.autograd.grad(out.sum(), inputs)


@pytest.mark.parametrize("plan", ["routed", "fused"])
def test_two_runs_are_bitwise_equal(plan: Any) -> None:
    def run() -> list[Tensor]:
        inputs = qkv(2048)
        out = moba_attention(*inputs, block_size=128, top_k=4, plan=plan)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def step_of(plan: Any) -> tuple[tuple[Tensor, ...], Callable[[], list[Tensor]]]:
    """Return inputs, and what computes output and gradients of what they hold then."""
    inputs, weight = qkv(700), torch.randn_like(qkv(700)[0])

    def step() -> list[Tensor]:
        out = moba_attention(*inputs, block_size=128, top_k=3, plan=plan)
        return [out.detach(), *torch.autograd.grad(out, inputs, weight)]

    return inputs, step


@pytest.mark.parametrize("plan", ["routed", "fused"])
def test_eager_calls_are_captured_in_a_cuda_graph(plan: Any) -> None:
    inputs, step = step_of(plan)
    graph, found = captured(step)
    for _ in range(2):
        with torch.no_grad():
            for x in inputs:
                x.normal_()
        graph.replay()
        for x, y in zip(found, step(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("plan", ["masked", "routed", "fused"])
def test_deterministic_algorithms(plan: Any) -> None:
    """PyTorch refuses then what it cannot repeat, and fills fresh memory with NaN."""
    _, step = step_of(plan)
    want = step()
    torch.use_deterministic_algorithms(True)
    try:
        got = step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("plan", ["masked", "routed", "fused"])
def test_plans_run_on_a_device_that_is_not_the_current_one(plan: Any, graph: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=128, top_k=3, plan=plan)

    run = torch.compile(attend, fullgraph=True) if graph else attend
    inputs, weight = qkv(700), torch.randn_like(qkv(700)[0])
    for _ in range(2):  # also as it is remembered
        found = []
        for device in ("cuda:0", "cuda:1"):
            there = [x.detach().to(device).requires_grad_() for x in inputs]
            out = run(*there)
            grads = torch.autograd.grad(out, there, weight.to(device))
            assert {x.device for x in (out, *grads)} == {torch.device(device)}
            found.append([x.cpu() for x in (out, *grads)])
        assert torch.cuda.current_device() == 0
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0 if plan == "fused" else 1e-3)


@pytest.mark.parametrize("plan", ["masked", "routed", "fused"])
def test_backward_twice(plan: Any) -> None:
    inputs = qkv(700)

    def loss() -> Tensor:
        return moba_attention(*inputs, block_size=128, top_k=3, plan=plan).float().square().sum()

    torch.autograd.grad(loss(), inputs)  # compiled for once
    out = loss()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(out, inputs), strict=True):
        assert torch.equal(x, y)
