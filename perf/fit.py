"""What a token costs as sequences grow, fitted to a sweep of lengths."""

import math
from statistics import linear_regression, mean
from typing import NamedTuple

import torch

SHORTEST = 16 * 1024  # tokens; below, a GPU waits for launches


class Fit(NamedTuple):
    """Seconds a token of the two parts of a forward pass.

    Attributes:
        attend: Of attention, regrouping and merge included: the mean over lengths.
        growth: Its change at each doubling of the length, as a share of the mean.
        route_call: Seconds of routing that no token adds to.
        route: Of routing, but for what follows.
        route_block: Of routing, for each block of the sequence.
        misfit: Largest relative error of this line.
        overtakes: Tokens at which routing costs as much as attention.
    """

    attend: float
    growth: float
    route_call: float
    route: float
    route_block: float
    misfit: float
    overtakes: float

    def __str__(self) -> str:
        return (
            f"attention {self.attend * 1e9:.3g} ns a token, {self.growth:+.1%} at each doubling; "
            f"routing {self.route * 1e9:.3g} ns and {self.route_block * 1e12:.3g} ps for each "
            f"block, beside {self.route_call * 1e3:.2g} ms, within {self.misfit:.0%}; overtakes "
            f"at {self.overtakes:,.0f} tokens"
        )


def fit(attend: dict[int, float], route: dict[int, float], block_size: int) -> Fit | None:
    """Fit a constant to attention and, beside a cost of each call, a line in blocks to routing.

    Args:
        attend: Seconds of attention, by length.
        route: Seconds of routing, by length.
        block_size: Keys per routed block.

    Returns:
        The fit, in which each length weighs the same by its relative error; None if fewer than
        four lengths were measured.
    """
    lengths = sorted(n for n in attend.keys() & route.keys() if n >= SHORTEST)
    if len(lengths) < 4:
        return None
    costs = [attend[n] / n for n in lengths]
    constant = mean(costs)
    growth = linear_regression([math.log2(n) for n in lengths], costs).slope / constant
    # The line, divided by what it should be, is near 1 at each length.
    shares = [[1 / route[n], n / route[n], n / block_size * n / route[n]] for n in lengths]
    line = torch.tensor(shares, dtype=torch.float64)
    one = torch.ones_like(line[:, :1])
    solution = torch.linalg.lstsq(line, one).solution
    call, base, slope = solution.flatten().tolist()
    misfit = float((line @ solution - one).abs().max())
    overtakes = (constant - base) / slope * block_size if slope > 0 else math.inf
    return Fit(constant, growth, call, base, slope, misfit, overtakes)
