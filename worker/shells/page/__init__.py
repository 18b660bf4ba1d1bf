"""The status page at `/`: one HTML file without anything from elsewhere, made from the scrape when somebody asks.

Nothing is measured for it, and nothing runs while nobody looks. Without JavaScript it reloads itself.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Final

from worker.core.condition import Process, Situation, condition
from worker.core.reading import Change, Reading
from worker.shells.metrics import samples
from worker.shells.page.sections import main_element, page_title

if TYPE_CHECKING:
    from worker.shells.http import HealthSource

HTML_TYPE: Final = "text/html; charset=utf-8"

LONGEST_CHANGE: Final = 120.0
"""Seconds that rates may look back: what happened before is not "lately", so a first look has no rates."""
SHORTEST_CHANGE: Final = 1.0
"""Seconds below which a rate would jump about."""
USUAL_CHANGE: Final = 10.0
"""Seconds that a rate covers if there is a reading so old: steady enough to be read, fresh enough to be true."""
FRESH_SECONDS: Final = 1.0
"""However many people look, and however often: the page is made once in so many seconds."""


class Recent:
    """What ``make`` returns, made once in ``fresh`` seconds: all who ask meanwhile get the same bytes. Thread-safe."""

    def __init__(self, make: Callable[[], bytes], clock: Callable[[], float], fresh: float) -> None:
        self._make = make
        self._clock = clock
        self._fresh = fresh
        self._lock = threading.Lock()
        self._made: tuple[float, bytes] = (float("-inf"), b"")

    def __call__(self) -> bytes:
        with self._lock:
            at, made = self._made
            if not 0 <= self._clock() - at < self._fresh:
                made = self._make()
                self._made = (self._clock(), made)
            return made


class StatusPage:
    """The page over a source. Thread-safe."""

    def __init__(self, source: HealthSource, clock: Callable[[], float] = time.time) -> None:
        self._source = source
        self._clock = clock
        self._scrape: tuple[float, bytes] | None = None
        self._readings: list[Reading] = []
        self._recent = Recent(self._make, clock, FRESH_SECONDS)

    def scraped(self, scrape: bytes) -> None:
        """Somebody else has asked for the metrics: a first look finds an earlier reading to compare with."""
        self._scrape = (self._clock(), scrape)

    def html(self) -> bytes:
        """The page as of now, at most `FRESH_SECONDS` old."""
        return self._recent()

    def _make(self) -> bytes:
        components = self._source.ready().components
        now = Reading(self._clock(), samples(self._source.metrics()))
        situation = Situation(now, self._change(now), _processes(components))
        state = condition(situation)
        return _TEMPLATE.substitute(title=escape(page_title(state)), main=main_element(situation, state)).encode()

    def _change(self, now: Reading) -> Change | None:
        """Since the youngest reading that is old enough."""
        scrape, self._scrape = self._scrape, None
        if scrape is not None:
            self._readings.append(Reading(scrape[0], samples(scrape[1])))
        useful = sorted(
            (earlier for earlier in self._readings if 0 < now.at - earlier.at <= LONGEST_CHANGE), key=lambda r: r.at
        )
        while len(useful) > 1 and now.at - useful[1].at >= USUAL_CHANGE:
            del useful[0]  # never needed again: a second one is old enough
        self._readings = [*useful, now]
        before = useful[0] if useful else None
        return Change(before, now) if before is not None and now.at - before.at >= SHORTEST_CHANGE else None


def _processes(components: Mapping[str, object]) -> list[Process]:
    """One process, or those of the parent, which nests their components."""
    family = {name: inner for name, inner in components.items() if isinstance(inner, Mapping)}
    if not family:
        return [Process("", _states(components))]
    return [Process(name, _states(inner.get("components", {}))) for name, inner in family.items()]


def _states(components: Mapping[str, object]) -> dict[str, str]:
    return {name: str(state) for name, state in components.items()}


def _asset(name: str) -> str:
    return (files(__name__) / name).read_text("utf-8")


def _source_hash(text: str) -> str:
    """What names this very text in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _asset("page.css"), _asset("page.js")
_TEMPLATE: Final = Template(
    Template(_asset("page.html")).safe_substitute(style=_STYLE, script=_SCRIPT.replace("$", "$$"))
)

HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"style-src {_source_hash(_STYLE)}",
            f"script-src {_source_hash(_SCRIPT)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Nothing but this page's own style and script runs, whatever a broker or gateway may say in a reason."""
