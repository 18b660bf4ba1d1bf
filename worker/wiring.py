"""Settings to objects: what `run`, `check`, `sign` and `sweep --direct` are made of, put together in one place."""

from __future__ import annotations

import hashlib
import os
import random
import re
import secrets
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from requests.adapters import BaseAdapter

from worker import __version__
from worker.app.dispatch import Dispatcher
from worker.app.expire import Expire
from worker.app.fleet import Fleet
from worker.app.sealing import Sealing
from worker.app.shared_tokens import SharedTokens
from worker.app.tokens import NoTokens
from worker.core import request
from worker.core.breaker import Breakers, Throttle
from worker.core.fleet.member import Member
from worker.core.fleet.own import MemberSettings
from worker.core.grant import Grant
from worker.core.lanes import CANCELLATION, SWEEP, Lanes, sweep_cap
from worker.core.request import NODE_DIGITS, Partner
from worker.core.retry import RetryPolicy
from worker.core.scheme import NO_TOKEN
from worker.core.settlement import Desk, Task
from worker.core.topology import Names, fleet_topology, topology
from worker.settings import AmqpSettings, GatewaySettings, Settings, SettingsError
from worker.shells import tracing
from worker.shells.amqp.broker import Broker, Plan
from worker.shells.amqp.connection import new_loop
from worker.shells.amqp.engine import Engine
from worker.shells.amqp.fleet import FleetLink
from worker.shells.amqp.session import BrokerError, parameters
from worker.shells.clock import LoopClock, SystemClock
from worker.shells.credentials import KEPT, Credentials, CredentialsError
from worker.shells.fibers import Event, Fibers, Lock
from worker.shells.gateway import Endpoint, GatewayClient, proxy_for, timestamp
from worker.shells.metrics import Metrics
from worker.shells.pool import Finish, Pool
from worker.shells.telemetry import Telemetry
from worker.shells.transport import BLOCKING, BoundedAdapter

PREFETCH_PER_SENDER: Final = {CANCELLATION: 2, SWEEP: 4}
"""Deliveries of a lane in the process for each sender that it may have: one in hand, one behind it. More would only be
redelivered after a crash, and would keep a cancellation from a process that is free. The sweep has more of them: while
the broker confirms the outcomes of some, senders have others to go on with (6 % more commands a second, measured)."""
SECRETS_EVERY: Final = 2.0  # seconds between two looks at mounted secrets

log = structlog.get_logger()


class Client:
    """What calls the gateway: for the worker, and for a sweep that goes without a broker. All of it runs in fibers.
    ``share``: the most of the senders that the sweep lane may hold. Raises `CredentialsError`."""

    def __init__(self, settings: Settings, *, share: float) -> None:
        gateway = settings.gateway
        self.clock = SystemClock()
        self.rng = random.Random()
        self.metrics = Metrics(__version__)
        self.fibers = Fibers(new_loop())
        self.credentials = Credentials(gateway, gateway.reread)
        self.fleet = _fleet(settings, self.clock, self.rng, self.fibers)
        self.dispatcher = _dispatcher(settings, share, self.fleet, self.clock, self.rng, self.fibers)
        self.dispatcher.on_wait = self.metrics.rate_waited
        self.tracing = tracing.from_environment(__version__)
        telemetry = Telemetry(self.metrics, self.tracing)
        client = GatewayClient(
            endpoint(gateway),
            telemetry,
            trust=self.credentials,
            adapter=transport(gateway, os.environ, self.fibers),
        )
        self.tokens: NoTokens | SharedTokens = NoTokens()
        if gateway.signature != NO_TOKEN:
            self.tokens = self._shared_tokens(settings, client, telemetry)
            self.dispatcher.on_test = self._test
        self._expire = Expire(
            gateway=client,
            tokens=self.tokens,
            gate=self.dispatcher,
            observer=telemetry,
            clock=LoopClock(self.fibers),
            rng=self.rng,
            policy=policy(settings),
            partner=partner(gateway),
            signer=self.credentials,
            new_external_id=external_ids(self.clock),
            default_merchant=gateway.merchant_id,
        )
        self._senders = settings.worker.concurrency
        self._secrets_at = time.monotonic() + SECRETS_EVERY

    def _shared_tokens(self, settings: Settings, client: GatewayClient, telemetry: Telemetry) -> SharedTokens:
        gateway = settings.gateway
        return SharedTokens(
            self.fleet,
            fetcher(client, self.credentials, gateway, self.clock),
            Sealing(lambda: self.credentials.shared, (gateway.base_url, settings.amqp.prefix, gateway.client_id)),
            event=lambda: Event(self.fibers),
            spawn=self.fibers.spawn,
            patience=2 * call_seconds(gateway),
            observer=telemetry,
            clock=self.clock,
            rng=self.rng,
            pause=self.dispatcher.sleep,
            requesting=Lock(self.fibers),
        )

    def _test(self) -> None:
        """Being sick without a command to test the gateway with: a token request does."""
        tokens = self.tokens
        assert isinstance(tokens, SharedTokens)
        self.fibers.spawn(lambda: self.fleet.tested(tokens.test()))

    def join(self, amqp: AmqpSettings) -> FleetLink:
        """The connection to the other processes of the fleet; not started yet. Raises `BrokerError` for settings that
        can never work."""
        self.fleet.member.alone = False
        return FleetLink(
            self.fleet,
            Names(amqp.prefix),
            fleet_topology(amqp.prefix, amqp.queue_type),
            _broker_parameters(amqp, "fleet"),
            declare=amqp.declare,
            fibers=self.fibers,
            rng=self.rng,
            metrics=self.metrics,
        )

    def pool(self, finish: Finish) -> Pool:
        """The senders; ``finish`` hears of every command that they are done with."""
        pool = Pool(self.dispatcher, self._expire, finish, self.fibers, senders=self._senders)
        self.metrics.in_hand = pool.in_hand
        return pool

    def take_over_secrets(self, *, asked: bool = False) -> None:
        """Looks whether mounted secrets have changed; to be called again and again, it knows how often to look. When an
        operator ``asked`` for it, they are read at once, changed or not."""
        if time.monotonic() < self._secrets_at and not asked:
            return
        self._secrets_at = time.monotonic() + SECRETS_EVERY
        if self.credentials.refresh(asked=asked):
            self.tokens.renew()


