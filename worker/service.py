"""One worker process: wires everything, waits for signals, drains, and says with its exit code how it ended."""

from __future__ import annotations

import itertools
import os
import random
import secrets
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any, Final

import structlog
from requests.adapters import BaseAdapter

from worker import __version__, signals
from worker.app.expire import Expire, Hold
from worker.app.gate import SendersGate
from worker.core import diagnosis
from worker.core.breaker import Breaker, Pacer, Throttle
from worker.core.delivery import Delivery
from worker.core.lanes import CANCELLATION, SWEEP, Lanes, sweep_cap
from worker.core.ports import TokenUnavailable
from worker.core.request import NODE_DIGITS, Partner, external_id
from worker.core.retry import RetryPolicy
from worker.core.topology import Names, topology
from worker.core.verdict import Kind, NoReply
from worker.settings import AmqpSettings, GatewaySettings, Settings, SettingsError
from worker.shells.amqp.connection import new_loop
from worker.shells.amqp.engine import Crashed, Dropped, Engine, Plan
from worker.shells.amqp.session import BrokerError, parameters
from worker.shells.clock import SystemClock
from worker.shells.credentials import KEPT, Credentials, CredentialsError
from worker.shells.fibers import Event, Fibers, Lock
from worker.shells.gateway import Endpoint, GatewayClient, Grant, proxy_for, timestamp
from worker.shells.http import Health, HealthServer, ListenError
from worker.shells.metrics import Metrics
from worker.shells.pool import Pool
from worker.shells.telemetry import Telemetry
from worker.shells.tokens import TokenStore
from worker.shells.transport import BLOCKING, BoundedAdapter

DRAINED, FORCED, MISCONFIGURED, REFUSED = 0, 1, 2, 3
FAILED: Final = 1
PREFETCH_PER_SENDER: Final = 2
"""Deliveries waiting in the process for each sender: one in hand, one behind it. More would only be redelivered after a
crash, and would keep commands from other processes."""
LOOP_SILENT: Final = 15.0  # seconds: a broker loop that has not turned for so long hangs, and only a restart helps
SENDER_SILENT: Final = 120.0
"""Margin in seconds beyond a round's own bounds after which a sender counts as hung."""
SECRETS_EVERY: Final = 2.0  # seconds between two looks at mounted secrets

log = structlog.get_logger()


class Calls:
    """What calls the gateway, wired in one place: for the worker, and for a sweep that goes without a broker. All of it
    runs in fibers."""

    def __init__(self, settings: Settings, telemetry: Telemetry, clock: SystemClock, rng: random.Random) -> None:
        gateway = settings.gateway
        self.fibers = Fibers(new_loop())
        self.credentials = Credentials(gateway, _rereading(gateway))
        self.gate = _gate(settings, clock, rng, self.fibers)
        client = GatewayClient(
            endpoint(gateway),
            telemetry,
            context=lambda: self.credentials.context,
            adapter=transport(gateway, os.environ, self.fibers),
        )
        self.tokens = TokenStore(
            fetcher(client, self.credentials, gateway, clock),
            telemetry,
            clock=clock,
            rng=rng,
            pause=self.gate.sleep,
            flight=Lock(self.fibers),
        )
        self.expire = Expire(
            gateway=client,
            tokens=self.tokens,
            gate=self.gate,
            observer=telemetry,
            clock=clock,
            rng=rng,
            policy=_policy(settings),
            partner=partner(gateway),
            signer=lambda: self.credentials.sign,
            new_external_id=external_ids(clock),
            default_merchant=gateway.merchant_id,
        )
        self._secrets_at = time.monotonic() + SECRETS_EVERY

    def take_over_secrets(self) -> None:
        """Looks whether mounted secrets have changed; to be asked again and again, it knows how often to look."""
        if time.monotonic() < self._secrets_at:
            return
        self._secrets_at = time.monotonic() + SECRETS_EVERY
        if self.credentials.refresh():
            self.tokens.renew()


