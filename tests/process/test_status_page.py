"""The status page in a real browser, over a real worker: what a person sees, hears and can do with a keyboard."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.browser import Browser, Tab, browsing
from tests.rabbit import delete_topology, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess
from worker.sandbox.simulator import Script, Simulator
from worker.shells.http import Health, HealthServer
from worker.shells.page import StatusPage

pytestmark = pytest.mark.slow

SOON = 30.0
"""Seconds for something to be seen on a busy machine; two are usual."""
TAB, ENTER = ("Tab", 9), ("Enter", 13, "\r")


class Site:
    """A worker that runs, its gateway and a producer."""

    def __init__(self, worker: WorkerProcess, producer: Producer, gateway: Simulator) -> None:
        self.worker = worker
        self.producer = producer
        self.gateway = gateway
        self.url = f"http://127.0.0.1:{worker.port}/"
        self._bills = 0

    def publish(self, commands: int) -> None:
        """Commands of bills that were never there before."""
        self.producer.publish_many(f"bill-{self._bills + number}" for number in range(commands))
        self._bills += commands


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(
        tmp_path_factory.mktemp("browser"), lambda why: pytest.skip(f"NOT CHECKED IN A BROWSER: {why}")
    ) as found:
        yield found


@pytest.fixture(scope="module")
def site(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    prefix, directory = new_prefix(), tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        stack.callback(delete_topology, amqp_url, prefix)
        gateway = stack.enter_context(Simulator(Script(latency=0.02)))
        worker = stack.enter_context(
            WorkerProcess(
                amqp_url, prefix, gateway, directory,
                WORKER_PROCESSES="2", BREAKER_FAILURES="3",
                BREAKER_COOLDOWN_SECONDS="2", BREAKER_MAX_COOLDOWN_SECONDS="2",
            )
        )  # fmt: skip
        worker.wait_ready()
        yield Site(worker, stack.enter_context(Producer(amqp_url, prefix)), gateway)


@pytest.fixture
def tab(browser: Browser, site: Site) -> Iterator[Tab]:
    """A page that is open, on a phone in daylight."""
    tab = browser.tab()
    tab.size(375, 740, scale=2, phone=True)
    tab.emulate(prefers_color_scheme="light")
    tab.go(site.url)
    yield tab
    tab.close()


def at(tab: Tab) -> int:
    """The moment of the figures on the page, in ms."""
    return int(tab.run("document.querySelector('main').dataset.at"))


def until(tab: Tab, words: str, selector: str = "h2") -> None:
    """Until the first such element shows these words."""
    wait_until(lambda: words in tab.text(selector).replace("\xa0", " "), SOON, f"{words!r} in {selector}")


def test_it_follows_the_work(tab: Tab, site: Site) -> None:
    """Figures move without a reload, the headline shows the rate, and the browser has nothing to complain about."""

    tab.run("window.sameDocument = true")
    site.publish(200)
    until(tab, "Working: ")
    wait_until(lambda: "/s" in tab.text("h2"), SOON, "a rate")
    wait_until(lambda: "expired: success\t200\t200" in tab.text("main").replace("\xa0", " "), SOON, "all outcomes")
    assert tab.run("window.sameDocument") is True
    assert tab.run("document.title") == "✓ Well · qris-expire-worker"
    assert "2 of 2" in tab.text("main")
    assert tab.complaints == []
    assert "bill-" not in tab.run("document.documentElement.outerHTML")


def test_an_outage_is_the_headline_and_is_said_aloud_once(tab: Tab, site: Site) -> None:
    """A failing gateway is reported with its remedy; a screen reader hears of the change and not of every figure."""

    assert tab.text("#announced") == ""
    site.gateway.replace(Script(down=True))
    site.publish(20)
    until(tab, "Paused: the gateway is failing (breaker")
    assert "call the gateway's provider" in tab.text(".headline")
    assert tab.run("document.title") == "… Waiting · qris-expire-worker"
    assert "Paused: the gateway is failing" in tab.text("#announced")
    tab.run("window.said = 0")
    tab.run("new MutationObserver(() => said++).observe(document.getElementById('announced'), {childList: true})")
    then = at(tab)
    wait_until(lambda: at(tab) > then + 3000, SOON, "two more refreshes")
    assert tab.run("said") == 0
    site.gateway.replace(Script())
    wait_until(lambda: not tab.text("h2").startswith("Paused"), SOON, "the outage is over")
    assert "Paused" not in tab.text("#announced")


def test_a_worker_that_hangs_and_comes_back(tab: Tab, site: Site) -> None:
    """Without answers the page says loudly that it is old, and why; with the next answer it is well again."""

    os.killpg(site.worker.pid, signal.SIGSTOP)
    try:
        until(tab, "No news from the worker since", "#stale")
        until(tab, "no answer in time", "#stale")
        assert tab.run("document.title") == "✕ GONE · qris-expire-worker"
        assert tab.run("getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
    finally:
        os.killpg(site.worker.pid, signal.SIGCONT)
    wait_until(lambda: tab.run("document.getElementById('stale').hidden"), SOON, "the alarm is over")
    assert "GONE" not in tab.run("document.title")


def test_a_worker_that_ended_and_runs_again(tab: Tab, site: Site) -> None:
    """A page that was open while the worker was away goes on with the new one."""

    site.worker.stop()
    until(tab, "nothing answers", "#stale")
    site.worker.start().wait_ready()
    wait_until(lambda: tab.run("document.getElementById('stale').hidden"), SOON, "the alarm is over")


def test_figures_that_stand_still_are_old(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that never change, from a cache in between, are not taken for news."""

    class Source:
        def metrics(self) -> bytes:
            return b""

        def live(self) -> Health:
            return Health(True, {})

        ready = live

    server = HealthServer("127.0.0.1", 0, Source())
    kept = StatusPage(Source()).html()
    monkeypatch.setattr(StatusPage, "html", lambda _: kept)
    server.start()
    tab = browser.tab()
    try:
        tab.go(f"http://127.0.0.1:{server.port}/")
        until(tab, "its figures stand still", "#stale")
    finally:
        tab.close()
        server.stop()


