"""`apply` over every architecture of transformers that takes tokens and uses its interface.

    python -m tests.architectures --jobs 2
    python -m tests.architectures --only Llama Gemma3 --properties dense packed

Each architecture is built tiny and random. Each property of it, see `PROPERTIES`, is right,
refused by an error of moba_flex's own, or wrong; where the model by itself does not have the
property, that is told.
"""

import argparse
import copy
import inspect
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface

import moba_flex
from moba_flex import MoBAConfig
from moba_flex.integrations.transformers import NAME, apply
from tests.tiny import NotBuilt, architectures, build, call, inputs, one_line, tokens

LENGTH = 45
SHORT = 37  # the real tokens of a padded row
DOCUMENTS = (19, 26)
ALL = MoBAConfig(8, 7)  # covers LENGTH and what is generated
SPARSE = MoBAConfig(8, 2)
OWN = MoBAConfig(8, 1)
TOLERANCE = 2e-4  # of the largest output; what is wrong differs by far more


@dataclass(frozen=True)
class Verdict:
    """What an architecture does, in a word or two; `detail` says more."""

    kind: str
    detail: str = ""
    wrong: bool = False


class Subject:
    """A model before `apply`, and what it computes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        with torch.no_grad():
            self.dense = call(model, tokens(2, LENGTH))

    def applied(self, config: MoBAConfig) -> Any:
        return apply(copy.deepcopy(self.model), config)


def takes(model: Any, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def error_of(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest of `want`."""
    if got.shape != want.shape:
        return float("inf")
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")


def same(got: Tensor, want: Tensor) -> bool:
    return error_of(got, want) <= TOLERANCE


@contextmanager
def attention(function: Callable[..., Any], *names: str) -> Iterator[None]:
    """Put `function` in the place of the attention implementations named."""
    own = {name: AttentionInterface._global_mapping[name] for name in names}
    for name in names:
        AttentionInterface.register(name, function)
    try:
        yield
    finally:
        for name in names:
            AttentionInterface.register(name, own[name])


