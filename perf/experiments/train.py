"""One training loop for all arms, which stops and resumes to the bit on CPU.

A run is described by a key; its folder holds a checkpoint, a log of JSON lines, and in the end the
weights. A finished run is not trained again, by whichever experiment it is wanted.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from moba_flex.diagnostics import collect
from perf.experiments.files import save
from perf.experiments.model import Arm
from perf.timing import synced_clock

KEEP_SECONDS = 60  # between checkpoints, for processes that are killed
IGNORED = -100
"""The target of a position that has none."""

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Called with a step's number; returns tokens and targets, `[B, L]` each, always the same."""


class OutOfTime(Exception):
    """The minutes are over; what was trained is in the checkpoint."""


class Learner(Protocol):
    """A language model with a choice of attention."""

    arm: Arm

    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits."""
        ...

    def attended(self, length: int) -> float:
        """Return how many keys a query attends to, averaged over a sequence and layers."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How all arms are trained.

    Attributes:
        steps: Number of steps.
        lr: Highest learning rate, reached after the warmup.
        warmup: Share of the steps in which the rate rises.
        lowest: Share of `lr` at the end of the cosine.
        weight_decay: Of matrices; embeddings and norms have none.
        clip: Largest norm of the gradient.
        every: Steps between lines of the log.
    """

    steps: int
    lr: float = 1e-3
    warmup: float = 0.05
    lowest: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    every: int = 10

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.lr * (self.lowest + (1 - self.lowest) * (1 + math.cos(math.pi * done)) / 2)


def run_folder(root: Path, key: dict[str, Any]) -> Path:
    """Return the folder of the run that is described by `key`, which is written into it."""
    text = json.dumps(key, sort_keys=True, indent=1)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.json").write_text(text + "\n")
    return folder


def train(
    model: nn.Module,
    arm: Arm,
    batches: Batches,
    recipe: Recipe,
    folder: Path,
    *,
    deadline: float = math.inf,
    title: str = "",
) -> list[dict[str, float]]:
    """Train a model, from its checkpoint if there is one, and return the log.

    Args:
        model: A `Learner`, in its first state.
        arm: How it attends.
        batches: What it reads.
        recipe: How it is trained.
        folder: Where the run is kept.
        deadline: By `time.monotonic`, when to stop.
        title: Of the progress bar.

    Raises:
        OutOfTime: The deadline has passed.
        ValueError: The loss is not finite.
    """
    learner: Any = model
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, final = folder / "checkpoint.pt", folder / "weights.pt"
    log: list[dict[str, float]] = []
    start = 0
    if final.exists():
        model.load_state_dict(torch.load(final, map_location=device))
        learner.arm = arm.at(1.0)
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["step"], state["log"]

    def keep(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(state | {"step": step, "log": log}, checkpoint)

    model.train()
    clock, since = synced_clock(), start
    kept: float | None = None
    bar = tqdm(
        range(start, recipe.steps),
        desc=title,
        initial=start,
        total=recipe.steps,
        mininterval=2.0,
        leave=False,
    )
    for step in bar:
        now = time.monotonic()
        if now > deadline:
            keep(step)
            raise OutOfTime(f"{title} stopped at step {step} of {recipe.steps}")
        kept = now if kept is None else kept
        if now - kept > KEEP_SECONDS:
            keep(step)
            kept = now
        learner.arm = arm.at(step / recipe.steps)
        rate = recipe.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, targets = (x.to(device) for x in batches(step))
        loss, norm = train_step(model, optimizer, ids, targets, recipe.clip)
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"loss must be finite, got {value} in step {step} of {title}")
            end = synced_clock()
            seconds = (end - clock) / (step + 1 - since)
            clock, since = end, step + 1
            log.append(
                {"step": step + 1, "loss": value, "lr": rate, "norm": float(norm)}
                | {"step_seconds": seconds, "attended": learner.attended(ids.shape[1])}
                | {"switched": float(learner.arm.kind != arm.kind)}
            )
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            lines = "".join(json.dumps(line) + "\n" for line in log)
            (folder / "log.jsonl").write_text(lines)
    save(model.state_dict(), final)
    checkpoint.unlink(missing_ok=True)
    learner.arm = arm.at(1.0)
    return log


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices alone."""
    embeddings = {id(x.weight) for x in model.modules() if isinstance(x, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for weight in model.parameters():
        matrix = weight.dim() == 2 and id(weight) not in embeddings
        (decayed if matrix else others).append(weight)
    on_gpu = next(model.parameters()).is_cuda
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=on_gpu)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Take a step of training, and return the mean loss and the norm of the gradient before it."""
    losses = token_losses(model, ids, targets)
    loss = losses.sum() / (targets != IGNORED).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach(), norm


def token_losses(model: Callable[[Tensor], Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target, `[B, L]`, 0 for those that are ignored.

    By autocast to bfloat16 on CUDA. Nothing waits for the device.
    """
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids)
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)


def losses_by_position(model: nn.Module, windows: Tensor, batch: int) -> Tensor:
    """Return the loss of each window at each position, `[windows, L]`, on the CPU.

    Args:
        model: A `Learner`.
        windows: Tokens, `[windows, L + 1]`.
        batch: Windows that are read at a time.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        rows = [
            token_losses(model, ids[:, :-1], ids[:, 1:]).cpu()
            for ids in (part.to(device) for part in windows.split(batch))
        ]
    return torch.cat(rows)


def routing_statistics(model: Any, ids: Tensor) -> list[dict[str, float]]:
    """Return of each layer what its queries attend to.

    Args:
        model: A `Learner`.
        ids: Tokens, `[B, L]`.

    Returns:
        A row for each layer that does not attend to all: `layer`, `attended`, keys a query attends
        to on average, and means over heads of the measures of `moba_flex.diagnostics.collect`.
    """
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda),
        torch.compiler.set_stance("force_eager"),  # compiled graphs are not measured
        collect(model) as layers,
    ):
        model(ids)
    rows = []
    for name, layer in layers.items():
        means = {measure: float(x.nanmean()) for measure, x in layer.means().items()}
        attended = means["density"] * (ids.shape[1] + 1) / 2
        rows.append({"layer": model.get_submodule(name).layer_idx, "attended": attended} | means)
    return rows


def step_seconds(log: list[dict[str, float]]) -> dict[str, float]:
    """Return the median time of a step, and that of steps after a switch to full attention.

    The first line is left out where there are others: kernels compile then.
    """
    lines = log[1:] or log
    found = {}
    for name, switched in (("step_seconds", 0.0), ("switched_step_seconds", 1.0)):
        times = [line["step_seconds"] for line in lines if line["switched"] == switched]
        if times:
            found[name] = statistics.median(times)
    return found
