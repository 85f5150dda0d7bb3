"""Attention by several processes is attention by one."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

from moba_flex.distributed import HeadParallel, shard_sequence
from tests import ranks as on_ranks
from tests.helpers import Case, layouts
from tests.ranks import Ranks

SIZES = (2, 4)
MARKS = (
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
)
GPUS = pytest.param("two GPUs", marks=MARKS)


class Groups(dict[Any, Ranks]):
    """A group of each kind, whose processes start when it is first asked for."""

    def __missing__(self, kind: Any) -> Ranks:
        self[kind] = ranks = Ranks(2, device="cuda") if kind == "two GPUs" else Ranks(kind)
        return ranks


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """Return groups by the number of their processes on CPU, or "two GPUs"."""
    made = Groups()
    yield made
    for ranks in made.values():
        ranks.close()


@st.composite
def shared(draw: st.DrawFn, way: str, size: int) -> tuple[Case, tuple[int, ...]]:
    """Draw a request of one whole sequence, and where `ulysses_attention` cuts it."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    case: Case = draw(layouts(max_len=240, groups=(1, 2, 3), dtypes=dtypes))
    changes: dict[str, Any] = {"q_docs": None, "q_len": case.kv_len, "tail": (0, 0)}
    if case.docs is not None:
        changes["tail"] = draw(st.sampled_from([(0, 0), (7, 7)]))
    if way == "ulysses":
        num_kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
        least = max(1, size // num_kv_heads)
        changes |= {"num_kv_heads": num_kv_heads, "group": least * draw(st.integers(1, 2))}
    changes["v_dim"] = draw(st.sampled_from([None, 16]))
    changes["softcap"] = draw(st.sampled_from([None, None, 5.0]))
    changes["score"] = draw(st.sampled_from(["", "", "alibi"]))
    changes["mask"] = draw(st.sampled_from(["", "", "window:20"]))
    case = replace(case, **changes)
    if draw(st.booleans()):
        least = 1 + case.sink_blocks + case.local_blocks
        numbers = st.lists(
            st.integers(least, case.top_k), min_size=case.num_heads, max_size=case.num_heads
        )
        case = replace(case, head_top_k=tuple(draw(numbers)))
    cuts = draw(st.lists(st.integers(0, case.kv_len), min_size=size - 1, max_size=size - 1))
    return case, tuple(sorted(cuts))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", on_ranks.WAYS)
def test_equals_one_process(groups: Groups, way: str, size: int) -> None:
    @settings(max_examples=settings().max_examples // 2)
    @given(data=shared(way, size))
    def check(data: tuple[Case, tuple[int, ...]]) -> None:
        case, cuts = data
        groups[size].call(on_ranks.check_case, way, str(case), cuts)

    check()


# Each compiles kernels. No length is a multiple of a block, nor of two chunks a rank.
ON_GPUS = {
    "shared keys": Case(
        1, 2, 4, kv_len=1531, top_k=4, head_top_k=(1, 2, 3, 4) * 2, dtype=torch.bfloat16
    ),
    "documents": Case(1, 2, 2, top_k=3, docs=(1, 700, 0, 65, 411), tail=(7, 7)),
    "padding": Case(2, 2, 1, kv_len=999, top_k=3, pads=((0, 130), (70, 1)), dtype=torch.bfloat16),
    "forced blocks": Case(
        1, 4, 1, kv_len=1203, top_k=5, sink_blocks=1, softcap=5.0, dtype=torch.bfloat16
    ),
    "not causal": Case(1, 2, 2, kv_len=701, top_k=3, causal=False),
    "short": Case(1, 2, 1, kv_len=3, top_k=3, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", [GPUS])
@pytest.mark.parametrize("way", on_ranks.WAYS)
@pytest.mark.parametrize("name", ON_GPUS)
def test_equals_one_gpu(groups: Groups, name: str, way: str, kind: Any) -> None:
    case = replace(ON_GPUS[name], head_dim=64, block_size=64, seed=len(name))
    case = replace(case, q_len=case.kv_len)
    groups[kind].call(on_ranks.check_case, way, str(case), (case.kv_len // 3,))


@pytest.mark.parametrize("length", [0, 1, 3, 8, 13, 64])
@pytest.mark.parametrize("size", [*SIZES, GPUS])
def test_parts_make_up_the_sequence(groups: Groups, size: Any, length: int) -> None:
    groups[size].call(on_ranks.check_round_trip, length)


@pytest.mark.parametrize("size", [*SIZES, GPUS])
def test_bytes_are_as_promised(groups: Groups, size: Any) -> None:
    groups[size].call(on_ranks.check_traffic)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", on_ranks.WAYS)
def test_gradients_of_captured_tensors(groups: Groups, way: str, size: int) -> None:
    groups[size].call(on_ranks.check_captured, way)


def test_mesh_with_checkpoints_autocast_and_graphs(groups: Groups) -> None:
    groups[4].call(on_ranks.check_mesh)


def of_all(*shape: int) -> dict[str, Any]:
    """Return q, k and v of one shape."""
    return dict.fromkeys("qkv", shape)


SAME = "must be the same on every rank, got"
ALL = torch.ones(1, 16, dtype=torch.bool)
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top_k": ({}, {"top_k": 3}, f"top_k {SAME} 2 on rank 0, 3 on rank 1: call it alike"),
    "block_size": ({}, {"block_size": 8}, f"block_size {SAME} 4 on rank 0, 8 on rank 1"),
    "causal": ({}, {"causal": False}, f"causal {SAME} True on rank 0"),
    "scale": ({}, {"scale": 2.0}, f"scale {SAME} 0.25 on rank 0, 2.0 on rank 1"),
    "softcap": ({}, {"softcap": 2.0}, f"softcap {SAME} None on rank 0, 2.0 on rank 1"),
    "plan": ({}, {"plan": "routed"}, f"plan {SAME} 'auto' on rank 0, 'routed' on rank 1"),
    "dtype": ({}, {"dtype": torch.float64}, f"dtype of q {SAME} torch.float32 on rank 0"),
    "grad": ({}, {"grad": True}, f"requires_grad of q {SAME} False on rank 0"),
    "batch": ({}, of_all(2, 4, 8, 16), f"batch size of q {SAME} 1 on rank 0, 2 on rank 1"),
    "heads": ({}, {"q": (1, 8, 8, 16)}, f"number of heads of q {SAME} 4 on rank 0, 8 on rank 1"),
    "head_dim": ({}, of_all(1, 4, 8, 32), f"head_dim of q {SAME} 16 on rank 0, 32 on rank 1"),
    "v_dim": ({}, {"v": (1, 4, 8, 32)}, f"head_dim of v {SAME} 16 on rank 0, 32 on rank 1"),
    "mask": ({"key_mask": ALL}, {"key_mask": ALL.tril()}, f"key_mask {SAME} a Tensor of shape"),
    "docs": ({}, {"cu_seqlens": torch.tensor([0, 9])}, f"cu_seqlens {SAME} None on rank 0"),
    "mod": ({}, {"mask_mod": on_ranks.near}, f"mask_mod {SAME} None on rank 0, a function on"),
}
WAY_DIFFERS = {"context_parallel": "ulysses", "ulysses": "context_parallel"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "top_k": ({"top_k": 0}, "ValueError: top_k must be at least 1, got 0"),
    "name": ({"blocks": 0}, "TypeError: "),
    "shape": ({"q": (4, 8, 16)}, "ValueError: q must have 4 dimensions"),
    "length": (
        {"q": (1, 4, 7, 16)},
        "ValueError: q must have as many positions as k, 8, got 7: each rank holds the same part",
    ),
}


@pytest.mark.parametrize("kind", [2, GPUS])
@pytest.mark.parametrize("way", on_ranks.WAYS)
def test_ranks_that_call_differently(groups: Groups, way: str, kind: Any) -> None:
    for common, on_last, message in DIFFERENCES.values():
        for error in groups[kind].errors(on_ranks.call_with, way, common, on_last):
            assert error is not None
            assert error.startswith(f"ValueError: {message}")
    for error in groups[kind].errors(on_ranks.call_with, way, {}, {"way": WAY_DIFFERS[way]}):
        assert error is not None
        assert error.startswith(f"ValueError: call {SAME} '{way}_attention' on rank 0")
    groups[kind].call(on_ranks.call_with, way, {}, {})


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("way", on_ranks.WAYS)
def test_error_on_one_rank(groups: Groups, way: str, name: str) -> None:
    wrong, message = WRONG[name]
    *others, own = groups[4].errors(on_ranks.call_with, way, {}, wrong)
    assert own is not None
    assert own.startswith(message)
    text = own.partition(": ")[2]
    expected = f"ValueError: arguments must be right on every rank, got an error on rank 3: {text}"
    assert others == [expected] * 3


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        (
            "context_parallel",
            {"key_mask": torch.ones(1, 8, dtype=torch.bool)},
            "ValueError: key_mask must have shape [B, KV] = (1, 32), got (1, 8)",
        ),
        (
            "ulysses",
            {"key_mask": torch.ones(1, 8, dtype=torch.bool)},
            "ValueError: key_mask must have shape [B, KV] = (1, 32), got (1, 8)",
        ),
        ("context_parallel", {"plan": "none"}, "ValueError: plan must be one of"),
        (
            "ulysses",
            of_all(1, 6, 8, 16),
            "ValueError: q must have a multiple of 4 heads, the number of ranks, got 6: use fewer "
            "ranks or context_parallel_attention",
        ),
        (
            "ulysses",
            {"q": (1, 12, 8, 16), "k": (1, 3, 8, 16), "v": (1, 3, 8, 16)},
            "ValueError: k must have a number of heads that is a multiple of 4, the number of "
            "ranks, or divides it, got 3: use fewer ranks or context_parallel_attention",
        ),
    ],
)
def test_error_on_all_ranks(
    groups: Groups, way: str, options: dict[str, Any], message: str
) -> None:
    for error in groups[4].errors(on_ranks.call_with, way, options, {}):
        assert error is not None
        assert error.startswith(message)


def test_parts_of_other_lengths(groups: Groups) -> None:
    message = (
        "ValueError: ranks must hold [7, 7] of 14 positions, got [8, 6]: cut the sequence by "
        "shard_sequence"
    )
    on_last = of_all(1, 4, 6, 16)
    errors = groups[2].errors(on_ranks.call_with, "context_parallel", {}, on_last)
    assert errors == [message] * 2


def test_parts_that_do_not_fit(groups: Groups) -> None:
    message = f"ValueError: other dimensions of x {SAME} [2, 1] on rank 0, [3, 1] on rank 1: "
    for error in groups[2].errors(on_ranks.unshard_other_shapes):
        assert error is not None
        assert error.startswith(message)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: "WORLD",
            TypeError,
            "group must be a ProcessGroup or a DeviceMesh, got str: pass None for all ranks",
        ),
        (
            lambda: dist.GroupMember.NON_GROUP_MEMBER,
            ValueError,
            "group must hold this rank, got one without it: call it on its ranks",
        ),
        (
            lambda: init_device_mesh("cpu", (1, 1)),
            ValueError,
            "group must be a mesh of 1 dimension, got 2: index the mesh by the name of one",
        ),
    ],
)
def test_groups(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            shard_sequence(torch.zeros(8), make(), dim=0)
    finally:
        dist.destroy_process_group()


def test_no_group_yet() -> None:
    message = "group must exist, got None before torch.distributed.init_process_group: call it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shard_sequence(torch.zeros(8), None, dim=0)


@pytest.mark.parametrize("head_top_k", [None, (1, 2, 3, 3, 3, 2, 1, 1)])
@pytest.mark.parametrize(
    ("size", "num_kv_heads"),
    [(2, 2), (2, 8), (4, 4), pytest.param("two GPUs", 2, marks=MARKS)],
)
def test_tensor_parallel_layer(
    groups: Groups, size: Any, num_kv_heads: int, head_top_k: tuple[int, ...] | None
) -> None:
    groups[size].call(on_ranks.check_tensor_parallel, num_kv_heads, head_top_k)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_tensor_parallel_model_of_transformers(groups: Groups) -> None:
    groups[2].call(on_ranks.check_transformers_model)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_sharded_model_of_transformers(groups: Groups) -> None:
    groups[2].call(on_ranks.check_sharded_transformers_model)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_trainer_of_transformers(tmp_path: Path) -> None:
    """The Trainer, by accelerate's DDP, trains on two processes as on one with all rows.

    Accelerate 1.15 shards weights (FSDP) on accelerators alone: with gloo on CPU its plugin is
    ignored, without a word.
    """
    results: dict[int, Any] = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        port = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
        launcher = ("-m", "torch.distributed.run", *port, "--nproc-per-node", str(processes))
        script = Path(__file__).with_name("train_transformers.py")
        subprocess.run(
            [sys.executable, *launcher, str(script), str(folder)],
            check=True,
            timeout=300,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"},
        )
        results[processes] = torch.load(folder / "result.pt")
    one, two = results[1], results[2]
    assert len(one["losses"]) == 3
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["weights"].keys() == one["weights"].keys()
    for name, x in two["weights"].items():
        torch.testing.assert_close(x, one["weights"][name], rtol=1e-5, atol=1e-6, msg=name)


def test_heads_that_ranks_cannot_share(groups: Groups) -> None:
    """One key/value head on two ranks: the layer's own view fails."""
    for error in groups[2].errors(on_ranks.check_tensor_parallel, 1, None):
        assert error is not None
        assert error.startswith("RuntimeError: unflatten: ")


@pytest.mark.parametrize("size", [*SIZES, GPUS])
def test_distributed_tensors(groups: Groups, size: Any) -> None:
    groups[size].call(on_ranks.check_head_shards)


@pytest.mark.parametrize(
    ("heads", "placement", "head_top_k", "message"),
    [
        (
            3,
            Shard(1),
            None,
            "q must have a multiple of 2 heads, the number of ranks, got 3: use fewer ranks",
        ),
        (
            4,
            Shard(1),
            (1, 2, 3),
            "head_top_k must have a multiple of 2 numbers, the number of ranks, got 3: use fewer "
            "ranks",
        ),
        (
            4,
            Shard(2),
            None,
            "q must be sharded by heads, (Shard(dim=1),), on the mesh of the plan, got "
            "(Shard(dim=2),) on ",
        ),
        (
            4,
            Replicate(),
            None,
            "q must be sharded by heads, (Shard(dim=1),), on the mesh of the plan, got "
            "(Replicate(),) on ",
        ),
    ],
)
def test_distributed_tensors_that_are_refused(
    groups: Groups,
    heads: int,
    placement: Placement,
    head_top_k: tuple[int, ...] | None,
    message: str,
) -> None:
    for error in groups[2].errors(on_ranks.shard_heads, heads, placement, head_top_k):
        assert error is not None
        assert error.startswith(f"ValueError: {message}")


def test_plan_names_another_module() -> None:
    message = "module must be a MoBAAttention, got Linear: name it in the plan"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        HeadParallel()._apply(torch.nn.Linear(1, 1), cast(Any, None))


def test_context_parallel_of_pytorch(groups: Groups) -> None:
    message = (
        "ValueError: moba_attention must be called outside of torch's context_parallel, got a "
        "call within it: use moba_flex.distributed.context_parallel_attention"
    )
    assert groups[2].errors(on_ranks.enter_context_parallel) == [message] * 2


@pytest.mark.parametrize("kind", ["FLEX", "SDPA"])
def test_hooks_of_context_parallel(groups: Groups, kind: str) -> None:
    message = (
        "ValueError: module must be one that calls flex_attention or "
        "scaled_dot_product_attention for torch's _ContextParallel, got a MoBAAttention: use "
        "moba_flex.distributed.context_parallel_attention"
    )
    assert groups[2].errors(on_ranks.hook_context_parallel, kind) == [message] * 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=MARKS)])
@pytest.mark.parametrize("way", on_ranks.WAYS)
def test_killed_rank_is_an_error(way: str, device: str) -> None:
    with Ranks(2, device=device, timeout=20.0) as ranks:
        ranks.call(on_ranks.call_with, way, {}, {})
        ranks.processes[1].kill()
        ranks.processes[1].join()
        start = time.monotonic()
        (error,) = ranks.errors(on_ranks.call_with, way, {}, {})
        assert error is not None
        assert error.startswith(("RuntimeError", "DistBackendError"))
        assert time.monotonic() - start < 30


def test_rank_that_does_not_call_is_an_error() -> None:
    with Ranks(2, timeout=3.0) as ranks:
        error, none = ranks.errors(on_ranks.attend_alone, "context_parallel")
        assert none is None
        assert error is not None
        assert error.startswith(("RuntimeError", "DistBackendError"))
