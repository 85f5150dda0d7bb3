"""Evaluation of a language model under Mixture of Block Attention, without any training.

The model reads one text with dense attention, and once for each setting of the gate. The report
holds the perplexity of the second half of the text, and diagnostics of the routing.
"""

import io
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from moba_flex import diagnostics
from moba_flex.compile.outside import check_device
from moba_flex.config import MoBAConfig
from moba_flex.integrations.layout import Layout
from moba_flex.integrations.transformers import apply, gate_of, observe
from moba_flex.masks.router import route

__all__ = [
    "Report",
    "Run",
    "check_device",
    "check_sizes",
    "check_tokens",
    "clock",
    "evaluate",
    "read_tokens",
    "setting_of",
]

_CHARACTERS = 8  # read for each token at first: few tokens have more
_ROWS = 256  # rows of logits that are held in float32 at a time


@dataclass(frozen=True)
class Run:
    """One pass over the text. With dense attention `config`, `entropy` and `imbalance` are None.

    Attributes:
        config: The gate.
        perplexity: Perplexity of the second half of the text.
        seconds: Time of the forward pass, without diagnostics.
        density: Share of query-key pairs attended to.
        recall: Share of dense attention's weight that lies on the chosen tokens.
        entropy: See `diagnostics.routing_entropy`.
        imbalance: See `diagnostics.load_imbalance`. Density, recall, entropy and imbalance are
            means over all heads of the layers that route.
    """

    config: MoBAConfig | None
    perplexity: float
    seconds: float
    density: float = 1.0
    recall: float = 1.0
    entropy: float | None = None
    imbalance: float | None = None


@dataclass(frozen=True)
class Report:
    """All runs over one text, the dense one first.

    Attributes:
        model: Name of the model.
        text: Name of the text.
        tokens: Length of the text; perplexity is that of the second half.
        setting: Device, dtype, threads and versions, which affect the seconds.
        runs: The runs.
        map: Share of nearby queries that attend to each block, `[R, N]`, in one head.
        map_title: The head and the run of the map.
    """

    model: str
    text: str
    tokens: int
    setting: dict[str, str | int]
    runs: list[Run]
    map: list[list[float]]
    map_title: str


def check_sizes(config: Any, seq_len: int, gates: Sequence[MoBAConfig]) -> None:
    """Raise if a text is too long for a model, or too short for a block.

    Args:
        config: Config of the model.
        seq_len: Tokens of the text.
        gates: Gates, whose block sizes are checked.

    Raises:
        ValueError: The text is too long or too short.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if seq_len > context:
        raise ValueError(f"--seq-len must be at most {context} for this model, got {seq_len}")
    for gate in gates:
        if gate.block_size > seq_len:
            raise ValueError(
                f"block_size must be at most --seq-len = {seq_len}, got {gate.block_size}"
            )


def read_tokens(tokenizer: Any, text: Path | None, seq_len: int) -> Tensor:
    """Return the first tokens of a text file, or of Python's help topics, `[1, seq_len]`.

    They equal the first tokens of the whole text, but only as much of it is read as they need.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, or too short.
    """
    ids: list[int] = []
    content, size, done = "", _CHARACTERS * seq_len, False
    try:
        with _opened(text) as file:
            while not done:
                more = file.read(size)
                content += more
                before, ids = ids, tokenizer(content, verbose=False).input_ids
                # Where the text is cut, tokens may differ from those of the whole text. The first
                # tokens are right if a later cut does not change them.
                agree = len(before) > seq_len and before[:seq_len] == ids[:seq_len]
                size, done = len(content) // 2 + 1, agree or not more
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be UTF-8, got {str(text)!r}: {error.reason}") from error
    except OSError as error:
        raise OSError(f"text must be readable, got {str(text)!r}: {error.strerror}") from error
    if len(ids) < seq_len:
        raise ValueError(
            f"text must have at least {seq_len} tokens, got {len(ids)}: "
            "take a longer one, or a smaller --seq-len"
        )
    return torch.tensor([ids[:seq_len]])


def check_tokens(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise if a model does not know a token.

    Raises:
        ValueError: A token exceeds the model's vocabulary.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings
    if (largest := int(ids.max())) >= vocabulary:
        raise ValueError(
            f"tokenizer must have at most the model's {vocabulary} tokens, got token {largest}: "
            "is it the tokenizer of this model?"
        )


def _opened(text: Path | None) -> TextIO:
    """Open a text file, or Python's help topics."""
    if text is not None:
        return text.open(encoding="utf-8")
    from pydoc_data.topics import topics

    return io.StringIO("\n".join(topics.values()))


