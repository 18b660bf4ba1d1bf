"""What values may be: functions that make a value from the text of a variable.

Each raises `ValueError` with a text for people. The text never repeats the value, since that may be a secret in the
wrong variable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from worker.core.command import IDENTIFIER_RULE, is_identifier
from worker.core.urls import (
    amqp_url_problem,
    base_url_problem,
    is_host,
    is_path,
    is_tls,
    management_url_problem,
    split_amqp_urls,
)
from worker.settings.group import Secret

N = TypeVar("N", int, float)

MAX_DELAY_SECONDS: Final = 7 * 86_400
"""A command that waits longer than a week would outlive the people who could still act on its outcome."""

MAX_DELAYS: Final = 20
"""Each delay is a queue for every lane."""

_FLAGS: Final = {
    **dict.fromkeys(("true", "1", "yes", "on", "t", "y"), True),
    **dict.fromkeys(("false", "0", "no", "off", "f", "n"), False),
}
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?\Z")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")

_OWN_HEADERS: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "host",
        "transfer-encoding",
        "user-agent",
        "x-client-key",
        "x-external-id",
        "x-partner-id",
        "x-signature",
        "x-timestamp",
    }
)


# -- any setting


def flag(text: str) -> bool:
    """``true`` or ``false``; the usual other words for them are taken as well."""
    try:
        return _FLAGS[text.strip().lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def number(*, above: float | None = None, least: float | None = None, most: float) -> Callable[[str], float]:
    """A finite number within bounds: above ``above`` or at least ``least``, and at most ``most``."""
    return _bounded(float, "a number", above, least, most)


def whole(*, least: int, most: int) -> Callable[[str], int]:
    """A whole number from ``least`` to ``most``."""
    return _bounded(int, "a whole number", None, least, most)


def _bounded(kind: type[N], words: str, above: float | None, least: float | None, most: float) -> Callable[[str], N]:
    lowest = f"above {above}" if above is not None else f"of at least {least}"
    said = f"must be {words} {lowest} and at most {most}"

    def rule(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(said) from None
        high_enough = value > above if above is not None else least is None or value >= least
        if not (math.isfinite(value) and high_enough and value <= most):
            raise ValueError(said)
        return value

    return rule


def seconds(*, most: float) -> Callable[[str], float]:
    """Seconds, fractions allowed, above zero."""
    return number(above=0, most=most)


def one_of(*words: str) -> Callable[[str], str]:
    """One of these words, in upper or lower case."""

    def rule(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return text.lower()

    return rule


def fitting(fits: Callable[[str], object], said: str) -> Callable[[str], str]:
    """Text as it is, if it fits; else what is ``said``."""

    def rule(text: str) -> str:
        if not fits(text):
            raise ValueError(said)
        return text

    return rule


def readable_file(text: str) -> Path:
    """The path of a regular file that can be opened."""
    path = Path(text)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("is not a regular file; give the path of one")
        path.open("rb").close()
    except FileNotFoundError:
        raise ValueError("no such file; mount it, or correct the path") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); make it readable, or correct the path") from None
    return path


# -- the broker


def amqp_prefix(text: str) -> str:
    """What a queue's name can begin with."""
    if len(text) > 100:
        raise ValueError("must be text of at most 100 characters")
    if not _PREFIX.match(text):
        raise ValueError("must be letters, digits, '.', '_' and '-', beginning with a letter or digit")
    if text.startswith("amq."):
        raise ValueError("must not begin with 'amq.', which the broker keeps for itself")
    return text


def amqp_urls(text: str) -> Secret:
    """One URL or several; a secret, since they hold a password."""
    urls = split_amqp_urls(text)
    for count, url in enumerate(urls, 1):
        problem = amqp_url_problem(url)
        if problem:
            raise ValueError(problem if len(urls) == 1 else f"URL {count} of {len(urls)} {problem}")
    if len({is_tls(url) for url in urls}) > 1:
        raise ValueError("mixes amqp:// and amqps://, so that a lost node leads to a login in clear; use one of them")
    return Secret(text)


def management_url(text: str) -> Secret:
    """Scheme, login and host of the broker's management API; a secret, since it holds a password."""
    problem = management_url_problem(text)
    if problem:
        raise ValueError(problem)
    return Secret(text)


# -- the gateway, and where we are reached


host = fitting(is_host, "must be an address or a host name")
url_path = fitting(is_path, "must be a path that begins with '/', without query or fragment")
header_value = fitting(
    _HEADER_VALUE.match, "must be printable ASCII without blanks around it, since it is sent as a header"
)
member = fitting(
    lambda text: _MEMBER.match(text) and text != "additionalInfo",
    "must be the name of a JSON field, for example billnumber or billNumber",
)
identifier = fitting(is_identifier, f"must be {IDENTIFIER_RULE}")


def base_url(text: str) -> str:
    """The base of an HTTP service, without a trailing slash."""
    problem = base_url_problem(text)
    if problem:
        raise ValueError(problem)
    return text.rstrip("/")


def header_names(text: str) -> tuple[str, ...]:
    """Names of headers, separated by commas, none of them one that the worker sets itself."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(_TOKEN.match(name) for name in names):
        raise ValueError("must be names of HTTP headers, separated by commas")
    lowered = [name.lower() for name in names]
    if len(set(lowered)) < len(lowered):
        raise ValueError("names a header twice; name each once")
    if not _OWN_HEADERS.isdisjoint(lowered):
        raise ValueError("names a header that the worker sets itself; leave those that carry the channel id")
    return names


# -- retrying


def delays(text: str) -> tuple[int, ...]:
    """Whole seconds before each delayed round; ``none`` for no delayed rounds. Entries may repeat."""
    if text.strip().lower() == "none":
        return ()
    texts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in texts):
        raise ValueError("must be whole seconds separated by commas, for example 30,300,1800, or none")
    values = tuple(map(int, texts))
    if any(later < earlier for earlier, later in zip((1, *values), values, strict=False)):
        raise ValueError("must be above 0 and must not decrease from entry to entry")
    if values[-1] > MAX_DELAY_SECONDS:
        raise ValueError(f"must not go beyond {MAX_DELAY_SECONDS} seconds, a week")
    if len(values) > MAX_DELAYS:
        raise ValueError(f"must have at most {MAX_DELAYS} entries, since each is a queue for every lane")
    return values
