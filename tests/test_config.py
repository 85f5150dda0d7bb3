"""Tests of `moba_flex.config`."""

import json
from typing import Any

import pytest

from moba_flex.config import MoBAConfig


def test_survives_json() -> None:
    for options in ({"cached": "dense"}, {"layer_top_k": (4, 4), "decode_top_k": 9}):
        _survives_json(MoBAConfig(64, 4, 1, 2, dense_layers=(0, -1), **options))


def _survives_json(config: MoBAConfig) -> None:
    assert MoBAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_takes_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    eight, two = numpy.int64(8), numpy.int32(2)
    rows = [[two, two], [two, two]]
    config = MoBAConfig(eight, two, dense_layers=numpy.array([0, -1]), head_top_k=rows)  # type: ignore[arg-type]
    assert config == MoBAConfig(8, 2, dense_layers=(0, -1), head_top_k=((2, 2), (2, 2)))
    assert MoBAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_is_hashable_and_fills_in_defaults() -> None:
    config = MoBAConfig.from_dict({"block_size": 8, "top_k": 2})
    assert {config: 1}[MoBAConfig(8, 2, 0, 0, (), "route")] == 1


def test_dense_layers_count_from_both_ends() -> None:
    config = MoBAConfig(8, 2, dense_layers=(0, 2, -1))
    assert [config.is_dense(layer, 5) for layer in range(5)] == [True, False, True, False, True]
    assert not any(MoBAConfig(8, 2).is_dense(layer, 5) for layer in range(5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 8.0}, TypeError, "block_size must be an int, got float"),
        ({"block_size": True}, TypeError, "block_size must be an int, got bool"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": "3"}, TypeError, "top_k must be an int, got str"),
        ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0, got -1"),
        ({"local_blocks": -1}, ValueError, "local_blocks must be at least 0, got -1"),
        (
            {"top_k": 2, "sink_blocks": 1, "local_blocks": 1},
            ValueError,
            r"top_k must be at least 1 \+ sink_blocks \+ local_blocks = 3, got 2",
        ),
        ({"dense_layers": 1}, TypeError, "dense_layers must be a tuple of ints, got int"),
        ({"dense_layers": "01"}, TypeError, "dense_layers must be a tuple of ints, got str"),
        ({"dense_layers": (0.0,)}, TypeError, "dense_layers must hold ints, got float"),
        ({"dense_layers": (True,)}, TypeError, "dense_layers must hold ints, got bool"),
        (
            {"cached": "moba"},
            ValueError,
            "cached must be 'route', 'dense' or 'refuse', got 'moba'",
        ),
        ({"chunk": 3}, TypeError, "unexpected keyword argument 'chunk'"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoBAConfig.from_dict({"block_size": 8, "top_k": 4, **options})


@pytest.mark.parametrize("layer", [3, -4])
def test_refuses_layers_that_the_model_lacks(layer: int) -> None:
    message = rf"dense_layers must lie in -3\.\.2, got {layer}: the model has 3 layers"
    with pytest.raises(ValueError, match=message):
        MoBAConfig(8, 2, dense_layers=(layer,)).is_dense(0, 3)
