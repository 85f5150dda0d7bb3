"""Packages: what is in them is MoBA, at any length, with neither moba_flex nor Python."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.cpp_builder import cpp_compiler_search
from torch._inductor.utils import IndentedBuffer
from torch.utils._ordered_set import OrderedSet
from torch.utils.cpp_extension import CUDA_HOME

from moba_flex import MoBAAttention, moba_attention, route
from moba_flex.compile import export, load
from moba_flex.compile import package as packages
from moba_flex.compile.cpu import attend_portable
from moba_flex.compile.exporter import worst_error, writers_told_apart
from moba_flex.masks import router
from moba_flex.masks.layout import Layout
from moba_flex.masks.pool import pool
from tests.case import Case, lay_out
from tests.helpers import assert_matches_oracle, cases, run_script

ROOT = Path(__file__).parents[1]
UNSEEN = (1, 40, 333, 1024, 2500)


class Attention(nn.Module):
    """Self-attention; `[B, length, 64]` to the same."""

    def __init__(self, inputs: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.inputs = inputs or {}
        self.attend = MoBAAttention(**{"block_size": 32, "top_k": 4, **options})
        self.qkv, self.out = nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (8, 16)).transpose(1, 2)
        q, k, v = heads.split((4, 2, 2), dim=1)
        return self.out(self.attend(q, k, v, **self.inputs).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Two layers and their residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [Attention(top_k=3), Attention(block_size=16, top_k=5, sink_blocks=1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (64,)))
        return x


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(length))


def heads(q_len: int, kv_len: int) -> tuple[Tensor, ...]:
    return Case(1, 2, 2, q_len, kv_len, seed=q_len).inputs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def layers_package(folder: Path) -> Path:
    # An example of one token, which is one block, must set no limit.
    path = folder / "layers.pt2"
    return export(made(Layers), tokens(1), path=path, dynamic_batch=True)


@pytest.fixture(scope="module")
def static_package(folder: Path) -> Path:
    path = folder / "static.pt2"
    return export(made(Attention), tokens(300), path=path, dynamic_length=False)


# What takes the place of the Python ops.


@given(case=cases())
def test_portable_gate_is_the_gate(case: Case) -> None:
    q, k, _ = case.inputs()
    want = route(q, k, **case.gate)
    layout = Layout(case.q_len, case.kv_len, case.block_size, case.causal)
    numbers = case.top_k - 1, case.block_size, case.sink_blocks, case.local_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "_CHUNK", case.q_len)
        got = router.choose_portable(q, pool(k, layout), layout, numbers)
    picks = want.blocks.shape[3]
    assert torch.equal(got[..., :picks], want.blocks)
    assert (got[..., picks:] == want.num_blocks).all()


@pytest.mark.parametrize("causal", [True, False])
def test_portable_gate_goes_chunk_by_chunk(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 2, 2, 130, 200, block_size=8, top_k=5, ties=True, causal=causal)
    q, k, _ = case.inputs()
    monkeypatch.setattr(router, "_CHUNK", 32)
    layout = Layout(130, 200, 8, causal)
    got = router.choose_portable(q, pool(k, layout), layout, (4, 8, 0, 0))
    assert torch.equal(got, route(q, k, **case.gate).blocks)


@pytest.mark.usefixtures("poison")
@settings(max_examples=settings().max_examples // 2)
@given(case=cases())
def test_portable_attention_is_the_oracle(case: Case) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        return attend_portable(q, k, v, route(q, k, **case.gate), scale=scale)

    assert_matches_oracle("portable", case, attend, backward=False)


@pytest.mark.parametrize("plant", ["q=nan", "q*=inf", "k=nan", "k=-inf", "v=nan", "v*=inf"])
def test_portable_attention_shows_what_is_not_finite(plant: str) -> None:
    for block_size, causal in ((1, True), (8, True), (24, False)):
        case = Case(2, 2, 2, 30, 40, block_size=block_size, top_k=2, causal=causal)
        case = replace(case, plants=(plant,))

        def attend(q: Tensor, k: Tensor, v: Tensor, case: Case = case) -> tuple[Tensor, Tensor]:
            return attend_portable(q, k, v, route(q, k, **case.gate), scale=case.factor)

        assert_matches_oracle("portable, planted", case, attend, backward=False)


# Packages.


def run_alone(
    package: Path, inputs: Sequence[tuple[Tensor, ...]], module: nn.Module
) -> list[float]:
    """Return how far off a package is in a process that cannot import moba_flex."""
    file = package.with_suffix(".cases")
    with torch.no_grad():
        torch.save([(x, module(*x)) for x in inputs], file)
    command = [sys.executable, "tests/run_package.py", str(package), str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    worst: list[float] = json.loads(done.stdout)
    return worst


@pytest.mark.slow
def test_layers_of_any_length_and_batch(layers_package: Path) -> None:
    inputs = [(tokens(length, batch),) for length in UNSEEN for batch in (1, 2, 5)]
    assert max(run_alone(layers_package, inputs, made(Layers))) < 1e-5


@pytest.mark.slow
def test_packages_show_what_is_not_finite(layers_package: Path) -> None:
    package, module, x = load(layers_package), made(Layers), tokens(100)
    x[1, 70, 3] = torch.nan
    assert worst_error(module, package, (x,)) < 1e-5
    assert not package(x)[1, 70].isfinite().any()


@pytest.mark.slow
def test_attention_of_one_length(static_package: Path) -> None:
    assert max(run_alone(static_package, [(tokens(300),)], made(Attention))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "kind"), [("layers_package", Layers), ("static_package", Attention)]
)
def test_inputs_lie_anywhere(
    fixture: str, kind: type[nn.Module], request: pytest.FixtureRequest
) -> None:
    package = load(request.getfixturevalue(fixture))
    # The same each time: among new ones, a layer may round to a tie that another breaks.
    room = torch.randn(2, 400, 65, generator=torch.Generator().manual_seed(0))
    for x in (
        room[:, 5:305, 1:],  # of longer rows
        room[:, :300, :64].transpose(0, 1).contiguous().transpose(0, 1),
        room[:, :300, :64].mT.contiguous().mT,
        room[:1, :300, :64].expand(2, 300, 64),
    ):
        assert worst_error(made(kind), package, (x,)) < 1e-5


@pytest.mark.slow
def test_fewer_queries_than_keys(folder: Path) -> None:
    path = folder / "parts.pt2"
    module = MoBAAttention(block_size=32, top_k=4, local_blocks=1).eval()
    example = [lay_out(x.requires_grad_(), "sliced") for x in heads(100, 300)]
    package = load(export(module, example, path=path))
    for q_len, kv_len in ((1, 1), (1, 700), (77, 500), (640, 700), (1000, 1000)):
        assert worst_error(module, package, heads(q_len, kv_len)) < 1e-5
    q, k, v = heads(10, 300)
    with pytest.raises(ValueError, match="v must have size 300 in dimension 2, like the inputs"):
        package(q, k, v[:, :, :299])


@pytest.mark.slow
def test_language_model_alone(tmp_path: Path) -> None:
    """Routing, rotary embeddings and masks of transformers; relative to the largest logit."""
    pytest.importorskip("transformers")
    from moba_flex import MoBAConfig
    from moba_flex.integrations.prefill import Prefill
    from moba_flex.integrations.transformers import apply
    from tests.test_transformers import build

    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 4096}
    model = build("Llama", **sizes, initializer_range=0.3)  # roundings move logits by 4e-6 at most
    module = Prefill(apply(model, MoBAConfig(block_size=32, top_k=4, sink_blocks=1))).eval()

    def ids(length: int, seed: int) -> Tensor:
        return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(seed))

    path = export(module, ids(300, 0), path=tmp_path / "m.pt2", dynamic_batch=True)
    inputs = [(ids(length, 1),) for length in UNSEEN]
    # The example is one row.
    inputs += [(ids(333 * batch, 2).view(batch, 333),) for batch in (2, 5)]
    with torch.no_grad():
        largest = [module(*x).abs().max().item() for x in inputs]
    errors = run_alone(path, inputs, module)
    assert max(error / most for error, most in zip(errors, largest, strict=True)) < 1e-4


class Scaled(nn.Module):
    """Attention whose queries and keys the compiler makes itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attention(q * 0.9, k * 1.1, v, block_size=32, top_k=4)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="before 2.13 sums leave out roundings")
