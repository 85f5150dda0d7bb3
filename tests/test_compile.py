"""One graph, for any length; and the ops that make it so."""

import itertools
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import graph_compile
from torch._inductor.exc import InductorError
from torch._inductor.ir import as_storage_and_layout
from torch._inductor.kernel.flex import flex_attention as flex_lowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from moba_flex import create_moba_block_mask, moba_attention, route
from moba_flex.compile import cpu, flex, plans
from moba_flex.compile.flex import attend
from moba_flex.compile.merge import gather_rows
from moba_flex.masks import router
from moba_flex.masks.block_mask import routing_to_block_mask
from moba_flex.masks.layout import Layout, make_tables
from moba_flex.masks.mods import Mods
from moba_flex.masks.pool import pool
from moba_flex.masks.regroup import regroup
from moba_flex.masks.request import Gate, Request, gated_request
from moba_flex.masks.routing import Routing
from moba_flex.masks.tiles import TILE, lay_out_keys, own_block_mask, routed_block_mask
from tests.helpers import Case, assert_matches_oracle, attention, run_script, uncompiled

LENGTHS = [200, 333, 512, 700, 1024, 1111]


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


def qkv(length: int, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = Case(1, 2, 2, length, length).inputs()
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["auto", "routed"])
def test_forward_is_one_graph_for_any_length(plan: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * moba_attention(q, k, v, block_size=32, top_k=3, plan=plan)

    compiled = torch.compile(attend, fullgraph=True)
    for length in LENGTHS:
        inputs = qkv(length)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backward_is_one_graph_for_any_length(backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q.sin(), k, v, block_size=32, top_k=3).cos()

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for length in LENGTHS:
        inputs = qkv(length, grad=True)
        expected = torch.autograd.grad(attend(*inputs).sum(), inputs)
        actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
@torch.no_grad()
def test_block_mask_inside_is_one_graph_for_any_length() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_moba_block_mask(q, k, block_size=32, top_k=3)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, fullgraph=True)
    for length in LENGTHS:
        inputs = qkv(length)
        expected = moba_attention(*inputs, block_size=32, top_k=3)
        torch.testing.assert_close(compiled(*inputs), expected)
    assert counters["stats"]["unique_graphs"] <= 2


def captured_by_mask_mod(attend: Callable[..., Tensor], *inputs: Tensor) -> list[torch.fx.Node]:
    """Trace `attend` and return the tensors that the mask_mod of its FlexAttention captures."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(attend, fullgraph=True, backend=record)(*inputs)
    (graph,) = graphs
    (node,) = (n for n in graph.graph.nodes if n.target is torch.ops.higher_order.flex_attention)
    captured = node.args[-1]
    return [x for x in captured if isinstance(x.meta["example_value"], Tensor)]


@torch.no_grad()
def test_mask_mod_captures_the_result_of_topk_alone() -> None:
    """PyTorch would inline, wrong or not at all, what no kernel of its own has written."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_moba_block_mask(q, k, block_size=32, top_k=3)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    (node,) = captured_by_mask_mod(attend, *qkv(200))
    assert node.op == "call_method" or node.op == "call_function"
    source = node.args[0] if "getitem" in str(node.target) or node.target is getattr else node
    assert isinstance(source, torch.fx.Node)
    assert "topk" in f"{node} {source} {source.target}"


@pytest.mark.parametrize("number", [2, 3, 5])
def test_fewer_blocks_than_top_k_are_a_number_of_picks(number: int) -> None:
    """As an expression of the length, PyTorch 2.11 fails to lower it for CUDA."""
    picks: list[Any] = []

    def record(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        (gate,) = (n for n in graph.graph.nodes if "choose_cpu" in str(n.target))
        picks.append(gate.args[2][0])
        return graph.forward

    def choose(q: Tensor, k: Tensor) -> Tensor:
        return route(q, k, block_size=32, top_k=4).blocks

    compiled = torch.compile(choose, fullgraph=True, backend=record, dynamic=True)
    q, k, _ = qkv(32 * number - 7)
    assert compiled(q, k).shape[3] == min(number, 4) - 1
    assert picks == [min(number, 4) - 1]


def test_attend_hands_contiguous_tensors_to_flex_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FlexAttention's offsets within a head are 32-bit."""
    seen: list[bool] = []

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend(x.is_contiguous() for x in (q, k, v))
        return q

    monkeypatch.setattr(flex, "flex_attention", record)
    x = torch.randn(1, 64, 4, 16).transpose(1, 2)
    flex.attend(x, x, x, create_moba_block_mask(x, x, block_size=16, top_k=2), 1.0, lse=False)
    assert seen == [True] * 3


def test_masks_in_the_routed_plan_suit_the_backward_on_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Any, *_: Any, **__: Any) -> Any:
        sizes.append(mask.BLOCK_SIZE)
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(plans, "attend", record)
    for block_size in (1, 16, 100, 128, 200, 512):
        q, k, v = qkv(1000)
        request = gated_request(q, k, v, block_size=block_size, top_k=3)
        uncompiled(plans._attend_regrouped)(request)
        uncompiled(plans._attend_masked)(request)
    assert all(size % 128 == 0 for pair in sizes for size in pair), sizes


