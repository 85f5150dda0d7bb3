"""Benchmarks as markdown tables."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from perf.fit import fit
from perf.shapes import PARTS, STAGES

OURS, FLASH, CUDNN = "moba_flex", "SDPA flash, causal", "SDPA cuDNN, causal"
FLEX = "FlexAttention, causal"
DENSE = "dense"
MOST_ROWS = 8  # of the table that a reader sees first

Bench = dict[str, Any]
# One run: shape -> implementation -> stage -> benchmark, each in the order it was timed.
Run = dict[str, dict[str, dict[str, Bench]]]


class Estimate(NamedTuple):
    """A number that was measured, or extrapolated from one that was."""

    value: float
    extrapolated: bool = False

    def scaled(self, factor: float) -> "Estimate":
        """Return what a multiple of it is."""
        return self._replace(value=self.value * factor)


def group(benches: list[Bench]) -> Run:
    """Sort benchmarks by shape, implementation and stage."""
    run: Run = {}
    for bench in benches:
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


def rates(document: dict[str, Any]) -> str:
    """Name the rates that the limit is made of, if they were measured."""
    machine = document["machine_info"]
    texts = [
        f"; {dtype} matrix product {flops / 1e12:.3g} TFLOP/s"
        for dtype, flops in machine.get("matmul_flops", {}).items()
    ]
    texts += [f"; copy {machine['copy_bytes'] / 1e9:,.0f} GB/s"] if texts else []
    return "".join(texts)


def sizes(benches: list[Bench]) -> str:
    """Name the sizes that a shape's name leaves out."""
    infos = [bench["extra_info"] for bench in benches]
    texts = [
        f"batch {info['batch']}, {info['num_heads']} query and {info['num_kv_heads']} key heads, "
        f"head_dim {info['head_dim']}, {info['dtype']}"
        for info in infos
    ]
    unless = " unless a shape says otherwise" if len(set(texts)) > 1 else ""
    return texts[0] + unless


def table(benches: list[Bench]) -> str:
    """Write a row for each shape and implementation."""
    titles = [title for stage in STAGES for title in (f"{stage} ms", "x")]
    rows = [["shape", "implementation", *titles, "TFLOP/s", "of the limit", "MiB"]]
    for shape, peers in group(benches).items():
        for peer, stages in peers.items():
            density = next(iter(stages.values()))["extra_info"]["density"]
            cells = [f"{shape}, {density:.1%}", peer]
            for stage in STAGES:
                bench, ours = stages.get(stage), peers.get(OURS, {}).get(stage)
                ratio = seconds(bench) / seconds(ours) if bench and ours else None
                cells += [timing(bench), f"{ratio:.2f}" if ratio else ""]
            cells += [passes(stages, "tflops", "{:.3g}"), passes(stages, "limit_share", "{:.1%}")]
            rows.append([*cells, memory(stages)])
    return markdown(rows)


def short_table(benches: list[Bench]) -> str:
    """Write a row for each of the first shapes, with dense attention as ratios alone."""
    run = {shape: peers for shape, peers in group(benches).items() if OURS in peers}
    names = {CUDNN: "x cuDNN", FLASH: "x flash", FLEX: "x FlexAttention"}
    measured = [peer for peer in names if any(peer in peers for peers in run.values())]
    titles = [f"{stage} ms" for stage in STAGES] + [names[peer] for peer in measured]
    rows = [["shape", *titles]]
    for shape, peers in list(run.items())[:MOST_ROWS]:
        ours = peers[OURS]
        density = next(iter(ours.values()))["extra_info"]["density"]
        cells = [f"{shape}, {density:.1%}", *(timing(ours.get(stage)) for stage in STAGES)]
        rows.append([*cells, *(times(peers.get(peer, {}), ours) for peer in measured)])
    return markdown(rows)


def times(stages: dict[str, Bench], ours: dict[str, Bench]) -> str:
    """Write how many times faster than another moba_flex is, forward and in both passes."""
    texts = [
        f"{seconds(stages[stage]) / seconds(ours[stage]):.2f}" if stage in stages else "-"
        for stage in (STAGES[0], STAGES[-1])
        if stage in ours
    ]
    return " / ".join(texts) if stages else "-"


def table_and_parts(benches: list[Bench]) -> str:
    """Write that table, then a row for each forward pass in parts, if they were timed."""
    parts = [[f"{OURS}, parts of forward", *(f"{part} ms" for part in PARTS)]]
    for shape, peers in group(benches).items():
        if PARTS[0] in (stages := peers.get(OURS, {})):
            parts.append([shape, *(timing(stages.get(part)) for part in PARTS)])
    return table(benches) + (f"\n\n{markdown(parts)}" if len(parts) > 1 else "")


def layouts_table(benches: list[Bench]) -> str:
    """Write a row for each layout, its times as ratios to those of the plain row too."""
    titles = [title for stage in STAGES for title in (f"{stage} ms", "x plain")]
    rows = [["layout", *titles]]
    run = {shape: peers[OURS] for shape, peers in group(benches).items()}
    plain: dict[str, Bench] = next(filter(is_plain, run.values()), {})
    for shape, stages in run.items():
        cells = [shape]
        for stage in STAGES:
            bench, base = stages.get(stage), plain.get(stage)
            ratio = seconds(bench) / seconds(base) if bench and base else None
            cells += [timing(bench), f"{ratio:.2f}" if ratio else ""]
        rows.append(cells)
    return markdown(rows)


def is_plain(stages: dict[str, Bench]) -> bool:
    """Say whether rows are one sequence each, without padding and without a cap."""
    info = next(iter(stages.values()))["extra_info"]
    return not any(info[name] for name in ("documents", "padding", "softcap"))


