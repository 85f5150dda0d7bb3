"""The experiments run, resume, and compare what they say they compare."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("tqdm")

from moba_flex import diagnostics, patterns, route
from perf.experiments import (
    blocks,
    continued,
    density,
    files,
    gates,
    language,
    model,
    report,
    retrieval,
    runs,
    shared,
    steps,
    train,
)
from perf.experiments.data import File, draw_windows, load_corpus, long_lines, read_files, split
from perf.experiments.model import FULL, Arm, Decoder, Sizes

HAS_TRANSFORMERS = find_spec("transformers") is not None
SIZES = Sizes(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=256)
SPARSE = Arm("moba", 16, 3)
FIXED = tuple(replace(SPARSE, kind=kind) for kind in ("window", "sink window", "global local"))
SHARED = (
    replace(SPARSE, shared_heads=True),
    replace(SPARSE, shared_queries=16),
    replace(SPARSE, shared_heads=True, shared_queries=16),
)
LAST = replace(SPARSE, dense_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus of tokens, and checkpoints that experiments share."""
    where = tmp_path_factory.mktemp("experiments")
    root = where / "packages"
    for number in range(100):
        (root / f"package{number}").mkdir(parents=True)
        lines = [f"value_{number}_{line} = compute({line}, {number})\n" for line in range(60)]
        (root / f"package{number}" / "module.py").write_text("".join(lines))
    load_corpus("bytes", where, 1, [root])
    return where


def some_text(name: str, lines: int = 30) -> str:
    return "".join(f"{name} says on line {line} what no other does\n" for line in range(lines))


@pytest.mark.parametrize("arm", [FULL, SPARSE, *FIXED, *SHARED, LAST], ids=lambda arm: arm.name)
@pytest.mark.parametrize("length", [160, 77])
def test_every_arm_attends_to_as_many_keys_as_it_says(arm: Arm, length: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(SIZES, arm)
    rows = train.routing_statistics(decoder, torch.randint(256, (2, length)))
    dense = SIZES.num_layers - len(rows)
    assert dense == (SIZES.num_layers if arm.kind == "full" else arm.dense_layers)
    counted = [*(row["attended"] for row in rows), *[(length + 1) / 2] * dense]
    assert sum(counted) / len(counted) == pytest.approx(decoder.attended(length))


def test_compiled_models_tell_what_they_route() -> None:
    torch.manual_seed(0)
    decoder, ids = Decoder(SIZES, SPARSE), torch.randint(256, (1, 160))
    eager = train.routing_statistics(decoder, ids)
    decoder.compile(backend="eager")
    assert train.routing_statistics(decoder, ids) == eager
    assert [row["layer"] for row in eager] == [0, 1]
    assert all(0 < row["recall"] < 1 and row["regret"] > 0 for row in eager)


def test_sparse_arms_attend_to_equally_many_keys() -> None:
    assert len({arm.attended(300) for arm in (SPARSE, *FIXED, *SHARED)}) == 1
    assert FULL.attended(300) == 150.5


@pytest.mark.parametrize("arm", [FULL, SPARSE, *FIXED, *SHARED], ids=lambda arm: arm.name)
def test_attention_is_that_of_the_chosen_keys(arm: Arm) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 100, 8) for heads in (4, 2, 2))
    mask = torch.ones(2, 4, 100, 100, dtype=torch.bool).tril()
    routing = arm.choose(q, k)
    if routing is not None:
        listed = routing.as_set(4).blocks.unsqueeze(-1)
        block = torch.arange(100) // arm.block_size
        mask &= (listed == block).any(3) | (block[:, None] == block)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(arm.attend(q, k, v), expected, atol=1e-5)


def test_global_blocks_are_those_of_the_library_where_there_are_enough() -> None:
    x = torch.empty(1, 1, 160, 4)
    routing = Arm("global local", 10, 5).choose(x, x)
    assert routing is not None
    given = patterns.global_local(x, x, block_size=10, every=8, local_blocks=2)
    last = routing.as_set().blocks[0, 0, -1].tolist()
    assert last == [block for block in given.blocks[0, 0, -1].tolist() if block < 16]


@pytest.mark.parametrize("arm", [SPARSE, *FIXED, *SHARED, LAST], ids=lambda arm: arm.name)
def test_no_token_is_read_before_its_time(arm: Arm) -> None:
    torch.manual_seed(0)
    decoder = Decoder(SIZES, arm).double()
    ids = torch.randint(256, (1, 100))
    changed = ids.clone()
    changed[:, 70:] = torch.randint(256, (1, 30))
    with torch.no_grad():
        before, after = decoder(ids), decoder(changed)
    assert torch.allclose(before[:, :70], after[:, :70], atol=1e-9)
    assert not torch.allclose(before[:, 70:], after[:, 70:])


