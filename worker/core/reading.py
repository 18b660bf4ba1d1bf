"""What the metrics say at one moment, and what changed since an earlier one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Sample(NamedTuple):
    """One series of a scrape; `name` without the product's prefix."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by upper bound, cumulative as Prometheus has them; the last bound is infinite."""

    buckets: Sequence[tuple[float, float]] = ()

    @property
    def count(self) -> float:
        """All observations."""
        return self.buckets[-1][1] if self.buckets else 0.0

    def quantile(self, share: float) -> float | None:
        """The value below which `share` (0 to 1) of them lie, estimated like PromQL's `histogram_quantile`; None
        without any, infinite if it is beyond the last finite bound."""
        if not self.count:
            return None
        rank, lower, below = share * self.count, 0.0, 0.0
        for bound, total in self.buckets:
            if total >= rank and total > below:
                return math.inf if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (total - below)
            lower, below = bound, total
        return math.inf


class Reading:
    """The samples of one scrape, taken at unix time `at`."""

    def __init__(self, at: float, samples: Iterable[Sample]) -> None:
        self.at = at
        self._samples: dict[str, list[Sample]] = {}
        for sample in samples:
            self._samples.setdefault(sample.name, []).append(sample)

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels; 0 without any."""
        return sum(sample.value for sample in self._matching(name, labels))

    def knows(self, name: str) -> bool:
        """Whether there is such a metric at all."""
        return name in self._samples

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The same, for each value of one label, in the order of the scrape."""
        sums: dict[str, float] = {}
        for sample in self._matching(name, labels):
            key = sample.labels.get(label, "")
            sums[key] = sums.get(key, 0.0) + sample.value
        return sums

    def histogram(self, name: str, **labels: str) -> Histogram:
        """All histograms with these labels as one."""
        bounds: dict[float, float] = {}
        for sample in self._matching(name + "_bucket", labels):
            bound = float(sample.labels["le"])
            bounds[bound] = bounds.get(bound, 0.0) + sample.value
        return Histogram(sorted(bounds.items()))

    def _matching(self, name: str, labels: Mapping[str, str]) -> Iterable[Sample]:
        wanted = labels.items()
        return (sample for sample in self._samples.get(name, ()) if wanted <= sample.labels.items())


class Change:
    """What counters and histograms gained between two readings of the same counting.

    A counter that went back was started again: then all of it is new, as for PromQL's `increase`.
    """

    def __init__(self, before: Reading, now: Reading) -> None:
        self._before = before
        self._now = now
        self.seconds = now.at - before.at

    def value(self, name: str, **labels: str) -> float:
        """The gain of the samples with these labels together."""
        return _gain(self._before.value(name, **labels), self._now.value(name, **labels))

    def before(self, name: str, **labels: str) -> float:
        """What the samples with these labels were together at the earlier reading."""
        return self._before.value(name, **labels)

    def rate(self, name: str, **labels: str) -> float:
        """The same for each second."""
        return self.value(name, **labels) / self.seconds

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The gain for each value of one label."""
        before = self._before.by(label, name, **labels)
        now = self._now.by(label, name, **labels)
        return {key: _gain(before.get(key, 0.0), total) for key, total in now.items()}

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The observations that came in between."""
        before = dict(self._before.histogram(name, **labels).buckets)
        now = self._now.histogram(name, **labels).buckets
        if any(total < before.get(bound, 0.0) for bound, total in now):
            before = {}
        return Histogram([(bound, total - before.get(bound, 0.0)) for bound, total in now])


def _gain(before: float, now: float) -> float:
    return now - before if now >= before else now
