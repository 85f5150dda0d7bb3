"""What Mixture of Block Attention does to a language model, without any training.

One text goes through the model with dense attention and once for each setting of the gate. The
perplexity of its second half is reported, beside what the gate chose.
"""

import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moba_flex import diagnostics, pretrained
from moba_flex.config import MoBAConfig
from moba_flex.integrations.layout import Layout
from moba_flex.integrations.transformers import apply, gate_of, observe
from moba_flex.masks.router import route

_ROWS = 256  # rows of logits that are held in float32 at a time


@dataclass(frozen=True)
class Run:
    """One pass over the text. What concerns the gate is None if attention was dense.

    Attributes:
        config: The gate.
        perplexity: Of the second half of the text.
        seconds: The forward pass, diagnostics not counted.
        density: Share of query-key pairs attended to.
        recall: Share of dense attention's weight that lies on the chosen tokens.
        entropy: See `diagnostics.routing_entropy`; this and the others are means over the layers
            that route and all their heads.
        imbalance: See `diagnostics.load_imbalance`.
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
        tokens: Its length; the second half is predicted.
        setting: Device, dtype, threads and versions, which the seconds depend on.
        runs: The runs.
        map: Share of nearby queries that attend to each block, `[R, N]`, in one head.
        map_title: Which head, of which run.
    """

    model: str
    text: str
    tokens: int
    setting: dict[str, str | int]
    runs: list[Run]
    map: list[list[float]]
    map_title: str


def check_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best one that the machine has.

    Raises:
        ValueError: It is neither a CPU nor a CUDA device, or the machine lacks it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        usable = device.type in ("cpu", "cuda")
    except (AssertionError, RuntimeError):  # unknown to torch, or not built in
        usable = False
    if not usable:
        raise ValueError(f"device must be cpu or a CUDA device of this machine, got {name!r}")
    return device


def load_model(
    name: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, Any]:
    """Return a causal language model in eval mode and its tokenizer.

    Args:
        name: A folder or a Hub id; None is the default model.
        device: Where to put it.
        dtype: Its dtype.

    Raises:
        OSError: There is no such model, or it cannot be downloaded.
    """
    if name is None:
        model, tokenizer = pretrained.load(dtype=dtype)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (KeyError, OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(
                f"model must be a folder or Hub id of a causal LM, got {name!r}: {reason}"
            ) from error
    return model.to(device).eval(), tokenizer


def read_tokens(tokenizer: Any, text: Path | None, seq_len: int) -> Tensor:
    """Return the first tokens of a text file, or of Python's help topics, `[1, seq_len]`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no text, or too short.
    """
    if text is None:
        from pydoc_data.topics import topics

        content = "\n".join(topics.values())
    else:
        try:
            content = text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8, got {str(text)!r}: {error.reason}") from error
    ids: Tensor = tokenizer(content, return_tensors="pt", verbose=False).input_ids[:, :seq_len]
    if ids.shape[1] < seq_len:
        raise ValueError(
            f"text must have at least {seq_len} tokens, got {ids.shape[1]}: "
            "take a longer one, or a smaller --seq-len"
        )
    return ids


def evaluate(
    model: PreTrainedModel,
    ids: Tensor,
    configs: Sequence[MoBAConfig],
    *,
    model_name: str,
    text_name: str,
) -> Report:
    """Run the model dense and with each gate, a progress bar on stderr.

    Args:
        model: A causal language model in eval mode; its attention implementation is changed.
        ids: The text, `[1, L]`.
        configs: The gates.
        model_name: For the report.
        text_name: For the report.

    Raises:
        ValueError: The text exceeds the model's context, a block exceeds the text, or the model
            does not use the attention interface of transformers.
    """
    text_config = model.config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", math.inf)
    if ids.shape[1] > context:
        raise ValueError(f"--seq-len must be at most {context} for this model, got {ids.shape[1]}")
    for config in configs:
        if config.block_size > ids.shape[1]:
            raise ValueError(
                f"block_size must be at most --seq-len = {ids.shape[1]}, got {config.block_size}"
            )
        apply(model, config)  # raises before the long run if the model cannot

    # The picture shows the sparsest gate, with a sink if there is one, in the middle of the model.
    shown = max(configs, key=lambda config: (config.sink_blocks, -config.top_k))
    layer = text_config.num_hidden_layers // 2
    model.set_attn_implementation("sdpa")
    runs: list[Run] = []
    picture: list[list[float]] = []
    with tqdm(total=1 + len(configs), desc="dense", unit="run", file=sys.stderr) as bar:
        runs.append(Run(None, *_perplexity(model, ids)))
        bar.update()
        for config in configs:
            bar.set_description(f"top_k {config.top_k}, sink {config.sink_blocks}")
            probe = _Probe(layer)
            with observe(probe):
                perplexity, seconds = _perplexity(apply(model, config), ids)
            runs.append(Run(config, perplexity, seconds - probe.seconds, *probe.means()))
            if config is shown:
                picture = probe.map
            bar.update()
    device = ids.device
    return Report(
        model=model_name,
        text=text_name,
        tokens=ids.shape[1],
        setting={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        runs=runs,
        map=picture,
        map_title=f"layer {layer}, head 0, block {shown.block_size}, top_k {shown.top_k}, "
        f"sink {shown.sink_blocks}, local {shown.local_blocks}",
    )


class _Probe:
    """An observer that gathers diagnostics, and the time that they take."""

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
        start = _clock(q.device)
        routing = route(q, k, **gate_of(config, layer_idx, q.device))
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
        self.seconds += _clock(q.device) - start

    def means(self) -> list[float]:
        """Return density, recall, entropy and imbalance, averaged over layers."""
        return [sum(column) / len(column) for column in zip(*self.rows, strict=True)]


def _perplexity(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Return the perplexity of the second half of `ids` and the seconds of the forward pass."""
    targets = ids[0, ids.shape[1] // 2 :]
    rows = len(targets) + 1
    start = _clock(ids.device)
    with torch.no_grad():
        # The model's whole forward, not its body and head: some models scale or cap their logits.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0, -rows:-1]
    seconds = _clock(ids.device) - start
    loss = sum(
        F.cross_entropy(part.float(), target, reduction="sum").double()
        for part, target in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    )
    return float(torch.as_tensor(loss / len(targets)).exp()), seconds


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
