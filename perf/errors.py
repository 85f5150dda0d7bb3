"""How exact are moba_flex and flash attention? Each beside its own function in float64.

    python -m perf.errors [--shape 32K/128/8] [--json FILE]

All queries are compared, and the gradients of q, k and v; MoBA under the blocks that the library's
gate chose. Each runs twice: moba_flex should give the same bits.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba_flex import route
from perf.check import attend_rows, by_head, relative_errors
from perf.peers import PEERS, Attention
from perf.shapes import ROWS, TINY, Shape, draw
from perf.tables import FLASH, OURS
from perf.timing import machine_info

RESULTS = ("out", "dq", "dk", "dv")
CHUNK = 1024  # queries at a time: at 32K tokens their scores are 256 MiB a head


def main(argv: list[str] | None = None) -> None:
    """Print the errors, and write them to a file if asked."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Compare implementations with float64.")
    parser.add_argument("--device", choices=ROWS, default=default, help=f"(here: {default})")
    parser.add_argument("--shape", help="such as 32K/128/8 (default) or tiny (default on CPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write them")
    args = parser.parse_args(argv)
    rows = ROWS[args.device].items()  # flash attention knows no layouts
    known = {shape.name: shape for name, of in rows if name != "layouts" for shape in of}
    known[TINY.name] = TINY
    name = args.shape or ("32K/128/8" if args.device == "cuda" else TINY.name)
    if name not in known:
        parser.error(f"--shape must be one of {', '.join(known)}, got {name}")
    device = torch.device(args.device)
    found = measure(known[name], device)
    print(f"{name}: relative error" + "".join(f"{result:>10}" for result in RESULTS))
    for row, errors in found["errors"].items():
        print(f"{row:24}" + "".join(f"{error:10.3g}" for error in errors.values()))
    print("two runs bitwise equal:", found["bitwise_equal"])
    if args.json:
        document = {"machine_info": machine_info(device), "shape": name, **found}
        args.json.write_text(json.dumps(document, indent=4) + "\n")


def measure(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Measure the relative errors of both and their ratio, and compare two runs of each."""
    q, k, v = (x.requires_grad_() for x in draw(shape, device))
    grad = torch.randn_like(q)
    blocks = route(q, k, block_size=shape.block_size, top_k=shape.top_k).blocks
    errors, equal = {}, {}
    for peer, listed, block_size in (
        (OURS, blocks, shape.block_size),
        (FLASH, blocks[..., :0], shape.seq_len),  # all keys are in the own block
    ):
        attend = PEERS[peer].setup(shape, device)
        results, again = (run(attend, q, k, v, grad) for _ in range(2))
        equal[peer] = all(map(torch.equal, results, again))
        errors[peer] = relative_errors(beside_exact(results, q, k, v, grad, listed, block_size))
    errors["ratio"] = [ours / flash for ours, flash in zip(*errors.values(), strict=True)]
    named = {row: dict(zip(RESULTS, of, strict=True)) for row, of in errors.items()}
    return {"errors": named, "bitwise_equal": equal}


def run(attend: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Return output and gradients."""
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def beside_exact(
    results: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    blocks: Tensor,
    block_size: int,
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the results of each key head, and what they are in float64."""
    for of_q, of_k in by_head(q, k):
        indices = (of_q, of_q, of_k, of_k)
        actual = [x[index] for x, index in zip(results, indices, strict=True)]
        head = (q[of_q], k[of_k], v[of_k], grad[of_q], blocks[of_q])
        yield actual, exact(*head, block_size)


def exact(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, blocks: Tensor, block_size: int
) -> list[Tensor]:
    """Compute output and gradients of a key head in float64, a chunk of queries at a time."""
    k, v = (x.detach().double().requires_grad_() for x in (k, v))
    out = torch.empty_like(q, dtype=torch.float64)
    dq, dk, dv = torch.empty_like(out), torch.zeros_like(k), torch.zeros_like(v)
    block = torch.arange(k.shape[2], device=k.device) // block_size
    for rows in torch.arange(q.shape[2], device=q.device).split(CHUNK):
        q_rows = q[:, :, rows].detach().double().requires_grad_()
        chunk = attend_rows(q_rows, k, v, rows, blocks[:, :, rows], block)
        leaves = (q_rows, k, v)
        shares = torch.autograd.grad(chunk, leaves, grad[:, :, rows].double())
        out[:, :, rows], dq[:, :, rows] = chunk.detach(), shares[0]
        dk += shares[1]
        dv += shares[2]
    return [out, dq, dk, dv]


if __name__ == "__main__":
    main()
