"""Plain English: words of an earlier private language stay away from pages, help, messages, docstrings and comments."""

import re
from pathlib import Path

import pytest

from tests.readme import PAGES, ROOT

INSTEAD = {
    r"in vain": "without success",
    r"burns? no|burned|burning|burns (?:an?|the|its|up)": "costs, loses, uses up",
    r"must die|codes? (?:is|are) dead|code lives|codes live|were dead within": "expire, is expired, can still be paid",
    r"tells? `|tells (?:the|its|an?) outcomes?": "publishes",
    r"nobody knows": "it is unknown",
    r"mend|mends|mended": "repair, correct",
    r"would ring|alert rings?|alerts? rang|pager rang": "fires, pages",
    r"for want of": "without, because there was no",
    r"bad luck": "faults",
    r"so it is over|so they are over": "has ended",
    r"homeless": "whose lane is unknown",
    r"truce": "renewal backoff",
    r"(?:a|the|every|each|one) (?:bounce|hop|flight)": "reconnect, copy id, single-flight refresh",
    r"lest": "so that … not",
    r"fates?": "end, outcome",
    r"in earnest": "a real call",
    r"whoever dies": "whichever process ends",
}
"""What was written once, as patterns of whole words, and what this field writes."""

WORDS = re.compile(r"\b(?:" + "|".join(INSTEAD) + r")(?!\w)", re.IGNORECASE)
CODE = re.compile(r"`[^`\n]*`")
TEXTS = [*PAGES, *sorted((ROOT / "k8s").rglob("*.md")), *sorted((ROOT / "worker" / "contract").glob("*.md"))]
SOURCES = sorted(path for folder in ("worker", "tests") for path in (ROOT / folder).rglob("*.py"))
OURSELVES = Path(__file__)


def private(text: str) -> list[str]:
    """The words of the list in a text; what is between backticks is code."""
    return WORDS.findall(CODE.sub("`", text))


@pytest.mark.parametrize("page", dict.fromkeys(TEXTS), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_words(page: Path) -> None:
    """No page has a word of the list; `INSTEAD` says what to write."""

    assert private(page.read_text()) == []


def test_programs_speak_in_plain_words() -> None:
    """No comment, docstring, help, message or name has a word of the list; `INSTEAD` says what to write."""
    found = {
        str(source.relative_to(ROOT)): words
        for source in SOURCES
        if source != OURSELVES and (words := private(source.read_text()))
    }

    assert found == {}


@pytest.mark.parametrize("sentence", ["The code must die.", "It tells `expired`.", "In vain.", "Nobody knows."])
def test_a_private_word_is_found(sentence: str) -> None:
    """The list finds what it is for."""

    assert private(sentence)