def sweep_table(benches: list[Bench]) -> str:
    """Write a row for each shape of MoBA, dense attention as ratios, and a line for each fit."""
    titles = [title for stage in STAGES for title in (f"{stage} ms", "x cuDNN")]
    rows = [["shape", *titles, "MiB", "MiB, SDPA flash"]]
    for shape, peers in group(benches).items():
        if stages := peers.get(OURS):
            length = next(iter(stages.values()))["extra_info"]["seq_len"]
            flash = dense(benches, FLASH, STAGES[-1], length, peak, power=1)
            cells = [shape]
            for stage in STAGES:
                bench = stages.get(stage)
                cells += [timing(bench), marked(speedup(benches, bench), "{:.2f}")]
            rows.append([*cells, memory(stages), marked(flash, "{:,.0f}")])
    lines = ["~: extrapolated from the next shorter length, time by its square, memory as it."]
    attend, route = (series(benches, OURS, part) for part in ("attend", "route"))
    for options in attend:
        block_size = int(options.split("/")[0])
        if found := fit(attend[options], route.get(options, {}), block_size):
            lines.append(f"{options}: {found}.")
    return "\n".join([markdown(rows), "", *(f"- {line}" for line in lines)])


def map_table(benches: list[Bench]) -> str:
    """Write a row for each block_size, a column for each top_k: times faster than cuDNN."""
    block_sizes, top_ks, ratios = speedup_map(benches)
    rows = [[f"{STAGES[-1]}, x cuDNN", *(f"top_k {top_k}" for top_k in top_ks)]]
    for block_size, line in zip(block_sizes, ratios, strict=True):
        cells = ("-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in line)
        rows.append([f"block_size {block_size}", *cells])
    return markdown(rows)


def speedup_map(benches: list[Bench]) -> tuple[list[int], list[int], list[list[float]]]:
    """Return the block_sizes, the top_ks, and how many times faster than cuDNN both passes are."""
    found = {}
    for bench in benches:
        info = bench["extra_info"]
        ratio = speedup(benches, bench)
        if (info["peer"], info["stage"]) == (OURS, STAGES[-1]) and ratio:
            found[info["block_size"], info["top_k"]] = ratio.value
    block_sizes, top_ks = (sorted({key[axis] for key in found}) for axis in range(2))
    ratios = [[found.get((size, top_k), math.nan) for top_k in top_ks] for size in block_sizes]
    return block_sizes, top_ks, ratios


def seconds(bench: Bench) -> float:
    """Read the median time."""
    return float(bench["stats"]["median"])


def peak(bench: Bench) -> float | None:
    """Read the most memory held, in MiB."""
    return bench["extra_info"]["peak_mib"]


def series(
    benches: list[Bench], peer: str, stage: str, read: Callable[[Bench], float | None] = seconds
) -> dict[str, dict[int, float]]:
    """Return an implementation's figures by block_size/top_k, or "dense", and length."""
    found: dict[str, dict[int, float]] = {}
    for bench in benches:
        info = bench["extra_info"]
        figure = read(bench)
        if (info["peer"], info["stage"]) == (peer, stage) and figure is not None:
            one_block = info["block_size"] >= info["seq_len"]
            options = DENSE if one_block else f"{info['block_size']}/{info['top_k']}"
            found.setdefault(options, {})[info["seq_len"]] = figure
    return found


def dense(
    benches: list[Bench],
    peer: str,
    stage: str,
    length: int,
    read: Callable[[Bench], float | None] = seconds,
    power: int = 2,
) -> Estimate | None:
    """Return a figure of dense attention, which grows with a power of the length.

    Shorter sequences than those measured cost more than the power says: they fill no GPU.
    """
    known = series(benches, peer, stage, read).get(DENSE, {})
    nearest = max((n for n in known if n <= length), default=None)
    if nearest is None:
        return None
    return Estimate(known[nearest] * (length / nearest) ** power, nearest != length)


def speedup(benches: list[Bench], bench: Bench | None) -> Estimate | None:
    """How many times faster than cuDNN's dense attention a benchmark is."""
    if bench is None:
        return None
    info = bench["extra_info"]
    cudnn = dense(benches, CUDNN, info["stage"], info["seq_len"])
    return cudnn and cudnn.scaled(1 / seconds(bench))


def timing(bench: Bench | None) -> str:
    """Write a stage's time and its spread."""
    if bench is None:
        return "-"
    median, iqr = seconds(bench) * 1e3, bench["stats"]["iqr"] * 1e3
    return f"{figures(median)} ± {figures(iqr, median)}"


def figures(number: float, scale: float | None = None) -> str:
    """Write a number to the place of the third figure of `scale`, by default its own."""
    return f"{number:,.{max(0, 2 - math.floor(math.log10(scale or number)))}f}"


def marked(figure: Estimate | None, form: str) -> str:
    """Write a figure, with a mark if it is extrapolated."""
    return f"{'~' * figure.extrapolated}{form.format(figure.value)}" if figure else ""


def passes(stages: dict[str, Bench], name: str, form: str) -> str:
    """Write a figure of the forward and of the backward pass."""
    infos = [stages[stage]["extra_info"] if stage in stages else {} for stage in STAGES[:2]]
    return " / ".join(form.format(info[name]) if name in info else "-" for info in infos)


def memory(stages: dict[str, Bench]) -> str:
    """Write the most memory held in both passes."""
    both = stages.get(STAGES[-1])
    mib = both and peak(both)
    return f"{mib:,.0f}" if mib else "-"


def markdown(rows: list[list[str]]) -> str:
    """Write rows as a table; the first holds the titles."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
