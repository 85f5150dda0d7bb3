"""A request as plain data: sizes, gate, layout, mods, memory, and the seed of the values."""

import ast
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

Mod = Callable[..., Tensor]

DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.float16, torch.bfloat16)}
DTYPES["float64"] = torch.float64
MEMORY = (
    *("contiguous", "transposed", "sliced", "strided", "steps", "odd"),
    *("expanded", "heads", "windows"),  # whose elements share memory
    *("".join(order) for order in itertools.permutations("0123")),
)
_BUCKETS = 12  # of the relative bias
_PLANTS, _CAPTURED, _MASK = 1, 2, 3  # streams of random numbers


class Span(NamedTuple):
    """One sequence: its queries `q_start..q_stop` and keys `k_start..k_stop`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class Places(NamedTuple):
    """Where things lie, `R` being 1 or the batch; -1 for what belongs to no sequence.

    Attributes:
        key_block: Block of each key, `[R, KV]`.
        key_span: Sequence of each key, `[R, KV]`.
        own: Own block of each query, `[R, Q]`.
        q_span: Sequence of each query, `[R, Q]`.
        position: Of each query its place among the keys, `[R, Q]`.
        first: First block of each query's sequence, `[R, Q]`.
        after: The block after its last, `[R, Q]`.
    """

    key_block: Tensor
    key_span: Tensor
    own: Tensor
    q_span: Tensor
    position: Tensor
    first: Tensor
    after: Tensor


@dataclass(frozen=True)
class Case:
    """One request: sizes, options and the seed of the values.

    Attributes:
        docs: Keys of each packed document; then `kv_len` follows.
        q_docs: Queries of each, if not as many; then `q_len` follows.
        pads: Padding keys before and after each row's sequence.
        score: Score mods joined by "+": "alibi", "relative" and "temperature".
        mask: "window:w", "random:p" (each pair is kept with probability p), or nothing.
        memory: How q, k and v lie in memory, one of `MEMORY` each.
        grads: Which of q, k, v and the captured tensors, "c", require gradients.
        pattern: A fixed routing in place of the gate: "sliding_window", "sink_window",
            "global_local:n" or "strided:n", with `sink_blocks` and `local_blocks`.
        graph: Whether the call is in a graph that the caller compiles.
        plants: Values planted where they hurt: "q=nan" somewhere in one vector, "k*=inf" all over
            one.
    """

    batch: int = 1
    num_kv_heads: int = 1
    group: int = 1
    q_len: int = 1
    kv_len: int = 1
    head_dim: int = 16
    block_size: int = 1
    top_k: int = 1
    sink_blocks: int = 0
    local_blocks: int = 0
    causal: bool = True
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    ties: bool = False
    seed: int = 0
    device: str = field(default="cpu", compare=False)
    v_dim: int | None = None
    head_top_k: tuple[int, ...] | None = None
    docs: tuple[int, ...] | None = None
    q_docs: tuple[int, ...] | None = None
    pads: tuple[tuple[int, int], ...] | None = None
    softcap: float | None = None
    score: str = ""
    mask: str = ""
    memory: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    grads: str = "qkvc"
    lse: bool = True
    plants: tuple[str, ...] = ()
    plan: str = "auto"
    pattern: str = ""
    graph: bool = False

    def __post_init__(self) -> None:
        """Let sizes follow from documents, and padding fit the sizes."""
        if self.docs is not None:
            q_docs = self.docs if self.q_docs is None else self.q_docs
            self._set(kv_len=sum(self.docs), q_len=sum(q_docs))
        if self.pads is not None:
            pads = [self.pads[row % len(self.pads)] for row in range(self.batch)]
            left = [min(left, self.kv_len) for left, _ in pads]
            right = [min(right, self.kv_len - n) for n, (_, right) in zip(left, pads, strict=True)]
            self._set(pads=tuple(zip(left, right, strict=True)) or None)

    def _set(self, **values: Any) -> None:
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def parse(cls, line: str) -> "Case":
        """Return the case that `str` printed."""
        known = {f.name for f in fields(cls)}
        options: dict[str, Any] = {}
        for word in line.split():
            key, _, value = word.partition("=")
            if key not in known:
                raise ValueError(f"case must be of {sorted(known)}, got {key!r}")
            if key == "dtype":
                options[key] = DTYPES[value]
                continue
            try:
                options[key] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                options[key] = value
        return cls(**options)

    def __str__(self) -> str:
        """Name what is not as by default."""
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value == f.default:
                continue
            if isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            words.append(f"{f.name}={value}".replace(" ", ""))
        return " ".join(words)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group

    @property
    def longest(self) -> int:
        """Keys of the longest sequence."""
        return max((span.k_stop - span.k_start for row in self.spans() for span in row), default=0)

    @property
    def offset(self) -> int:
        """Position of the first query of a row."""
        return self.kv_len - self.q_len

    @property
    def factor(self) -> float:
        """Factor on the scores."""
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def gate(self) -> dict[str, Any]:
        """Arguments of the gate."""
        gate: dict[str, Any] = {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "sink_blocks": self.sink_blocks,
            "local_blocks": self.local_blocks,
            "causal": self.causal,
        }
        if self.head_top_k is not None:
            gate["head_top_k"] = torch.tensor(self.head_top_k, device=self.device)
        return gate

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of the layout."""
        if self.docs is not None:
            layout = {"cu_seqlens": self._starts(self.docs)}
            if self.q_docs is not None:
                layout["cu_seqlens_q"] = self._starts(self.q_docs)
            return layout
        if self.pads is not None:
            place = torch.arange(self.kv_len, device=self.device)
            left, right = torch.tensor(self.pads, device=self.device).T[:, :, None]
            return {"key_mask": (place >= left) & (place < self.kv_len - right)}
        return {}

    @property
    def has_exact_ties(self) -> bool:
        """Whether affinities are exact, so that equal ones are equal in any order of summation.

        The means of small integers are, over a power of two of keys; a short last block may be
        something else, but only without causality does anybody choose it.
        """
        whole = self.block_size & (self.block_size - 1) == 0
        gate = not self.plants and not self.pattern
        return self.ties and self.causal and whole and gate

    def _starts(self, lengths: tuple[int, ...]) -> Tensor:
        ends = torch.tensor((0, *lengths), device=self.device).cumsum(0)
        return ends.to(torch.int32)

    def spans(self) -> list[list[Span]]:
        """Return the sequences of each row; of one row if all are alike."""
        if self.docs is not None:
            spans, q, k = [], 0, 0
            for q_n, k_n in zip(self.q_docs or self.docs, self.docs, strict=True):
                spans.append(Span(q, q := q + q_n, k, k := k + k_n))
            return [spans]
        if self.pads is not None:
            rows = []
            for left, right in self.pads:
                start, stop = left, self.kv_len - right
                q_start, q_stop = (min(max(x - self.offset, 0), self.q_len) for x in (start, stop))
                rows.append([Span(q_start, q_stop, start, stop)])
            return rows
        return [[Span(0, self.q_len, 0, self.kv_len)]]

    @cached_property
    def places(self) -> Places:
        """Where sequences, blocks and queries lie, span by span."""
        rows = self.spans()
        keys = torch.full((2, len(rows), self.kv_len), -1)
        queries = torch.full((5, len(rows), self.q_len), -1)
        for row, spans in enumerate(rows):
            first = 0
            for number, (q_start, q_stop, k_start, k_stop) in enumerate(spans):
                k_n, q_n = k_stop - k_start, q_stop - q_start
                after = first + -(-k_n // self.block_size)
                keys[0, row, k_start:k_stop] = first + torch.arange(k_n) // self.block_size
                keys[1, row, k_start:k_stop] = number
                # The queries of a document are its last positions; those of a padded row lie at
                # their own.
                place = torch.arange(q_n) + (
                    k_stop - q_n if self.docs is not None else self.offset + q_start
                )
                own = first + (place - k_start) // self.block_size
                numbers = torch.tensor([number, first, after])[:, None].expand(3, q_n)
                queries[:, row, q_start:q_stop] = torch.cat((torch.stack((own, place)), numbers))
                first = after
        own, position, q_span, first_block, after_block = queries.to(self.device)
        key_block, key_span = keys.to(self.device)
        return Places(key_block, key_span, own, q_span, position, first_block, after_block)

    def _generator(self, stream: int = 0) -> torch.Generator:
        """Return a generator for one kind of values, so that none depends on another's size."""
        return torch.Generator().manual_seed(self.seed * 4 + stream)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as they lie in memory; with `ties`, of few small integers."""
        q, k, v = self.values()
        for plant in self.plants:
            name, _, value = plant.partition("=")
            self._plant({"q": q, "k": k, "v": v}[name[0]], float(value), name.endswith("*"))
        q, k, v = (lay_out(x, kind) for x, kind in zip((q, k, v), self.memory, strict=True))
        return q, k, v

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v without what is planted in them, contiguous."""
        generator = self._generator()
        v_dim = self.head_dim if self.v_dim is None else self.v_dim

        def draw(num_heads: int, length: int, head_dim: int, memory: str) -> Tensor:
            shape = (self.batch, num_heads, length, head_dim)
            if self.ties:
                x = torch.randint(-1, 2, shape, generator=generator).float()
            else:
                x = torch.randn(shape, generator=generator)
            return lay_out(x, memory).contiguous().to(self.device, self.dtype)

        return (
            draw(self.num_heads, self.q_len, self.head_dim, self.memory[0]),
            draw(self.num_kv_heads, self.kv_len, self.head_dim, self.memory[1]),
            draw(self.num_kv_heads, self.kv_len, v_dim, self.memory[2]),
        )

    def _plant(self, x: Tensor, value: float, everywhere: bool) -> None:
        """Write `value` into one vector of `x`, or of all its rows if they share memory."""
        if x.numel() == 0:
            return
        generator = self._generator(_PLANTS)
        b, h, i, d = (int(torch.randint(n, (), generator=generator)) for n in x.shape)
        x[b, h, i, slice(None) if everywhere else d] = value

    def captured(self) -> dict[str, Tensor]:
        """Return the tensors that score mods capture, float32 (float64 if the inputs are)."""
        generator = self._generator(_CAPTURED)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        make = {
            "alibi": lambda: torch.rand(self.num_heads, generator=generator) / 8,
            "relative": lambda: torch.randn(self.num_heads, _BUCKETS, generator=generator),
            "temperature": lambda: 0.5 + torch.rand(self.num_heads, generator=generator),
        }
        names = self.score.split("+") if self.score else []
        return {name: make[name]().to(self.device, dtype) for name in names}

    def score_mod(self, captured: dict[str, Tensor]) -> Mod | None:
        """Return the score mod that captures these tensors."""
        if not self.score:
            return None
        offset = self.offset
        alibi, relative, temperature = map(captured.get, ("alibi", "relative", "temperature"))

        def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            distance = q_idx + offset - kv_idx
            if temperature is not None:
                score = score * temperature[h]
            if relative is not None:
                score = score + relative[h, distance.clamp(0, _BUCKETS - 1)]
            if alibi is not None:
                score = score - alibi[h] * distance.abs()
            return score

        return mod

    def mask_mod(self) -> Mod | None:
        """Return the mask mod, which captures a tensor if it is random."""
        kind, _, value = self.mask.partition(":")
        offset = self.offset
        if kind == "window":
            width = int(value)
            return lambda b, h, q_idx, kv_idx: q_idx + offset - kv_idx < width
        if kind == "random":
            draws = torch.rand(self.q_len, self.kv_len, generator=self._generator(_MASK))
            keep = (draws < float(value)).to(self.device)
            return lambda b, h, q_idx, kv_idx: keep[q_idx, kv_idx]
        return None


def lay_out(x: Tensor, kind: str) -> Tensor:
    """Return `x` `[B, H, length, head_dim]` in another place of memory.

    The values are the same, but for those that come to share memory. Digits name the dimensions
    from the outermost to the innermost.
    """
    if kind == "transposed":  # as Hugging Face's models have it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        batch, num_heads, length, head_dim = x.shape
        room = x.new_full((batch, num_heads + 1, length + 3, head_dim + 5), math.nan)
        room[:, 1:, 2:-1, 3:-2] = x
        return room[:, 1:, 2:-1, 3:-2]
    if kind == "strided":
        room = x.new_full((*x.shape, 2), math.nan)
        room[..., 1] = x
        return room[..., 1]
    if kind == "steps":
        batch, num_heads, length, head_dim = x.shape
        room = x.new_full((2 * batch, 2 * num_heads, 3 * length, head_dim), math.nan)
        room[::2, 1::2, 2::3] = x
        return room[::2, 1::2, 2::3]
    if kind == "odd":  # strides of dimensions of one element, which nobody follows
        strides = (7 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))
        return x.as_strided(x.shape, tuple(strides))
    if kind == "expanded":  # rows of the batch are one; what is planted is in the first
        return x[:1].expand_as(x) if x.shape[0] else x
    if kind == "heads":
        return x[:, :1].expand_as(x)
    if kind == "windows":  # each vector begins with the second element of the one before
        if not x.numel():
            return x
        return torch.cat((x[..., 0], x[:, :, -1, 1:]), dim=2).unfold(2, x.shape[3], 1)
    if kind.isdigit():
        order = [int(digit) for digit in kind]
        return x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    return x