def test_with_the_keyboard(tab: Tab) -> None:
    """Tab leads from the button through the links, visibly; Enter stops and starts; focus outlives refreshes."""

    def focused() -> str:
        return str(tab.run("document.activeElement.id || document.activeElement.getAttribute('href')"))

    tab.press(*TAB)
    assert focused() == "refreshing"
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press(*ENTER)
    assert tab.text("#refreshing").startswith("Stopped at ")
    then, until_then = at(tab), time.monotonic() + 5
    wait_until(lambda: time.monotonic() > until_then, 10, "five seconds in which nothing moves")
    assert (at(tab), tab.run("document.getElementById('stale').hidden")) == (then, True)
    tab.press(*ENTER)
    assert tab.text("#refreshing") == "Stop refreshing"
    wait_until(lambda: at(tab) > then, SOON, "figures move again")
    order = []
    for _ in range(3):
        tab.press(*TAB)
        order.append(focused())
    assert order == ["metrics", "readyz", "livez"]
    then = at(tab)
    wait_until(lambda: at(tab) > then, SOON, "another refresh")
    assert focused() == "livez"


def test_dark_and_light(tab: Tab, tmp_path: Path) -> None:
    """The page is dark where the person's system is, and light where it is not; pictures of both are left."""

    def ground() -> str:
        return str(tab.run("getComputedStyle(document.body).backgroundColor"))

    assert ground() == "rgb(243, 244, 246)"
    tab.screenshot(tmp_path / "light.png")
    tab.emulate(prefers_color_scheme="dark")
    assert ground() == "rgb(16, 19, 23)"
    tab.screenshot(tmp_path / "dark.png")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_fits_the_window(tab: Tab, width: int) -> None:
    """Nothing is cut off or scrolls sideways, and the headline with its remedy is what a person sees first."""

    tab.size(width, 700, phone=width < 700)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("document.querySelector('.headline').getBoundingClientRect().bottom") < 700
    assert tab.run("document.querySelector('#refreshing').getBoundingClientRect().height") >= 44


def test_nothing_moves(tab: Tab) -> None:
    """There are neither animations nor transitions, whatever a person prefers."""

    assert tab.run("document.getAnimations().length") == 0
    moving = "[...document.querySelectorAll('*')].filter(e => getComputedStyle(e).transitionDuration !== '0s').length"
    assert tab.run(moving) == 0


def test_without_javascript(browser: Browser, site: Site) -> None:
    """With scripts off the page shows the figures and reloads itself, and offers no button that does nothing."""

    tab = browser.tab()
    tab.scripts(False)
    tab.go(site.url)
    then = at(tab)
    assert tab.text("h2")
    assert tab.run("document.getElementById('refreshing').hidden") is True
    wait_until(lambda: at(tab) > then, SOON, "the page has reloaded itself")
    tab.close()


def test_roles_for_a_screen_reader(tab: Tab) -> None:
    """The accessibility tree has its landmarks and headings, and nothing in it is without a name."""

    nodes = [node for node in tab.send("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    assert sum(role == "main" for role, _ in roles) == 1
    assert ("navigation", "Also here") in roles
    assert ("button", "Stop refreshing") in roles
    named = ("button", "link", "heading", "columnheader", "rowheader")
    assert [role for role, name in roles if role in named and not name] == []
    assert next(name for role, name in roles if role == "heading") == "qris-expire-worker"
