"""Changes that a caller makes to scores and masks, besides the scale."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Indices = tuple[Tensor, Tensor, Tensor, Tensor]
"""The indices `b`, `h`, `q_idx` and `kv_idx` of a query and a key."""


@dataclass(frozen=True)
class Mods:
    """Changes to scores and masks; the gate ignores them.

    Scaled scores go through the soft cap, then `score_mod`, then `mask_mod`. Indices are those of
    the caller's tensors: `q_idx` from 0 to Q - 1, `kv_idx` from 0 to KV - 1.

    Attributes:
        score_mod: As in FlexAttention: `score_mod(score, b, h, q_idx, kv_idx)` returns a score.
        mask_mod: As in FlexAttention: `mask_mod(b, h, q_idx, kv_idx)` says whether a query sees a
            key that routing and causality let it see.
        softcap: `score -> softcap * tanh(score / softcap)`, before `score_mod`.
    """

    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    softcap: float | None = None

    @property
    def none(self) -> bool:
        """Whether there are no changes."""
        return not self.ask and self.softcap is None

    @property
    def ask(self) -> bool:
        """Whether there is a `score_mod` or a `mask_mod`, which take indices."""
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
        """Raise if a function does not return what it must, given a score of the dtype of `like`.

        Raises:
            TypeError: `score_mod` does not return a real number, or `mask_mod` no bool.
            ValueError: A function returns several values for one position, or branches in Python
                on a value.
        """
        score = like.new_zeros(1)
        place = torch.zeros(1, dtype=torch.int64, device=like.device)
        if self.score_mod is not None:
            torch.vmap(checked_score(self.score_mod))(score, place, place, place, place)
        if self.mask_mod is not None:
            torch.vmap(checked_mask(self.mask_mod))(place, place, place, place)

    def moved(self, origin: Callable[[Tensor, Tensor, Tensor, Tensor], Indices]) -> "Mods":
        """Return the same changes for queries and keys that were moved in memory.

        Args:
            origin: Turns indices into the moved tensors into indices of the caller's tensors.
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


def checked_score(mod: ScoreMod) -> ScoreMod:
    """Return a `score_mod` that raises unless `mod` returns a real number, and casts it."""

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
        # FlexAttention's scores are float32, but it traces them in the dtype of q.
        return new.to(torch.promote_types(score.dtype, torch.float32))

    return score_mod


def checked_mask(mod: MaskMod) -> MaskMod:
    """Return a `mask_mod` that raises unless `mod` returns a bool, Python's bools included."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        sees = _asked("mask_mod", mod, b, h, q_idx, kv_idx)
        if isinstance(sees, bool):  # kernels need a result that depends on indices
            return kv_idx >= 0 if sees else kv_idx < 0
        if not isinstance(sees, Tensor) or sees.dtype != torch.bool:
            got = sees.dtype if isinstance(sees, Tensor) else type(sees).__name__
            raise TypeError(f"mask_mod must return a bool, got {got}: compare, or use .bool()")
        _check_shape("mask_mod", sees, kv_idx)
        return sees

    return mask_mod


def _asked(name: str, mod: Callable[..., Any], *args: Tensor) -> Any:
    if torch.compiler.is_compiling():  # its own error names the line
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
