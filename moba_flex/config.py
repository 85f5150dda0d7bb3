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
            it like any other, "dense" attends to all keys, "refuse" raises. Decode is such calls,
            and so is a prompt in chunks behind its first chunk.
        layer_top_k: `top_k` of each layer, one number for each; None for `top_k` everywhere. None
            may exceed `top_k`. Not together with `head_top_k`.
        decode_top_k: `top_k` of calls with cached keys, in all layers and heads; None for that of
            other calls. It may exceed `top_k`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, `top_k` cannot hold the forced blocks, or an option
            would not be used beside another.

    Example:
        >>> config = MoBAConfig(block_size=64, top_k=8, sink_blocks=1, dense_layers=(0, -1))
        >>> [config.is_dense(layer, num_layers=4) for layer in range(4)]
        [True, False, False, True]
        >>> MoBAConfig.from_dict(config.to_dict()) == config
        True

        Sparser in the middle of a model, and denser for new tokens:

        >>> schedule = MoBAConfig(64, top_k=16, layer_top_k=(16, 4, 4, 16), decode_top_k=32)
        >>> schedule.check_model(num_layers=4, num_heads=8)
    """

    block_size: int
    top_k: int
    sink_blocks: int = 0
    local_blocks: int = 0
    dense_layers: tuple[int, ...] = ()
    cached: Literal["route", "dense", "refuse"] = "route"
    head_top_k: tuple[tuple[int, ...], ...] | None = None
    layer_top_k: tuple[int, ...] | None = None
    decode_top_k: int | None = None

    def __post_init__(self) -> None:
        gate = Gate(self.block_size, self.top_k, self.sink_blocks, self.local_blocks)
        for name in ("block_size", "top_k", "sink_blocks", "local_blocks"):
            # The gate has them as plain ints; JSON knows no others.
            object.__setattr__(self, name, getattr(gate, name))
        layers = _sequence("dense_layers", self.dense_layers)
        for layer in layers:
            if isinstance(layer, bool) or not hasattr(layer, "__index__"):
                raise TypeError(f"dense_layers must hold ints, got {type(layer).__name__}")
        object.__setattr__(self, "dense_layers", tuple(map(operator.index, layers)))
        if self.cached not in ("route", "dense", "refuse"):
            raise ValueError(f"cached must be 'route', 'dense' or 'refuse', got {self.cached!r}")
        if self.head_top_k is not None:
            object.__setattr__(self, "head_top_k", self._checked_head_top_k())
        if self.layer_top_k is not None:
            if self.head_top_k is not None:
                raise ValueError(
                    "layer_top_k must be None beside head_top_k, got both: "
                    "give head_top_k the numbers of each layer"
                )
            row = _sequence("layer_top_k", self.layer_top_k)
            object.__setattr__(self, "layer_top_k", self._checked_row("layer_top_k", row))
        if self.decode_top_k is not None:
            if self.cached != "route":
                raise ValueError(
                    f"decode_top_k must be None for cached={self.cached!r}, got "
                    f"{self.decode_top_k}: let cached be 'route'"
                )
            number = check_int("decode_top_k", self.decode_top_k, gate.least_top_k)
            object.__setattr__(self, "decode_top_k", number)

    def _checked_head_top_k(self) -> tuple[tuple[int, ...], ...]:
        """Return `head_top_k` as tuples."""
        rows: Any = self.head_top_k
        for row in [rows, *rows] if isinstance(rows, (list, tuple)) else [rows]:
            if not isinstance(row, (list, tuple)):
                raise TypeError(
                    f"head_top_k must hold a tuple of ints for each layer, got "
                    f"{type(row).__name__}"
                )
        return tuple(self._checked_row("head_top_k", row) for row in rows)

    def _checked_row(self, name: str, row: Iterable[Any]) -> tuple[int, ...]:
        """Return numbers of `top_k` as plain ints."""
        least = 1 + self.sink_blocks + self.local_blocks
        numbers = tuple(check_int(name, number, least) for number in row)
        for number in numbers:
            if number > self.top_k:
                raise ValueError(
                    f"{name} must be at most top_k = {self.top_k}, got {number}: raise top_k"
                )
        return numbers

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raise unless a model of this size has what the options name.

        Raises:
            ValueError: It lacks a layer, or has other layers or heads than `head_top_k` or
                `layer_top_k`.
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
        if self.layer_top_k is not None and len(self.layer_top_k) != num_layers:
            raise ValueError(
                f"layer_top_k must hold {num_layers} numbers, one for each layer, got "
                f"{len(self.layer_top_k)}"
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
        layer_top_k = self.layer_top_k and list(self.layer_top_k)
        lists = {"dense_layers": list(self.dense_layers), "head_top_k": head_top_k}
        return {**asdict(self), **lists, "layer_top_k": layer_top_k}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Return the config that `to_dict` wrote.

        Raises:
            TypeError: An option is unknown or missing, or has the wrong type.
            ValueError: An option is out of range.
        """
        return cls(**options)


def _sequence(name: str, numbers: Any) -> tuple[Any, ...]:
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise TypeError(f"{name} must be a tuple of ints, got {type(numbers).__name__}")
    return tuple(numbers)
