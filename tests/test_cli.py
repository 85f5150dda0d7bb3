"""Tests of the command `moba-flex`."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moba_flex import cli, diagnostics
from moba_flex.cli import packages
from moba_flex.compile import exporter

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

LENGTH = 200


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random model, its tokenizer and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("home")
    words = {f"w{i}": i for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    text = " ".join(f"w{i * i % 50}" for i in range(300))
    (folder / "text.txt").write_text(text)
    return folder


def run(*argv: object) -> int:
    try:
        return cli.main([str(argument) for argument in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def run_tiny(home: Path, *argv: object) -> int:
    place = ("--model", home / "model", "--text", home / "text.txt", "--device", "cpu")
    size = ("--seq-len", LENGTH, "--block-size", 16, "--out", home / "out")
    return run("eval", *place, *size, *argv)


def test_eval_measures_a_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tiny(home, "--top-k", 2, 4, 13, "--sink-blocks", 0, 1) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\nwrote")[0].splitlines())) <= 100
    found = json.loads((home / "out" / "moba_eval.json").read_text())
    dense, *runs = found["runs"]
    assert (home / "out" / "moba_eval.png").read_bytes().startswith(b"\x89PNG")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(home / "model")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    text = (home / "text.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH]
    with torch.no_grad():
        logits = model(ids).logits[0]
    half = LENGTH // 2
    want = math.exp(F.cross_entropy(logits[half - 1 : -1], ids[0, half:]))
    assert dense["perplexity"] == pytest.approx(want, rel=1e-5)
    assert f"{want:.2f}" in printed

    gates = [(r["config"]["top_k"], r["config"]["sink_blocks"]) for r in runs]
    assert gates == [(2, 0), (4, 0), (13, 0), (2, 1), (4, 1), (13, 1)]
    assert [r["density"] for r in runs[:3]] == sorted(r["density"] for r in runs[:3])
    for covering in (runs[2], runs[5]):  # 13 blocks of 16 cover the text
        assert covering["perplexity"] == pytest.approx(want, rel=1e-5)
        assert covering["density"] == covering["recall"] == pytest.approx(1, abs=1e-5)
    assert 0 < runs[0]["recall"] < 1
    assert abs(runs[0]["perplexity"] / want - 1) > 1e-3
    assert 0 <= runs[0]["entropy"] <= 1
    assert all(run["seconds"] > 0 for run in found["runs"])
    assert len(found["map"][0]) == 13
    assert found["map_title"] == "layer 1, head 0, block 16, top_k 2, sink 1, local 0"


def inspect_tiny(home: Path, *argv: object) -> int:
    place = ("--model", home / "model", "--text", home / "text.txt", "--device", "cpu")
    size = ("--seq-len", LENGTH, "--block-size", 16, "--out", home / "inspected")
    return run("inspect", *place, *size, *argv)


def test_inspect_measures_each_layer_and_head(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_tiny(home, "--top-k", 3) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\nwrote")[0].splitlines())) <= 100
    found = json.loads((home / "inspected" / "moba_inspect.json").read_text())
    assert (home / "inspected" / "moba_inspect.png").read_bytes().startswith(b"\x89PNG")
    assert found["layers"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert list(found["measures"]) == list(diagnostics.MEASURES)
    for name, layers in found["measures"].items():
        heads = 2 if name == "union" else 4
        assert [len(x) for x in layers] == [heads, heads]
    rows = printed.splitlines()
    mean = sum(map(sum, found["measures"]["recall"])) / 8
    assert f"{mean:.3f}" in next(row for row in rows if row.lstrip().startswith("mean"))

    assert run_tiny(home, "--top-k", 3, "--sink-blocks", 1) == 0  # measures as eval does
    *_, routed = json.loads((home / "out" / "moba_eval.json").read_text())["runs"]
    assert routed["recall"] == pytest.approx(mean, rel=1e-6)


def test_inspect_tells_layers_by_their_numbers(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And writes null where there is nothing to measure: without a choice, no distance."""
    gate = ("--top-k", 1, "--sink-blocks", 0, "--dense-layers", 0)
    assert inspect_tiny(home, *gate) == 0
    *_, layer, _, mean = capsys.readouterr().out.split("\ndensity")[0].splitlines()[:-1]
    assert [line.split()[0] for line in (layer, mean)] == ["1", "mean"]
    text = (home / "inspected" / "moba_inspect.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert found["layers"] == ["model.layers.1.self_attn"]
    assert found["measures"]["distance"] == [[None] * 4]


def test_inspect_refuses_to_attend_to_all(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_tiny(home, "--top-k", 13) == 2
    message = "--top-k must leave out some of --seq-len = 200 tokens, got 13 blocks of 16"
    assert capsys.readouterr().err == f"moba-flex inspect: error: {message}\n"


def test_eval_takes_another_dtype_and_an_out_folder_to_make(home: Path) -> None:
    out = home / "deep" / "folder"
    assert run_tiny(home, "--top-k", 3, "--dtype", "bfloat16", "--out", out) == 0
    assert json.loads((out / "moba_eval.json").read_text())["setting"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k", "0"], "argument --top-k: must be an int of at least 1, got '0'"),
        (["--top-k", "many"], "argument --top-k: must be an int of at least 1, got 'many'"),
        (["--top-k", "٣"], "argument --top-k: must be an int of at least 1, got '٣'"),
        (["--top-k", "²"], "argument --top-k: must be an int of at least 1, got '²'"),
        (["--top-k", ""], "argument --top-k: must be an int of at least 1, got ''"),
        (["--top-k=--5"], "argument --top-k: must be an int of at least 1, got '--5'"),
        (["--top-k=--"], "options of the gate must have values, got one without"),
        (["--top-k", str(2**63)], f"argument --top-k: must be an int of at most {2**63 - 1}, got"),
        (["--top-k", "9" * 5000], f"argument --top-k: must be an int of at most {2**63 - 1}, got"),
        (["--seq-len", "1048577"], "argument --seq-len: must be an int of at most 1048576, got"),
        (["--device", ""], "device must be cpu or a CUDA device of this machine, got ''"),
        (
            ["--text", "/proc/self/mem"],
            "text must be readable, got '/proc/self/mem': Input/output",
        ),
        (["--text", "x" * 5000], "--text must be a file, got 'xxx"),
        (["--out", "SHORT/folder"], "--out must be writable, got"),
        (["--out", "/proc/folder"], "--out must be writable, got '/proc/folder/moba_eval.json': "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--top-k", "1", "--sink-blocks", "1"], "top_k must be at least 1 + sink_blocks"),
        (["--text", "nowhere.txt"], "--text must be a file, got 'nowhere.txt'"),
        (
            ["--model", "./nowhere"],
            "model must be a folder or Hub id of a causal LM, got",
        ),
        (
            ["--device", "abacus"],
            "device must be cpu or a CUDA device of this machine",
        ),
        (["--device", "meta"], "device must be cpu or a CUDA device of this machine"),
        (["--seq-len", "301"], "--seq-len must be at most 256 for this model"),
        (
            ["--seq-len", "250", "--text", "SHORT"],
            "text must have at least 250 tokens, got 3:",
        ),
        (["--text", "BINARY"], "text must be UTF-8, got"),
        (["--block-size", "201"], "block_size must be at most --seq-len = 200, got 201"),
        (["--out", "SHORT"], "--out must be a folder, got"),
    ],
)
def test_eval_refuses_in_one_line(
    home: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "short.txt").write_text("w1 w2 w3")
    (home / "binary.txt").write_bytes(b"\xff\xfe\x00")
    if argv[:2] == ["--seq-len", "301"]:
        (home / "text.txt").write_text((home / "text.txt").read_text() + " w1" * 20)
    names = {"SHORT": str(home / "short.txt"), "BINARY": str(home / "binary.txt")}
    names["SHORT/folder"] = names["SHORT"] + "/folder"
    assert run_tiny(home, *(names.get(argument, argument) for argument in argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("moba-flex")
    assert f"error: {message}" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def cut_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:3000])


def point_to_weights(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def set_config(**options: Any) -> Any:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | options))

    return change


def change_weights(model: Path, name: str, **values: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weight = weights.pop(name)
    if values:
        weights[name] = torch.full_like(weight, values["value"])
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def shrink_vocabulary(model: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig.from_pretrained(model)
    config.vocab_size = 20
    LlamaForCausalLM(config).save_pretrained(model)


WHOLE = "are its files whole, and no git-lfs pointers?"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, f"model must be a folder or Hub id of a causal LM, got .* {WHOLE}"),
        (point_to_weights, f"model must be a folder or Hub id of a causal LM, got .* {WHOLE}"),
        (lambda x: (x / "model.safetensors").write_bytes(b""), "model must be a folder .* whole"),
        (lambda x: (x / "model.safetensors").unlink(), "model must be a folder .* no file named"),
        (lambda x: (x / "config.json").write_text("[]"), "model must be a folder .* whole"),
        (lambda x: (x / "config.json").write_text("{"), "model must be a folder .* valid JSON"),
        (set_config(num_attention_heads=0), "model must be a folder .* ZeroDivisionError"),
        (
            set_config(hidden_size=64),
            "model must have the weights that config.json asks for, got another for 21 of them, "
            r"lm_head.weight of shape \(50, 32\) for \(50, 64\) the first: copy or save both",
        ),
        (
            set_config(num_hidden_layers=3),
            "model must have the weights that config.json asks for, got none for 9 of them, ",
        ),
        (
            lambda x: change_weights(x, "model.norm.weight"),
            "got none for 1 of them, model.norm.weight the first: copy or save both",
        ),
        (
            lambda x: change_weights(x, "model.norm.weight", value=math.nan),
            "perplexity must be finite, got nan with dense attention: are the model's",
        ),
        (set_config(num_hidden_layers=-1), "model must have layers that attend, got none: is it"),
        (shrink_vocabulary, "tokenizer must have at most the model's 20 tokens, got token 49: is"),
        (
            lambda x: (x / "tokenizer.json").unlink(),
            "--model must have a tokenizer, got .*, a folder without tokenizer.json: .* copy or",
        ),
        (
            lambda x: (x / "tokenizer.json").write_text("{}"),
            "--model must have a tokenizer, got .*: KeyError: 'added_tokens': copy or",
        ),
    ],
)
def test_eval_says_what_is_wrong_with_a_model(
    damage: Any, message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    damage(tmp_path / "model")
    capsys.readouterr()
    assert run_tiny(home, "--model", tmp_path / "model", "--top-k", 2, "--sink-blocks", 0) == 2
    printed = capsys.readouterr()
    *bars, line = printed.err.strip().splitlines()
    assert re.search(f"^moba-flex eval: error: .*{message}", line), line
    assert "Traceback" not in printed.err
    assert not any("rror" in bar for bar in bars)
    assert printed.out == ""


def test_eval_finds_first_what_it_cannot_write(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moba_flex.cli import pretrained

    monkeypatch.setattr(pretrained, "load_model", lambda *_, **__: pytest.fail("it loaded"))
    (tmp_path / "moba_eval.png").mkdir()
    assert run_tiny(home, "--out", tmp_path) == 2
    assert "error: --out must be a file, got a folder: " in capsys.readouterr().err
    assert run_tiny(home, "--out", tmp_path / "new", "--seq-len", 257) == 2
    assert "--seq-len must be at most 256 for this model, got 257" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


class Full(io.StringIO):
    """What /dev/full is."""

    def flush(self) -> None:
        """Fail, if there is anything to write."""
        if self.getvalue():
            raise OSError(28, "No space left on device")


def test_eval_keeps_its_results_where_stdout_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = ("--top-k", 3, "--sink-blocks", 0, "--out", home / "kept")
    monkeypatch.setattr(sys, "stdout", Full())
    assert run_tiny(home, *gate) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "moba-flex eval: error: stdout must be writable, got No space left on device"
    assert sorted(x.name for x in (home / "kept").iterdir()) == ["moba_eval.json", "moba_eval.png"]
    monkeypatch.setattr(sys, "stdout", None)  # as of a process whose stdout is closed
    monkeypatch.setattr(sys, "stderr", Full())
    assert run_tiny(home, *gate) == 0


def test_eval_keeps_what_can_be_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moba_flex.cli import report

    def fail(found: object, path: Path) -> None:
        path.write_text("half")
        raise OSError("no space")

    out = home / "half"
    out.mkdir()
    (out / "moba_eval.json").write_text("old")
    monkeypatch.setattr(report, "save_json", fail)
    assert run_tiny(home, "--top-k", 3, "--sink-blocks", 0, "--out", out) == 2
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    message = f"results must be written to files, got {out / 'moba_eval.json'}: OSError: no space"
    assert message in printed.err.splitlines()[-1]
    assert (out / "moba_eval.json").read_text() == "old"
    assert sorted(x.name for x in out.iterdir()) == ["moba_eval.json", "moba_eval.png"]


def test_an_interrupt_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "moba_flex", "eval"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "moba-flex: interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "moba-flex eval: interrupted"),
        (RuntimeError("a\nb"), 2, "error: RuntimeError: a b (MOBA_FLEX_TRACEBACK=1 shows where)"),
        (AssertionError(), 2, "error: AssertionError (MOBA_FLEX_TRACEBACK=1 shows where)"),
        (BaseException("panic"), 2, "error: BaseException: panic (MOBA_FLEX_TRACEBACK=1 shows wh"),
        (RuntimeError("x" * 9999), 2, "xxx ... (MOBA_FLEX_TRACEBACK=1 shows where)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            2,
            "error: memory must hold model and text, got RuntimeError: DefaultCPUAllocator: can't "
            "allocate memory: take fewer tokens or a smaller model",
        ),
    ],
    ids=str,
)
def test_whatever_happens_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moba_flex.cli import evaluate

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(evaluate, "read_tokens", fail)
    assert run_tiny(home) == code
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told
    if code == 2:
        monkeypatch.setenv("MOBA_FLEX_TRACEBACK", "1")
        assert run_tiny(home) == code
        assert capsys.readouterr().err.startswith("Traceback")


