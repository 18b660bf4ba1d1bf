"""What the token service answers: a token and how long it lives, or why there is none (gateway-api, section 3).

Of an answer with HTTP 2xx nothing is ever quoted but the names of its fields: any value in it may be a token.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from worker.core import jakarta
from worker.core.outcome import Reason
from worker.core.verdict import MAX_MESSAGE, Kind, NoReply, Reply, Verdict, json_object, judge

DEFAULT_LIFETIME: Final = 900.0  # SNAP's usual token lifetime, for a token service that does not say
MAX_LIFETIME: Final = 86_400.0  # a longer one is not believed: asking once a day costs nothing
MAX_TOKEN: Final = 4096  # characters; SNAP allows 2048
JAKARTA: Final = timezone(timedelta(seconds=jakarta.OFFSET_SECONDS))

_FIELD_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_. -]{0,23}")
_FIELDS_SHOWN: Final = 8
_OPAQUE: Final = re.compile(r"[A-Za-z0-9+/=_.~-]{24,}")  # longer than any word


@dataclass(frozen=True, slots=True)
class Grant:
    """A token and the seconds it lives, counted from before it was asked for."""

    value: str = field(repr=False)
    lifetime: float


def granted(reply: Reply, epoch: float) -> Grant | str:
    """The token, or why there is none, as a text for people. ``epoch``: when the answer came.

    SNAP makes responseCode mandatory only on failure: success is HTTP 2xx and a token that can be a header.
    """
    if not 200 <= reply.status < 300:
        return f"HTTP {reply.status} is no success"
    fields = json_object(reply.body)
    if fields is None:
        found = "no JSON object" if reply.body.strip() else "an empty body"
        return f"HTTP {reply.status} with {found}, so without a token"
    problem = _problem(fields.get("accessToken"), fields)
    if problem:
        return f"HTTP {reply.status} without a usable token: {problem}"
    return Grant(fields["accessToken"], _lifetime(fields.get("expiresIn"), epoch))


def judge_token(answer: Reply | NoReply) -> Verdict:
    """The token service's answer in the words of the verdict table, where it was no token: refused → systemic,
    throttled, else transient. Nothing took effect, whatever it was."""
    verdict = judge(answer)
    refused = verdict.kind in (Kind.REFUSED, Kind.TOKEN, Kind.SYSTEMIC, Kind.ID_CLASH)
    kind = Kind.SYSTEMIC if refused else Kind.THROTTLED if verdict.kind is Kind.THROTTLED else Kind.TRANSIENT
    if verdict.reason is Reason.ALREADY_EXPIRED:  # 403xx00: for a token it is "forbidden"
        kind = Kind.SYSTEMIC
    message = f"token service: {said(answer)}"[:MAX_MESSAGE]
    return Verdict(kind, None, False, verdict.code, message, verdict.note, verdict.retry_after)


def said(answer: Reply | NoReply) -> str:
    """What an answer without a token says, without anything that could be one: of a 2xx only which rule it breaks, of
    JSON that speaks of tokens only its field names, else its text without long opaque words."""
    verdict = judge(answer)
    if isinstance(answer, NoReply):
        return verdict.message
    if 200 <= answer.status < 300:
        problem = granted(answer, 0.0)
        return problem if isinstance(problem, str) else f"HTTP {answer.status} with a token"
    fields = json_object(answer.body)
    if fields is not None and any("token" in name.lower() for name in fields):
        return f"HTTP {answer.status} without a usable token ({_names(fields)})"
    return _OPAQUE.sub("***", verdict.message) or "an answer without a token"


def _problem(token: object, fields: dict[str, Any]) -> str:
    """The rule that a token breaks; empty when it breaks none."""
    if token is None:
        return f"accessToken is missing ({_names(fields)})"
    if not isinstance(token, str):
        return "accessToken is no string"
    if not token:
        return "accessToken is empty"
    if len(token) > MAX_TOKEN:
        return f"accessToken has {len(token)} characters, more than {MAX_TOKEN}"
    if not (token.isascii() and token.isprintable()):
        return "accessToken has characters that no header can carry"
    if " " in token:
        return "accessToken has a blank in it"
    return ""


def _names(fields: dict[str, Any]) -> str:
    names = [name if _FIELD_NAME.fullmatch(name) else "***" for name in fields]
    if not names:
        return "it has no fields"
    more = f" and {len(names) - _FIELDS_SHOWN} more" if len(names) > _FIELDS_SHOWN else ""
    return f"its fields are {', '.join(names[:_FIELDS_SHOWN])}{more}"


def _lifetime(value: object, epoch: float) -> float:
    """``expiresIn`` as seen in the wild: the string "900", an integer, or a date-time."""
    seconds = _seconds(value)
    if seconds is None and isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=JAKARTA)).timestamp() - epoch
        except (ValueError, OverflowError):
            pass
    return DEFAULT_LIFETIME if seconds is None else min(max(seconds, 1.0), MAX_LIFETIME)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        seconds = float(value)
    except (ValueError, OverflowError):  # a JSON integer may be larger than any float
        return None
    return seconds if math.isfinite(seconds) else None
