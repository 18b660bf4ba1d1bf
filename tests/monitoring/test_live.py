"""Every query of the dashboard and every rule, on real servers under a load with faults."""

import math
import subprocess

import pytest

from tests.monitoring import dashboard
from tests.monitoring.live import BILLS, CANCELLATIONS, Recording, load_with_faults

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tools")]

SERIES_PER_WORKER = 500
"""A guard against a label that grows; PodMonitors bound scrapes, too (sampleLimit)."""


@pytest.fixture(scope="module")
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    request.getfixturevalue("tools")
    return load_with_faults(tmp_path_factory.mktemp("live"))


def shown(recording: Recording, title: str) -> list[float]:
    """The values of a panel's first query: all of its first series that are numbers."""
    panel = next(panel for panel in dashboard.panels() if panel.title == title)
    values = [float(value) for _, value in recording.answers[panel.queries[0][0]][0]["values"]]
    return [value for value in values if not math.isnan(value)]


def test_no_panel_is_empty(recording: Recording) -> None:
    """Each query of each panel has a number to show."""

    empty = [
        f"{panel.title}: {expr}"
        for panel in dashboard.panels()
        for expr, _ in panel.queries
        if all(math.isnan(float(value)) for series in recording.answers[expr] for _, value in series["values"])
    ]
    assert empty == []


def test_the_numbers_are_true(recording: Recording) -> None:
    """What panels show is what happened: three processes, the sweep, the outage, the throttling, the reconnects."""

    assert shown(recording, "Worker processes")[-1] == 3
    assert shown(recording, "Ended")[-1] == pytest.approx(BILLS, rel=0.05)
    assert max(shown(recording, "Bills left")) > 0.8 * BILLS
    assert shown(recording, "Bills left")[-1] == 0
    assert {0.0, 2.0} <= set(shown(recording, "Breaker"))
    assert {0.0, 1.0} <= set(shown(recording, "Consumption"))
    assert max(shown(recording, "Reconnects")) >= 3
    assert max(shown(recording, "Dead letters")) >= CANCELLATIONS / 90
    assert max(shown(recording, "Share of cancellations later than 1 s")) > 0.5
    assert max(shown(recording, "Senders in use")) <= 1.0


def test_no_rule_fails(recording: Recording) -> None:
    """Prometheus evaluates every rule on these series without an error."""

    assert recording.faulty_rules == []


def test_metrics_are_named_well(recording: Recording) -> None:
    """promtool has nothing to say about the scrape."""

    done = subprocess.run(
        ["promtool", "check", "metrics"], input=recording.scrape, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_scrape_is_small(recording: Recording) -> None:
    """A worker exports some hundred series, however many bills it has seen."""

    series = [line for line in recording.scrape.splitlines() if not line.startswith("#")]
    assert len(series) < SERIES_PER_WORKER
