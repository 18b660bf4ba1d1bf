"""The benchmark measures; what it measures is no test's business."""

from pathlib import Path

import pytest

from tests.benchmark import packages
from tests.benchmark.__main__ import main
from tests.benchmark.contenders import GO, NODE, WORKER, here
from tests.benchmark.measure import Mark, middle


def test_it_measures_this_worker(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some hundred commands of this worker alone become a row of the README's table, none lost and none twice."""
    monkeypatch.setenv("AMQP_URL", amqp_url)
    said = ["--contenders", "worker", "--rounds", "1", "--commands", "400", "--patience", "0", "--markdown"]

    assert main(said) == 0

    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| this worker |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[-1] == "0, 0"
    assert all(float(cell.replace(",", "")) > 0 for cell in (cells[2], cells[4], *cells[7:10]))


def run_alone(capsys: pytest.CaptureFixture[str], *scenario: str) -> list[list[str]]:
    """The rows of its tables."""
    said = ["--contenders", "worker", "--rounds", "1", "--commands", "2000", "--patience", "0", "--markdown"]
    assert main([*said, *scenario]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_it_measures_a_steady_load_beside_full_load(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None lost and none twice; the load is what was asked for; what counts system calls is named, or missed loudly."""
    monkeypatch.setenv("AMQP_URL", amqp_url)

    head, _, steady, full, *calls = run_alone(capsys, "--pace", "400")

    assert head[1:4] == ["load per s", "per s", "CPU ms"]
    assert steady[1] == "400"
    assert 300 < float(steady[2]) < 500
    assert full[1] == "full"
    assert [row[head.index("lost, twice")] for row in (steady, full)] == ["0, 0", "0, 0"]
    assert all(float(row[3]) > 0 for row in (steady, full))
    counted = steady[-1] != "not counted"
    assert [row[1] for row in calls[2:]] == (["400", "full"] if counted else [])


def test_it_says_where_the_time_goes(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Components add up to 100 %, and most of the time has a component."""
    monkeypatch.setenv("AMQP_URL", amqp_url)

    rows = run_alone(capsys, "--profile")

    end = next(place for place, row in enumerate(rows) if row[0] == "all")
    shares = {row[0]: float(row[1]) for row in rows[2:end]}
    assert sum(shares.values()) == pytest.approx(100)
    assert shares["the rest"] + shares["other threads"] < 50
    assert shares["HTTP over the socket"] > 0
    assert rows[end + 1][0] == "function"


def test_the_middle_of_a_run_leaves_out_start_and_end() -> None:
    """Rate and CPU are taken between 10 % and 90 % of the outcomes."""
    marks = [Mark(float(at), done, 0.0) for at, done in enumerate((0, 5, 20, 50, 80, 95, 100))]

    assert middle(marks, 100) == (marks[2], marks[4])


def test_a_run_too_short_to_have_a_middle_counts_whole() -> None:
    """From the last look before its first outcome to the end."""
    marks = [Mark(0.0, 0, 0.0), Mark(1.0, 0, 0.0), Mark(2.0, 50, 0.0)]

    assert middle(marks, 50) == (marks[1], marks[2])


def test_peers_that_cannot_run_here_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what is missing and how to install it; the others are measured."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packages.golang.cache_clear()
    packages.node.cache_clear()

    able, missing = here([WORKER, NODE, GO])

    assert able == [WORKER]
    assert [line.partition("; ")[0].rpartition(": ")[2] for line in missing] == ["there is no npm", "there is no go"]
