"""Train a decoder whose sequences are shared among processes, and continue after a stop.

    torchrun --nproc-per-node 2 tests/examples/train_on_several_processes.py run --steps 40

Each process holds two chunks of every sequence (context parallel) and a part of every weight
(FSDP2), and computes activations of a layer anew in backward (activation checkpoints). The state
is saved every 10 steps in the folder `run`; a second call continues there, on any number of
processes. The text is Python's help pages, as bytes.

128K tokens on two GPUs take the options `--bf16 --lr 3e-4 --length 131072 --batch 1 --width 1024
--heads 8 --layers 4 --block-size 512 --top-k 3`.
"""

import argparse
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moba_flex.distributed import context_parallel_attention, shard_sequence

TEXT = torch.tensor(list("".join(topics.values()).encode()))


@dataclass(frozen=True)
class Sizes:
    length: int = 512
    batch: int = 4
    width: int = 64
    heads: int = 4
    layers: int = 2
    block_size: int = 32
    top_k: int = 4


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.mlp.append(nn.Linear(4 * width, width))
        self.gate: Any = {"block_size": sizes.block_size, "top_k": sizes.top_k}

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.compute, x, use_reentrant=False)

    def compute(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        attended = context_parallel_attention(q, k, v, group=None, **self.gate)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(sizes.length, width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sample(step: int, sizes: Sizes) -> Tensor:
    """Return the text of a step, `[batch, length + 1]`, the same on all processes."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - sizes.length - 1, (sizes.batch, 1), generator=generator)
    return TEXT[starts + torch.arange(sizes.length + 1)]


def clock() -> float:
    """Read the clock once the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(folder: Path, sizes: Sizes, options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Decoder(sizes).to(device)
    # Matrix products in bfloat16 with --bf16; weights, sums of gradients and moments in float32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if options.bf16 else None
    sharded: Any = {"mesh": mesh} | ({} if policy is None else {"mp_policy": policy})
    for layer in model.layers:
        if options.compile:
            compiled: Any = layer
            compiled.compute = torch.compile(compiled.compute)
        fully_shard(layer, **sharded)
    fully_shard(model, **sharded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "step": first}

    first = 0
    if (folder / ".metadata").exists():
        saved = state()
        load(saved, checkpoint_id=folder)
        weights, moments = saved["model"], saved["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        first = saved["step"]
    places = shard_sequence(torch.arange(sizes.length, device=device), None, dim=0)
    seconds = []
    for step in range(first, options.steps):
        start = clock()
        ids = sample(step, sizes).to(device)
        given, wanted = (shard_sequence(x, None, dim=1) for x in (ids[:, :-1], ids[:, 1:]))
        logits = model(given, places)
        # FSDP averages gradients over the processes, and the loss is the mean over all of them.
        logits = logits.flatten(0, 1).float()
        summed = F.cross_entropy(logits, wanted.flatten(), reduction="sum")
        loss = summed * dist.get_world_size() / sizes.batch / sizes.length
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        dist.all_reduce(shown)
        seconds.append(clock() - start)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {shown.item() / dist.get_world_size():.4f}", flush=True)
        first = step + 1
        if options.save_every and first % options.save_every == 0:
            save(state(), checkpoint_id=folder)
    if dist.get_rank() == 0 and seconds:
        rate = sizes.batch * sizes.length / median(seconds)
        peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
        print(f"{rate:.0f} tokens/s, at most {peak:.0f} MiB of memory on rank 0", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10, help="steps; 0 for never")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile what surrounds attention")
    for size in fields(Sizes):
        name = "--" + size.name.replace("_", "-")
        parser.add_argument(name, type=int, default=size.default)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    chosen = Sizes(**{size.name: getattr(arguments, size.name) for size in fields(Sizes)})
    train(arguments.folder, chosen, arguments)
    dist.destroy_process_group()