def test_blocks_chosen_in_bfloat16_are_the_same(folder: Path) -> None:
    """A compiler that leaves out a rounding chooses others in one row of 300."""
    inputs = [x.bfloat16() for x in heads(600, 600)]
    path = folder / "bfloat16.pt2"
    package = load(export(made(Scaled), inputs, path=path, dynamic_length=False))
    assert worst_error(made(Scaled), package, inputs) < 0.01


@pytest.mark.slow
def test_package_says_what_it_is(layers_package: Path, static_package: Path) -> None:
    package = load(layers_package)
    metadata = package.metadata
    assert metadata.torch == torch.__version__
    assert metadata.device == "cpu"
    names = "plan", "block_size", "top_k", "sink_blocks", "calls"
    assert [tuple(call[name] for name in names) for call in metadata.attention] == [
        ("routed", 32, 3, 0, 1),
        ("routed", 16, 5, 1, 1),
    ]
    (spec,) = metadata.inputs
    assert (spec.name, spec.dtype, spec.shape[2]) == ("x", "float32", 64)
    assert [bounds for _, *bounds in spec.varying] == [[1, 2**10], [1, 2**20]]
    assert load(static_package).metadata.inputs[0].shape == (2, 300, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (tokens(50)[:0], ValueError, "x must have size 1 to 1024 in dimension 0, got 0"),
        (tokens(50).double(), TypeError, "x must be torch.float32, got torch.float64"),
        (tokens(50)[0], ValueError, "x must have 3 dimensions, got shape"),
        (tokens(50).to("meta"), ValueError, "x must be on cpu, got meta"),
        (tokens(50)[:, :0], ValueError, "x must have size 1 to 1048576 in dimension 1, got 0"),
        ("x", TypeError, "x must be a Tensor, got str"),
    ],
)
def test_package_refuses_inputs(
    wrong: Any, error: type[Exception], message: str, layers_package: Path
) -> None:
    package = load(layers_package)
    with pytest.raises(error, match=message):
        package(wrong)
    with pytest.raises(TypeError, match="inputs must be 1, got 2"):
        package(tokens(50), tokens(50))


