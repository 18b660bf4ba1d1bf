"""The status page in the situations that matter at night, as pictures for people to look at.

The figures are set by hand in the real catalogue of metrics; page and browser are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.browser import browsing
from worker.shells.http import Health, HealthServer
from worker.shells.metrics import Metrics

NOW: Final = 1_795_300_000.0
FINE: Final = dict.fromkeys(("consumer", "publisher", "breaker", "throttle", "drain", "start"), "ok")


class Situation:
    """A worker of a fleet of five, up for three hours; `health` is what `/readyz` says."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.catalogue = Metrics("0.1.0")
        self.health = Health(True, FINE)
        metrics = self.catalogue
        metrics.started(now() - 3 * 3600)
        metrics.broker_connected(True)
        metrics.fleet_members(5)
        metrics.senders(32)
        metrics.rate_limit(100)
        metrics.token_expiry(now() + 540)
        metrics.token_refresh("ok")
        self.work(4000, age=0.2)

    def metrics(self) -> bytes:
        return self.catalogue.render()

    def live(self) -> Health:
        return self.health

    def ready(self) -> Health:
        return self.health

    def work(self, commands: int, *, age: float, now: float = NOW) -> None:
        """So many cancellations end."""
        for number in range(commands):
            self.catalogue.received("cancellation")
            self.catalogue.request("expire", "2009300", 0.08)
            self.catalogue.outcome("cancellation", "expired", "success", age, now)
            self.catalogue.settled("cancellation", 0.1)
            self.catalogue.confirm_took(0.004 if number % 20 else 0.02)


def well(situation: Situation) -> None:
    """Work, and nothing wrong."""
    situation.work(80, age=0.2)


def undated_backlog(situation: Situation) -> None:
    """3,582 undated cancellations wait; 8 a second come and 5 end."""
    situation.catalogue.waiting("cancellation", 3582)
    for _ in range(80):
        situation.catalogue.undated("cancellation")
    situation.work(10, age=0.2)


def throttled(situation: Situation) -> None:
    """The gateway asks for fewer calls, again and again."""
    situation.work(40, age=1.5)
    for _ in range(12):
        situation.catalogue.request("expire", "4299300", 0.02)
        situation.catalogue.retry("throttled")
    situation.catalogue.paused("throttled", True)
    situation.catalogue.held_until(NOW + 10 + 8)
    situation.catalogue.waiting("cancellation", 610)
    situation.health = Health(False, {**FINE, "throttle": "throttled"})


def one_sick_member(situation: Situation) -> None:
    """This process has no way out; the others have."""
    situation.catalogue.member_sick(True)
    situation.catalogue.paused("sick", True)
    for _ in range(10):
        situation.catalogue.request("expire", "", 5.0)
        situation.catalogue.retry("transient")
    situation.health = Health(False, {**FINE, "sick": "sick: 10 attempts failed here while others succeed"})


def paused_by_an_operator(situation: Situation) -> None:
    """Somebody has paused the fleet."""
    situation.catalogue.paused("operator", True)
    situation.catalogue.waiting("cancellation", 412)
    situation.catalogue.waiting("sweep", 9800)
    since = "since 2026-11-22T05:10:00+07:00 (maintenance of the gateway), for 2400 s more"
    what = f"ok, cancellation paused by budi@ops-1 {since}; sweep paused by budi@ops-1 {since}"
    situation.health = Health(True, {**FINE, "operator": what})


SITUATIONS: Final = (well, undated_backlog, throttled, one_sick_member, paused_by_an_operator)


def draw(directory: Path, unavailable: Callable[[str], None]) -> Iterator[Path]:
    """A PNG of each situation."""
    with browsing(directory, unavailable) as browser:
        for happens in SITUATIONS:
            clock = [NOW]
            situation = Situation(lambda clock=clock: clock[0])  # type: ignore[misc]
            if happens is undated_backlog:
                situation.catalogue.waiting("cancellation", 3552)
            server = HealthServer("127.0.0.1", 0, situation, clock=lambda clock=clock: clock[0])  # type: ignore[misc]
            server.start()
            tab = browser.tab()
            try:
                tab.size(1280, 900)
                tab.emulate(prefers_color_scheme="light")
                tab.scripts(on=False)
                tab.go(f"http://127.0.0.1:{server.port}/")
                clock[0] += 10
                happens(situation)
                tab.go(f"http://127.0.0.1:{server.port}/")
                path = directory / f"page-{happens.__name__.replace('_', '-')}.png"
                tab.screenshot(path)
                yield path
            finally:
                tab.close()
                server.stop()
