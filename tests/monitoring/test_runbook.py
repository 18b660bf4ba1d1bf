"""The runbook: a section for each alert, and nothing in it that does not exist."""

import re
import shlex

import pytest

from tests.monitoring import dashboard, rules
from worker.cli import read
from worker.core.outcome import REASONS
from worker.core.verdict import Kind
from worker.settings import GROUPS

TEXT = rules.RUNBOOK.read_text()
PARTS = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))
COMMANDS = sorted({one.strip() for one in re.findall(r"-- qris-expire ([^|>\n]+)", TEXT)})
SETTING = re.compile(r"\b(?:AMQP|GATEWAY|RETRY|BREAKER|WORKER)_[A-Z_]+")
SOURCES = "".join(path.read_text() for path in (rules.ROOT / "worker").rglob("*.py"))


def test_a_section_for_each_alert() -> None:
    """Alerts and sections are the same."""

    assert sorted(SECTIONS) == sorted(alert.name for alert in rules.alerts())


@pytest.mark.parametrize("name", SECTIONS)
def test_first_things_first(name: str) -> None:
    """Each section says what it means, then what to do first, with something to type or to look at."""

    before, _, after = SECTIONS[name].partition("**First")
    assert len(before.split()) >= 5
    assert after
    assert re.search(r"^    \S", after, re.MULTILINE) or re.search(r"QrisExpire\w+|\*[A-Z]", after)


@pytest.mark.parametrize("command", COMMANDS)
def test_our_commands_exist(command: str) -> None:
    """A command of ours in the runbook is one, with options that it has."""

    assert callable(read(shlex.split(command.replace("MESSAGE-ID", "m-1"))))


def test_what_it_names_exists() -> None:
    """Alerts, panels, settings, log events, verdicts and reasons in the runbook are those that there are."""

    alerts = {alert.name for alert in rules.alerts()}
    assert set(re.findall(r"QrisExpire\w+", TEXT)) <= alerts
    panels = {panel.title for panel in dashboard.panels()} | {row.title for row in dashboard.ROWS}
    quoted = {"too many requests", "not found", "us", "some", "every", "Move messages"}
    prose = re.sub(r"`[^`]*`", "", TEXT)
    assert set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", prose)) - quoted <= panels
    assert SETTING.findall(TEXT)
    declared = {group.variable(name) for group in GROUPS for name in group.declared()}
    assert set(SETTING.findall(TEXT)) <= declared
    verdicts = {kind.label for kind in Kind}
    assert set(re.findall(r'"verdict":"(\w+)"', TEXT)) <= verdicts
    # As the log has it, without a blank: what is searched for must be found.
    assert '"event": ' not in TEXT
    for event in re.findall(r'"event":"([\w.]+)"', TEXT):
        assert f'"{event}"' in SOURCES
    reasons = {str(reason) for own in REASONS.values() for reason in own}
    assert set(re.findall(r"dead redrive[^\n]*--reason (\w+)", TEXT)) <= reasons
