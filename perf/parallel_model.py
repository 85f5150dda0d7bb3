"""What attention on 8 to 512 ranks would cost, by a model on paper, and where ways of it cross.

    python -m perf.parallel_model [parallel_2.json] --out perf/results/parallel_model.md

Without a file the inputs are `CLUSTER` and `KERNELS`. With rows that `perf.parallel` wrote, the
times of kernels, the rate within a node and its latency are theirs, and predictions stand beside
what was measured. The ways, of which `context_parallel_attention` is
the third and `ulysses_attention` the fifth:

- "blocks": ranks send the blocks that some query of another rank chose, and get their gradients.
- "queries": queries go to the ranks that hold the blocks they chose, and come back as output and
  log-sum-exp; in backward, gradients of outputs go and those of queries come back.
- "all-gather": all ranks get all keys and values; gradients of them travel by an all-to-all.
- "by node": the same, but each node adds up its gradients before they leave it.
- "ulysses": parts of the sequence are swapped for heads.
- "ring, dense" and "ulysses, dense": attention to all keys, keys and values around a ring while
  ranks compute, or heads swapped.

Ranks compute while nothing travels, except around the ring. A choice of blocks is random, or
queries choose alike in runs of `run`, which is fitted to shares that were counted (perf/log.md).
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
WAYS = (
    *("blocks", "queries", "all-gather", "by node", "ulysses"),
    *("ring, dense", "ulysses, dense"),
)


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Attributes:
        within: Bytes a second that a GPU sends to others of its node.
        between: Likewise to other nodes, by a network card of its own.
        per_node: GPUs of a node.
        latency: Seconds of a collective that sends next to nothing.
        peer: Seconds more of an all-to-all for each other rank.
        copy: Bytes a second, read or written, of a copy on one GPU.
    """

    within: float
    between: float
    per_node: int
    latency: float
    peer: float
    copy: float


@dataclass(frozen=True)
class Kernels:
    """Seconds of the kernels of one GPU.

    Attributes:
        forward: For each query of each head, to attend.
        gate: For each query of each head and block of the sequence, to choose.
        backward: For each query of each head.
        call: For each call, in forward; twice that in backward.
    """

    forward: float
    gate: float
    backward: float
    call: float = 2e-4


