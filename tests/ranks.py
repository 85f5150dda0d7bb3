"""Processes that form a process group, kept for many calls; and what the tests call on them."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _ContextParallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention.flex_attention import AuxRequest

from moba_flex import MoBAAttention, MoBAConfig, moba_attention
from moba_flex.distributed import (
    HeadParallel,
    collectives,
    communication_bytes,
    context_parallel_attention,
    shard_sequence,
    tensor_parallel_plan,
    ulysses_attention,
    unshard_sequence,
)
from tests.case import Case

WAYS: dict[str, Callable[..., Any]] = {
    "context_parallel": context_parallel_attention,
    "ulysses": ulysses_attention,
}


class Ranks:
    """Processes of one group, on CPU by gloo, or on a CUDA device each by NCCL."""

    def __init__(self, size: int, *, device: str = "cpu", timeout: float = 60.0) -> None:
        self._timeout = timeout
        # CUDA does not survive a fork of a process that has asked for devices.
        context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device == "cpu":
            context.set_forkserver_preload(["tests.ranks"])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name, "store"))
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(
                target=_serve, args=(theirs, store, rank, size, device, timeout), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()  # which ends the process
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def errors(self, function: Callable[..., None], *args: Any) -> list[str | None]:
        """Call a function on every rank, and return how each call failed; None if it did not."""
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in alive:
            self._pipes[rank].send((function, args))
        said: list[str | None] = []
        for rank in alive:
            if not self._pipes[rank].poll(2 * self._timeout):
                raise TimeoutError(f"rank {rank} hangs")
            said.append(self._pipes[rank].recv())
        return said

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on every rank, and raise if it fails on one."""
        for rank, error in enumerate(self.errors(function, *args)):
            assert error is None, f"on rank {rank}: {error}"