def test_compiled_function_is_made_once() -> None:
    def double(request: Request) -> Tensor:
        return request.q * request.scale

    def outline(**changed: Any) -> Any:
        layout, request = Layout(3, 3, 2, causal=True), request_of(x, scale=2.0)
        return flex._Outline.of(request, layout, {})._replace(**changed)

    x = torch.ones(1, 1, 3, 2)
    first = flex._compiled(double, outline(), static=False)
    assert flex._compiled(double, outline(), static=False) is first
    assert flex._compiled(double, outline(scale=3.0), static=False) is not first
    assert flex._compiled(double, outline(kind=("other",)), static=False) is not first
    made = flex.in_one_graph(double)
    assert (made(request_of(x, scale=3.0)) == 3).all()


@pytest.mark.slow
@pytest.mark.parametrize("keep_first", [False, True])
def test_backward_of_a_compiled_function_runs_twice(keep_first: bool) -> None:
    """Also after a backward that ran once and was compiled for that."""

    @flex.in_one_graph
    def mix(request: Request) -> Tensor:
        return (request.q.sin() * request.k).cos() @ request.v.mT

    inputs = [torch.randn(1, 1, 8, 8, requires_grad=True) for _ in range(3)]
    torch.autograd.grad(mix(request_of(*inputs)).sum(), inputs, retain_graph=keep_first)
    out = mix(request_of(*inputs)).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(out, inputs), strict=True):
        assert torch.equal(x, y)


def test_threads_call_compiled_functions_and_leave_pytorch_as_it_was() -> None:
    """First calls too, of graphs that they share and of others, forward and backward twice."""

    def settings() -> tuple[Any, ...]:
        names = "recompile_limit", "cache_size_limit"
        return (
            graph_compile.collect_bw_donated_buffer_idxs,
            functorch_config.donated_buffer,
            *(getattr(dynamo_config, name) for name in names),
        )

    def mix(request: Request) -> Tensor:
        return request.scale * (request.q.sin() * request.k).cos() @ request.v.mT

    run = flex.in_one_graph(mix)
    before, wrong, interval = settings(), list[object](), sys.getswitchinterval()

    def call(number: int) -> None:
        try:
            for length in (8, 9, 10, 11) * 20:
                inputs = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
                request = request_of(*inputs, scale=1.0 + number % 2)
                out, want = run(request), mix(request)
                grads = [
                    torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (want, out)
                ]
                grads.append(torch.autograd.grad(out.sum(), inputs))
                for got in zip(*grads, strict=True):
                    for x in got[1:]:
                        torch.testing.assert_close(x, got[0])
        except Exception as error:  # a thread's own would be lost
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert settings() == before


def test_compiled_functions_are_one_graph() -> None:
    @flex.in_one_graph
    def broken(request: Request) -> Tensor:
        torch._dynamo.graph_break()
        return request.q

    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        broken(request_of(torch.ones(1, 1, 3, 2)))


def request_of(*tensors: Tensor, scale: float = 1.0) -> Request:
    """Return a request of q, k and v, or of one tensor as all three."""
    q, k, v = tensors if len(tensors) == 3 else tensors * 3
    return Request(q, k, v, scale, gate=Gate(2, 1), mods=Mods())


def turned(x: Tensor) -> Tensor:
    """Return `x` with its last two dimensions the other way round in memory."""
    return x.mT.contiguous().mT


