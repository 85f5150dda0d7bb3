"""The comparison of a request with the oracle, and a reader of block masks."""

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.library import wrap_triton
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import (
    Routing,
    moba_attention,
    moba_attention_reference,
    patterns,
    route,
    routed_attention,
)
from moba_flex.compile.plans import interpreted
from moba_flex.masks.layout import make_tables
from moba_flex.oracle import ReferenceOutput
from tests.case import Case as Case
from tests.case import lay_out

WORST: dict[str, tuple[float, int]] = {}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_len: int = 700,
    min_block: int = 1,
    groups: Sequence[int] = (1, 3, 4, 8),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Case:
    """Draw a request: any length, any block size, `top_k` to past the number of blocks."""
    kv_len = draw(st.integers(1, max_len))
    blocks = st.integers(min_block, max_len), st.integers(min_block, max(min_block, max_len // 6))
    block_size = draw(st.one_of(*blocks))
    num_blocks = -(-kv_len // block_size)
    sink_blocks, local_blocks = draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (2, 1)]))
    forced = 1 + sink_blocks + local_blocks
    # With ties, blocks of a power of two keys have exact means, so that ties are exact.
    ties = draw(st.booleans())
    if ties:
        block_size = 2 ** (block_size.bit_length() - 1)
        num_blocks = -(-kv_len // block_size)
    return Case(
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from(groups)),
        q_len=draw(st.one_of(st.just(kv_len), st.integers(1, kv_len))),
        kv_len=kv_len,
        head_dim=draw(st.sampled_from([16, 24, 64])),
        block_size=block_size,
        top_k=draw(st.integers(forced, max(forced, min(num_blocks, 24)) + 2)),
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=draw(st.sampled_from([True, True, False])),
        scale=draw(st.sampled_from([None, None, 0.3])),
        dtype=draw(st.sampled_from(list(dtypes))),
        ties=ties,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def layouts(draw: st.DrawFn, /, **options: Any) -> Case:
    """Draw a request of one sequence a row, of packed documents, or of padded rows."""
    case: Case = draw(cases(**options))
    kind = draw(st.sampled_from(["plain", "documents", "padding"]))
    if kind == "documents":
        lengths = st.lists(st.integers(0, case.kv_len // 2 + 1), min_size=1, max_size=6)
        docs = [1, *draw(lengths)]
        q_docs = None
        if draw(st.booleans()):
            q_docs = (1, *(draw(st.integers(0, n)) for n in docs[1:]))
        tail = draw(st.sampled_from([(0, 0), (0, 0), (5, 5), (0, 200)]))
        return replace(case, docs=tuple(docs), q_docs=q_docs, tail=tail)
    if kind == "padding":
        side = st.integers(0, case.kv_len)
        pads = draw(st.lists(st.tuples(side, side), min_size=2, max_size=2))
        return replace(case, pads=tuple(pads))
    return case


def needs_interpreter() -> None:
    """Skip what runs Triton kernels on CPU tensors where nothing interprets them."""
    if not interpreted():
        pytest.skip("kernels run for real here, see test_cuda.py, or there is no Triton")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("Triton's interpreter takes NumPy 2.4 from 3.7 on")
    if "Interpreted" not in inspect.getsource(wrap_triton):
        pytest.skip("this PyTorch wraps no interpreted kernels")


def run_compiled(*arguments: str) -> str:
    """Run Python with Triton's compiler and not its interpreter, and return what it printed."""
    compiled = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *arguments],
        env=compiled | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(name: str) -> Any:
    """Run a script of this folder, compiled, and return the JSON of its last line."""
    return json.loads(run_compiled(f"tests/{name}").splitlines()[-1])


def route_case(case: Case, q: Tensor, k: Tensor) -> Routing:
    """Return the library's choice for a case."""
    if case.pattern:
        name, _, number = case.pattern.partition(":")
        options: dict[str, Any] = {"local_blocks": case.local_blocks, "causal": case.causal}
        if name == "sink_window":
            options["sink_blocks"] = case.sink_blocks
        if number:
            options["every" if name == "global_local" else "stride"] = int(number)
        pattern = getattr(patterns, name)
        return pattern(q, k, block_size=case.block_size, **options, **case.layout)
    tables = make_tables(case.q_len, case.kv_len, case.block_size, case.causal, **case.layout)
    return route(q, k, **case.gate, tables=tables)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a function made by `in_one_graph` runs, to be run as it is."""
    return cast(Callable[..., Any], inspect.unwrap(function))


def chosen_blocks(routing: Routing) -> Tensor:
    """Return the blocks that each query attends to, own one included: bool `[B, Hq, Q, N]`."""
    blocks, num_blocks = routing.blocks.long(), routing.num_blocks
    table = torch.zeros(
        *blocks.shape[:3], num_blocks + 1, dtype=torch.bool, device=blocks.device
    ).scatter(3, blocks, True)[..., :-1]
    number = torch.arange(num_blocks, device=blocks.device)
    own = routing.layout.coordinates(blocks.device).own[:, None, :, None]
    return table | (number == own)


def given_routing(case: Case) -> Routing:
    """Return the routing that is given as lists."""
    lists, sizes = case.lists(), (case.block_size, case.q_len, case.kv_len, case.causal)
    assert lists is not None
    tables = make_tables(case.q_len, case.kv_len, case.block_size, case.causal, **case.layout)
    return Routing(lists, *sizes, tables)


def given_blocks(case: Case, lists: Tensor) -> Tensor:
    """Return the blocks that given lists stand for, own one included, bool `[B, Hq, Q, N]`."""
    own, first, after = (
        x[:, None, :, None] for x in (case.places.own, case.places.first, case.places.after)
    )
    num_blocks = -(-case.kv_len // case.block_size)
    if case.docs is not None:
        num_blocks = case.kv_len // case.block_size + len(case.docs)
    block = torch.arange(num_blocks, device=lists.device)
    visible = (own >= 0) & (block >= first) & (block < (own if case.causal else after))
    listed = (lists.unsqueeze(-1) == block).any(-2)
    listed = listed.repeat_interleave(case.num_heads // lists.shape[1], dim=1)
    return listed & visible | ((block == own) & (own >= 0))


def token_mask(blocks: Tensor, case: Case) -> Tensor:
    """Return which keys each query sees, bool `[B, Hq, Q, KV]`, given its blocks."""
    places = case.places
    shape = case.batch, case.num_heads, case.q_len, case.kv_len
    if blocks.shape[-1] == 0:
        return blocks.new_zeros(shape)
    key_block, key_span = places.key_block[:, None, None], places.key_span[:, None, None]
    mask = blocks.gather(3, key_block.clamp(min=0).expand(shape))
    mask = mask & (key_span == places.q_span[:, None, :, None]) & (key_span >= 0)
    kv = torch.arange(case.kv_len, device=blocks.device)
    if case.causal:
        mask = mask & (kv <= places.position[:, None, :, None])
    if (mask_mod := case.mask_mod()) is not None:
        b, h, q_idx = _indices(case, blocks.device)
        mask = mask & mask_mod(b, h, q_idx, kv)
    return mask


def _indices(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return b, h and q_idx of all scores, to broadcast."""
    b, h, q_idx = (
        torch.arange(n, device=device) for n in (case.batch, case.num_heads, case.q_len)
    )
    return b[:, None, None, None], h[:, None, None], q_idx[:, None]


def assert_gate_is_right(case: Case, q: Tensor, k: Tensor, blocks: Tensor) -> None:
    """Check a choice of blocks, bool `[B, Hq, Q, N]`, against the affinities in float64.

    Two affinities nearer than the rounding of float32 sums may be ranked either way, and only
    those: every block chosen is, up to that, at least as good as every candidate left out.
    """
    places, num_blocks = case.places, blocks.shape[3]
    means = _block_means(case, k, num_blocks).repeat_interleave(case.group, dim=1).double()
    largest = torch.finfo(torch.float32).max
    affinity = (q.double() @ means.mT).nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
    affinity = affinity.clamp(-largest, largest)
    slack = torch.finfo(torch.float32).eps * case.head_dim * (q.double().abs() @ means.abs().mT)
    slack = slack.nan_to_num(0.0, 0.0, 0.0)
    own, first, after = (x[:, None, :, None] for x in (places.own, places.first, places.after))
    block = torch.arange(num_blocks, device=q.device)
    candidate = (block >= first) & (block < (own if case.causal else after)) & (block != own)
    candidate = candidate & (own >= 0)
    forced = (block < first + case.sink_blocks) | (
        (block < own) & (block >= own - case.local_blocks)
    )

    top_k = torch.tensor(case.head_top_k or (case.top_k,) * case.num_heads, device=q.device)
    expected = torch.minimum(candidate.sum(-1), top_k[:, None] - 1) + (own >= 0).squeeze(-1)
    number = blocks.sum(-1)
    assert torch.equal(number, expected.expand_as(number)), "as many as there are, up to top_k"
    assert blocks[((block == own) & (own >= 0)).expand_as(blocks)].all(), "the own block"
    assert not (blocks & ~candidate & (block != own)).any(), "candidates alone"
    assert blocks[(forced & candidate).expand_as(blocks)].all(), "the forced blocks"
    free = candidate & ~forced
    if num_blocks:
        worst_in = (affinity + slack).masked_fill(~(blocks & free), math.inf).amin(-1)
        best_out = (affinity - slack).masked_fill(~(~blocks & free), -math.inf).amax(-1)
        assert (worst_in >= best_out).all(), "the best"


def _block_means(case: Case, k: Tensor, num_blocks: int) -> Tensor:
    """Return the mean key of each block: the keys' sum in float32, in order, divided once."""
    rows = []
    for b in range(case.batch):
        means = k.new_zeros(k.shape[1], num_blocks, k.shape[3])
        number = 0
        for _, _, start, stop in case.spans()[b if case.pads is not None else 0]:
            if start == stop:
                continue
            for part in k[b, :, start:stop].split(case.block_size, dim=1):
                total = part.new_zeros(part[:, 0].shape, dtype=torch.float32)
                for key in part.float().unbind(1):
                    total += key
                # Not by a number: CUDA would multiply by its reciprocal.
                means[:, number] = (total / total.new_tensor(part.shape[1])).to(k.dtype)
                number += 1
        rows.append(means)
    return torch.stack(rows) if rows else k.new_zeros(0, k.shape[1], num_blocks, k.shape[3])


Attention = Callable[..., tuple[Tensor, Tensor | None]]


def attention(case: Case, plan: Any = None, *, lse: bool | None = None) -> Attention:
    """Return `moba_attention` of a case, as a function of q, k, v and the captured tensors."""
    request: dict[str, Any] = case.gate | case.layout
    names = list(case.captured())
    given = None if case.lists() is None else given_routing(case)
    options: dict[str, Any] = {
        "scale": case.scale,
        "softcap": case.softcap,
        "mask_mod": case.mask_mod(),
        "plan": case.plan if plan is None else plan,
        "return_aux": AuxRequest(lse=case.lse if lse is None else lse),
    }

    def run(q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> tuple[Tensor, Tensor | None]:
        score_mod = case.score_mod(dict(zip(names, captured, strict=True)))
        if case.pattern:
            routing = route_case(case, q, k) if given is None else given
            out, aux = routed_attention(q, k, v, routing, **options, score_mod=score_mod)
        else:
            out, aux = moba_attention(q, k, v, **request, **options, score_mod=score_mod)
        return out, aux.lse

    if not case.graph:
        return run
    torch._dynamo.reset()  # graphs of other cases count towards a limit
    return torch.compile(run, fullgraph=True)


def oracle(
    case: Case, q: Tensor, k: Tensor, v: Tensor, captured: dict[str, Tensor], **options: Any
) -> ReferenceOutput:
    """Return what the oracle says of a case."""
    options |= {"score_mod": case.score_mod(captured), "mask_mod": case.mask_mod()}
    options |= {"scale": case.scale, "softcap": case.softcap, **case.gate, **case.layout}
    return moba_attention_reference(q, k, v, **options)


def scores_of(case: Case, q: Tensor, k: Tensor, captured: dict[str, Tensor]) -> Tensor:
    """Return all scores, masked or not, `[B, Hq, Q, KV]`."""
    scores = q @ k.repeat_interleave(case.group, dim=1).mT * case.factor
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if (mod := case.score_mod(captured)) is not None:
        kv_idx = torch.arange(case.kv_len, device=q.device)
        scores = mod(scores, *_indices(case, q.device), kv_idx).to(q.dtype)
    return scores


def attend_by_mask(
    case: Case, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, captured: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Attend under a mask of tokens in the dtype of the inputs, one softmax a row."""
    sees = mask.any(-1, keepdim=True)
    scores = scores_of(case, q, k, captured).masked_fill(~mask, -math.inf)
    scores = torch.where(sees, scores, 0.0)  # so that no gradient is NaN
    weight = torch.where(mask, scores.softmax(-1), 0.0)
    lse = scores.logsumexp(-1).masked_fill(~sees.squeeze(-1), -math.inf)
    return weight @ v.repeat_interleave(case.group, dim=1), lse


def assert_matches_oracle(
    name: str, case: Case, attend: Attention, *, backward: bool = True
) -> None:
    """Compare output, log-sum-exp and gradients with the truth in float64.

    The tolerance comes from data: twice the error that masked softmax, or PyTorch's flash
    attention under the same mask, makes in the dtype of the inputs, and one rounding of the terms
    that make up the largest value. The oracle takes the blocks that the router chose, which are
    held to the definition here too.

    What is planted in the inputs must show in all that see it, and must not be there for all
    others.
    """
    inputs = case.inputs()
    names = [n for n in "qkv" if backward and n in case.grads]
    q, k, v = (x.requires_grad_(n in names) for n, x in zip("qkv", inputs, strict=True))
    captured = case.captured()
    if backward and "c" in case.grads:
        names += list(captured)
        captured = {key: x.requires_grad_() for key, x in captured.items()}
    lists = case.lists()
    if lists is not None:
        blocks = given_blocks(case, lists)
    else:
        blocks = chosen_blocks(route_case(case, q, k))
    if not case.pattern:
        assert_gate_is_right(case, q.detach(), k.detach(), blocks)
    if case.has_exact_ties:
        want = oracle(case, q.detach(), k.detach(), v.detach(), captured).blocks
        assert torch.equal(blocks, want), "the more recent of equals"
    with torch.no_grad():
        mask = token_mask(blocks, case)
        clean, rests = rows_that_rest(case, mask, q, k, v)

    out, lse = attend(q, k, v, *captured.values())
    exact_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.dtype == case.dtype
    values = {"out": out}
    if lse is not None:
        assert lse.shape == q.shape[:3]
        assert lse.dtype == exact_dtype
        values["lse"] = lse
    generator = torch.Generator(case.device).manual_seed(case.seed)
    weights = {
        key: torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        for key, x in values.items()
    }
    # Gradients come in any layout too; PyTorch's own matrix products refuse some.
    given = weights | {"out": lay_out(weights["out"], case.memory[0])}
    weights["out"] = given["out"].contiguous()

    def results(
        values: dict[str, Tensor], of: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # With v alone to differentiate, the log-sum-exp is a constant.
        live = {key: x for key, x in values.items() if x.requires_grad}
        grads = dict.fromkeys(names)
        if live:
            cast = [weights[key].to(x.dtype) for key, x in live.items()]
            leaves = [of[n] for n in names]
            found = torch.autograd.grad(list(live.values()), leaves, cast, allow_unused=True)
            grads |= zip(names, found, strict=True)
        return values | {
            f"d{n}": torch.zeros_like(of[n]) if grad is None else grad for n, grad in grads.items()
        }

    def reference(dtype: torch.dtype, attend: Callable[..., Any]) -> dict[str, Tensor]:
        of = dict(zip("qkv", clean, strict=True)) | captured
        of = {n: x.detach().to(dtype).requires_grad_(n in names) for n, x in of.items()}
        made = attend(of["q"], of["k"], of["v"], {n: of[n] for n in captured})
        # Without lse asked for, there is none to compare.
        return results(dict(zip(values, made, strict=False)), of, weights)

    def by_oracle(
        q: Tensor, k: Tensor, v: Tensor, low: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return oracle(case, q, k, v, low, dtype=torch.float64, blocks=blocks)[:2]

    actual = results(values, {"q": q, "k": k, "v": v} | captured, given)
    exact = reference(torch.float64, by_oracle)
    # Nothing exact enough is at hand for float64: its errors are those of float32, scaled.
    rough_dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    shrink = torch.finfo(case.dtype).eps / torch.finfo(rough_dtype).eps
    roughs = [reference(rough_dtype, partial(attend_by_mask, case, mask))]
    if "v" in names and not case.score and case.softcap is None and case.mask == "":
        # Flash attention sums dv over tiles of queries, on CPU in the dtype of the inputs.
        roughs.append({"dv": flash_dv(case, mask, clean, weights["out"])})
    with torch.no_grad():
        rounding = rounding_errors(case, clean, captured, mask, weights)
    assert_zero_where_nothing_is_seen(case, mask & rests[..., None], actual)
    if case.plants:
        with torch.no_grad():
            assert_shows(case, mask, (q, k, v), captured, actual)
    for key, value in exact.items():
        error = largest_error(case, key, actual[key], value, mask, rests)
        errors = [(x[key].double() - value).nan_to_num(0.0, 0.0, 0.0) for x in roughs if key in x]
        rough = max(x.abs().max().item() if x.numel() else 0.0 for x in errors)
        tolerance = 2 * shrink * rough + rounding[key]
        if case.dtype == torch.float64:
            tolerance *= 2  # the truth errs as much
        ratio, count = WORST.get(f"{name} {key}", (0.0, 0))
        WORST[f"{name} {key}"] = max(ratio, error / tolerance if error else 0.0), count + 1
        assert math.isfinite(error), f"{key} must be finite, got error {error} for {case}"
        assert error <= tolerance, f"{key}: error {error} over {tolerance} for {case}"


def rows_that_rest(
    case: Case, mask: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the inputs without what is planted, and which queries see none of it.

    The latter are bool `[B, Hq, Q]`.
    """
    clean = tuple(x.detach().contiguous() for x in (q, k, v))
    rests = q.new_ones(q.shape[:3], dtype=torch.bool)
    if not case.plants:
        return clean, rests
    bad = [~x.isfinite().all(-1) for x in clean]
    bad_key = (bad[1] | bad[2]).repeat_interleave(case.group, dim=1)
    rests = ~bad[0] & ~(mask & bad_key[:, :, None]).any(-1)
    return tuple(x.nan_to_num(0.0, 0.0, 0.0) for x in clean), rests


def assert_shows(
    case: Case,
    mask: Tensor,
    inputs: tuple[Tensor, ...],
    captured: dict[str, Tensor],
    actual: dict[str, Tensor],
) -> None:
    """Check that results are not finite where what is planted makes them so."""
    q, k, v = (x.detach().double() for x in inputs)
    low = {key: x.detach().double() for key, x in captured.items()}
    scores = scores_of(case, q, k, low).masked_fill(~mask, -math.inf)
    sees = mask.any(-1)
    weight = scores.masked_fill(~sees.unsqueeze(-1), 0.0).softmax(-1)
    v = v.repeat_interleave(case.group, dim=1)
    # What is masked must not meet what is not finite, not even with a weight of zero.
    columns = [torch.where(mask, weight * x.unsqueeze(2), 0.0).sum(-1) for x in v.unbind(-1)]
    want = {"out": torch.stack(columns, -1), "lse": scores.logsumexp(-1)}
    for key, value in want.items():
        if key in actual:
            hidden = actual[key].isfinite() & ~value.isfinite()
            hidden |= ~actual[key].isnan() & value.isnan()
            assert not hidden[sees].any(), f"{key} must show what is not finite"


def largest_error(
    case: Case, key: str, actual: Tensor, exact: Tensor, mask: Tensor, rests: Tensor
) -> float:
    """Return the largest difference, where planted values play no part."""
    assert actual.shape == exact.shape
    difference = torch.where(actual == exact, 0.0, actual.double() - exact)
    if case.plants:
        if key in ("dk", "dv"):
            if case.plan == "fused":  # it spreads them over tiles
                return 0.0
            rests = ~(mask & ~rests[..., None]).any(2).unflatten(1, (-1, case.group)).any(2)
        elif key not in ("out", "lse", "dq"):
            return 0.0
        difference = difference[rests]
    return difference.abs().max().item() if difference.numel() else 0.0


def assert_zero_where_nothing_is_seen(case: Case, mask: Tensor, actual: dict[str, Tensor]) -> None:
    """Check rows that see no key, and keys that no query sees."""
    if case.plants:
        return
    blind = ~mask.any(-1)
    unseen = ~mask.unflatten(1, (-1, case.group)).any(dim=(2, 3))
    for key, where in (("out", blind), ("dq", blind), ("dk", unseen), ("dv", unseen)):
        if key in actual:
            assert (actual[key][where] == 0).all(), f"{key} must be 0 where nothing is seen"
    if "lse" in actual:
        assert (actual["lse"][blind] == -math.inf).all(), "lse must be -inf where nothing is seen"


def flash_dv(case: Case, mask: Tensor, inputs: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """Return the gradient of v that PyTorch's flash attention gives under this mask.

    That on CPU: on CUDA, kernels that take a mask fail for some layouts of it.
    """
    q, k, v = (x.detach().cpu().requires_grad_() for x in inputs)
    flash = scaled_dot_product_attention(
        q, k, v, attn_mask=mask.cpu(), scale=case.scale, enable_gqa=case.group > 1
    )
    return torch.autograd.grad(flash, v, weight.cpu())[0].to(weight.device)


def rounding_errors(
    case: Case,
    inputs: tuple[Tensor, ...],
    captured: dict[str, Tensor],
    mask: Tensor,
    weights: dict[str, Tensor],
) -> dict[str, float]:
    """Bound what one rounding of each term costs each result, however much the terms cancel.

    Flash attention of any kind rounds scores in float32, and probabilities and outputs in the
    dtype of the inputs.

    A soft cap c passes on an error of its score at most as it is, and adds two roundings of its
    result t: tanh's own, and its argument's, of which x / (sinh x cosh x) <= 1 parts arrive. Its
    derivative is at most 1, errs by two roundings, and by 2 / c of the score's error. A score mod
    passes on errors by its derivative, and adds a rounding of what goes in and out.
    """
    q, k, v = (x.double() for x in inputs)
    low = torch.finfo(case.dtype).eps
    high = min(low, torch.finfo(torch.float32).eps)
    k, v = k.repeat_interleave(case.group, dim=1), v.repeat_interleave(case.group, dim=1)
    scores = q @ k.mT * case.factor
    score_error = high * (q.abs() @ k.abs().mT * abs(case.factor))
    slope_error = torch.zeros_like(scores)
    if (cap := case.softcap) is not None:
        scores = cap * torch.tanh(scores / cap)
        slope_error = 2 * high + 2 / cap * score_error
        score_error = score_error + 2 * high * scores.abs()
    slope = torch.ones_like(scores)
    exact = {key: x.double().requires_grad_() for key, x in captured.items()}
    mod = case.score_mod(exact)
    places = *_indices(case, q.device), torch.arange(case.kv_len, device=q.device)
    if mod is not None:
        with torch.enable_grad():
            before = scores.requires_grad_()
            scores = mod(before, *places)
            slope = torch.autograd.grad(scores.sum(), before)[0].abs()
        before_error = score_error
        before, scores = before.detach(), scores.detach()
        score_error = slope * (score_error + high * before.abs()) + high * scores.abs()
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    p = torch.exp(scores - lse)
    score_error = score_error + high * lse.abs()
    weight = (low + score_error) * p
    grad = weights["out"].double().abs()
    share = p @ v.abs()
    delta = (grad * share).sum(-1, keepdim=True)
    if "lse" in weights:
        delta = delta + weights["lse"].double().abs().unsqueeze(-1)
    dscore = (weight + slope_error * p) * (grad @ v.abs().mT + delta)
    dproduct = dscore * slope * abs(case.factor)

    def over_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, case.group)).sum(2)

    errors = {
        "out": weight @ v.abs(),
        "lse": score_error.masked_fill(~mask, 0.0),
        "dq": dproduct @ k.abs(),
        "dk": over_group(dproduct.mT @ q.abs()),
        "dv": over_group(weight.mT @ grad),
    }
    if mod is not None:
        with torch.enable_grad():
            # An error of what goes in counts as much as one of dscore, which is low or more of it.
            whole = mod(before.abs() + before_error / low, *places)
            found = torch.autograd.grad(whole, list(exact.values()), dscore)
        errors |= {f"d{key}": x.abs() for key, x in zip(exact, found, strict=True)}
    return {key: value.max().item() if value.numel() else 0.0 for key, value in errors.items()}


def listed_tiles(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Read partial and full tiles from the lists of a BlockMask: bool `[B, H, rows, columns]`.

    Checks what FlexAttention's kernels take for granted and do not check.
    """
    q_len, kv_len = mask.seq_lengths
    rows, columns = -(-q_len // mask.BLOCK_SIZE[0]), -(-kv_len // mask.BLOCK_SIZE[1])
    full_count, full_index = mask.full_kv_num_blocks, mask.full_kv_indices
    q_count, q_index = mask.q_num_blocks, mask.q_indices
    full_q_count, full_q_index = mask.full_q_num_blocks, mask.full_q_indices
    assert full_count is not None
    assert full_index is not None
    assert q_count is not None
    assert q_index is not None
    assert full_q_count is not None
    assert full_q_index is not None
    # PyTorch 2.11 indexes the full lists with the strides of the partial ones.
    assert full_index.stride() == mask.kv_indices.stride()
    assert full_q_index.stride() == q_index.stride()

    partial = _table(mask.kv_num_blocks, mask.kv_indices, columns)
    full = _table(full_count, full_index, columns)
    assert partial.shape[2] == rows
    assert not (partial & full).any(), "a tile in both lists counts twice"
    if mask.BLOCK_SIZE[1] > 128:  # kernels would read past the end of the keys
        inside = torch.arange(1, columns + 1, device=full.device) * mask.BLOCK_SIZE[1] <= kv_len
        assert not ((partial | full) & ~inside).any()
    assert torch.equal(partial.mT, _table(q_count, q_index, rows))
    assert torch.equal(full.mT, _table(full_q_count, full_q_index, rows))
    return partial, full


def _table(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """Turn counts `[B, H, rows]` and indices `[B, H, rows, width]` into a table."""
    for x in (count, index):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert count.shape == index.shape[:3]
    assert (count <= index.shape[3]).all(), "more listed than there is room for"
    assert (index >= 0).all()
    assert (index < columns).all(), "unused entries are read too"
    listed = torch.arange(index.shape[3], device=index.device) < count[..., None]
    ascending = index.diff(dim=3) > 0
    assert (ascending | ~listed[..., 1:]).all(), "a short last tile must come last"
    table = torch.zeros(*index.shape[:3], columns + 1, dtype=torch.bool, device=index.device)
    return table.scatter(3, torch.where(listed, index.long(), columns), True)[..., :-1]


def visited_pairs(mask: BlockMask, batch: int = 1, num_heads: int = 1) -> Tensor:
    """Return the pairs that FlexAttention computes, bool `[B, H, Q, KV]`.

    Those of full tiles, and of partial tiles those that the mask_mod lets through. A batch size
    and a number of heads may be those of the mask or, for a mask with one, more.
    """
    partial, full = listed_tiles(mask)
    q_len, kv_len = mask.seq_lengths
    batch, num_heads = max(batch, partial.shape[0]), max(num_heads, partial.shape[1])

    def spread(tiles: Tensor) -> Tensor:
        wide = tiles.repeat_interleave(mask.BLOCK_SIZE[0], dim=2)
        return wide.repeat_interleave(mask.BLOCK_SIZE[1], dim=3)[:, :, :q_len, :kv_len]

    b, h, q, kv = (torch.arange(n, device=full.device) for n in (batch, num_heads, q_len, kv_len))
    allowed = mask.mask_mod(
        b[:, None, None, None], h[:, None, None], q[:, None], kv.expand(batch, num_heads, 1, -1)
    )
    return spread(full) | (spread(partial) & allowed)


def attend_by_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    *,
    lse: bool,
    score_mod: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `moba_flex.compile.flex.attend` does, in eager mode, reading the lists of the mask.

    Mods see every pair, those beside the mask too. Rows that see nothing come out as zeros, with
    gradients that are.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visited = visited_pairs(mask, q.shape[0], q.shape[1])
    scores = q.float() @ k.float().mT * scale
    if score_mod is not None:
        b, h, q_idx, kv_idx = (torch.arange(n, device=q.device) for n in scores.shape)
        b, h, q_idx = b[:, None, None, None], h[:, None, None], q_idx[:, None]
        scores = score_mod(scores, b, h, q_idx, kv_idx)
    sees = visited.any(-1, keepdim=True)
    scores = torch.where(sees, scores.masked_fill(~visited, -math.inf), 0.0)
    weight = torch.where(visited, scores.softmax(-1), 0.0)
    row_lse = scores.logsumexp(-1).masked_fill(~sees.squeeze(-1), -math.inf)
    return (weight @ v.float()).to(q.dtype), row_lse
