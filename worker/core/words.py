"""Numbers, times and sentences as people read them."""

from __future__ import annotations

import math
import re
from typing import Final

NO_VALUE: Final = "–"

_WORD: Final = re.compile(r"(\s*)([^\s`]*`[^`]*`\S*|\S+)")
"""The blanks before a word, and the word; a command between backticks is one, so that people can copy it."""


def number(value: float) -> str:
    """A count: 12,345."""
    return f"{value:,.0f}"


def rate(per_second: float | None) -> str:
    """A rate: 412/s, 4.2/s, 0.05/s."""
    if per_second is None:
        return NO_VALUE
    if per_second and per_second < 0.01:
        return "< 0.01/s"
    decimals = 0 if per_second >= 10 or per_second == 0 else 1 if per_second >= 1 else 2
    return f"{per_second or 0:,.{decimals}f}/s"


def share(part: float, whole: float) -> str:
    """A part of a whole: 12 %."""
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def duration(seconds: float | None) -> str:
    """A duration, two units at most: 34 ms, 0.3 s, 12 s, 3 min 20 s, 4 h 5 min, 2 d 3 h."""
    if seconds is None:
        return NO_VALUE
    if math.isinf(seconds):
        return "very long"
    if seconds < 0.0995:
        return f"{max(seconds, 0.0) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, rest, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            left = whole % size // smaller
            return f"{whole // size} {unit} {left} {rest}" if left else f"{whole // size} {unit}"
    return f"{whole} s"


def quantile(seconds: float | None, longest: float) -> str:
    """A quantile of a histogram whose last finite bound is `longest` seconds."""
    return f"over {duration(longest)}" if seconds is not None and math.isinf(seconds) else duration(seconds)


def plural(count: float, noun: str) -> str:
    """1 command, 2 commands, 1 process, 2 processes."""
    if count == 1:
        return f"1 {noun}"
    return f"{number(count)} {noun}{'es' if noun.endswith(('s', 'h')) else 's'}"


def folded(text: str, width: int, indent: int = 0) -> str:
    """A sentence in lines of at most ``width`` columns, broken between words; a word that is longer has its own line.

    ``indent``: columns before all lines but the first.
    """
    lines, line = [], ""
    for gap, word in _WORD.findall(text):
        if line.strip() and len(line) + len(gap) + len(word) > width:
            lines.append(line)
            line = " " * indent + word
        else:
            line += gap + word
    return "\n".join([*lines, line])
