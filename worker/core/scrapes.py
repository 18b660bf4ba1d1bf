"""What the scrapes of several processes add up to, in Prometheus' text format 0.0.4."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

PREFIX: Final = "qris_expire_"

Rule = Callable[[float, float], float]


def _first(one: float, _other: float) -> float:
    return one


def _farthest(one: float, other: float) -> float:
    """The one farther from zero, with its sign."""
    return max(one, other, key=abs)


def _soonest(one: float, other: float) -> float:
    """The smaller one; 0 stands for none."""
    return min(one or math.inf, other or math.inf) if one or other else 0.0


def _sum(one: float, other: float) -> float:
    return one + other


GAUGES: Final[Mapping[str, Rule]] = {
    PREFIX + "in_flight": _sum,
    PREFIX + "senders": _sum,
    PREFIX + "oldest_command_timestamp_seconds": _soonest,
    PREFIX + "publishes_unconfirmed": _sum,
    PREFIX + "breaker_state": max,
    PREFIX + "consumption_paused": max,
    PREFIX + "last_outcome_timestamp_seconds": max,
    PREFIX + "clock_skew_seconds": _farthest,
    PREFIX + "broker_connected": min,
    PREFIX + "held_until_timestamp_seconds": _soonest,
    PREFIX + "start_timestamp_seconds": _soonest,
    PREFIX + "token_expiry_timestamp_seconds": _soonest,
    PREFIX + "build_info": _first,
}
"""How the gauges of several processes make one; a gauge that is not listed is summed."""

LASTING_GAUGES: Final = frozenset({PREFIX + "last_outcome_timestamp_seconds"})
"""Gauges that stay true when their process is gone."""


@dataclass
class _Metric:
    """One metric of a scrape: its HELP and TYPE lines as they came, and its samples by series, in order."""

    name: str
    lines: list[str] = field(default_factory=list)
    kind: str = "untyped"
    samples: dict[str, float] = field(default_factory=dict)

    @property
    def lasts(self) -> bool:
        return self.kind != "gauge" or self.name in LASTING_GAUGES


def _read(text: str) -> Iterator[_Metric]:
    """The metrics of a scrape in format 0.0.4 as our children write it: HELP, TYPE, samples without times."""
    metric: _Metric | None = None
    for line in text.split("\n"):
        if line.startswith("# "):
            _, keyword, name, *rest = line.split(" ", 3)
            if metric is None or name != metric.name:
                if metric:
                    yield metric
                metric = _Metric(name)
            metric.lines.append(line)
            if keyword == "TYPE":
                metric.kind = rest[0]
        elif line and metric:
            # From the right: a label's value may hold blanks, the number never does.
            series, _, value = line.rpartition(" ")
            metric.samples[series] = float(value)
    if metric:
        yield metric


def _write(metrics: Iterable[_Metric]) -> str:
    lines: list[str] = []
    for metric in metrics:
        lines += metric.lines
        lines += [f"{series} {_number(value)}" for series, value in metric.samples.items()]
    return "\n".join(lines) + "\n" if lines else ""


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)  # the shortest text that reads back as the same number
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def merge(texts: Sequence[str]) -> str:
    """Several scrapes as one: counters and histograms summed, gauges by `GAUGES`, in the order of the first.

    Input and output are Prometheus text format 0.0.4. A series that only some of them have counts as it is.
    """
    merged: dict[str, _Metric] = {}
    for text in texts:
        for metric in _read(text):
            known = merged.setdefault(metric.name, metric)
            if known is metric:
                continue
            rule = GAUGES.get(metric.name, _sum) if metric.kind == "gauge" else _sum
            samples = known.samples
            for series, value in metric.samples.items():
                samples[series] = rule(samples[series], value) if series in samples else value
    return _write(merged.values())


def lasting(text: str) -> str:
    """The part of a scrape that outlives its process: counters, histograms and `LASTING_GAUGES`."""
    return _write(metric for metric in _read(text) if metric.lasts)


@dataclass
class Tally:
    """What one place in the family has counted so far, over all the processes that held it.

    Counters never go back when a child is started again: the last scrape of the dead one is kept and added.
    What this misses: whatever a child counted between its last scrape and its death, at most one scrape
    interval of that child, and all of it for a child that nobody scraped.
    """

    kept: str = ""
    last: str = ""

    def died(self) -> None:
        """The process of the last scrape is gone; the next scrape will be another's and start at zero."""
        self.kept, self.last = merge([lasting(self.last), self.kept]), ""

    def total(self, answer: str | None) -> str:
        """All that this place has counted, given its process's answer to this scrape, None without one.

        The dead are added per place and not over the whole family: so the sums of fractions are made in the
        same order before and after a death, and cannot go back by a rounding error, which Prometheus would
        take for a restart from zero.
        """
        if answer is not None:
            self.last = answer
        return merge([self.last if answer is not None else lasting(self.last), self.kept])
