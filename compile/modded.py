"""The routed plan's engine on CPU where a caller changes scores or masks.

The parts are those of `moba_flex.compile.cpu`, and they merge alike. But flash attention knows no
such changes, so here a part is matrix products with a softmax between them, in pieces whose scores
stay in a core's cache. Backward computes the scores again.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moba_flex.compile.parts import Part, cut, shapes_of_attention, shapes_of_gradients
from moba_flex.masks.gradients import only_once, with_gradient
from moba_flex.masks.inputs import all_finite, dense_vectors, finite
from moba_flex.masks.mods import Mods, checked_mask, checked_score
from moba_flex.masks.routing import Routing

_PIECE = 1 << 18  # scores: 1 MiB of float32
_LEAST_ROWS = 64  # fewer make slow matrix products
_LOG2E = math.log2(math.e)


def attend_modded(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, mods: Mods, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the own block and to the chosen ones.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        routing: The choice of blocks.
        mods: Changes to scores and masks. Gradients flow to what `score_mod` captures.
        scale: Factor on the scores, before the changes.

    Returns:
        Output `[B, Hq, Q, Dv]` and log-sum-exp `[B, Hq, Q]` (float32, float64 for float64 inputs).
        A query that sees nothing has output 0 and log-sum-exp -inf.
    """
    if not mods.ask and mods.softcap is not None:
        options = routing.block_size, routing.causal, scale, mods.softcap
        out, lse = attend_capped(q, k, v, routing.blocks, *options, *routing.located)
        return out, lse
    outside: tuple[Tensor, Tensor] = _attend_outside(q, k, v, routing, mods, scale)
    return outside


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="no graph holds a score_mod or a mask_mod on cpu: plan='masked' takes them"
)
def _attend_outside(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, mods: Mods, scale: float
) -> tuple[Tensor, Tensor]:
    captured = [] if mods.score_mod is None else _captured(mods.score_mod)
    result: tuple[Tensor, Tensor] = _AttendModded.apply(  # type: ignore[no-untyped-call]
        q, k, v, routing, mods, scale, *captured
    )
    return result


class _Piece(NamedTuple):
    """Some rows of some heads of a part, and the keys that they may see.

    Queries of the part are `[b, h, g, n, ...]`, with `g` query heads for each of `h` key/value
    heads, and keys `[b, h, m, ...]`; those of the piece are `[p, r, ...]` and `[p, m, ...]`.
    """

    batch: slice
    heads: slice
    rows: slice
    num_keys: int
    causal: bool

    def queries(self, x: Tensor) -> Tensor:
        """Return the rows `[p, r, ...]` of `x` `[b, h, g, n, ...]`."""
        return x[self.batch, self.heads, :, self.rows].flatten(0, 1).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys `[p, m, ...]` of `x` `[b, h, m, ...]`."""
        return x[self.batch, self.heads, : self.num_keys].flatten(0, 1)

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write `[p, r, ...]` to where `queries` reads."""
        place = x[self.batch, self.heads, :, self.rows]
        place.copy_(value.view(place.shape))

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add `[p, m, ...]` to where `keys` reads."""
        place = x[self.batch, self.heads, : self.num_keys]
        place.add_(value.view(place.shape))

    def hide_later(self, scores: Tensor, value: float) -> None:
        """Write `value` for the keys after each query, if the part is causal."""
        if self.causal:
            first = self.rows.start
            length = self.num_keys - first
            rows = scores.view(scores.shape[0], -1, length, self.num_keys)
            rows[..., first:].masked_fill_(_later(length), value)


@functools.lru_cache(maxsize=4)
def _later(length: int) -> Tensor:
    """Return which of `length` keys come after each of as many queries."""
    return torch.ones(length, length, dtype=torch.bool, device="cpu").triu_(1)


def _pieces(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Piece]:
    """Cut the queries `[b, h, g, n, D]` and the keys `[b, h, m, D]` of a part."""
    batch, heads, group, rows = q.shape[:4]
    num_keys = k.shape[2]
    some_rows = min(rows, max(_LEAST_ROWS, _PIECE // (group * num_keys)))
    size = group * some_rows * num_keys
    some_heads = min(heads, max(1, _PIECE // size))
    some_batch = min(batch, max(1, _PIECE // (size * some_heads)))
    for b in range(0, batch, some_batch):
        for h in range(0, heads, some_heads):
            for row in range(0, rows, some_rows):
                stop = min(row + some_rows, rows)
                keys = min(num_keys, stop) if causal else num_keys
                places = slice(b, b + some_batch), slice(h, h + some_heads), slice(row, stop)
                yield _Piece(*places, keys, causal)


class _Scratch:
    """Memory for the scores of one piece after the other: fresh memory would take page faults."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def of(self, name: str, x: Tensor, *shape: int) -> Tensor:
        """Return room of this name and shape, for the dtype of `x`."""
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = x.new_empty(size)
        return self._flat[name][:size].view(shape)


