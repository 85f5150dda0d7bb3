"""The page of evidence: tables, pictures and verdicts, from the JSON of the experiments.

    python -m perf.experiments.report          # perf/results/experiment_*.json -> evidence.md

Verdicts compare two arms seed by seed; the page itself says how. What was not run is said so.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.experiments import continued, density, gates, retrieval, shared, steps
from perf.experiments.runs import (
    BINS,
    TEXT_COLUMNS,
    Column,
    Document,
    complete_seeds,
    markdown,
    milliseconds,
    spread,
    table,
)
from perf.pictures import new_figure
from perf.timing import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = ROOT / "perf" / "results"
T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Half the width of a 95 % interval in standard errors, by the number of seeds."""
FEWEST = min(T)
HEAD = """\
# Does it learn, and what does sparsity cost?

`python -m perf.experiments.report` writes this page from the JSON beside it. In each experiment
all arms have equal steps, tokens, first weights and seeds. Losses are in nats a token; numbers are
means and standard deviations over seeds. Fixed patterns attend to exactly as many keys as the MoBA
of their block_size and top_k, through the same kernels. A model that switched to full attention at
the end of its training is measured with full attention; its step is one before the switch.

Two arms are "not told apart" if zero lies in the 95 % interval of their mean difference over
seeds (Student's t, not corrected for the number of comparisons). Fewer than three seeds leave the
verdict open. Fixed patterns are handed to the kernels as routings, which are sorted twice in each
layer; kernels of their own would be faster, so their times are upper bounds. Times are told where
a process had the device for itself."""


ROUTING = """\
Tables of routing hold what queries choose on one sequence of validation, as means over heads and
layers; pictures have it by layer. `recall` is the share of dense attention's weight, in this very
model, that lies on what is read, and `regret` what the best blocks, equally many, would hold
beyond that. `entropy` is 0 if the queries of a block choose alike and 1 if they choose all blocks
equally often. `imbalance` is 1 for random choices and larger if many queries want one block.
`distance` is how many blocks back choices lie, `union` how many distinct blocks the heads of a
group attend to over all that they attend to, `tile fill` the share of the work of a mask in
natural order that is needed (`moba_flex.diagnostics`)."""
MEASURES = ("recall", "regret", "entropy", "imbalance", "distance", "union", "tile fill")
COLLAPSED = 0.1  # an entropy below which the queries of a block choose nearly alike


GATES = """\
A block's score is `q . mean + c * sum_d |q_d| (max_d - min_d) / 2` over its keys, with the first
block always chosen; c = 0 is the library's gate. None of the texts was looked at when the score
and the values of c were chosen. Changes are of the loss in nats a token, means and standard
deviations over texts; the verdicts take texts as they take seeds elsewhere."""


@dataclass(frozen=True)
class Section:
    """How an experiment is told.

    Attributes:
        title: Its title.
        columns: Of its table.
        draw: Draws two panels; called with the document and the panels.
        compare: What arms are compared by, and whether a lower number is better.
    """

    title: str
    columns: Sequence[Column]
    draw: Callable[[Document, "Axes", "Axes"], None]
    compare: Sequence[tuple[Column, bool]] = ()


def rows_of(document: Document, arm: str) -> list[dict[str, Any]]:
    """Return the rows of an arm, of the seeds that all arms finished, in their order."""
    seeds = complete_seeds(document)
    rows = [row for row in document["runs"] if row["arm"] == arm and row["seed"] in seeds]
    return sorted(rows, key=lambda row: row["seed"])


def mean_of(rows: Sequence[dict[str, Any]], read: Callable[[Any], Any]) -> list[float]:
    """Return the mean of lists over rows, number by number; NaN where one lacks it."""
    columns = zip(*(read(row) for row in rows), strict=True)
    return [math.nan if None in column else statistics.mean(column) for column in columns]


