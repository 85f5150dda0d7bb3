"""Soft caps, score mods and mask mods in every plan, in every layout, against the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from moba_flex import moba_attention, moba_attention_reference, route
from moba_flex.compile import cpu, cpu_products, plans
from moba_flex.masks.layout import Layout
from moba_flex.masks.mods import Mods
from moba_flex.masks.regroup import Regrouping
from moba_flex.masks.request import Request
from moba_flex.masks.routing import Routing
from moba_flex.masks.tiles import TILE, KeyLayout, routed_block_mask
from tests.helpers import (
    Case,
    assert_matches_oracle,
    attend_by_lists,
    attention,
    layouts,
    route_case,
    uncompiled,
)

EXAMPLES = settings().max_examples


@st.composite
def changed(draw: st.DrawFn, /, **options: Any) -> Case:
    """Draw a request with mods, in any layout."""
    case: Case = draw(layouts(**options))
    return replace(
        case,
        softcap=draw(st.sampled_from([None, 0.5, 20.0, 100.0])),
        score=draw(st.sampled_from(["", "alibi", "relative", "temperature+relative"])),
        mask=draw(st.sampled_from(["", "window:20", "window:1", "random:0.5", "random:0.02"])),
        v_dim=draw(st.sampled_from([None, 16, 40])),
    )


@pytest.mark.usefixtures("poison")
@settings(max_examples=2 * EXAMPLES)
@given(case=changed(max_len=400))
def test_routed_is_the_oracle(case: Case) -> None:
    assert_matches_oracle("routed, mods", case, attention(case, "routed"))


@pytest.mark.usefixtures("poison")
@given(case=changed(max_len=300))
def test_dense_is_the_oracle(case: Case) -> None:
    case = replace(case, top_k=-(-case.kv_len // case.block_size) + case.top_k)
    assert_matches_oracle("dense, mods", case, attention(case, "dense"))


def by_lists(case: Case, plan: str) -> Any:
    """Return a plan as it runs on CUDA, its FlexAttention calls read from their lists."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> tuple[Tensor, Tensor | None]:
        score_mod = case.score_mod(dict(zip(case.captured(), captured, strict=True)))
        mods, routing = Mods(score_mod, case.mask_mod(), case.softcap), route_case(case, q, k)
        layout = routing.layout
        request = Request(q, k, v, case.factor, None, routing, None, layout, mods=mods, lse=True)
        attend = plans._attend_masked if plan == "masked" else plans._attend_regrouped
        result: tuple[Tensor, Tensor | None] = uncompiled(attend)(request)
        return result

    return attend


@pytest.mark.parametrize("plan", ["routed", "masked"])
@given(case=changed(max_len=220, min_block=24, groups=(1, 3)))
def test_form_on_cuda_is_the_oracle(plan: str, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "attend", attend_by_lists)
        assert_matches_oracle(f"{plan} on cuda, mods", case, by_lists(case, plan))


@pytest.mark.parametrize("mask", ["", "random:0.5"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("plan", ["routed", "masked"])
def test_form_on_cuda_of_whole_tiles(plan: str, causal: bool, mask: str) -> None:
    """Blocks of whole tiles, which need no mask but for a mask mod."""
    case = Case(
        2, 1, 2, 700, 768, 16, block_size=128, top_k=3, causal=causal, score="relative", mask=mask
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "attend", attend_by_lists)
        assert_matches_oracle(f"{plan} on cuda, tiles", case, by_lists(case, plan))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"docs": (5, 0, 77, 1, 200)}, {"pads": ((9, 0), (0, 60))}])
