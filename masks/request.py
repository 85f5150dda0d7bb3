"""The options of attention, each written once, and the objects that carry them."""

from dataclasses import dataclass, field
from math import sqrt
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from moba_flex.masks._torch.exporting import holds
from moba_flex.masks.checks import (
    check_aux,
    check_bool,
    check_head_top_k,
    check_int,
    check_layout,
    check_mods,
    check_qkv,
    check_routing,
    check_scale,
    check_softcap,
    check_transforms,
)
from moba_flex.masks.layout import (
    LONGEST,
    Layout,
    NewKeys,
    Pages,
    RowOptions,
    Slots,
    ceil_div,
    locate,
    locate_slots,
)
from moba_flex.masks.mods import MaskMod, Mods, ScoreMod
from moba_flex.masks.routing import Routing

_LEAST = {"block_size": 1, "top_k": 1, "sink_blocks": 0, "local_blocks": 0}


class GateOptions(TypedDict, total=False):
    """How blocks are chosen; see `moba_flex.moba_attention` for what each option means."""

    block_size: Required[int]
    top_k: Required[int]
    sink_blocks: int
    local_blocks: int
    causal: bool
    head_top_k: Tensor | None


class Functions(TypedDict, total=False):
    """Changes to scores and masks that are functions."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None


class ScoreOptions(Functions, total=False):
    """Options that change scores; see `moba_flex.moba_attention`."""

    scale: float | None
    softcap: float | None


class Options(GateOptions, RowOptions, ScoreOptions, total=False):
    """The options of `moba_flex.moba_attention` that say what is computed."""


@dataclass(frozen=True)
class Gate:
    """How many blocks each query chooses, and which of them are forced.

    Attributes:
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks of the sequence that are always chosen.
        local_blocks: Blocks right before the own one that are always chosen.
        causal: Whether only past blocks are candidates.
        head_top_k: Blocks that the queries of each head attend to, int `[Hq]`, or of each head in
            each row, `[B, Hq]`; None for `top_k`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or `top_k` cannot hold the forced blocks.
    """

    block_size: int
    top_k: int
    sink_blocks: int = 0
    local_blocks: int = 0
    causal: bool = True
    head_top_k: Tensor | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            object.__setattr__(self, name, check_int(name, getattr(self, name), least))
        object.__setattr__(self, "causal", check_bool("causal", self.causal))
        if self.least_top_k > self.top_k:
            raise ValueError(
                "top_k must be at least 1 + sink_blocks + local_blocks = "
                f"{self.least_top_k}, got {self.top_k}: "
                "the own and the forced blocks count in top_k"
            )
        for name in _LEAST:
            value = getattr(self, name)
            # No sequence has more keys or blocks, and sums of such numbers fit into 64 bits.
            if isinstance(value, int) and value > LONGEST:
                object.__setattr__(self, name, LONGEST)

    @property
    def least_top_k(self) -> int:
        """The own block and the forced ones."""
        return 1 + self.sink_blocks + self.local_blocks

    def covers(self, kv_len: int) -> bool:
        """Whether every query attends to every key that it may see, of `kv_len`.

        Under `torch.export` the answer is yes only if it is for every length.
        """
        if self.head_top_k is not None:
            return False
        return holds(self.top_k >= ceil_div(kv_len, self.block_size))

    def check_heads(self, q: Tensor) -> None:
        """Raise unless `head_top_k` gives a number of blocks to each head of `q`."""
        check_head_top_k(self.head_top_k, q, self.least_top_k, self.top_k)


@dataclass(frozen=True)
class Request:
    """One call of attention, checked.

    Attributes:
        q: Queries, `[B, Hq, Q, D]`.
        k: Keys, `[B, Hkv, KV, D]`.
        v: Values, `[B, Hkv, KV, Dv]`.
        scale: Factor on the scores.
        gate: How blocks are chosen; None if `routing` says which.
        routing: The blocks that were chosen, as a set, for each query head or key/value head;
            None if the gate chooses.
        rows: What the rows of the batch hold.
        layout: Where queries and blocks lie, if that is known already.
        slots: Where keys and queries lie in a cache; None if `k` and `v` are no cache.
        block_keys: The block keys of the gate, `[B, Hkv, N, D]`, if a cache keeps them.
        mods: Changes to scores and masks.
        lse: Whether the log-sum-exp of the scores is asked for.
        pages: The cache, if it lies in pages; `k` and `v` then only have the shapes of its rows.
        counters: Zeros of a cache, in which the programs of a kernel count.
        new: Keys that are to be appended to the cache first, those of the queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    gate: Gate | None = None
    routing: Routing | None = None
    rows: RowOptions | None = None
    layout: Layout | None = None
    slots: Slots | None = None
    block_keys: Tensor | None = None
    mods: Mods = field(kw_only=True)  # as a default, PyTorch 2.11's Dynamo could not trace it
    lse: bool = field(default=False, kw_only=True)
    pages: Pages | None = field(default=None, kw_only=True)
    counters: Tensor | None = field(default=None, kw_only=True)
    new: NewKeys | None = field(default=None, kw_only=True)

    @property
    def is_plain(self) -> bool:
        """Whether each row is one sequence, without padding."""
        if self.layout is not None:
            return self.layout.extents is None
        if self.slots is not None:
            return False
        rows = self.rows or {}
        return rows.get("cu_seqlens") is None and rows.get("key_mask") is None

    @property
    def causal(self) -> bool:
        """Whether a query sees only keys at its position and before."""
        if self.gate is not None:
            return self.gate.causal
        return self.routing is None or self.routing.causal

    def with_gate(self, gate: Gate) -> "Request":
        """Return the request with another gate, and so with other blocks."""
        return self._with(gate, None, None)

    def find_layout(self) -> Layout:
        """Return where queries and blocks lie."""
        if self.layout is not None:
            return self.layout
        assert self.gate is not None  # a routing brings its layout
        sizes = self.q.shape[2], self.k.shape[2]
        plain = Layout(*sizes, self.gate.block_size, self.gate.causal)
        if self.slots is not None:
            return locate_slots(plain, self.slots)
        return locate(plain, self.rows or {})

    def located(self) -> "Request":
        """Return the request with its layout worked out."""
        if self.layout is not None:
            return self
        return self._with(self.gate, self.find_layout(), self.block_keys)

    def without_unused(self) -> "Request":
        """Return the request with zeros in slots of a cache that hold no key.

        FlexAttention multiplies what it masks by zero, and NaN would come through.
        """
        if self.slots is None:
            return self
        slot = torch.arange(self.k.shape[2], device=self.k.device)
        start, stop = (x[:, None, None, None] for x in self.slots[1:])
        used = (slot[:, None] >= start) & (slot[:, None] < stop)
        k, v = (x.where(used, 0.0) for x in (self.k, self.v))
        given = self.q, k, v, self.scale, self.gate, self.routing, self.rows, self.layout
        return Request(*given, self.slots, self.block_keys, mods=self.mods, lse=self.lse)

    def joined(self) -> "Request":
        """Return the request with the pages of each row copied into one piece."""
        if self.pages is None:
            return self
        k, v, block_keys = self.pages.joined()
        rest = self.scale, self.gate, None, None, None, self.slots, block_keys
        return Request(self.q, k, v, *rest, mods=self.mods, lse=self.lse)

    def _with(
        self, gate: Gate | None, layout: Layout | None, block_keys: Tensor | None
    ) -> "Request":
        # Not by `dataclasses.replace`, which torch.compile would have to trace.
        given = self.q, self.k, self.v, self.scale, gate, self.routing, self.rows, layout
        return Request(
            *given, self.slots, block_keys, mods=self.mods, lse=self.lse, pages=self.pages
        )


