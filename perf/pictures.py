"""Benchmarks as pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from perf.shapes import STAGES
from perf.tables import (
    CUDNN,
    FLASH,
    OURS,
    Bench,
    Estimate,
    dense,
    figures,
    group,
    seconds,
    series,
    speedup_map,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = ("forward", "forward+backward")
BOTH = STAGES[-1]


def bars(benches: list[Bench], title: str, path: Path) -> None:
    """Draw a panel a shape: one bar an implementation, its forward part dark."""
    run = group(benches)
    names = list(dict.fromkeys(peer for peers in run.values() for peer in peers))[::-1]
    columns = min(4, len(run))
    lines = math.ceil(len(run) / columns)
    figure = new_figure(4 * columns, (1 + 0.4 * len(names)) * lines)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for panel in panels[len(run) :]:
        panel.set_visible(False)
    for panel, (shape, peers) in zip(panels, run.items(), strict=False):
        longest = 0.0
        for peer, stages in peers.items():
            at, colour = names.index(peer), "tab:red" if peer == OURS else "tab:gray"
            times = [1e3 * seconds(stages[stage]) for stage in DRAWN if stage in stages]
            for time, alpha in zip(times, (1.0, 0.35), strict=False):
                panel.barh(at, time, color=colour, alpha=alpha)
            label = f" {' / '.join(figures(time) for time in times)}"
            panel.text(max(times), at, label, va="center", fontsize=8)
            longest = max(longest, *times)
        panel.set(title=shape, xlabel="ms", xlim=(0, 1.4 * longest))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    figure.suptitle(f"forward / forward+backward\n{title}", fontsize=8)
    figure.savefig(path, dpi=120)


def curves(benches: list[Bench], title: str, path: Path) -> None:
    """Draw against the length: the time of a token, its parts, and how much faster it is."""
    figure = new_figure(15, 4.5)
    whole, parts, faster = figure.subplots(1, 3)
    ours = series(benches, OURS, BOTH)
    lengths = sorted({length for times in ours.values() for length in times})
    cudnn, flash = (
        {n: found for n in lengths if (found := dense(benches, peer, BOTH, n))}
        for peer in (CUDNN, FLASH)
    )
    for options, times in ours.items():
        curve(whole, options, {n: Estimate(1e9 * times[n] / n) for n in times})
        ratios = {n: cudnn[n].scaled(1 / times[n]) for n in times if n in cudnn}
        curve(faster, options, ratios)
    for name, estimates in (("SDPA cuDNN", cudnn), ("SDPA flash", flash)):
        curve(whole, name, {n: found.scaled(1e9 / n) for n, found in estimates.items()})
    for part in ("attend", "route"):
        for options, times in series(benches, OURS, part).items():
            curve(parts, f"{part}, {options}", {n: Estimate(1e9 * times[n] / n) for n in times})
    whole.set(title=BOTH, ylabel="ns a token")
    parts.set(title="parts of forward", ylabel="ns a token")
    faster.set(title=f"{BOTH}, times faster than SDPA cuDNN")
    for panel in (whole, parts, faster):
        panel.set(xlabel="tokens", xscale="log", yscale="log")
        panel.set_xticks(lengths, [f"{n // 1024}K" for n in lengths], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(f"hollow: extrapolated\n{title}", fontsize=8)
    figure.savefig(path, dpi=120)


def curve(panel: "Axes", label: str, points: dict[int, Estimate]) -> None:
    """Draw a line, hollow where it is extrapolated."""
    lengths = sorted(points)
    (line,) = panel.plot(lengths, [points[n].value for n in lengths], "o-", label=label)
    hollow = [n for n in lengths if points[n].extrapolated]
    values = [points[n].value for n in hollow]
    panel.plot(hollow, values, "o", color=line.get_color(), markerfacecolor="white")


def heat(benches: list[Bench], title: str, path: Path) -> None:
    """Draw how many times faster than cuDNN each block_size and top_k is."""
    block_sizes, top_ks, ratios = speedup_map(benches)
    figure = new_figure(2 + 0.8 * len(top_ks), 1.5 + 0.5 * len(block_sizes))
    panel = figure.subplots()
    cells = {(x, y): cell for y, line in enumerate(ratios) for x, cell in enumerate(line)}
    most = max(cell for cell in cells.values() if cell > 0)
    panel.imshow(ratios, norm="log", vmin=1 / most, vmax=most, cmap="RdYlGn", aspect="auto")
    for (x, y), cell in cells.items():
        panel.text(x, y, "" if math.isnan(cell) else figures(cell), ha="center", va="center")
    panel.set(xlabel="top_k", ylabel="block_size", title="times faster than SDPA cuDNN")
    panel.set_xticks(range(len(top_ks)), map(str, top_ks))
    panel.set_yticks(range(len(block_sizes)), map(str, block_sizes))
    figure.suptitle(f"{BOTH}\n{title}", fontsize=6)
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float) -> "Figure":
    """Make a figure that needs no display; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
