"""The status page over HTTP: what is in it, what is not, and what it costs."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from worker.shells import page as status_page
from worker.shells.http import Health, HealthServer
from worker.shells.metrics import Metrics
from worker.shells.page import StatusPage

FINE = dict.fromkeys(("consumer", "publisher", "breaker", "throttle", "drain", "start"), "ok")
CSS = (Path(status_page.__file__).parent / "page.css").read_text()
VOID = ("meta", "link", "wbr", "br")


class Source:
    """A worker's real catalogue of metrics, and a readiness that a test sets."""

    def __init__(self) -> None:
        self.catalogue = Metrics("1.2.3")
        self.catalogue.broker_connected(True)
        self.health = Health(True, FINE)
        self.scrapes = 0

    def metrics(self) -> bytes:
        self.scrapes += 1
        return self.catalogue.render()

    def live(self) -> Health:
        return self.health

    def ready(self) -> Health:
        return self.health


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Page(HTMLParser):
    """A page taken apart: its tags, the texts of its scripts and styles, its tables by first column; checks nesting."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, str] = {}
        self.rows: dict[str, list[str]] = {}
        self.headline = ""
        self._open: list[str] = []
        self._row: list[str] = []
        self.feed(html.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self._row = []
        elif tag in ("th", "td"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "tr":
            self.rows[self._row[0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            self.inline[inside] = self.inline.get(inside, "") + data
        elif "td" in self._open or "th" in self._open:
            self._row[-1] += data.replace("\xa0", " ")
        elif inside == "h2" and not self.headline:
            self.headline = data.replace("\xa0", " ")


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def page(source: Source, clock: Clock) -> StatusPage:
    return StatusPage(source, clock)


def work(source: Source, clock: Clock, commands: int) -> None:
    """So many cancellations, each with its call and its outcome."""
    for _ in range(commands):
        source.catalogue.received("cancellation")
        source.catalogue.request("expire", "2009300", 0.04)
        source.catalogue.outcome("cancellation", "expired", "success", 0.3, clock.now)


def get(port: int, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, "/")
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@pytest.fixture
def server(source: Source) -> Iterator[HealthServer]:
    server = HealthServer("127.0.0.1", 0, source)
    server.start()
    yield server
    server.stop()


def test_it_is_html_that_nobody_keeps(server: HealthServer) -> None:
    """/ answers an HTML page, also to HEAD, that is not to be stored, framed or taken for anything else."""

    response, body = get(server.port)
    assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert body.startswith(b"<!doctype html>")
    assert get(server.port, "HEAD")[1] == b""


def test_the_policy_allows_its_own_style_and_script_only(server: HealthServer) -> None:
    """The Content-Security-Policy names the very texts in the page by hash, and nothing may be loaded or embedded."""

    response, body = get(server.port)
    policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    inline = Page(body).inline
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        digest = base64.b64encode(hashlib.sha256(inline[tag].encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


def test_it_is_self_contained(page: StatusPage) -> None:
    """No tag loads anything or carries an inline style or handler, and no address of another host is in it."""

    parsed = Page(page.html())
    loading = [attributes for _, attributes in parsed.tags if attributes.keys() & {"src", "srcset", "style"}]
    handlers = [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    targets = [attributes["href"] for _, attributes in parsed.tags if "href" in attributes]
    assert (loading, handlers) == ([], [])
    assert targets == ["data:,", "metrics", "readyz", "livez"]
    assert not re.search(rb"https?://|url\(|@import", page.html())


def test_the_first_look_has_figures(page: StatusPage, source: Source, clock: Clock) -> None:
    """The server renders the state: no script is needed to see it, and without one the page reloads itself."""

    work(source, clock, 3)
    html = page.html()
    parsed = Page(html)
    assert parsed.headline.startswith("Ready, nothing to do.")
    assert parsed.rows["received"] == ["3", "0"]
    assert parsed.rows["expired: success"] == ["–", "3"]
    assert parsed.rows["expire 2009300"] == ["done", "–", "3"]
    assert b'<noscript><meta http-equiv="refresh" content="5"></noscript>' in html


def test_rates_come_from_looks(page: StatusPage, source: Source, clock: Clock) -> None:
    """Two looks give rates, over at least ten seconds where there was a look so long ago."""

    page.html()
    for _ in range(12):
        clock.now += 2
        work(source, clock, 20)
        parsed = Page(page.html())
    assert parsed.rows["outcomes per second"] == ["10/s", "0/s"]
    assert parsed.rows["expired: success"] == ["100", "240"]
    assert parsed.headline == "Working: 10/s, 95 % done within 0.5 s of their publication."


def test_a_scrape_is_a_look(page: StatusPage, source: Source, clock: Clock) -> None:
    """What Prometheus scraped lately serves the first person's rates."""

    page.scraped(source.metrics())
    clock.now += 15
    work(source, clock, 300)
    assert Page(page.html()).rows["outcomes per second"] == ["20/s", "0/s"]