def only_itself(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    """Let each token attend to itself alone, so that only other layers mix tokens."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if q.shape[2] != v.shape[2]:  # to something else than tokens
        v = v.mean(dim=2, keepdim=True).expand(-1, -1, q.shape[2], -1)
    return v.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Call:
    """One call of the attention function, in the layer of that number."""

    layer: int | None
    v: Tensor
    out: Tensor


@contextmanager
def watched(model: nn.Module, dense: int | None = None) -> Iterator[list[Call]]:
    """Record calls, whose `out` knows how it came of `v`; the layer `dense` sees all keys."""
    own, calls = AttentionInterface._global_mapping[NAME], []
    layers = {module: _layer(name, module) for name, module in model.named_modules()}

    def watch(module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        if not v.requires_grad:
            v = v.detach().requires_grad_()
        chosen = dense is not None and layers[module] == dense
        before = getattr(module.config, NAME, None)
        if chosen:
            setattr(module.config, NAME, ALL.to_dict())
        try:
            with torch.enable_grad():
                out, weights = own(module, q, k, v, *rest, **options)
        finally:
            if chosen:
                setattr(module.config, NAME, before)
        calls.append(Call(layers[module], v, out))
        return (out if torch.is_grad_enabled() else out.detach()), weights

    with attention(watch, NAME):
        yield calls


def _layer(name: str, module: nn.Module) -> int | None:
    """Return the number of the layer that a module is of, by itself or else by its name."""
    number = getattr(module, "layer_idx", None)
    return number if number is not None else next(map(int, re.findall(r"\b\d+\b", name)), None)


def dense(subject: Subject) -> Verdict:
    """`top_k` that covers everything gives what the model gave before."""
    model = subject.applied(ALL)
    with watched(model) as calls:
        out = call(model, tokens(2, LENGTH))
    if not calls:
        return Verdict("attention not called", wrong=True)
    error = error_of(out, subject.dense)
    return Verdict("equal") if error <= TOLERANCE else Verdict("differs", f"{error:.1e}", True)


def sparse(subject: Subject) -> Verdict:
    """A small `top_k` runs forward and backward, contiguous, and is not dense."""
    model = subject.applied(SPARSE)
    with torch.enable_grad(), watched(model) as calls:
        out = call(model, tokens(2, LENGTH))
        out.float().square().mean().backward()
    if any(not each.out.is_contiguous() for each in calls):
        return Verdict("not contiguous", wrong=True)
    if same(out.detach(), subject.dense):
        return Verdict("dense", wrong=True)
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not gradients or not all(each.isfinite().all() for each in gradients):
        return Verdict("no finite gradients", wrong=True)
    return Verdict("works")


def dense_layers(subject: Subject) -> Verdict:
    """`dense_layers` leaves all layers, or the one it names, as they were."""
    ids, count = tokens(2, LENGTH), subject.model.config.get_text_config().num_hidden_layers
    everywhere = MoBAConfig(8, 1, dense_layers=tuple(range(count)))
    error = error_of(call(subject.applied(everywhere), ids), subject.dense)
    if error > TOLERANCE:
        return Verdict("ignored", f"{error:.1e}", wrong=True)
    model = subject.applied(OWN)
    with watched(model) as calls:
        call(model, ids)
    for layer in list(dict.fromkeys(each.layer for each in calls if each.layer is not None))[:2]:
        with watched(model, dense=layer):
            want = call(model, ids)
        got = call(subject.applied(MoBAConfig(8, 1, dense_layers=(layer,))), ids)
        if not same(got, want):
            return Verdict("another layer", f"{layer}: {error_of(got, want):.1e}", wrong=True)
    return Verdict("honoured")


def _alike(
    subject: Subject,
    got: Callable[[Any], Tensor],
    want: Callable[[Any], Tensor],
    documents: Tensor,
    right: str = "apart",
) -> Verdict:
    """Compare a call with what it should equal, under a sparse gate.

    If the two differ even where tokens attend to themselves alone, then the model's other layers
    tell them apart, as recurrent ones and positions of their own do. What attention did is then
    told by its gradients: between different numbers in `documents` `[B, L]` there must be none.
    """
    model = subject.applied(SPARSE)
    try:
        with watched(model) as calls:
            out = got(model)
        error = error_of(out, want(model))
    except Exception as raised:
        if refusal(raised).wrong:
            try:
                got(subject.model), want(subject.model)
            except Exception as same_without:
                return Verdict("dense fails too", one_line(same_without))
        raise
    if error <= TOLERANCE:
        return Verdict(right)
    with attention(only_itself, NAME, "sdpa"):
        outside = error_of(got(model), want(model))
    if outside <= TOLERANCE or not calls or any(_mixes(each, documents) for each in calls):
        return Verdict("contaminated", f"{error:.1e}", wrong=True)
    return Verdict("differs in other layers", f"{error:.1e}, {outside:.1e} without attention")


def _mixes(made: Call, documents: Tensor) -> bool:
    """Return whether a document's output `[B, L, H, D]` comes of another's v `[B, H, L, D]`."""
    for number in documents.unique():
        inside = documents == number
        with torch.enable_grad():
            total = made.out[inside].sum()
        (gradient,) = torch.autograd.grad(total, made.v, retain_graph=True)
        if gradient.transpose(1, 2)[~inside].any():
            return True
    return False


def _positions(*rows: Sequence[int]) -> Tensor:
    """Return positions that restart, for rows of documents of such lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def _numbers(*rows: Sequence[int]) -> Tensor:
    """Return in which document of its row each token is."""
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    )


def _alone(model: Any, ids: Tensor, first: int = 0) -> Tensor:
    """Run one document, or one row without its padding, whose positions count from `first`.

    Not all models count from 0 by themselves.
    """
    if not takes(model, "position_ids"):
        return call(model, ids)
    return call(model, ids, position_ids=_positions((ids.shape[1],)) + first)


