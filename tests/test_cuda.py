"""The same comparisons on a CUDA device, and what exists there alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from moba_flex import create_moba_block_mask, moba_attention, moba_attention_reference
from tests.helpers import Case, assert_matches_oracle, attention, cases, chosen_blocks
from tests.test_router import assert_gate_is_right, launch_kernel

pytestmark = pytest.mark.cuda

BF16, FP16 = torch.bfloat16, torch.float16
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
lengths = st.integers(1, 1500).flatmap(
    lambda kv: st.tuples(st.one_of(st.just(kv), st.integers(1, kv)), st.just(kv))
)


@pytest.mark.parametrize("plan", ["masked", "routed", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_the_oracle(kind: str, plan: Any) -> None:
    @settings(max_examples=settings().max_examples // 2)
    @given(sizes=lengths, ties=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def check(sizes: tuple[int, int], ties: bool, seed: int) -> None:
        q_len, kv_len = sizes
        case = replace(KINDS[kind], q_len=q_len, kv_len=kv_len, ties=ties, seed=seed)
        case = replace(case, device="cuda")
        assert_matches_oracle(f"cuda {plan}", case, attention(case, plan))

    check()


@pytest.mark.parametrize("plan", ["routed", "auto"])
@pytest.mark.parametrize("kind", ["aligned", "large blocks"])
def test_whole_tiles_are_the_oracle(kind: str, plan: Any) -> None:
    @settings(max_examples=settings().max_examples // 2)
    @given(tiles=st.integers(1, 12), more=st.integers(0, 500), seed=st.integers(0, 2**32 - 1))
    def check(tiles: int, more: int, seed: int) -> None:
        q_len = 128 * tiles
        case = replace(KINDS[kind], q_len=q_len, kv_len=q_len + more, seed=seed, device="cuda")
        assert_matches_oracle(f"cuda {plan}, whole tiles", case, attention(case, plan))

    check()


@settings(max_examples=10 * settings().max_examples)
@given(case=cases(dtypes=[torch.float32, BF16, FP16]))
def test_kernel_chooses_what_the_contract_says(case: Case) -> None:
    case = replace(case, device="cuda")
    q, k, v = case.inputs()
    blocks = launch_kernel(q, k, case)
    assert (blocks.diff(dim=3) >= 0).all()
    from moba_flex import Routing

    routing = Routing(blocks, case.block_size, case.q_len, case.kv_len, case.causal)
    chosen = chosen_blocks(routing)
    assert_gate_is_right(case, q, k, chosen)
    if case.ties:
        assert torch.equal(chosen, moba_attention_reference(q, k, v, **case.gate).blocks)


def qkv(length: int, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    case = Case(1, 2, 2, length, length, head_dim=64, dtype=BF16, device="cuda")
    q, k, v = (x.requires_grad_(grad) for x in case.inputs())
    return q, k, v


@pytest.mark.parametrize("plan", ["masked", "routed"])
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
    compiled = torch.compile(attention(case, "routed"), fullgraph=True, dynamic=False)
    assert_matches_oracle("cuda routed, static", case, compiled)


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


def test_two_runs_are_bitwise_equal() -> None:
    def run() -> list[Tensor]:
        inputs = qkv(2048)
        out = moba_attention(*inputs, block_size=128, top_k=4)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
