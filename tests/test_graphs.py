"""One graph wherever MoBA is compiled, and the limits of PyTorch that decide how.

A limit that PyTorch lifts fails its test here: then what was done about it can go, see
`moba_flex/compile/__init__.py`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_config
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.utils.checkpoint import checkpoint

from moba_flex import MoBAAttention, create_moba_block_mask, moba_attention
from moba_flex.cache import BlockCache, PagedCache, cached_attention
from moba_flex.compile import cpu
from moba_flex.compile.decode import decode_cpu
from moba_flex.masks import router
from moba_flex.masks._torch.exporting import is_exporting
from moba_flex.masks._torch.inputs import copy_cpu
from moba_flex.masks.append import append_cpu
from moba_flex.masks.layout import Layout, locate
from moba_flex.masks.pool import pool, pool_cpu
from tests.helpers import DEVICES, Case, needs_interpreter

LENGTHS = [100, 5000, 130, 256, 400, 555, 777, 1024, 1500, 2048, 3000, 4096]


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


def qkv(length: int, device: str = "cpu", *, grad: bool = False) -> tuple[Tensor, ...]:
    inputs = Case(1, 2, 2, length, length, device=device).inputs()
    return tuple(x.requires_grad_(grad) for x in inputs)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return moba_attention(q, k, v, block_size=32, top_k=3)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = create_moba_block_mask(q, k, block_size=32, top_k=3)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


class Block(nn.Module):
    """A transformer layer, `[B, length, 64]` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = MoBAAttention(block_size=32, top_k=3)
        self.qkv, self.out = nn.Linear(64, 128), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(nn.functional.rms_norm(x, (64,))).unflatten(2, (8, 16)).transpose(1, 2)
        q, k, v = heads.split((4, 2, 2), dim=1)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(nn.functional.rms_norm(x, (64,)))


# One graph.


@pytest.mark.slow
@pytest.mark.parametrize("function", [attend, masked])
@torch.no_grad()
def test_twelve_lengths_compile_twice(function: Callable[..., Tensor]) -> None:
    """Once for the first length and once for all others."""
    compiled = torch.compile(function, fullgraph=True)
    for length in LENGTHS:
        inputs = qkv(length)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.cuda