def test_keys_are_mixed_with_those_before() -> None:
    conv = model.KeyConv(1, 2, 3)
    k = torch.randn(1, 1, 5, 2)
    assert torch.equal(conv(k), k)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 10.0, 100.0], [0.0, 0.0, 1.0]]).view(1, 1, 2, 3))
    a, b = k[0, 0].T
    first = torch.stack([a[i] + 10 * a[max(i - 1, 0)] * (i > 0) for i in range(5)])
    first += torch.stack([100 * a[max(i - 2, 0)] * (i > 1) for i in range(5)])
    second = torch.stack([b[max(i - 2, 0)] * (i > 1) for i in range(5)])
    expected = k + torch.nn.functional.silu(torch.stack((first, second), 1))
    assert torch.allclose(conv(k), expected, atol=1e-5)


@pytest.mark.parametrize("arm", [FULL, SPARSE], ids=lambda arm: arm.name)
def test_convolution_starts_as_nothing_learns_and_sees_no_later_token(arm: Arm) -> None:
    ids = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = Decoder(SIZES, arm)
    torch.manual_seed(0)
    decoder = Decoder(replace(SIZES, key_conv=3), arm)
    assert torch.equal(decoder(ids), plain(ids))
    train.token_losses(decoder, ids[:, :-1], ids[:, 1:]).mean().backward()
    weights = [x.weight for x in decoder.modules() if isinstance(x, model.KeyConv)]
    assert len(weights) == SIZES.num_layers
    for weight in weights:
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0
        torch.nn.init.normal_(weight)
    changed = ids.clone()
    changed[:, 70:] = 0
    with torch.no_grad():
        before, after = decoder.double()(ids), decoder(changed)
    assert torch.allclose(before[:, :70], after[:, :70], atol=1e-9)


def test_arms_may_have_a_convolution_by_name() -> None:
    (arm,) = runs.pick_arms(language.ARMS, ["moba 512/3, conv 3"])
    assert arm == replace(language.LARGE, key_conv=3)
    assert arm.attended(2000) == language.LARGE.attended(2000)
    assert not any(arm.key_conv for arm in runs.pick_arms(language.ARMS, None))
    with pytest.raises(SystemExit, match="--arms must be of"):
        runs.pick_arms(language.ARMS, ["moba 512/3, conv 4"])


def test_queries_of_a_tile_choose_by_the_queries_up_to_its_first() -> None:
    q = torch.arange(1.0, 11.0).view(1, 1, 10, 1)
    means = model.shared_choice(q, 1, heads=False, neighbours=4).flatten().tolist()
    first, second, third = 1 / 4, (2 + 3 + 4 + 5) / 4, (6 + 7 + 8 + 9) / 4
    assert means == [first] * 4 + [second] * 4 + [third] * 2


def test_an_arm_switches_to_full_attention_at_its_share_of_the_steps() -> None:
    arm = replace(SPARSE, full_share=0.1)
    switched = [arm.at(step / 20).kind for step in range(20)]
    assert switched == ["moba"] * 18 + ["full"] * 2
    assert arm.at(1.0) == FULL


@pytest.mark.parametrize(("block_size", "top_k"), [(16, 4), (32, 2), (64, 9)])
def test_a_gate_without_spread_is_that_of_the_library(block_size: int, top_k: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 333, 8), torch.randn(2, 2, 333, 8)
    expected = route(q, k, block_size=block_size, top_k=top_k, sink_blocks=1)
    chosen = gates.choose(q, k, block_size, top_k, 0.0)
    assert torch.equal(
        diagnostics.routing_map(chosen, 333), diagnostics.routing_map(expected, 333)
    )


def test_a_gate_with_spread_scores_by_mean_and_extent() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 40, 8).double(), torch.randn(1, 1, 40, 8).double()
    blocks = k[0, 0, :36].view(9, 4, 8)  # the last query lies in block 9
    extent = (blocks.amax(1) - blocks.amin(1)) / 2
    scores = blocks.mean(1) @ q[0, 0, -1] + 0.5 * extent @ q[0, 0, -1].abs()
    best = {0, *(1 + scores[1:].topk(2).indices).tolist()}
    assert set(gates.choose(q, k, 4, 4, 0.5).blocks[0, 0, -1].tolist()) == best