def evaluate(
    model: PreTrainedModel,
    ids: Tensor,
    configs: Sequence[MoBAConfig],
    *,
    model_name: str,
    text_name: str,
) -> Report:
    """Run the model densely and with each gate, with a progress bar on stderr.

    Args:
        model: A causal language model in eval mode; its attention implementation is changed.
        ids: The text, `[1, L]`.
        configs: The gates.
        model_name: Name of the model in the report.
        text_name: Name of the text in the report.

    Raises:
        ValueError: The text exceeds the model's context, a block exceeds the text, or a token
            exceeds the model's vocabulary. Or the model does not use the attention interface of
            transformers, or its perplexity is not finite.
    """
    check_sizes(model.config, ids.shape[1], configs)
    check_tokens(model, ids)
    for config in configs:
        apply(model, config)  # raises before the long run if the model does not support it

    # The map shows a middle layer under the sparsest gate, with a sink if any gate has one.
    shown = max(configs, key=lambda config: (config.sink_blocks, -config.top_k))
    layer = model.config.get_text_config().num_hidden_layers // 2
    model.set_attn_implementation("sdpa")
    runs: list[Run] = []
    picture: list[list[float]] = []
    with tqdm(total=1 + len(configs), desc="dense", unit="run", file=sys.stderr) as bar:
        runs.append(Run(None, *_perplexity(model, ids)))
        if not math.isfinite(runs[0].perplexity):
            raise ValueError(
                f"perplexity must be finite, got {runs[0].perplexity} with dense attention: "
                "are the model's weights whole, and can they be held in this dtype?"
            )
        bar.update()
        for config in configs:
            bar.set_description(f"top_k {config.top_k}, sink {config.sink_blocks}")
            probe = _Probe(layer)
            with observe(probe):
                perplexity, seconds = _perplexity(apply(model, config), ids)
            if not probe.rows:
                raise ValueError("model must have layers that attend, got none: is it complete?")
            runs.append(Run(config, perplexity, seconds - probe.seconds, *probe.means()))
            if config is shown:
                picture = probe.map
            bar.update()
    return Report(
        model=model_name,
        text=text_name,
        tokens=ids.shape[1],
        setting=setting_of(model, ids.device),
        runs=runs,
        map=picture,
        map_title=f"layer {layer}, head 0, block {shown.block_size}, top_k {shown.top_k}, "
        f"sink {shown.sink_blocks}, local {shown.local_blocks}",
    )


def setting_of(model: PreTrainedModel, device: torch.device) -> dict[str, str | int]:
    """Return what affects the seconds: device, dtype, threads and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class _Probe:
    """An observer that collects diagnostics, and the time that they take."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.map: list[list[float]] = []
        self.seconds = 0.0
        self.rows: list[tuple[float, float, float, float]] = []

    def __call__(
        self,
        layer_idx: int | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        config: MoBAConfig,
        layout: Layout,
    ) -> None:
        start = clock(q.device)
        routing = route(q, k, **gate_of(config, layer_idx, q))
        self.rows.append(
            (
                diagnostics.density(routing),
                float(diagnostics.attention_recall(q, k, routing, scale=scale, rows=128).mean()),
                float(diagnostics.routing_entropy(routing).mean()),
                float(diagnostics.load_imbalance(routing).mean()),
            )
        )
        if layer_idx == self.layer:
            self.map = diagnostics.routing_map(routing)[0, 0].tolist()
        self.seconds += clock(q.device) - start

    def means(self) -> list[float]:
        """Return density, recall, entropy and imbalance, averaged over layers."""
        return [sum(column) / len(column) for column in zip(*self.rows, strict=True)]


def _perplexity(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Return the perplexity of the second half of `ids` and the seconds of the forward pass."""
    targets = ids[0, ids.shape[1] // 2 :]
    rows = len(targets) + 1
    start = clock(ids.device)
    with torch.no_grad():
        # The model's whole forward, not body and head apart: some models scale or cap their
        # logits.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0, -rows:-1]
    seconds = clock(ids.device) - start
    loss = sum(
        F.cross_entropy(part.float(), target, reduction="sum").double()
        for part, target in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    )
    return float(torch.as_tensor(loss / len(targets)).exp()), seconds


def clock(device: torch.device) -> float:
    """Return the time in seconds, after the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