@dataclass(frozen=True)
class Work:
    """One sequence and its gate.

    Attributes:
        run: Neighbouring queries of a head that choose alike; 1 for random choices.
    """

    seq_len: int
    block_size: int = 128
    top_k: int = 8
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    run: float = 1.0

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence."""
        return math.ceil(self.seq_len / self.block_size)

    @property
    def keys_and_values(self) -> float:
        """Bytes of keys and values of the whole sequence."""
        return 2.0 * self.seq_len * self.num_kv_heads * self.head_dim * self.itemsize


class Cost(NamedTuple):
    """Seconds of forward and backward on the slowest rank, and bytes that it sends.

    Attributes:
        forward: Seconds of both, in forward.
        both: Seconds, in forward and backward.
        travel: The part of `both` in which ranks wait for each other's data.
        sent: Bytes, in forward and backward.
    """

    forward: float
    both: float
    travel: float
    sent: float


# An H200 of an HGX board, 450 GB/s a way, of which NCCL reaches some four fifths; 400 Gb/s a GPU
# between nodes, of which it reaches nine tenths. Replaced by what a file holds.
CLUSTER = Cluster(within=360e9, between=45e9, per_node=8, latency=3e-5, peer=1e-6, copy=4.3e12)
# Of perf/log.md. Forward: "Prompts in chunks", an H200 at 128K tokens, 32:8 heads. Backward:
# "Fourth round", an H100 at 64K tokens, 16 heads. Dense: its first table.
KERNELS = {
    "128/8": Kernels(
        forward=14.9e-3 / (2**17 * 32),
        gate=6.6e-3 / (2**17 * 32 * 1024),
        backward=5.38e-3 / (2**16 * 16),
    ),
    "512/3": Kernels(
        forward=9.5e-3 / (2**17 * 32),
        gate=1.3e-3 / (2**17 * 32 * 256),
        backward=6.12e-3 / (2**16 * 16),
    ),
    # Here the gate is attention: each query of each head and each block of one key.
    "dense": Kernels(
        forward=0.0,
        gate=28.8e-3 / (2**16 * 16 * 2**16),
        backward=80.1e-3 / (2**16 * 16 * 2**16),
    ),
}


def all_gather(cluster: Cluster, ranks: int, total: float) -> float:
    """Return seconds in which each rank gets `total` bytes, an equal part from each rank.

    Bytes of another node enter a node once, each network card taking a share of them, and go on
    to all its GPUs meanwhile.
    """
    node = min(ranks, cluster.per_node)
    within = total * (ranks - 1) / ranks / cluster.within
    between = total * (ranks - node) / ranks / node / cluster.between
    return cluster.latency + max(within, between) if ranks > 1 else 0.0


def all_to_all(cluster: Cluster, ranks: int, sent: float) -> float:
    """Return seconds in which each rank sends `sent` bytes, an equal part to each other rank."""
    if ranks == 1:
        return 0.0
    node = min(ranks, cluster.per_node)
    within = sent * (node - 1) / (ranks - 1) / cluster.within
    between = sent * (ranks - node) / (ranks - 1) / cluster.between
    return cluster.latency + cluster.peer * (ranks - 1) + max(within, between)


def by_node(cluster: Cluster, ranks: int, total: float) -> float:
    """Return seconds in which sums of `total` bytes from each rank reach their owners.

    An all-to-all within nodes adds up what their ranks have for the same owners; another, among
    GPUs of one place in their nodes, sends the sums.
    """
    node = min(ranks, cluster.per_node)
    inside = replace(cluster, between=math.inf)
    nodes = ranks // node
    first = all_to_all(inside, node, total * (node - 1) / node)
    rest = replace(cluster, per_node=1)
    return first + all_to_all(rest, nodes, total / node * (nodes - 1) / nodes)


def chosen_share(work: Work, ranks: int) -> float:
    """Return the share of the other ranks' blocks that some query of a rank chooses, on average.

    A rank has two chunks. A query of chunk `c` of `2W` chooses among some `c / 2W` of all blocks.
    """
    chunks, pieces = 2 * ranks, 16  # a query near the start of a chunk has fewer blocks
    draws = work.seq_len / chunks * work.num_heads / work.num_kv_heads / work.run / pieces

    def missed(chunk: int) -> float:
        """Return the chance that no query of a chunk chooses a certain block before it."""
        chance = 1.0
        for piece in range(pieces):
            seen = work.num_blocks * (chunk + (piece + 0.5) / pieces) / chunks
            chance *= (1 - min(work.top_k - 1, seen) / seen) ** draws
        return chance

    share = 0.0
    for head in range(ranks):
        tail = chunks - 1 - head
        by_tail = missed(tail)
        share += head * (1 - missed(head) * by_tail) + (tail - head - 1) * (1 - by_tail)
    return share / max(1, chunks - 2) / ranks


def run_of(work: Work, ranks: int, share: float) -> float:
    """Return the `run` at which `chosen_share` is a share that was counted."""
    low, high = 1.0, 2.0**20
    for _ in range(40):
        middle = math.sqrt(low * high)
        if chosen_share(replace(work, run=middle), ranks) > share:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def owners(work: Work, ranks: int) -> float:
    """Return how many other ranks own a block that a query chose, on average, if at random."""
    return (ranks - 1) * (1 - (1 - 1 / ranks) ** (work.top_k - 1))


def load(ranks: int) -> float:
    """Return how much more pairs the first rank owns than the average one, if chosen at random.

    A block at place `x` of 1 is chosen by all queries behind it, `-log x` times as often as the
    average one; the first rank has both the first chunk and the last.
    """

    def up_to(x: float) -> float:
        return x - x * math.log(x) if x else 0.0

    chunk = 1 / (2 * ranks)
    return ranks * (up_to(chunk) + up_to(1.0) - up_to(1 - chunk))


def compute(work: Work, kernels: Kernels, ranks: int, calls: int = 2) -> tuple[float, float]:
    """Return seconds of the kernels of a rank, in forward and in backward."""
    queries = work.seq_len * work.num_heads / ranks
    calls = 1 if ranks == 1 else calls
    forward = queries * (kernels.forward + kernels.gate * work.num_blocks) + calls * kernels.call
    return forward, queries * kernels.backward + 2 * calls * kernels.call


def predict(
    way: str, work: Work, ranks: int, kernels: dict[str, Kernels], cluster: Cluster = CLUSTER
) -> Cost | None:
    """Return what a way costs; None if it cannot have so many ranks."""
    dense = way.endswith("dense")
    gate = "dense" if dense else f"{work.block_size}/{work.top_k}"
    if dense:
        # Each key is a block, in backward too.
        work = replace(work, block_size=1, top_k=1)
        own = kernels["dense"]
        kernel = replace(own, backward=own.backward * work.seq_len)
    else:
        kernel = kernels[gate]
    vector = work.head_dim * work.itemsize
    tokens = work.seq_len / ranks
    total = work.keys_and_values
    others = (ranks - 1) / ranks

    if way.startswith("ulysses"):
        if ranks > work.num_heads:
            return None
        kv_heads = max(work.num_kv_heads, ranks)
        sent = 2 * tokens * (work.num_heads + kv_heads) * vector * others
        one_way = [all_to_all(cluster, ranks, sent * share) for share in _shares(work, kv_heads)]
        forward, backward = compute(work, kernel, ranks, calls=1)
        copies = 2 * sent / cluster.copy
        return _cost(forward, backward, sum(one_way) + copies, sum(one_way) + copies, 2 * sent)
    if way == "ring, dense":
        forward, backward = compute(work, kernel, ranks)
        node = min(ranks, cluster.per_node)
        rate = cluster.within if ranks == node else min(cluster.within, cluster.between)
        step = total / ranks / rate + cluster.latency  # one step of the ring
        steps = ranks - 1
        there = max(0.0, steps * step - forward * others)
        # In backward keys, values and the float32 sums of their gradients go around.
        back = max(0.0, 3 * steps * step - backward * others)
        return _cost(forward, backward, there, back, 4 * total * others)

    forward, backward = compute(work, kernel, ranks)
    block_keys = work.num_blocks * work.num_kv_heads * work.head_dim * 4.0
    if way in ("all-gather", "by node"):
        there = all_gather(cluster, ranks, total) + 2 * total / cluster.copy
        send_back = all_to_all(cluster, ranks, total * others)
        back = by_node(cluster, ranks, total) if way == "by node" else send_back
        back += 4 * total / cluster.copy  # of two chunks, added up; then of all ranks
        return _cost(forward, backward, there, back, 2 * total * others)
    there = all_gather(cluster, ranks, block_keys) if ranks > 1 else 0.0
    if way == "blocks":
        share = chosen_share(work, ranks)
        sent = total * others * share
        choices = all_gather(cluster, ranks, ranks * work.num_blocks * work.num_kv_heads / 8)
        travel = all_to_all(cluster, ranks, sent)
        copies = 4 * sent / cluster.copy
        return _cost(
            forward, backward, there + choices + travel + copies, travel + copies, 2 * sent
        )
    assert way == "queries"
    visits = tokens * work.num_heads * owners(work, ranks)
    out, back = visits * (vector + 8), visits * (vector + 4)  # and numbers of queries; and lse
    again = visits * (vector + 8)  # gradients of outputs, lse and delta
    hops = [all_to_all(cluster, ranks, x) for x in (out, back, again, visits * vector)]
    copies = 4 * (out + back) / cluster.copy
    uneven = load(ranks)
    choosing = tokens * work.num_heads * kernel.gate * work.num_blocks
    forward = choosing + uneven * (forward - choosing)
    there += sum(hops[:2]) + copies
    sent = out + back + again + visits * vector
    return _cost(forward, uneven * backward, there, sum(hops[2:]) + copies, sent)


def _shares(work: Work, kv_heads: int) -> tuple[float, float]:
    """Return the shares of Ulysses' bytes before attention (q, k, v) and behind it (out)."""
    behind = work.num_heads / (2 * (work.num_heads + kv_heads))
    return 1 - behind, behind