@pytest.mark.parametrize("plan", ["auto", "routed"])
def test_twelve_lengths_compile_twice_on_cuda(plan: Any) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=32, top_k=3, plan=plan)

    compiled = torch.compile(function, fullgraph=True)
    for length in LENGTHS:
        inputs = qkv(length, "cuda", grad=True)
        want = torch.autograd.grad(attend(*inputs).square().sum(), inputs)  # compiles nothing
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_layer_forward_and_backward(dynamic: bool, backend: str, device: str) -> None:
    torch.manual_seed(0)
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (150, 333):
        x = torch.randn(2, length, 64).to(device)
        want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        got = torch.autograd.grad(compiled(x).square().sum(), list(block.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    torch.manual_seed(0)
    block = Block().to(device)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            out: Tensor = block(x)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 200, 64).to(device).requires_grad_()
    out = compiled(x)
    torch.testing.assert_close(out, run(x), rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing(device: str) -> None:
    torch.manual_seed(0)
    block = Block().to(device)

    def run(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, x, use_reentrant=False)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 200, 64).to(device)
    want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    for function in (run, compiled):
        got = torch.autograd.grad(function(x).square().sum(), list(block.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_reduce_overhead() -> None:
    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        inputs = qkv(300)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # PyTorch opens a pool
@pytest.mark.parametrize("plan", ["fused", "routed"])
def test_reduce_overhead_on_cuda(plan: Any) -> None:
    """Forward and backward are each replayed as one CUDA graph."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=32, top_k=3, plan=plan)

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):  # a first call, two that are recorded, and replays
        torch.compiler.cudagraph_mark_step_begin()
        inputs, results = qkv(300, "cuda", grad=True), []
        for attends in (compiled, attend):
            out = attends(*inputs)
            grads = torch.autograd.grad(out.square().sum(), inputs)
            results.append([x.clone() for x in (out, *grads)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]
    assert not counters["inductor"]["cudagraph_partitions"]  # counted where there are several


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # PyTorch opens a pool
@pytest.mark.parametrize("paged", [False, True])
@torch.no_grad()
def test_reduce_overhead_of_decode_steps_on_cuda(paged: bool) -> None:
    """One CUDA graph appends to the cache and attends, while lengths grow."""
    k, v = torch.randn(2, 2, 2, 100, 32, device="cuda")
    cache = BlockCache(16, max_len=100)
    if paged:
        table = torch.randperm(8, device="cuda").int().view(2, 4)
        cache = PagedCache(8, 32, 16).rows(table, torch.zeros(2, device="cuda").int())
    cache.append(k[:, :, :40], v[:, :, :40])

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(k, v)
        return cached_attention(q, cache, top_k=3)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for at in range(40, 100):
        torch.compiler.cudagraph_mark_step_begin()
        q, new = torch.randn(2, 4, 1, 32, device="cuda"), slice(at, at + 1)
        got = compiled(q, k[:, :, new].clone(), v[:, :, new].clone())
        k_now, v_now = k[:, :, : at + 1], v[:, :, : at + 1]
        # By the plan that compiles nothing.
        want = moba_attention(q, k_now, v_now, block_size=16, top_k=3, plan="fused")
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("device", DEVICES)
def test_hugging_face_model(device: str) -> None:
    pytest.importorskip("transformers")
    from moba_flex import MoBAConfig
    from moba_flex.integrations.transformers import apply
    from tests.test_transformers import build

    model = build("Llama", num_hidden_layers=2, max_position_embeddings=2048).to(device).train()
    compiled: Any = torch.compile(
        apply(model, MoBAConfig(block_size=16, top_k=2)), fullgraph=True, backend="aot_eager"
    )
    for length in (90, 150, 201):
        ids = torch.randint(61, (1, length)).to(device)
        loss = compiled(ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(loss, model(ids, labels=ids, use_cache=False).loss)
        torch.autograd.backward(loss)
    assert counters["stats"]["unique_graphs"] <= 2


def test_infinite_values_under_a_soft_cap() -> None:
    """PyTorch watches an op in a graph's first run, and vmap under its mode knows no tanh."""
    q, k, v = Case(1, 2, 2, 90, 90).inputs()
    v[:, :, 3] = -math.inf

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q, k, v, block_size=16, top_k=2, softcap=0.5)

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, attend(q, k, v), equal_nan=True)


# Ops.


def layouts(device: str) -> Iterator[Layout]:
    """Yield layouts of 50 queries and 90 keys: of plain rows, and of two packed documents."""
    plain = Layout(50, 90, 16, causal=True)
    yield plain
    starts = torch.tensor([0, 30, 90], device=device), torch.tensor([0, 20, 50], device=device)
    yield locate(plain, {"cu_seqlens": starts[0], "cu_seqlens_q": starts[1]})


def cpu_ops() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the ops that are Python on CPU, and arguments."""
    yield append_cpu, appending("cpu")
    for layout in layouts("cpu"):
        queries, extents = layout.queries, layout.extents
        q, k, v = (x.requires_grad_() for x in Case(2, 2, 3, 50, 90).inputs())
        by_head = None if queries is None else torch.randint(2, 5, (6,))
        yield pool_cpu, (k.detach(), 16, layout.num_blocks, extents)
        block_keys = pool(k.detach(), layout)
        gate = (q.detach(), block_keys, (3, 16, 1, 0), True, by_head, layout.q_offset, queries)
        yield router.choose_cpu, gate
        yield copy_cpu, (q.detach().mT,)
        blocks = router.choose_cpu(*gate)
        inputs = [x.detach() for x in (q, q, k, v)]
        place = queries, extents, 16, True
        yield cpu.show_spoilt, (*inputs, blocks, *place)
        yield decode_cpu, (*inputs[1:], blocks, *place, 0.3, 20.0)
        yield decode_cpu, (*inputs[1:], blocks, *place, 0.3, 0.0, False)
        attend: Any = cpu.attend_cpu
        for softcap in (0.0, 20.0):
            given = (q, k, v, blocks, *place, 0.3, softcap)
            yield attend.op, given
            saved = [x.detach() for x in (q, k, v, *attend(*given), blocks)]
            grads = torch.randn_like(saved[3]), torch.randn_like(saved[4])
            yield attend.backward_op, (*grads, *saved, *place, 0.3, softcap)


def appending(device: str) -> tuple[Any, ...]:
    """Return arguments that append 5 keys to each of 2 rows of a cache."""
    keys, values = (torch.zeros(2, 3, 40, dim, device=device) for dim in (16, 24))
    sums, block_keys = (torch.zeros(2, 3, 5, dim, device=device) for dim in (17, 16))
    new = (torch.randn(2, 3, 5, dim, device=device) for dim in (16, 24))
    start, stop, counts = torch.tensor([[2, 0], [0, 7], [5, 3]], device=device).int()
    counters = torch.zeros(2, 60, dtype=torch.int32, device=device)
    return keys, values, sums, block_keys, *new, start, stop, counters, counts, None, 8


def kernel_ops() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the ops that launch Triton kernels, and arguments."""
    from moba_flex.compile import decode_kernels, fused
    from moba_flex.masks import (
        append_kernel,
        layout_kernel,
        pool_kernel,
        regroup_kernel,
        router_kernel,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    append_op: Any = append_kernel.append_triton
    yield append_op.op, appending(device)
    locate_op: Any = layout_kernel.locate_triton
    pool_op: Any = pool_kernel.pool_triton
    choose: Any = router_kernel.choose_triton
    sort_pairs: Any = regroup_kernel.sort_pairs_triton
    attend: Any = fused.attend_fused
    decode: Any = decode_kernels.decode_triton
    decode_few: Any = decode_kernels.decode_few_triton
    step: Any = decode_kernels.decode_step_triton
    q, k, v = Case(2, 2, 2, 3, 90, device=device).inputs()
    ends = torch.tensor([[80, 70], [0, 5], [83, 72]], dtype=torch.int32, device=device)
    yield locate_op.op, (ends[1], ends[2], ends[0], 3, 6, 16, True)
    block_keys = pool(k, Layout(3, 90, 16, causal=True))
    places = *ends, None, None
    yield decode_few.op, (q, k, v, block_keys, *places, (3, 16, 1, 0), True, None, 0.3, 20.0)
    *cache, new_k, new_v, start, stop, counters, counts, table, size = appending(device)
    q = torch.randn(2, 6, 5, 16, device=device)
    given = q, new_k, new_v, *cache, start, stop, counters, counts, table
    yield step.op, (*given, (3, size, 1, 0), None, 0.3, 0.0)
    for layout in layouts(device):
        place = layout.queries, layout.extents
        q, k, v = (x.requires_grad_() for x in Case(1, 2, 2, 50, 90, device=device).inputs())
        pooling = k.detach(), 16, layout.num_blocks, layout.extents
        yield pool_op.op, pooling
        block_keys, offset = pool_op(*pooling), layout.q_offset
        gate = (q.detach(), block_keys, (3, 16, 1, 0), True, None, offset, layout.queries)
        yield choose.op, gate
        blocks = choose(*gate)
        yield sort_pairs.op, (blocks, 2, layout.num_blocks)
        scores = 0.3, 0.0 if layout.queries is None else 20.0
        inputs = q.detach(), k.detach(), v.detach()
        yield decode.op, (*inputs, blocks, *place, 16, True, *scores)
        yield attend.op, (q, k, v, blocks, *place, 16, True, *scores)
        with torch.no_grad():
            made = attend(q, k, v, blocks, *place, 16, True, *scores)
        saved = [x.detach() for x in (q, k, v)]
        grads = torch.randn_like(made[0]), torch.randn_like(made[1])
        yield attend.backward_op, (*grads, *saved, *made, *place, 16, True, *scores)


def test_every_op_is_checked() -> None:
    """An op that is not in the lists above fails here."""
    registered = {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moba_flex::")
    }
    known = {"pool_cpu", "choose_cpu", "attend_cpu", "attend_cpu_backward"}
    known |= {"copy_cpu", "show_spoilt", "append_cpu", "decode_cpu"}
    if pytest.importorskip("triton"):
        known |= {"append_triton", "locate_triton", "pool_triton", "choose_triton"}
        known |= {"attend_fused", "attend_fused_backward", "decode_triton"}
        known |= {"decode_few_triton", "decode_step_triton", "sort_pairs_triton"}
    assert registered == {f"moba_flex::{name}" for name in known}
    assert {op._qualname.partition("::")[2] for op, _ in cpu_ops()} <= known


def test_cpu_ops_keep_the_rules_of_torch_library() -> None:
    for op, arguments in cpu_ops():
        torch.library.opcheck(op, arguments)


@pytest.mark.filterwarnings("ignore:(invalid|overflow) .*:RuntimeWarning")
def test_kernel_ops_keep_the_rules_of_torch_library() -> None:
    if not torch.cuda.is_available():
        needs_interpreter()
    seen = set()
    # Interpreted kernels read memory, which a fake tensor has not: without a GPU ops are traced by
    # trace_fused.py and trace_export.py.
    traced = ("test_faketensor", "test_aot_dispatch_dynamic") if torch.cuda.is_available() else ()
    utils = ("test_schema", "test_autograd_registration", *traced)
    for op, arguments in kernel_ops():
        torch.library.opcheck(op, arguments, test_utils=utils)
        seen.add(op._qualname)
    assert len(seen) == 10


# Limits of PyTorch, and what is done about them.


def test_compiled_graphs_are_not_taken_for_exported_ones() -> None:
    """As `torch.compiler.is_exporting` does in PyTorch 2.11."""
    compiled = torch.compile(lambda x: x + is_exporting(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 0


def flex(mask: BlockMask | None, **options: Any) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=mask, **options)

    return torch.compile(run, fullgraph=True)


def test_limit_ops_do_not_know_torch_func() -> None:
    @torch.library.custom_op("moba_flex_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return 2 * x

    double.register_autograd(lambda ctx, grad: 2 * grad)
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        torch.func.grad(lambda x: double(x).sum())(x)
    assert not torch.func.jvp(double, (x,), (x,))[1].any()


def test_limit_flex_attention_on_cpu_has_no_lse() -> None:
    """So the plan "routed" on CPU has an engine of its own, `moba_flex.compile.cpu`."""
    x = torch.randn(1, 1, 128, 16)
    with pytest.raises((InductorError, NotImplementedError), match=r"NotImplemented|logsumexp"):
        flex(None, return_aux=AuxRequest(lse=True))(x, x, x)


def test_limit_flex_attention_on_cpu_has_no_backward() -> None:
    """So the plan "masked" refuses gradients there."""
    q, k, v = torch.randn(3, 1, 1, 128, 16, requires_grad=True)
    with pytest.raises(Exception, match=r"(?i)backward|requires_grad|grad"):
        flex(None)(q, k, v)


@torch.no_grad()
def test_limit_flex_attention_on_cpu_reads_a_copy_as_contiguous() -> None:
    """So `attend` asks for strides."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q.contiguous(), k, v)

    q, k, v = torch.randn(3, 1, 1, 128, 16)
    turned = q.mT.contiguous().mT
    want = nn.functional.scaled_dot_product_attention(q, k, v)
    found = torch.compile(run, fullgraph=True)(turned, k, v)
    assert not torch.allclose(found, want, atol=1e-3), "lifted: `x.contiguous()` is enough"


@torch.no_grad()
def test_limit_flex_attention_on_cpu_forgets_where_a_view_begins() -> None:
    """So it is given copies that no compiler lays out, also of what is contiguous."""

    def run(q: Tensor, kv: Tensor) -> Any:
        return flex_attention(2 * q, kv[1], 2 * kv[0])

    q, kv = torch.randn(1, 1, 128, 16), torch.randn(2, 1, 1, 128, 16)
    want = nn.functional.scaled_dot_product_attention(2 * q, kv[1], 2 * kv[0])
    found = torch.compile(run, fullgraph=True)(q, kv)
    assert not torch.allclose(found, want, atol=1e-3), "lifted: strides are enough on CPU"


@torch.no_grad()
def test_limit_flex_attention_on_cpu_does_not_compile_with_what_follows() -> None:
    """So the plan "masked" ends in an op there."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return 2 * flex_attention(q, k, v)

    with pytest.raises(InductorError, match="epilogue"):
        torch.compile(run, fullgraph=True)(*torch.randn(3, 1, 1, 128, 16))


@torch.no_grad()
def test_limit_flex_attention_on_cpu_hides_nan() -> None:
    """So the plan "masked" looks for it afterwards."""
    q, k, v = torch.randn(3, 1, 1, 128, 16)
    assert not flex(None)(torch.nan * q, k, v).any(), "lifted: NaN shows"


def test_limit_flash_attention_on_cpu_hides_nan_among_few_keys() -> None:
    """So rows that see what is not finite are computed apart. Few: less than a vector holds."""
    width = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    for length, hidden in ((width - 1, True), (width, False)):
        q, k, v = torch.randn(3, 1, 1, length, 16)
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q * torch.nan, k, v)[0]
        assert not out.any() if hidden else out.isnan().all(), "lifted: NaN shows"


@torch.no_grad()
def test_limit_flex_attention_on_cpu_writes_past_few_scores() -> None:
    """So small head dims are padded. Vectors of 256 bits: those of CPUs that have AVX2 alone."""
    q, k, v = torch.full((3, 1, 5, 40, 16), torch.nan)[:, :, :4].normal_()
    attend = torch.compile(flex_attention, options={"cpp.simdlen": 256})
    want = nn.functional.scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(attend(q, k, v), want, atol=1e-3), "lifted: scores are right"


@torch.no_grad()
def test_limit_mask_mod_reads_what_a_scatter_has_not_yet_written() -> None:
    """So what `create_moba_block_mask` captures is a result of `topk`."""

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        table = torch.zeros(256, 2, dtype=torch.bool).scatter(1, chosen, True)

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return table[q_idx, kv_idx // 128]

        mask = create_block_mask(mask_mod, None, None, 256, 256, device="cpu")
        mask.full_kv_num_blocks = None
        out = flex_attention(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    q, k, v = torch.randn(3, 1, 1, 256, 16)
    chosen = torch.randint(2, (256, 1))
    seen = (torch.arange(256) // 128) == chosen
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    try:
        got = torch.compile(run, fullgraph=True)(q, k, v, chosen)
    except InductorError:
        return
    assert not torch.allclose(got, want, atol=1e-3), "lifted: captures may come from scatter"


def test_limit_lists_of_a_block_mask_have_full_width_on_cpu() -> None:
    """So the lists of a mask are as wide as there are tiles."""
    count, index = torch.ones(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 1).int()
    mask = BlockMask.from_kv_blocks(count, index, seq_lengths=(512, 512), compute_q_blocks=False)
    q, k, v = torch.randn(3, 1, 1, 512, 16)
    with pytest.raises(InductorError, match=r"Assertion|KV_LEN|NoValidChoices"), torch.no_grad():
        flex(mask)(q, k, v)


@torch.no_grad()
def test_limit_slices_of_padded_lengths_stay_expressions() -> None:
    """So exported code takes rows by index: each such length slows down all that follows."""

    class Slice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[0]
            padded = nn.functional.pad(x, (0, 0, 0, (length + 31) // 32 * 32 - length))
            return padded[:length]

    shapes = ({0: Dim.DYNAMIC(min=2, max=4096)},)
    with symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(Slice(), (torch.randn(50, 4),), dynamic_shapes=shapes)
    (output,) = next(n for n in program.graph.nodes if n.op == "output").args[0]
    given = next(n for n in program.graph.nodes if n.op == "placeholder")
    before, after = (str(node.meta["val"].shape[0]) for node in (given, output))
    assert after != before  # Min(...), or a symbol that nothing is known of


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
def test_limit_map_over_a_length_does_not_compile() -> None:
    """So the exported gate goes over chunks of queries by `while_loop`."""
    from torch._higher_order_ops import map as map_over

    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            chunks = (x.shape[0] + 31) // 32
            padded = nn.functional.pad(x, (0, 0, 0, chunks * 32 - x.shape[0]))
            out: Tensor = map_over(best, padded.view(chunks, 32, 4))  # type: ignore[arg-type]
            return out

    def best(x: Tensor) -> Any:
        return (x * 2).topk(2).values

    shapes = ({0: Dim.DYNAMIC(min=2, max=4096)},)
    program = torch.export.export(Map(), (torch.randn(50, 4),), dynamic_shapes=shapes)
    with pytest.raises(InductorError, match="KeyError"):
        torch._inductor.aot_compile(program.module(), (torch.randn(50, 4),))
