"""`sweep --direct`: senders, dispatcher and journal put together in one process; no command goes through a broker."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from worker import signals
from worker.cli import Trouble
from worker.cli.meter import Meter
from worker.cli.screen import note
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.app.sweep import Ended
    from worker.shells.fibers import Fibers
    from worker.shells.journal import Journal
    from worker.wiring import Client


class GatewayRefuses(Exception):
    """Our credentials; the text says what it said."""


def send(journal: Journal, settings: Settings) -> Ended:
    """Every bill that has no outcome, until it has one or people want it to end.

    Raises `Trouble`, `CredentialsError`, `GatewayRefuses`.
    """
    from worker.app.direct import Direct
    from worker.shells.amqp.bulk import WINDOW
    from worker.wiring import Client

    client = Client(settings, share=1.0)
    with _turning(client.fibers) as loop, _in_the_fleet(client, settings) as remark:
        _check_credentials(client)
        journal.direct(journal.facts.published + WINDOW)
        signals.install()
        with Meter(f"sweep {journal.facts.batch.id}", publish=False, remark=remark) as meter:
            direct = Direct(
                journal,
                client.dispatcher,
                lambda function: client.fibers.ask(function).result(),
                concurrency=settings.worker.concurrency,
                drain_seconds=settings.worker.drain_seconds,
                stop=signals.received,
                chores=_chores(client, loop),
                screen=meter,
                clock=client.clock,
            )
            client.pool(direct.finish).start()
            ended = direct.run()
    if direct.crashes:
        print(f"qris-expire: {direct.crashes} bills failed unexpectedly; the log says why", file=sys.stderr)
    return ended


@contextmanager
def _turning(fibers: Fibers) -> Iterator[threading.Thread]:
    """The senders' loop, in a thread of its own until the end of the block."""
    over = threading.Event()
    loop = threading.Thread(target=fibers.run, args=(over.is_set,), name="senders", daemon=True)
    loop.start()
    try:
        yield loop
    finally:
        over.set()


@contextmanager
def _in_the_fleet(client: Client, settings: Settings) -> Iterator[Callable[[], str]]:
    """Wherever the broker is there, this sweep is a member of its workers' fleet: their rate, holds, breaker and token
    are its own. Without a broker it has the gateway for itself, and says so. Yields what says, in a sentence, why it is
    not in the fleet; empty while it is. Raises `Trouble` where a broker refuses us, and a rate limit that counts for
    all could not be kept."""
    from worker.shells.amqp.session import BrokerError, BrokerUnreachable, connect

    limit = settings.gateway.max_requests_per_second
    try:
        connect(settings.amqp, "sweep --direct").close()
    except BrokerError as error:
        if limit and not isinstance(error, BrokerUnreachable):
            raise Trouble(
                f"{error}; without the broker the rate limit of all workers cannot be kept, so nothing was sent"
            ) from None
        own = f"; it keeps the limit of {limit:g} calls/s for itself" if limit else ""
        note(f"{error}; without the broker this sweep shares no rate limit and no token with workers{own}")
        yield str
        return
    link = client.join(settings.amqp)
    link.start()
    try:
        yield lambda: link.trouble and f"not in the fleet of the workers: {link.trouble}"
    finally:
        client.fibers.ask(link.close).result()


def _check_credentials(client: Client) -> None:
    """A refusal ends it before anything is begun; a token service that is not there is waited for."""
    from worker.core.ports import TokenUnavailable
    from worker.core.verdict import Kind

    try:
        client.fibers.ask(client.tokens.get).result()
    except TokenUnavailable as failure:
        if failure.verdict.kind is Kind.SYSTEMIC:
            raise GatewayRefuses(f"the gateway refuses us: {failure.verdict.message}") from None


def _chores(client: Client, loop: threading.Thread) -> Callable[[], None]:
    """Takes over mounted secrets that change, as a worker does, and notices when nobody sends any more."""

    def chores() -> None:
        if not loop.is_alive():
            raise RuntimeError("the senders have ended, see the traceback above")
        client.take_over_secrets()

    return chores