def _cost(forward: float, backward: float, there: float, back: float, sent: float) -> Cost:
    return Cost(forward + there, forward + backward + there + back, there + back, sent)


def fit(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Kernels], Cluster]:
    """Return kernels and links by the rows of `perf.parallel`; what they lack is left as it is."""
    kernels, cluster = dict(KERNELS), CLUSTER
    for row in rows:
        if "collectives" in row:
            gathers, swaps = row["collectives"]["all-gather"], row["collectives"]["all-to-all"]
            sizes = sorted(map(int, swaps))
            rates = [sizes[-1] * 1e3 / x[str(sizes[-1])] for x in (gathers, swaps)]
            latency = min(gathers[str(sizes[0])], swaps[str(sizes[0])]) / 1e3
            cluster = replace(cluster, within=sum(rates) / 2, latency=latency)
    for gate in {row["gate"] for row in rows if "gate" in row}:
        of_gate = [row for row in rows if row.get("gate") == gate]
        timed = [row for row in of_gate if "both" in row.get("one", {})]
        if not timed:
            continue
        block_size = 1 if gate == "dense" else int(gate.partition("/")[0])
        points = []
        for row in timed:
            queries = row["seq_len"] * row["num_heads"]
            ahead, both = row["one"]["forward"] / 1e3, row["one"]["both"] / 1e3
            points.append((queries, row["seq_len"] / block_size, ahead, both - ahead))
        if gate == "dense":
            queries, blocks, ahead, back = points[-1]
            kernels[gate] = Kernels(0.0, ahead / queries / blocks, back / queries / blocks)
            continue
        slope, start = _line([(blocks, ahead / queries) for queries, blocks, ahead, _ in points])
        behind = sum(back / queries for queries, _, _, back in points) / len(points)
        kernels[gate] = Kernels(start, slope, behind)
    return kernels, cluster


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and start of a line, of which relative errors are least; never negative."""
    weights = [1 / y**2 for _, y in points]
    s, sx, sy, sxx, sxy = (
        sum(w * f(x, y) for w, (x, y) in zip(weights, points, strict=True))
        for f in (
            lambda x, y: 1.0,
            lambda x, y: x,
            lambda x, y: y,
            lambda x, y: x * x,
            lambda x, y: x * y,
        )
    )
    determinant = s * sxx - sx * sx
    if len(points) < 2 or determinant <= 0:
        return 0.0, sy / s
    slope = max(0.0, (s * sxy - sx * sy) / determinant)
    return slope, max(0.0, (sy - slope * sx) / s)


MEASURED = {
    "context parallel": "all-gather",
    "ulysses": "ulysses",
    "PyTorch, all-gather": "ring, dense",
    "PyTorch, ring": "ring, dense",
}


def beside_measured(
    rows: Sequence[dict[str, Any]], kernels: dict[str, Kernels], cluster: Cluster
) -> str:
    """Return a table of what was measured, and what is predicted for it."""
    lines = [
        "| tokens, gate, ranks | way | measured, ms | predicted, ms | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for name, way in MEASURED.items():
            figures = row.get(name, {})
            if "both" not in figures:
                continue
            dense = row["gate"] == "dense"
            sizes = {x: row[x] for x in ("seq_len", "num_heads", "num_kv_heads", "head_dim")}
            if not dense:
                block_size, top_k = map(int, row["gate"].split("/"))
                sizes |= {"block_size": block_size, "top_k": top_k}
            elif name.startswith("PyTorch"):  # its keys have a head for each head of queries
                sizes["num_kv_heads"] = row["num_heads"]
            way = "ulysses, dense" if dense and way == "ulysses" else way
            cost = predict(way, Work(**sizes), row["ranks"], kernels, cluster)
            assert cost is not None
            ratio = 1e3 * cost.both / figures["both"] - 1
            lines.append(
                f"| {row['seq_len'] // 1024}K, {row['gate']}, {row['ranks']} | {name} | "
                f"{figures['both']:.1f} | {1e3 * cost.both:.1f} | {ratio:+.0%} |"
            )
    return "\n".join(lines)


def table(work: Work, kernels: dict[str, Kernels], cluster: Cluster = CLUSTER) -> str:
    """Return a table of milliseconds of forward and backward by ranks, the least one bold."""
    lines = ["| ranks | " + " | ".join(WAYS) + " |", "| --- |" + " --- |" * len(WAYS)]
    for ranks in RANKS:
        costs = [predict(way, work, ranks, kernels, cluster) for way in WAYS]
        least = min(cost.both for cost in costs if cost)
        cells = []
        for cost in costs:
            if cost is None:
                cells.append("-")
                continue
            text = f"{1e3 * cost.both:.3g} ({cost.travel / cost.both:.0%})"
            cells.append(f"**{text}**" if cost.both == least else text)
        lines.append(f"| {ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossing(
    first: str,
    second: str,
    work: Work,
    kernels: dict[str, Kernels],
    cluster: Cluster = CLUSTER,
) -> int | None:
    """Return the fewest ranks, of `RANKS`, from which on the second way is the faster one."""
    since = None
    for ranks in RANKS:
        one, two = (predict(way, work, ranks, kernels, cluster) for way in (first, second))
        if one is None or two is None:
            continue
        since = (since or ranks) if two.both < one.both else None
    return since


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return the whole page."""
    kernels, cluster = fit(rows)
    topics = run_of(Work(16384, 64, 4, 4, 2), 8, 0.399)
    parts = [
        "# What more ranks would cost, by a model",
        "Written by `python -m perf.parallel_model`; its first lines say what each way is. Times "
        "are of forward and backward in ms, in brackets the share in which data travels; 32 query "
        "and 8 key heads, head_dim 128, bfloat16. The least is bold.",
        f"Links: {cluster.within / 1e9:.0f} GB/s within a node of {cluster.per_node}, "
        f"{cluster.between / 1e9:.0f} GB/s a GPU between nodes, {1e6 * cluster.latency:.0f} us a "
        f"collective; queries that choose alike come in runs of 1, or of {topics:.0f} (topics).",
    ]
    if rows:
        parts += ["## Beside what was measured", beside_measured(rows, kernels, cluster)]
    for seq_len in (2**18, 2**20, 2**22):
        for block_size, top_k in ((128, 8), (512, 3)):
            work = Work(seq_len, block_size, top_k)
            parts += [f"## {seq_len // 1024}K tokens, {block_size}/{top_k}"]
            parts += [table(work, kernels, cluster)]
    pairs = (
        *(("all-gather", "queries"), ("all-gather", "blocks"), ("by node", "queries")),
        *(("all-gather", "ulysses"), ("ulysses", "by node")),
    )
    lines = ["| tokens, gate, run | " + " | ".join(f"{x} to {y}" for x, y in pairs) + " |"]
    lines.append("| --- |" + " --- |" * len(pairs))
    for seq_len in (2**16, 2**18, 2**20, 2**22):
        for block_size, top_k in ((128, 8), (512, 3)):
            for run in (1.0, topics):
                work = Work(seq_len, block_size, top_k, run=run)
                found = [crossing(x, y, work, kernels, cluster) or "never" for x, y in pairs]
                name = f"{seq_len // 1024}K, {block_size}/{top_k}, {run:.0f}"
                lines.append(f"| {name} | " + " | ".join(map(str, found)) + " |")
    parts += ["## From how many ranks on the second way is faster", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.parallel_model", description=__doc__)
    parser.add_argument("file", type=Path, nargs="*", help="JSON of perf.parallel")
    parser.add_argument("--out", type=Path, help="write there, and do not print")
    options = parser.parse_args(arguments)
    rows = [row for file in options.file for row in json.loads(file.read_text())["rows"]]
    text = report(rows)
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
