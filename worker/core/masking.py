"""Secrets out of text that came from outside: error pages and refusals like to repeat the headers of the request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
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
_WORD: Final = rb"[^\s\"'<>,]*"


def masked(text: bytes, secrets: Iterable[str]) -> bytes:
    """``text`` without the secrets, as they are and in the usual escaped forms, whole or cut off at their end."""
    for secret in secrets:
        if len(secret) < _SHORTEST or len(text) < _SHORTEST:
            continue
        anchor = _ANCHOR.search(secret)
        if anchor is not None and (found := anchor[0].encode()) in text:
            text = re.sub(_WORD + re.escape(found) + _WORD, MASK, text)
        if len(text) >= len(secret):
            for form in _forms(secret):
                text = text.replace(form, MASK)
    return text


@lru_cache(maxsize=256)
def _forms(secret: str) -> tuple[bytes, ...]:
    """The secret itself, and as URLs, HTML and JSON write it; some encoders of JSON escape the slash."""
    forms = [secret, quote(secret, safe=""), quote_plus(secret), escape(secret)]
    for ascii_only in (True, False):
        written = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        forms += [written, written.replace("/", "\\/")]
    return tuple({form.encode("utf-8", "surrogatepass"): None for form in forms})