def test_old_looks_give_no_rates(page: StatusPage, source: Source, clock: Clock) -> None:
    """What happened before the last two minutes is not lately."""

    page.html()
    clock.now += status_page.LONGEST_CHANGE + 1
    work(source, clock, 300)
    assert Page(page.html()).rows["outcomes per second"] == ["–", "–"]


def test_many_viewers_cost_as_much_as_one(page: StatusPage, source: Source, clock: Clock) -> None:
    """Within a second the page is made once, however many ask; after that once more."""

    assert len({page.html() for _ in range(50)}) == 1
    assert source.scrapes == 1
    clock.now += status_page.FRESH_SECONDS
    page.html()
    assert source.scrapes == 2


def test_a_long_look_keeps_few_readings(page: StatusPage, clock: Clock) -> None:
    """A page that stays open for hours holds a dozen readings, not thousands."""

    for _ in range(60):
        clock.now += 1.0
        page.html()
    assert len(page._readings) <= status_page.USUAL_CHANGE / status_page.FRESH_SECONDS + 2


def test_a_clock_that_is_set_back_does_not_freeze_it(page: StatusPage, source: Source, clock: Clock) -> None:
    """After the time service has corrected the clock the page goes on."""

    page.html()
    clock.now -= 3600
    page.html()
    assert source.scrapes == 2


def test_words_of_others_are_only_text(page: StatusPage, source: Source) -> None:
    """What a broker says about itself cannot become a tag."""

    source.health = Health(False, {**FINE, "consumer": '<script>alert("1")</script>'})
    html = page.html()
    assert html.count(b"<script>") == 1
    assert "<script>alert" in Page(html).headline


def test_several_processes(page: StatusPage, source: Source) -> None:
    """Under a parent each process has its line, and the headline counts those concerned."""

    bad = {**FINE, "consumer": "connection refused"}
    source.health = Health(
        False,
        {
            "process-0": {"status": "ok", "components": FINE},
            "process-1": {"status": "unavailable", "components": bad},
        },
    )
    parsed = Page(page.html())
    assert "connection refused (1 of 2 processes)" in parsed.headline


def test_it_says_how_it_is_at_the_top(page: StatusPage, source: Source) -> None:
    """The title has sign and word, and the level is reported in words, not by colour alone."""

    assert "<title>✓ Well · qris-expire-worker</title>" in page.html().decode()
    source.health = Health(False, {**FINE, "publisher": "blocked by the broker (memory or disk alarm)"})
    html = StatusPage(source).html().decode()
    assert "<title>✕ Trouble · qris-expire-worker</title>" in html
    assert '<section class="headline trouble">' in html
    assert "<code>rabbitmq-diagnostics alarms</code>" in html


def test_tables_have_headings(page: StatusPage, source: Source, clock: Clock) -> None:
    """Each row of figures begins with its heading, and each heading says what it is the heading of."""

    work(source, clock, 1)
    html = page.html().decode()
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in Page(html.encode()).tags if tag == "th")
    rows = re.findall(r"<tr>(<\w+[^>]*>)", "".join(re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL)))
    assert len(rows) > 20
    assert set(rows) == {'<th scope="row">'}


def _luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2, for #rrggbb."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        *(("text", ground) for ground in ("ground", "card")),
        *(("quiet", ground) for ground in ("ground", "card")),
        ("link", "ground"),
        *(("on-level", level) for level in ("well", "caution", "waiting", "trouble", "old")),
        ("on-stale", "stale"),
    ],
)
def test_contrast(scheme: str, text: str, ground: str) -> None:
    """Every pair of text and ground reaches WCAG's AA, 4.5 to 1, in both colour schemes."""

    blocks = re.findall(r":root {(.*?)}", CSS, re.DOTALL)
    palettes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(palettes) == 2
    palette = palettes[scheme == "dark"]
    assert _contrast(palette[text], palette[ground]) >= 4.5
