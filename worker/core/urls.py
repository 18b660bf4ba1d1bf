"""What the URLs of the settings may look like.

A problem is a text for people that never repeats the URL: it may hold a password.
"""

from __future__ import annotations

import ast
import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import SplitResult, parse_qsl, urlsplit

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\.?\Z")
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*\Z")  # RFC 3986, 3.3


def is_host(name: str) -> bool:
    """A host name or an IP address, without port and brackets."""
    return bool(_HOST.match(name)) or is_address(name)


def is_address(name: str) -> bool:
    """An IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, by its name or address alone."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_path(text: str) -> bool:
    """The path of a URL, absolute, without query and fragment."""
    return bool(_PATH.match(text))


def base_url_problem(url: str) -> str | None:
    """Why ``url`` is not the base of an HTTP service; None when it is."""
    parts = _split(url)
    if not url.isprintable() or " " in url:
        return "holds blanks or control characters; remove them"
    if parts is None or not is_host(parts.hostname or ""):
        return "has no valid host and port; write it as https://host/v1.0"
    if parts.scheme not in ("http", "https"):
        return "must begin with https://"
    if "@" in parts.netloc:
        return "must not carry a user or password; remove them"
    if "?" in url or "#" in url:
        return "must not have a query or fragment; end it with the version, as in https://host/v1.0"
    if parts.path and not is_path(parts.path):
        return "has characters in its path that a URL does not allow; percent-encode them"
    return None


def split_amqp_urls(text: str) -> list[str]:
    """One or several URLs. A comma only separates where a scheme follows, since a password may hold one."""
    return re.split(r"\s*,\s*(?=amqps?://)", text, flags=re.IGNORECASE)


def is_tls(amqp_url: str) -> bool:
    """Whether the scheme of an AMQP URL is the one for TLS."""
    return amqp_url.lower().startswith("amqps:")


def amqp_url_problem(url: str) -> str | None:
    """Why ``url`` cannot be connected to as an AMQP URL; None when it can."""
    if not url.isprintable() or " " in url:
        return "holds blanks or control characters; percent-encode them"
    if not re.match(r"amqps?://", url, re.IGNORECASE):
        return "must begin with amqp:// or amqps://"
    parts = _split(url)
    if parts is None:
        return "has no valid port; percent-encode '/', '?', '#', '[' and '@' in user and password"
    return _parts_problem(url, parts) or _options_problem(parts.query)


def management_url_problem(url: str) -> str | None:
    """Why ``url`` cannot be where the broker's management API is, with a login for it; None when it can."""
    parts = _split(url)
    if not url.isprintable() or " " in url or parts is None or not is_host(parts.hostname or ""):
        return "has no valid host; write it as https://user:password@host:15671"
    if parts.scheme not in ("http", "https"):
        return "must begin with https://"
    if not parts.username or not parts.password or parts.netloc.count("@") > 1:
        return "must carry user and password, percent-encoded"
    if parts.path.strip("/") or "?" in url or "#" in url:
        return "must end after the port"
    return None


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        return None if parts.port == 0 else parts
    except ValueError:
        return None


def _parts_problem(url: str, parts: SplitResult) -> str | None:
    if parts.netloc.count("@") > 1:
        return "has more than one '@'; percent-encode it as %40 in user and password, begin every URL with amqp://"
    if not is_host(parts.hostname or ""):
        return "has no valid host; write it as amqp://user:password@host:port/vhost"
    if parts.username is not None and (not parts.username or parts.password is None):
        return "must give both user and password, or neither"
    if "#" in url or "@" in parts.path or "," in parts.path:
        return "has '@', ',' or '#' after the host; percent-encode them, begin every URL with amqp://"
    if parts.path.count("/") > 1:
        return "has a '/' in its virtual host; percent-encode it as %2F"
    return None


def _options_problem(query: str) -> str | None:
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        return "has something after '?' that is not name=value"
    names = [name for name, _ in options]
    if len(set(names)) < len(names):
        return "gives an option twice"
    for name, value in options:
        if name == "ssl_options":
            return "sets ssl_options, which can turn the check of certificates off; use AMQP_CA_FILE instead"
        valid = _OPTIONS.get(name)
        if valid is None:
            return f"has an unknown option; known are {', '.join(_OPTIONS)}"
        if not valid(value):
            return f"has an option {name} with a value that it cannot take"
    return None


def _whole(low: int, high: int) -> Callable[[str], bool]:
    return lambda text: bool(re.fullmatch(r"[0-9]{1,9}", text)) and low <= int(text) <= high


def _seconds(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text)) and float(text) > 0


def _mapping(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), dict)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


# What pika 1.4 takes in a URL, but for what would weaken TLS.
_OPTIONS: Final[Mapping[str, Callable[[str], bool]]] = {
    "blocked_connection_timeout": _seconds,
    "channel_max": _whole(1, 65_535),
    "client_properties": _mapping,
    "connection_attempts": _whole(1, 1_000),
    "frame_max": _whole(4_096, 131_072),
    "heartbeat": _whole(0, 65_535),
    "locale": str.isprintable,
    "retry_delay": _seconds,
    "socket_timeout": _seconds,
    "stack_timeout": _seconds,
    "tcp_options": _mapping,
}
