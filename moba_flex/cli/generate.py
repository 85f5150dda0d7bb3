"""Generation of text, with figures of prefill and decode."""

import contextlib
import errno
import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TextStreamer,
)

from moba_flex.cli.door import say
from moba_flex.cli.evaluate import check_tokens, clock, setting_of
from moba_flex.config import MoBAConfig
from moba_flex.integrations.cache import BlockDynamicLayer
from moba_flex.integrations.transformers import apply

__all__ = ["Generation", "Run", "Settings", "check_length", "generate", "read_prompt", "table"]

_NAME = 24  # characters of a figure's name
_WIDTH = 12  # characters of a column
_MB = 1e6


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        max_new_tokens: Tokens to add at most; a token that ends the text ends it earlier.
        chunk: Tokens of the prompt in one call; None for all.
        temperature: Temperature of samples; None for the likeliest token.
        seed: Seed of the samples.
    """

    max_new_tokens: int
    chunk: int | None = None
    temperature: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One text.

    Attributes:
        config: The gate; None with dense attention.
        text: What was added to the prompt.
        tokens: Its tokens.
        prefill_seconds: Time until the logits of the first new token were known.
        decode_seconds: Time of all tokens behind the first.
        peak_bytes: Peak memory: on CUDA what PyTorch allocated, else the process's resident set.
        cache_bytes: Allocated for keys and values.
        block_bytes: Allocated for block keys.
    """

    config: MoBAConfig | None
    text: str
    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int
    cache_bytes: int
    block_bytes: int


@dataclass(frozen=True)
class Generation:
    """All texts for one prompt, the dense one first.

    Attributes:
        model: Name of the model.
        prompt_tokens: Length of the prompt.
        settings: How they were generated.
        setting: Device, dtype, threads and versions, which affect the seconds.
        runs: The texts.
    """

    model: str
    prompt_tokens: int
    settings: Settings
    setting: dict[str, str | int]
    runs: list[Run]


def read_prompt(tokenizer: Any, prompt: Path) -> Tensor:
    """Return the tokens of a file, or of stdin for `-`, `[1, L]`.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, or has no token.
    """
    try:
        content = _read(prompt).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt must be UTF-8, got {str(prompt)!r}: {error.reason}") from error
    except OSError as error:
        raise OSError(
            f"--prompt must be readable, got {str(prompt)!r}: {error.strerror}"
        ) from error
    ids: list[int] = tokenizer(content, verbose=False).input_ids
    if not ids:
        raise ValueError("--prompt must have at least one token, got none")
    return torch.tensor([ids])


def _read(prompt: Path) -> bytes:
    if str(prompt) != "-":
        return prompt.read_bytes()
    if sys.stdin is None:
        raise OSError(errno.EBADF, "stdin is closed")
    return sys.stdin.buffer.read()


def check_length(config: Any, length: int, max_new_tokens: int) -> None:
    """Raise if prompt and text are too long for a model.

    Args:
        config: Config of the model.
        length: Tokens of the prompt.
        max_new_tokens: Tokens of the text.

    Raises:
        ValueError: They are too long.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length + max_new_tokens > context:
        raise ValueError(
            f"--prompt and --max-new-tokens must make at most {context} tokens for this model, "
            f"got {length} + {max_new_tokens}: take fewer"
        )


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    configs: Sequence[MoBAConfig | None],
    settings: Settings,
    *,
    model_name: str,
) -> Generation:
    """Continue a prompt with each gate; write the texts to stdout as they come.

    Args:
        model: A causal language model in eval mode, without moba_flex; it is changed.
        tokenizer: Its tokenizer.
        ids: The prompt, `[1, L]`.
        configs: The gates; None, which must come first, is dense attention.
        settings: How to generate.
        model_name: Name of the model in the report.

    Raises:
        OSError: stdout cannot be written to.
        ValueError: A token exceeds the model's vocabulary, the model does not use the attention
            interface of transformers, or its logits are not numbers.
    """
    check_tokens(model, ids)
    runs = []
    for config in configs:
        if len(configs) > 1:
            say(f"{_name(config)}:" if config is None else f"\n{_name(config)}:")
            if ids.is_cuda:  # so that no run pays for what is compiled once
                _run(model, None, ids, config, Settings(2, settings.chunk))
        runs.append(_run(model, tokenizer, ids, config, settings))
    return Generation(model_name, ids.shape[1], settings, setting_of(model, ids.device), runs)


class _Writer(TextStreamer):
    """A streamer that writes by `say`."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the text."""
        say(f"{text}\n" if stream_end else text, end="")


