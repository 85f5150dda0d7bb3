"""Turns the benchmarks' JSON into markdown tables and pictures.

python -m perf.plot [--update] [FILE ...]   # default: perf/results/attention_*.json
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from perf.pictures import bars, curves, heat
from perf.tables import (
    OURS,
    Bench,
    heading,
    layouts_table,
    map_table,
    rates,
    short_table,
    sizes,
    sweep_table,
    table_and_parts,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "perf" / "results"
README, PAGE = ROOT / "README.md", RESULTS / "README.md"
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
LEGEND = """\
Median and interquartile range in ms of calls that, if they are short, follow each other; routing
is inside every MoBA figure. "x" is the time over moba_flex's in the same run: above 1, moba_flex
is faster. A shape is tokens/block_size/top_k, with its density: the share of the causal (query,
key) pairs that MoBA selects. TFLOP/s, forward / backward, counts the selected pairs only, 4 and 10
head_dim operations each, for dense implementations too. The limit, of which a share is given
alike, is what these operations and the gate's scores take at the rate of a large matrix product,
or inputs and outputs at that of a large copy, whichever is longer; both rates are measured in the
same run. MiB is the most memory held during forward and backward, beyond the inputs."""
SHORT_LEGEND = """\
Median and interquartile range of moba_flex, routing included. A shape is tokens/block_size/top_k
and its density: the share of the causal (query, key) pairs that MoBA selects. "x" is how many
times longer dense causal attention takes in the same run, forward / forward+backward: above 1,
moba_flex is faster. cuDNN and flash are backends of `scaled_dot_product_attention`. "-" was not
measured."""


class Kind(NamedTuple):
    """How rows of a kind are shown."""

    title: str
    legend: str
    write: Callable[[list[Bench]], str]
    draw: Callable[[list[Bench], str, Path], None] | None = None


KINDS = {
    "main": Kind(
        "Against other implementations",
        f"{LEGEND}\nOf the parts, attend contains regroup.",
        table_and_parts,
        bars,
    ),
    "variants": Kind(
        "Other head dims, dtypes, batches and choices",
        'Columns as above. Of "one block" all queries want the first block, of "skewed" 90 % of '
        "the queries want the first 5 % of the blocks.",
        table_and_parts,
        bars,
    ),
    "layouts": Kind(
        "Packed documents, padding, soft caps",
        "Median and interquartile range in ms. Documents are of one length, padding is at the "
        'start of each row. "x plain" is the time over that of the plain row, in the same run.',
        layouts_table,
    ),
    "map": Kind(
        "By block_size and top_k, at 64K tokens",
        "How many times faster than cuDNN's dense attention, in the same run.",
        map_table,
        heat,
    ),
    "sweep": Kind(
        "By length",
        'Median and interquartile range in ms; "x cuDNN" is how many times faster than cuDNN\'s '
        "dense attention, in the same run.",
        sweep_table,
        curves,
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Print tables, save pictures beside the JSON, and write both into the pages if asked."""
    parser = argparse.ArgumentParser(description="Turn benchmark JSON into tables and pictures.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of perf/results")
    parser.add_argument(
        "--update",
        action="store_true",
        help="rewrite the short table in README.md, and all tables in perf/results/README.md",
    )
    args = parser.parse_args(argv)
    if args.update and args.files:
        parser.error("FILE must not be given with --update, got some: pages show all there are")
    files = args.files or sorted(RESULTS.glob("attention_*.json"))
    if not files:
        parser.error(f"{RESULTS} must hold attention_*.json, got none: run pytest perf")
    documents = [(file, json.loads(file.read_text())) for file in files]
    documents.sort(key=lambda pair: pair[1]["machine_info"]["device"], reverse=True)  # GPUs first
    shown = [
        (kind, file, document, benches)
        for kind in KINDS
        for file, document in documents
        if (benches := of_kind(document, kind))
    ]
    sections: list[str] = []
    for kind, of in itertools.groupby(shown, key=lambda row: row[0]):
        sections += [f"## {KINDS[kind].title}", KINDS[kind].legend]
        for _, file, document, benches in of:
            sections += [caption(document, benches), KINDS[kind].write(benches)]
            sections += illustrate(kind, file, document, benches)
    text = "\n\n".join(sections)
    print(text)
    if args.update:
        update(PAGE, text)
        if shown[0][0] == "main":
            document, benches = shown[0][2:]
            head = f"**{heading(document)}**; {sizes(benches)}"
            update(README, "\n\n".join([SHORT_LEGEND, head, short_table(benches)]))


def of_kind(document: dict[str, Any], kind: str) -> list[Bench]:
    """Return the benchmarks that are shown as this kind; none if moba_flex is not among them."""
    benches = [bench for bench in document["benchmarks"] if kind_of(bench) == kind]
    return benches if any(bench["extra_info"]["peer"] == OURS for bench in benches) else []


def kind_of(bench: Bench) -> str:
    """Say how a benchmark is shown."""
    rows = bench["extra_info"].get("rows")
    return "sweep" if rows == "dense" else rows if rows in KINDS else "main"


def caption(document: dict[str, Any], benches: list[Bench]) -> str:
    """Say where figures are from, and what shapes' names leave out."""
    return f"**{heading(document)}**{rates(document)}; {sizes(benches)}"


def illustrate(kind: str, file: Path, document: dict[str, Any], benches: list[Bench]) -> list[str]:
    """Save the picture of a kind, if it has one, beside the JSON, and return a link to it."""
    draw, title = KINDS[kind].draw, heading(document)
    if draw is None:
        return []
    suffix = "" if kind == "main" else f"_{kind}"
    picture = file.with_name(f"{file.stem.removesuffix(suffix)}{suffix}.png")
    draw(benches, title, picture)
    return [f"![{title}]({picture.name})"]


def update(page: Path, text: str) -> None:
    """Replace what stands between a page's two markers."""
    head, _, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} must contain {BEGIN} and {END}, got neither or one")
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