@pytest.mark.slow
@pytest.mark.parametrize(
    "lay_out",
    [
        lambda q, k, v: (turned(q), turned(k), turned(v)),
        lambda q, k, v: (2 * turned(q), turned(2 * k), 2 * v),
        lambda q, k, v: (2 * q, k, 2 * v),
        lambda q, k, v: torch.stack((q, k, v)).unbind(),
        lambda q, k, v: torch.cat((q, k, v), 3).chunk(3, 3),
    ],
)
@torch.no_grad()
def test_masked_plan_in_a_graph_takes_any_layout(lay_out: Callable[..., Any]) -> None:
    """And anything may follow it."""

    def attend(*inputs: Tensor, plan: Any = "masked") -> Tensor:
        out = moba_attention(*lay_out(*inputs), block_size=8, top_k=2, plan=plan)
        return 2 * out.relu()

    plain = torch.randn(3, 1, 2, 40, 16).unbind()
    for inputs in ([turned(x) for x in plain], plain):
        found = torch.compile(attend, fullgraph=True)(*inputs)
        torch.testing.assert_close(found, attend(*inputs, plan="routed"))


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("bits", [256, 512])
@torch.no_grad()
def test_masked_plan_is_right_for_vectors_of_any_width(bits: int) -> None:
    """For 16 keys at a time, and what is left of them: see `flex.attend`."""
    attend = torch.compile(moba_attention, fullgraph=True, options={"cpp.simdlen": bits})
    for kv_len, head_dim in ((24, 8), (40, 16), (36, 12), (200, 16)):
        spoilt = [torch.full((1 << i,), math.nan) for i in range(4, 16) for _ in range(20)]
        del spoilt  # what is allocated next, and what lies behind it, held NaN before
        q, k, v = torch.randn(3, 2, 2, kv_len, head_dim)
        found = attend(q, k, v, block_size=8, top_k=2, plan="masked")
        want = moba_attention(q, k, v, block_size=8, top_k=2, plan="routed")
        torch.testing.assert_close(found, want)


@pytest.mark.slow
@torch.no_grad()
def test_masked_plan_takes_any_layout() -> None:
    """Called from eager code it makes them alike, and shares a graph."""
    for order in itertools.permutations(range(4)):
        back = [order.index(i) for i in range(4)]
        inputs = [x.permute(order).contiguous().permute(back) for x in qkv(40)]
        found = moba_attention(*inputs, block_size=8, top_k=2, plan="masked")
        torch.testing.assert_close(found, moba_attention(*inputs, block_size=8, top_k=2))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mods", [{}, {"mask": "window:9", "score": "alibi"}])
@torch.no_grad()
def test_masked_plan_shows_what_is_not_finite(mods: dict[str, Any]) -> None:
    base = Case(2, 2, 2, 40, 40, block_size=8, top_k=2, grads="", lse=False, **mods)
    for plant in ("q=nan", "k=nan", "v=nan", "k*=inf", "v*=-inf"):
        case = replace(base, plants=(plant,))
        run = attention(case, "masked")
        assert_matches_oracle("masked, planted", case, run, backward=False)


