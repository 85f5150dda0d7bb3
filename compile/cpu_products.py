"""Attention of a part on CPU by matrix products, where a caller changes scores or masks.

Flash attention takes no such changes. Products go piece by piece, so that scores stay in a core's
cache; backward computes them again.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moba_flex.compile.cpu_parts import Part, Results
from moba_flex.masks._torch.inputs import all_finite, finite
from moba_flex.masks.mods import Mods, checked_mask, checked_score

_PIECE = 1 << 18  # scores: 1 MiB of float32
_LEAST_ROWS = 64  # fewer make slow matrix products
_LOG2E = math.log2(math.e)


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

    def add_keys(self, x: Tensor, value: Tensor, factor: float = 1.0) -> None:
        """Add `[p, m, ...]` to where `keys` reads."""
        place = x[self.batch, self.heads, : self.num_keys]
        place.add_(value.view(place.shape), alpha=factor)


def _pieces(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Piece]:
    """Cut the queries `[b, h, g, n, D]` and the keys `[b, h, m, D]` of a part."""
    batch, heads, group, rows = q.shape[:4]
    num_keys = k.shape[2]
    row_step = min(rows, max(_LEAST_ROWS, _PIECE // (group * num_keys)))
    size = group * row_step * num_keys
    head_step = min(heads, max(1, _PIECE // size))
    batch_step = min(batch, max(1, _PIECE // (size * head_step)))
    starts = range(0, batch, batch_step), range(0, heads, head_step), range(0, rows, row_step)
    for b, h, row in product(*starts):
        stop = min(row + row_step, rows)
        keys = min(num_keys, stop) if causal else num_keys
        places = slice(b, b + batch_step), slice(h, h + head_step), slice(row, stop)
        yield _Piece(*places, keys, causal)


@functools.lru_cache(maxsize=4)
def _later(length: int) -> Tensor:
    """Return which of `length` keys come after each of as many queries."""
    return torch.ones(length, length, dtype=torch.bool, device="cpu").triu_(1)


class _Scores:
    """Scores `[p, r, m]` of pieces, in units of log 2: products, changed by mods.

    Args:
        mods: The changes.
        scale: Factor on the products.
        shape: B, Hq and Q, which number a query from 0 to B * Hq * Q - 1.
    """

    def __init__(self, mods: Mods, scale: float, shape: Sequence[int]) -> None:
        self.mods, self.scale, self.shape = mods, scale, shape
        cap = mods.softcap
        # A `score_mod` takes scores in their own unit.
        self._unit = _LOG2E if mods.score_mod is None else 1.0
        self.exponential_fits = mods.score_mod is None and cap is not None and cap <= 60
        self._memory: dict[str, Tensor] = {}

    def memory(self, name: str, x: Tensor, *shape: int) -> Tensor:
        """Return memory for one piece after another: fresh memory would take page faults."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = x.new_empty(size)
        return self._memory[name][:size].view(shape)

    def numbers(self, q: Tensor, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return numbers of queries `[B, Hq, Q]` and of keys `[B, Hkv, KV]`, if a mod asks."""
        if not self.mods.ask:
            return [], []
        query = torch.arange(math.prod(self.shape), device="cpu").view(q.shape[:3])
        return [query], [torch.arange(k.shape[2], device="cpu").expand(k.shape[:3])]

    def _indices(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return b, h and q_idx `[p, r]`, and kv_idx `[p, m]`."""
        _, num_heads, q_len = self.shape
        row = query // q_len
        return row // num_heads, row % num_heads, query % q_len, key

    def cap(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores of queries and keys after the soft cap."""
        cap, shape = self.mods.softcap, (q.shape[0], q.shape[1], k.shape[1])
        scores = self.memory("capped", q, *shape)
        factor = self.scale * self._unit if cap is None else 2 * self.scale / cap
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=factor, out=scores)
        if cap is None:
            return scores
        # tanh(x) = (exp(2x) - 1) / (exp(2x) + 1) by `expm1`, which is as exact as `tanh` and three
        # times as fast. From 20 on it is 1, in float64 too.
        power, below = scores.clamp_(-40, 40).expm1_(), self.memory("changed", q, *shape)
        height = cap * self._unit
        return power.div_(torch.add(q.new_tensor(2 / height), power, alpha=1 / height, out=below))

    def uncap(self, grad: Tensor, capped: Tensor) -> Tensor:
        """Turn a gradient of what `cap` returned into one of what it took."""
        if self.mods.softcap is None:
            return grad
        height = self.mods.softcap * self._unit
        return grad.addcmul_(grad, capped.square_(), value=-(height**-2))

    def change(
        self, capped: Tensor, numbers: Sequence[Tensor], captured: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """Apply `score_mod`.

        Args:
            capped: What `cap` returned; it is overwritten later if `captured` is None.
            numbers: Numbers of queries `[p, r]` and of keys `[p, m]`, if a mod asks.
            captured: For gradients, the tensors that `score_mod` captures; else None.

        Returns:
            The scores, and what turns their gradient into those of `capped` and `captured`.
        """
        if self.mods.score_mod is None:
            if captured is not None and self.mods.softcap is not None:
                capped = self.memory("changed", capped, *capped.shape).copy_(capped)
            return capped, lambda grad: [grad]
        score_mod = _over_pairs(checked_score(self.mods.score_mod), 1)
        with torch.set_grad_enabled(captured is not None):
            before = capped.detach().requires_grad_(captured is not None)
            after = score_mod(before, *self._indices(*numbers)).to(capped.dtype)

        def differentiate(grad: Tensor) -> list[Tensor]:
            of = [before, *(captured or ())]
            if not after.requires_grad:
                return [torch.zeros_like(x) for x in of]
            return list(
                torch.autograd.grad(after, of, grad, allow_unused=True, materialize_grads=True)
            )

        return after.detach() * _LOG2E, differentiate

    def hide(
        self, x: Tensor, piece: _Piece, numbers: Sequence[Tensor], value: float = -math.inf
    ) -> Tensor:
        """Write `value` to `x`, in place, where a query does not see a key."""
        if piece.causal:
            first = piece.rows.start
            length = piece.num_keys - first
            rows = x.view(x.shape[0], -1, length, piece.num_keys)
            rows[..., first:].masked_fill_(_later(length), value)
        if self.mods.mask_mod is not None:
            mask_mod = _over_pairs(checked_mask(self.mods.mask_mod), 0)
            x.masked_fill_(~mask_mod(*self._indices(*numbers)), value)
        return x


def _over_pairs(mod: Callable[..., Tensor], scores: int) -> Callable[..., Tensor]:
    """Let a mod take so many `[p, r, m]`, b, h and q_idx `[p, r]`, and kv_idx `[p, m]`."""
    of_key = torch.vmap(mod, in_dims=(0,) * scores + (None, None, None, 0))
    of_query = torch.vmap(of_key, in_dims=(0,) * scores + (0, 0, 0, None))
    return torch.vmap(of_query)


def _take(part: Part, by_query: list[Tensor], by_key: list[Tensor]) -> list[list[Tensor]]:
    """Return the queries `[b, h, g, n, ...]` and the keys `[b, h, m, ...]` of a part."""
    keys = [part.keys.take(x) for x in by_key]
    num_kv_heads = keys[0].shape[1]
    return [[part.queries.take(x).unflatten(1, (num_kv_heads, -1)) for x in by_query], keys]


def products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mods: Mods,
    scale: float,
    minus_infinity_alone: bool = False,
) -> Callable[[Part], tuple[Tensor, Tensor]]:
    """Return a function that attends within a part.

    Args:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, finite, `[B, Hkv, KV, Dv]`.
        mods: Changes to scores and masks.
        scale: Factor on the scores, before the changes.
        minus_infinity_alone: Attend, with equal weights, to those keys alone that a query sees
            with a score of -inf.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    tiny = torch.finfo(exact).tiny
    scores_of = _Scores(mods, scale, q.shape[:3])
    query_numbers, key_numbers = scores_of.numbers(q, k)
    by_query, by_key = [q, *query_numbers], [k, v, *key_numbers]

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        (part_q, *in_part_q), (part_k, part_v, *in_part_k) = _take(part, by_query, by_key)
        part_k, part_v = part_k.to(exact), part_v.to(exact)
        out = q.new_empty(*part_q.shape[:4], v.shape[3], dtype=exact)
        lse = q.new_empty(part_q.shape[:4], dtype=exact)
        for piece in _pieces(part_q, part_k, part.causal):
            numbers = [*map(piece.queries, in_part_q), *map(piece.keys, in_part_k)]
            capped = scores_of.cap(piece.queries(part_q).to(exact), piece.keys(part_k))
            scores = scores_of.change(capped, numbers)[0]
            if minus_infinity_alone:
                scores = torch.where(scores == -math.inf, 0.0, scores.new_tensor(-math.inf))
            scores = scores_of.hide(scores, piece, numbers)
            largest = None
            if not scores_of.exponential_fits:
                largest = scores.amax(2, keepdim=True)
                scores.sub_(largest.masked_fill_(largest == -math.inf, 0.0))
            weight = scores.exp2_()
            total = weight.sum(2, keepdim=True)
            attended = torch.bmm(weight, piece.keys(part_v))
            piece.put(out, attended.div_(total.clamp(min=tiny)))
            logarithm = total.log2_()
            if largest is not None:  # infinity less infinity is NaN
                logarithm.add_(largest).masked_fill_(largest == math.inf, math.inf)
            piece.put(lse, logarithm.div_(_LOG2E))
        return out.flatten(1, 2), lse.flatten(1, 2)

    return attend


def gradients_of_products(
    results: Results,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mods: Mods,
    scale: float,
    captured: Sequence[Tensor],
    captured_grads: Sequence[Tensor],
) -> Callable[[Part], list[Tensor]]:
    """Return a function that computes the shares of a part in the gradients of q, k and v.

    It adds the shares in the gradients of what `score_mod` captures to `captured_grads`.
    """
    grad, grad_lse, out, lse = results
    exact, grad = lse.dtype, grad.contiguous()
    # A query that sees what is not finite has no finite share in the gradient of a score. A share
    # of 0, of a key that it does not see, must meet nothing but finite vectors.
    sound = all_finite(q, k, v)
    clean_q, clean_k, clean_v = (q, k, v) if sound else map(finite, (q, k, v))
    scores_of = _Scores(mods, scale, q.shape[:3])
    # A score's share is weight * (grad @ v - delta): the derivative of the softmax.
    delta = (grad.to(exact) * out.to(exact)).sum(3)
    if grad_lse is not None:
        delta = delta - grad_lse
    shift = torch.where(lse == -math.inf, math.inf, lse * _LOG2E)
    query_numbers, key_numbers = scores_of.numbers(q, k)
    by_query = [q, clean_q, grad, delta, shift, *query_numbers]
    by_key = [k, clean_k, clean_v, *key_numbers]

    def differentiate(part: Part) -> list[Tensor]:
        of_queries, of_keys = _take(part, by_query, by_key)
        raw_q, part_q, part_grad, part_delta, part_shift, *in_part_q = of_queries
        raw_k, part_k, part_v = (x.to(exact) for x in of_keys[:3])
        dq = q.new_empty(part_q.shape, dtype=exact)
        dk, dv = torch.zeros_like(part_k), torch.zeros_like(part_v)
        for piece in _pieces(part_q, part_k, part.causal):
            numbers = [*map(piece.queries, in_part_q), *map(piece.keys, of_keys[3:])]

            def drop(x: Tensor, piece: _Piece = piece, numbers: Any = numbers) -> Tensor:
                return x if sound else scores_of.hide(x, piece, numbers, value=0.0)

            piece_q, piece_grad = (piece.queries(x).to(exact) for x in (part_q, part_grad))
            capped = drop(scores_of.cap(piece.queries(raw_q).to(exact), piece.keys(raw_k)))
            scores, differentiate_change = scores_of.change(capped, numbers, captured)
            scores = scores_of.hide(scores, piece, numbers)
            weight = drop(scores.sub_(piece.queries(part_shift).unsqueeze(2)).exp2_())
            piece.add_keys(dv, torch.bmm(weight.mT, piece_grad))
            piece_delta = piece.queries(part_delta).unsqueeze(2)
            dscore = scores_of.memory("grad", weight, *weight.shape)
            torch.baddbmm(piece_delta, piece_grad, piece.keys(part_v).mT, beta=-1, out=dscore)
            dscore, *shares = differentiate_change(drop(dscore.mul_(weight)))
            for x, share in zip(captured_grads, shares, strict=True):
                x.add_(share)
            dscore = scores_of.uncap(dscore, capped)
            piece.put(dq, torch.bmm(dscore, piece.keys(part_k)).mul_(scale))
            piece.add_keys(dk, torch.bmm(dscore.mT, piece_q), scale)
        return [dq.flatten(1, 2), dk, dv]

    return differentiate


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


def captured_by(mods: Mods) -> list[Tensor]:
    """Return the tensors that `score_mod` captures and that need a gradient."""
    if mods.score_mod is None or not torch.is_grad_enabled():
        return []
    score = torch.zeros(1, 1, 1, device="cpu")
    place = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    # Without gradients no result needs one, so tensors that do came from outside.
    with torch.no_grad(), _Captures() as captures:
        _over_pairs(checked_score(mods.score_mod), 1)(score, place, place, place, place)
    return list(captures.found.values())
