"""The measures of `moba-flex inspect`, as a table and a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch

from moba_flex.cli.evaluate import check_tokens, setting_of
from moba_flex.cli.report import save_figure
from moba_flex.cli.runs import Loaded
from moba_flex.config import MoBAConfig
from moba_flex.diagnostics import MEASURES, collect
from moba_flex.integrations.transformers import apply

_DRAWN = ("recall", "regret", "entropy", "gini", "distance", "union")
_WIDTH = 10


@dataclass(frozen=True)
class Inspection:
    """The choices of a model's gate, in one run over a text.

    Attributes:
        model: Name of the model.
        text: Name of the text.
        tokens: Length of the text.
        setting: Device, dtype, threads and versions.
        config: The gate.
        layers: Names of the layers.
        measures: By the names of `moba_flex.diagnostics.MEASURES`: for each layer a figure of each
            head, or of each group of heads for "union"; NaN where there is nothing to measure.
    """

    model: str
    text: str
    tokens: int
    setting: dict[str, str | int]
    config: MoBAConfig
    layers: list[str]
    measures: dict[str, list[list[float]]]


def inspect(loaded: Loaded, config: MoBAConfig) -> Inspection:
    """Run a model over a text once, and measure its routing.

    Raises:
        ValueError: The model does not use the attention interface of transformers, does not know a
            token, or has no layers that attend.
    """
    model, ids = loaded.model, loaded.ids
    check_tokens(model, ids)
    apply(model, config)
    with torch.no_grad(), collect(model) as layers:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if not layers:
        raise ValueError("model must have layers that attend, got none: is it complete?")
    means = {name: layer.means() for name, layer in layers.items()}
    return Inspection(
        model=loaded.model_name,
        text=loaded.text_name,
        tokens=ids.shape[1],
        setting=setting_of(model, ids.device),
        config=config,
        layers=list(means),
        measures={name: [x[name].tolist() for x in means.values()] for name in MEASURES},
    )


def table(found: Inspection) -> str:
    """Return the averages over heads as plain text, less than 100 columns wide."""
    config, setting = found.config, found.setting
    gate = f"block {config.block_size}, top_k {config.top_k}, sink {config.sink_blocks}"
    rule = "-" * (len("layer") + _WIDTH * len(MEASURES))
    names = "".join(name.rjust(_WIDTH) for name in MEASURES)
    lines = [
        f"{found.model}, {found.tokens} tokens of {found.text}",
        f"{gate}, local {config.local_blocks}; {setting['device']}, {setting['dtype']}",
        "",
        f"layer{names}",
        rule,
    ]
    columns = [[_mean(x) for x in layers] for layers in found.measures.values()]
    rows = [*zip(*columns, strict=True), [_mean(x) for x in columns]]
    for name, row in zip([*_numbers(found.layers), "mean"], rows, strict=True):
        cells = "".join(f"{x:.{1 if x >= 10 else 3}f}".rjust(_WIDTH) for x in row)
        lines += [rule] * (name == "mean") + [name.rjust(len("layer")) + cells]
    meanings = [f"{name:11} {meaning}" for name, meaning in MEASURES.items()]
    return "\n".join([*lines, rule, *meanings])


def _mean(figures: Sequence[float]) -> float:
    """Return the mean of those that exist."""
    exist = [x for x in figures if not math.isnan(x)]
    return sum(exist) / len(exist) if exist else math.nan


def _numbers(names: Sequence[str]) -> list[str]:
    """Return the numbers of layers, which are parts of their names; else their places."""
    numbers = [[part for part in name.split(".") if part.isdecimal()] for name in names]
    return [x[0] if x else str(place) for place, x in enumerate(numbers)]


def save_plot(found: Inspection, path: Path) -> None:
    """Draw measures by layer and head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, numbers = figure.subplots(2, 3), _numbers(found.layers)
    for ax, name in zip(axes.flat, _DRAWN, strict=True):
        rows = found.measures[name]
        width = max(map(len, rows))  # layers may have different numbers of heads
        padded = [[*row, *[math.nan] * (width - len(row))] for row in rows]
        image = ax.imshow(padded, aspect="auto", interpolation="nearest")
        ax.set_title(f"{name}\n{fill(MEASURES[name], 46)}", size=8)
        ax.set(xlabel="group of heads" if name == "union" else "head", ylabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        some = range(0, len(rows), max(1, len(rows) // 10))
        ax.set_yticks(list(some), [numbers[place] for place in some])
        figure.colorbar(image, ax=ax)
    config = found.config
    title = (
        f"{found.model}, {found.tokens} tokens, block {config.block_size}, top_k {config.top_k}, "
        f"sink {config.sink_blocks}, local {config.local_blocks}"
    )
    # The name of a model must not be parsed as a formula, and may hold bytes that are not UTF-8.
    figure.suptitle(title.encode(errors="backslashreplace").decode(), parse_math=False)
    save_figure(figure, path)