def colour(document: Document, arm: str) -> str:
    """Return the colour of an arm, the same in all panels."""
    return f"C{document['arms'].index(arm) % 10}"


def draw_language(document: Document, left: "Axes", right: "Axes") -> None:
    """Draw the loss of training, and the loss by position above that of full attention."""
    length = document["settings"]["seq_len"]
    places = [(part + 0.5) * length / BINS for part in range(BINS)]
    first = "full" if "full" in document["arms"] else document["arms"][0]
    base = mean_of(rows_of(document, first), lambda row: row["loss_by_position"])
    for arm in document["arms"]:
        rows = rows_of(document, arm)
        places_of_curve = [step for step, _ in rows[0]["curve"]]
        curve = mean_of(rows, lambda row: [loss for _, loss in row["curve"]])
        left.plot(places_of_curve, curve, color=colour(document, arm), label=arm)
        losses = mean_of(rows, lambda row: row["loss_by_position"])
        above = [loss - full for loss, full in zip(losses, base, strict=True)]
        right.plot(places, above, color=colour(document, arm))
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="position", ylabel=f"validation loss above {first}")


def draw_retrieval(document: Document, left: "Axes", right: "Axes") -> None:
    """Draw accuracy against distance, and against the number of blocks at inference."""
    parts = retrieval.DISTANCES
    places = [(part + 0.5) / parts for part in range(parts)]
    for arm in document["arms"]:
        rows = rows_of(document, arm)
        far = mean_of(rows, lambda row: row["by_pairs"][-1]["by_distance"])
        left.plot(places, far, "o-", color=colour(document, arm), label=arm)
        if "at" in rows[0]:
            numbers = mean_of(rows, lambda row: [x["accuracy"] for x in row["at"].values()])
            right.plot([int(x) for x in rows[0]["at"]], numbers, "o-", color=colour(document, arm))
    left.set(xlabel="distance as a share of the sequence", ylabel="accuracy, many pairs")
    right.set(xlabel="top_k at inference", ylabel="accuracy, many pairs", xscale="log")


def draw_density(document: Document, left: "Axes", right: "Axes") -> None:
    """Draw the losses against the keys that are read at inference."""
    for panel, name in ((left, "loss"), (right, "trailing_loss")):

        def losses_of(row: Any, name: str = name) -> list[float]:
            return [numbers[name] for numbers in row["at"].values()]

        for arm in document["arms"]:
            rows = rows_of(document, arm)
            keys = [x["attended"] for x in rows[0]["at"].values()]
            losses = mean_of(rows, losses_of)
            shade = colour(document, arm)
            panel.plot(keys, losses, "o-", color=shade, label=f"trained: {arm}")
        if "before" in document:
            before = document["before"]
            keys = [x["attended"] for x in before["at"].values()]
            panel.plot(keys, losses_of(before), "o--", label="before")
        panel.set(xlabel="keys read by a query", xscale="log", ylabel=name.replace("_", " "))


def draw_costs(document: Document, left: "Axes", right: "Axes") -> None:
    """Draw the losses of each run against the time of its steps."""
    for panel, name in ((left, "loss"), (right, "trailing_loss")):
        for arm in document["arms"]:
            rows = rows_of(document, arm)
            times = [milliseconds(row) or math.nan for row in rows]
            losses = [row[name] for row in rows]
            panel.plot(times, losses, "o", color=colour(document, arm), label=arm)
        panel.set(xlabel="ms a step", ylabel=name.replace("_", " "))


def routings(document: Document) -> dict[str, list[list[dict[str, float]]]]:
    """Return by arm, and for each seed, the measures of each layer that chooses."""
    found = {
        arm: [row["routing"] for row in rows_of(document, arm)]
        for arm in document["arms"]
        if all(row.get("routing") for row in rows_of(document, arm))
    }
    if document.get("before", {}).get("routing"):
        found["before any training"] = [document["before"]["routing"]]
    return found


