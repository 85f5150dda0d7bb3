"""Train a decoder whose sequences are shared among processes, and continue after a stop.

    torchrun --nproc-per-node 2 tests/examples/train_on_several_processes.py run --steps 40

Each process holds two chunks of every sequence (context parallel) and a part of every weight
(FSDP2), and computes activations of a layer anew in backward (activation checkpoints). The state
is saved every 10 steps in the folder `run`; a second call continues there, on any number of
processes. The text is Python's help pages, as bytes.
"""

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moba_flex.distributed import context_parallel_attention, shard_sequence

LENGTH, WIDTH, HEADS = 512, 64, 4
TEXT = torch.tensor(list("".join(topics.values()).encode()))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.compute, x, use_reentrant=False)

    def compute(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        attended = context_parallel_attention(q, k, v, group=None, block_size=32, top_k=4)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def sample(step: int) -> Tensor:
    """Return the text of a step, `[4, LENGTH + 1]`, the same on all processes."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - LENGTH - 1, (4, 1), generator=generator)
    return TEXT[starts + torch.arange(LENGTH + 1)]


def train(folder: Path, steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Decoder().to(device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

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
    places = shard_sequence(torch.arange(LENGTH, device=device), None, dim=0)
    for step in range(first, steps):
        ids = sample(step).to(device)
        given, wanted = (shard_sequence(x, None, dim=1) for x in (ids[:, :-1], ids[:, 1:]))
        logits = model(given, places)
        # FSDP averages gradients over the processes, and the loss is the mean over all of them.
        summed = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        loss = summed * dist.get_world_size() / wanted.shape[0] / LENGTH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        dist.all_reduce(shown)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {shown.item() / dist.get_world_size():.4f}", flush=True)
        first = step + 1
        if first % 10 == 0:
            save(state(), checkpoint_id=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    train(arguments.folder, arguments.steps)
    dist.destroy_process_group()