class Counted(io.StringIO):
    """Text, and how much of it was read."""

    count = 0

    def read(self, size: int | None = -1) -> str:
        """Read and count."""
        text = super().read(size)
        self.count += len(text)
        return text


@pytest.mark.parametrize("spaces", [True, False])
def test_eval_reads_no_more_text_than_it_needs(
    spaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are those of the whole text, also of a tokenizer whose tokens span words."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    from moba_flex.cli import evaluate

    text = "".join(topics.values())
    text = text if spaces else "".join(text.split())
    bpe = Tokenizer(models.BPE())
    bpe.train_from_iterator(text[:5000].splitlines(), trainers.BpeTrainer(vocab_size=400))
    kind: Any = PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=bpe)
    long = " " * 3000 + text[:100_000]  # its first tokens are many characters each
    for content in (text[:100_000], long):
        whole = torch.tensor([tokenizer(content).input_ids])
        for length in (2, 3, 50, 301):
            file = Counted(content)
            monkeypatch.setattr(evaluate, "_opened", lambda _, file=file: file)
            ids = evaluate.read_tokens(tokenizer, None, length)
            assert torch.equal(ids, whole[:, :length])
            assert file.count <= max(8000, 30 * length)


def test_run_refuses_what_a_package_does_not_take() -> None:
    from moba_flex.compile.package import Metadata, Package, Spec

    def package(*shapes: Any) -> Package:
        specs = [Spec("x", shape, "int64") for shape in shapes]
        metadata = Metadata("", "", "cpu", "", [], specs)
        return Package(None, metadata, torch.device("cpu"))

    packages._check_room(package((1, ("s", 1, 9))), 5, 5)
    packages._check_room(package((1, 5)), 5, 1)
    with pytest.raises(ValueError, match=r"must make lengths from 1 to 9 for this .* got 5 to 10"):
        packages._check_room(package((1, ("s", 1, 9))), 5, 6)
    with pytest.raises(ValueError, match=r"must make lengths from 5 to 5 for this .* got 5 to 6"):
        packages._check_room(package((1, 5)), 5, 2)
    with pytest.raises(ValueError, match=r"package must take token ids \[1, length\] alone"):
        packages._check_room(package((1, 2, 5, 4)), 5, 2)