def test_masked_is_the_oracle(layout: dict[str, Any]) -> None:
    """The compiled kernel on CPU; functions that capture other tensors share its graph."""
    base = Case(2, 2, 2, 283, 283, 32, 37, 3, softcap=5.0, score="relative", mask="random:0.5")
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        case = replace(base, seed=seed, **layout)
        assert_matches_oracle(
            "masked, mods", case, attention(case, "masked", lse=False), backward=False
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("cap", [1e-3, 0.3, 5.0, 59.9, 60.1, 1e4])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_scores_under_a_soft_cap_are_nearly_exact(cap: float, size: float) -> None:
    """Relative to each score, however small or large beside the cap."""
    q, k = torch.randn(1, 1, 200, 16) * size, torch.randn(1, 1, 300, 16)
    scores = cpu_products._Scores(Mods(softcap=cap), 0.25, (1, 1, 200)).cap(q[0], k[0])
    score, terms = q[0].double() @ k[0].double().mT / 4, q[0].abs() @ k[0].abs().mT / 4
    exact = cap * torch.tanh(score / cap)
    eps = torch.finfo(torch.float32).eps
    # The product errs by a rounding a term at most, of which the cap passes on as much as it
    # rises anywhere near; what follows errs by five roundings of the result.
    error = 16 * eps * terms.double()
    slope = 1 / torch.cosh(((score.abs() - error) / cap).clamp(min=0)) ** 2
    bound = error * slope + 5 * eps * exact.abs()
    assert ((scores.double() / cpu_products._LOG2E - exact).abs() <= bound).all()


def inputs(*, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = Case(2, 2, 2, 150, 150, seed=3).inputs()
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)


class Bias(torch.nn.Module):
    """A score mod whose captured tensors are a parameter and what is computed from one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4, 12))
        self.slope = torch.nn.Parameter(torch.randn(4))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score * self.slope[h] + self.table[h, (q - kv) % 12]


@pytest.mark.parametrize("subset", ["bias", "q", "all", "none"])
def test_gradients_reach_what_a_score_mod_captures(subset: str) -> None:
    """However it does: from a module, from a closure, and through what was computed before."""
    q, k, v = inputs(grad=subset == "all")
    q.requires_grad_(subset in ("q", "all"))
    bias, root = Bias().requires_grad_(subset in ("bias", "all")), torch.randn(4)
    root.requires_grad_(subset in ("bias", "all"))
    options: dict[str, Any] = {"block_size": 20, "top_k": 3}
    blocks = moba_attention_reference(q.detach(), k.detach(), v.detach(), **options).blocks
    of = [x for x in (q, k, v, bias.table, bias.slope, root) if x.requires_grad]
    grads = []
    attends: list[tuple[Any, dict[str, Any]]] = [
        (moba_attention, {}),
        (moba_attention_reference, {"blocks": blocks}),
    ]
    for attend, more in attends:
        factor = root.sin()  # a graph of its own: both are walked once

        def both(score: Tensor, b: Tensor, h: Tensor, *at: Tensor, x: Tensor = factor) -> Tensor:
            return bias(score, b, h, *at) * x[h]

        out = attend(q, k, v, **options, **more, score_mod=both)
        out = out if isinstance(out, Tensor) else out.out
        assert out.requires_grad == bool(of)
        grads.append(torch.autograd.grad(out.square().sum(), of) if of else ())
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_a_capture_that_changes_before_backward_is_noticed() -> None:
    q, k, v = inputs(grad=True)
    table = torch.randn(4, requires_grad=True)
    out = moba_attention(
        q, k, v, block_size=20, top_k=3, score_mod=lambda s, b, h, i, j: s * table[h]
    )
    with torch.no_grad():
        table.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_mods_see_every_index_as_a_number() -> None:
    """As FlexAttention calls them: numbers without dimensions, all in their range."""
    q, k, v = inputs()
    seen: list[torch.Size] = []

    def note(score: Tensor, *indices: Tensor) -> Tensor:
        seen.extend(x.shape for x in (score, *indices))
        return score

    moba_attention(q, k, v, block_size=20, top_k=3, score_mod=note)
    assert set(seen) == {torch.Size()}


@pytest.mark.parametrize("plan", ["routed", "dense"])
def test_a_score_mod_may_return_another_tensor(plan: Any) -> None:
    """One of another dtype, or one that does not depend on the score."""
    q, k, v = inputs(grad=True)
    top_k = 3 if plan == "routed" else 8
    options: dict[str, Any] = {"block_size": 20, "top_k": top_k, "plan": plan}
    double = moba_attention(q, k, v, **options, score_mod=lambda s, *_: s.double())
    torch.testing.assert_close(double, moba_attention(q, k, v, **options))
    flat = moba_attention(q, k, v, **options, score_mod=lambda s, *_: torch.zeros(()))
    grads = torch.autograd.grad(flat.sum(), (q, k, v))
    assert not grads[0].any()
    assert not grads[1].any()
    assert grads[2].any()


SCORE_MODS: list[tuple[Any, str]] = [
    (lambda score, *_: None, "score_mod must return a Tensor, got NoneType"),
    (lambda score, *_: 1.0, "score_mod must return a Tensor, got float"),
    (lambda score, b, h, i, j: i > j, "score_mod must return a real number, got torch.bool"),
    (lambda score, *_: score.expand(3), r"score_mod must return one value .*, got shape \(3,\)"),
    (lambda score, b, h, i, j: score if i > j else 0 * score, "score_mod must be one expression"),
]
MASK_MODS: list[tuple[Any, str]] = [
    (lambda *_: None, "mask_mod must return a bool, got NoneType"),
    (lambda *_: 1, "mask_mod must return a bool, got int"),
    (lambda b, h, i, j: i - j, "mask_mod must return a bool, got torch.int"),
    (lambda b, h, i, j: (i - j).float(), "mask_mod must return a bool, got torch.float32"),
    (lambda b, h, i, j: (i > j).expand(3), r"mask_mod must return one value .*, got shape \(3,\)"),
    (lambda b, h, i, j: i > j and j > 3, "mask_mod must be one expression"),
]
PLANS = ["routed", "dense", pytest.param("masked", marks=pytest.mark.slow)]


@pytest.mark.parametrize("plan", PLANS)
def test_results_that_no_mod_may_have(plan: Any) -> None:
    q, k, v = inputs()
    gate: dict[str, Any] = {"block_size": 20, "top_k": 8 if plan == "dense" else 3, "plan": plan}
    for name, mods in (("score_mod", SCORE_MODS), ("mask_mod", MASK_MODS)):
        for mod, message in mods:
            with pytest.raises((TypeError, ValueError), match=message):
                moba_attention(q, k, v, **gate, **{name: mod})


@pytest.mark.slow
def test_results_that_no_mod_may_have_in_a_graph() -> None:
    q, k, v = inputs()
    mods = [("score_mod", *x) for x in SCORE_MODS[:-1]] + [
        ("mask_mod", *x) for x in MASK_MODS[:-1]
    ]
    for name, mod, message in mods:
        torch._dynamo.reset()
        options = {name: mod}
        run = torch.compile(
            lambda *x: moba_attention(*x, block_size=20, top_k=3, plan="masked", **options),  # noqa: B023
            fullgraph=True,
            backend="eager",
        )
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            run(q, k, v)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bits_are_those_of_32(dtype: torch.dtype) -> None:
    """FlexAttention says that they are of 16 bits, and computes in 32."""
    case = Case(1, 1, 2, 81, 81, 64, 8, 4, score="relative", dtype=dtype, grads="", lse=False)
    assert_matches_oracle("masked, 16 bits", case, attention(case, "masked"), backward=False)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_mask_mods_may_return_a_constant(plan: Any) -> None:
    q, k, v = inputs()
    gate: dict[str, Any] = {"block_size": 20, "top_k": 8 if plan == "dense" else 3, "plan": plan}
    constants: dict[Any, Any] = {x: lambda *_, x=x: x for x in (True, False, torch.tensor(True))}
    false = constants.pop(False)
    for constant in constants.values():
        found = moba_attention(q, k, v, **gate, mask_mod=constant)
        torch.testing.assert_close(found, moba_attention(q, k, v, **gate | {"plan": "auto"}))
    assert not moba_attention(q, k, v, **gate, mask_mod=false).any()


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_score_mods_may_return_integers(plan: Any) -> None:
    q, k, v = inputs()
    gate: dict[str, Any] = {"block_size": 20, "top_k": 8 if plan == "dense" else 3}
    found = moba_attention(q, k, v, **gate, plan=plan, score_mod=lambda s, b, h, i, j: j - i)
    want = moba_attention(q, k, v, **gate, score_mod=lambda s, b, h, i, j: (j - i).float())
    torch.testing.assert_close(found, want)


def test_the_gate_sees_no_mods() -> None:
    """A mask that hides what a query likes best leaves its place empty."""
    q, k, v = inputs()
    blocks = route(q, k, block_size=10, top_k=2).blocks
    aux = AuxRequest(lse=True)
    hidden = moba_attention(
        q, k, v, block_size=10, top_k=2, return_aux=aux,
        mask_mod=lambda b, h, i, j: blocks[b, h, i, 0] != j // 10,
    )  # fmt: skip
    own = moba_attention(q, k, v, block_size=10, top_k=1, return_aux=aux)
    torch.testing.assert_close(hidden[0], own[0])
    torch.testing.assert_close(hidden[1].lse, own[1].lse)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_soft_cap_in_a_graph(backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q.sin(), k, v, block_size=32, top_k=3, softcap=2.0).cos()

    given = inputs(grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(attend(*given).sum(), given)
    for x, y in zip(torch.autograd.grad(compiled(*given).sum(), given), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_functions_break_a_graph_on_cpu() -> None:
    table = torch.randn(4, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        factor = table.sin()
        return moba_attention(
            q.sin(), k, v, block_size=32, top_k=3, score_mod=lambda s, b, h, i, j: s * factor[h]
        ).cos()

    given = *inputs(grad=True), table
    expected = torch.autograd.grad(attend(*given).sum(), given)
    found = torch.compile(attend, backend="aot_eager")(*given)
    for x, y in zip(torch.autograd.grad(found.sum(), given), expected, strict=True):
        torch.testing.assert_close(x, y)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="plan='masked' takes them"):
        torch.compile(attend, backend="aot_eager", fullgraph=True)(*given)


@pytest.mark.parametrize("grad_lse", [False, True])
def test_ops_keep_the_rules_of_torch_library(grad_lse: bool) -> None:
    q, k, v = inputs(grad=True)
    case = Case(2, 2, 2, 150, 150, block_size=16, top_k=3, pads=((9, 0), (0, 30)))
    routing = route_case(case, q, k)
    attend: Any = cpu.attend_cpu
    blocks, *place = routing.parts
    torch.library.opcheck(attend.op, (q, k, v, *routing.parts, 0.3, 2.0))
    out, lse = attend(q, k, v, *routing.parts, 0.3, 2.0)
    saved = (x.detach() for x in (q, k, v, out, lse, blocks))
    grads = torch.randn_like(out), torch.randn_like(lse) if grad_lse else None
    torch.library.opcheck(attend.backward_op, (*grads, *saved, *place, 0.3, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"docs": (5, 0, 77, 1, 200)}, {"pads": ((9, 0), (0, 60))}])
def test_form_on_cuda_is_one_graph_for_any_length(
    layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention itself, forward and backward; and functions that capture other tensors."""
    # It has a backward on CPU where nothing generates code, and reads the mask, not the lists.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)

    def spelled_out(groups: Regrouping, layout: KeyLayout, mask_mod: Any) -> BlockMask:
        def listed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            tile = q_idx // TILE
            met = groups.tile_block[b, h, tile] == kv_idx // layout.stride
            return met & groups.tile_used[b, h, tile] & mask_mod(b, h, q_idx, kv_idx)

        return routed_block_mask(groups, layout, listed)

    monkeypatch.setattr(plans, "routed_block_mask", spelled_out)
    base = Case(2, 1, 2, 283, 283, 32, 37, 3, softcap=5.0, score="relative", mask="random:0.5")
    base = replace(base, dtype=torch.float64)  # some gradients are sums of many terms

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor,
        queries: Tensor | None,
        extents: Tensor | None,
        score_mod: Any,
        mask_mod: Any,
    ) -> Any:
        plain = Layout(q.shape[2], k.shape[2], base.block_size, causal=True)
        routing = Routing.over(plain.with_tables(queries, extents), blocks)
        mods = Mods(score_mod, mask_mod, base.softcap)
        request = Request(q, k, v, 0.2, routing=routing, layout=routing.layout, mods=mods)
        return plans._attend_regrouped(request)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed, extra in enumerate((0, 120, 301)):
        case = replace(base, seed=seed, q_len=283 + extra, kv_len=283 + extra, **layout)
        if case.docs is not None:
            case = replace(case, docs=(5 + extra, *case.docs[1:]))
        q, k, v = (x.requires_grad_() for x in case.inputs())
        captured = {key: x.requires_grad_() for key, x in case.captured().items()}
        routing = route_case(case, q, k)
        mods = Mods(case.score_mod(captured), case.mask_mod(), case.softcap)
        expected = cpu.attend_with_functions(q, k, v, routing, mods, 0.2)
        functions = mods.score_mod, mods.mask_mod
        found = compiled(q, k, v, *routing.parts[:3], *functions)
        of = [q, k, v, *captured.values()]
        weights = [torch.randn_like(x) for x in expected]
        weights[1] = weights[1].masked_fill(expected[1] == -torch.inf, 0.0)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
        grads = (torch.autograd.grad(x, of, weights) for x in (found, expected))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
