"""The model of the cost on many ranks, by small cases that were computed by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moba_flex.distributed import communication_bytes
from perf import parallel_model as model
from perf.parallel_model import Cluster, Kernels, Work, predict

CLUSTER = Cluster(within=100, between=10, per_node=2, latency=1, peer=0.5, copy=math.inf)
KERNELS = {
    "2/2": Kernels(forward=1, gate=0.25, backward=2, call=0),
    "dense": Kernels(forward=0, gate=0.5, backward=1, call=0),
}
# 8 tokens in 4 blocks: 128 bytes of keys and values, 16 queries of heads.
WORK = Work(8, block_size=2, top_k=2, num_heads=2, num_kv_heads=1, head_dim=4)


def test_collectives() -> None:
    assert model.all_gather(CLUSTER, 1, 400) == 0
    assert model.all_gather(CLUSTER, 2, 400) == 1 + 200 / 100
    # Each of two cards takes half of the 200 bytes of the other node.
    assert model.all_gather(CLUSTER, 4, 400) == 1 + 100 / 10
    assert model.all_to_all(CLUSTER, 2, 200) == 1 + 0.5 + 200 / 100
    assert model.all_to_all(CLUSTER, 4, 300) == 1 + 3 * 0.5 + 200 / 10
    # 200 bytes within a node, then 100 to the other one.
    assert model.by_node(CLUSTER, 4, 400) == (1 + 0.5 + 200 / 100) + (1 + 0.5 + 100 / 10)


def test_shares_of_blocks() -> None:
    many = Work(2**20, 2**14, 8)  # so many queries that they choose all blocks before them
    # Of 4 chunks the first rank, with the last one, needs both others, the second only one.
    assert model.chosen_share(many, 2) == pytest.approx((1 + 0.5) / 2)
    assert model.chosen_share(Work(2**20, 2**14, 8, run=1e15), 2) == pytest.approx(0, abs=1e-6)
    counted = Work(16384, 64, 4, num_heads=4, num_kv_heads=2)
    assert model.chosen_share(counted, 8) == pytest.approx(0.746, abs=0.01)  # perf/log.md
    alike = Work(16384, 64, 4, 4, 2, run=model.run_of(counted, 8, 0.399))
    assert model.chosen_share(alike, 8) == pytest.approx(0.399, abs=1e-3)


def test_owners_and_load() -> None:
    assert model.owners(WORK, 4) == pytest.approx(3 / 4)  # one choice
    assert model.owners(Work(8, top_k=3), 2) == pytest.approx(1 - 1 / 4)
    assert model.load(1) == pytest.approx(1)
    x = 1 / 4
    first, last = x - x * math.log(x), 1 - ((1 - x) - (1 - x) * math.log(1 - x))
    assert model.load(2) == pytest.approx(2 * (first + last))


@pytest.mark.parametrize(
    ("way", "forward", "backward", "travel", "sent"),
    [
        # 8 queries of heads a rank, a unit each and a quarter of one for each of 4 blocks.
        ("all-gather", 16, 16, (1 + 0.64) + (1.5 + 0.64), 128),
        ("by node", 16, 16, (1 + 0.64) + (1.5 + 0.64), 128),
        # 4 tokens of 8 vectors (k and v twice) of 8 bytes; half of it for the other rank.
        ("ulysses", 16, 16, 4 * 1.5 + 2 * 1.28, 256),
        # 8 blocks of one key for 8 queries; the ring's 64 bytes hide behind half of it.
        ("ring, dense", 32, 64, 0, 256),
        ("ulysses, dense", 32, 64, 4 * 1.5 + 2 * 1.28, 256),
    ],
)
def test_ways_on_two_ranks(
    way: str, forward: float, backward: float, travel: float, sent: float
) -> None:
    cost = predict(way, WORK, 2, KERNELS, CLUSTER)
    assert cost is not None
    assert cost.travel == pytest.approx(travel)
    assert cost.both == pytest.approx(forward + backward + travel)
    assert cost.sent == pytest.approx(sent)


def test_chosen_blocks_and_queries_that_travel() -> None:
    cost = predict("blocks", WORK, 2, KERNELS, CLUSTER)
    assert cost is not None
    share = model.chosen_share(WORK, 2)
    assert cost.sent == pytest.approx(128 * share)
    assert cost.both - cost.travel == pytest.approx(16 + 16)
    cost = predict("queries", WORK, 2, KERNELS, CLUSTER)
    assert cost is not None
    # Half of 8 queries go: 8 bytes and 8 more, back with 4, again with 8, and 8 of gradients.
    assert cost.sent == pytest.approx(4 * (16 + 12 + 16 + 8))
    assert cost.both - cost.travel == pytest.approx(8 + model.load(2) * (8 + 16))


@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_bytes_are_those_of_the_library(ranks: int) -> None:
    sizes: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    sent = communication_bytes(ranks=ranks, seq_len=2**18, **sizes)
    for way, expected in (("all-gather", sent.context_parallel), ("ulysses", sent.ulysses)):
        cost = predict(way, Work(2**18), ranks, model.KERNELS)
        assert cost is not None
        assert cost.sent == pytest.approx(2 * expected)


def test_heads_are_not_split() -> None:
    assert predict("ulysses", WORK, 4, KERNELS, CLUSTER) is None


def test_crossing_is_for_good() -> None:
    """The second way counts from where it stays faster."""
    found = model.crossing("all-gather", "queries", Work(2**20, 512, 3), model.KERNELS)
    assert found is not None
    for ranks in model.RANKS:
        ways = [
            predict(way, Work(2**20, 512, 3), ranks, model.KERNELS)
            for way in ("all-gather", "queries")
        ]
        assert ways[0] is not None
        assert ways[1] is not None
        if ranks >= found:
            assert ways[1].both < ways[0].both
        if ranks == found / 2:
            assert ways[1].both >= ways[0].both
    assert model.crossing("ring, dense", "ulysses, dense", Work(2**18), model.KERNELS) is None


def rows() -> list[dict[str, Any]]:
    """Return rows as `perf.parallel` writes them, of kernels that follow the model."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ranks": 2}
    found: list[dict[str, Any]] = [
        {
            "collectives": {
                "all-gather": {"1024": 0.02, "1000000": 0.01},
                "all-to-all": {"1024": 0.03, "1000000": 0.005},
            }
        }
    ]
    for seq_len in (1024, 4096):
        queries = seq_len * 4
        forward = queries * (2e-6 + 1e-8 * seq_len / 128)  # in ms below
        one = {"forward": 1e3 * forward, "both": 1e3 * (forward + queries * 5e-6)}
        ours = {"forward": 600.0, "both": 1e3 * (forward + queries * 5e-6)}
        found.append(
            sizes | {"seq_len": seq_len, "gate": "128/8", "one": one, "context parallel": ours}
        )
    dense = {"forward": 1e3 * 4096**2 * 4 * 1e-9, "both": 1e3 * 4096**2 * 4 * 4e-9}
    found.append(sizes | {"seq_len": 4096, "gate": "dense", "one": dense, "ulysses": dense})
    found[-1]["PyTorch, ring"] = {"error": "none"}
    return found


def test_fit_recovers_the_times() -> None:
    kernels, cluster = model.fit(rows())
    assert kernels["128/8"].forward == pytest.approx(2e-6)
    assert kernels["128/8"].gate == pytest.approx(1e-8)
    assert kernels["128/8"].backward == pytest.approx(5e-6)
    assert kernels["dense"].gate == pytest.approx(1e-9)
    assert kernels["dense"].backward == pytest.approx(3e-9)
    assert kernels["512/3"] == model.KERNELS["512/3"]
    assert cluster.within == pytest.approx((1e11 + 2e11) / 2)
    assert cluster.latency == pytest.approx(2e-5)


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "parallel.json", tmp_path / "page.md"
    file.write_text(json.dumps({"rows": rows()}))
    model.main([str(file), "--out", str(out)])
    page = out.read_text()
    # Twice the time of one rank was "measured", so that half of it is predicted.
    assert "| 4K, 128/8, 2 | context parallel | 119.9 | 6" in page
    assert "| 4K, dense, 2 | ulysses | " in page
    assert "ring |" not in page.partition("## 256K")[0]
    model.main([])
    assert "Beside what was measured" not in capsys.readouterr().out