def by_layer(seeds: Sequence[Sequence[dict[str, float]]], name: str) -> dict[int, float]:
    """Return a measure of each layer, as the mean over seeds."""
    numbers = [int(layer["layer"]) for layer in seeds[0]]
    values = mean_of([{"of": seed} for seed in seeds], lambda x: [y[name] for y in x["of"]])
    return dict(zip(numbers, values, strict=True))


def draw_routing(document: Document, panels: Sequence["Axes"]) -> None:
    """Draw by layer the recall, dashed the best possible one, the entropy and the imbalance."""
    names = ("recall", "entropy", "imbalance")
    for place, (arm, seeds) in enumerate(routings(document).items()):
        shade = f"C{place % 10}"
        for panel, name in zip(panels, names, strict=True):
            values = by_layer(seeds, name)
            panel.plot(list(values), list(values.values()), "o-", color=shade, label=arm)
        if chooses(arm):
            regret = by_layer(seeds, "regret")
            best = [kept + regret[x] for x, kept in by_layer(seeds, "recall").items()]
            panels[0].plot(list(regret), best, "--", color=shade)
    for panel, name in zip(panels, names, strict=True):
        panel.set(xlabel="layer", ylabel=name)
        panel.locator_params(axis="x", integer=True)


def chooses(arm: str) -> bool:
    """Whether an arm chooses by what keys hold."""
    return arm.startswith(("moba", "full", "before"))


def routing_table(document: Document) -> str:
    """Return a table of how each arm's queries choose, as means over layers."""
    lines = [["arm", *MEASURES], ["---"] * (1 + len(MEASURES))]
    for arm, seeds in routings(document).items():
        values = [
            [statistics.mean(layer[name] for layer in seed) for seed in seeds] for name in MEASURES
        ]
        lines.append([arm, *(spread(numbers, ".3f") for numbers in values)])
    return markdown(lines)


def routing_words(document: Document) -> str:
    """Say what the measures of the layers mean, for arms that choose by what keys hold."""
    told = []
    for arm, seeds in routings(document).items():
        if not chooses(arm):
            continue
        recall, regret, entropy, imbalance, distance = (
            by_layer(seeds, name) for name in MEASURES[:5]
        )
        kept, lost = statistics.mean(recall.values()), statistics.mean(regret.values())
        low, *_, high = by_size(recall)
        near, *_, far = by_size(distance)
        hot = by_size(imbalance)[-1]
        same = [str(layer) for layer, value in entropy.items() if value < COLLAPSED]
        fate = (
            f"the queries of a block choose nearly alike in layer {', '.join(same)}"
            if same
            else "in no layer has the router collapsed"
        )
        told.append(
            f"{arm}: what is read holds {kept:.1%} of dense attention's weight, from "
            f"{recall[low]:.1%} in layer {low} to {recall[high]:.1%} in layer {high}; that is "
            f"{kept / (kept + lost):.1%} of what as many blocks could hold. Entropies lie between "
            f"{min(entropy.values()):.2f} and {max(entropy.values()):.2f}, so {fate}. The most "
            f"wanted block has {imbalance[hot]:.1f} times the load of random choices in layer "
            f"{hot}. Choices lie {distance[near]:.1f} blocks back in layer {near} and "
            f"{distance[far]:.1f} in layer {far}."
        )
    fixed = {
        arm: statistics.mean(by_layer(seeds, "recall").values())
        for arm, seeds in routings(document).items()
        if not chooses(arm)
    }
    if fixed:
        words = ", ".join(f"{arm} {value:.1%}" for arm, value in fixed.items())
        told.append(
            "fixed patterns: of dense attention's weight in the models trained with them, they "
            f"hold: {words}. Their entropy is 0 where all queries of a block read the same."
        )
    return "\n".join(f"- {words}" for words in told)


def by_size(values: Mapping[int, float]) -> list[int]:
    """Return layers by their values, the least first; a lone one twice."""
    layers = sorted(values, key=lambda layer: values[layer])
    return layers * 2 if len(layers) == 1 else layers


