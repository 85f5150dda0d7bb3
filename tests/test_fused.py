"""The fused plan on CPU: its kernels, interpreted, against the oracle."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_flex import Routing, moba_attention, route, routed_attention
from moba_flex.compile import fused
from moba_flex.masks import regroup
from tests.helpers import Case, assert_matches_oracle, attention, cases, needs_interpreter

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow) .*:RuntimeWarning")
DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 as integers


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> None:
    needs_interpreter()


@pytest.fixture
def seed() -> int:
    """Return another seed each time."""
    return int(torch.randint(2**31, ()))


@pytest.mark.usefixtures("poison")
@settings(max_examples=settings().max_examples // 5 + 1)
@given(case=cases(max_len=90, min_block=5, groups=(1, 3), dtypes=DTYPES))
def test_fused_is_the_oracle(case: Case) -> None:
    assert_matches_oracle("fused, interpreted", case, attention(case, "fused"))


@pytest.mark.usefixtures("poison")
@settings(max_examples=settings().max_examples // 6 + 1)
@given(case=cases(max_len=90, min_block=5, groups=(1, 3), dtypes=DTYPES), share=st.integers(9, 60))
def test_blocks_that_many_choose_are_shared_by_programs(case: Case, share: int) -> None:
    case = replace(case, sink_blocks=1, local_blocks=0, top_k=max(2, case.top_k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_share", lambda *_: share)
        assert_matches_oracle("fused, shares", case, attention(case, "fused"))


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "kv_len"), [(128, 300), (256, 600)])
def test_whole_tiles(block_size: int, kv_len: int, seed: int) -> None:
    """Blocks of one and of two tiles of keys, by the tiles that CUDA uses."""
    case = Case(1, 1, 2, 200, kv_len, 64, block_size, 2, dtype=torch.float16, seed=seed)
    assert_matches_oracle("fused, whole tiles", case, attention(case, "fused"))


@pytest.mark.filterwarnings("ignore:divide by zero .*:RuntimeWarning")  # rows that see no key
@pytest.mark.parametrize(
    ("case", "share"),
    [
        (Case(1, 2, 3, 60, 60, 16, 7, 3), 9),
        (Case(1, 2, 3, 60, 60, 16, 7, 3), 1024),
        (Case(2, 1, 4, 40, 70, 24, 16, 3, causal=False, softcap=3.0), 9),
        (Case(1, 1, 2, 50, 50, 16, 40, 2), 9),  # more than a tile of keys
        (Case(1, 1, 2, 1, 1, 16, 8, 3, docs=(20, 1, 30)), 9),
        (Case(2, 1, 2, 50, 50, 16, 8, 3, pads=((3, 2), (0, 9))), 9),
    ],
)
def test_one_list_for_a_group(
    case: Case, share: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_BLOCK_SHARE", share)
    case = replace(case, pattern="shared:3", seed=seed)
    assert_matches_oracle("fused, shared", case, attention(case, "fused"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about infinity
@pytest.mark.parametrize("picks", [2, 3])
def test_own_keys_may_have_no_weight(picks: int) -> None:
    """Parts are merged all the same, within the own blocks' kernel and apart from it."""
    q, k, v = torch.randn(3, 1, 1, 12, 16).abs()
    k[:, :, 8, 0] = -math.inf  # all that query 8 sees of its own block
    blocks = torch.arange(picks).expand(1, 1, 12, picks)
    routing = Routing(blocks, block_size=2, q_len=12, kv_len=12, causal=True)
    got, want = (routed_attention(q, k, v, routing, plan=plan) for plan in ("fused", "routed"))
    assert want[:, :, 8].isfinite().all()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about infinity
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rise", "size"), [(15, 1), (60, 1), (60, 1e30), (129, 1), (300, 1), (-300, 1)]
)
def test_scores_may_rise_within_a_block(
    rise: float, size: float, causal: bool, dtype: torch.dtype
) -> None:
    """Sums overflow if the first keys tell the maximum, and are made again by that of all."""
    q, k, v = torch.randn(3, 1, 2, 290, 16)
    q[..., 0], k[..., 0] = 1, torch.arange(290) % 100 / 100 * rise
    size = size if dtype == torch.float32 else 1
    v *= size
    q, k, v = (x.to(dtype) for x in (q[:, :, 200:], k, v))
    routing = route(q, k, block_size=100, top_k=2, causal=causal)
    got = routed_attention(q, k, v, routing, scale=1.0, plan="fused")
    inputs = q.float(), k.float(), v.float()
    want = routed_attention(*inputs, routing, scale=1.0, plan="routed")
    error = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want.to(dtype), rtol=error, atol=error * size)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(scale: float, seed: int) -> None:
    case = Case(1, 2, 2, 60, 90, 16, 20, 3, scale=scale, seed=seed)
    assert_matches_oracle("fused, scale", case, attention(case, "fused"))


@pytest.mark.parametrize("causal", [True, False])
def test_few_queries_of_many_keys(causal: bool, seed: int) -> None:
    """Most blocks are nobody's own, and lie many tiles before the first query."""
    case = Case(1, 1, 2, 40, 600, 16, 40, 4, causal=causal, seed=seed)
    assert_matches_oracle("fused, few queries", case, attention(case, "fused"))


def test_fewer_lists_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, h, 60, 16, requires_grad=True) for h in (4, 2, 2))

    def run() -> list[Any]:
        out = moba_attention(q, k, v, block_size=6, top_k=3, plan="fused")
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    expected = run()
    # The last: two launches do the same lists, as in a graph for any batch size.
    for number, starts in ((1, range(4)), (3, (0, 3)), (3, (0, 1))):
        for at_once in ("_lists_at_once", "_lists_at_once_backward"):
            monkeypatch.setattr(fused, at_once, lambda *_, number=number: number)
        monkeypatch.setattr(fused, "_first_lists", lambda *_, starts=starts: starts)
        for x, y in zip(run(), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("poison", "replays")
def test_replays_of_the_fused_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regroup, "_has_kernels", lambda _: True)
    monkeypatch.setattr(fused, "_LEAST_SHARE", 20)
    monkeypatch.setattr(fused, "_SHARES", 8)
    inputs = [torch.randn(1, h, 45, 16).requires_grad_() for h in (4, 2, 2)]
    routing = route(inputs[0], inputs[1], block_size=10, top_k=4)
    out = routed_attention(inputs[0], inputs[1], inputs[2], routing, plan="fused")
    torch.autograd.grad(out.square().sum(), inputs)