def engine(settings: Settings, client: Client, fleet: FleetLink) -> Engine:
    """The broker's side of a worker. Raises `BrokerError` for settings that can never work."""
    plan, hosts, loop = _plan(settings), _broker_parameters(settings.amqp), client.fibers.loop
    return Engine(
        lambda engine: Broker(engine, plan, hosts, loop=loop, watch=client.metrics, rng=client.rng),
        Desk(plan.names, lambda: uuid.uuid4().hex),
        client.dispatcher,
        fibers=client.fibers,
        watch=client.metrics,
        clock=client.clock,
        tracing=client.tracing,
        fleet=fleet,
        parks=plan.declare,
    )


def _fleet(settings: Settings, clock: SystemClock, rng: random.Random, fibers: Fibers) -> Fleet:
    """Our member: alone, until it joins."""
    gateway, breaker = settings.gateway, settings.breaker
    member = Member(
        f"{_host()}-{os.getpid()}-{secrets.token_hex(3)}",
        hashlib.sha256(gateway.client_id.encode()).hexdigest()[:12],
        MemberSettings(
            gateway.max_requests_per_second,
            breaker.failures,
            min(breaker.cooldown_seconds, breaker.max_cooldown_seconds),
            3 * call_seconds(gateway),
        ),
        Breakers(breaker.failures, breaker.cooldown_seconds, breaker.max_cooldown_seconds),
        rng,
        alone=True,
    )
    return Fleet(member, clock, fibers.loop)


def _host() -> str:
    """This machine's name, as far as it can stand in the name of a queue."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


def call_seconds(gateway: GatewaySettings) -> float:
    """The longest that one call may take."""
    return gateway.connect_timeout_seconds + gateway.read_timeout_seconds


def _dispatcher(
    settings: Settings, share: float, fleet: Fleet, clock: SystemClock, rng: random.Random, fibers: Fibers
) -> Dispatcher:
    lanes: Lanes[Task] = Lanes(settings.worker.concurrency, share)
    return Dispatcher(
        lanes,
        fleet,
        Throttle(settings.retry.initial_seconds, settings.retry.max_seconds),
        clock=clock,
        rng=rng,
        draining=Event(fibers),
        event=lambda: Event(fibers),
    )


def policy(settings: Settings) -> RetryPolicy:
    """The limits of retrying."""
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


def _plan(settings: Settings) -> Plan:
    amqp, worker = settings.amqp, settings.worker
    senders = {CANCELLATION: worker.concurrency, SWEEP: sweep_cap(worker.concurrency, worker.sweep_share)}
    return Plan(
        Names(amqp.prefix),
        topology(amqp.prefix, amqp.queue_type, settings.retry.delays_seconds),
        amqp.declare,
        {lane: PREFETCH_PER_SENDER[lane] * count for lane, count in senders.items()},
    )


def external_ids(clock: SystemClock) -> Callable[[], str]:
    """A new X-EXTERNAL-ID at each call, no other process's either."""
    return request.external_ids(clock.epoch, secrets.randbelow(10**NODE_DIGITS))


def fetcher(
    client: GatewayClient, credentials: Credentials, gateway: GatewaySettings, clock: SystemClock
) -> Callable[[], Grant]:
    """One token request, signed now with the key of now."""

    def fetch() -> Grant:
        moment = timestamp(clock.epoch(), milliseconds=gateway.timestamp_milliseconds)
        signature = credentials.token_signature(gateway.client_id, moment)
        return client.fetch_token(gateway.client_id, moment, signature)

    return fetch


def _broker_parameters(amqp: AmqpSettings, role: str = "run") -> Callable[[], Sequence[Any]]:
    """Asked before every connection: a password that was rotated in its mounted file is used by the next one."""
    good = parameters(amqp, role)  # raises BrokerError at start for what can never work

    def now() -> Sequence[Any]:
        nonlocal good
        try:
            good = parameters(amqp.reread(), role)
        except (SettingsError, BrokerError) as error:
            log.error("credentials.kept", reason=str(error), action=KEPT)
        return good

    return now
