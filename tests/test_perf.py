"""The benchmarks count, check and report what they say."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import moba_attention, moba_attention_reference
from perf import bench_attention, conftest, errors, parallel, plot, tables, timing
from perf.check import attend_rows, by_head, check, gate, number_keys, relative_errors
from perf.fit import fit
from perf.peers import PEERS, Peer, Unavailable, layout
from perf.shapes import PARTS, ROWS, STAGES, TINY, Shape, draw
from tests.helpers import run_compiled

CPU = torch.device("cpu")


def inputs(shape: Shape, *, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.requires_grad_(requires_grad) for x in draw(shape, CPU))
    return q, k, v


@pytest.mark.parametrize(("seq_len", "block_size", "top_k"), [(64, 16, 3), (61, 8, 4), (7, 9, 2)])
def test_selected_pairs_are_those_of_the_gate(seq_len: int, block_size: int, top_k: int) -> None:
    shape = Shape("", 2, 2, 1, seq_len, 4, block_size, top_k, torch.float32)
    q, k, v = inputs(shape)
    blocks = moba_attention_reference(q, k, v, block_size=block_size, top_k=top_k).blocks
    positions = torch.arange(seq_len)
    pairs = blocks[..., positions // block_size] & (positions <= positions[:, None])
    assert shape.selected_pairs == int(pairs.sum())
    causal = seq_len * (seq_len + 1) // 2 * shape.batch * shape.num_heads
    assert shape.density == pytest.approx(int(pairs.sum()) / causal)
    own = positions // block_size
    scores = 2 * shape.head_dim * int((own < own[:, None])[:, ::block_size].sum()) * 2 * 2
    assert shape.operations("forward") == shape.flops("forward") + scores
    assert shape.operations("backward") == shape.flops("backward")


LAYOUTS: list[dict[str, Any]] = [
    {"documents": 1},
    {"documents": 5},
    {"documents": 16},  # shorter than a block
    {"padding": 70},
    {"padding": 300},  # leaves less than a block
    {"softcap": 2.0},
]


@pytest.mark.parametrize("changed", LAYOUTS)
def test_selected_pairs_are_those_of_the_layout(changed: dict[str, Any]) -> None:
    shape = replace(TINY, **changed)
    options: dict[str, Any] = {"block_size": shape.block_size, "top_k": shape.top_k}
    options |= layout(shape, CPU)
    lse = moba_attention_reference(*inputs(shape), **options, scale=0.0, dtype=torch.float64).lse
    assert shape.selected_pairs == pytest.approx(float(lse.exp().sum()))  # of scores that are 0
    dense = replace(shape, top_k=99)
    assert shape.density == shape.selected_pairs / dense.selected_pairs
    keys = number_keys(shape, shape.block_size, CPU)
    rows = torch.arange(shape.padding, shape.seq_len)
    start = keys.block[torch.searchsorted(keys.document, keys.document[rows])]
    candidates = int((keys.block[rows] - start).sum()) * shape.batch * shape.num_heads
    scores = 2 * shape.head_dim * candidates
    assert shape.operations("forward") == shape.flops("forward") + scores


def test_flops_of_a_dense_shape() -> None:
    shape = Shape("", 1, 2, 2, 8, 4, 8, 1, torch.float32)
    assert shape.density == 1
    assert shape.flops("forward") == 4 * 2 * 4 * 36
    assert shape.flops("backward") == 2.5 * shape.flops("forward")
    assert shape.flops("forward+backward") == 3.5 * shape.flops("forward")


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    q, k, v = inputs(TINY)
    assert TINY.bytes("forward") == sum(x.nbytes for x in (q, k, v, q))
    assert TINY.bytes("backward") == sum(x.nbytes for x in (q, k, v, q, q, q, k, v))
    assert TINY.bytes("forward+backward") == TINY.bytes("forward") + TINY.bytes("backward")


@pytest.mark.parametrize("device", ROWS)
def test_shapes_are_what_they_are_called(device: str) -> None:
    shapes = [TINY, *(shape for rows in ROWS[device].values() for shape in rows)]
    named = {shape.name: shape for shape in shapes}
    for shape in shapes:
        assert named[shape.name] == shape
        if shape != TINY:
            length, *options = shape.name.split()[0].split("/")
            tokens = int(length[:-1]) * {"K": 2**10, "M": 2**20}[length[-1]]
            assert tokens == shape.seq_len
            dense = ["dense"] if shape.dense else [str(shape.block_size), str(shape.top_k)]
            assert options == dense
            assert shape.seq_len == shape.padding + shape.length * max(1, shape.documents)


@pytest.mark.parametrize(
    ("routing", "blocks", "wants"), [("uniform", 1, 0.0), ("one", 1, 1.0), ("skewed", 4, 0.9)]
)
def test_inputs_make_the_gate_choose_what_is_wanted(
    routing: Any, blocks: int, wants: float
) -> None:
    shape = Shape("", 1, 2, 1, 80 * 16, 64, 16, 4, torch.float32, routing)
    q, k, v = inputs(shape)
    chosen = moba_attention_reference(q, k, v, block_size=16, top_k=4).blocks
    picks = chosen[:, :, shape.seq_len // 2 :, :blocks].sum(-1)
    share = (picks == min(blocks, 3)).double().mean().item()
    assert share == pytest.approx(wants, abs=0.08)


@pytest.mark.parametrize("changed", [{}, {"transposed": True}, *LAYOUTS])
def test_gate_and_rows_are_those_of_the_oracle(changed: dict[str, Any]) -> None:
    shape = replace(TINY, **changed)
    q, k, v = inputs(shape)
    rows = torch.arange(shape.padding, shape.seq_len, 3)
    options: dict[str, Any] = {"block_size": shape.block_size, "top_k": shape.top_k}
    options |= {"softcap": shape.softcap, **layout(shape, CPU)}
    out = moba_attention_reference(q, k, v, **options, dtype=torch.float64).out
    keys = number_keys(shape, shape.block_size, CPU)
    for of_q, of_k in by_head(q, k):
        q_rows = q[of_q][:, :, rows]
        blocks = gate(q_rows, k[of_k], rows, keys, shape.top_k)
        actual = attend_rows(q_rows, k[of_k], v[of_k], rows, blocks, keys.block, shape.softcap)
        torch.testing.assert_close(actual, out[of_q][:, :, rows], rtol=1e-9, atol=1e-12)


def test_heads_are_visited_once() -> None:
    q, k, _ = (torch.zeros_like(x) for x in inputs(TINY))
    for of_q, of_k in by_head(q, k):
        q[of_q] += 1
        k[of_k] += 1
        assert q[of_q].shape[1] == 2
    assert (q == 1).all()
    assert (k == 1).all()


def test_relative_errors_are_over_all_heads() -> None:
    exact = torch.tensor([3.0, 4.0]), torch.tensor([1.0])
    heads = [((exact[0] + torch.tensor([1.0, 0.0]), exact[1]), exact), (exact, exact)]
    assert relative_errors(heads) == pytest.approx([1 / math.sqrt(50), 0.0])


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_check_accepts_a_right_answer() -> None:
    found = check(dense, *inputs(TINY, requires_grad=True), TINY, sparse=False)
    assert found["right_rows"] == 1
    assert found["error"] < 1e-5


@pytest.mark.parametrize("changed", LAYOUTS)
def test_check_accepts_what_moba_flex_makes_of_a_layout(changed: dict[str, Any]) -> None:
    shape = replace(TINY, **changed)
    attend = PEERS["moba_flex"].setup(shape, CPU)
    found = check(attend, *inputs(shape, requires_grad=True), shape, sparse=True)
    assert found["right_rows"] == 1


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"documents": 5}, "of the queries are right"),
        ({"padding": 70}, "padding must get zeros"),
        ({"softcap": 50.0}, "of the queries are right"),
    ],
)
def test_check_refuses_an_answer_that_knows_no_layout(changed: dict[str, Any], wrong: str) -> None:
    shape = replace(TINY, **changed)
    with pytest.raises(AssertionError, match=wrong):
        check(PEERS["moba_flex"].setup(TINY, CPU), *inputs(shape), shape, sparse=True)


def test_check_refuses_a_dense_answer_to_a_sparse_question() -> None:
    with pytest.raises(AssertionError, match="of the queries are right"):
        check(dense, *inputs(TINY), TINY, sparse=True)


@pytest.mark.parametrize("name", "qkv")
def test_check_refuses_a_wrong_gradient(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = {"q": q, "k": k, "v": v}
        tensors[name] = tensors[name] + 1e-2 * (tensors[name] - tensors[name].detach())
        return dense(**tensors)

    q, k, v = inputs(TINY, requires_grad=True)
    with pytest.raises(AssertionError, match=f"the gradient of {name} is off by"):
        check(attend, q, k, v, TINY, sparse=False)


@pytest.mark.parametrize("name", ["FlashMoBA", "MoonshotAI MoBA", "SDPA cuDNN, causal"])
def test_peer_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        PEERS[name].setup(TINY, CPU)


def test_peer_whose_kernel_takes_no_such_inputs_is_unavailable() -> None:
    q, k, v = inputs(TINY)
    attend = PEERS["SDPA flash, causal"].setup(TINY, CPU)
    assert attend(q, k, v).shape == q.shape
    with pytest.raises(Unavailable, match="FLASH_ATTENTION takes no such inputs"):
        attend(q, k, v[..., :8])


def test_parts_are_those_of_moba_flex() -> None:
    q, k, v = inputs(TINY)
    calls = bench_attention.part_calls(TINY, q, k, v)
    assert calls.keys() == {*PARTS}
    found: dict[str, Any] = {part: call() for part, call in calls.items()}
    assert found["route"].blocks.shape == (2, 4, 320, 2)
    assert found["regroup"].rank.shape == (2, 2, 2 * 320, 2)
    expected = moba_attention(q, k, v, block_size=TINY.block_size, top_k=TINY.top_k)
    assert torch.equal(found["attend"][0], expected)


def test_set_up_holds_one_subject() -> None:
    first = bench_attention.set_up("moba_flex", TINY, CPU)
    assert bench_attention.set_up("moba_flex", TINY, CPU) is first
    assert bench_attention.set_up("SDPA flash, causal", TINY, CPU) is not first
    assert len(bench_attention._held) == 1


def test_what_is_timed_of_a_group() -> None:
    sweep = list(conftest.timed("sweep", ROWS["cuda"]["sweep"]))
    assert all(shape.dense != PEERS[peer].sparse for shape, peer, _ in sweep)
    assert max(shape.seq_len for shape, peer, _ in sweep if "SDPA" in peer) == 2**18
    assert {stage for _, peer, stage in sweep if peer == "moba_flex"} == {*STAGES, *PARTS}
    grid = list(conftest.timed("map", ROWS["cuda"]["map"]))
    assert {stage for *_, stage in grid} == {"forward+backward"}
    assert [peer for _, peer, _ in grid].count("SDPA cuDNN, causal") == 1
    assert [peer for _, peer, _ in grid].count("moba_flex") == 7 * 6
    layouts = list(conftest.timed("layouts", ROWS["cuda"]["layouts"]))
    assert {(peer, stage) for _, peer, stage in layouts} == {("moba_flex", s) for s in STAGES}
    main = list(conftest.timed("main", ROWS["cuda"]["main"]))
    assert len(main) == 7 * (len(PEERS) * len(STAGES) + len(PARTS))
    assert len(set(main)) == len(main)


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(pytest.UsageError, match="--rows must be one of a, b, got c"):
        conftest.check_known("--rows", ["a", "c"], ["a", "b"])


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_second(run: Any) -> float:
        run()
        return 0.5

    monkeypatch.setattr(timing, "_seconds", half_a_second)
    assert timing.matmul_rate.__wrapped__(CPU, torch.float32) == 2 * 2048**3 / 0.5
    assert timing.copy_rate.__wrapped__(CPU) == 2 * 2**28 / 0.5


def test_a_call_is_timed_by_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 9.0, 10.0, 10.0, 12.0])
    monkeypatch.setattr(timing, "synced_clock", lambda: next(ticks))
    assert timing._seconds(lambda: None, rounds=3) == 2


@pytest.mark.parametrize(("operations", "size", "share"), [(3e12, 1e9, 0.3), (1e12, 5e9, 0.5)])
def test_share_of_the_limit(
    monkeypatch: pytest.MonkeyPatch, operations: float, size: float, share: float
) -> None:
    monkeypatch.setattr(conftest, "matmul_rate", lambda device, dtype: 1e13)
    monkeypatch.setattr(conftest, "copy_rate", lambda device: 1e10)
    config: Any = SimpleNamespace(getoption={"device": "cpu"}.get)
    extra = {"dtype": "float32", "flops": 2e12, "operations": operations, "bytes": size}
    document: dict[str, Any] = {
        "machine_info": {},
        "benchmarks": [
            {"extra_info": extra, "stats": {"median": 1.0, "data": [1.0]}, "params": {}},
            {"extra_info": {"dtype": "float32"}, "stats": {"median": 1.0}, "params": {}},
        ],
    }
    conftest.pytest_benchmark_update_json(config, document)
    assert document["machine_info"] == {"matmul_flops": {"float32": 1e13}, "copy_bytes": 1e10}
    assert extra["tflops"] == 2
    assert extra["limit_share"] == pytest.approx(share)
    assert document["benchmarks"][0]["stats"] == {"median": 1.0}


def test_errors_are_those_of_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "CHUNK", 100)
    found = errors.measure(TINY, CPU)
    assert found["bitwise_equal"]["moba_flex"]
    assert max(found["errors"]["moba_flex"].values()) < 1e-6
    assert max(found["errors"]["SDPA flash, causal"].values()) < 1e-6

    scale = iter([1.01, 1.02])

    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = moba_attention(q, k, v, block_size=TINY.block_size, top_k=TINY.top_k)
        return next(scale) * out

    monkeypatch.setitem(PEERS, "moba_flex", Peer(lambda shape, device: scaled, sparse=True))
    found = errors.measure(TINY, CPU)
    assert not found["bitwise_equal"]["moba_flex"]
    for result, error in found["errors"]["moba_flex"].items():
        assert error == pytest.approx(0.01, rel=1e-2)
        ratio = error / found["errors"]["SDPA flash, causal"][result]
        assert found["errors"]["ratio"][result] == pytest.approx(ratio)


def test_errors_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "errors.json"
    errors.main(["--device", "cpu", "--json", str(file)])
    document = json.loads(file.read_text())
    assert document["shape"] == "tiny"
    assert document["errors"]["ratio"].keys() == {"out", "dq", "dk", "dv"}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["tiny:", "moba_flex", "SDPA", "ratio", "two"]
    assert "'moba_flex': True" in printed[-1]


@pytest.mark.slow
def test_a_run_holds_what_is_shown_of_it(tmp_path: Path) -> None:
    file = tmp_path / "attention_run.json"
    options = ["-q", "--device=cpu", "--rows=tiny", "--seconds=0.01", "-k", "moba_flex-"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "perf", *options, f"--benchmark-json={file}"],
        cwd=plot.ROOT,
        check=True,
        capture_output=True,
        # Benchmarks take a process of xdist for one in which nothing is timed.
        env={key: x for key, x in os.environ.items() if not key.startswith("PYTEST_XDIST")},
    )
    document = json.loads(file.read_text())
    stages = tables.group(document["benchmarks"])["tiny"]["moba_flex"]
    assert stages.keys() == {*STAGES, *PARTS}
    assert all(bench["stats"]["rounds"] >= 3 for bench in stages.values())
    assert all("limit_share" in stages[stage]["extra_info"] for stage in STAGES)
    info = stages["forward"]["extra_info"]
    assert (info["rows"], info["dtype"], info["seq_len"]) == ("tiny", "float32", 320)
    assert "moba_flex" in tables.table(document["benchmarks"])
    assert tables.is_plain(stages)


def test_machine_is_described_without_its_name() -> None:
    info = timing.machine_info(CPU)
    assert info["torch"] == torch.__version__
    assert {"device", "cpu", "threads", "python", "triton", "commit"} == info.keys() - {"torch"}
    assert timing.synced_clock() <= timing.synced_clock()


def bench(shape: str, peer: str, stage: str, seconds: float, **changed: Any) -> dict[str, Any]:
    info = {"shape": shape, "peer": peer, "stage": stage, "density": 0.25, "tflops": 1.234}
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    stats = {"median": seconds, "iqr": seconds / 100}
    return {"extra_info": info | sizes | {"peak_mib": 2048.0} | changed, "stats": stats}


MAIN = [
    bench("8K/512/3", "moba_flex", "forward", 0.1, limit_share=0.5),
    bench("8K/512/3", "moba_flex", "backward", 0.25, tflops=2.0, limit_share=0.25),
    bench("8K/512/3", "moba_flex", "forward+backward", 0.4),
    bench("8K/512/3", "moba_flex", "route", 0.01),
    bench("8K/512/3", "moba_flex", "regroup", 0.02),
    bench("8K/512/3", "moba_flex", "attend", 0.09),
    bench("8K/512/3", "dense", "forward", 1.236),
]


_LAYOUT = {"rows": "layouts", "documents": 0, "padding": 0, "softcap": None}
LAID_OUT = [
    bench("8K/128/8 padded", "moba_flex", "forward", 0.2, **_LAYOUT | {"padding": 1024}),
    bench("8K/128/8 padded", "moba_flex", "forward+backward", 0.39, **_LAYOUT | {"padding": 1024}),
    bench("8K/128/8", "moba_flex", "forward", 0.1, **_LAYOUT),
    bench("8K/128/8", "moba_flex", "backward", 0.25, **_LAYOUT),
    bench("8K/128/8", "moba_flex", "forward+backward", 0.3, **_LAYOUT),
]


def sweep() -> list[dict[str, Any]]:
    """Make up a sweep: attention 10 ns a token, routing 1 ns and 10 ps a block and 10 us."""
    benches = []
    for length in (2**14, 2**15, 2**16, 2**17):
        name, options = f"{length // 1024}K", {"seq_len": length, "rows": "sweep"}
        times = {
            "forward": 12e-9 * length,
            "backward": 20e-9 * length,
            "forward+backward": 30e-9 * length,
            "attend": 10e-9 * length,
            "route": 1e-5 + (1e-9 + 10e-12 * length / 128) * length,
        }
        for stage, time in times.items():
            sizes = options | {"block_size": 128, "top_k": 8, "peak_mib": length / 64}
            benches.append(bench(f"{name}/128/8", "moba_flex", stage, time, **sizes))
        for peer in ("SDPA flash, causal", "SDPA cuDNN, causal"):
            if length <= 2**16:
                sizes = options | {"block_size": length, "top_k": 1, "peak_mib": length / 32}
                benches += [
                    bench(f"{name}/dense", peer, stage, 1e-12 * length**2, **sizes)
                    for stage in STAGES
                ]
    return benches


def grid() -> list[dict[str, Any]]:
    both, sizes = "forward+backward", {"seq_len": 2**16, "rows": "map"}
    cells = [
        bench(
            f"64K/{size}/{top_k}", "moba_flex", both, time, block_size=size, top_k=top_k, **sizes
        )
        for size, top_k, time in ((512, 3, 0.5), (64, 2, 0.1), (64, 3, 0.2))
    ]
    dense = sizes | {"block_size": 2**16, "top_k": 1}
    return [bench("64K/dense", "SDPA cuDNN, causal", both, 1.0, **dense), *cells]


DOCUMENT: dict[str, Any] = {
    "datetime": "2026-01-02T03:04:05",
    "machine_info": {
        "device": "cpu",
        "cpu": "A processor, 2 cores",
        "threads": 2,
        "python": "3.11.0",
        "torch": "2.13.0",
        "triton": None,
        "commit": "abc",
        "matmul_flops": {"float32": 1.5e11},
        "copy_bytes": 2e10,
    },
    "benchmarks": [*MAIN, *sweep(), *grid(), *LAID_OUT],
}


def test_heading() -> None:
    assert tables.heading(DOCUMENT) == (
        "A processor, 2 cores, 2 threads, torch 2.13.0, python 3.11.0, commit abc, 2026-01-02"
    )
    assert tables.rates(DOCUMENT) == "; float32 matrix product 0.15 TFLOP/s; copy 20 GB/s"
    assert tables.rates({"machine_info": {}}) == ""
    usual = "batch 1, 4 query and 2 key heads, head_dim 64, float32"
    assert tables.sizes(MAIN) == usual
    other = bench("8K/512/3 batch 2", "moba_flex", "forward", 0.1, batch=2)
    assert tables.sizes([*MAIN, other]) == f"{usual} unless a shape says otherwise"


def test_table() -> None:
    assert tables.table_and_parts(MAIN).splitlines()[2:] == [
        "| 8K/512/3, 25.0% | moba_flex | 100 ± 1 | 1.00 | 250 ± 2 | 1.00 | 400 ± 4 | 1.00 "
        "| 1.23 / 2 | 50.0% / 25.0% | 2,048 |",
        "| 8K/512/3, 25.0% | dense | 1,236 ± 12 | 12.36 | - |  | - |  | 1.23 / - | - / - | - |",
        "",
        "| moba_flex, parts of forward | route ms | regroup ms | attend ms |",
        "| --- | --- | --- | --- |",
        "| 8K/512/3 | 10.0 ± 0.1 | 20.0 ± 0.2 | 90.0 ± 0.9 |",
    ]
    assert tables.table_and_parts(MAIN[:3]) == tables.table(MAIN[:3])


def test_short_table() -> None:
    both = "forward+backward"
    peers = [
        bench("8K/512/3", "SDPA cuDNN, causal", "forward", 0.05),
        bench("8K/512/3", "SDPA cuDNN, causal", both, 0.6),
        bench("8K/512/3", "SDPA flash, causal", "forward", 0.3),
        bench("16K/512/3", "SDPA flash, causal", "forward", 9.0),  # not of moba_flex
    ]
    flex = bench("64K/512/3", "FlexAttention, causal", both, 5.0)
    longer = [bench("64K/512/3", "moba_flex", stage, 0.5) for stage in ("forward", both)]
    assert tables.short_table([*peers, *MAIN, flex, *longer]).splitlines() == [
        "| shape | forward ms | backward ms | forward+backward ms "
        "| x cuDNN | x flash | x FlexAttention |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 8K/512/3, 25.0% | 100 ± 1 | 250 ± 2 | 400 ± 4 | 0.50 / 1.50 | 3.00 / - | - |",
        "| 64K/512/3, 25.0% | 500 ± 5 | - | 500 ± 5 | - | - | - / 10.00 |",
    ]
    many = [bench(f"{n}K/512/3", "moba_flex", "forward", 0.1) for n in range(20)]
    assert len(tables.short_table(many).splitlines()) == 2 + 8


def test_layouts_table() -> None:
    assert tables.layouts_table(LAID_OUT).splitlines() == [
        "| layout | forward ms | x plain | backward ms | x plain "
        "| forward+backward ms | x plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 8K/128/8 padded | 200 ± 2 | 2.00 | - |  | 390 ± 4 | 1.30 |",
        "| 8K/128/8 | 100 ± 1 | 1.00 | 250 ± 2 | 1.00 | 300 ± 3 | 1.00 |",
    ]
    assert "1.00" not in tables.layouts_table(LAID_OUT[:2])


def test_sweep_table() -> None:
    titles, _, *rows = tables.sweep_table(sweep()).splitlines()
    assert titles.split(" | ")[-2:] == ["MiB", "MiB, SDPA flash |"]
    assert rows[2:4] == [
        "| 64K/128/8 | 0.786 ± 0.008 | 5.46 | 1.31 ± 0.01 | 3.28 | 1.97 ± 0.02 | 2.18 "
        "| 1,024 | 2,048 |",
        "| 128K/128/8 | 1.57 ± 0.02 | ~10.92 | 2.62 ± 0.03 | ~6.55 | 3.93 ± 0.04 | ~4.37 "
        "| 2,048 | ~4,096 |",
    ]
    assert rows[-1].startswith("- 128/8: attention 10 ns a token, +0.0% at each doubling; ")


def test_map_table() -> None:
    assert tables.map_table(grid()).splitlines() == [
        "| forward+backward, x cuDNN | top_k 2 | top_k 3 |",
        "| --- | --- | --- |",
        "| block_size 64 | 10.00 | 5.00 |",
        "| block_size 512 | - | 2.00 |",
    ]


def test_fit() -> None:
    lengths = [2**12, 2**14, 2**16, 2**18, 2**20]
    attend = {n: 10e-9 * n for n in lengths} | {2**12: 1.0}  # too short to count
    route = {n: 1e-5 + (1e-9 + 20e-12 * n / 64) * n for n in lengths}
    found = fit(attend, route, 64)
    assert found is not None
    assert found.attend == pytest.approx(10e-9)
    assert found.growth == pytest.approx(0, abs=1e-9)
    assert found.route_call == pytest.approx(1e-5)
    assert found.route == pytest.approx(1e-9)
    assert found.route_block == pytest.approx(20e-12)
    assert found.misfit < 1e-6
    assert found.overtakes == pytest.approx(9e-9 / 20e-12 * 64)
    assert str(found) == (
        "attention 10 ns a token, +0.0% at each doubling; routing 1 ns and 20 ps for each block, "
        "beside 0.01 ms, within 0%; overtakes at 28,800 tokens"
    )


def test_fit_tells_growth_and_misfit() -> None:
    lengths = [2**14, 2**16, 2**18, 2**20]
    attend = {n: (1 + (math.log2(n) - 17) / 10) * n for n in lengths}
    route = {n: 1.0 * n for n in lengths} | {2**16: 1.2 * 2**16}
    found = fit(attend, route, 128)
    assert found is not None
    assert found.growth == pytest.approx(0.1)
    assert 0.05 < found.misfit < 0.2
    assert fit(attend, {n: route[n] for n in lengths[:3]}, 128) is None


def test_routing_that_does_not_grow_never_overtakes() -> None:
    times = dict.fromkeys((2**14, 2**15, 2**16, 2**17), 1.0)
    found = fit(times, times, 128)
    assert found is not None
    assert found.overtakes > 2**40  # up to rounding


@pytest.mark.parametrize(
    ("number", "text"), [(1234.5, "1,234"), (12.345, "12.3"), (1.0, "1.00"), (0.01234, "0.0123")]
)
def test_figures(number: float, text: str) -> None:
    assert tables.figures(number) == text


def test_main_updates_both_pages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    for name, path in (("RESULTS", tmp_path), ("README", readme), ("PAGE", page)):
        monkeypatch.setattr(plot, name, path)
    for path in (readme, page):
        path.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    (tmp_path / "attention_run.json").write_text(json.dumps(DOCUMENT))
    title, rates = tables.heading(DOCUMENT), tables.rates(DOCUMENT)
    sections = []
    for kind, picture, benches, write in (
        ("main", "attention_run.png", MAIN, tables.table_and_parts),
        ("layouts", None, LAID_OUT, tables.layouts_table),
        ("map", "attention_run_map.png", grid(), tables.map_table),
        ("sweep", "attention_run_sweep.png", sweep(), tables.sweep_table),
    ):
        head = f"**{title}**{rates}; {tables.sizes(benches)}"
        sections += [f"## {plot.KINDS[kind].title}", plot.KINDS[kind].legend, head, write(benches)]
        sections += [f"![{title}]({picture})"] if picture else []
    head = f"**{title}**; {tables.sizes(MAIN)}"
    short = "\n\n".join([plot.SHORT_LEGEND, head, tables.short_table(MAIN)])
    whole = "\n\n".join(sections)
    for _ in range(2):
        plot.main(["--update"])
        assert readme.read_text() == f"before\n{plot.BEGIN}\n{short}\n{plot.END}\nafter\n"
        assert page.read_text() == f"before\n{plot.BEGIN}\n{whole}\n{plot.END}\nafter\n"
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["attention_run.png", "attention_run_map.png", "attention_run_sweep.png"]
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert whole in capsys.readouterr().out


def test_pages_are_not_made_from_some_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot.main(["--update", "attention_run.json"])
    assert "FILE must not be given with --update" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "kind"),
    [("dense", "sweep"), ("variants", "variants"), ("tiny", "main"), (None, "main")],
)
def test_kinds(rows: str | None, kind: str) -> None:
    assert plot.kind_of(bench("64K/dense", "moba_flex", "forward", 0.1, rows=rows)) == kind


def test_pages_show_the_figures_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: getattr(plot, name).read_text() for name in ("README", "PAGE")}
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(plot, name, tmp_path / name)
    for name, kind in plot.KINDS.items():
        if kind.draw:
            monkeypatch.setitem(plot.KINDS, name, kind._replace(draw=lambda *args: None))
    plot.main(["--update"])
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    table = kept["README"].partition(plot.BEGIN)[2].partition(plot.END)[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert 2 < len(rows) <= 2 + tables.MOST_ROWS


def test_only_what_a_run_holds_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "attention_map.json"
    file.write_text(json.dumps(DOCUMENT | {"benchmarks": grid()}))
    plot.main([str(file)])
    assert [path.name for path in tmp_path.glob("*.png")] == [
        "attention_map.png"
    ]  # the name says it
    assert tables.map_table(grid()) in capsys.readouterr().out


def test_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must contain"):
        plot.update(readme, "text")
    assert readme.read_text() == "no markers"


def test_ranks_are_timed_beside_one_process(tmp_path: Path) -> None:
    sizes = ["--seq-len", "256", "--heads", "8", "--kv-heads", "2", "--dim", "16"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "perf.parallel"]
    out = tmp_path / "parallel.json"
    subprocess.run(
        [sys.executable, *command, *sizes, "--rounds", "1", "--out", str(out)],
        check=True,
        timeout=300,
        cwd=timing.ROOT,
        capture_output=True,
    )
    links, *rows = json.loads(out.read_text())["rows"]
    assert all(ms > 0 for of_size in links["collectives"].values() for ms in of_size.values())
    assert [row["gate"] for row in rows] == ["128/8", "512/3", "dense"]
    for row in rows:
        assert row["ranks"] == 4
        ways = ["one", "context parallel", "ulysses"]
        if row["gate"] == "dense":
            ways.remove("context parallel")
        for way in ways:
            assert 0 < row[way]["forward"] < row[way]["both"]
        for way in ways[1:]:
            share = row["one"]["both"] / 4 / row[way]["both"]
            assert row[way]["efficiency"]["both"] == pytest.approx(share)


def test_rows_past_the_budget_are_left_out() -> None:
    """A row of four times the length takes 16 times as long, a dense one that is long once."""
    options = parallel.parser().parse_args(["--rounds", "3"])
    gated = {"gate": "128/8", "seq_len": 2**16, "one": {"both": 10.0}, "ulysses": {"both": 5.0}}
    dense: dict[str, Any] = {"gate": "dense", "seq_len": 2**18, "one": {"both": 3e3}}
    dense |= {"ulysses": {"both": 2e3}, "PyTorch, ring": {"both": 2e3}}
    rows: list[dict[str, Any]] = [
        {"collectives": {}},
        gated,
        dense | {"PyTorch, all-gather": {"both": 1e3}},
    ]
    seconds = parallel.seconds_of
    assert seconds(rows, "512/3", 2**18, options) == 0
    assert seconds(rows, "128/8", 2**18, options) == pytest.approx(4 * 16 * 0.015)
    assert seconds(rows, "128/8", 2**21, options) == pytest.approx(2 * 1024 * 0.015 + 2 * 2)
    assert seconds(rows, "dense", 2**19, options) == pytest.approx(4 * 1 + 2)
    assert seconds(rows, "dense", 2**20, options) == pytest.approx(16)


def test_a_way_that_fails_is_named() -> None:
    def fail() -> torch.Tensor:
        raise torch.OutOfMemoryError("too little")

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        figures = parallel.measure(fail, [], 1, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert figures == {"error": "OutOfMemoryError: too little"}


@pytest.mark.slow
def test_other_tiles_of_a_kernel_on_no_gpu() -> None:
    """The kernel that keeps the maximum of its first tile skips what updates it in later ones."""
    pytest.importorskip("triton")
    said = run_compiled("-m", "perf.tiles", "pair_forward", "64,32,4,2", "64,32,4,2,128")
    found = [list(map(int, re.findall(r"\d+", line))) for line in said.splitlines()]
    for line, tiles in zip(found, ([64, 32, 4, 2], [64, 32, 4, 2, 128]), strict=True):
        assert line[: len(tiles)] == tiles
        registers, _, shared, least, most = line[len(tiles) :]
        assert registers <= (tiles[4] if len(tiles) > 4 else 255)
        assert shared <= 227 * 1024
        assert 1.2 * least < most < 2 * least
