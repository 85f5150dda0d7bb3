"""`moba_attention` as a module that keeps a layer's options."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.hooks import RemovableHandle
from typing_extensions import override  # of typing from Python 3.12 on; PyTorch needs it too

from moba_flex.attention import Plan, moba_attention
from moba_flex.masks._torch.inputs import numbers_beside
from moba_flex.masks.checks import (
    check_int,
    check_scale,
    check_softcap,
    is_readable,
)
from moba_flex.masks.layout import RowOptions
from moba_flex.masks.mods import MaskMod, ScoreMod
from moba_flex.masks.request import Gate


class CallOptions(RowOptions, total=False):
    """What differs from call to call; see `moba_flex.moba_attention`."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None


class MoBAAttention(nn.Module):
    """`moba_attention` with the options of a layer: what comes between its projections.

    It has no parameters, because the gate has none, and nothing of it is saved. Its options are
    attributes that may be set later: with a `top_k` that covers all keys the same model is dense.

    Args:
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one, always chosen; they count in `top_k`.
        causal: Whether a query sees only keys at its position and before.
        scale: Factor on the scores; `1 / sqrt(D)` if None.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        head_top_k: `top_k` of each head, `Hq` numbers, kept as a tuple; None for `top_k` in all.
        plan: How to compute it, as of `moba_attention`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or `top_k` cannot hold the forced blocks.

    Example:
        >>> attention = MoBAAttention(block_size=64, top_k=3)
        >>> q, k = torch.randn(1, 4, 512, 32), torch.randn(1, 2, 512, 32)
        >>> sparse = attention(q, k, k)
        >>> attention.top_k = 8  # of 8 blocks
        >>> dense = attention(q, k, k)
        >>> exact = torch.nn.functional.scaled_dot_product_attention(
        ...     q, k, k, is_causal=True, enable_gqa=True
        ... )
        >>> torch.allclose(dense, exact, atol=1e-5), torch.allclose(sparse, exact, atol=1e-5)
        (True, False)
    """

    def __init__(
        self,
        block_size: int,
        top_k: int,
        *,
        sink_blocks: int = 0,
        local_blocks: int = 0,
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        head_top_k: Sequence[int] | Tensor | None = None,
        plan: Plan | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        gate = Gate(block_size, top_k, sink_blocks, local_blocks, causal)
        self.block_size, self.top_k = gate.block_size, gate.top_k
        self.sink_blocks, self.local_blocks = gate.sink_blocks, gate.local_blocks
        self.causal, self.plan = gate.causal, plan
        self.scale, self.softcap = check_scale(scale), check_softcap(softcap)
        self.head_top_k = _as_ints(head_top_k)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_aux: AuxRequest | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Attend, see `moba_attention`.

        Args:
            q: Queries, `[B, Hq, Q, D]`.
            k: Keys, `[B, Hkv, KV, D]`.
            v: Values, `[B, Hkv, KV, Dv]`.
            return_aux: What to return beside the output.
            options: `cu_seqlens`, `cu_seqlens_q`, `key_mask`, `score_mod` and `mask_mod`, as of
                `moba_attention`.

        Returns:
            The output `[B, Hq, Q, Dv]`, or with `return_aux` the output and an `AuxOutput`.

        Raises:
            ValueError: A shape, a device or an option is out of range, or the plan cannot serve
                the request.
            TypeError: An argument has the wrong type.
        """
        numbers = _as_ints(self.head_top_k)
        head_top_k = None if numbers is None else numbers_beside(q, numbers)
        attend: Callable[..., Any] = moba_attention
        return attend(
            q,
            k,
            v,
            return_aux=return_aux,
            head_top_k=head_top_k,
            **self._options(),
            **options,
        )

    @override
    def register_forward_pre_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """Register a hook, unless it is that of PyTorch's context parallel for FlexAttention.

        That one gathers keys and values, and leaves queries that are not the last positions.

        Raises:
            ValueError: It is that hook.
        """
        owner = getattr(getattr(hook, "func", None), "__self__", None)
        if type(owner).__name__ == "_ContextParallel":
            raise ValueError(
                "module must be one that calls flex_attention or scaled_dot_product_attention for "
                "torch's _ContextParallel, got a MoBAAttention: use "
                "moba_flex.distributed.context_parallel_attention"
            )
        return super().register_forward_pre_hook(hook, **options)

    def _options(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "sink_blocks": self.sink_blocks,
            "local_blocks": self.local_blocks,
            "causal": self.causal,
            "scale": self.scale,
            "softcap": self.softcap,
            "plan": self.plan,
        }

    def extra_repr(self) -> str:
        """Return the options, for `print`."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        if self.head_top_k is None:
            return options
        return f"{options}, head_top_k={list(self.head_top_k)}"


def _as_ints(head_top_k: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    """Return the `top_k` of each head as plain ints, which no device and no cast can change."""
    if head_top_k is None:
        return None
    if isinstance(head_top_k, Tensor):
        if not is_readable(head_top_k):
            raise ValueError(
                "head_top_k must hold numbers that can be read, got a tensor on "
                f"{head_top_k.device}: pass a list"
            )
        head_top_k = head_top_k.tolist()
    return tuple(check_int("head_top_k", number, 1) for number in head_top_k)