def test_flex_attention_never_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan that calls it goes through a graph of its own."""

    class Compiled(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Compiled

    def is_compiled(plan: str, q: Tensor, k: Tensor, **options: Any) -> bool:
        try:
            moba_attention(q, k, k, block_size=16, top_k=9, plan=plan, **options)  # type: ignore[call-overload]
        except Compiled:
            return True
        return False

    monkeypatch.setattr(flex, "_compiled", stop)
    monkeypatch.setattr(plans, "attend", None)  # outside of a graph
    with FakeTensorMode():
        q, k = torch.empty(1, 2, 64, 16, device="cuda"), torch.empty(1, 2, 96, 16, device="cuda")
        for plan in ("dense", "masked", "routed"):
            assert is_compiled(plan, q, k)
        assert is_compiled("dense", k, k, causal=False, return_aux=AuxRequest(lse=True))
        assert is_compiled("dense", k, k, return_aux=AuxRequest(lse=True))
        assert not is_compiled("dense", k, k)
        assert is_compiled("masked", q.cpu(), k.cpu())
        assert not is_compiled("routed", q.cpu(), k.cpu(), return_aux=AuxRequest(lse=True))


def test_lse_inside_a_graph() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        aux = AuxRequest(lse=True)
        return moba_attention(q, k, v, block_size=32, top_k=3, return_aux=aux)[1].lse

    inputs = qkv(150)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))


@pytest.mark.parametrize("q_len", [1, 50, 90])
@pytest.mark.parametrize("causal", [True, False])
def test_ops_keep_the_rules_of_torch_library(q_len: int, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in Case(2, 2, 3, q_len, 90).inputs())
    block_keys = pool(k, Layout(q_len, 90, 16, causal)).detach()
    gate = (q.detach(), block_keys, (3, 16, 1, 0), causal, None, 90 - q_len, None)
    torch.library.opcheck(router.choose_cpu, gate)
    blocks = router.choose_cpu(*gate)
    attend: Any = cpu.attend_cpu
    options = None, None, 16, causal, 0.3, 0.0
    torch.library.opcheck(attend.op, (q, k, v, blocks, *options))
    out, lse = attend(q, k, v, blocks, *options)
    for grad_lse in (None, torch.randn_like(lse)):
        saved = (q, k, v, out, lse, blocks)
        detached = (x.detach() for x in saved)
        arguments = (torch.randn_like(out), grad_lse, *detached, *options)
        torch.library.opcheck(attend.backward_op, arguments)


@pytest.mark.slow
def test_fused_plan_is_one_graph_for_any_length() -> None:
    """Traced without a GPU, forward and backward; and PyTorch sees what each kernel writes."""
    done = run_script("trace_fused.py")
    assert done["graphs"] == [2, 1, 2, 1]
    assert done["written"] == {
        "count_kernel": ["count_ptr", "done_ptr"],
        "sum_kernel": ["count_ptr", "done_ptr", "first_ptr", "total_ptr"],
        "place_kernel": ["next_ptr", "rank_ptr", "row_ptr"],
        "tile_kernel": ["first_tile_ptr", "tile_block_ptr"],
        "block_forward_kernel": ["part_lse_ptr", "part_ptr"],
        "pair_forward_kernel": ["part_lse_ptr", "part_ptr"],
        "own_forward_kernel": ["lse_ptr", "out_ptr"],
        "merge_forward_kernel": ["lse_ptr", "out_ptr"],
        "merge_dq_kernel": ["dq_ptr"],
        "stats_kernel": ["stats_ptr"],
        "dkv_kernel": ["dk_ptr", "dv_ptr", "part_ptr", "spill_ptr"],
        "dkv_sum_kernel": ["dk_ptr", "dv_ptr"],
        "pair_dq_kernel": ["part_ptr"],
        "own_dq_kernel": ["dq_ptr"],
        "decode_kernel": [
            *("affinity_ptr", "block_keys_ptr", "counter_ptr", "k_ptr", "lse_ptr", "out_ptr"),
            *("part_lse_ptr", "part_ptr", "stop_ptr", "sums_ptr", "v_ptr"),
        ],
    }


class Seen(Exception):
    """Ends a compilation that has gone far enough."""


def own_lists(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Tensor:
    return attend(q, k, v, own_block_mask(routing), 1.0, lse=False)[0]


def routed_lists(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Tensor:
    layout, routing = lay_out_keys(routing)
    groups = regroup(routing, k.shape[1], TILE)
    if (places := layout.places_of(k)) is not None:
        k, v = (gather_rows(x, *places) for x in (k, v))
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    slots = gather_rows(rows, groups.row, groups.slot)
    return attend(slots, k, v, routed_block_mask(groups, layout), 1.0, lse=False)[0]


def natural_lists(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Tensor:
    return attend(q, k, v, routing_to_block_mask(routing), 1.0, lse=False)[0]


@pytest.mark.parametrize(("length", "padded"), [(300, True), (384, False)])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("function", [own_lists, routed_lists, natural_lists])
def test_lists_follow_each_other(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Tensor],
    heads: int,
    padded: bool,
    length: int,
) -> None:
    """FlexAttention on CUDA finds a sequence's lists, and a row's indices, by where they lie."""
    found = []

    def attend_to(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        tables = (
            make_tables(q.shape[2], k.shape[2], 64, True, key_mask=key_mask) if padded else None
        )
        return function(q, k, v, route(q, k, block_size=64, top_k=3, tables=tables))

    def look(*args: Any, **kwargs: Any) -> None:
        lists = next(x for x in args if isinstance(x, tuple | list) and len(x) > 10)
        for x in lists[2:10]:
            x.realize()
            layout = as_storage_and_layout(x, freeze=True)[1]  # as it will be in memory
            found.append(([int(n) for n in layout.size], [int(n) for n in layout.stride]))
        raise Seen

    monkeypatch.setattr(flex_lowering, "lower_cpu", look)
    q, (k, v) = torch.randn(2, heads, length, 16), torch.randn(2, 2, 1, length, 16)
    key_mask = torch.arange(length) >= torch.tensor([[0], [90]])
    torch._dynamo.reset()
    with pytest.raises(InductorError, match="Seen"):
        torch.compile(attend_to, fullgraph=True)(q, k, v, key_mask)
    assert len(found) == 8
    for size, stride in found:
        assert stride == [math.prod(size[i + 1 :]) for i in range(len(size))]
