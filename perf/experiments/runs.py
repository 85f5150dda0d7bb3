"""Presets, arguments, the loop over seeds and arms, and the table, which all experiments share.

Every arm of an experiment is trained for equally many steps on the same tokens, from the same
weights. When the minutes are over, the run at hand is kept as a checkpoint; the same command goes
on from there. Several processes may run the same command: each takes runs that no other has at
hand, and all write to the same results. Tables hold those seeds alone that all arms have finished.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perf.experiments.data import Corpus, Tokens, draw_windows, even_windows, load_corpus
from perf.experiments.files import lock, write_json
from perf.experiments.model import Arm, Decoder, Sizes
from perf.experiments.train import (
    Batches,
    OutOfTime,
    Recipe,
    losses_by_position,
    routing_statistics,
    run_folder,
    step_seconds,
    train,
)
from perf.timing import ROOT, machine_info

Measure = Callable[[nn.Module, Arm], dict[str, Any]]
"""Called with a trained model and its arm; returns numbers for the results."""

Document = dict[str, Any]
"""Results of an experiment: `experiment`, `settings`, `machine`, `arms`, `seeds`, `runs`, ..."""

CURVE = 60  # lines of the log that go into the results
BINS = 16  # of positions
PLACES = ("minutes", "started", "device", "out", "folder", "arms")  # no part of a command
CONVS = (3, 5)  # widths of key convolution that arms may have by name


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of its training.

    Attributes:
        dim: Width.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        seq_len: Tokens of a sequence.
        batch: Sequences of a step.
        steps: Steps of training.
        shrink: By how much blocks and tiles are divided, for short sequences.
        windows: Sequences of validation.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    batch: int
    steps: int
    shrink: int = 1
    windows: int = 32

    def sizes(self, vocab_size: int, arm: Arm) -> Sizes:
        """Return the sizes of the decoder of an arm."""
        layers, heads, kv_heads = self.num_layers, self.num_heads, self.num_kv_heads
        return Sizes(self.dim, layers, heads, kv_heads, vocab_size, arm.key_conv)

    def fit(self, arm: Arm) -> Arm:
        """Return the arm with blocks and tiles of queries for these sequences."""
        tile = max(1, arm.shared_queries // self.shrink)
        return replace(arm, block_size=arm.block_size // self.shrink, shared_queries=tile)


PRESETS = {
    "tiny": Preset(32, 2, 4, 2, 128, 2, 10, shrink=16, windows=2),
    "small": Preset(384, 6, 6, 2, 8192, 8, 200),  # 10M parameters
    "medium": Preset(512, 10, 8, 2, 8192, 8, 400),  # 30M
    "large": Preset(768, 18, 12, 4, 16384, 4, 1000),  # 120M
    "long": Preset(512, 10, 8, 2, 32768, 2, 60, windows=8),  # for the time of a step
}


class Task(Protocol):
    """A task that models learn."""

    facts: dict[str, Any]

    def make_model(self, preset: Preset, arm: Arm) -> nn.Module:
        """Return a `Learner` in its first state, which the random seed alone decides.

        Of the arm it has the weights alone; how it attends is set later.
        """
        ...

    def batches(self, seed: int, preset: Preset) -> Batches:
        """Return what a run of this seed reads."""
        ...


class Text:
    """To predict the next token of text and code."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.facts = corpus, corpus.facts

    def make_model(self, preset: Preset, arm: Arm) -> nn.Module:
        """Return a decoder."""
        return Decoder(preset.sizes(self.corpus.vocab_size, arm))

    def batches(self, seed: int, preset: Preset) -> Batches:
        """Return windows of the training text at random places."""

        def batch(step: int) -> tuple[Tensor, Tensor]:
            length = preset.seq_len + 1
            ids = draw_windows(self.corpus.train, preset.batch, length, seed, step)
            return ids[:, :-1], ids[:, 1:]

        return batch

    def validation(self, preset: Preset) -> Tensor:
        """Return the windows of validation, `[windows, L + 1]`."""
        return even_windows(self.corpus.validation, preset.windows, preset.seq_len + 1)


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, how to read it from a row, and its format."""

    title: str
    read: Callable[[Mapping[str, Any]], float | None]
    form: str = ".4f"


class Study:
    """An experiment that runs.

    Args:
        experiment: Its name.
        options: The arguments, see `make_parser`.
        preset: The preset, with the options' steps.
        task: What models learn.
        arms: What is compared.
        lr: Highest learning rate.
    """

    def __init__(
        self,
        experiment: str,
        options: argparse.Namespace,
        preset: Preset,
        task: Task,
        arms: Sequence[Arm],
        lr: float = Recipe.lr,
    ) -> None:
        self.options, self.preset, self.task, self.arms = options, preset, task, arms
        self.deadline = options.started + 60 * options.minutes
        self.device = torch.device(options.device)
        self.recipe = Recipe(preset.steps, lr, every=max(1, min(10, preset.steps // 4)))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.settings = {
            "preset": options.preset,
            **asdict(preset),
            "recipe": asdict(self.recipe),
            "device": name,
            "compiled": options.compile,
            "task": task.facts,
        }
        names = [arm.name for arm in arms]
        self.document: Document = {"experiment": experiment, "settings": self.settings}
        if options.out.exists():
            self.document = json.loads(options.out.read_text())
            self._check_settings()
        names = [*dict.fromkeys([*self.document.get("arms", ()), *names])]
        self.document |= {"machine": machine_info(self.device), "arms": names}
        commands = [*self.document.get("commands", ()), command(experiment, options)]
        self.document["commands"] = [*dict.fromkeys(commands)]
        self.document |= {"seeds": max(options.seeds, self.document.get("seeds", 0))}
        self.document.setdefault("runs", [])

    def _check_settings(self) -> None:
        before, now = self.document["settings"], json.loads(json.dumps(self.settings))
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                raise SystemExit(
                    f"{name} must be that of the results in {self.options.out}, "
                    f"{before.get(name)!r}, got {now.get(name)!r}: write to another --out"
                )

    @property
    def is_over(self) -> bool:
        """Whether the minutes are over."""
        return time.monotonic() > self.deadline

    def has(self, arm: Arm, seed: int) -> bool:
        """Return whether the results hold a run."""
        return any((x["arm"], x["seed"]) == (arm.name, seed) for x in self.document["runs"])

    def add(self, row: dict[str, Any]) -> None:
        """Keep the numbers of a run."""
        self.document["runs"].append(row)
        self.save()

    def save(self) -> None:
        """Write the results, and take over what other processes have written since."""
        out = self.options.out
        with lock(self.options.folder / f"{out.name}.lock"):
            if out.exists():
                self.document = merged(json.loads(out.read_text()), self.document)
            write_json(self.document, out)

    def make_model(self, arm: Arm, seed: int) -> nn.Module:
        """Return a model in its first state."""
        torch.manual_seed(seed)
        model = self.task.make_model(self.preset, arm).to(self.device)
        if self.options.compile:
            model.compile()
        return model

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of a run."""
        not_of_training = ("preset", "windows", "shrink")
        key = {name: x for name, x in self.settings.items() if name not in not_of_training}
        return run_folder(self.options.folder, key | {"arm": asdict(arm), "seed": seed})

    def train(self, arm: Arm, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """Return a model that was trained, and what its training tells."""
        model, folder = self.make_model(arm, seed), self.run_folder(arm, seed)
        batches = self.task.batches(seed, self.preset)
        title = f"{arm.name}, seed {seed}"
        log = train(model, arm, batches, self.recipe, folder, deadline=self.deadline, title=title)
        told: dict[str, Any] = {"arm": arm.name, "seed": seed}
        if not self.options.together:
            told |= step_seconds(log)
        told["train_seconds"] = sum(
            (line["step"] - before) * line["step_seconds"]
            for line, before in zip(log, [0, *(x["step"] for x in log)], strict=False)
        )
        told["parameters"] = sum(weight.numel() for weight in model.parameters())
        thin = max(1, len(log) // CURVE)
        told["curve"] = [[line["step"], round(line["loss"], 4)] for line in log[::thin]]
        return model, told

    def run(self, measure: Measure, columns: Sequence[Column]) -> None:
        """Train and measure all arms for each seed until the minutes are over; print the table.

        Runs that another process has at hand are left to it.
        """
        try:
            for seed in range(self.options.seeds):
                for arm in self.arms:
                    with lock(self.run_folder(arm, seed) / "lock", wait=False) as held:
                        self.save()
                        if held and not self.has(arm, seed):
                            model, told = self.train(arm, seed)
                            self.add(told | measure(model, arm))
        except OutOfTime as error:
            print(f"{error}: the same command goes on from there")
        self.tell(columns)

    def tell(self, columns: Sequence[Column]) -> None:
        """Print the table."""
        self.save()
        print(table(self.document, columns))

    def measure_text(self, text: Text, model: Any) -> dict[str, Any]:
        """Return losses on validation in nats a token, and what layers attend to."""
        windows = text.validation(self.preset)
        losses = losses_by_position(model, windows, self.preset.batch).mean(0)
        rows = routing_statistics(model, windows[:1, :-1].to(self.device))
        return {
            "loss": float(losses.mean()),
            "trailing_loss": float(losses[-trailing(self.preset) :].mean()),
            "loss_by_position": [float(part.mean()) for part in losses.tensor_split(BINS)],
            "attended": model.attended(self.preset.seq_len),
            "routing": rows,
        }


def merged(old: Document, new: Document) -> Document:
    """Return the results of two processes as one."""
    united: dict[str, Any] = {
        name: list(dict.fromkeys([*old.get(name, ()), *new[name]]))
        for name in ("arms", "commands")
    }
    known = {(row["arm"], row["seed"]) for row in new["runs"]}
    rows = [row for row in old["runs"] if (row["arm"], row["seed"]) not in known]
    united["runs"] = [*rows, *new["runs"]]
    united["seeds"] = max(old["seeds"], new["seeds"])
    return old | new | united


def command(experiment: str, options: argparse.Namespace) -> str:
    """Return the command whose results are these, but for places."""
    words = [f"python -m perf.experiments.{experiment}"]
    for name, value in vars(options).items():
        if isinstance(value, bool):
            words += [f"--{name}"] if value else []
        elif value is not None and name not in PLACES:
            words.append(f"--{name} {value}")
    if options.arms:
        words += ["--arms", *(f'"{name}"' for name in options.arms)]
    return " ".join(words)


def trailing(preset: Preset) -> int:
    """Return how many of the last positions make the trailing loss: 1,024, or an eighth."""
    return min(1024, preset.seq_len // 8)


def make_parser(
    experiment: str, about: str | None, presets: Mapping[str, Preset] = PRESETS
) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all experiments have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m perf.experiments.{experiment}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=presets, default="small" if cuda else "tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.set_defaults(started=time.monotonic())
    parser.add_argument(
        "--together", action="store_true", help="other processes use the device: tell no times"
    )
    parser.add_argument("--steps", type=int, help="of training, for all arms")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--arms", nargs="+", help="names of the arms to run; all if left out")
    parser.add_argument("--compile", action="store_true", help="compile models by torch.compile")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    default = ROOT / "perf" / "results" / f"experiment_{experiment}.json"
    parser.add_argument("--out", type=Path, default=default, help="results, of earlier runs too")
    folder = ROOT / "build" / "experiments"
    parser.add_argument("--folder", type=Path, default=folder, help="of checkpoints and tokens")
    return parser


def add_text_options(parser: argparse.ArgumentParser, tokens: Tokens = "bytes") -> None:
    """Add the arguments of experiments on text."""
    parser.add_argument("--tokens", choices=("bytes", "smollm2"), default=tokens)
    parser.add_argument("--megabytes", type=int, default=48, help="most text of training")


def preset_of(options: argparse.Namespace, presets: Mapping[str, Preset] = PRESETS) -> Preset:
    """Return the preset with what the arguments change."""
    preset = presets[options.preset]
    given = {"steps": options.steps, "batch": options.batch}
    return replace(preset, **{name: x for name, x in given.items() if x is not None})


def pick_arms(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """Return the arms of these names, all for None; a name may end in ", conv" and a width."""
    known = {arm.name: arm for arm in arms}
    convs = [replace(arm, key_conv=width) for arm in arms for width in CONVS]
    known |= {arm.name: arm for arm in convs if arm.name in (names or ())}
    for name in names or ():
        if name not in known:
            raise SystemExit(f"--arms must be of {sorted(known)}, got {name!r}")
    return list(known.values()) if names is None else [known[name] for name in names]


def study_text(
    experiment: str, options: argparse.Namespace, arms: Sequence[Arm]
) -> tuple[Study, Text]:
    """Return an experiment on text, and the text."""
    preset = preset_of(options)
    text = Text(load_corpus(options.tokens, options.folder, options.megabytes))
    fitted = pick_arms([preset.fit(arm) for arm in arms], options.arms)
    return Study(experiment, options, preset, text, fitted), text


def compare_on_text(
    experiment: str, about: str | None, arms: Sequence[Arm], arguments: Sequence[str] | None
) -> None:
    """Train all arms on text, and compare their losses."""
    parser = make_parser(experiment, about)
    add_text_options(parser)
    study, text = study_text(experiment, parser.parse_args(arguments), arms)
    study.run(lambda model, arm: study.measure_text(text, model), TEXT_COLUMNS)


def complete_seeds(document: Document) -> list[int]:
    """Return the seeds that all arms have finished."""
    done = {(row["arm"], row["seed"]) for row in document["runs"]}
    seeds = range(document["seeds"])
    return [seed for seed in seeds if all((arm, seed) in done for arm in document["arms"])]


def spread(values: Sequence[float | None], form: str = ".4f") -> str:
    """Write the mean and, of several values, the standard deviation; "-" for none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    text = f"{statistics.mean(known):{form}}"
    return text if len(known) == 1 else f"{text} ± {statistics.stdev(known):{form.lstrip('+')}}"


def table(document: Document, columns: Sequence[Column]) -> str:
    """Return a markdown table with a line for each arm: mean and deviation over seeds."""
    seeds = complete_seeds(document)
    if not seeds:
        return f"No seed was finished by all of {len(document['arms'])} arms."
    lines = [["arm", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
    for arm in document["arms"]:
        rows = [x for x in document["runs"] if x["arm"] == arm and x["seed"] in seeds]
        cells = [spread([column.read(row) for row in rows], column.form) for column in columns]
        lines.append([arm, *cells])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table of cells."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def key(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Return a reader of one number of a row."""
    return lambda row: row.get(name)


def milliseconds(row: Mapping[str, Any]) -> float | None:
    """Return the time of a training step in ms; None if other processes used the device."""
    return 1e3 * row["step_seconds"] if "step_seconds" in row else None


TEXT_COLUMNS = [
    Column("loss", key("loss")),
    Column("trailing loss", key("trailing_loss")),
    Column("attended keys", key("attended"), ".0f"),
    Column("ms a step", milliseconds, ".1f"),
]