def make_run(arm: Arm) -> tuple[Decoder, train.Batches, train.Recipe]:
    torch.manual_seed(1)
    tokens = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = draw_windows(tokens, 2, 65, 3, step)
        return ids[:, :-1], ids[:, 1:]

    return Decoder(SIZES), batch, train.Recipe(6, every=2)


@pytest.mark.parametrize("arm", [SPARSE, replace(SPARSE, full_share=0.5)], ids=["moba", "hybrid"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_that_stops_resumes_to_the_bit(
    arm: Arm, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, batches, recipe = make_run(arm)
    log = train.train(whole, arm, batches, recipe, tmp_path / "missing", deadline=math.inf)
    first, batches, recipe = make_run(arm)
    step_of_stop = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(step_of_stop))
        with pytest.raises(train.OutOfTime, match=f"step {stop} of 6"):
            train.train(first, arm, batches, recipe, tmp_path / "run", deadline=stop - 0.5)
    second, batches, recipe = make_run(arm)
    resumed = train.train(second, arm, batches, recipe, tmp_path / "run")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    timeless = [[line | {"step_seconds": 0} for line in lines] for lines in (log, resumed)]
    assert timeless[0] == timeless[1]
    third, batches, recipe = make_run(arm)
    again = train.train(third, arm, batches, recipe, tmp_path / "run")
    assert again == resumed
    for name, weight in second.state_dict().items():
        assert torch.equal(weight, third.state_dict()[name]), name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    decoder, batches, recipe = make_run(SPARSE)
    with torch.no_grad():
        decoder.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="loss must be finite, got nan"):
        train.train(decoder, SPARSE, batches, recipe, tmp_path)


def test_the_split_leaks_nothing(tmp_path: Path) -> None:
    for number in range(120):
        (tmp_path / f"package{number}").mkdir()
        (tmp_path / f"package{number}" / "own.py").write_text(some_text(f"package{number}"))
        (tmp_path / f"package{number}" / "more.py").write_text(some_text(f"more{number}"))
    copied = some_text("a vendored copy")
    for number in range(30):  # near-duplicates, some of them in each part, and exact ones
        (tmp_path / f"package{number}" / "vendored.py").write_text(f"{copied}# {number}\n")
        (tmp_path / f"package{number}" / "same.py").write_text(some_text("the same"))
    files = read_files([tmp_path])
    contents = ["".join(file.text.split()) for file in files]
    assert len(set(contents)) == len(contents)
    train_files, validation = split(files, 10**6)
    assert validation
    packages = [{file.package for file in part} for part in (train_files, validation)]
    assert not packages[0] & packages[1]
    known = {line for file in train_files for line in long_lines(file.text)}
    assert not known & {line for file in validation for line in long_lines(file.text)}
    assert split(files, 10**6) == (train_files, validation)


def test_a_vendored_copy_is_left_out_of_validation() -> None:
    text = some_text("shared")
    files = [File(f"p{n}", Path(f"p{n}.py"), some_text(f"own {n}")) for n in range(100)]
    copies = [replace(file, text=f"{text}# {n}") for n, file in enumerate(files)]
    train_files, validation = split([*files, *copies], 10**6)
    assert {file.text.startswith(text) for file in train_files} == {True, False}
    assert not any(file.text.startswith(text) for file in validation)


def test_a_split_without_validation_is_refused() -> None:
    with pytest.raises(ValueError, match="validation must have files, got none of 1"):
        split([File("only", Path("only.py"), some_text("only"))], 10**6)


def test_recall_asks_for_pairs_that_lie_where_it_says() -> None:
    drawn = retrieval.draw(3, 256, 8, torch.Generator().manual_seed(0))
    asked = (drawn.targets != train.IGNORED).nonzero().tolist()
    assert len(asked) == 3 * 8
    for row, at in asked:
        pair = at - int(drawn.distances[row, at])
        assert drawn.ids[row, pair] == drawn.ids[row, at]
        assert drawn.ids[row, pair + 1] == drawn.targets[row, at]
        assert (drawn.ids[row, :at] == drawn.ids[row, at]).sum() == 1


def test_tables_hold_complete_seeds_alone() -> None:
    rows = [{"arm": arm, "seed": seed, "loss": seed + 1.0} for arm in "ab" for seed in (0, 1)]
    document: dict[str, Any] = {"arms": ["a", "b"], "seeds": 3, "runs": rows}
    assert runs.complete_seeds(document) == [0, 1]
    column = runs.Column("loss", runs.key("loss"), ".1f")
    assert "| a | 1.5 ± 0.7 |" in runs.table(document, [column])
    document["runs"] = rows[:2]
    assert "No seed was finished" in runs.table(document, [column])


def document_of(losses: dict[str, list[float]], times: dict[str, list[float]]) -> dict[str, Any]:
    rows = [
        {"arm": arm, "seed": seed, "loss": loss, "step_seconds": times[arm][seed]}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return {"arms": list(losses), "seeds": 3, "runs": rows}


def test_verdicts_need_three_seeds_and_an_interval_without_zero() -> None:
    assert report.verdict([-0.1, -0.11], lower=True) == "open"
    assert report.verdict([-0.1, -0.11, -0.12], lower=True) == "better"
    assert report.verdict([-0.1, -0.11, -0.12], lower=False) == "worse"
    assert report.verdict([-0.1, 0.1, -0.12], lower=True) == "not told apart"


def test_moba_that_loses_and_saves_nothing_is_told() -> None:
    losses = {"full": [1.0, 1.1, 1.2], "moba 8/4": [1.5, 1.61, 1.7], "window 8/4": [2.0] * 3}
    slow = {"full": [1.0] * 3, "moba 8/4": [2.0, 2.1, 2.2], "window 8/4": [1.0] * 3}
    told = report.falsified(document_of(losses, slow))
    assert "moba 8/4: yes. Loss against full: worse; step against window 8/4 worse." in told
    told = report.falsified(document_of(losses, slow | {"moba 8/4": [0.5, 0.51, 0.5]}))
    assert "moba 8/4: no. Loss against full: worse; step against window 8/4 better." in told


def test_results_of_other_settings_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    arguments = [*run_arguments(folder, tmp_path / "out.json"), *TEXT]
    blocks.main([*arguments, "--arms", "full"])
    with pytest.raises(SystemExit, match="steps must be that of the results"):
        blocks.main([*arguments, "--arms", "full", "--steps", "3"])


def test_minutes_that_are_over_leave_what_was_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*run_arguments(folder, tmp_path / "out.json"), *TEXT]
    blocks.main([*arguments, "--arms", "moba 4/24", "--seeds", "2", "--minutes", "0"])
    assert "the same command goes on from there" in capsys.readouterr().out
    blocks.main([*arguments, "--arms", "moba 4/24"])
    assert [row["seed"] for row in json.loads((tmp_path / "out.json").read_text())["runs"]] == [0]


def test_a_run_that_another_process_has_at_hand_is_left_to_it(
    folder: Path, tmp_path: Path
) -> None:
    arguments = [*run_arguments(folder, tmp_path / "out.json"), *TEXT, "--together"]
    arguments += ["--batch", "1", "--arms", "full", "moba 4/24"]
    before = set(folder.iterdir())
    blocks.main([*arguments, "--minutes", "0"])  # makes the folder of the first run
    (run,) = set(folder.iterdir()) - before - {folder / "out.json.lock"}
    with files.lock(run / "lock") as held:
        assert held
        blocks.main(arguments)
    told = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in told["runs"]] == ["moba 4/24"]
    assert "step_seconds" not in told["runs"][0]
    blocks.main(arguments)
    told = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in told["runs"]] == ["moba 4/24", "full"]