@dataclass(frozen=True)
class _Scores:
    """What becomes of scores: products of queries and keys, changed, in units of log 2.

    Attributes:
        mods: The changes.
        scale: Factor on the products.
        shape: B, Hq and Q, which number a query from 0 to B * Hq * Q - 1.
        scratch: Where the scores of a piece lie.
    """

    mods: Mods
    scale: float
    shape: tuple[int, int, int]
    scratch: _Scratch = field(default_factory=_Scratch)

    @property
    def unit(self) -> float:
        """Units of log 2 in a unit of scores that no `score_mod` changes."""
        return 1.0 if self.mods.score_mod is not None else _LOG2E

    @property
    def small(self) -> bool:
        """Whether no score is so large that float32 would not hold its exponential."""
        cap = self.mods.softcap
        return self.mods.score_mod is None and cap is not None and cap <= 60

    def cap(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores `[p, r, m]` after the soft cap."""
        cap, shape = self.mods.softcap, (q.shape[0], q.shape[1], k.shape[1])
        scores = self.scratch.of("capped", q, *shape)
        factor = self.scale * self.unit if cap is None else 2 * self.scale / cap
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=factor, out=scores)
        if cap is None:
            return scores
        # tanh(x) = (exp(2x) - 1) / (exp(2x) + 1) by `expm1`, which is as exact as `tanh` and three
        # times as fast. From 20 on it is 1, in float64 too.
        power, below = scores.clamp_(-40, 40).expm1_(), self.scratch.of("changed", q, *shape)
        height = cap * self.unit
        return power.div_(torch.add(q.new_tensor(2 / height), power, alpha=1 / height, out=below))

    def uncap(self, grad: Tensor, capped: Tensor) -> Tensor:
        """Turn a gradient of what `cap` returned into one of what it took."""
        if self.mods.softcap is None:
            return grad
        return grad.addcmul_(
            grad, capped.square_(), value=-((self.mods.softcap * self.unit) ** -2)
        )

    def numbers(self) -> list[Tensor]:
        """Return the number of each query, `[B, Hq, Q]`, if a mod asks."""
        if not self.mods.ask:
            return []
        return [torch.arange(math.prod(self.shape), device="cpu").view(self.shape)]

    def places(self, k: Tensor) -> list[Tensor]:
        """Return the place of each key, `[B, Hkv, KV]`, if a mod asks."""
        if not self.mods.ask:
            return []
        return [torch.arange(k.shape[2], device="cpu").expand(k.shape[:3])]

    def change(self, scores: Tensor, *pairs: Tensor) -> Tensor:
        """Return the scores, in units of log 2, after `score_mod`.

        Args:
            scores: Capped, `[p, r, m]`.
            pairs: Numbers of queries, `[p, r]`, and places of keys, `[p, m]`, if a mod asks.
        """
        if self.mods.score_mod is None:
            return scores
        changed = _over_pairs(checked_score(self.mods.score_mod), 1)(
            scores, *self._indices(*pairs)
        )
        return changed.to(scores.dtype) * _LOG2E

    def change_with_gradient(
        self, scores: Tensor, captured: Sequence[Tensor], *pairs: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """Do what `change` does, and return what turns a gradient of it into others.

        They are those of the scores and of the captured tensors.
        """
        if self.mods.score_mod is None:
            if self.mods.softcap is None:
                return scores, lambda x: [x]
            return self.scratch.of("changed", scores, *scores.shape).copy_(scores), lambda x: [x]
        with torch.enable_grad():
            before = scores.detach().requires_grad_()
            changed = _over_pairs(checked_score(self.mods.score_mod), 1)(
                before, *self._indices(*pairs)
            )
            changed = changed.to(scores.dtype)

        def back(grad: Tensor) -> list[Tensor]:
            of = [before, *captured]
            if not changed.requires_grad:
                return [torch.zeros_like(x) for x in of]
            return list(
                torch.autograd.grad(changed, of, grad, allow_unused=True, materialize_grads=True)
            )

        return changed.detach() * _LOG2E, back

    def hide(
        self, scores: Tensor, piece: _Piece, *pairs: Tensor, value: float = -math.inf
    ) -> Tensor:
        """Write `value`, in place, for what a query does not see."""
        piece.hide_later(scores, value)
        if self.mods.mask_mod is not None:
            sees = _over_pairs(checked_mask(self.mods.mask_mod), 0)(*self._indices(*pairs))
            scores.masked_fill_(~sees, value)
        return scores

    def _indices(self, number: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return b, h and q_idx `[p, r]`, and kv_idx `[p, m]`."""
        _, num_heads, q_len = self.shape
        row = number // q_len
        return row // num_heads, row % num_heads, number % q_len, key


def _over_pairs(mod: Callable[..., Tensor], scores: int) -> Callable[..., Tensor]:
    """Let a mod take so many `[p, r, m]`, b, h and q_idx `[p, r]`, and kv_idx `[p, m]`."""
    of_key = torch.vmap(mod, in_dims=(0,) * scores + (None, None, None, 0))
    of_query = torch.vmap(of_key, in_dims=(0,) * scores + (0, 0, 0, None))
    return torch.vmap(of_query)


class _Captures(TorchFunctionMode):
    """Notes the tensors that need a gradient and go into some operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad:
                if torch._C._functorch.is_gradtrackingtensor(x):
                    raise ValueError(
                        "score_mod must capture no tensor that torch.func differentiates on cpu, "
                        f"got one of shape {tuple(x.shape)}: use backward"
                    )
                self.found[id(x)] = x
        return func(*args, **(kwargs or {}))


def _captured(mod: Callable[..., Tensor]) -> list[Tensor]:
    """Return the tensors that `mod` captures and that need a gradient."""
    if not torch.is_grad_enabled():
        return []
    score = torch.zeros(1, 1, 1, device="cpu")
    place = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    # Without gradients no result needs one, so what does came from outside.
    with torch.no_grad(), _Captures() as captures:
        _over_pairs(checked_score(mod), 1)(score, place, place, place, place)
    return list(captures.found.values())


def attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, mods: Mods, scale: float
) -> tuple[Tensor, Tensor]:
    """Do what `attend_modded` does, without a gradient.

    What is not finite acts on the queries that see it as in one softmax, and on no others.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    limits = torch.finfo(exact)
    q, (k, v) = q.contiguous(), dense_vectors(k, v)
    spoils = None if all_finite(q, k, v) else _Spoils(q, k, v, exact)
    scores_of = _Scores(mods, scale, (q.shape[0], q.shape[1], q.shape[2]))
    by_query = [q, *scores_of.numbers()]
    by_key = [k, finite(v) if spoils else v, *scores_of.places(k)]
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=exact)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=exact)
    for part in cut(routing, k.shape[1]):
        part_k, part_v, *part_key = (part.keys.take(x) for x in by_key)
        part_k, part_v = part_k.to(exact), part_v.to(exact)
        part_q, *part_number = (_grouped(part, x, part_k) for x in by_query)
        part_out = q.new_empty(*part_q.shape[:4], v.shape[3], dtype=exact)
        part_lse = q.new_empty(part_q.shape[:4], dtype=exact)
        if spoils:
            part_marks = part.keys.take(spoils.marks)
            part_counts = part_q.new_empty(*part_q.shape[:4], part_marks.shape[3], dtype=exact)
        for piece in _pieces(part_q, part_k, part.causal):
            pairs = [piece.queries(x) for x in part_number] + [piece.keys(x) for x in part_key]
            scores = scores_of.cap(piece.queries(part_q).to(exact), piece.keys(part_k))
            scores = scores_of.hide(scores_of.change(scores, *pairs), piece, *pairs)
            if spoils:
                seen = scores_of.hide(torch.ones_like(scores), piece, *pairs, value=0.0)
                piece.put(part_counts, spoils.count(seen, scores, piece.keys(part_marks)))
            largest = None
            if not scores_of.small:
                largest = scores.amax(2, keepdim=True)
                scores.sub_(largest.masked_fill_(largest == -math.inf, 0.0))
            weight = scores.exp2_()
            total = weight.sum(2, keepdim=True)
            attended = torch.bmm(weight, piece.keys(part_v))
            piece.put(part_out, attended.div_(total.clamp(min=limits.tiny)))
            logarithm = total.log2_() if largest is None else total.log2_().add_(largest)
            if spoils and largest is not None:  # infinity less infinity is NaN
                logarithm.masked_fill_(largest == math.inf, math.inf)
            piece.put(part_lse, logarithm.div_(_LOG2E))
        part_out, part_lse = part_out.flatten(1, 2), part_lse.flatten(1, 2)
        if not part.first:
            merged = torch.logaddexp(part.queries.take(lse), part_lse)
            # Nothing weighs nothing, also beside nothing.
            gain = torch.exp(part_lse - merged.clamp(min=limits.min)).unsqueeze(3)
            part_out, part_lse = torch.lerp(part.queries.take(out), part_out, gain), merged
        part.queries.put(out, part_out)
        part.queries.put(lse, part_lse)
        if spoils:
            part.queries.add(spoils.counts, part_counts.flatten(1, 2))
    if spoils:
        spoils.spread(out, lse)
    return out.to(q.dtype), lse


