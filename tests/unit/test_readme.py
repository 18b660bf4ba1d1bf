"""The README says what the code does."""

import re
import shlex

import pytest

from tests import readme
from tests.readme import ROOT, SNIPPETS, snippet
from worker.cli import read
from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.core.topology import topology
from worker.settings import reference

README = readme.README.read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = sorted(
    {
        re.split(r" +[#|>]", line)[0].strip()
        for line in re.findall(r"^    (?:\$ |.*\| )?qris-expire (\w.*)$", README, re.MULTILINE)
    }
)
STANDING_FOR = {"BILL": "b-1", "MESSAGE-ID": "m-1", "BATCH": "b-1"}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def _rows(heading: str) -> dict[str, list[str]]:
    table = README.split(heading, 1)[1].split("\n\n", 1)[0]
    return {_cells(line)[0].strip("`"): _cells(line)[1:] for line in table.splitlines() if line.startswith("| `")}


def test_settings_table_is_the_declaration() -> None:
    """Every setting stands in the README with its default and its meaning, and no other does."""
    rows = _rows("| variable | default | meaning |")

    assert {name: [cells[0].strip("`"), cells[-1]] for name, cells in rows.items()} == {
        name: [default.strip("`"), meaning] for name, default, meaning in reference()
    }


def test_outcome_table_is_the_enum() -> None:
    """Every status stands in the README with its reasons, and whether it is dead-lettered."""
    rows = _rows("| status | reasons | dead-lettered |")

    assert {status: cells[0].replace("`", "").split(", ") for status, cells in rows.items()} == {
        str(status): [str(reason) for reason in reasons] for status, reasons in REASONS.items()
    }
    assert {status for status, cells in rows.items() if cells[1].startswith("yes")} == {str(s) for s in DEAD_LETTERED}


def test_what_is_made_is_up_to_date() -> None:
    """Every table and every program is what its source makes of it now: `python -m tests.readme` writes them."""

    assert readme.made(README) == README
    assert sorted(re.findall(r"^<!-- table: (\w+) -->$", README, re.MULTILINE)) == sorted(readme.TABLES)
    assert sorted(re.findall(r"^<!-- snippet: (\S+) -->$", README, re.MULTILINE)) == names()


def test_topology_table_has_all_objects() -> None:
    """Exchanges and queues in the README are those that are declared."""
    table = README.split("| object | what |", 1)[1].split("\n\n", 1)[0]

    declared = topology("P", "quorum", [30])
    assert set(re.findall(r"`(P\.[^`]+)`", table)) - {"P.outcomes.batch.<id>"} == {
        name.replace(".30", ".<seconds>")
        for name in [exchange.name for exchange in declared.exchanges] + [queue.name for queue in declared.queues]
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    """A command of ours in the README is one, with options that it has."""
    words = [STANDING_FOR.get(word, word) for word in shlex.split(command)]

    assert callable(read(words))


def test_links_lead_somewhere() -> None:
    """Every link of the README leads to a file of the repository, or to a heading that is there."""
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert links

    for link in links:
        path, _, anchor = link.partition("#")
        file = ROOT / path if path else readme.README
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}, link


def test_files_that_it_names_exist() -> None:
    """Files and directories that the README names are there."""
    named = set(re.findall(r"`((?:worker|app|core|shells|k8s|tests)/[\w./-]*)`", PROSE)) | {
        "service.py",
        "processes.py",
    }

    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "worker" / name).exists())]
    assert not missing


def test_settings_that_it_names_exist() -> None:
    """Variables in the README's text are settings."""
    named = set(re.findall(r"\b(?:AMQP|GATEWAY|RETRY|BREAKER|WORKER|METRICS|LOG)_[A-Z_]+\b", PROSE))

    assert named <= {name for name, _, _ in reference()}


def names() -> list[str]:
    """The files that are run against the broker."""
    return sorted(file.name for file in SNIPPETS.iterdir() if file.is_file())


@pytest.mark.parametrize("name", names())
def test_a_snippet_is_short(name: str) -> None:
    """What a newcomer has to read for one language is 32 lines at most, none wider than a page."""
    lines = snippet(name).splitlines()

    assert len(lines) <= 32
    assert max(map(len, lines)) <= 120


def test_it_is_no_wider_than_a_page() -> None:
    """Outside of tables and programs no line of the README is wider than a terminal may be."""

    assert not [line for line in PROSE.splitlines() if len(line) > 120 and not line.startswith("|")]