def calls(settings: Settings) -> Calls:
    """For a process that serves no metrics. Raises `CredentialsError`."""
    return Calls(settings, Telemetry(_metrics()), SystemClock(), random.Random())


class Worker:
    """Everything one process is made of, wired in one place."""

    def __init__(self, settings: Settings) -> None:
        clock, rng = SystemClock(), random.Random()
        self.settings = settings
        self.metrics = _metrics()
        self.metrics.started(clock.epoch())
        self.calls = Calls(settings, Telemetry(self.metrics), clock, rng)
        self.gate, self.expire = self.calls.gate, self.calls.expire
        self.engine = Engine(
            _plan(settings, settings.retry.delays_seconds),
            _broker_parameters(settings.amqp),
            fibers=self.calls.fibers,
            gate=self.gate,
            watch=self.metrics,
            clock=clock,
            rng=rng,
        )
        lanes: Lanes[Delivery] = Lanes(settings.worker.concurrency, settings.worker.sweep_share)
        self.pool = Pool(lanes, self.gate, self.work, self.calls.fibers)
        self.metrics.senders(settings.worker.concurrency)

    def work(self, delivery: Delivery, probe: bool) -> bool:
        """One command in one sender's hands. True when it stays in its lane."""
        assert delivery.entry is not None
        if delivery.entry.orphaned:
            if probe:
                self.gate.probe_lost()  # or none would ever follow it
            self.engine.finish(delivery, Dropped())
            return False
        self.metrics.in_hand(delivery.lane, 1)
        try:
            result = self.expire(delivery, probe=probe)
        except Exception as error:  # a bug of ours must not take the other senders with it
            log.error("sender.crashed", command_id=delivery.command_id, lane=delivery.lane, exc_info=error)
            self.engine.finish(delivery, Crashed())
            return False
        finally:
            self.metrics.in_hand(delivery.lane, -1)
            if probe:
                self.gate.probe_lost()
        if isinstance(result, Hold):
            return True
        self.engine.finish(delivery, result)
        return False

    # -- what probes read -------------------------------------------------------------------------------------------

    def live(self) -> Health:
        """Whether the loops turn; never the broker or the gateway, or their outage would restart every process."""
        silent = self.engine.silent_for
        return Health(self.engine.running and silent < LOOP_SILENT, {"broker_loop": f"turned {silent:.1f} s ago"})

    def ready(self) -> Health:
        """Whether commands are being taken."""
        components = self.engine.status()
        return Health(all(state == "ok" for state in components.values()), components)

    def scrape(self) -> bytes:
        """The metrics."""
        return self.metrics.render()


class _Endpoint:
    """The `Source` of the health server."""

    def __init__(self, worker: Worker) -> None:
        self.metrics = worker.scrape
        self.live = worker.live
        self.ready = worker.ready


def serve(settings: Settings) -> int:
    """Runs one worker until a signal drains it. Returns the exit code."""
    try:
        worker = Worker(settings)
    except (CredentialsError, BrokerError) as error:
        return _say(MISCONFIGURED, "settings.unusable", str(error))
    server = _server(settings, worker)
    try:
        server.start()
    except ListenError as error:
        return _say(MISCONFIGURED, "metrics.not_served", str(error))
    log.info(
        "worker.starting",
        version=__version__,
        prefix=settings.amqp.prefix,
        concurrency=settings.worker.concurrency,
    )
    for advice in settings.advice():
        log.warning("settings.advice", reason=advice)
    try:
        worker.pool.start()
        worker.engine.start(worker.pool)
        code = _check_credentials(worker)
        if code is None:
            if not signals.received():
                worker.engine.begin()
            code = _watch(worker)
        return code
    finally:
        server.stop()


def _watch(worker: Worker) -> int:
    """Until a signal, or something that only a restart mends."""
    while signals.wait(0.5) == 0:
        code = _trouble(worker)
        if code is not None:
            return code
        worker.calls.take_over_secrets()
    return _drain(worker)