def gated_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    head_top_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_aux: AuxRequest | None = None,
    **scores: Unpack[ScoreOptions],
) -> Request:
    """Return the checked request of a call whose gate chooses the blocks."""
    scale, mods = _check_scores(q, k, v, **scores)
    lse = check_aux(return_aux)
    gate = Gate(block_size, top_k, sink_blocks, local_blocks, causal, head_top_k)
    gate.check_heads(q)
    # A literal, since torch.compile traces no call of a TypedDict.
    rows: RowOptions = {
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_q": cu_seqlens_q,
        "key_mask": key_mask,
    }
    check_layout(q, k, **rows)
    return Request(q, k, v, scale, gate=gate, rows=rows, mods=mods, lse=lse)


def cached_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_keys: Tensor | None,
    slots: Slots | None,
    *,
    pages: Pages | None = None,
    counters: Tensor | None = None,
    new: NewKeys | None = None,
    return_aux: AuxRequest | None = None,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    causal: bool = True,
    head_top_k: Tensor | None = None,
    **scores: Unpack[ScoreOptions],
) -> Request:
    """Return the checked request of a call whose keys and values lie in a cache."""
    scale, mods = _check_scores(q, k, v, **scores)
    lse = check_aux(return_aux)
    gate = Gate(block_size, top_k, sink_blocks, local_blocks, causal, head_top_k)
    gate.check_heads(q)
    rest = gate, None, None, None, slots, block_keys
    return Request(
        q, k, v, scale, *rest, mods=mods, lse=lse, pages=pages, counters=counters, new=new
    )


def given_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    *,
    slots: Slots | None = None,
    return_aux: AuxRequest | None = None,
    **scores: Unpack[ScoreOptions],
) -> Request:
    """Return the checked request of a call that says itself which blocks are chosen.

    With `slots`, keys and values lie in a cache, and the routing is over their layout.
    """
    scale, mods = _check_scores(q, k, v, **scores)
    lse = check_aux(return_aux)
    check_routing(routing, q, k)
    routing = routing.as_set()
    given = None, routing, None, routing.layout, slots
    return Request(q, k, v, scale, *given, mods=mods, lse=lse)


def _check_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    **functions: Unpack[Functions],
) -> tuple[float, Mods]:
    """Check the tensors, and return the scale and the changes to scores."""
    mods = Mods(**functions, softcap=check_softcap(softcap))
    check_mods(mods)
    check_transforms(q, k, v)
    check_qkv(q, k, v)
    scale = check_scale(scale)
    scale = 1 / sqrt(q.shape[3]) if scale is None else scale
    return scale, mods
