"""The life of one worker process: starts, waits for signals, drains, and says with its exit code how it ended."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from concurrent.futures import wait
from typing import Any, Final

import structlog

from worker import __version__, signals
from worker.core import diagnosis
from worker.core.condition import is_fine
from worker.core.ports import TokenUnavailable
from worker.core.topology import topology
from worker.core.verdict import Kind, NoReply
from worker.processes import SOCKET_VARIABLE
from worker.settings import GatewaySettings, Settings
from worker.shells.amqp.management import warn as warn_of_policies
from worker.shells.amqp.session import BrokerError
from worker.shells.certificates import Expiries
from worker.shells.credentials import CredentialsError
from worker.shells.http import Health, HealthServer, ListenError
from worker.wiring import Client, engine

DRAINED, FORCED, MISCONFIGURED, REFUSED = 0, 1, 2, 3
FAILED: Final = 1
COLLECT_AFTER: Final = 20_000
"""Objects more than before make Python look for garbage: some 200 commands' worth, which never is in cycles but after
errors. The default, 700, costs 2 % of the CPU (measured)."""
LOOP_SILENT: Final = 15.0  # seconds: a broker loop that has not turned for so long hangs, and only a restart helps
STANDSTILL: Final = 2.0  # seconds without a look at the worker, which is looked at twice a second
SENDER_SILENT: Final = 120.0
"""Margin in seconds beyond a round's own bounds after which a sender counts as hung."""

log = structlog.get_logger()


class Worker:
    """Everything that one process is made of."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = Client(settings, share=settings.worker.sweep_share)
        self.metrics = self.client.metrics
        self.metrics.started(self.client.clock.epoch())
        self.metrics.senders(settings.worker.concurrency)
        self.fleet = self.client.join(settings.amqp)
        self.engine = engine(settings, self.client, self.fleet)
        self.pool = self.client.pool(self.engine.finish)
        amqp, gateway = settings.amqp, settings.gateway
        files = {
            "gateway_client": gateway.cert_file,
            "gateway_ca": gateway.ca_file,
            "amqp_client": amqp.cert_file,
            "amqp_ca": amqp.ca_file,
        }
        self.certificates = Expiries(files, self.metrics.certificate)

    # -- what probes read -------------------------------------------------------------------------------------------

    def live(self) -> Health:
        """Whether the loops turn; never the broker or the gateway, or their outage would restart every process."""
        silent = self.engine.silent_for
        return Health(self.engine.running and silent < LOOP_SILENT, {"broker_loop": f"turned {silent:.1f} s ago"})

    def ready(self) -> Health:
        """Whether commands are being taken."""
        components = self.engine.status() | self.fleet.status()
        return Health(all(map(is_fine, components.values())), components)

    def scrape(self) -> bytes:
        """The metrics."""
        return self.metrics.render()

    def address(self) -> dict[str, str]:
        """Where the status page is, for the log: ours, or that of the parent of several processes."""
        host, port = self.settings.metrics.host, self.settings.metrics.port
        return {"page": f"http://{f'[{host}]' if ':' in host else host}:{port}/"}


class _Endpoint:
    """The `HealthSource` of the server."""

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
    gc.freeze()  # what is there now stays as long as the process
    gc.set_threshold(COLLECT_AFTER)
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
        worker.engine.start()
        worker.fleet.start()
        _look_at_policies(settings)
        code = _check_credentials(worker)
        if code is None:
            if not signals.received():
                worker.engine.begin()
            code = _watch(worker)
        return code
    finally:
        server.stop()


def _look_at_policies(settings: Settings) -> None:
    """Beside the start, which must not wait for an API that does not answer."""
    amqp, delays = settings.amqp, settings.retry.delays_seconds
    wanted = topology(amqp.prefix, amqp.queue_type, delays)
    threading.Thread(target=warn_of_policies, args=(amqp, wanted), name="policies", daemon=True).start()


def _watch(worker: Worker) -> int:
    """Until a signal asks to stop, or until something happened that only a restart repairs."""
    ready, hangups = False, 0
    looked = time.monotonic()
    while signals.wait(0.5) == 0:
        stood_still, looked = time.monotonic() - looked > STANDSTILL, time.monotonic()
        if stood_still:
            continue  # the whole process was stopped: its other threads have had no time, either
        code = _trouble(worker)
        if code is not None:
            return code
        if not ready and worker.ready().ok:
            ready = True
            log.info("worker.ready", **worker.address())
        asked, hangups = signals.hangups() > hangups, signals.hangups()
        worker.client.take_over_secrets(asked=asked)
        worker.certificates.look()
    return _drain(worker)


def _trouble(worker: Worker) -> int | None:
    engine = worker.engine
    if engine.refused is not None:
        return _say(REFUSED, "broker.refused", *engine.refused)
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
    asking = worker.client.fibers.ask(worker.client.tokens.get)
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
    return diagnosis.token(
        answer, diagnosis.CalledService(gateway.base_url + gateway.token_path, "GATEWAY_TOKEN_PATH")
    ).cure


def _drain(worker: Worker) -> int:
    """Take nothing new, finish, settle, flush, close; a second signal or the deadline means now."""
    deadline = time.monotonic() + worker.settings.worker.drain_seconds
    log.info(
        "drain.started",
        signals=signals.names(),
        in_hand=worker.engine.in_hand(),
        unsettled=worker.engine.unsettled(),
    )
    worker.engine.drain()
    while not worker.engine.join(0.05):
        if signals.received() > 1 or time.monotonic() > deadline:
            why = "second signal" if signals.received() > 1 else "deadline"
            return _say(
                FORCED,
                "drain.forced",
                f"{why}: {worker.engine.in_hand()} commands in hand and {worker.engine.unsettled()} unsettled ones go "
                "back to the broker",
            )
    if worker.engine.failure is not None:
        return _say(FAILED, "worker.failed", f"the broker loop ended: {worker.engine.failure!r}")
    worker.pool.stop()
    log.info("drain.finished")
    return DRAINED


def _say(code: int, event: str, reason: str, action: str = "") -> int:
    """For machines in the log, for people on standard error; of several processes, the parent informs people."""
    todo = {"action": action} if action else {}
    log.error(event, reason=reason, **todo, exit_code=code)
    if SOCKET_VARIABLE not in os.environ:
        print(f"qris-expire: {'; '.join(filter(None, [reason, action]))}", file=sys.stderr)
    return code


def _server(settings: Settings, worker: Worker) -> HealthServer:
    path = os.environ.get(SOCKET_VARIABLE)
    source: Any = _Endpoint(worker)
    if path:
        return HealthServer.unix(path, source)
    return HealthServer(settings.metrics.host, settings.metrics.port, source)