def draw_steps(document: Document, left: "Axes", right: "Axes") -> None:
    """Draw the time of a step and the memory against the keys that are read."""
    for arm in document["arms"]:
        rows = rows_of(document, arm)
        keys = [row["attended"] for row in rows]
        shade = colour(document, arm)
        times = [1e3 * row["step_seconds"] for row in rows]
        left.plot(keys, times, "o", color=shade, label=arm)
        right.plot(keys, [row["peak_mib"] or math.nan for row in rows], "o", color=shade)
    left.set(xlabel="keys read by a query", ylabel="ms a step", xscale="log")
    right.set(xlabel="keys read by a query", ylabel="MiB", xscale="log")


LOSSES = [(column, True) for column in TEXT_COLUMNS[:2]]
STEP = (TEXT_COLUMNS[3], True)
ACCURACIES = [(column, False) for column in retrieval.COLUMNS[:4]]
SECTIONS = {
    "language": Section("Language modelling", TEXT_COLUMNS, draw_language, [*LOSSES, STEP]),
    "retrieval": Section(
        "Needle and associative recall", retrieval.COLUMNS, draw_retrieval, ACCURACIES
    ),
    "density": Section("One set of weights, sparse to dense", density.COLUMNS, draw_density),
    "continued": Section(
        "SmolLM2-135M trained on: perplexity by top_k", continued.COLUMNS, draw_density
    ),
    "blocks": Section(
        "Block size at equal attended keys", TEXT_COLUMNS, draw_costs, [*LOSSES, STEP]
    ),
    "shared": Section("Shared selections", shared.COLUMNS, draw_costs, [*LOSSES, STEP]),
    "steps": Section("Time of a training step", steps.COLUMNS, draw_steps, [STEP]),
}
EXPERIMENTS = tuple(SECTIONS)


def verdict(differences: Sequence[float], lower: bool) -> str:
    """Say whether numbers of an arm differ from another's, by their differences per seed."""
    number = len(differences)
    if number < FEWEST:
        return "open"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(number)
    if abs(mean) <= T[min(number, max(T))] * error:
        return "not told apart"
    return "better" if (mean < 0) == lower else "worse"


def interval(differences: Sequence[float]) -> str:
    """Write the 95 % interval of a mean; "-" for fewer numbers than a verdict needs."""
    number = len(differences)
    if number < FEWEST:
        return "-"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(number)
    width = T[min(number, max(T))] * error
    return f"{mean - width:+.4f} to {mean + width:+.4f}"


def differences(document: Document, column: Column, arm: str, other: str) -> list[float]:
    """Return a number of an arm minus that of another, seed by seed."""
    rows = zip(rows_of(document, arm), rows_of(document, other), strict=True)
    values = [(column.read(a), column.read(b)) for a, b in rows]
    return [a - b for a, b in values if a is not None and b is not None]


def controls(document: Document, arm: str) -> list[str]:
    """Return the fixed patterns that attend to as many keys as an arm, if that is plain MoBA."""
    kind, _, sizes = arm.partition(" ")
    return [x for x in document["arms"] if kind == "moba" and x != arm and x.endswith(f" {sizes}")]


def falsified(document: Document, timed: Sequence[Document] = ()) -> str:
    """Say of each plain MoBA whether it is worse than full attention and saves nothing.

    Args:
        document: Results of `language`.
        timed: Results of `steps`; where there are none, the times of the trainings count.
    """
    loss, step = TEXT_COLUMNS[0], TEXT_COLUMNS[3]
    lines = []
    for arm in document["arms"]:
        others = controls(document, arm)
        if not others or "full" not in document["arms"]:
            continue
        quality = verdict(differences(document, loss, arm, "full"), True)
        of = [x for x in timed if {arm, *others} <= {*x["arms"]}] or [document]
        savings = {
            f"{x} at {y['settings']['seq_len']:,} tokens" if timed else x: verdict(
                differences(y, step, arm, x), True
            )
            for y in of
            for x in others
        }
        if "open" in (quality, *savings.values()):
            answer = "open, for there are too few seeds"
        else:
            answer = "yes" if quality == "worse" and "better" not in savings.values() else "no"
        words = ", ".join(f"{x} {saving}" for x, saving in savings.items())
        lines.append(f"- {arm}: {answer}. Loss against full: {quality}; step against {words}.")
    question = "Is MoBA below full attention without saving compute over fixed patterns?"
    return "\n".join([question, "", *lines])