def _trouble(worker: Worker) -> int | None:
    engine = worker.engine
    if engine.refused is not None:
        return _say(REFUSED, "broker.refused", engine.refused, "correct AMQP_URL: user, password, vhost, permissions")
    if engine.failure is not None or not engine.running:
        what = f"the broker loop ended: {engine.failure!r}"
        return _say(FAILED, "worker.failed", what, "restart; report the traceback")
    held = worker.pool.longest()
    if held > _longest_round(worker.settings):
        return _say(FAILED, "worker.hung", f"a sender has held its command for {held:.0f} s", "restart")
    if engine.silent_for > LOOP_SILENT:
        return _say(FAILED, "worker.hung", f"the broker loop has not turned for {engine.silent_for:.0f} s", "restart")
    return None


def _longest_round(settings: Settings) -> float:
    """Seconds after which a sender can only hang: budget, a last call and a last token request (one's own and one that
    it waited for), its place under the rate limit, and a margin."""
    gateway, rate = settings.gateway, settings.gateway.max_requests_per_second
    call = gateway.connect_timeout_seconds + gateway.read_timeout_seconds
    queue = settings.worker.concurrency * settings.retry.max_attempts / rate if rate else 0.0
    return settings.retry.budget_seconds + 3 * call + queue + SENDER_SILENT


def _check_credentials(worker: Worker) -> int | None:
    """Fetches the first token: a refusal ends the process, a token service that is not there is waited for.

    A signal does not wait for it: a service that accepts and stays silent takes the whole GATEWAY_READ_TIMEOUT_SECONDS.
    """
    asking = worker.calls.fibers.ask(worker.calls.tokens.get)
    while not asking.done() and not signals.received():
        wait([asking], 0.02)
    failure = asking.exception() if asking.done() else None
    if isinstance(failure, TokenUnavailable):
        verdict = failure.verdict
        if verdict.kind is Kind.SYSTEMIC:
            worker.engine.halt()
            return _say(
                REFUSED,
                "gateway.refused",
                verdict.message,
                _cure(worker.settings.gateway, failure),
            )
        log.warning("gateway.waiting", reason=verdict.message, action=_cure(worker.settings.gateway, failure))
    elif failure is not None:
        raise failure
    return None


def _cure(gateway: GatewaySettings, failure: TokenUnavailable) -> str:
    answer = failure.answer or NoReply(False, failure.verdict.message)
    return diagnosis.token(answer, diagnosis.Call(gateway.base_url + gateway.token_path, "GATEWAY_TOKEN_PATH")).cure


def _drain(worker: Worker) -> int:
    """Take nothing new, finish, settle, flush, close; a second signal or the deadline means now."""
    deadline = time.monotonic() + worker.settings.worker.drain_seconds
    log.info(
        "drain.started",
        signals=signals.names(),
        in_hand=worker.pool.in_hand(),
        unsettled=worker.engine.unsettled(),
    )
    worker.engine.drain()
    while not worker.engine.join(0.05):
        if signals.received() > 1 or time.monotonic() > deadline:
            why = "second signal" if signals.received() > 1 else "deadline"
            return _say(
                FORCED,
                "drain.forced",
                f"{why}: {worker.pool.in_hand()} in hand, {worker.engine.unsettled()} unsettled go back to the broker",
            )
    if worker.engine.failure is not None:
        return _say(FAILED, "worker.failed", f"the broker loop ended: {worker.engine.failure!r}")
    worker.pool.stop()
    log.info("drain.finished")
    return DRAINED


def _say(code: int, event: str, reason: str, action: str = "") -> int:
    """For machines in the log, for people on standard error; of several processes, the parent tells people."""
    from worker.processes import SOCKET_VARIABLE

    todo = {"action": action} if action else {}
    log.error(event, reason=reason, **todo, exit_code=code)
    if SOCKET_VARIABLE not in os.environ:
        print(f"qris-expire: {'; '.join(filter(None, [reason, action]))}", file=sys.stderr)
    return code


# -- wiring ---------------------------------------------------------------------------------------------------------


def _server(settings: Settings, worker: Worker) -> HealthServer:
    from worker.processes import SOCKET_VARIABLE

    path = os.environ.get(SOCKET_VARIABLE)
    source: Any = _Endpoint(worker)
    if path:
        return HealthServer.unix(path, source)
    return HealthServer(settings.metrics.host, settings.metrics.port, source)


