"""A differential fuzzer: whole requests drawn at random, against the oracle.

    python -m tests.fuzz --cases 20000 --seed 1 --jobs 2
    python -m tests.fuzz --case 'q_len=3 kv_len=9 block_size=2 top_k=2 plan=routed'

A case is drawn from the seed and its number alone. What fails is made smaller, and printed as a
line that `--case` takes.
"""

import argparse
import math
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch

from moba_flex.compile.plans import interpreted
from tests.case import MEMORY, Case
from tests.helpers import WORST, assert_matches_oracle, attention

PLANS = ("routed", "auto", "dense", "decode", "fused", "masked")
_WEIGHTS = {
    # Compiled FlexAttention takes many seconds for each kind of request.
    "cpu": {
        "routed": 1.0,
        "auto": 0.4,
        "dense": 0.2,
        "decode": 0.4,
        "fused": 0.01,
        "masked": 0.002,
    },
    "cuda": {
        "fused": 1.0,
        "auto": 0.1,
        "dense": 0.05,
        "decode": 0.1,
        "routed": 0.1,
        "masked": 0.05,
    },
}
# Kinds of requests, of a plan on a device: what a compiler makes something new for.
_KINDS = {"cpu masked": 4, "cuda fused": 24, "cuda decode": 24, "cuda": 4}
_MAX_PAIRS = 300_000  # of queries and keys, over rows and heads
_DTYPES = {
    "cpu": [torch.float32] * 4 + [torch.bfloat16] * 3 + [torch.float16] + [torch.float64] * 2,
    "cuda": [torch.bfloat16] * 4 + [torch.float16] * 2 + [torch.float32] * 2,
}


def draw(rng: Random, device: str = "cpu", plans: Sequence[str] = PLANS) -> Case:
    """Return a random request.

    Its kind, all that a compiler specializes on, comes from a generator of its own, so that plans
    that must be compiled have few; lengths, layout and values are always new.
    """
    weights = [_WEIGHTS[device].get(plan, 0.0) for plan in plans]
    plan = rng.choices(plans, weights)[0]
    number = _KINDS.get(f"{device} {plan}", _KINDS.get(device, 2**32))
    case = _draw_kind(Random(rng.randrange(number)), device, plan)
    case = replace(
        case, seed=rng.randrange(2**32), batch=rng.choices((0, 1, 2, 3), (1, 50, 30, 19))[0]
    )
    return _draw_sizes(rng, case)