def comparisons(document: Document, section: Section) -> str:
    """Return a table of each arm against full attention, and of MoBA against fixed patterns."""
    lines = [
        ["arm", "against", *(column.title for column, _ in section.compare)],
        ["---"] * (2 + len(section.compare)),
    ]
    arms = document["arms"]
    pairs = [(arm, "full") for arm in arms if arm != "full" and "full" in arms]
    pairs += [(arm, other) for arm in arms for other in controls(document, arm)]
    plain = [(arm, arm.partition(", conv")[0]) for arm in arms if ", conv" in arm]
    pairs += [(arm, other) for arm, other in plain if other in arms and other != "full"]
    for arm, other in pairs:
        cells = []
        for column, lower in section.compare:
            changes, form = differences(document, column, arm, other), f"+{column.form}"
            cells.append(f"{spread(changes, form)}, {verdict(changes, lower)}")
        lines.append([arm, other, *cells])
    return markdown(lines)


def describe(document: Document) -> str:
    """Say how results came about."""
    settings, machine = document["settings"], document["machine"]
    where = machine.get("gpu", machine["cpu"])
    seconds = sum(row["train_seconds"] for row in document["runs"])
    facts = ", ".join(f"{name} {value}" for name, value in settings["task"].items())
    commands = "\n".join(["```sh", *document["commands"], "```"])
    timed = document["experiment"] == "steps"
    rounds = "rounds" if timed else "seeds"
    budget = "steps of" if timed else f"{settings['steps']} steps of"
    tokens = settings["batch"] * settings["seq_len"]
    return (
        f"{commands}\n\n{where}, torch {machine['torch']}, commit "
        f"{machine['commit']}; {document['runs'][0]['parameters']:,} parameters; "
        f"{budget} {tokens:,} tokens in sequences of {settings['seq_len']:,}; "
        f"{rounds} finished by all arms: {len(complete_seeds(document))}; {seconds:,.0f} s of "
        f"training in all. {facts}."
    )