def test_results_of_two_processes_become_one() -> None:
    common: dict[str, Any] = {"arms": ["a"], "commands": ["x"], "seeds": 1}
    old = common | {"runs": [{"arm": "a", "seed": 0}], "before": 1}
    new = common | {"runs": [{"arm": "b", "seed": 0}], "arms": ["b"], "seeds": 2}
    both = runs.merged(old, new)
    assert both["runs"] == [*old["runs"], *new["runs"]]
    assert (both["arms"], both["seeds"], both["before"]) == (["a", "b"], 2, 1)
    assert runs.merged(both, new) == both


def test_a_run_is_kept_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, batches, recipe = make_run(SPARSE)
    monkeypatch.setattr(train, "KEEP_SECONDS", -1)
    kept = []
    monkeypatch.setattr(train, "save", lambda value, path: kept.append((path.stem, value)))
    train.train(decoder, SPARSE, batches, recipe, tmp_path)
    assert [name for name, _ in kept] == [*["checkpoint"] * 6, "weights"]
    assert [state["step"] for _, state in kept[:-1]] == [0, 1, 2, 3, 4, 5]


def layers_of(recalls: list[float], entropies: list[float]) -> list[dict[str, float]]:
    rest = {"regret": 0.1, "imbalance": 2.0, "distance": 3.0, "union": 0.5, "tile fill": 0.2}
    return [
        {"layer": layer, "recall": recall, "entropy": entropy, **rest}
        for layer, (recall, entropy) in enumerate(zip(recalls, entropies, strict=True))
    ]


