"""Train a decoder of two MoBA layers to copy real text, then run the same weights dense.

A sample is 64 words of Python's help pages, then the same words again. The second half can only
be predicted by looking back at the first, in a block that the gate has to find.
"""

import argparse
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moba_flex import MoBAAttention

PASSAGE, VOCABULARY, WIDTH = 64, 1000, 64
WORDS = " ".join(topics.values()).split()
NUMBERS = {word: i for i, (word, _) in enumerate(Counter(WORDS).most_common(VOCABULARY))}
TEXT = torch.tensor([NUMBERS[word] for word in WORDS if word in NUMBERS])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 8 * 16)  # 4 query, 2 key and 2 value heads of 16
        self.attention = MoBAAttention(block_size=16, top_k=3)  # has no parameters

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (8, 16)).transpose(1, 2).split((4, 2, 2), 1)
        return x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH // 2)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH // 2))

    def loss(self, ids: Tensor) -> Tensor:
        word = self.words(ids[:, :-1])
        x = torch.cat((word, F.pad(word, (0, 0, 1, -1))), dim=-1)  # and the one before it
        logits = self.head(self.layers(x))[:, PASSAGE - 1 :] @ self.words.weight.T
        return F.cross_entropy(logits.flatten(0, 1), ids[:, PASSAGE:].flatten())


def samples(count: int) -> Tensor:
    places = torch.randint(len(TEXT) - PASSAGE, (count, 1)) + torch.arange(PASSAGE)
    return TEXT[places].repeat(1, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    torch.manual_seed(0)
    model, steps = Decoder(), parser.parse_args().steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        (loss := model.loss(samples(8))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    fresh = samples(64)
    print(f"MoBA, 3 of 8 blocks: loss {model.loss(fresh).item():.3f}")
    for module in model.modules():
        if isinstance(module, MoBAAttention):
            module.top_k = 8  # all blocks: dense attention
    print(f"dense, same weights: loss {model.loss(fresh).item():.3f}")