def _apart(model: Any, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([_alone(model, part) for part in ids.split(list(lengths), dim=1)], dim=1)


def packed(subject: Subject) -> Verdict:
    """Documents told by positions that restart, in the default call."""
    if not takes(subject.model, "position_ids"):
        return Verdict("not taken")
    ids = tokens(1, LENGTH)
    return _alike(
        subject,
        lambda model: call(model, ids, position_ids=_positions(DOCUMENTS)),
        lambda model: _apart(model, ids, DOCUMENTS),
        _numbers(DOCUMENTS),
    )


def packed_rows(subject: Subject) -> Verdict:
    """Two rows of documents that start at different places."""
    if not takes(subject.model, "position_ids"):
        return Verdict("not taken")
    ids, rows = tokens(2, LENGTH), (DOCUMENTS, DOCUMENTS[::-1])
    return _alike(
        subject,
        lambda model: call(model, ids, position_ids=_positions(*rows)),
        lambda model: torch.cat([_apart(model, ids[i : i + 1], rows[i]) for i in range(2)]),
        _numbers(*rows),
    )


def packed_padded(subject: Subject) -> Verdict:
    """Documents, and padding behind them."""
    if not (takes(subject.model, "position_ids") and takes(subject.model, "attention_mask")):
        return Verdict("not taken")
    row = (DOCUMENTS[0], SHORT - DOCUMENTS[0], LENGTH - SHORT)
    ids, mask = tokens(1, LENGTH), (_numbers(row) < 2).long()
    return _alike(
        subject,
        lambda model: call(model, ids, position_ids=_positions(DOCUMENTS), attention_mask=mask)[
            :, :SHORT
        ],
        lambda model: _apart(model, ids[:, :SHORT], row[:2]),
        _numbers(row),
    )


def _by_starts(subject: Subject, positions: Tensor) -> Verdict:
    if not takes(subject.model, "cu_seq_lens_q"):
        return Verdict("not taken")
    ids = tokens(1, LENGTH)
    starts = torch.tensor([0, DOCUMENTS[0], LENGTH], dtype=torch.int32)
    options: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    options |= {"max_length_q": max(DOCUMENTS), "max_length_k": max(DOCUMENTS)}
    if takes(subject.model, "position_ids"):
        options["position_ids"] = positions
    parts = list(zip(ids.split(DOCUMENTS, dim=1), positions.split(DOCUMENTS, dim=1), strict=True))
    return _alike(
        subject,
        lambda model: call(model, ids, **options),
        lambda model: torch.cat([_alone(model, part, int(at[0, 0])) for part, at in parts], dim=1),
        _numbers(DOCUMENTS),
    )


def cu_seq_lens(subject: Subject) -> Verdict:
    """Documents told by `cu_seq_lens_q` and `cu_seq_lens_k`, beside positions that restart."""
    return _by_starts(subject, _positions(DOCUMENTS))


def cu_seq_lens_alone(subject: Subject) -> Verdict:
    """Documents told by `cu_seq_lens_q` and `cu_seq_lens_k`, whose positions go on."""
    return _by_starts(subject, _positions((LENGTH,)))


def _padded(subject: Subject, left: bool) -> Verdict:
    if not takes(subject.model, "attention_mask"):
        return Verdict("not taken")
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    real = slice(LENGTH - SHORT, None) if left else slice(SHORT)
    mask[0] = 0
    mask[0, real] = 1
    options = {"attention_mask": mask}
    alone: Callable[[Any, Tensor], Tensor] = call
    if left and takes(subject.model, "position_ids"):
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        alone = _alone

    def rows(model: Any) -> Tensor:
        out = call(model, ids, **options)
        return torch.cat([out[:1, real], out[1:]], dim=1)

    return _alike(
        subject,
        rows,
        lambda model: torch.cat([alone(model, ids[:1, real]), alone(model, ids[1:])], dim=1),
        mask,
        "equal",
    )


def right_padding(subject: Subject) -> Verdict:
    """A row padded on the right equals the unpadded one."""
    return _padded(subject, left=False)


def left_padding(subject: Subject) -> Verdict:
    """A row padded on the left, whose positions start at its first token, equals it too."""
    return _padded(subject, left=True)


def meta(subject: Subject) -> Verdict:
    """A model on the meta device still runs."""
    ids, model = tokens(2, LENGTH).to("meta"), copy.deepcopy(subject.model).to("meta")
    return _still_runs(model, ids)


def fake(subject: Subject) -> Verdict:
    """A model still runs on fake tensors."""
    model = copy.deepcopy(subject.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _still_runs(model, torch.zeros(2, LENGTH, dtype=torch.int64))


def _still_runs(model: Any, ids: Tensor) -> Verdict:
    try:
        want = call(model, ids).shape
    except Exception as error:
        return Verdict("dense fails too", one_line(error))
    got = call(apply(model, SPARSE), ids).shape
    return Verdict("works") if got == want else Verdict("other shape", f"{got}", wrong=True)


def generate(subject: Subject) -> Verdict:
    """Three new tokens, with a cache, are those of dense attention if `top_k` covers all."""
    if not subject.model.can_generate():
        return Verdict("cannot generate")
    options = inputs(subject.model, tokens(2, LENGTH))
    options |= {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    try:
        want = copy.deepcopy(subject.model).generate(**options)
    except Exception as error:
        return Verdict("dense fails too", one_line(error))
    got = subject.applied(ALL).generate(**options)
    return Verdict("equal") if torch.equal(got, want) else Verdict("differs", wrong=True)


def generate_sparse(subject: Subject) -> Verdict:
    """Logits of three new tokens are the same with a cache and without."""
    if not subject.model.can_generate():
        return Verdict("cannot generate")
    options = inputs(subject.model, tokens(2, LENGTH))
    options |= {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def difference(model: Any) -> float:
        """Return how far the logits are from each other, relative to the largest."""
        cached, full = (
            torch.stack(model.generate(**options, use_cache=use_cache).logits)
            for use_cache in (True, False)
        )
        return float((cached - full).abs().max() / full.abs().max())

    try:
        alone = difference(copy.deepcopy(subject.model))
    except Exception as error:
        return Verdict("dense fails too", one_line(error))
    if alone > TOLERANCE:
        return Verdict("dense differs too", f"{alone:.1e}")
    found = difference(subject.applied(SPARSE))
    if found <= TOLERANCE:
        return Verdict("equal")
    return Verdict("differs", f"{found:.1e}", wrong=True)


PROPERTIES: dict[str, Callable[[Subject], Verdict]] = {
    function.__name__: function
    for function in (
        dense,
        sparse,
        dense_layers,
        packed,
        packed_rows,
        packed_padded,
        cu_seq_lens,
        cu_seq_lens_alone,
        right_padding,
        left_padding,
        meta,
        fake,
        generate,
        generate_sparse,
    )
}


def refusal(error: Exception) -> Verdict:
    """Tell an error of moba_flex's own from one of a model's, or one that nobody meant."""
    last, root = traceback.extract_tb(error.__traceback__)[-1], Path(moba_flex.__file__).parents[1]
    ours = [str(root / name) for name in ("moba_flex", "masks", "compile")]
    if isinstance(error, (ValueError, TypeError)) and last.filename.startswith(tuple(ours)):
        return Verdict("refused", str(error))
    place = f"{Path(last.filename).name}:{last.lineno}"
    return Verdict("error", f"{one_line(error)} ({place})", wrong=True)


@dataclass
class Result:
    """The verdicts on one architecture, or why there are none."""

    name: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    not_built: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return any(each.wrong for each in self.verdicts.values())

    def __str__(self) -> str:
        if self.not_built:
            return f"{self.name}: not built: {self.not_built}"
        line = ", ".join(f"{key}={each.kind}" for key, each in self.verdicts.items())
        seen: dict[Verdict, list[str]] = {}
        for key, each in self.verdicts.items():
            if each.detail:
                seen.setdefault(each, []).append(key)
        details = [f"    {', '.join(keys)}: {each.detail}" for each, keys in seen.items()]
        return "\n".join([f"{'WRONG ' if self.wrong else ''}{self.name}: {line}", *details])


def check(name: str, properties: Sequence[str] = tuple(PROPERTIES)) -> Result:
    """Build an architecture and look at the properties named."""
    result, start = Result(name), time.monotonic()
    try:
        model = build(name)
        try:
            apply(copy.deepcopy(model), ALL)
        except Exception as error:
            result.verdicts = dict.fromkeys(properties, refusal(error))
            return result
        subject = Subject(model)
    except Exception as error:
        result.not_built = str(error) if isinstance(error, NotBuilt) else one_line(error)
        return result
    for key in properties:
        try:
            with torch.no_grad():
                result.verdicts[key] = PROPERTIES[key](subject)
        except Exception as error:
            result.verdicts[key] = refusal(error)
    result.seconds = time.monotonic() - start
    return result


def table(results: Sequence[Result]) -> str:
    """Return how many architectures are in each class of each property."""
    lines = []
    for name in PROPERTIES:
        counts = Counter(
            ("WRONG: " if verdict.wrong else "") + verdict.kind
            for result in results
            if (verdict := result.verdicts.get(name)) is not None
        )
        if counts:
            kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
            lines.append(f"{name:17} {kinds}")
    not_built = sum(bool(result.not_built) for result in results)
    wrong = sum(result.wrong for result in results)
    lines.append(f"{len(results)} architectures, {not_built} not built, {wrong} wrong")
    return "\n".join(lines)


def _prepare() -> None:
    """Leave one core to each process, and be quiet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _results(names: Sequence[str], properties: Sequence[str], jobs: int) -> Iterator[Result]:
    if jobs == 1:
        _prepare()
        for name in names:
            yield check(name, properties)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare) as pool:
        yield from pool.map(check, names, [properties] * len(names))


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at all architectures; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose name starts so")
    parser.add_argument("--properties", nargs="+", choices=PROPERTIES, default=tuple(PROPERTIES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    options = parser.parse_args(arguments)
    names, left_out = architectures()
    if options.only:
        names = [name for name in names if name.startswith(tuple(options.only))]
    start, results = time.monotonic(), []
    for result in _results(names, options.properties, options.jobs):
        results.append(result)
        print(result, flush=True)
    print(table(results))
    for reason, count in Counter(left_out.values()).items():
        print(f"{count} other model classes: {reason}")
    print(f"{time.monotonic() - start:.0f} s with {moba_flex.__file__}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=1))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
