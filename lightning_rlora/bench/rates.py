"""Learning rates and the losses they end with: the best one, and those that are nearly as good."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_rlora.bench.results import Result


@dataclass(frozen=True)
class RateWindow:
    """The rates around the best one whose loss is within a share of the best.

    Attributes:
        low: Lower end, interpolated in the rate's logarithm.
        high: Upper end.
        open_low: Whether the window reaches down to the lowest rate tried, so that it may be wider.
        open_high: The same above.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def ratio(self) -> float:
        """How many times the lowest rate the highest one is."""
        return self.high / self.low


def mean_losses(group: Iterable[Result]) -> dict[float, float]:
    """Mean final loss over seeds by rate, in the order of the rates; infinite where a seed diverged."""
    losses = defaultdict(list)
    for result in group:
        losses[result.rate].append(result.loss)
    return {rate: statistics.fmean(losses[rate]) for rate in sorted(losses)}


def comparable(group: Sequence[Result]) -> dict[float, float]:
    """The mean losses of the rates that have the most seeds, and of those that diverged, which no seed can mend.

    A rate with a single lucky seed must not win over one with three.
    """
    by_rate = mean_losses(group)
    seeds = Counter(result.rate for result in group)
    most = max((seeds[rate] for rate, loss in by_rate.items() if math.isfinite(loss)), default=0)
    return {rate: loss for rate, loss in by_rate.items() if seeds[rate] >= most or math.isinf(loss)}


def best_rate(by_rate: Mapping[float, float]) -> float:
    """The rate of the lowest loss; the lower one of two."""
    return min(by_rate, key=lambda rate: (by_rate[rate], rate))


def rate_window(by_rate: Mapping[float, float], share: float = 0.01) -> RateWindow:
    """The rates next to the best one and to each other whose loss is at most (1 + share) times the best loss.

    Between two rates the loss is taken as linear in the rate's logarithm; towards a rate that diverged nothing is
    known, and the window ends at the last rate that did not.
    """
    rates = sorted(by_rate)
    best = best_rate(by_rate)
    if math.isinf(by_rate[best]):
        return RateWindow(best, best, False, False)
    limit = (1 + share) * by_rate[best]

    def end(outwards: Sequence[float]) -> tuple[float, bool]:
        inside = best
        for rate in outwards:
            if by_rate[rate] > limit:
                if math.isinf(by_rate[rate]):
                    return inside, False
                part = (limit - by_rate[inside]) / (by_rate[rate] - by_rate[inside])
                return math.exp(math.log(inside) + part * (math.log(rate) - math.log(inside))), False
            inside = rate
        return inside, True

    place = rates.index(best)
    low, open_low = end(rates[:place][::-1])
    high, open_high = end(rates[place + 1 :])
    return RateWindow(low, high, open_low, open_high)