class _Spoils:
    """What each query sees that is not finite.

    A weight of 0 times infinity would be NaN, so that weights meet no such value. And a softmax of
    scores that are all -inf is NaN, but not in a part: others may hold more.

    Attributes:
        marks: Of each key where its value is NaN, inf and -inf, whether the key itself is not
            finite, and 1, `[B, Hkv, KV, 3 * Dv + 2]`.
        counts: Sums of the marks that each query sees, `[B, Hq, Q, 3 * Dv + 2]`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, exact: torch.dtype) -> None:
        self._bad_query = ~q.isfinite().all(3)
        bad_key = ~k.isfinite().all(3, keepdim=True)
        marks = v.isnan(), v == math.inf, v == -math.inf, bad_key, torch.ones_like(bad_key)
        self.marks = torch.cat(marks, dim=3).to(exact)
        self.counts = q.new_zeros(*q.shape[:3], self.marks.shape[3], dtype=exact)

    def count(self, seen: Tensor, scores: Tensor, marks: Tensor) -> Tensor:
        """Return the counts of some queries, `[p, r, 3 * Dv + 2]`.

        Args:
            seen: 1 for each key that a query sees, else 0, `[p, r, m]`.
            scores: Their scores.
            marks: Of these keys, `[p, m, 3 * Dv + 2]`.
        """
        counts = torch.bmm(seen, marks)
        _, up, down = marks[..., :-2].chunk(3, dim=2)
        nothing = seen * (scores == -math.inf)  # of what is infinite
        counts[..., : up.shape[2]] += torch.bmm(nothing, up + down)
        return counts

    def spread(self, out: Tensor, lse: Tensor) -> None:
        """Write to results what is not finite."""
        bad_keys, keys = self.counts[..., -2:].unbind(3)
        nan, up, down = (x > 0 for x in self.counts[..., :-2].chunk(3, dim=3))
        spoilt = (bad_keys > 0) | (self._bad_query & (keys > 0))
        out += torch.where(up, math.inf, 0.0) - torch.where(down, math.inf, 0.0)
        out.masked_fill_(nan | (spoilt & (lse == -math.inf)).unsqueeze(3), math.nan)


def _grouped(part: Part, x: Tensor, keys: Tensor) -> Tensor:
    """Return `[b, h, g, n, ...]` of what `x` holds for the queries of a part."""
    return part.queries.take(x).unflatten(1, (keys.shape[1], -1))


def gradients_by_products(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    routing: Routing,
    mods: Mods,
    scale: float,
    captured: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the gradients of q, k and v and of the captured tensors."""
    exact, sound = lse.dtype, all_finite(q, k, v)
    q, grad, k, v = q.contiguous(), grad.contiguous(), *dense_vectors(k, v)
    # A score of a query that sees what is not finite has no finite share. A share of 0 must meet
    # nothing but finite vectors.
    clean_q, clean_k, clean_v = (q, k, v) if sound else map(finite, (q, k, v))
    scores_of = _Scores(mods, scale, (q.shape[0], q.shape[1], q.shape[2]))
    # A score's share is weight * (grad @ v - delta): the derivative of the softmax.
    delta = (grad.to(exact) * out.to(exact)).sum(3)
    if grad_lse is not None:
        delta = delta - grad_lse
    shift = torch.where(lse == -math.inf, math.inf, lse * _LOG2E)
    by_query = [q, clean_q, grad, delta, shift, *scores_of.numbers()]
    by_key = [k, clean_k, clean_v, *scores_of.places(k)]
    dq, dk, dv = (x.new_zeros(x.shape, dtype=exact) for x in (q, k, v))
    others = [torch.zeros_like(x) for x in captured]
    for part in cut(routing, k.shape[1]):
        raw_k, part_k, part_v, *part_key = (part.keys.take(x) for x in by_key)
        raw_k, part_k, part_v = raw_k.to(exact), part_k.to(exact), part_v.to(exact)
        raw_q, part_q, part_grad, part_delta, part_shift, *part_number = (
            _grouped(part, x, part_k) for x in by_query
        )
        part_dq = q.new_empty(part_q.shape, dtype=exact)
        part_dk, part_dv = torch.zeros_like(part_k), torch.zeros_like(part_v)
        for piece in _pieces(part_q, part_k, part.causal):
            pairs = [piece.queries(x) for x in part_number] + [piece.keys(x) for x in part_key]
            some_q, some_grad = (piece.queries(x).to(exact) for x in (part_q, part_grad))
            some_k, some_v = piece.keys(part_k), piece.keys(part_v)
            capped = scores_of.cap(piece.queries(raw_q).to(exact), piece.keys(raw_k))
            if not sound:
                capped = scores_of.hide(capped, piece, *pairs, value=0.0)
            scores, back = scores_of.change_with_gradient(capped, captured, *pairs)
            scores = scores_of.hide(scores, piece, *pairs)
            weight = scores.sub_(piece.queries(part_shift).unsqueeze(2)).exp2_()
            if not sound:
                weight = scores_of.hide(weight, piece, *pairs, value=0.0)
            piece.add_keys(part_dv, torch.bmm(weight.mT, some_grad))
            some_delta = piece.queries(part_delta).unsqueeze(2)
            dscore = scores_of.scratch.of("grad", weight, *weight.shape)
            torch.baddbmm(some_delta, some_grad, some_v.mT, beta=-1, out=dscore)
            dscore.mul_(weight)
            if not sound:
                dscore = scores_of.hide(dscore, piece, *pairs, value=0.0)
            dscore, *shares = back(dscore)
            for x, share in zip(others, shares, strict=True):
                x.add_(share)
            dscore = scores_of.uncap(dscore, capped)
            piece.put(part_dq, torch.bmm(dscore, some_k))
            piece.add_keys(part_dk, torch.bmm(dscore.mT, some_q))
        part.queries.add(dq, part_dq.flatten(1, 2))
        part.keys.add(dk, part_dk)
        part.keys.add(dv, part_dv)
    grads = (dq.mul_(scale), dk.mul_(scale), dv)
    return [x.to(q.dtype) for x in grads] + others