def _serve(
    pipe: Connection, store: str, rank: int, size: int, device: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            function(*args)
        except Exception as error:
            trace = traceback.format_exc() if isinstance(error, AssertionError) else ""
            pipe.send(f"{type(error).__name__}: {error}{trace}")
        else:
            pipe.send(None)
    dist.destroy_process_group()


def device() -> str:
    """Return the type of device on which this rank computes."""
    return "cuda" if "nccl" in str(dist.get_backend_config()) else "cpu"


def shard(way: str, x: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Return this rank's part of `x`, `[B, H, S, ...]`."""
    if way == "context_parallel":
        return shard_sequence(x, None)
    edges = [0, *cuts, x.shape[2]]
    return x[:, :, edges[dist.get_rank()] : edges[dist.get_rank() + 1]]


def assert_same(
    name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Compare two results that were rounded differently, to `dtype` if not to their own."""
    assert actual.dtype == expected.dtype
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
    tolerance = 16 * torch.finfo(dtype or expected.dtype).eps * max([1.0, *largest.tolist()])
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def check_case(way: str, line: str, cuts: tuple[int, ...]) -> None:
    """Compare output, log-sum-exp and gradients with those of one process, in two runs."""
    case = replace(Case.parse(line), device=device())
    options: dict[str, Any] = case.gate | case.layout
    options |= {"scale": case.scale, "softcap": case.softcap, "mask_mod": case.mask_mod()}
    options |= {"score_mod": case.score_mod(case.captured())}
    options |= {"return_aux": AuxRequest(lse=True)}
    whole = [x.detach().requires_grad_() for x in case.inputs()]
    generator = torch.Generator().manual_seed(case.seed)
    expected, aux = moba_attention(*whole, **options)
    weights = torch.randn(expected.shape, generator=generator).to(expected)
    expected_grads = torch.autograd.grad(expected, whole, weights)

    runs = []
    for _ in range(2):
        parts = [shard(way, x.detach(), cuts).clone().requires_grad_() for x in whole]
        out, said = WAYS[way](*parts, group=None, **options)
        grads = torch.autograd.grad(out, parts, shard(way, weights, cuts))
        runs.append((out.detach(), said.lse.detach(), *grads))
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), *runs, strict=True):
        assert torch.equal(x, y), f"{name} differs between two runs"
    with torch.no_grad():  # by another plan, for few queries
        parts = [shard(way, x, cuts) for x in whole]
        assert_same("out", WAYS[way](*parts, group=None, **options)[0], shard(way, expected, cuts))
    truth = expected.detach(), aux.lse.detach(), *expected_grads
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), runs[0], truth, strict=True):
        assert_same(name, x, shard(way, y, cuts), case.dtype)


def check_captured(way: str) -> None:
    """Add up the gradients of a tensor that a function captures."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 48, 16, device=device()) for _ in range(3))
    slopes = torch.rand(4, device=device(), requires_grad=True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx)

    options: dict[str, Any] = {"block_size": 8, "top_k": 3, "score_mod": score_mod}
    moba_attention(q, k, v, **options).square().sum().backward()
    assert slopes.grad is not None
    expected, slopes.grad = slopes.grad, None
    size = dist.get_world_size()
    parts = [shard(way, x, tuple(48 // size * i for i in range(1, size))) for x in (q, k, v)]
    WAYS[way](*parts, group=None, **options).square().sum().backward()
    assert slopes.grad is not None
    dist.all_reduce(slopes.grad)
    torch.testing.assert_close(slopes.grad, expected)


def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Hide keys that are far from a query."""
    return q_idx - kv_idx < 5


def call_with(way: str, common: dict[str, Any], on_last: dict[str, Any]) -> None:
    """Attend with arguments of which the last rank gives some others.

    Args:
        way: A key of `WAYS`.
        common: Arguments by name; those of tensors are shapes, their dtype is "dtype".
        on_last: Those that the last rank gives instead; "way" is another function.
    """
    last = dist.get_rank() == dist.get_world_size() - 1
    given: dict[str, Any] = {
        "q": (1, 4, 8, 16),
        "k": (1, 4, 8, 16),
        "v": (1, 4, 8, 16),
        "way": way,
    }
    given |= {"block_size": 4, "top_k": 2, "dtype": torch.float32, "grad": False}
    given |= common | (on_last if last else {})
    function, dtype, grad = (given.pop(name) for name in ("way", "dtype", "grad"))
    given = {name: x.to(device()) if isinstance(x, Tensor) else x for name, x in given.items()}
    made: dict[str, Any] = {"dtype": dtype, "requires_grad": grad, "device": device()}
    qkv = [torch.randn(given.pop(name), **made) for name in "qkv"]
    WAYS[function](*qkv, group=None, **given)


def check_round_trip(length: int) -> None:
    """Cut tensors of any dtype along any dimension, and join them again."""
    for dtype in (torch.int64, torch.bfloat16, torch.bool):
        x = torch.randint(0, 2, (3, length, 2), device=device()).to(dtype)
        dist.broadcast(x.view(torch.uint8), 0)
        for dim, whole in ((1, x), (-2, x), (0, x.movedim(1, 0))):
            part = shard_sequence(whole, None, dim=dim)
            assert torch.equal(unshard_sequence(part, None, dim=dim), whole)


def unshard_other_shapes() -> None:
    """Join parts that do not fit."""
    unshard_sequence(torch.zeros(2 + dist.get_rank(), 4, 1), None, dim=1)


def check_traffic() -> None:
    """Count the bytes that collectives carry."""
    size, rank = dist.get_world_size(), dist.get_rank()
    sizes: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "v_dim": 32}
    made: dict[str, Any] = {"device": device()}
    q, k, v = (torch.randn(2, h, 48, d, **made) for h, d in ((8, 16), (2, 16), (2, 32)))
    promised = communication_bytes(ranks=size, seq_len=48, batch=2, dtype=q.dtype, **sizes)
    sent = 0
    real_swap, real_gather = dist.all_to_all_single, collectives._all_gather

    def swap(got: Tensor, x: Tensor, receive: list[int], send: list[int], **rest: Any) -> None:
        nonlocal sent
        sent += (sum(send) - send[rank]) * x.element_size()
        real_swap(got, x, receive, send, **rest)

    def gather(every: Tensor, x: Tensor, **rest: Any) -> None:
        nonlocal sent
        if x.is_floating_point():  # and not the numbers by which ranks agree
            sent += (size - 1) * x.nbytes
        real_gather(every, x, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", swap)
        patch.setattr(collectives, "_all_gather", gather)
        for way, expected in promised._asdict().items():
            cuts = tuple(48 // size * i for i in range(1, size))
            parts = [shard(way, x, cuts).clone().requires_grad_() for x in (q, k, v)]
            out = WAYS[way](*parts, group=None, block_size=4, top_k=2)
            assert sent == expected
            out.sum().backward()
            assert sent == 2 * expected
            sent = 0


def check_mesh() -> None:
    """Attend on each half of four ranks, with data of its own, also under checkpoints."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    torch.manual_seed(mesh.get_local_rank("data"))
    q, k, v = (torch.randn(1, 4, 50, 16, requires_grad=True) for _ in range(3))
    options: dict[str, Any] = {"block_size": 8, "top_k": 3}
    group = mesh["sequence"]
    for dtype in (torch.float32, torch.bfloat16):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with autocast:
            expected = moba_attention(q, k, v, **options)
        grads = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
        assert expected.dtype == dtype
        parts = [shard_sequence(x.detach(), group).requires_grad_() for x in (q, k, v)]

        def attend(*parts: Tensor) -> Tensor:
            return context_parallel_attention(*parts, group=group, **options)

        with autocast:
            out = torch.utils.checkpoint.checkpoint(attend, *parts, use_reentrant=False)
            assert isinstance(out, Tensor)
        assert_same("out", out, shard_sequence(expected, group))
        own = torch.autograd.grad(out.float().square().sum(), parts)
        for x, y in zip(own, grads, strict=True):
            assert_same("grad", x, shard_sequence(y, group), dtype)
    compiled = torch.compile(attend, backend="eager")
    assert_same("out", compiled(*parts), shard_sequence(moba_attention(q, k, v, **options), group))


class Layer(nn.Module):
    """An attention layer as Llama has it."""

    def __init__(self, num_heads: int, num_kv_heads: int, **options: Any) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, num_heads * 16)
        self.k_proj = nn.Linear(32, num_kv_heads * 16)
        self.v_proj = nn.Linear(32, num_kv_heads * 16)
        self.o_proj = nn.Linear(num_heads * 16, 32)
        self.attention = MoBAAttention(block_size=8, top_k=3, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, given `[B, S, 32]`."""
        q, k, v = (
            project(x).unflatten(2, (-1, 16)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attention(q, k, v).transpose(1, 2).flatten(2))


_TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},  # sums over heads in another order
}


def check_tensor_parallel(num_kv_heads: int, head_top_k: tuple[int, ...] | None) -> None:
    """Train a step of a layer whose heads are shared."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": device()}
    made["dtype"] = torch.float32 if device() == "cuda" else torch.float64  # as plans take it
    layer, shared = (Layer(8, num_kv_heads, head_top_k=head_top_k).to(**made) for _ in range(2))
    shared.load_state_dict(layer.state_dict())
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    model = nn.ModuleList([shared])
    parallelize_module(model, mesh, tensor_parallel_plan("*."))
    x = torch.randn(2, 50, 32, **made)
    expected, out = layer(x), shared(x)
    torch.testing.assert_close(out, expected, **_TOLERANCE[x.dtype])
    expected.square().sum().backward()
    out.square().sum().backward()
    for (name, x), y in zip(shared.named_parameters(), layer.parameters(), strict=True):
        assert isinstance(x.grad, DTensor), name
        near = _TOLERANCE[y.dtype]
        torch.testing.assert_close(x.grad.full_tensor(), y.grad, msg=name, **near)


def check_transformers_model() -> None:
    """Share the heads of a model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from moba_flex.integrations.transformers import apply

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2))
    apply(model, MoBAConfig(block_size=16, top_k=3))
    ids = torch.randint(0, 64, (1, 200))
    expected = model(ids, use_cache=False).logits
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = tensor_parallel_plan("model.layers.*.self_attn.", attention=None)
    parallelize_module(model, mesh, plan)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def check_sharded_transformers_model() -> None:
    """Train three steps of a model of transformers whose weights are shared (FSDP2)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from moba_flex.integrations.transformers import apply

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=2)
    models: list[Any] = []
    for _ in range(2):
        models.append(LlamaForCausalLM(config))
        models[-1].load_state_dict(models[0].state_dict())
        apply(models[-1], MoBAConfig(block_size=16, top_k=3))
    one, shared = models
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*shared.model.layers, shared):
        fully_shard(part, mesh=mesh)
    rows = torch.randint(0, 64, (3, 4, 100))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for batch in rows:
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
        for model, ids, optimizer in zip(models, (batch, mine), optimizers, strict=True):
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, x), y in zip(shared.named_parameters(), one.parameters(), strict=True):
        assert isinstance(x, DTensor), name
        torch.testing.assert_close(x.full_tensor(), y, msg=name, rtol=1e-4, atol=1e-5)


def check_head_shards() -> None:
    """Attend to DTensors that are sharded by heads."""
    torch.manual_seed(0)
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    module = MoBAAttention(block_size=8, top_k=3)
    q, k, v = (torch.randn(1, h, 50, 16, device=device()) for h in (8, 4, 4))
    expected, aux = module(q, k, v, return_aux=AuxRequest(lse=True))
    parallelize_module(module, mesh, HeadParallel(use_local_output=False))
    shards = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    out, own = module(*shards, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(out.full_tensor(), expected)
    torch.testing.assert_close(own.lse.full_tensor(), aux.lse)
    torch.testing.assert_close(module(shards[0], v=shards[2], k=shards[1]).full_tensor(), expected)


def shard_heads(heads: int, placement: Placement, head_top_k: tuple[int, ...] | None) -> None:
    """Attend to DTensors of so many heads, sharded somehow."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = MoBAAttention(block_size=8, top_k=3, head_top_k=head_top_k)
    parallelize_module(module, mesh, HeadParallel())
    q = distribute_tensor(torch.randn(1, heads, 16, 16), mesh, [placement])
    module(q, q, q)


def enter_context_parallel() -> None:
    """Attend within PyTorch's own context parallel."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q = torch.randn(1, 2, 64, 16)
    with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
        whole = MoBAAttention(block_size=8, top_k=2)
        # This one knows of its part, and PyTorch cuts as `shard_sequence` does.
        context_parallel_attention(q, q, q, group=mesh, block_size=8, top_k=2)
        whole(q, q, q)


def hook_context_parallel(kind: str) -> None:
    """Attend in a module under the hooks of PyTorch's own context parallel."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    style = _ContextParallel(2, getattr(_ContextParallel.AttentionType, kind))
    parallelize_module(MoBAAttention(block_size=8, top_k=2), mesh, style)


def attend_alone(way: str) -> None:
    """Attend on the first rank; the others do not call."""
    if dist.get_rank() == 0:
        call_with(way, {}, {})
