"""What a spreadsheet, or a program that takes numbers for numbers, makes of bill numbers and merchant ids.

Such a value is sent as it is, the gateway does not find it, and that answer is final: the QR code can still be
paid. So a value that looks like one is invalid until somebody says that it is meant.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from worker.core.words import plural

TEXT_COLUMN: Final = (
    "format the column as Text before the numbers are typed or pasted, or import the file with Data > From Text/CSV "
    "and the type Text, and export it again"
)
LONGEST_NUMBER: Final = 15
"""Digits that a spreadsheet keeps of a number; it puts zeros in the place of the rest."""
ENOUGH: Final = 5  # values, from which on a column has a usual length
MOST: Final = 0.5

_TEXT_FORMULA: Final = re.compile(r'="([^"=]*)"\Z')
_MONTHS: Final = (
    "jan|feb|mar|apr|may|mei|jun|jul|aug|agu|ags|agt|sep|oct|okt|nov|dec|des|january|januari|february|februari|march|"
    "maret|april|june|juni|july|juli|august|agustus|september|october|oktober|november|december|desember"
)
_CAUSES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), cause)
    for pattern, cause in (
        (r"['’‘`].*", "begins with the apostrophe that marks a text cell"),
        (r"=.*", "is a formula"),
        (r"\"[^\"]*\"|“[^”]*”", "stands in quotes"),
        (r"[+-]?[0-9]+(?:[.,][0-9]*)?E[+-][0-9]+", "is a number in scientific notation, whose last digits are gone"),
        (r"[+-]?[0-9]+[.,][0-9]*E[0-9]+", "is a number in scientific notation, whose last digits are gone"),
        (r"#+|#(?:N/A|REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|SPILL!|CALC!|FIELD!)", "is an error of the spreadsheet"),
        (r"NULL|\(NULL\)|NaN|NaT|None|Nil|N/A|NA|<NA>|undefined|\\N|true|false|-+", "stands for no value at all"),
        (r"[0-9]{1,4}([/.-])[0-9]{1,2}\1[0-9]{1,4}", "is a date"),
        (rf"[0-9]{{1,4}}[-/ ](?:{_MONTHS})(?:[-/ ][0-9]{{2,4}})?|(?:{_MONTHS})[-/ ][0-9]{{1,4}}", "is a date"),
        (r"[0-9]{1,4}:[0-9]{2}(?::[0-9]{2})?(?:[.,][0-9]+)?", "is a time"),
        (r"(?:Rp|IDR|USD|[$€£¥])\.?\s*[0-9][0-9.,]*|[0-9][0-9.,]*\s*%", "is an amount"),
        (r"\([0-9.,]+\)|[+-][0-9.,]+|[0-9.,]+-", "has the sign of a number"),
        (r"[0-9]{1,3}(?:[.,'’\s][0-9]{2,3})+(?:[.,][0-9]*)?", "has the separators of thousands"),
        (r"[0-9]*[.,][0-9]*", "has the decimals of a number"),
        (r"[0-9][0-9.,'’]*[0-9.,]", "has the separators of a number"),
    )
)


def unwrapped(text: str) -> str:
    """The value in a cell that a spreadsheet keeps as text by the formula ``="0010092081"``; else the cell itself."""
    found = _TEXT_FORMULA.match(text)
    return found[1].strip() if found else text


@lru_cache(maxsize=4096)  # the same merchants come again
def cause(text: str) -> str | None:
    """What a spreadsheet did to a value, as the end of a sentence about it; None if it looks like an identifier."""
    if text.isdigit():
        return None
    return next((cause for pattern, cause in _CAUSES if pattern.fullmatch(text)), None)


def intruder(text: str, longest: int) -> str:
    """What is wrong with a text that is no identifier: its first letter that may not be, or its length."""
    for place, letter in enumerate(text, 1):
        if not "!" <= letter <= "~":
            what = "a blank" if letter == " " else unicodedata.name(letter, f"U+{ord(letter):04X}").lower()
            return f"{shown(text)} has {what} at position {place}"
    return f"{shown(text)} has {len(text)} characters" if len(text) > longest else f"{shown(text)} is none"


def shown(text: str) -> str:
    """A value as a line of its own can hold it: control characters escaped, not too long."""
    return ascii(text) if not text.isprintable() else repr(text if len(text) <= 80 else text[:79] + "…")


@dataclass(slots=True)
class Column:
    """Digits of a column's values, to find what no single value shows: leading zeros and last digits that are gone."""

    name: str
    lengths: Counter[int] = field(default_factory=Counter)
    first: dict[int, tuple[int, str]] = field(default_factory=dict)  # by length: line and value
    long: int = 0
    long_with_zeros: int = 0

    def add(self, line: int, text: str) -> None:
        """One more value."""
        if not (text.isascii() and text.isdigit()):
            return
        self.lengths[len(text)] += 1
        self.first.setdefault(len(text), (line, text))
        if len(text) > LONGEST_NUMBER:
            self.long += 1
            self.long_with_zeros += not text[LONGEST_NUMBER:].strip("0")

    def remarks(self) -> Iterator[str]:
        """Sentences for people, none if nothing is odd."""
        total = sum(self.lengths.values())
        if total < ENOUGH:
            return
        usual, count = self.lengths.most_common(1)[0]
        fewer = sum(number for length, number in self.lengths.items() if length < usual)
        if fewer and count > total * MOST:
            line, text = self.first[min(length for length in self.lengths if length < usual)]
            yield (
                f"{plural(fewer, 'value')} of {self.name} {'has' if fewer == 1 else 'have'} fewer than {usual} digits, "
                f"which {count:,} of {total:,} have (line {line}: {text}); were leading zeros lost?"
            )
        if self.long >= ENOUGH and self.long == self.long_with_zeros:
            line, text = self.first[max(self.lengths)]
            yield (
                f"all values of {self.name} with more than {LONGEST_NUMBER} digits end in zeros (line {line}: {text}); "
                f"a spreadsheet keeps {LONGEST_NUMBER} digits of a number: were the last ones lost?"
            )
