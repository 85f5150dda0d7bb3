"""What a caller does to scores, beside scaling them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Indices = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a pair: `b`, `h`, `q_idx` and `kv_idx`."""


@dataclass(frozen=True)
class Mods:
    """Changes to scores and masks; the gate sees none of them.

    They apply in this order, to scores that are scaled: soft cap, `score_mod`, `mask_mod`.
    Positions are those of the tensors that the caller gave: `q_idx` from 0 to Q - 1, `kv_idx` from
    0 to KV - 1.

    Attributes:
        score_mod: FlexAttention's: `score_mod(score, b, h, q_idx, kv_idx)` returns a score.
        mask_mod: FlexAttention's: `mask_mod(b, h, q_idx, kv_idx)` says whether a query sees a key
            that routing and causality let it see.
        softcap: `score -> softcap * tanh(score / softcap)`, before `score_mod`.
    """

    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    softcap: float | None = None

    @property
    def none(self) -> bool:
        """Whether nothing changes."""
        return not self.ask and self.softcap is None

    @property
    def ask(self) -> bool:
        """Whether a function is among them, which asks for indices."""
        return self.score_mod is not None or self.mask_mod is not None

    def on_scores(self) -> ScoreMod | None:
        """Return the soft cap and `score_mod` as one function; None if there is neither."""
        softcap = self.softcap
        score_mod = None if self.score_mod is None else checked_score(self.score_mod)
        if softcap is None:
            return score_mod

        def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            score = softcap * torch.tanh(score / softcap)
            return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

        return capped

    def on_masks(self) -> MaskMod | None:
        """Return `mask_mod`; None if there is none."""
        return None if self.mask_mod is None else checked_mask(self.mask_mod)

    def check_results(self, like: Tensor) -> None:
        """Raise if a function returns what it must not, for a score like those of `like`.

        Raises:
            TypeError: What it returns is no score, or no bool.
            ValueError: It is not one value for each position, or asks for one.
        """
        score = like.new_zeros(1)
        place = torch.zeros(1, dtype=torch.int64, device=like.device)
        if self.score_mod is not None:
            torch.vmap(checked_score(self.score_mod))(score, place, place, place, place)
        if self.mask_mod is not None:
            torch.vmap(checked_mask(self.mask_mod))(place, place, place, place)

    def moved(self, origin: Callable[[Tensor, Tensor, Tensor, Tensor], Indices]) -> "Mods":
        """Return the same changes where queries and keys lie in other places.

        Args:
            origin: Tells of indices there the positions that the functions know.
        """
        score_mod, mask_mod = self.score_mod, self.mask_mod

        def moved_score(
            score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
        ) -> Tensor:
            assert score_mod is not None
            return score_mod(score, *origin(b, h, q_idx, kv_idx))

        def moved_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            assert mask_mod is not None
            return mask_mod(*origin(b, h, q_idx, kv_idx))

        return Mods(
            None if score_mod is None else moved_score,
            None if mask_mod is None else moved_mask,
            self.softcap,
        )


NO_MODS = Mods()


def checked_score(mod: ScoreMod) -> ScoreMod:
    """Return a `score_mod` that raises unless it returns a number, and returns it as a score."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        new = _asked("score_mod", mod, score, b, h, q_idx, kv_idx)
        if not isinstance(new, Tensor):
            raise TypeError(
                f"score_mod must return a Tensor, got {type(new).__name__}: change the score given"
            )
        if new.dtype == torch.bool or new.dtype.is_complex:
            raise TypeError(
                f"score_mod must return a real number, got {new.dtype}: hide keys by mask_mod"
            )
        _check_shape("score_mod", new, score)
        if new.is_floating_point() and new.dtype != torch.float64:
            return new
        # FlexAttention traces scores of float32 as if they had the dtype of q.
        return new.to(torch.promote_types(score.dtype, torch.float32))

    return score_mod


def checked_mask(mod: MaskMod) -> MaskMod:
    """Return a `mask_mod` that raises unless it returns a bool, which may be Python's."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        sees = _asked("mask_mod", mod, b, h, q_idx, kv_idx)
        if isinstance(sees, bool):  # kernels want what depends on places
            return kv_idx >= 0 if sees else kv_idx < 0
        if not isinstance(sees, Tensor) or sees.dtype != torch.bool:
            got = sees.dtype if isinstance(sees, Tensor) else type(sees).__name__
            raise TypeError(f"mask_mod must return a bool, got {got}: compare, or use .bool()")
        _check_shape("mask_mod", sees, kv_idx)
        return sees

    return mask_mod


def _asked(name: str, mod: Callable[..., Any], *args: Tensor) -> Any:
    if torch.compiler.is_compiling():  # which tells the line itself
        return mod(*args)
    try:
        return mod(*args)
    except RuntimeError as error:
        if "data-dependent control flow" not in str(error):
            raise
        raise ValueError(
            f"{name} must be one expression for all positions, got Python that asks for a value "
            "(if, and, or, not, while): use torch.where, &, | and ~"
        ) from error


def _check_shape(name: str, result: Tensor, like: Tensor) -> None:
    """Raise unless a mod returned one value for one position."""
    if result.dim() > like.dim():
        raise ValueError(
            f"{name} must return one value for a position, got shape {tuple(result.shape)}: "
            "it is called for each position alone"
        )