def draw(path: Path, title: str, number: int, fill: Callable[..., None]) -> None:
    """Draw a picture of several panels, with which `fill` is called, and a legend in the first."""
    figure = new_figure(5.5 * number, 4.5)
    panels = figure.subplots(1, number)
    fill(*panels)
    panels[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def tell(name: str, files: Sequence[Path], folder: Path, timed: Sequence[Document] = ()) -> str:
    """Return the section of an experiment, and draw its pictures into `folder`.

    Args:
        name: The experiment.
        files: Its results.
        folder: Where pictures go.
        timed: Results of `steps` that have finished a round.
    """
    section = SECTIONS[name]
    parts = [f"## {section.title}"]
    documents = [(file, json.loads(file.read_text())) for file in files]
    if not documents:
        parts.append("This experiment was not run.")
    for file, document in documents:
        if not complete_seeds(document):
            parts.append(f"{file.stem}: no seed was finished by all arms, so there is no table.")
            continue
        parts += [describe(document), table(document, section.columns)]
        if "before" in document:
            before = document["before"]["at"]
            numbers = ", ".join(f"at {x} {y['perplexity']:.3f}" for x, y in before.items())
            parts.append(f"Before any training the perplexity is {numbers}.")
        if section.compare:
            words = "Differences, seed by seed, and what they say about the first arm:"
            parts += [words, comparisons(document, section)]
        if name == "language":
            parts.append(falsified(document, timed))
        picture = folder / f"{file.stem}.png"
        draw(picture, f"{section.title}: {file.stem}", 2, partial(section.draw, document))
        parts.append(f"![{section.title}]({picture.name})")
        if routings(document):
            picture = folder / f"{file.stem}_router.png"

            def panels(*axes: "Axes", document: Document = document) -> None:
                draw_routing(document, axes)

            draw(picture, f"The router: {file.stem}; dashed: the best blocks", 3, panels)
            parts += ["Routing:", routing_table(document), routing_words(document)]
            parts.append(f"![The router by layer]({picture.name})")
    return "\n\n".join(parts)


def tell_gates(files: Sequence[Path]) -> str:
    """Return the section about gates that see how far the keys of a block spread."""
    parts = ["## A gate that sees how far keys spread, without training", GATES]
    if not files:
        parts.append("This experiment was not run.")
    for document in (json.loads(file.read_text()) for file in files):
        settings, machine = document["settings"], document["machine"]
        number = len(document["texts"])
        gate_names, spreads = settings["gates"], settings["spreads"]
        full = perplexity(gates.losses(document, "full", 0.0))
        parts.append(
            f"```sh\n{document['command']}\n```\n\n{settings['model']}, "
            f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, commit "
            f"{machine['commit']}; {number} texts of {settings['length']:,} tokens. Perplexity of "
            f"their second halves with full attention: {full:.3f}; with gates:"
        )
        lines = [["block_size/top_k", *(f"c = {c:g}" for c in spreads)]]
        lines.append(["---"] * len(lines[0]))
        lines += [
            [gate, *(f"{perplexity(gates.losses(document, gate, c)):.3f}" for c in spreads)]
            for gate in gate_names
        ]
        tried = [(gate, c) for c in spreads if c for gate in gate_names]
        found = {pair: gates.changes(document, *pair) for pair in tried}
        told = {pair: verdict(values, lower=True) for pair, values in found.items()}
        sums = [["c", "gate", "change of the loss", "95 % interval", "texts that gain", "verdict"]]
        sums.append(["---"] * len(sums[0]))
        for (gate, c), values in found.items():
            gain = f"{sum(value < 0 for value in values)} of {number}"
            change = spread(values, "+.4f")
            sums.append([f"{c:g}", gate, change, interval(values), gain, told[gate, c]])
        texts = [["text", *(f"{gate}, c {c:g}" for gate, c in tried)]]
        texts.append(["---"] * len(texts[0]))
        for place, text in enumerate(document["texts"]):
            texts.append([text["name"], *(f"{found[pair][place]:+.4f}" for pair in tried)])
        best = [f"{c:g}" for c in spreads if c and all(told[g, c] == "better" for g in gate_names)]
        answer = f"c = {', '.join(best)} is" if best else "No c is"
        parts += [markdown(lines), "Against c = 0:", markdown(sums)]
        parts.append(f"{answer} better at every gate.")
        parts += ["Change of the loss of each text:", markdown(texts)]
    return "\n\n".join(parts)


def perplexity(losses: Sequence[float]) -> float:
    """Return the perplexity over texts of equal length."""
    return math.exp(statistics.mean(losses))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.experiments.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence.md")
    options = parser.parse_args(arguments)
    files = {name: sorted(options.results.glob(f"experiment_{name}*.json")) for name in SECTIONS}
    timed = [json.loads(file.read_text()) for file in files["steps"]]
    timed = [document for document in timed if complete_seeds(document)]
    sections = [tell(name, found, options.out.parent, timed) for name, found in files.items()]
    sections.append(tell_gates(sorted(options.results.glob("experiment_gates*.json"))))
    options.out.write_text("\n\n".join([HEAD, ROUTING, *sections]) + "\n")


if __name__ == "__main__":
    main()