def test_eval_refuses_models_without_the_attention_interface(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    small: Any = {"vocab_size": 50, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    BloomForCausalLM(BloomConfig(**small)).save_pretrained(home / "bloom")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(home / "bloom")
    assert run_tiny(home, "--model", home / "bloom") == 2
    assert "error: model must use the attention interface" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("transformers", "hf"), ("matplotlib", "plot")])
def test_eval_names_the_extra_that_is_missing(
    package: str,
    extra: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else object()
    )
    assert run_tiny(home) == 2
    want = f'moba-flex eval: error: {package} is missing: pip install "moba-flex[{extra}]"\n'
    assert capsys.readouterr().err == want


PROMPT = 200


@pytest.fixture(scope="module")
def prompt(home: Path) -> Path:
    """Write a prompt of `PROMPT` tokens for the model, and return its path."""
    file = home / "prompt.txt"
    file.write_text(" ".join(f"w{i * i % 47}" for i in range(PROMPT)))
    return file


def generate(home: Path, *argv: object) -> int:
    place = ("--model", home / "model", "--prompt", home / "prompt.txt", "--device", "cpu")
    size = ("--block-size", 16, "--sink-blocks", 0, "--max-new-tokens", 24)
    return run("generate", *place, *size, *argv)


def continued(home: Path, **gate: Any) -> str:
    """Return what transformers generates, under moba_flex if there is a gate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moba_flex import MoBAConfig
    from moba_flex.integrations.transformers import apply

    model: Any = AutoModelForCausalLM.from_pretrained(home / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(home / "model")
    if gate:
        apply(model, MoBAConfig(16, **gate))
    inputs = tokenizer((home / "prompt.txt").read_text(), return_tensors="pt")
    ids = model.generate(inputs.input_ids, do_sample=False, max_new_tokens=24)
    return tokenizer.decode(ids[0, PROMPT:], skip_special_tokens=True)


@pytest.mark.usefixtures("prompt")
def test_generate_compares_with_dense_attention(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "figures.json"
    assert generate(home, "--top-k", 14, "--compare", "--json", file) == 0
    want, printed = continued(home), capsys.readouterr()
    assert len(want.split()) > 5
    assert printed.out == f"dense:\n{want}\n\nsparse:\n{want}\n"  # 14 blocks of 16 are all
    assert "both texts are the same" in printed.err
    assert f"wrote {file}" in printed.err

    found = json.loads(file.read_text())
    dense, sparse = found["runs"]
    assert found["prompt_tokens"] == PROMPT
    assert (dense["config"], sparse["config"]["top_k"]) == (None, 14)
    assert dense["text"] == sparse["text"] == want
    for made in (dense, sparse):
        assert made["prefill_seconds"] > 0 < made["decode_seconds"]
        assert made["peak_bytes"] > 1e6
    kept = PROMPT + len(dense["tokens"]) - 1
    assert dense["cache_bytes"] == kept * 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, dim, bytes
    assert dense["block_bytes"] == 0
    assert sparse["cache_bytes"] >= dense["cache_bytes"]
    assert 0 < sparse["block_bytes"] < sparse["cache_bytes"]


@pytest.mark.usefixtures("prompt")
def test_generate_routes_as_transformers_would(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for decode in ("route", "dense"):
        want = continued(home, top_k=2, cached=decode, dense_layers=(-1,))
        texts.append(want)
        for chunk in ((), ("--chunk", 37), ("--chunk", PROMPT)):
            gate = ("--top-k", 2, "--dense-layers", -1, "--decode", decode, *chunk)
            capsys.readouterr()
            assert generate(home, *gate) == 0
            assert capsys.readouterr().out == f"{want}\n"
    gate = ("--top-k", 2, "--dense-layers", -1, "--decode-top-k", 99)
    for chunk in ((), ("--chunk", 37)):
        assert generate(home, *gate, *chunk) == 0
        assert capsys.readouterr().out == f"{texts[1]}\n"
    assert len({continued(home), *texts}) == 3
    assert generate(home, "--top-k", 3, "--layer-top-k", 3, 2) == 0
    want = continued(home, top_k=3, layer_top_k=(3, 2))
    assert capsys.readouterr().out == f"{want}\n"


@pytest.mark.usefixtures("prompt")
def test_generate_takes_samples(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (0, 0, 1):
        assert generate(home, "--top-k", 2, "--temperature", 1.5, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.usefixtures("prompt")
def test_generate_takes_a_model_with_options_of_its_own(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    for own in ({"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
        assert generate(home, "--model", tmp_path / "model", "--top-k", 14) == 0
        assert capsys.readouterr().out == f"{continued(home)}\n"


def test_generate_reads_stdin(
    home: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(home, "--top-k", 2) == 0
    want = capsys.readouterr().out
    for content, code in ((prompt.read_bytes(), 0), (b"\xff", 2), (b" ", 2), (None, 2)):
        stdin = None if content is None else io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert generate(home, "--top-k", 2, "--prompt", "-") == code
        printed = capsys.readouterr()
        if code == 0:
            assert printed.out == want
        else:
            message = {
                b"\xff": "--prompt must be UTF-8, got '-': invalid start byte",
                b" ": "--prompt must have at least one token, got none",
                None: "--prompt must be readable, got '-': stdin is closed",
            }[content]
            assert printed.err == f"moba-flex generate: error: {message}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("prompt")
def test_generate_shows_the_progress_of_chunks(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for chunk, bars in ((("--chunk", 50), True), ((), False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert generate(home, "--top-k", 2, *chunk) == 0
        shown = terminal.getvalue()
        assert ("prefill, sparse" in shown) == bars
        assert ("150/200" in shown) == bars
    assert len(set(capsys.readouterr().out.splitlines())) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "nowhere.txt"], "--prompt must be a file or -, got 'nowhere.txt'"),
        (["--prompt", "/proc"], "--prompt must be a file or -, got '/proc'"),
        (["--prompt", "/proc/self/mem"], "--prompt must be readable, got '/proc/self/mem': Input"),
        (["--top-k", "1", "--sink-blocks", "1"], "top_k must be at least 1 + sink_blocks"),
        (["--dense-layers", "2"], "dense_layers must lie in -2..1, got 2: the model has 2 layers"),
        (["--layer-top-k", "2"], "layer_top_k must hold 2 numbers, one for each layer, got 1"),
        (["--layer-top-k", "9", "9"], "layer_top_k must be at most top_k = 8, got 9: raise top_k"),
        (
            ["--decode", "dense", "--decode-top-k", "9"],
            "decode_top_k must be None for cached='dense', got 9: let cached be 'route'",
        ),
        (
            ["--dense-layers=--5"],
            "argument --dense-layers: must be an int of at least -1048576",
        ),
        (["--dense-layers", "-9999999"], "argument --dense-layers: must be an int of at least -1"),
        (["--decode", "refuse"], "argument --decode: invalid choice: 'refuse'"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: must be an int of at least 1"),
        (
            ["--max-new-tokens", "57"],
            "--prompt and --max-new-tokens must make at most 256 tokens for this model, got 200 + "
            "57: take fewer",
        ),
        (["--chunk", "0"], "argument --chunk: must be an int of at least 1, got '0'"),
        (["--temperature", "0"], "argument --temperature: must be a finite number above 0, got"),
        (["--temperature", "inf"], "argument --temperature: must be a finite number above 0, got"),
        (["--temperature", "hot"], "argument --temperature: must be a finite number above 0, got"),
        (["--json", "/proc/x.json"], "--json must be writable, got '/proc/x.json': "),
        (["--device", "abacus"], "device must be cpu or a CUDA device of this machine"),
        (["--model", "./nowhere"], "model must be a folder or Hub id of a causal LM, got"),
    ],
)
@pytest.mark.usefixtures("prompt")
def test_generate_refuses_in_one_line(
    home: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(home, *argv) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert f"moba-flex generate: error: {message}" in line
    assert printed.out == ""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda x: change_weights(x, "model.norm.weight", value=math.nan),
            "logits must be numbers, got nan with sparse attention: are the model's weights",
        ),
        (shrink_vocabulary, "tokenizer must have at most the model's 20 tokens, got token 42: is"),
    ],
)
@pytest.mark.usefixtures("prompt")
def test_generate_says_what_is_wrong_with_a_model(
    damage: Any, message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    damage(tmp_path / "model")
    assert generate(home, "--model", tmp_path / "model", "--top-k", 2) == 2
    printed = capsys.readouterr()
    assert f"moba-flex generate: error: {message}" in printed.err.splitlines()[-1]
    assert printed.out == ""


@pytest.mark.usefixtures("prompt")
def test_generate_says_what_it_cannot_write(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moba_flex.cli import report

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(report, "save_json", fail)
    file = tmp_path / "x.json"
    assert generate(home, "--top-k", 2, "--json", file) == 2
    printed = capsys.readouterr()
    assert printed.out
    assert "decode, tokens/s" in printed.err
    message = f"results must be written to files, got {file}: OSError: no space"
    assert message in printed.err.splitlines()[-1]
    monkeypatch.setattr(sys, "stdout", Full())
    assert generate(home, "--top-k", 2) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line == "moba-flex generate: error: stdout must be writable, got No space left on device"
    )


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("moba-flex ")
    assert run("eval", "--help") == 0
    assert "default: 4096" in capsys.readouterr().out
    assert run() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_starts_without_heavy_imports() -> None:
    heavy = {"transformers", "matplotlib", "pydoc_data.topics", "torch._dynamo", "triton", "sympy"}
    code = (
        f"import sys; from moba_flex import cli; cli._parser();print({heavy} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    root = Path(cli.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_eval_of_the_default_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from moba_flex.cli import pretrained

    try:
        pretrained.fetch()
    except OSError as error:
        pytest.skip(str(error))
    gate = ("--block-size", 32, "--top-k", 4, "--sink-blocks", 0, 1)
    where = ("--device", "cpu", "--out", tmp_path)
    assert run("eval", "--seq-len", 512, *gate, *where) == 0
    found = json.loads((tmp_path / "moba_eval.json").read_text())
    dense, plain, sink = (run["perplexity"] for run in found["runs"])
    assert dense < sink < plain
    assert sink < 1.5 * dense
    assert plain > 1.5 * dense


@pytest.mark.slow
def test_export_then_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = home / "tiny.pt2"
    gate = ("--block-size", 16, "--top-k", 3, "--seq-len", 60, "--device", "cpu")
    assert run("export", "--model", home / "model", "--out", package, *gate) == 0
    wrote, *checks = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {package}: ")
    assert [line.split(":")[0] for line in checks] == ["1 tokens", "31 tokens", "121 tokens"]

    text = " ".join((home / "text.txt").read_text().split()[:70])
    assert run("run", package, "--model", home / "model", "--text", text, "--tokens", 5) == 0
    printed = capsys.readouterr().out.strip()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moba_flex import MoBAConfig
    from moba_flex.integrations.transformers import apply

    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(home / "model")
    apply(model, MoBAConfig(16, 3, sink_blocks=1))
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(5):
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, best), 1)
    assert printed == tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "--out", "m.onnx"], "path must end in .pt2, got .onnx: ONNX has"),
        (["export", "--out", "m.pt2", "--top-k", "1"], "top_k must be at least 1 + sink_blocks"),
        (["export"], "the following arguments are required: --out"),
        (["run", "nowhere.pt2", "--text", "x"], "path must be a file, got 'nowhere.pt2'"),
        (["run", "m.pt2", "--text", "x", "--tokens", "0"], "argument --tokens: must be an int"),
        (["run", "m.pt2", "--text", "\udcff"], "--text must be UTF-8, got '\\udcff'"),
        (["run", "/dev/full", "--text", "x"], "path must be a file, got '/dev/full'"),
        (["export", "--out", "/proc/m.pt2"], "path must be writable, got '/proc/m.pt2': "),
        (["export", "--out", "m.pt2", "--device", "x"], "device must be cpu or a CUDA device of"),
        (["export", "--out", "m.pt2", "--seq-len", "1" + "0" * 12], "argument --seq-len: must be"),
    ],
)
def test_export_and_run_refuse_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"moba-flex {argv[0]}: error: {message}" in line


def test_export_fails_where_the_package_differs(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(model: object, example: object, *, path: Path, **options: object) -> Path:
        path.write_bytes(b"package")
        return path

    monkeypatch.setattr(exporter, "export", fake)
    monkeypatch.setattr(packages, "load", lambda path, device: None)
    monkeypatch.setattr(exporter, "worst_error", lambda *_: 0.5)
    command = ("export", "--model", home / "model", "--device", "cpu", "--out", home / "bad.pt2")
    assert run(*command) == 2
    assert "error: the package must be within 3.5e-04 of the model" in capsys.readouterr().err
    assert run(*command, "--no-check") == 0
