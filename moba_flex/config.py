"""How one model uses Mixture of Block Attention, as plain data."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from moba_flex.masks.checks import check_int
from moba_flex.masks.request import Gate


@dataclass(frozen=True)
class MoBAConfig:
    """The gate's options and where in a model they apply.

    Attributes:
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen; they count in `top_k`.
        local_blocks: Blocks right before the own one, always chosen; they count in `top_k`.
        head_top_k: `top_k` of each head in each layer, a row of numbers for each layer; None for
            `top_k` everywhere. None may exceed `top_k`.
        dense_layers: Layers that keep dense attention, as the model's config counts them; negative
            numbers count from the last.
        cached: What a call with cached keys does, one with more keys than queries: "route" routes
            it like any other, "dense" attends to all keys, "refuse" raises.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or `top_k` cannot hold the forced blocks.

    Example:
        >>> config = MoBAConfig(block_size=64, top_k=8, sink_blocks=1, dense_layers=(0, -1))
        >>> [config.is_dense(layer, num_layers=4) for layer in range(4)]
        [True, False, False, True]
        >>> MoBAConfig.from_dict(config.to_dict()) == config
        True
    """

    block_size: int
    top_k: int
    sink_blocks: int = 0
    local_blocks: int = 0
    dense_layers: tuple[int, ...] = ()
    cached: Literal["route", "dense", "refuse"] = "route"
    head_top_k: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        gate = Gate(self.block_size, self.top_k, self.sink_blocks, self.local_blocks)
        for name in ("block_size", "top_k", "sink_blocks", "local_blocks"):
            # The gate has them as plain ints; JSON knows no others.
            object.__setattr__(self, name, getattr(gate, name))
        if isinstance(self.dense_layers, str) or not isinstance(self.dense_layers, Iterable):
            raise TypeError(
                f"dense_layers must be a tuple of ints, got {type(self.dense_layers).__name__}"
            )
        layers = tuple(self.dense_layers)
        for layer in layers:
            if isinstance(layer, bool) or not hasattr(layer, "__index__"):
                raise TypeError(f"dense_layers must hold ints, got {type(layer).__name__}")
        object.__setattr__(self, "dense_layers", tuple(map(operator.index, layers)))
        if self.cached not in ("route", "dense", "refuse"):
            raise ValueError(f"cached must be 'route', 'dense' or 'refuse', got {self.cached!r}")
        if self.head_top_k is not None:
            object.__setattr__(self, "head_top_k", self._checked_head_top_k())

    def _checked_head_top_k(self) -> tuple[tuple[int, ...], ...]:
        """Return `head_top_k` as tuples."""
        rows: Any = self.head_top_k
        for row in [rows, *rows] if isinstance(rows, (list, tuple)) else [rows]:
            if not isinstance(row, (list, tuple)):
                raise TypeError(
                    f"head_top_k must hold a tuple of ints for each layer, got "
                    f"{type(row).__name__}"
                )
        least = 1 + self.sink_blocks + self.local_blocks
        checked = tuple(tuple(check_int("head_top_k", x, least) for x in row) for row in rows)
        for number in (number for row in checked for number in row):
            if number > self.top_k:
                raise ValueError(
                    f"head_top_k must be at most top_k = {self.top_k}, got {number}: raise top_k"
                )
        return checked

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raise unless a model of this size has what the options name.

        Raises:
            ValueError: It lacks a layer, or has other layers or heads than `head_top_k`.
        """
        self.is_dense(0, num_layers)
        sizes = {len(row) for row in self.head_top_k or ()}
        if self.head_top_k is not None and (len(self.head_top_k), sizes) != (
            num_layers,
            {num_heads},
        ):
            raise ValueError(
                f"head_top_k must hold {num_heads} numbers, one for each head, for each of "
                f"{num_layers} layers, got {len(self.head_top_k)} rows of {sorted(sizes)}"
            )

    def is_dense(self, layer_idx: int, num_layers: int) -> bool:
        """Return whether layer `layer_idx` of `num_layers` keeps dense attention.

        Raises:
            ValueError: `dense_layers` names a layer that the model lacks.
        """
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"dense_layers must lie in {-num_layers}..{num_layers - 1}, got {layer}: "
                    f"the model has {num_layers} layers"
                )
        return layer_idx in self.dense_layers or layer_idx - num_layers in self.dense_layers

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON knows them."""
        # JSON knows lists only.
        head_top_k = self.head_top_k and [list(row) for row in self.head_top_k]
        layers = list(self.dense_layers)
        return {**asdict(self), "dense_layers": layers, "head_top_k": head_top_k}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Return the config that `to_dict` wrote.

        Raises:
            TypeError: An option is unknown or missing, or has the wrong type.
            ValueError: An option is out of range.
        """
        return cls(**options)
