"""Time decode steps in CUDA graphs: the cache's update, routing and attention, beside dense SDPA.

    python -m perf.decode --out perf/results/decode_h200.json

A step appends one token to each row and attends to its blocks. Microseconds are the least of
several replays of a graph of 20 steps. Queries and keys are random, so that the heads of a group
seldom choose the same block; or they are those that `perf.record` wrote.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_flex import BlockCache, cached_attention, moba_attention, route
from perf.timing import captured

HEADS, KV_HEADS, DIM = 32, 8, 128
STEPS = 20
REPLAYS = 5
CHUNK = 8192
GATES = ((128, 8), (512, 3))
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def microseconds(step: Callable[[], Any]) -> float:
    """Return the time of a step in a CUDA graph."""
    graph, _ = captured(step, STEPS)
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / STEPS * 1e3)
    return min(times)


def copy_rate() -> float:
    """Return how many bytes a second the device reads and writes in a copy."""
    x = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / microseconds(lambda: y.copy_(x)) * 1e6


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def filled(
    batch: int, kv_len: int, block_size: int, recorded: dict[str, Tensor] | None
) -> tuple[BlockCache, list[Tensor]]:
    """Return a cache with room for the steps that are timed, and queries, keys and values."""
    cache = BlockCache(block_size, max_len=kv_len)
    length = kv_len - 2 * (STEPS * (REPLAYS + 2) + 3)
    if recorded is not None:
        q, k, v = (recorded[name].cuda() for name in "qkv")
        cache.append(*(x[:, :, :length].expand(batch, -1, -1, -1) for x in (k, v)))
        # Queries of different rows lie apart, so that they choose different blocks.
        places = length - 1 - 61 * torch.arange(batch, device="cuda")
        return cache, [x[0, :, places].transpose(0, 1).unsqueeze(2) for x in (q, k, v)]
    for at in range(0, length, CHUNK):
        number = min(CHUNK, length - at)
        cache.append(*(draw(batch, KV_HEADS, number, DIM) for _ in range(2)))
    return cache, [draw(batch, heads, 1, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def measure(
    batch: int,
    kv_len: int,
    gate: tuple[int, int],
    rate: float,
    more: Callable[..., dict[str, Any]] | None = None,
    recorded: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return figures of one cache.

    Args:
        batch: Rows of the batch.
        kv_len: Slots of the cache.
        gate: `block_size` and `top_k`.
        rate: Bytes a second of a copy.
        more: Measures what else there is to compare; takes queries, the cache and `top_k`.
        recorded: Queries, keys and values of a model; None for random ones.
    """
    block_size, top_k = gate
    cache, (q, k, v) = filled(batch, kv_len, block_size, recorded)
    (num_heads, _, dim), num_kv_heads = q.shape[1:], k.shape[1]
    length = int(cache.stop[0])
    row: dict[str, Any] = {"kv_len": kv_len, "batch": batch, "gate": f"{block_size}/{top_k}"}

    def dense(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, cache.keys, cache.values, enable_gqa=True)

    def attend() -> Tensor:
        return cached_attention(q, cache, top_k=top_k)

    def step() -> Tensor:
        return cached_attention(q, cache, k, v, top_k=top_k)

    def two_calls() -> Tensor:  # as a model of transformers does
        cache.append(k, v)
        return attend()

    if batch * kv_len <= 2**20:
        seen = cache.keys[:, :, :length], cache.values[:, :, :length]
        want = moba_attention(q, *seen, block_size=block_size, top_k=top_k, plan="fused").float()
        row["error"] = float((attend().float() - want).norm() / want.norm())
        blocks = route(q, seen[0], block_size=block_size, top_k=top_k).blocks
        lists = blocks.reshape(batch * num_kv_heads, -1).tolist()
        row["distinct_share"] = sum(len(set(x)) for x in lists) / max(1, blocks.numel())
    row |= {name: microseconds(partial(dense, backend)) for name, backend in DENSE.items()}
    row["attend"] = microseconds(attend)
    if more is not None:
        row |= more(q, cache, top_k)
    row["step"], row["two_calls"] = microseconds(step), microseconds(two_calls)
    needed = 2 * num_kv_heads * (length // block_size) * dim
    needed += 4 * num_heads * top_k * block_size * dim
    row["over_cudnn"] = row["cudnn"] / row["step"]
    row |= {"bytes": batch * needed, "share": batch * needed / rate / row["step"] * 1e6}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.decode", description=__doc__)
    parser.add_argument("--kv-len", type=int, nargs="+", default=[2**15, 2**17, 2**19])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--recorded", type=Path, help="of perf.record, of at least --kv-len keys")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rate, rows = copy_rate(), []
    recorded = torch.load(options.recorded) if options.recorded else None
    for kv_len in options.kv_len:
        for batch in options.batch:
            for gate in GATES:
                rows.append(measure(batch, kv_len, gate, rate, recorded=recorded))
                print(json.dumps(rows[-1]), flush=True)
                torch.cuda.empty_cache()
    if options.out:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rate": rate}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
