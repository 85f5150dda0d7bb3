"""What a caller does to scores, beside scaling them."""

from collections.abc import Callable
from dataclasses import dataclass

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
    def ask(self) -> bool:
        """Whether a function is among them, which asks for indices."""
        return self.score_mod is not None or self.mask_mod is not None

    def on_scores(self) -> ScoreMod | None:
        """Return the soft cap and `score_mod` as one function; None if there is neither."""
        softcap, score_mod = self.softcap, self.score_mod
        if softcap is None:
            return score_mod

        def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            score = softcap * torch.tanh(score / softcap)
            return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

        return capped

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
