"""A short run of the fuzzer, and tests that it finds what is wrong and makes it small."""

import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import settings

import moba_flex
from tests import fuzz, helpers
from tests.case import Case

PLANS = ("routed", "auto", "dense")  # the others need compilation or a GPU


@pytest.fixture(autouse=True)
def prepared(poison: None) -> Iterator[None]:
    """Do as a process of the fuzzer's own: one thread, and poisoned memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_new_cases_are_right() -> None:
    seed = Random().randrange(2**32)
    tally = fuzz.fuzz(range(4 * settings().max_examples), seed, "cpu", PLANS, 20.0)
    assert not tally.failures, f"seed {seed}: {tally.failures}"
    found = fuzz.report(tally, 1.0)
    assert f"{tally.cases} cases in 1 s: 0 wrong, {tally.refused} refused" in found
    assert re.search(r"layout +.*plain \d+", found)
    assert re.search(r"cpu routed +.*dq 0\.\d\d of \d+", found)


@pytest.mark.slow
def test_new_cases_in_a_graph_are_right() -> None:
    seed = Random().randrange(2**32)
    tally = fuzz.fuzz(range(settings().max_examples // 5), seed, "cpu", PLANS, 0.0, graph=True)
    assert not tally.failures, f"seed {seed}: {tally.failures}"


def attend(*inputs: Any, **options: Any) -> Any:
    return moba_flex.moba_attention(*inputs, **options)


def scaled(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, aux = attend(q, k, v, **options)
    return out * 1.05, aux


def wrong_gradient(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v.detach() + 1.05 * (v - v.detach()), **options)


def no_documents(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **{**options, "cu_seqlens": None, "cu_seqlens_q": None})


def no_padding(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **{**options, "key_mask": None})


def no_softcap(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **{**options, "softcap": None})


def no_sinks(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **{**options, "sink_blocks": 0})


def no_refusal(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **{**options, "plan": "auto"})


def crash(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **options)[0][0, 0, 1]


def late_key(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, aux = attend(q, k, v, **options)
    if not out.numel():
        return out, aux
    return out.index_fill(2, torch.tensor([out.shape[2] - 1]), 0.0), aux


@pytest.mark.parametrize(
    ("wrong", "about", "keys", "kind"),
    [
        (scaled, {}, 1, "AssertionError: out: error"),
        (wrong_gradient, {"pads": None}, 2, "AssertionError: dv: error"),
        (no_documents, {"pads": None}, 4, "AssertionError"),
        (no_padding, {"docs": None}, 4, "AssertionError"),
        (no_softcap, {"score": "", "mask": ""}, 3, "AssertionError"),
        (no_sinks, {"local_blocks": 0}, 8, "AssertionError"),
        (no_refusal, {"plan": "dense"}, 3, "AssertionError: must be refused by"),
        (crash, {"batch": 1}, 2, ""),
        (late_key, {"docs": None, "pads": None}, 2, "AssertionError: out: error"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_finds_what_is_wrong_and_makes_it_small(
    wrong: Callable[..., Any],
    about: dict[str, Any],
    keys: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(helpers, "moba_attention", wrong)
    for number in range(400):
        case = fuzz.draw(Random(f"{wrong.__name__} {number}"), plans=PLANS)
        found = fuzz.run(case)
        if found not in (None, "refused") and kind in str(found):
            break
    else:
        pytest.fail("not found")
    small = fuzz.shrink(case, 7.0)
    assert small.kv_len <= keys
    assert small.batch * small.num_heads == 1
    assert {key: getattr(small, key) for key in about} == about
    again = Case.parse(str(small))
    assert again == small
    assert kind in str(fuzz.run(again))
    monkeypatch.undo()
    assert fuzz.run(again) in (None, "refused")


def test_a_line_is_the_case(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(300):
        case = fuzz.draw(Random(number), plans=fuzz.PLANS)
        assert Case.parse(str(case)) == case
    assert fuzz.main(["--case", "q_len=3 kv_len=9 block_size=2 top_k=2 plan=routed"]) == 0
    assert capsys.readouterr().out == "right\n"
    with pytest.raises(ValueError, match=r"case must be of .*, got 'keys'"):
        Case.parse("keys=3")


def test_runs_spread_over_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "6", "--jobs", "2", "--plan", "routed"]) == 0
    assert "6 cases in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        # Queries that see from the same key on, and not to the same.
        "q_len=2 kv_len=3 block_size=2 causal=False grads= lse=False pattern=global_local:3",
    ],
)
def test_cases_that_were_wrong(line: str) -> None:
    assert fuzz.run(Case.parse(line)) is None


@pytest.mark.slow
def test_masked_plan_on_cpu_keeps_scores_in_float32() -> None:
    """FlexAttention traces them in the dtype of q."""
    line = "batch=2 group=2 q_len=30 kv_len=30 block_size=8 top_k=2 dtype=bfloat16 scale=1.0 "
    assert (
        fuzz.run(Case.parse(line + "score=relative+temperature grads= lse=False plan=masked"))
        is None
    )


@pytest.mark.slow
def test_masked_plan_on_cpu_at_a_second_size() -> None:
    """With ten symbols of sizes and more, PyTorch's C++ template does not compile."""
    kind = "num_kv_heads=2 group=8 head_dim=256 block_size=128 top_k=2 ties=True score=relative "
    kind += "grads= lse=False plan=masked "
    for sizes in (
        "q_len=20 kv_len=20 seed=1 pads=((0,11),)",
        "batch=3 q_len=79 kv_len=79 seed=2 pads=((6,35),(4,0),(3,0))",
    ):
        assert fuzz.run(Case.parse(kind + sizes)) is None
