"""The gateway over HTTP: a session per call under way, no retries, every failure translated at this one door."""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlsplit

import requests
import structlog
from requests.adapters import BaseAdapter
from requests.utils import should_bypass_proxies

from worker import __version__
from worker.core import jakarta
from worker.core.grant import Grant, granted, judge_token
from worker.core.masking import masked
from worker.core.ports import TokenUnavailable
from worker.core.request import SignedRequest
from worker.core.urls import is_loopback
from worker.core.verdict import NoReply, Reply, printable, read
from worker.shells.transport import BoundedAdapter, NotSent, Proxy, Starved, TooLate

COMMON_HEADERS: Final = {
    # The default rules of AWS WAF refuse a request without one.
    "User-Agent": f"qris-expire-worker/{__version__}",
    # What comes encoded all the same is decoded by the transport.
    "Accept-Encoding": "identity",
}
_TOKEN_BODY: Final = b'{"grantType":"client_credentials"}'
STARVED_EVERY: Final = 60.0  # seconds between two log lines about missing descriptors
_SKEW_EVERY: Final = 5.0  # seconds between two readings of the Date header: parsing it costs as much as the signature


log = structlog.get_logger()


class ExchangeObserver(Protocol):
    """What the client reports about each exchange."""

    def request(self, operation: str, response_code: str, seconds: float) -> None: ...
    def clock_skew(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how: URLs with the version in them, timeouts in seconds (the second bounds the whole answer)."""

    token_url: str
    expire_url: str
    connect_timeout: float
    read_timeout: float


class Trust(Protocol):
    """Whom to trust for https, and what must be in no text; read again for each call, since both may be rotated."""

    @property
    def context(self) -> ssl.SSLContext | None: ...
    @property
    def secrets(self) -> Iterable[str]: ...


class Plain(NamedTuple):
    """What never changes."""

    context: ssl.SSLContext | None = None
    secrets: Iterable[str] = ()


PLAIN: Final = Plain()


class GatewayClient:
    """The `Gateway` of the core's ports, and the token service. For one thread, whose fibers may all call at once.

    The secrets of ``trust`` are masked in whatever comes back, and so are the token and the signature of the call.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        observer: ExchangeObserver,
        *,
        trust: Trust = PLAIN,
        adapter: Callable[[ssl.SSLContext | None], BaseAdapter] = BoundedAdapter,
    ) -> None:
        self._endpoint = endpoint
        self._observer = observer
        self._trust = trust
        self._adapter = adapter
        self._free: list[_Session] = []
        self._skew_read_at = float("-inf")
        self._starved_told_at = float("-inf")

    def send(self, request: SignedRequest, until: float = math.inf) -> Reply | NoReply:
        """One expire call; see `Gateway`."""
        return self._post(self._endpoint.expire_url, request.headers, request.body, until)

    def fetch_token(self, client_id: str, timestamp: str, signature: str) -> Grant:
        """One token request. Raises `TokenUnavailable` with the judgement of what came instead of a token."""
        headers = {
            "Content-Type": "application/json",
            "X-TIMESTAMP": timestamp,
            "X-CLIENT-KEY": client_id,
            "X-SIGNATURE": signature,
        }
        started = time.monotonic()
        answer = self._post(self._endpoint.token_url, headers, _TOKEN_BODY)
        code = read(answer.body)[0] if isinstance(answer, Reply) else None
        self._observer.request("token", code or "", time.monotonic() - started)
        grant = granted(answer, time.time()) if isinstance(answer, Reply) else None
        if not isinstance(grant, Grant):
            raise TokenUnavailable(judge_token(answer), answer=answer)
        return grant

    def close(self) -> None:
        """Gives kept connections back; only for a client that nobody is calling with."""
        while self._free:
            self._free.pop().close()

    def _tell_starved(self) -> None:
        now = time.monotonic()
        if now - self._starved_told_at > STARVED_EVERY:
            self._starved_told_at = now
            log.warning(
                "connection.no_descriptor",
                reason="this process may open no more files; commands wait, and no attempt is counted",
                action="raise the limit of open files (ulimit -n, LimitNOFILE=), or lower WORKER_CONCURRENCY",
            )

    def _post(self, url: str, headers: dict[str, str], body: bytes, until: float = math.inf) -> Reply | NoReply:
        prepared = requests.PreparedRequest()
        prepared.method, prepared.url, prepared.body = "POST", url, body
        prepared.headers = headers | COMMON_HEADERS  # type: ignore[assignment]  # a plain dict does
        timeout: Any = (self._endpoint.connect_timeout, self._endpoint.read_timeout, until)
        started = time.monotonic()
        session = self._session()
        try:
            # The adapter directly: `Session.send` would add hooks, cookies, redirects and a clock of its own.
            response = session.adapter.send(prepared, timeout=timeout)
        except Starved as error:
            self._tell_starved()
            return NoReply(False, printable(str(error)), starved=True)
        except TooLate as error:
            return NoReply(False, str(error), late=True)
        except NotSent as error:
            return NoReply(False, printable(str(error)))
        except requests.RequestException as error:
            return NoReply(True, printable(str(error)))
        finally:
            self._free.append(session)
        fields = response.headers
        if started - self._skew_read_at >= _SKEW_EVERY:
            self._read_skew(fields.get("date"), started)
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        secrets = (token, headers.get("X-SIGNATURE", ""), *self._trust.secrets)
        retry_after, challenge = fields.get("retry-after"), fields.get("www-authenticate")
        return Reply(
            response.status_code,
            masked(response.content, secrets),
            None if retry_after is None else _masked_header(retry_after, secrets),
            None if challenge is None else _masked_header(challenge, secrets),
        )

    def _session(self) -> _Session:
        """The one that was used last, so that as few connections as possible are kept alive; a new one when all are in
        use, or trust was rotated."""
        context = self._trust.context
        while self._free:
            session = self._free.pop()
            if session.context is context:
                return session
            session.close()
        return _Session(context, self._adapter(context))

    def _read_skew(self, date: str | None, started: float) -> None:
        """How far our clock is ahead of the gateway's, in seconds: to half a second, since Date has whole ones."""
        if date is None:
            return
        now = self._skew_read_at = time.monotonic()
        try:
            moment = parsedate_to_datetime(date)
            theirs = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError):
            return
        self._observer.clock_skew(time.time() - (now - started) / 2 - (theirs + 0.5))


