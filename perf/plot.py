"""Turns the benchmarks' JSON into markdown tables and pictures.

python -m perf.plot [--update-readme] [FILE ...]   # default: perf/results/attention_*.json
"""

import argparse
import json
import os
from pathlib import Path

from perf.pictures import bars, curves, heat
from perf.tables import OURS, Bench, heading, map_table, rates, sizes, sweep_table, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "perf" / "results"
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
# How rows of a kind are written and drawn.
KINDS = {"main": (table, bars), "sweep": (sweep_table, curves), "map": (map_table, heat)}
LEGEND = """\
Median and interquartile range in ms of calls that, if they are short, follow each other; routing
is inside every MoBA figure. "x" is the time over moba_flex's in the same run: above 1, moba_flex
is faster. A shape is tokens/block_size/top_k, with its density: the share of the causal (query,
key) pairs that MoBA selects. TFLOP/s, forward / backward, counts the selected pairs only, 4 and 10
head_dim operations each, for dense implementations too. The limit, of which a share is given
alike, is what these operations and the gate's scores take at the rate of a large matrix product,
or inputs and outputs at that of a large copy, whichever is longer; both rates are measured in the
same run. MiB is the most memory held during forward and backward, beyond the inputs. Of the parts,
attend contains regroup."""


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
    sections = [LEGEND]
    for file, document in documents:
        title = heading(document)
        for kind, (write, draw) in KINDS.items():
            benches = [bench for bench in document["benchmarks"] if kind_of(bench) == kind]
            if not any(bench["extra_info"]["peer"] == OURS for bench in benches):
                continue
            suffix = "" if kind == "main" else f"_{kind}"
            picture = file.with_name(f"{file.stem.removesuffix(suffix)}{suffix}.png")
            draw(benches, title, picture)
            link = os.path.relpath(picture, ROOT)
            head = f"**{title}**{rates(document)}; {sizes(benches)}"
            sections += [head, write(benches), f"![{title}]({link})"]
    text = "\n\n".join(sections)
    print(text)
    if args.update_readme:
        update(ROOT / "README.md", text)


def kind_of(bench: Bench) -> str:
    """Say how a benchmark is shown."""
    rows = bench["extra_info"].get("rows")
    return {"sweep": "sweep", "dense": "sweep", "map": "map"}.get(rows, "main")


def update(readme: Path, text: str) -> None:
    """Replace what stands between the README's two markers."""
    head, _, rest = readme.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{readme} must contain {BEGIN} and {END}, got neither or one")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