class _Watch(LogitsProcessor):
    """Calls a function once, with the logits of the first new token."""

    def __init__(self, call: Callable[[Tensor], None]) -> None:
        self.call: Callable[[Tensor], None] | None = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits as they are."""
        if self.call is not None:
            self.call(scores)
        self.call = None
        return scores


def _run(
    model: Any, tokenizer: Any, ids: Tensor, config: MoBAConfig | None, settings: Settings
) -> Run:
    """Generate one text; without a tokenizer write none."""
    length, device = ids.shape[1], ids.device
    chunked = settings.chunk is not None and settings.chunk < length
    if config is not None:
        # Chunks behind the first are calls with a cache, too; only decode may differ from others.
        prefill = replace(config, cached="route", decode_top_k=None)
        apply(model, prefill if chunked else config)
    cache = DynamicCache(config=model.config)
    # Options of the model's own generation_config that do not fit a stream or this cache.
    options: dict[str, Any] = {"num_beams": 1, "use_cache": True, "cache_implementation": None}
    options["do_sample"] = settings.temperature is not None
    if settings.temperature is not None:
        options |= {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    if chunked:
        options["prefill_chunk_size"] = settings.chunk
    if tokenizer is not None:
        options["streamer"] = _Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    torch.manual_seed(settings.seed)
    _reset_peak(device)
    times = []
    with _progress(model, cache, length, f"prefill, {_name(config)}", chunked) as bar:

        def prefilled(logits: Tensor) -> None:
            times.append(clock(device))
            bar.close()
            if bool(logits.isnan().any()):
                raise ValueError(
                    f"logits must be numbers, got nan with {_name(config)} attention: "
                    "are the model's weights whole, and can they be held in this dtype?"
                )
            if config is not None and chunked:
                apply(model, config)

        times.append(clock(device))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=settings.max_new_tokens,
            logits_processor=LogitsProcessorList([_Watch(prefilled)]),
            **options,
        )
        times.append(clock(device))
    tokens = out[0, length:].tolist()
    kept, blocks = _memory(cache)
    return Run(
        config=config,
        text="" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prefill_seconds=times[1] - times[0],
        decode_seconds=times[2] - times[1],
        peak_bytes=_peak(device),
        cache_bytes=kept,
        block_bytes=blocks,
    )


@contextlib.contextmanager
def _progress(
    model: PreTrainedModel, cache: DynamicCache, length: int, description: str, chunked: bool
) -> Iterator[Any]:
    """Yield a bar that shows on a terminal how much of a prompt in chunks is in the cache."""
    with tqdm(
        total=length,
        desc=description,
        unit="token",
        mininterval=0,  # a chunk takes long
        disable=None if chunked else True,  # None: off unless stderr is a terminal
        leave=False,
        file=sys.stderr,
    ) as bar:

        def note(*_: object) -> None:
            bar.update(cache.get_seq_length() - bar.n)

        hook = model.register_forward_hook(note)
        try:
            yield bar
        finally:
            hook.remove()


def _memory(cache: DynamicCache) -> tuple[int, int]:
    """Return the bytes of keys and values, and of block keys."""
    kept = blocks = 0
    for layer in cache.layers:
        if isinstance(layer, BlockDynamicLayer):
            memory = layer.blocks.memory()
            kept += memory["keys and values"]
            blocks += memory["blocks"]
        else:
            tensors = (getattr(layer, name, None) for name in ("keys", "values"))
            kept += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
    return kept, blocks


def _reset_peak(device: torch.device) -> None:
    """Let `_peak` count from here, if the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _name(config: MoBAConfig | None) -> str:
    return "dense" if config is None else "sparse"


def table(found: Generation) -> str:
    """Return the figures as plain text."""
    setting, runs = found.setting, found.runs
    head = (
        f"{found.model}, prompt of {found.prompt_tokens} tokens\n"
        f"{setting['device']}, {setting['dtype']}, {setting['threads']} threads, "
        f"torch {setting['torch']}, transformers {setting['transformers']}\n"
    )
    prompt = found.prompt_tokens
    rows = {
        "": [_name(run.config) for run in runs],
        "new tokens": [str(len(run.tokens)) for run in runs],
        "prefill, tokens/s": [_speed(prompt, run.prefill_seconds) for run in runs],
        "decode, tokens/s": [_speed(len(run.tokens) - 1, run.decode_seconds) for run in runs],
        "peak memory, MB": [f"{run.peak_bytes / _MB:.1f}" for run in runs],
        "keys and values, MB": [f"{run.cache_bytes / _MB:.2f}" for run in runs],
        "block keys, MB": [f"{run.block_bytes / _MB:.2f}" for run in runs],
    }
    lines = [
        name.ljust(_NAME) + "".join(cell.rjust(_WIDTH) for cell in cells)
        for name, cells in rows.items()
    ]
    if len(runs) == 2:
        lines.append(_agreement(runs[0].tokens, runs[1].tokens))
    return "\n".join([head, *lines])


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f}" if tokens else "-"


def _agreement(dense: list[int], sparse: list[int]) -> str:
    """Say how far two texts are the same."""
    if dense == sparse:
        return "\nboth texts are the same"
    same = 0
    while dense[same : same + 1] == sparse[same : same + 1]:
        same += 1
    return f"\nthe first {same} tokens of both texts are the same"
