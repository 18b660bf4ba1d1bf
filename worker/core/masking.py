"""Secrets out of text that came from outside: error pages and refusals like to repeat the headers of the request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from typing import Final
from urllib.parse import quote, quote_plus

MASK: Final = b"***"
_SHORTEST: Final = 4
"""A shorter secret is part of ordinary words and numbers; to mask it would make answers unreadable."""
_ANCHOR: Final = re.compile(r"[A-Za-z0-9]{12}")
"""The first such run of a secret is in no ordinary text, and survives every escaping (JSON, HTML, URL) and a cut at the
end: the word that holds it is masked."""
_ONE_WORD: Final = re.compile(r"[A-Za-z0-9+/=_.~-]+")
"""Tokens and signatures are. Any other secret is looked for in its usual forms, which takes longer."""
_MARKS: Final = tuple(bytes([mark]) for mark in b" \t\r\n\x0b\x0c\"'<>,")
"""What ends a word."""


def masked(text: bytes, secrets: Iterable[str]) -> bytes:
    """``text`` without the secrets, as they are and in the usual escaped forms, whole or cut off at their end."""
    for secret in secrets:
        if len(secret) < _SHORTEST or len(text) < _SHORTEST:
            continue
        anchor, one_word = _traits(secret)
        if not one_word and any(map(text.__contains__, _forms(secret))):
            text = re.sub(b"|".join(map(re.escape, _forms(secret))), MASK, text)
        if anchor is not None and anchor in text:
            text = _without_words(text, anchor)
    return text


@lru_cache(maxsize=64)  # but for signatures, the same are looked for in every answer
def _traits(secret: str) -> tuple[bytes | None, bool]:
    """Its anchor, and whether its anchor's word is all of it."""
    anchor = _ANCHOR.search(secret)
    if anchor is None:
        return None, False
    return anchor[0].encode(), _ONE_WORD.fullmatch(secret) is not None


def _without_words(text: bytes, found: bytes) -> bytes:
    """Without the words that hold this. By search and not by a pattern, which takes quadratic time on one long word."""
    kept, start = [], 0
    while (at := text.find(found, start)) >= 0:
        left = max(text.rfind(mark, start, at) for mark in _MARKS) + 1
        kept += [text[start : max(left, start)], MASK]
        ends = [end for mark in _MARKS if (end := text.find(mark, at)) >= 0]
        start = min(ends, default=len(text))
        word = text[at:start]
        if start < len(text) and (len(word) - len(word.rstrip(b"\\"))) % 2:
            start -= 1  # the backslash belongs to the mark: JSON without it would be no JSON
    return b"".join([*kept, text[start:]])


@lru_cache(maxsize=16)
def _forms(secret: str) -> Sequence[bytes]:
    """The secret itself, and as URLs, HTML and JSON write it, the longest first; some encoders of JSON escape the
    slash."""
    forms = [secret, quote(secret, safe=""), quote_plus(secret), escape(secret)]
    for ascii_only in (True, False):
        written = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        forms += [written, written.replace("/", "\\/")]
    return sorted({form.encode("utf-8", "surrogatepass") for form in forms}, key=len, reverse=True)