def test_words_about_the_router_come_from_its_measures() -> None:
    losses = {"full": [1.0], "moba 8/4": [1.5], "window 8/4": [2.0]}
    document = document_of(losses, {name: [1.0] for name in losses}) | {"seeds": 1}
    for row in document["runs"]:
        row["routing"] = layers_of([0.4, 0.6], [0.5, 0.7]) if row["arm"] == "moba 8/4" else []
    told = report.routing_words(document)
    assert "- moba 8/4: what is read holds 50.0% of dense attention's weight, from 40.0%" in told
    assert "83.3% of what as many blocks could hold" in told
    assert "in no layer has the router collapsed" in told
    assert "window" not in told
    document["runs"][1]["routing"] = layers_of([0.4, 0.6], [0.5, 0.05])
    assert "choose nearly alike in layer 1" in report.routing_words(document)


def run_arguments(folder: Path, out: Path) -> list[str]:
    places = ["--folder", str(folder), "--out", str(out), "--device", "cpu"]
    return ["--preset", "tiny", "--steps", "2", "--seeds", "1", *places]


TEXT = ["--megabytes", "1"]


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """Run all experiments that can run, and return the folder of their results."""
    out = folder / "results"
    mains: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
        "language": (language.main, [*TEXT, "--arms", *with_conv(language.ARMS)]),
        "retrieval": (retrieval.main, ["--arms", *with_conv(retrieval.ARMS)]),
        "density": (density.main, TEXT),
        "blocks": (blocks.main, TEXT),
        "shared": (shared.main, TEXT),
        "steps": (steps.main, TEXT),
    }
    if HAS_TRANSFORMERS:
        more = [*TEXT, "--tokens", "bytes", "--model", tiny_llama(folder)]
        mains["continued"] = continued.main, more
    for name, (main, more) in mains.items():
        main([*run_arguments(folder, out / f"experiment_{name}.json"), *more])
    if HAS_TRANSFORMERS:
        sizes = ["--length", "128", "--gates", "16/3", "32/2", "--spreads", "0", "0.25"]
        place = ["--tokens", "bytes", "--device", "cpu"]
        place += ["--out", str(out / "experiment_gates.json")]
        gates.main(["--model", str(folder / "llama"), *sizes, *place])
    return out


def with_conv(arms: Sequence[Arm]) -> list[str]:
    """Return the names of all arms, and one with a convolution."""
    fitted = [runs.PRESETS["tiny"].fit(arm) for arm in arms]
    return [*(arm.name for arm in fitted), f"{fitted[1].name}, conv 3"]


def tiny_llama(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, **heads)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return str(folder / "llama")


@pytest.mark.slow
@pytest.mark.parametrize("name", report.EXPERIMENTS)
def test_every_experiment_runs(name: str, results: Path) -> None:
    if name == "continued":
        pytest.importorskip("transformers")
    document = json.loads((results / f"experiment_{name}.json").read_text())
    assert runs.complete_seeds(document) == [0]
    assert {row["arm"] for row in document["runs"]} == set(document["arms"])
    for row in document["runs"]:
        assert row["step_seconds"] > 0
        assert all(math.isfinite(loss) for _, loss in row.get("curve", ()))
        assert "loss" not in row or math.isfinite(row["loss"])


@pytest.mark.slow
def test_the_report_tells_what_was_run_and_what_was_not(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    page = tmp_path / "evidence.md"
    report.main(["--results", str(results), "--out", str(page)])
    told = page.read_text()
    assert "was not run" not in told
    assert told.count("| full |") >= 5
    assert "better at every gate" in told
    for line in told.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("](")[2].removesuffix(")")).stat().st_size > 0
    report.main(["--results", str(tmp_path / "none"), "--out", str(page)])
    told = page.read_text()
    assert told.count("was not run") == len(report.EXPERIMENTS) + 1
    assert "| full |" not in told
    document = json.loads((results / "experiment_language.json").read_text()) | {"runs": []}
    (tmp_path / "experiment_language.json").write_text(json.dumps(document))
    report.main(["--results", str(tmp_path), "--out", str(page)])
    told = page.read_text()
    assert told.count("was not run") == len(report.EXPERIMENTS)
    assert "experiment_language: no seed was finished by all arms" in told