def _metrics() -> Metrics:
    return Metrics(__version__)


def _gate(settings: Settings, clock: SystemClock, rng: random.Random, fibers: Fibers) -> SendersGate:
    breaker = Breaker(
        settings.breaker.failures, settings.breaker.cooldown_seconds, settings.breaker.max_cooldown_seconds
    )
    throttle = Throttle(settings.retry.initial_seconds, settings.retry.max_seconds)
    pacer = Pacer(settings.gateway.max_requests_per_second)
    return SendersGate(breaker, throttle, pacer, clock=clock, rng=rng, draining=Event(fibers))


def _policy(settings: Settings) -> RetryPolicy:
    retry = settings.retry
    return RetryPolicy(
        retry.max_attempts, retry.initial_seconds, retry.max_seconds, retry.budget_seconds, retry.delays_seconds
    )


def endpoint(gateway: GatewaySettings) -> Endpoint:
    """Where and how the gateway is called."""
    return Endpoint(
        gateway.base_url + gateway.token_path,
        gateway.base_url + gateway.expire_path,
        gateway.connect_timeout_seconds,
        gateway.read_timeout_seconds,
    )


def transport(
    gateway: GatewaySettings, environ: Mapping[str, str], fibers: Fibers | None = None
) -> Callable[[ssl.SSLContext | None], BaseAdapter]:
    """The adapter for the gateway, proxies resolved once; without ``fibers`` its calls block their thread. Raises
    `CredentialsError` for a proxy that cannot be used."""
    try:
        proxy = proxy_for(gateway.base_url, environ)
    except ValueError as error:
        raise CredentialsError(str(error)) from None
    return lambda context: BoundedAdapter(context, fibers or BLOCKING, proxy)


def partner(gateway: GatewaySettings) -> Partner:
    """What every expire call has in common."""
    return Partner(
        gateway.client_id,
        gateway.channel_id,
        gateway.channel_headers,
        gateway.sign_path,
        gateway.bill_field,
        gateway.timestamp_milliseconds,
    )


def _plan(settings: Settings, delays: Sequence[int]) -> Plan:
    amqp, worker = settings.amqp, settings.worker
    senders = {CANCELLATION: worker.concurrency, SWEEP: sweep_cap(worker.concurrency, worker.sweep_share)}
    return Plan(
        Names(amqp.prefix),
        topology(amqp.prefix, amqp.queue_type, delays),
        amqp.declare,
        {lane: PREFETCH_PER_SENDER * count for lane, count in senders.items()},
    )


def external_ids(clock: SystemClock) -> Callable[[], str]:
    """A new X-EXTERNAL-ID at each call, no other process's either."""
    node, serial = secrets.randbelow(10**NODE_DIGITS), itertools.count()
    return lambda: external_id(clock.epoch(), node, next(serial))


def fetcher(
    client: GatewayClient, credentials: Credentials, gateway: GatewaySettings, clock: SystemClock
) -> Callable[[], Grant]:
    """One token request, signed now with the key of now."""

    def fetch() -> Grant:
        moment = timestamp(clock.epoch(), milliseconds=gateway.timestamp_milliseconds)
        signature = credentials.token_signature(gateway.client_id, moment)
        return client.fetch_token(gateway.client_id, moment, signature)

    return fetch


def _rereading(gateway: GatewaySettings) -> Callable[[], GatewaySettings]:
    return gateway.reread


def _broker_parameters(amqp: AmqpSettings) -> Callable[[], Sequence[Any]]:
    """Asked before every connection: a password that was rotated in its mounted file is used by the next one."""
    good = parameters(amqp, "run")  # raises BrokerError at start for what can never work

    def now() -> Sequence[Any]:
        nonlocal good
        try:
            good = parameters(amqp.reread(), "run")
        except (SettingsError, BrokerError) as error:
            log.error("credentials.kept", reason=str(error), action=KEPT)
        return good

    return now
