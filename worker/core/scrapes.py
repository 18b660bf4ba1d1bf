"""What the scrapes of several processes add up to, in Prometheus' text format 0.0.4."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from worker.core.catalogue import BY_NAME, MergeRule, Metric


def of_family(values: Iterable[tuple[Metric, float]]) -> str:
    """What the parent of several processes counts itself, in the same format."""
    return "".join(
        f"# HELP {metric.full_name} {metric.text}\n"
        f"# TYPE {metric.full_name} {metric.kind}\n"
        f"{metric.full_name} {_number(float(value))}\n"
        for metric, value in values
    )


def openmetrics(text: str) -> str:
    """The same scrape in the format OpenMetrics 1.0: a counter's name has no `_total` in its HELP and TYPE lines,
    quotes are escaped there, and the end is reported."""
    metrics = list(_read(text))
    for metric in metrics:
        name = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
        for place, line in enumerate(metric.lines):
            _, keyword, _, rest = line.split(" ", 3)
            told = rest.replace('"', r"\"") if keyword == "HELP" else rest
            metric.lines[place] = f"# {keyword} {name} {told}"
    return _write(metrics) + "# EOF\n"


@dataclass
class _Scraped:
    """One metric of a scrape: its HELP and TYPE lines as they came, and its samples by series, in order."""

    name: str
    lines: list[str] = field(default_factory=list)
    kind: str = "untyped"
    samples: dict[str, float] = field(default_factory=dict)

    @property
    def lasts(self) -> bool:
        return self.kind != "gauge" or (self.name in BY_NAME and BY_NAME[self.name].lasts)

    @property
    def merge(self) -> MergeRule:
        """How two processes' values make one; a gauge that is not in the catalogue is summed."""
        return BY_NAME[self.name].merge if self.kind == "gauge" and self.name in BY_NAME else operator.add


def _read(text: str) -> Iterator[_Scraped]:
    """The metrics of a scrape in format 0.0.4 as our children write it: HELP, TYPE, samples without times."""
    metric: _Scraped | None = None
    for line in text.split("\n"):
        if line.startswith("# "):
            _, keyword, name, *rest = line.split(" ", 3)
            if metric is None or name != metric.name:
                if metric:
                    yield metric
                metric = _Scraped(name)
            metric.lines.append(line)
            if keyword == "TYPE":
                metric.kind = rest[0]
        elif line and metric:
            # From the right: a label's value may hold blanks, the number never does.
            series, _, value = line.rpartition(" ")
            metric.samples[series] = float(value)
    if metric:
        yield metric


def _write(metrics: Iterable[_Scraped]) -> str:
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
    """Several scrapes as one: counters and histograms summed, gauges as the catalogue says, in the order of the first.

    Input and output are Prometheus text format 0.0.4. A series that only some of them have counts as it is.
    """
    merged: dict[str, _Scraped] = {}
    for text in texts:
        for metric in _read(text):
            known = merged.setdefault(metric.name, metric)
            if known is metric:
                continue
            rule, samples = metric.merge, known.samples
            for series, value in metric.samples.items():
                samples[series] = rule(samples[series], value) if series in samples else value
    return _write(merged.values())


def lasting(text: str) -> str:
    """The part of a scrape that outlives its process: counters, histograms and the gauges that last."""
    return _write(metric for metric in _read(text) if metric.lasts)


@dataclass
class PlaceCounts:
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
