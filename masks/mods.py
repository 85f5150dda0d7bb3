"""What a caller does to scores, beside scaling them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mods:
    """Changes to scores and masks; the gate sees none of them.

    They apply in this order, to scores that are scaled. Positions are those of the tensors that
    the caller gave: `q_idx` from 0 to Q - 1, `kv_idx` from 0 to KV - 1.

    Attributes:
        score_mod: FlexAttention's: `score_mod(score, b, h, q_idx, kv_idx)` returns a score.
        mask_mod: FlexAttention's: `mask_mod(b, h, q_idx, kv_idx)` says whether a query sees a key
            that routing and causality let it see.
        softcap: `score -> softcap * tanh(score / softcap)`, before `score_mod`.
    """

    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    softcap: float | None = None
