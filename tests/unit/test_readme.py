"""The README, the pages of worker/manual and the runbook say what the code does."""

import re
import shlex
from pathlib import Path

import pytest

from tests import readme
from tests.readme import PAGES, ROOT, RUNBOOK, SNIPPETS, snippet
from worker.cli import read
from worker.core.delivery import PROGRESS_HEADERS
from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.core.topology import topology
from worker.settings import reference

OURS = [page for page in PAGES if page != RUNBOOK]
"""The runbook has a suite of its own (tests/monitoring) for its commands and names."""
README = readme.README.read_text()
ALL = "\n".join(page.read_text() for page in OURS)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


COMMANDS = sorted(
    {
        re.split(r" +[#|>]", line)[0].strip()
        for line in re.findall(r"^    (?:\$ |.*\| |docker .* worker )?qris-expire (\w.*)$", ALL, re.MULTILINE)
    }
)
STANDING_FOR = {"BILL": "b-1", "MESSAGE-ID": "m-1", "BATCH": "b-1"}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def _rows(heading: str) -> dict[str, list[str]]:
    table = ALL.split(heading, 1)[1].split("\n\n", 1)[0]
    return {_cells(line)[0].strip("`"): _cells(line)[1:] for line in table.splitlines() if line.startswith("| `")}


def test_settings_table_is_the_declaration() -> None:
    """Every setting is in the README with its default and its meaning, and no other is."""
    rows = _rows("| variable | default | meaning |")

    assert {name: [cells[0].strip("`"), cells[-1]] for name, cells in rows.items()} == {
        name: [default.strip("`"), meaning] for name, default, meaning in reference()
    }


def test_outcome_table_is_the_enum() -> None:
    """Every status is in the README with its reasons, and whether it is dead-lettered."""
    rows = _rows("| status | reasons | dead-lettered |")

    assert {status: cells[0].replace("`", "").split(", ") for status, cells in rows.items()} == {
        str(status): [str(reason) for reason in reasons] for status, reasons in REASONS.items()
    }
    assert {status for status, cells in rows.items() if cells[1].startswith("yes")} == {str(s) for s in DEAD_LETTERED}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_generated_is_up_to_date(page: Path) -> None:
    """Every table and every program is what its source makes of it now: `python -m tests.readme` writes them."""

    assert readme.made(page.read_text()) == page.read_text()


def test_every_table_is_on_one_page() -> None:
    """A table that can be generated is on a page, and on one only."""
    everything = "\n".join(page.read_text() for page in PAGES)

    assert sorted(re.findall(r"^<!-- table: (\w+) -->$", everything, re.MULTILINE)) == sorted(readme.TABLES)


def test_every_program_is_shown_or_linked() -> None:
    """The README shows or links each program that is run against the broker."""

    shown = re.findall(r"^<!-- snippet: (\S+) -->$", README, re.MULTILINE)
    linked = re.findall(r"\]\(tests/snippets/([^)]+)\)", README)
    assert sorted(shown + linked) == names()


def test_topology_table_has_all_objects() -> None:
    """Exchanges and queues in the table are those that are declared."""
    table = ALL.split("| object | what |", 1)[1].split("\n\n", 1)[0]

    declared = topology("P", "quorum", [30])
    assert set(re.findall(r"`(P\.[^`]+)`", table)) - {"P.outcomes.batch.<id>"} == {
        name.replace(".30", ".<seconds>")
        for name in [exchange.name for exchange in declared.exchanges] + [queue.name for queue in declared.queues]
    }


def test_the_longest_time_is_the_sum_of_the_defaults() -> None:
    """The README's longest time to an outcome follows from the declared defaults."""
    default = {name: shown.strip("`") for name, shown, _ in reference()}
    delays = [int(delay) for delay in default["RETRY_DELAYS_SECONDS"].split(",")]
    call = int(default["GATEWAY_CONNECT_TIMEOUT_SECONDS"]), int(default["GATEWAY_READ_TIMEOUT_SECONDS"])
    round_ = int(default["RETRY_BUDGET_SECONDS"]), *call

    total = (len(delays) + 1) * sum(round_) + sum(delays)
    assert f"{len(delays) + 1} × ({' + '.join(map(str, round_))}) + {' + '.join(map(str, delays))} = {total}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    """A command of ours in the README is one, with options that it has."""
    words = [STANDING_FOR.get(word, word) for word in shlex.split(command)]

    assert callable(read(words))


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link leads to a file of the repository, or to a heading that is there."""
    text = prose(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)

    for link in links:
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}, link


def test_the_readme_leads_to_every_page() -> None:
    """No page is left that a reader of the README cannot find."""

    assert [page.name for page in PAGES if str(page.relative_to(ROOT)) not in README][1:] == []


def test_headers_that_producers_can_write_are_explained() -> None:
    """Our own headers carry what is known of earlier rounds, and nobody keeps a producer from writing them."""
    text = (ROOT / "worker/manual/operations.md").read_text()

    assert [name for name in PROGRESS_HEADERS if f"`{name}`" not in text] == []


def test_files_that_they_name_exist() -> None:
    """Files and directories that the pages name are there."""
    places = "worker|app|core|shells|settings|k8s|tests"
    named = set(re.findall(rf"[` ]((?:{places})/[\w./-]*\w)", prose(ALL))) | {"wiring.py", "service.py", "processes.py"}

    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "worker" / name).exists())]
    assert missing == []


def test_settings_that_they_name_exist() -> None:
    """Variables in the pages' text are settings, or were: what has gone is named in *Changes* and *Upgrading*."""
    named = set(re.findall(r"\b(?:AMQP|GATEWAY|RETRY|BREAKER|WORKER|METRICS|LOG)_[A-Z_]+[A-Z]\b", prose(ALL)))

    assert named - {"GATEWAY_TRANSPORT"} <= {name for name, _, _ in reference()}


def names() -> list[str]:
    """The programs that are run against the broker."""
    return sorted(file.name for file in SNIPPETS.iterdir() if file.is_file())


@pytest.mark.parametrize("name", names())
def test_a_program_is_short(name: str) -> None:
    """What a newcomer has to read for one language fits on a screen, and no line is wider than a page."""
    lines = snippet(name).splitlines()

    assert len(lines) <= 32
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_a_page_is_no_wider_than_a_terminal(page: Path) -> None:
    """Outside of tables and programs no line is wider than a terminal may be."""

    wide = [line for line in prose(page.read_text()).splitlines() if len(line) > 120 and line[0] not in "|<"]
    assert wide == []


def test_the_first_reader_meets_little() -> None:
    """What stands before the reference tables is short: the README had 57,000 characters once."""

    assert len(README.partition("### Settings")[0]) <= 20_000