class _AttendModded(torch.autograd.Function):
    """Attention with functions, which no op takes, and with what they capture."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routing: Routing,
        mods: Mods,
        scale: float,
        *captured: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return attend_by_products(q, k, v, routing, mods, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *ctx.options = inputs[:6]
        ctx.save_for_backward(q, k, v, *output, *inputs[6:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        return only_once(_gradients_outside, ctx, grad, grad_lse)


def _gradients_outside(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse, *captured = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    routing, mods, scale = ctx.options
    dq, dk, dv, *others = gradients_by_products(
        grad, grad_lse, q, k, v, out, lse, routing, mods, scale, captured
    )
    return dq, dk, dv, None, None, None, *others


@torch.library.custom_op("moba_flex::attend_softcap", mutates_args=(), device_types="cpu")
def attend_softcap(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `moba_flex.compile.cpu.attend_cpu` does, with scores under a soft cap."""
    routing = Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
    return attend_by_products(q, k, v, routing, Mods(softcap=softcap), scale)


@torch.library.custom_op("moba_flex::attend_softcap_backward", mutates_args=(), device_types="cpu")
def attend_softcap_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
    queries: Tensor | None = None,
    extents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend_softcap` with respect to `q`, `k` and `v`."""
    routing = Routing.of_parts(q, k, blocks, block_size, causal, queries, extents)
    mods = Mods(softcap=softcap)
    dq, dk, dv = gradients_by_products(grad, grad_lse, q, k, v, out, lse, routing, mods, scale)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, *ctx.options, queries, extents = inputs
    ctx.save_for_backward(q, k, v, blocks, queries, extents, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, blocks, queries, extents, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    grads = attend_softcap_backward(
        grad, grad_lse, q, k, v, blocks, out, lse, *ctx.options, queries, extents
    )
    return *grads, *(None,) * 7


attend_softcap.register_fake(shapes_of_attention)
attend_softcap_backward.register_fake(shapes_of_gradients)
attend_capped = with_gradient(attend_softcap, setup_context=_save, backward=_gradients)
