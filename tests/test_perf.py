"""The benchmarks count, check and report what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import moba_attention_reference
from perf import plot
from perf.check import check, reference_rows
from perf.peers import PEERS, Unavailable
from perf.shapes import ROWS, TINY, Shape
from perf.timing import machine_info, synced_clock

CPU = torch.device("cpu")


def inputs(shape: Shape, *, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        size = (shape.batch, num_heads, shape.seq_len, shape.head_dim)
        return torch.randn(size, generator=generator).requires_grad_(requires_grad)

    return draw(shape.num_heads), draw(shape.num_kv_heads), draw(shape.num_kv_heads)


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


def test_flops_of_a_dense_shape() -> None:
    shape = Shape("", 1, 2, 2, 8, 4, 8, 1, torch.float32)
    assert shape.density == 1
    assert shape.flops("forward") == 4 * 2 * 4 * 36
    assert shape.flops("backward") == 2.5 * shape.flops("forward")
    assert shape.flops("forward+backward") == 3.5 * shape.flops("forward")


@pytest.mark.parametrize("device", ROWS)
def test_shapes_have_names_of_their_own(device: str) -> None:
    names = [shape.name for shape in [*ROWS[device], TINY]]
    assert len(set(names)) == len(names)


def test_reference_rows_equal_the_oracle() -> None:
    q, k, v = inputs(TINY)
    rows = torch.arange(0, TINY.seq_len, 3)
    expected = moba_attention_reference(
        q, k, v, block_size=TINY.block_size, top_k=TINY.top_k, dtype=torch.float64
    ).out[:, :, rows]
    actual = reference_rows(q, k, v, rows, TINY.block_size, TINY.top_k)
    torch.testing.assert_close(actual, expected.double(), rtol=1e-5, atol=1e-6)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_check_accepts_a_right_answer() -> None:
    found = check(dense, *inputs(TINY, requires_grad=True), TINY, sparse=False)
    assert found["right_rows"] == 1
    assert found["error"] < 1e-5


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


def test_machine_is_described_without_its_name() -> None:
    info = machine_info(CPU)
    assert info["torch"] == torch.__version__
    assert {"device", "cpu", "threads", "python", "triton", "commit"} == info.keys() - {"torch"}
    assert synced_clock() <= synced_clock()


def bench(shape: str, peer: str, stage: str, seconds: float) -> dict[str, Any]:
    info = {"shape": shape, "peer": peer, "stage": stage, "density": 0.25, "tflops": 1.234}
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    stats = {"median": seconds, "iqr": seconds / 100}
    return {"extra_info": info | sizes | {"peak_mib": 2048.0}, "stats": stats}


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
    },
    "benchmarks": [
        bench("8K/512/3", "moba_flex", "forward", 0.1),
        bench("8K/512/3", "moba_flex", "forward+backward", 0.4),
        bench("8K/512/3", "dense", "forward", 1.2345),
    ],
}


def test_table() -> None:
    head, *rows = plot.table(DOCUMENT).splitlines()
    assert head == (
        "**A processor, 2 cores, 2 threads, torch 2.13.0, python 3.11.0, commit abc, 2026-01-02**"
        "; batch 1, 4 query and 2 key heads, head_dim 64, float32"
    )
    assert rows[3:] == [
        "| 8K/512/3, 25.0% | moba_flex | 100 ± 1 | 1.00 | - |  | 400 ± 4 | 1.00 | 1.23 | 2,048 |",
        "| 8K/512/3, 25.0% | dense | 1,234 ± 12 | 12.35 | - |  | - |  | 1.23 | - |",
    ]


@pytest.mark.parametrize(
    ("number", "text"), [(1234.5, "1,234"), (12.345, "12.3"), (1.0, "1.00"), (0.01234, "0.0123")]
)
def test_figures(number: float, text: str) -> None:
    assert plot.figures(number) == text


def test_main_updates_the_readme_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    readme, file = tmp_path / "README.md", tmp_path / "attention_run.json"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    file.write_text(json.dumps(DOCUMENT))
    for _ in range(2):
        plot.main(["--update-readme", str(file)])
        assert readme.read_text() == (
            f"before\n{plot.BEGIN}\n{plot.LEGEND}\n\n{plot.table(DOCUMENT)}\n\n"
            f"![{plot.heading(DOCUMENT)}](attention_run.png)\n{plot.END}\nafter\n"
        )
    assert (tmp_path / "attention_run.png").read_bytes().startswith(b"\x89PNG")
    assert plot.LEGEND in capsys.readouterr().out


def test_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must contain"):
        plot.update(readme, "text")
    assert readme.read_text() == "no markers"
