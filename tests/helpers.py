"""Requests drawn at random, the comparison with the oracle, and a reader of block masks."""

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.library import wrap_triton
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.functional import scaled_dot_product_attention

from moba_flex import Routing, moba_attention, moba_attention_reference, route
from moba_flex.compile.plans import interpreted

WORST: dict[str, tuple[float, int]] = {}


@dataclass(frozen=True)
class Case:
    """One request: sizes, options and the seed of the values."""

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

    @property
    def gate(self) -> dict[str, Any]:
        """Arguments of the gate."""
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "sink_blocks": self.sink_blocks,
            "local_blocks": self.local_blocks,
            "causal": self.causal,
        }

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v; with `ties`, of few small integers."""
        generator = torch.Generator().manual_seed(self.seed)
        q_heads = self.num_kv_heads * self.group

        def draw(num_heads: int, length: int) -> Tensor:
            shape = (self.batch, num_heads, length, self.head_dim)
            if self.ties:
                x = torch.randint(-1, 2, shape, generator=generator).float()
            else:
                x = torch.randn(shape, generator=generator)
            return x.to(self.device, self.dtype)

        return (
            draw(q_heads, self.q_len),
            draw(self.num_kv_heads, self.kv_len),
            draw(self.num_kv_heads, self.kv_len),
        )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_len: int = 700,
    min_block: int = 1,
    groups: Sequence[int] = (1, 3, 4, 8),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Case:
    """Draw a request: any length, any block size, `top_k` to past the number of blocks."""
    kv_len = draw(st.integers(1, max_len))
    blocks = st.integers(min_block, max_len), st.integers(min_block, max(min_block, max_len // 6))
    block_size = draw(st.one_of(*blocks))
    num_blocks = -(-kv_len // block_size)
    sink_blocks, local_blocks = draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (2, 1)]))
    forced = 1 + sink_blocks + local_blocks
    # With ties, blocks of a power of two keys have exact means, so that ties are exact.
    ties = draw(st.booleans())
    if ties:
        block_size = 2 ** (block_size.bit_length() - 1)
        num_blocks = -(-kv_len // block_size)
    return Case(
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from(groups)),
        q_len=draw(st.one_of(st.just(kv_len), st.integers(1, kv_len))),
        kv_len=kv_len,
        head_dim=draw(st.sampled_from([16, 24, 64])),
        block_size=block_size,
        top_k=draw(st.integers(forced, max(forced, min(num_blocks, 24)) + 2)),
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        causal=draw(st.sampled_from([True, True, False])),
        scale=draw(st.sampled_from([None, None, 0.3])),
        dtype=draw(st.sampled_from(list(dtypes))),
        ties=ties,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def needs_interpreter() -> None:
    """Skip what runs Triton kernels on CPU tensors where nothing interprets them."""
    if not interpreted():
        pytest.skip("kernels run for real here, see test_cuda.py, or there is no Triton")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("Triton's interpreter takes NumPy 2.4 from 3.7 on")
    if "Interpreted" not in inspect.getsource(wrap_triton):
        pytest.skip("this PyTorch wraps no interpreted kernels")


def run_script(name: str) -> Any:
    """Run a script of this folder, with Triton's compiler and not its interpreter."""
    compiled = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, f"tests/{name}"],
        env=compiled | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def chosen_blocks(routing: Routing) -> Tensor:
    """Return the blocks that each query attends to, own one included: bool `[B, Hq, Q, N]`."""
    blocks, num_blocks = routing.blocks.long(), routing.num_blocks
    table = torch.zeros(
        *blocks.shape[:3], num_blocks + 1, dtype=torch.bool, device=blocks.device
    ).scatter(3, blocks, True)[..., :-1]
    number = torch.arange(num_blocks, device=blocks.device)
    position = routing.q_offset + torch.arange(routing.q_len, device=blocks.device)
    return table | (number == position[:, None] // routing.block_size)


def token_mask(blocks: Tensor, case: Case) -> Tensor:
    """Return which keys each query sees, bool `[B, Hq, Q, KV]`, given its blocks."""
    kv = torch.arange(case.kv_len, device=blocks.device)
    q = torch.arange(case.kv_len - case.q_len, case.kv_len, device=blocks.device)
    mask = blocks[..., kv // case.block_size]
    return mask & (kv <= q[:, None]) if case.causal else mask


Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def attention(case: Case, plan: Any, *, lse: bool = True) -> Attention:
    """Return `moba_attention` of a case as a function of q, k and v alone."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, aux = moba_attention(
            q,
            k,
            v,
            **case.gate,
            scale=case.scale,
            plan=plan,
            return_aux=AuxRequest(lse=lse),
        )
        return out, aux.lse

    return run


def assert_matches_oracle(
    name: str, case: Case, attend: Attention, *, backward: bool = True
) -> None:
    """Compare output, log-sum-exp and gradients with the oracle in float64.

    The tolerance comes from data: twice the error that the oracle itself, or PyTorch's flash
    attention under the same mask, makes in the dtype of the inputs, and one rounding of the terms
    that make up the largest value. The oracle takes the blocks that the router chose;
    `test_router.py` holds those to the definition.
    """
    q, k, v = (x.requires_grad_(backward) for x in case.inputs())
    blocks = chosen_blocks(route(q, k, **case.gate))
    generator = torch.Generator(case.device).manual_seed(case.seed)

    def reference(dtype: torch.dtype) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse, _ = moba_attention_reference(
                q, k, v, **case.gate, scale=case.scale, dtype=dtype, blocks=blocks
            )
            return out, lse

        return run

    out, lse = attend(q, k, v)
    weights = [
        torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        for x in (out, lse)
        if x is not None
    ]

    def results(out: Tensor, lse: Tensor | None, of: tuple[Tensor, ...]) -> dict[str, Tensor]:
        outputs = {"out": out} if len(weights) == 1 else {"out": out, "lse": lse}
        values = {key: value for key, value in outputs.items() if value is not None}
        found = dict(values)
        if backward:
            cast = [w.to(x.dtype) for w, x in zip(weights, values.values(), strict=True)]
            grads = torch.autograd.grad(list(values.values()), of, cast)
            found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return found

    exact_inputs = tuple(x.detach().double().requires_grad_(backward) for x in (q, k, v))
    actual = results(out, lse, (q, k, v))
    rough = results(*reference(case.dtype)(q, k, v), (q, k, v))
    exact = results(*reference(torch.float64)(*exact_inputs), exact_inputs)
    mask = token_mask(blocks, case)
    roughs = [rough]
    if backward:
        # Flash attention sums dv over tiles of queries, on CPU in the dtype of the inputs.
        flash = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=case.scale, enable_gqa=case.group > 1
        )
        roughs.append({"dv": torch.autograd.grad(flash, v, weights[0].to(flash.dtype))[0]})
    with torch.no_grad():
        rounding = rounding_errors(case, exact_inputs, mask, weights)
    for key, value in exact.items():
        error = (actual[key].double() - value).abs().max().item()
        errors = [(x[key].double() - value).abs().max().item() for x in roughs if key in x]
        tolerance = 2 * max(errors) + rounding[key]
        ratio, count = WORST.get(f"{name} {key}", (0.0, 0))
        WORST[f"{name} {key}"] = max(ratio, error / tolerance if error else 0.0), count + 1
        assert math.isfinite(error), f"{key} must be finite, got error {error} for {case}"
        assert error <= tolerance, f"{key}: error {error} over {tolerance} for {case}"


def rounding_errors(
    case: Case, inputs: tuple[Tensor, ...], mask: Tensor, weights: list[Tensor]
) -> dict[str, float]:
    """Bound what one rounding of each term costs each result, however much the terms cancel.

    Flash attention of any kind rounds scores in float32, and probabilities and outputs in the
    dtype of the inputs.
    """
    q, k, v = inputs
    low, high = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    k, v = k.repeat_interleave(case.group, dim=1), v.repeat_interleave(case.group, dim=1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    score_error = high * (q.abs() @ k.abs().mT * abs(scale) + lse.abs())
    weight = (low + score_error) * scores.softmax(-1)
    grad = weights[0].double().abs()
    share = scores.softmax(-1) @ v.abs()
    delta = (grad * share).sum(-1, keepdim=True)
    if len(weights) == 2:
        delta = delta + weights[1].double().abs().unsqueeze(-1)
    dscore = weight * (grad @ v.abs().mT + delta) * abs(scale)

    def over_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, case.group)).sum(2)

    errors = {
        "out": weight @ v.abs(),
        "lse": score_error.masked_fill(~mask, 0.0),
        "dq": dscore @ k.abs(),
        "dk": over_group(dscore.mT @ q.abs()),
        "dv": over_group(weight.mT @ grad),
    }
    return {key: value.max().item() for key, value in errors.items()}


def listed_tiles(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Read partial and full tiles from the lists of a BlockMask: bool `[B, H, rows, columns]`.

    Checks what FlexAttention's kernels take for granted and do not check.
    """
    q_len, kv_len = mask.seq_lengths
    rows, columns = -(-q_len // mask.BLOCK_SIZE[0]), -(-kv_len // mask.BLOCK_SIZE[1])
    full_count, full_index = mask.full_kv_num_blocks, mask.full_kv_indices
    q_count, q_index = mask.q_num_blocks, mask.q_indices
    full_q_count, full_q_index = mask.full_q_num_blocks, mask.full_q_indices
    assert full_count is not None
    assert full_index is not None
    assert q_count is not None
    assert q_index is not None
    assert full_q_count is not None
    assert full_q_index is not None
    # PyTorch 2.11 indexes the full lists with the strides of the partial ones.
    assert full_index.stride() == mask.kv_indices.stride()
    assert full_q_index.stride() == q_index.stride()

    partial = _table(mask.kv_num_blocks, mask.kv_indices, columns)
    full = _table(full_count, full_index, columns)
    assert partial.shape[2] == rows
    assert not (partial & full).any(), "a tile in both lists counts twice"
    if mask.BLOCK_SIZE[1] > 128:  # kernels would read past the end of the keys
        inside = torch.arange(1, columns + 1, device=full.device) * mask.BLOCK_SIZE[1] <= kv_len
        assert not ((partial | full) & ~inside).any()
    assert torch.equal(partial.mT, _table(q_count, q_index, rows))
    assert torch.equal(full.mT, _table(full_q_count, full_q_index, rows))
    return partial, full


def _table(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """Turn counts `[B, H, rows]` and indices `[B, H, rows, width]` into a table."""
    for x in (count, index):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert count.shape == index.shape[:3]
    assert (count <= index.shape[3]).all(), "more listed than there is room for"
    assert (index >= 0).all()
    assert (index < columns).all(), "unused entries are read too"
    listed = torch.arange(index.shape[3], device=index.device) < count[..., None]
    ascending = index.diff(dim=3) > 0
    assert (ascending | ~listed[..., 1:]).all(), "a short last tile must come last"
    table = torch.zeros(*index.shape[:3], columns + 1, dtype=torch.bool, device=index.device)
    return table.scatter(3, torch.where(listed, index.long(), columns), True)[..., :-1]


def visited_pairs(mask: BlockMask) -> Tensor:
    """Return the pairs that FlexAttention computes, bool `[B, H, Q, KV]`.

    Those of full tiles, and of partial tiles those that the mask_mod lets through.
    """
    partial, full = listed_tiles(mask)
    q_len, kv_len = mask.seq_lengths
    batch, num_heads = partial.shape[:2]

    def spread(tiles: Tensor) -> Tensor:
        wide = tiles.repeat_interleave(mask.BLOCK_SIZE[0], dim=2)
        return wide.repeat_interleave(mask.BLOCK_SIZE[1], dim=3)[:, :, :q_len, :kv_len]

    b, h, q, kv = (torch.arange(n, device=full.device) for n in (batch, num_heads, q_len, kv_len))
    allowed = mask.mask_mod(
        b[:, None, None, None], h[:, None, None], q[:, None], kv.expand(batch, num_heads, 1, -1)
    )
    return spread(full) | (spread(partial) & allowed)


def attend_by_lists(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, *, lse: bool
) -> tuple[Tensor, Tensor]:
    """Do what `moba_flex.compile.flex.attend` does, in eager mode, reading the lists of the mask.

    Rows that see nothing come out as NaN, as they may on CUDA.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visited = visited_pairs(mask)
    scores = (q.float() @ k.float().mT * scale).masked_fill(~visited, -math.inf)
    row_lse = scores.logsumexp(-1)
    weight = torch.where(visited, torch.exp(scores - row_lse[..., None]), 0.0)
    out = (weight @ v.float()).to(q.dtype)
    return torch.where(visited.any(-1, keepdim=True), out, math.nan), row_lse