@pytest.mark.slow
def test_package_names_the_option_that_takes_other_sizes(static_package: Path) -> None:
    package = load(static_package)
    for wrong, message in (
        (tokens(300, batch=3), "size 2 in dimension 0, got 3: export with dynamic_batch=True"),
        (tokens(50), "size 300 in dimension 1, got 50: export with dynamic_length=True"),
        (tokens(300)[..., :63], "size 64 in dimension 2, got 63"),
    ):
        with pytest.raises(ValueError, match=f"^x must have {message}$"):
            package(wrong)


@pytest.mark.slow
def test_load_refuses_what_is_damaged(layers_package: Path, tmp_path: Path) -> None:
    content = layers_package.read_bytes()
    path = tmp_path / "damaged.pt2"
    for damaged in (content[: len(content) // 2], content[:-10], b"", b"no archive at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path must be a whole .pt2 package, got .*copy or"):
            load(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"path must be a whole .pt2 package, got .*copy or"):
        load(path)


@pytest.mark.slow
def test_load_refuses_other_machines(
    layers_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        with pytest.raises(ValueError, match=r"PyTorch must be .* for .*, got 2.99.0: export"):
            load(layers_package)
    with pytest.raises(ValueError, match=r"device must be cpu or a CUDA device of this mach.*'x'"):
        load(layers_package, device="x")
    assert load(layers_package, device="cpu:0").device == torch.device("cpu")
    if packages._capability(torch.device("cpu")) != "DEFAULT":
        monkeypatch.setattr(packages, "_capability", lambda _: "DEFAULT")
        with pytest.raises(ValueError, match=r"cpu must have .* for .*, got DEFAULT: export"):
            load(layers_package)
    made = packages.read_metadata(layers_package)
    monkeypatch.setattr(packages, "read_metadata", lambda _: replace(made, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"device must be cuda for .*, got cpu: export the"):
        load(layers_package, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"machine must have a CUDA device for .*, got none"):
        load(layers_package)


def test_load_refuses_what_is_foreign(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path must be a file, got"):
        load(tmp_path / "nowhere.pt2")
    path = tmp_path / "foreign.pt2"
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match=r"path must be a package that moba_flex.compile.export"):
        load(path)


def test_metadata_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="another version of moba_flex wrote it"):
        packages.Metadata.from_strings({"moba_flex": '{"format": 99}'})


def test_declarations_of_other_buffers_are_made_anew() -> None:
    """A bound method that is gone may have had the id of the next one."""
    wrapper = CppWrapperCpu.__new__(CppWrapperCpu)
    wrapper.codegen_int_array_var_cache = {}
    wrapper.declared_int_array_vars = OrderedSet()
    wrapper.int_array_id = count()
    buffers = [IndentedBuffer() for _ in range(20)]
    with writers_told_apart():
        for buffer in buffers * 2:
            wrapper.codegen_int_array_var("{2, 3}", buffer.writeline, known_statically=True)
    assert all(buffer.getvalue().count("{2, 3}") == 1 for buffer in buffers)


# What cannot be exported.


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Fixed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, 300, 64))


@torch.library.custom_op("moba_flex_test::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class FixedBatch(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.new_zeros(2, 1, 1))


class WithPython(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(double(x))


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (Attention, {"path": "m.onnx"}, ValueError, "path must end in .pt2, got .onnx: ONNX has"),
        (Attention, {"path": "m.zip"}, ValueError, "path must end in .pt2, got 'm.zip'"),
        (Attention, {"example": ()}, ValueError, "example must hold a tensor, got none"),
        (Attention, {"example": (3,)}, TypeError, "example must hold tensors, got int"),
        (Attention, {"example": None}, TypeError, "example must be a Tensor .* got NoneType"),
        (
            Attention,
            {"example": tokens(0)},
            ValueError,
            r"not empty, got shape \(2, 0, 64",
        ),
        (Attention, {"example": tokens(5, 0)}, ValueError, r"not empty, got shape \(0, 5, 64"),
        (
            Attention,
            {"example": torch.zeros(1, 1, 64).expand(1, 2**20 + 1, 64)},
            ValueError,
            r"example must have at most 1048576 in dimension 1, got shape \(1, 1048577, 64",
        ),
        (
            Attention,
            {"example": torch.zeros(1, 1, 64).expand(1025, 1, 64), "dynamic_batch": True},
            ValueError,
            "example must have at most 1024 in dimension 0",
        ),
        (Attention, {"device": "meta"}, ValueError, "device must be cpu or a CUDA .* got 'meta'"),
        (Attention, {"device": "abacus"}, ValueError, "must be cpu or a CUDA .* got 'abacus'"),
        (
            Attention,
            {"device": f"cuda:{torch.cuda.device_count()}"},
            ValueError,
            "device must be cpu or a CUDA device of this machine, got 'cuda:",
        ),
        (Attention, {"example": tokens(9).to("meta")}, ValueError, "be cpu or cuda, got meta"),
        (
            Attention,
            {"example": (tokens(9), tokens(9).to("meta"))},
            ValueError,
            "module and example must be on one device, got cpu and meta: pass device",
        ),
        (Plain, {}, ValueError, "module must call moba_attention, got a module that does not"),
        (Fixed, {}, ValueError, r"module must take any length, got: .* pass dynamic_length=False"),
        (
            FixedBatch,
            {"dynamic_batch": True},
            ValueError,
            r"must take any length and batch, got: .* pass dynamic_length=False or dynamic_b",
        ),
        (
            FixedBatch,
            {"dynamic_batch": True, "dynamic_length": False},
            ValueError,
            r"module must take any batch, got: .* pass dynamic_batch=False",
        ),
        (WithPython, {}, ValueError, "module must use ops that run without Python, got moba_flex"),
    ],
)
def test_export_refuses(
    module: type[nn.Module],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    arguments = {"example": tokens(300), "path": tmp_path / "m.pt2", **options}
    with pytest.raises(error, match=message):
        export(made(module), arguments.pop("example"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_modules(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got function"):
        export(lambda x: x, tokens(300), path=tmp_path / "m.pt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="module must be in eval mode, got training mode"):
        export(Attention(), tokens(300), path=tmp_path / "m.pt2")
    with pytest.raises(TypeError, match=r"q must be .* got torch.float64: convert"):
        export(made(Attention).double(), tokens(300).double(), path=tmp_path / "m.pt2")


def test_export_finds_first_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.pt2")
    for path, message in (
        (tmp_path / "folder.pt2", "path must be a file, got a folder: "),
        (tmp_path / "pipe.pt2", "path must be a file, got a device or a pipe: "),
        (tmp_path / "file" / "m.pt2", "path must be writable, got .*: Not a directory"),
        (tmp_path / ("m" * 300 + ".pt2"), "path must be writable, got .*: File name too long"),
        ("/proc/m.pt2", "path must be writable, got '/proc/m.pt2': "),
    ):
        with pytest.raises(ValueError, match=message):
            export(made(Plain), tokens(300), path=path)  # which would be refused once traced


def test_export_finds_first_that_there_is_no_compiler(tmp_path: Path) -> None:
    cpp_compiler_search.cache_clear()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/none/c++",)}),
        pytest.raises(ValueError, match=r"must have a C\+\+ compiler .* got none: .* CXX"),
    ):
        export(made(Plain), tokens(300), path=tmp_path / "m.pt2")


def test_exports_of_two_threads_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change PyTorch for as long as they run."""
    running = []

    def compile_slowly(program: object, *, package_path: str, **options: object) -> None:
        running.append(threading.get_ident())
        time.sleep(0.2)
        assert running == [threading.get_ident()]
        Path(package_path).write_text("package")
        running.clear()

    def trace(*_: object) -> Any:
        assert not running
        return SimpleNamespace(graph=SimpleNamespace(nodes=[])), [{"block_size": 32}]

    module = sys.modules[export.__module__]
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_slowly)
    monkeypatch.setattr(module, "_trace", trace)
    monkeypatch.setattr(module, "_specs", lambda _: [])
    before = CppWrapperCpu.codegen_int_array_var
    with ThreadPoolExecutor(3) as threads:
        made_by = [
            threads.submit(export, made(Attention), tokens(9), path=tmp_path / f"{i}.pt2")
            for i in range(3)
        ]
        assert [x.result().read_text() for x in made_by] == ["package"] * 3
    assert CppWrapperCpu.codegen_int_array_var is before


def test_an_export_that_fails_leaves_the_package_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: object, *, package_path: str, **options: object) -> None:
        Path(package_path).write_text("half")
        raise RuntimeError("no space")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    path = tmp_path / "m.pt2"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="no space"):
        export(made(Attention), tokens(9), path=path, dynamic_length=False)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_dense_is_never_silent() -> None:
    """A plan that serves some lengths alone is refused."""
    module = Attention(plan="dense", top_k=20).eval()
    with pytest.raises(ValueError, match=r"top_k must cover all .* for plan='dense'"):
        export(module, tokens(300), path="m.pt2")


def test_parity_check_can_fail() -> None:
    x = torch.randn(3)
    assert worst_error(torch.sin, torch.sin, [x]) == 0
    assert worst_error(torch.sin, torch.cos, [x]) > 0.01
    with pytest.raises(ValueError, match="must have the shapes"):
        worst_error(torch.sin, torch.sum, [x])
    with pytest.raises(ValueError, match="must be finite where"):
        worst_error(torch.sin, lambda x: x / 0, [x])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kind", [Attention, Layers])
def test_cuda_packages(
    kind: type[nn.Module], dynamic: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    module = made(kind).to("cuda", dtype)
    example = tokens(300).to("cuda", dtype)
    varying: dict[str, Any] = {"dynamic_length": dynamic, "dynamic_batch": dynamic}
    package = export(module, example, path=tmp_path / "m.pt2", **varying)
    inputs = [tokens(length).to(example) for length in (UNSEEN if dynamic else (300,))]
    if dynamic:
        inputs += [tokens(333, batch).to(example) for batch in (1, 5)]
    most = 1e-4
    if dtype != torch.float32:  # roundings move choices between blocks that are nearly as good
        exact = made(kind).to("cuda", dtype).float()
        with torch.no_grad():
            most = 2 * max((module(x) - exact(x.float())).abs().max().item() for x in inputs)
    assert max(run_alone(package, [(x,) for x in inputs], module)) < most
    assert {call["plan"] for call in load(package).metadata.attention} == {"fused"}


class Packed(nn.Module):
    """Documents, and a cap."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        options: dict[str, Any] = {"block_size": 32, "top_k": 4, "softcap": 20.0}
        return moba_attention(q, k, v, cu_seqlens=cu_seqlens, **options)


class Padded(nn.Module):
    """Padding, and heads that choose fewer blocks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, top_k: Tensor) -> Tensor:
        options: dict[str, Any] = {"block_size": 32, "top_k": 4, "head_top_k": top_k}
        return moba_attention(q, k, v, key_mask=key_mask, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("dynamic", [True, False])
def test_cuda_packages_of_documents_and_padding(dynamic: bool, tmp_path: Path) -> None:
    def example(kind: type[nn.Module], length: int) -> tuple[Tensor, ...]:
        q, k, v = Case(1, 2, 2, length, length, seed=length, device="cuda").inputs()
        if kind is Packed:
            return q, k, v, torch.tensor([0, length // 3, length // 3, length]).int().cuda()
        return (
            q,
            k,
            v,
            torch.arange(length, device="cuda")[None] >= length // 4,
            torch.tensor([4, 1, 2, 3]).int().cuda(),
        )

    for kind in (Packed, Padded):
        module = made(kind)
        path = tmp_path / f"{kind.__name__}.pt2"
        package = load(export(module, example(kind, 300), path=path, dynamic_length=dynamic))
        for length in UNSEEN if dynamic else (300,):
            assert worst_error(module, package, example(kind, length)) < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("made_on", ["cuda:0", "cuda:1"])
def test_cuda_packages_run_on_either_device(made_on: str, tmp_path: Path) -> None:
    path = export(made(Attention), tokens(300), path=tmp_path / "m.pt2", device=made_on)
    for device in ("cuda:0", "cuda:1"):
        package, x = load(path, device=device), tokens(300).to(device)
        assert torch.cuda.current_device() == 0
        assert package(x).device == x.device
        assert torch.cuda.current_device() == 0
        assert worst_error(made(Attention).to(device), package, (x,)) < 1e-5
    assert load(path).device == torch.device("cuda:0")
    with pytest.raises(ValueError, match="x must be on cuda:1, got cuda:0"):
        package(tokens(300).cuda())


def test_cuda_graph_holds_kernels_for_any_length() -> None:
    """Traced without a GPU."""
    found = run_script("trace_export.py")
    assert found["ops"] == [
        "moba_flex.pool_triton",
        "moba_flex.choose_triton",
        "moba_flex.attend_fused",
    ]
    assert found["lengths"] == [[1, 2**20], [1, 2**20]]
    queries, *others = found["padded"]
    assert queries not in others
    assert len(set(others)) == 1  # keys, values and key_mask have one length
    assert found["plan"] == "fused"
    batch, *others = found["batches"]
    assert others == [batch] * 3  # queries, keys, values and key_mask have one batch size
    assert found["of_a_batch"] == [1, 2**10]
    # PyTorch 2.11 compiles no scan of so many values that it takes 64 bits to number them.
    assert not found["scans"]  # kernels add up: PyTorch 2.11 compiles no scan of so many values


# C++.


@pytest.mark.slow
def test_cpp_program_gives_the_same(layers_package: Path, tmp_path: Path) -> None:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if torch.version.cuda and not Path(str(CUDA_HOME), "include", "cuda.h").is_file():
        pytest.skip("needs the CUDA toolkit, as all that is built with PyTorch for CUDA")
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(ROOT / "compile/cpp"), "-B", str(build), prefix],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    x = tokens(777, batch=3).mT.contiguous().mT
    files = [str(tmp_path / name) for name in ("inputs.pt", "outputs.pt")]
    torch.save([x], files[0])
    program = str(build / "run_package")
    done = subprocess.run(
        [program, str(layers_package), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert json.loads(first)["attention"][0]["top_k"] == 3
    assert second == "float [3, 777, 64]"
    (out,) = torch.load(files[1])
    with torch.no_grad():
        torch.testing.assert_close(out, made(Layers)(x))
    bad = subprocess.run([program, *files, "x"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.startswith("run_package: error: ")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"inputs": {"cu_seqlens": torch.tensor([0, 100, 300])}}, "cu_seqlens and key_mask"),
        (
            {"inputs": {"key_mask": torch.ones(2, 300, dtype=torch.bool)}},
            "cu_seqlens and key_mask",
        ),
        ({"softcap": 30.0}, "softcap, score_mod and mask_mod"),
        ({"head_top_k": torch.tensor([4, 3, 2, 1])}, "head_top_k"),
    ],
)
def test_a_package_for_cpu_holds_plain_rows(options: dict[str, Any], name: str) -> None:
    module = Attention(**options).eval()
    with pytest.raises(ValueError, match=f"{name} must be None in a package for cpu, got some"):
        export(module, tokens(300), path="m.pt2", dynamic_length=False)
