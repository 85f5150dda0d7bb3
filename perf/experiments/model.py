"""A small decoder whose attention is an arm of an experiment.

All sparse arms go through the same kernels of this library, and attend to equally many keys: each
query to its own block and to `top_k - 1` others, or to all there are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_flex import Routing, moba_attention, patterns, route, routed_attention

Kind = Literal["full", "moba", "window", "sink window", "global local"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called with q, k and v, `[B, H, L, D]`."""

DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,  # the fastest on Hopper
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
GLOBAL_SHARE = 1 / 2  # of the blocks beside the own one, in "global local"


@dataclass(frozen=True)
class Arm:
    """How a model attends.

    Attributes:
        kind: How blocks are chosen.
        block_size: Keys per block.
        top_k: Blocks a query attends to, its own included.
        sink_blocks: First blocks that "moba" always chooses; they count in `top_k`.
        shared_heads: Whether the query heads of a key/value head choose together: by their sum.
        shared_queries: How many neighbouring queries choose together; see `shared_choice`.
        dense_layers: How many of the last layers keep full attention.
        full_share: Share of the training steps, the last ones, with full attention.
        key_conv: Positions whose keys `KeyConv` mixes; 0 for none. It is a part of the model, and
            stays where the arm is replaced.
    """

    kind: Kind
    block_size: int = 0
    top_k: int = 0
    sink_blocks: int = 0
    shared_heads: bool = False
    shared_queries: int = 1
    dense_layers: int = 0
    full_share: float = 0.0
    key_conv: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        sizes = "" if self.kind == "full" else f" {self.block_size}/{self.top_k}"
        parts = [f"{self.kind}{sizes}"]
        parts += [f"sink {self.sink_blocks}"] if self.sink_blocks else []
        parts += ["heads share"] if self.shared_heads else []
        parts += [f"{self.shared_queries} queries share"] if self.shared_queries > 1 else []
        last = "last layer" if self.dense_layers == 1 else f"last {self.dense_layers} layers"
        parts += [f"{last} full"] if self.dense_layers else []
        parts += [f"last {self.full_share:.0%} of steps full"] if self.full_share else []
        parts += [f"conv {self.key_conv}"] if self.key_conv else []
        return ", ".join(parts)

    def at(self, done: float) -> "Arm":
        """Return how the model attends when a share of the training steps is done."""
        if self.full_share and done >= 1 - self.full_share:
            return FULL
        return replace(self, full_share=0.0)

    @property
    def is_fixed(self) -> bool:
        """Whether places alone decide what is chosen."""
        return self.kind not in ("full", "moba")

    @property
    def is_shared(self) -> bool:
        """Whether several queries choose together."""
        return self.shared_heads or self.shared_queries > 1

    def attended(self, length: int) -> float:
        """Return how many keys a query attends to, averaged over a sequence."""
        if self.kind == "full":
            return (length + 1) / 2
        places = torch.arange(length)
        own = places // self.block_size
        others = own.clamp(max=self.top_k - 1) * self.block_size
        return float((places % self.block_size + 1 + others).double().mean())

    def choose(self, q: Tensor, k: Tensor) -> Routing | None:
        """Return the blocks that queries attend to; None for full attention.

        Fixed patterns are listed once for the heads of a group, which spares them most sorting.
        """
        size, others = self.block_size, self.top_k - 1
        if self.is_fixed:
            q = q[:, : k.shape[1]]
        match self.kind:
            case "full":
                return None
            case "moba":
                q = shared_choice(q, k.shape[1], self.shared_heads, self.shared_queries)
                sinks = self.sink_blocks
                return route(q, k, block_size=size, top_k=self.top_k, sink_blocks=sinks)
            case "window":
                return patterns.sliding_window(q, k, block_size=size, local_blocks=others)
            case "sink window":
                sink, local = min(1, others), max(0, others - 1)
                return patterns.sink_window(
                    q, k, block_size=size, sink_blocks=sink, local_blocks=local
                )
            case "global local":
                return _global_local(q, size, self.top_k)
            case _:
                raise ValueError(f"kind must be one of {Kind}, got {self.kind!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fixed: Routing | None = None) -> Tensor:
        """Attend causally.

        Args:
            q: Queries, `[B, Hq, L, D]`.
            k: Keys, `[B, Hkv, L, D]`.
            v: Values, `[B, Hkv, L, D]`.
            fixed: What `choose` gives, if the arm is fixed; it is the same in all layers.
        """
        if self.kind == "full":
            with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.is_fixed or self.is_shared:
            routing = self.choose(q, k) if fixed is None else fixed
            assert routing is not None
            return routed_attention(q, k, v, routing)
        size, top_k, sinks = self.block_size, self.top_k, self.sink_blocks
        return moba_attention(q, k, v, block_size=size, top_k=top_k, sink_blocks=sinks)


FULL = Arm("full")


def shared_choice(q: Tensor, num_kv_heads: int, heads: bool, neighbours: int) -> Tensor:
    """Return queries by which several choose together: `[B, Hkv, L, D]` if heads share.

    The heads of a group choose by the sum of their queries, so by the sum of their affinities.
    Neighbouring queries, of a tile of positions, choose by the mean over the last `neighbours`
    positions up to the tile's first: a mean over the tile itself would let later tokens decide
    what earlier ones read.
    """
    with torch.no_grad():
        dtype, length = q.dtype, q.shape[2]
        if heads:
            q = q.unflatten(1, (num_kv_heads, -1)).float().sum(2)
        if neighbours > 1:
            short = -(length - 1) % neighbours  # so that a window ends at each tile's first token
            shifted = F.pad(q.float(), (0, 0, neighbours - 1, short))
            tiles = shifted.unflatten(2, (-1, neighbours)).mean(3)
            q = tiles.repeat_interleave(neighbours, dim=2)[:, :, :length]
        return q.to(dtype)


def _global_local(q: Tensor, block_size: int, top_k: int) -> Routing:
    """Choose fixed blocks at even distances, and fill up with the nearest.

    As `patterns.global_local`, but with exactly as many blocks as the other arms at each position:
    where few global blocks lie before a query, more local ones are chosen.
    """
    batch, num_heads, length = q.shape[:3]
    own = torch.arange(length, device=q.device)[:, None] // block_size
    others, num_blocks = top_k - 1, math.ceil(length / block_size)
    every = math.ceil(num_blocks / max(1, round(GLOBAL_SHARE * others)))
    far = torch.arange(0, num_blocks, every, device=q.device)[:others].expand(length, -1)
    far = far.masked_fill(far >= own, -1)
    near = own - torch.arange(1, 2 * others + 1, device=q.device)
    known = (near < 0) | (near % every == 0)
    rank = (far >= 0).sum(1, keepdim=True) + (~known).cumsum(1)
    near = near.masked_fill(known | (rank > others), -1)
    blocks = torch.cat((far, near), dim=1).sort(dim=1, descending=True).values[:, :others]
    chosen = blocks.expand(batch, num_heads, -1, -1)
    return Routing(chosen, block_size, length, length, causal=True)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    key_conv: int = 0
    rope_theta: float = 500_000.0

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers: 8/3 of `dim`, as a multiple of 64."""
        return max(1, round(8 * self.dim / 3 / 64)) * 64


class KeyConv(nn.Module):
    """Mix each number of a key with those of the keys before it, as a residual.

        k'_i = k_i + silu(sum_j weight_j * k_(i - j)),  j = 0 .. width - 1

    Then the keys of a block tell more of each other, and so does their mean. The weights are zero
    at first, so that a model starts as the same function as one without. There are no documents
    here: the first keys of a packed document would see the last ones of the document before, a
    rank of context parallel would need `width - 1` keys of its neighbour, and a cache would have
    to keep as many unmixed keys.

    Args:
        num_heads: Number of key heads.
        head_dim: Size of a key.
        width: Positions to mix.
    """

    def __init__(self, num_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, 1, head_dim, width))

    def forward(self, k: Tensor) -> Tensor:
        """Return the mixed keys, `[B, H, L, D]`."""
        width = self.weight.shape[3]
        windows = F.pad(k, (0, 0, width - 1, 0)).unfold(2, width, 1)
        mixed = (windows * self.weight.flip(3)).sum(4)
        return k + F.silu(mixed).to(k.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `collect` finds it by its `layer_idx`."""

    def __init__(self, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = sizes.dim // sizes.num_heads
        width = (sizes.num_heads + 2 * sizes.num_kv_heads) * self.head_dim
        self.heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        self.qkv = nn.Linear(sizes.dim, width, bias=False)
        self.out = nn.Linear(sizes.dim, sizes.dim, bias=False)
        conv = sizes.key_conv
        self.mix = KeyConv(sizes.num_kv_heads, self.head_dim, conv) if conv else nn.Identity()

    def forward(self, x: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        """Return what attention by `attend` adds to `x` `[B, L, dim]`."""
        qkv = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        attended = attend(rotate(q, angles), rotate(self.mix(k), angles), v)
        return self.out(attended.transpose(1, 2).flatten(2))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of numbers of `[B, H, L, D]` by angles `[L, D / 2]`, in float32."""
    a, b = x.float().chunk(2, dim=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=3).to(x.dtype)


class Layer(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm and added to its input."""

    def __init__(self, sizes: Sizes, layer_idx: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.dim, eps=1e-5) for _ in range(2))
        self.attention = Attention(sizes, layer_idx)
        self.up = nn.Linear(sizes.dim, 2 * sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        """Return the states of the next layer, `[B, L, dim]`."""
        x = x + self.attention(self.norms[0](x), angles, attend)
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=2)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """A language model; `arm` may be set at any time, and changes no weight.

    Args:
        sizes: Sizes.
        arm: How it attends.
    """

    def __init__(self, sizes: Sizes, arm: Arm = FULL) -> None:
        super().__init__()
        self.sizes, self.arm = sizes, arm
        self.embed = nn.Embedding(sizes.vocab_size, sizes.dim)
        self.layers = nn.ModuleList(Layer(sizes, idx) for idx in range(sizes.num_layers))
        self.norm = nn.RMSNorm(sizes.dim, eps=1e-5)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(
                    weight, std=0.02 / math.sqrt(2 * sizes.num_layers) if ends else 0.02
                )

    def attended(self, length: int) -> float:
        """Return how many keys a query attends to, averaged over a sequence and layers."""
        dense = min(self.arm.dense_layers, len(self.layers))
        sparse = len(self.layers) - dense
        keys = sparse * self.arm.attended(length) + dense * FULL.attended(length)
        return keys / len(self.layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, L, vocab]` of the tokens that follow `ids` `[B, L]`."""
        x = self.embed(ids)
        head_dim = self.sizes.dim // self.sizes.num_heads
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        rates = torch.arange(0, head_dim, 2, device=ids.device, dtype=torch.float32) / head_dim
        angles = places[:, None] * self.sizes.rope_theta**-rates
        first_dense = len(self.layers) - self.arm.dense_layers
        fixed: Routing | None = None  # the same in all layers

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal fixed
            if self.arm.is_fixed and fixed is None:
                fixed = self.arm.choose(q, k)
            return self.arm.attend(q, k, v, fixed)

        for idx, layer in enumerate(self.layers):
            x = layer(x, angles, attend if idx < first_dense else FULL.attend)
        return F.linear(self.norm(x), self.embed.weight)