class _Session(requests.Session):
    """requests' session with one adapter of ours, and the trust that this was made with."""

    def __init__(self, context: ssl.SSLContext | None, adapter: BaseAdapter) -> None:
        super().__init__()
        self.context = context
        self.adapter = adapter
        for scheme in ("https://", "http://"):
            self.mount(scheme, adapter)


def _masked_header(value: str, secrets: Iterable[str]) -> str:
    return masked(value.encode("latin-1"), secrets).decode("latin-1")


def timestamp(epoch: float, *, milliseconds: bool) -> str:
    """X-TIMESTAMP of the token request."""
    return jakarta.iso(epoch, milliseconds=milliseconds)


def proxy_for(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY in ``environ`` have for ``url``, small letters
    first. To be asked once: for every call it would cost as much as that.

    This machine is never behind a proxy. Raises ValueError for a proxy that cannot be spoken to: one line, the variable
    first, never its value, which may hold a password.
    """
    parts = urlsplit(url)
    names = [f"{parts.scheme}_proxy", "all_proxy"]
    found = [(name, environ.get(name) or environ.get(name.upper())) for name in names]
    name, proxy = next(((name.upper(), proxy) for name, proxy in found if proxy), ("", ""))
    bypassed = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if not proxy or is_loopback(parts.hostname or "") or should_bypass_proxies(url, no_proxy=bypassed):
        return None
    try:
        return Proxy.at(proxy)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
