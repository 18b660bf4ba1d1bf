"""What values may be. No message repeats one: it may be a secret in the wrong variable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from worker.core.command import is_identifier
from worker.core.urls import amqp_url_problem, base_url_problem, is_host, is_path, split_amqp_urls

MAX_DELAY_SECONDS: Final = 7 * 86_400
"""A delayed round beyond a week would outlive whoever could still act on its outcome."""

MAX_DELAYS: Final = 20
"""Each delay is a queue for every lane."""


_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?\Z")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

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


def _amqp_prefix(value: str) -> str:
    if not _PREFIX.match(value):
        raise ValueError("must be letters, digits, '.', '_' and '-', beginning with a letter or digit")
    if value.startswith("amq."):
        raise ValueError("must not begin with 'amq.', which the broker keeps for itself")
    return value


def _amqp_urls(value: SecretStr) -> SecretStr:
    urls = split_amqp_urls(value.get_secret_value())
    for number, url in enumerate(urls, 1):
        problem = amqp_url_problem(url)
        if problem:
            raise ValueError(problem if len(urls) == 1 else f"URL {number} of {len(urls)} {problem}")
    return value


def _base_url(value: str) -> str:
    problem = base_url_problem(value)
    if problem:
        raise ValueError(problem)
    return value.rstrip("/")


def _url_path(value: str) -> str:
    if not is_path(value):
        raise ValueError("must be a path that begins with '/', without query or fragment")
    return value


def _host(value: str) -> str:
    if not is_host(value):
        raise ValueError("must be an address or a host name")
    return value


def _header_value(value: str) -> str:
    if not _HEADER_VALUE.match(value):
        raise ValueError("must be printable ASCII without blanks around it, since it is sent as a header")
    return value


def _header_names(value: object) -> object:
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    if not isinstance(names, tuple) or not names or not all(_TOKEN.match(str(name)) for name in names):
        raise ValueError("must be names of HTTP headers, separated by commas")
    lowered = [str(name).lower() for name in names]
    if len(set(lowered)) < len(lowered):
        raise ValueError("names a header twice; name each once")
    if not _OWN_HEADERS.isdisjoint(lowered):
        raise ValueError("names a header that the worker sets itself; leave those that carry the channel id")
    return names


def _merchant(value: str) -> str:
    if not is_identifier(value):
        raise ValueError("must be 1 to 64 printable ASCII characters without blanks")
    return value


def _member(value: str) -> str:
    if not _MEMBER.match(value) or value == "additionalInfo":
        raise ValueError("must be the name of a JSON field, as billnumber or billNumber")
    return value


def _delays(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "none":
        return ()
    texts = [text.strip() for text in value.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts):
        raise ValueError("must be whole seconds separated by commas, as 30,300,1800, or none")
    return tuple(int(text) for text in texts)


def _increasing(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in zip((0, *value), value, strict=False)):
        raise ValueError("must be above 0 and increase from entry to entry")
    if value and value[-1] > MAX_DELAY_SECONDS:
        raise ValueError(f"must not go beyond {MAX_DELAY_SECONDS} seconds, a week")
    if len(value) > MAX_DELAYS:
        raise ValueError(f"must have at most {MAX_DELAYS} entries, since each is a queue for every lane")
    return value


def _readable(value: Path) -> Path:
    try:
        if value.exists() and not value.is_file():
            raise ValueError("is not a regular file; give the path of one")
        value.open("rb").close()
    except FileNotFoundError:
        raise ValueError("no such file; mount it, or correct the path") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); make it readable, or correct the path") from None
    return value


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


AmqpPrefix = Annotated[str, Field(max_length=100), AfterValidator(_amqp_prefix)]
AmqpUrls = Annotated[SecretStr, AfterValidator(_amqp_urls)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
UrlPath = Annotated[str, AfterValidator(_url_path)]
Host = Annotated[str, AfterValidator(_host)]
HeaderValue = Annotated[str, AfterValidator(_header_value)]
HeaderNames = Annotated[tuple[str, ...], BeforeValidator(_header_names)]
Merchant = Annotated[str, AfterValidator(_merchant)]
Member = Annotated[str, Field(max_length=64), AfterValidator(_member)]
Delays = Annotated[tuple[int, ...], BeforeValidator(_delays), AfterValidator(_increasing)]
ReadableFile = Annotated[Path, AfterValidator(_readable)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
QueueType = Literal["quorum", "classic"]
Signature = Literal["hmac-sha512", "rsa-sha256", "rsa-sha256-no-token"]
LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
