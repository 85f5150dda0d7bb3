"""Turns the benchmarks' JSON into markdown tables and pictures.

python perf/plot.py [--update-readme] [FILE ...]   # default: perf/results/attention_*.json
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "perf" / "results"
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
OURS = "moba_flex"
DRAWN = ("forward", "forward+backward")
STAGES = ("forward", "backward", "forward+backward")
LEGEND = """\
Median and interquartile range in ms; routing is inside every MoBA figure. "x" is the time over
moba_flex's in the same run: above 1, moba_flex is faster. A shape is tokens/block_size/top_k, with
its density: the share of the causal (query, key) pairs that MoBA selects. TFLOP/s, of the forward
pass, counts the selected pairs only, 4 head_dim operations each, for dense implementations too.
MiB is the most memory held during forward and backward, beyond the inputs."""

Bench = dict[str, Any]
# One run: shape -> implementation -> stage -> benchmark, each in the order it was timed.
Run = dict[str, dict[str, dict[str, Bench]]]


def main(argv: list[str] | None = None) -> None:
    """Print tables, save pictures beside the JSON, and write both into the README if asked."""
    parser = argparse.ArgumentParser(description="Turn benchmark JSON into tables and pictures.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of perf/results")
    parser.add_argument("--update-readme", action="store_true", help="rewrite its tables")
    args = parser.parse_args(argv)
    files = args.files or sorted(RESULTS.glob("attention_*.json"))
    if not files:
        parser.error(f"{RESULTS} must hold attention_*.json, got none: run pytest perf")
    documents = [(file, json.loads(file.read_text())) for file in files]
    documents.sort(key=lambda pair: pair[1]["machine_info"]["device"], reverse=True)  # GPUs first
    sections = []
    for file, document in documents:
        run = group(document["benchmarks"])
        picture = file.with_suffix(".png")
        draw(run, heading(document), picture)
        link = os.path.relpath(picture, ROOT)
        sections.append(f"{table(document)}\n\n![{heading(document)}]({link})")
    text = "\n\n".join([LEGEND, *sections])
    print(text)
    if args.update_readme:
        update(ROOT / "README.md", text)


def group(benchmarks: list[Bench]) -> Run:
    """Sort benchmarks by shape, implementation and stage."""
    run: Run = {}
    for bench in benchmarks:
        info = bench["extra_info"]
        run.setdefault(info["shape"], {}).setdefault(info["peer"], {})[info["stage"]] = bench
    return run


def heading(document: dict[str, Any]) -> str:
    """Name the machine that the figures are from, and its software."""
    machine = document["machine_info"]
    if machine["device"] == "cuda":
        parts = [machine["gpu"], f"driver {machine['driver']}"]
    else:
        parts = [f"{machine['cpu']}", f"{machine['threads']} threads"]
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "python") if machine[name]]
    parts += [f"commit {machine['commit']}"] if machine["commit"] else []
    return ", ".join([*parts, document["datetime"][:10]])


def table(document: dict[str, Any]) -> str:
    """Write one run as a markdown table under the machine and the sizes."""
    titles = ["shape", "implementation"]
    for stage in STAGES:
        titles += [f"{stage} ms", "x"]
    titles += ["TFLOP/s", "MiB"]
    rows = [titles, ["---"] * len(titles)]
    for shape, peers in group(document["benchmarks"]).items():
        for peer, stages in peers.items():
            cells = [f"{shape}, {density(stages):.1%}", peer]
            for stage in STAGES:
                cells += timing(stages.get(stage), peers.get(OURS, {}).get(stage))
            rows.append(cells + work(stages))
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"**{heading(document)}**; {sizes(document)}", "", *lines])


def sizes(document: dict[str, Any]) -> str:
    """Name the sizes that a shape's name leaves out."""
    infos = [bench["extra_info"] for bench in document["benchmarks"]]
    texts = [
        f"batch {info['batch']}, {info['num_heads']} query and {info['num_kv_heads']} key heads, "
        f"head_dim {info['head_dim']}, {info['dtype']}"
        for info in infos
    ]
    return "; ".join(dict.fromkeys(texts))


def density(stages: dict[str, Bench]) -> float:
    """Share of causal attention that MoBA keeps at the shape of these benchmarks."""
    return float(next(iter(stages.values()))["extra_info"]["density"])


def timing(bench: Bench | None, ours: Bench | None) -> list[str]:
    """Write a stage's time and its ratio to ours."""
    if bench is None:
        return ["-", ""]
    median = milliseconds(bench)
    ratio = f"{median / milliseconds(ours):.2f}" if ours else ""
    return [f"{figures(median)} ± {figures(milliseconds(bench, 'iqr'), median)}", ratio]


def milliseconds(bench: Bench, statistic: str = "median") -> float:
    """Read a statistic of a benchmark."""
    return float(bench["stats"][statistic] * 1e3)


def figures(number: float, scale: float | None = None) -> str:
    """Write a number to the place of the third figure of `scale`, by default its own."""
    return f"{number:,.{max(0, 2 - math.floor(math.log10(scale or number)))}f}"


def work(stages: dict[str, Bench]) -> list[str]:
    """Write the rate of the forward pass and the memory of both."""
    forward, both = stages.get("forward"), stages.get("forward+backward")
    peak = both["extra_info"]["peak_mib"] if both else None
    rate = f"{forward['extra_info']['tflops']:.3g}" if forward else "-"
    return [rate, f"{peak:,.0f}" if peak else "-"]


def draw(run: Run, title: str, path: Path) -> None:
    """Draw a panel a shape: one bar an implementation, its forward part dark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(peer for peers in run.values() for peer in peers))[::-1]
    figure = Figure(figsize=(4 * len(run), 1 + 0.4 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(run), sharey=True, squeeze=False)[0]
    for panel, (shape, peers) in zip(panels, run.items(), strict=True):
        longest = 0.0
        for peer, stages in peers.items():
            at, colour = names.index(peer), "tab:red" if peer == OURS else "tab:gray"
            times = [milliseconds(stages[stage]) for stage in DRAWN if stage in stages]
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


def update(readme: Path, text: str) -> None:
    """Replace what stands between the README's two markers."""
    head, _, rest = readme.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{readme} must contain {BEGIN} and {END}, got neither or one")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