def in_graph(case: Case) -> Case:
    """Return the request in a graph, which knows no lengths of rows, nor functions on CPU."""
    case = replace(case, graph=True)
    if (case.docs is not None or case.pads is not None) and case.plan == "dense":
        case = replace(case, top_k=case.top_k + case.kv_len // case.block_size, head_top_k=None)
    return replace(case, score="", mask="") if case.device == "cpu" else case


def _draw_kind(rng: Random, device: str, plan: str) -> Case:
    """Return a request without sizes: heads, gate, mods, and which layout it will have."""

    def maybe(chance: float, value: Any, otherwise: Any = None) -> Any:
        return value if rng.random() < chance else otherwise

    cuda, compiled = device == "cuda", plan == "masked" or (device == "cuda" and plan != "fused")
    heads = [16, 32, 64, 128] * 2 + [24, 40, 80, 96, 192, 256, rng.randint(16, 256)]
    block_size = round(math.exp(rng.uniform(math.log(16 if cuda else 1), math.log(256))))
    ties = rng.random() < 0.25
    if ties:  # means of small integers over a power of two of keys are exact
        block_size = 2 ** (block_size.bit_length() - 1)
    sink_blocks, local_blocks = rng.choices(
        ((0, 0), (1, 0), (0, 1), (2, 1), (1, 3)), (6, 1, 1, 1, 1)
    )[0]
    least = 1 + sink_blocks + local_blocks
    top_k = least + rng.choice((0, 0, 1, 1, 2, 2, 3, 4, 7, 12, 24))
    num_kv_heads, group = rng.choices((1, 2, 3), (5, 4, 1))[0], rng.choice((1, 1, 2, 3, 4, 8))
    score = rng.choices(
        ("", "alibi", "relative", "temperature", "alibi+relative", "relative+temperature"),
        (20, 1, 1, 1, 1, 1),
    )[0]
    masks = "window:1", "window:7", "window:100", "random:0.9", "random:0.3", "random:0"
    # Compiled FlexAttention has no backward on CPU.
    no_grad = plan == "decode" or (device == "cpu" and plan == "masked")
    some = "".join(name for name in "qkvc" if rng.random() < 0.5)
    fixed = ("sliding_window", "sink_window", "global_local:3", "strided:2")
    lists = tuple(f"{kind}:{n}" for kind in ("given", "shared") for n in (0, 1, 3, 9))
    given = rng.choice(rng.choice((fixed, lists)))
    pattern = maybe(0.16, given, "") if plan != "dense" else ""
    layout = rng.choices(("", "docs", "q_docs", "pads"), (30, 25, 15, 30))[0]
    return Case(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=rng.choice(heads),
        v_dim=maybe(0.2, rng.choice(heads)),
        block_size=block_size,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        head_top_k=maybe(
            0.15, tuple(rng.randint(least, top_k) for _ in range(num_kv_heads * group))
        ),
        causal=rng.random() < 0.75,
        scale=rng.choices((None, 0.3, 1.0, -0.2, 0.0), (12, 3, 2, 2, 1))[0],
        dtype=rng.choice(_DTYPES[device][: 8 if compiled else None]),
        ties=ties,
        device=device,
        softcap=maybe(0.15, rng.choice((0.5, 3.0, 30.0))),
        score=score,
        mask=maybe(0.15, rng.choice(masks), ""),
        grads="" if no_grad else rng.choices(("qkvc", "", some), (5, 1, 4))[0],
        lse=(plan == "decode" or not no_grad) and rng.random() < 0.6,
        # Placeholders: sizes come later.
        docs=() if layout.endswith("docs") else None,
        q_docs=() if layout == "q_docs" else None,
        pads=((0, 0),) if layout == "pads" else None,
        plan=plan,
        pattern=pattern,
    )


def _draw_sizes(rng: Random, case: Case) -> Case:
    """Fill in lengths, layout, memory and planted values."""
    longest = rng.choice((20, 100, 300, 700))
    if rng.random() < 0.5:
        kv_len = round(math.exp(rng.uniform(0, math.log(longest))))
    else:  # whole blocks, and what is next to them
        kv_len = case.block_size * rng.randint(1, 12) + rng.choice((0, 0, 1, -1))
    most = math.isqrt(_MAX_PAIRS // max(1, case.batch * case.num_heads))
    kv_len = max(1, min(kv_len, longest, most))
    if case.docs is not None:
        case = replace(case, docs=(docs := _draw_docs(rng, kv_len, case.block_size)))
        if case.q_docs is not None:
            pick = rng.choice((lambda n: rng.randint(0, n), lambda n: min(n, 1), lambda n: n))
            case = replace(case, q_docs=tuple(pick(n) for n in docs))
        if rng.random() < 0.3:
            case = replace(case, tail=(rng.choice((0, 1, 40)), rng.choice((1, 7, 90))))
    else:
        some = rng.randint(1, kv_len)
        q_len = rng.choices((kv_len, some, 1, 0), (50, 25, 15, 1))[0]
        case = replace(case, q_len=q_len, kv_len=kv_len)
        if case.pads is not None:
            case = replace(case, pads=tuple(_draw_pad(rng, kv_len) for _ in range(case.batch)))
    weights = [{"contiguous": 12, "transposed": 4, "sliced": 2}.get(kind, 0.4) for kind in MEMORY]
    of_q, of_k, of_v = rng.choices(MEMORY, weights, k=3)
    case = replace(case, memory=(of_q, of_k, of_v))
    # FlexAttention on CUDA spreads what is not finite over a tile, as the README says.
    if rng.random() < 0.06 and (case.device == "cpu" or case.plan == "fused"):
        names = rng.sample(("q", "k", "v", "q*", "k*", "v*"), rng.randint(1, 2))
        plants = tuple(f"{name}={rng.choice(('nan', 'inf', '-inf'))}" for name in names)
        case = replace(case, plants=plants)
    return case


def _draw_docs(rng: Random, total: int, block_size: int) -> tuple[int, ...]:
    """Cut `total` keys into documents, some of them empty or of one token."""
    kind = rng.randrange(4)
    lengths: list[int] = []
    while sum(lengths) < total and len(lengths) < 200:
        left = total - sum(lengths)
        size = {
            0: rng.choice((0, 1, 1, 2, 3)),  # many
            1: rng.randint(0, left),
            2: block_size * rng.randint(1, 4) + rng.choice((-1, 0, 0, 1)),
            3: rng.choice((0, 1, left, rng.randint(0, left))),
        }[kind]
        lengths.append(min(size, left))
    return tuple(lengths)


def _draw_pad(rng: Random, kv_len: int) -> tuple[int, int]:
    left, right = sorted((rng.randint(0, kv_len), rng.randint(0, kv_len)))
    pads = (0, 0), (left, 0), (0, kv_len - right), (left, kv_len - right), (kv_len, 0)
    return rng.choices(pads, (3, 3, 3, 3, 1))[0]


def refusal(case: Case) -> str | None:
    """Return how the library must refuse a case, if it must."""
    if case.plan == "fused" and case.device == "cpu" and not interpreted():
        return "q must be on cuda for plan='fused', got cpu: let plan be 'auto'"
    if case.plan in ("fused", "decode"):
        for name in ("score", "mask"):
            if getattr(case, name):
                return (
                    f"{name}_mod must be None for plan='{case.plan}', got a function: "
                    "let plan be 'routed'"
                )
    if case.plan == "dense" and case.head_top_k is not None:
        return "head_top_k must be None for plan='dense', got a Tensor: let plan be 'auto'"
    if case.plan == "dense" and case.top_k < -(-case.longest // case.block_size):
        return r"top_k must cover all \d+ blocks for plan='dense', got \d+: raise top_k, .*"
    if case.plan == "masked" and case.dtype == torch.float64:
        return r"q must be .*, got torch.float64: convert q, k and v"
    return None


def run(case: Case) -> str | None:
    """Run a case and return what is wrong with it, or None; "refused" if it must be."""
    expected = refusal(case)
    try:
        if expected is not None:
            said = _said(case)
            assert re.fullmatch(expected, said), f"must be refused by {expected}, got {said}"
            return "refused"
        assert_matches_oracle(f"{case.device} {case.plan}", case, attention(case))
    except Exception as error:  # whatever it is, it is a finding
        at = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error) or at.line or "").split(" for Case(")[0].splitlines()[0]
        place = f"{os.path.basename(at.filename)}:{at.lineno}"
        return f"{type(error).__name__}: {message[:200]} ({place})"
    return None


def _said(case: Case) -> str:
    """Return the message with which the library refuses a case."""
    try:
        attention(replace(case, graph=False))(*case.inputs(), *case.captured().values())
    except (TypeError, ValueError) as error:
        return str(error)
    return "a result"


def simpler(case: Case) -> Iterator[Case]:
    """Yield cases that are smaller or plainer in one respect, the most so first."""
    for name in ("plants", "docs", "tail", "q_docs", "pads", "head_top_k", "softcap", "score",
                 "mask", "pattern", "v_dim", "scale", "memory", "dtype", "causal", "ties",
                 "lse"):  # fmt: skip
        plain: dict[str, Any] = {name: Case.__dataclass_fields__[name].default}
        if getattr(case, name) != plain[name]:
            yield replace(case, **plain)
    yield from (replace(case, score=part) for part in case.score.split("+") if part != case.score)
    yield from (replace(case, plants=(one,)) for one in case.plants if len(case.plants) > 1)
    for i in range(3):
        memory = list(case.memory)
        memory[i] = "contiguous"
        yield replace(case, memory=(memory[0], memory[1], memory[2]))
    yield from (replace(case, grads=case.grads.replace(name, "")) for name in ("qkvc", *"qkvc"))
    if case.lse:
        yield replace(case, lse=False)

    least = 1 + case.sink_blocks + case.local_blocks
    for name, low in (
        ("batch", 1), ("group", 1), ("num_kv_heads", 1), ("head_dim", 16), ("v_dim", 16),
        ("sink_blocks", 0), ("local_blocks", 0), ("top_k", least), ("block_size", 1),
        ("kv_len", 1), ("q_len", 1), ("seed", 0),
    ):  # fmt: skip
        value = getattr(case, name)
        if value is None:
            continue
        for less in sorted({low, (value + low) // 2, value - 1}):
            if not low <= less < value or (name == "seed" and less):
                continue
            smaller: dict[str, Any] = {name: less}
            if name == "kv_len":
                smaller["q_len"] = min(case.q_len, less)
                yield replace(case, kv_len=less, q_len=max(0, case.q_len - (value - less)))
            if case.head_top_k is not None:
                heads = smaller.get("group", case.group) * smaller.get(
                    "num_kv_heads", case.num_kv_heads
                )
                most = smaller.get("top_k", case.top_k)
                smaller["head_top_k"] = tuple(min(n, most) for n in case.head_top_k[:heads])
            yield replace(case, **smaller)
    yield from _simpler_layout(case)


def _simpler_layout(case: Case) -> Iterator[Case]:
    """Yield cases with fewer or shorter documents, or less padding."""
    if case.docs is not None:
        q_docs = case.docs if case.q_docs is None else case.q_docs
        pairs = list(zip(q_docs, case.docs, strict=True))
        many = len(pairs)
        cuts = [pairs[many // 2 :], pairs[: many // 2]] if many > 2 else []
        cuts += [pairs[:i] + pairs[i + 1 :] for i in range(many)]
        for i, (q_n, k_n) in enumerate(pairs):
            for less in sorted({k_n // 2, k_n - 1}):
                if 0 <= less < k_n:
                    cuts.append([*pairs[:i], (max(0, q_n - k_n + less), less), *pairs[i + 1 :]])
        for cut in cuts:
            if cut:
                q, k = zip(*cut, strict=True)
                yield replace(case, docs=k, q_docs=None if case.q_docs is None else q)
    if case.pads is not None:
        for kv_len in sorted({case.kv_len // 2, case.kv_len - 1} - {0}):
            q_len, gone = min(case.q_len, kv_len), case.kv_len - kv_len
            for pads in (
                tuple((left // 2, right // 2) for left, right in case.pads),
                tuple((max(0, left - gone), right) for left, right in case.pads),
                tuple((left, max(0, right - gone)) for left, right in case.pads),
            ):
                yield replace(case, kv_len=kv_len, q_len=q_len, pads=pads)
        for row, pad in enumerate(case.pads):
            for fewer in ((0, 0), (0, pad[1]), (pad[0], 0), (pad[0] // 2, pad[1] // 2)):
                if fewer != pad:
                    rows = (*case.pads[:row], fewer, *case.pads[row + 1 :])
                    yield replace(case, pads=rows)


def shrink(case: Case, seconds: float = 60.0) -> Case:
    """Return the simplest case found that is wrong in the same way."""

    def way(found: str | None) -> str:
        return re.split(r"\d", found or "")[0]

    wrong, stop = way(run(case)), time.monotonic() + seconds
    place, tried = 0, 0  # what failed to help before will hardly help now: go on from there
    while tried < len(candidates := list(simpler(case))):
        candidate = candidates[place := place % len(candidates)]
        if time.monotonic() > stop:
            break
        if candidate != case and way(run(candidate)) == wrong:
            case, tried = candidate, 0
        else:
            place, tried = place + 1, tried + 1
    return case


def tags(case: Case) -> Iterator[tuple[str, str]]:
    """Say what was drawn, for the table."""
    layout = "plain"
    if case.docs is not None:
        layout = "documents, fewer queries" if case.q_docs is not None else "documents"
        most = len(case.docs)
        yield "documents", "1" if most == 1 else "2-9" if most < 10 else "10+" if most else "0"
        for n, name in ((0, "an empty one"), (1, "one of one token")):
            if n in case.docs:
                yield "documents", name
        if any(case.tail):
            yield "documents", "padding behind them"
    if case.pads is not None:
        layout = "padded"
        for left, right in set(case.pads):
            full = left + right == case.kv_len
            sides = ("left" if left else "") + ("right" if right else "")
            yield "padding (rows)", "all" if full else sides.replace("tr", "t+r") or "none"
    yield "plan", f"{case.plan}, in a graph" if case.graph else case.plan
    yield "layout", layout
    if case.docs is None:
        q, kv = case.q_len, case.kv_len
        yield (
            "queries",
            "all" if q == kv else "none" if q == 0 else "1 of more" if q == 1 else "some",
        )
    yield "gate", "causal" if case.causal else "not causal"
    if case.pattern:
        yield "gate", case.pattern.partition(":")[0]
    elif case.sink_blocks or case.local_blocks:
        yield "gate", "forced blocks"
    if case.head_top_k is not None:
        yield "gate", "top_k by head"
    if case.ties:
        yield "gate", "forced ties"
    mods = [name for name in ("softcap", "score", "mask") if getattr(case, name)]
    yield "mods", "+".join(mods) or "none"
    if case.score:
        yield "score_mod", case.score
    if case.mask:
        yield "mask_mod", case.mask.partition(":")[0]
    yield "dtype", str(case.dtype).removeprefix("torch.")
    for size, edges in (
        ("block_size", (1, 2, 16, 64, 256)),
        ("kv_len", (1, 2, 16, 64, 128, 256)),
        ("head_dim", (1, 16, 17, 64, 128)),
    ):
        value = getattr(case, size)
        yield size, f"{max((e for e in edges if e <= value), default=0)}+"
    yield "batch", str(case.batch)
    yield "group", str(case.group)
    if case.v_dim is not None:
        yield "head_dim", "another of v"
    for memory in set(case.memory):
        yield "memory", memory
    yield (
        "scale",
        "default"
        if case.scale is None
        else "0"
        if case.scale == 0
        else ("positive" if case.scale > 0 else "negative"),
    )
    yield "gradients", "all" if case.grads == "qkvc" else case.grads or "none"
    yield "lse", "asked for" if case.lse else "no"
    for plant in case.plants:
        yield "planted", plant


@dataclass
class Tally:
    """What came of many cases."""

    cases: int = 0
    refused: int = 0
    drawn: Counter[tuple[str, str]] = field(default_factory=Counter)
    worst: dict[str, tuple[float, int]] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, other: "Tally") -> None:
        """Take in another tally."""
        self.cases += other.cases
        self.refused += other.refused
        self.drawn += other.drawn
        self.failures += other.failures
        self.slowest = max(self.slowest, other.slowest)
        for key, (ratio, count) in other.worst.items():
            before = self.worst.get(key, (0.0, 0))
            self.worst[key] = max(before[0], ratio), before[1] + count


def fuzz(
    numbers: range,
    seed: int,
    device: str,
    plans: Sequence[str],
    shrink_for: float = 60.0,
    graph: bool = False,
    until: float = math.inf,
) -> Tally:
    """Run the cases of these numbers; begin none past a time of `time.time`."""
    tally = Tally()
    WORST.clear()
    for number in numbers:
        if time.time() > until:
            break
        tally.cases += 1
        case = draw(Random(f"{seed} {number}"), device, plans)
        case = in_graph(case) if graph else case
        start = time.monotonic()
        found = run(case)
        tally.slowest = max(tally.slowest, (time.monotonic() - start, str(case)))
        tally.drawn.update(tags(case))
        if found == "refused":
            tally.refused += 1
        elif found is not None:
            kept = dict(WORST)
            tally.failures.append((found, str(case), str(shrink(case, shrink_for))))
            WORST.clear()
            WORST.update(kept)
    tally.worst = dict(WORST)
    return tally


def report(tally: Tally, seconds: float) -> str:
    """Return counts, worst errors and what was drawn, as text."""
    lines = [
        f"{tally.cases} cases in {seconds:.0f} s: {len(tally.failures)} wrong, "
        f"{tally.refused} refused as they must be",
        f"slowest: {tally.slowest[0]:.1f} s: {tally.slowest[1]}",
        "worst error / tolerance:",
    ]
    by_name: dict[str, list[str]] = {}
    for name, (ratio, count) in sorted(tally.worst.items()):
        plan, _, quantity = name.rpartition(" ")
        by_name.setdefault(plan, []).append(f"{quantity} {ratio:.2f} of {count}")
    lines += [f"  {plan:14}{', '.join(words)}" for plan, words in by_name.items()]
    lines.append("drawn:")
    by_feature: dict[str, list[str]] = {}
    for (feature, value), count in tally.drawn.most_common():
        by_feature.setdefault(feature, []).append(f"{value} {count}")
    lines += [f"  {feature:14}{', '.join(words)}" for feature, words in sorted(by_feature.items())]
    return "\n".join(lines)


def _prepare() -> None:
    """Make a process of its own ready: one thread, and NaN in uninitialised memory."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _spread(
    task: Callable[..., Tally], chunks: Sequence[range], jobs: int, *options: Any
) -> Iterator[Tally]:
    if jobs == 1:
        _prepare()
        yield from (task(chunk, *options) for chunk in chunks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare) as pool:
        futures = [pool.submit(task, chunk, *options) for chunk in chunks]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=PLANS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds for each failure")
    parser.add_argument("--graph", action="store_true", help="compile each call on its own")
    parser.add_argument("--case", help="run this one alone")
    options = parser.parse_args(arguments)
    if options.case is not None:
        _prepare()
        case = Case.parse(options.case)
        found = run(case)
        print(found or "right")
        return int(found not in (None, "refused"))

    start, tally = time.monotonic(), Tally()
    until = time.time() + 60 * options.minutes
    step = max(1, min(50, options.cases // (4 * options.jobs)))
    chunks = [range(i, min(i + step, options.cases)) for i in range(0, options.cases, step)]
    what = options.seed, options.device, options.plan, options.shrink, options.graph, until
    for part in _spread(fuzz, chunks, options.jobs, *what):
        for found, drawn, small in part.failures:
            print(
                f"{found}\n  drawn: {drawn}\n  python -m tests.fuzz --case '{small}'", flush=True
            )
        tally.add(part)
        if sys.stderr.isatty():
            print(f"\r{tally.cases}", end=" ", file=sys.stderr, flush=True)
    print(report(tally, time.monotonic() - start))
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
