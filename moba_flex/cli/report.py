"""The report of `moba-flex eval` as a table, a JSON file and a picture."""

import json
import math
import warnings
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_flex.cli.evaluate import Report, Run
from moba_flex.config import MoBAConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

_COLUMNS = {
    "block": 6,
    "top_k": 7,
    "sink": 6,
    "local": 7,
    "density": 10,
    "perplexity": 12,
    "vs dense": 11,
    "recall": 9,
    "entropy": 9,
    "imbalance": 11,
    "seconds": 9,
}
_LEGEND = """\
density     share of query-key pairs attended to
perplexity  of the second half of the text; no training
recall      share of dense attention's weight that lies on the chosen tokens
entropy     0: the queries of a block choose the same blocks, 1: any block alike
imbalance   load of the most chosen block; 1: as if blocks were chosen at random"""


def table(report: Report) -> str:
    """Return the report as plain text, less than 100 columns wide."""
    setting = report.setting
    head = (
        f"{report.model}, {report.tokens} tokens of {report.text}\n"
        f"{setting['device']}, {setting['dtype']}, {setting['threads']} threads, "
        f"torch {setting['torch']}, transformers {setting['transformers']}"
    )
    rule = "-" * sum(_COLUMNS.values())
    lines = [head, "", _line(list(_COLUMNS)), rule]
    dense = report.runs[0].perplexity
    for _, runs in groupby(report.runs, key=lambda run: _group(run.config)):
        lines += [_line(_cells(run, dense)) for run in runs]
        lines.append(rule)
    return "\n".join([*lines, _LEGEND])


def save_json(report: "DataclassInstance", path: Path) -> None:
    """Write the report with all its figures; null for those that do not exist."""
    text = json.dumps(_without_nan(asdict(report)), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """Return lists and dicts of figures with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure, without warnings of letters that its font does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=150)


def save_plot(report: Report, path: Path) -> None:
    """Draw the routing map of one head, and perplexity over density beside dense attention's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))

    blocks = len(report.map[0])
    image = left.imshow(
        report.map,
        aspect="auto",
        cmap="magma",
        vmin=0,
        vmax=1,
        extent=(0, blocks, report.tokens, 0),
        interpolation="nearest",
    )
    left.set(title=f"What is attended to\n{report.map_title}", xlabel="key block", ylabel="query")
    figure.colorbar(image, ax=left, label="share of queries that attend to the block")

    dense, *routed = report.runs
    for group, runs in groupby(routed, key=lambda run: _group(run.config)):
        points = list(runs)
        x, y = [100 * run.density for run in points], [run.perplexity for run in points]
        right.plot(x, y, marker="o", label=group)
        for run, at in zip(points, zip(x, y, strict=True), strict=True):
            if run.config is not None:
                note = str(run.config.top_k)
                right.annotate(note, at, (0, 5), textcoords="offset points", ha="center", size=8)
    right.axhline(dense.perplexity, color="black", linestyle="--", linewidth=1, label="dense")
    title = f"{report.model}, {report.tokens} tokens, no training\n(numbers: top_k)"
    # The name of a model must not be parsed as a formula, and may hold bytes that are not UTF-8.
    right.set_title(title.encode(errors="backslashreplace").decode(), parse_math=False)
    right.set(
        xlabel="density, % of query-key pairs",
        ylabel="perplexity (log scale)",
        yscale="log",
    )
    right.set_xlim(left=0)
    right.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    right.legend()
    right.grid(alpha=0.3)
    save_figure(figure, path)


def _group(config: MoBAConfig | None) -> str:
    """Return the name of the curve of a run: its options except `top_k`."""
    if config is None:
        return "dense"
    forced = {"sink": config.sink_blocks, "local": config.local_blocks}
    named = " + ".join(f"{count} {name}" for name, count in forced.items() if count)
    return f"block {config.block_size}, {named or 'plain gate'}"


def _cells(run: Run, dense: float) -> list[str]:
    perplexity = f"{run.perplexity:.2f}"
    config = run.config
    if config is None:
        return ["dense", "", "", "", "100.0 %", perplexity, "", "", "", "", f"{run.seconds:.1f}"]
    return [
        str(config.block_size),
        str(config.top_k),
        str(config.sink_blocks),
        str(config.local_blocks),
        f"{100 * run.density:.1f} %",
        perplexity,
        f"{100 * (run.perplexity / dense - 1):+.1f} %",
        f"{run.recall:.3f}",
        f"{run.entropy:.2f}",
        f"{run.imbalance:.2f}",
        f"{run.seconds:.1f}",
    ]


def _line(cells: list[str]) -> str:
    widths = _COLUMNS.values()
    return "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
