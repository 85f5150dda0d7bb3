"""Time the prefill of a prompt in chunks, through a cache, beside one pass.

    python -m perf.prefill --out perf/results/prefill_h200.json

A chunk appends its keys and values, and its queries attend, routing inside. Milliseconds are the
least of several prefills of the whole prompt, from the first call to the end of the last kernel.
"captured" replays one CUDA graph for each chunk, whose inputs are copied to where it reads them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_flex import BlockCache, cached_attention, moba_attention
from perf.decode import DIM, GATES, HEADS, KV_HEADS, draw
from perf.timing import captured, synced_clock

ROUNDS = 5


def milliseconds(prefill: Callable[[], Any]) -> float:
    """Return the least time of a prefill, after one that compiles."""
    prefill()
    times = []
    for _ in range(ROUNDS):
        start = synced_clock()
        prefill()
        times.append(synced_clock() - start)
    return 1e3 * min(times)


def measure(kv_len: int, chunk: int, gate: tuple[int, int]) -> dict[str, Any]:
    """Return figures of one prompt: a cache that grows, one allocated once, and ragged rows."""
    block_size, top_k = gate
    q, k, v = (draw(1, heads, kv_len, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    static = BlockCache(block_size, max_len=kv_len)
    start = torch.zeros(1, dtype=torch.int32, device=q.device)

    def one_pass() -> Tensor:
        return moba_attention(q, k, v, block_size=block_size, top_k=top_k)

    def in_chunks(cache: BlockCache, first: Tensor | None = None) -> Tensor:
        cache.reset()
        for at in range(0, kv_len, chunk):
            some = slice(at, at + chunk)
            cache.append(k[:, :, some], v[:, :, some], start=first)
            out = cached_attention(q[:, :, some], cache, top_k=top_k)
            first = None
        return out

    def one_chunk() -> Tensor:
        static.append(*inputs[1:])
        return cached_attention(inputs[0], static, top_k=top_k)

    inputs = [x[:, :, :chunk].clone() for x in (q, k, v)]
    graph, _ = captured(one_chunk)

    def in_replays() -> None:
        static.reset()
        for at in range(0, kv_len, chunk):
            for into, x in zip(inputs, (q, k, v), strict=True):
                into.copy_(x[:, :, at : at + chunk])
            graph.replay()

    want = one_pass()[:, :, -chunk:].float()
    error = (in_chunks(static).float() - want).norm() / want.norm()
    row = {"kv_len": kv_len, "chunk": chunk, "gate": f"{block_size}/{top_k}"}
    times = {
        "one pass": milliseconds(one_pass),
        "growing": milliseconds(lambda: in_chunks(BlockCache(block_size))),
        "static": milliseconds(lambda: in_chunks(static)),
        "captured": milliseconds(in_replays),
        "ragged": milliseconds(lambda: in_chunks(BlockCache(block_size), start)),
    }
    ratios = {f"{name} / one pass": x / times["one pass"] for name, x in times.items()}
    return {**row, "error": float(error), **times, **ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.prefill", description=__doc__)
    parser.add_argument("--kv-len", type=int, nargs="+", default=[2**17])
    parser.add_argument("--chunk", type=int, nargs="+", default=[2**12])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for kv_len in options.kv_len:
        for chunk in options.chunk:
            for gate in GATES:
                rows.append(measure(kv_len, chunk, gate))
                print(json.dumps(rows[-1]), flush=True)
    if options.out:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
