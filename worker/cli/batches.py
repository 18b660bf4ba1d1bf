"""What `sweep` and `status` share: where the journals are, and the table that adds up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from worker.cli import INVALID, Trouble
from worker.cli.screen import output, tell
from worker.core.needs import NEEDS, count
from worker.core.sweep import Home, Tally, is_batch_id
from worker.core.words import plural
from worker.settings import AmqpSettings, GatewaySettings
from worker.shells.journal import Journal
from worker.shells.journals import find, journals_of

EXAMPLES: Final = 10  # bills of each kind that are shown; the report has all
STATE_DIR_HELP = "Where batches keep their journals; else $XDG_STATE_HOME/qris-expire/<prefix>."


def state_directory(prefix: str, given: Path | None) -> Path:
    """One directory per prefix: a batch's id is unique there."""
    if given is not None:
        return given
    base = os.environ.get("XDG_STATE_HOME") or ""
    if not Path(base).is_absolute():  # the XDG specification: a relative path is to be ignored
        try:
            base = str(Path.home() / ".local" / "state")
        except RuntimeError:
            raise Trouble("no home directory to keep the journal in; give --state-dir", code=INVALID) from None
    return Path(base) / "qris-expire" / prefix


def check_batch_id(batch: str) -> None:
    """Raises `Trouble` for what cannot name a batch."""
    if not is_batch_id(batch):
        raise Trouble(
            f"{batch!r} is no batch id; give 1 to 64 letters, digits, '.', '_', '-', beginning with a letter or digit",
            code=INVALID,
        )


def broker_of(amqp: AmqpSettings) -> Home:
    """The home of batches that go through the broker; its id is None when it does not answer."""
    from worker.shells.amqp.session import BrokerError, session

    try:
        with session(amqp, "sweep") as connection:
            return home_at(connection, amqp)
    except BrokerError:
        return Home(False, None, "a broker that does not answer")


def home_at(connection: Any, amqp: AmqpSettings) -> Home:
    """The home behind an open connection."""
    from worker.shells.amqp.bulk import identity
    from worker.shells.amqp.session import address, parameters

    hosts = parameters(amqp, "sweep")
    place = f"{', '.join(map(address, hosts))}, virtual host {hosts[0].virtual_host}, prefix {amqp.prefix}"
    return Home(False, identity(connection, amqp.names, place), place)


def gateway_of(gateway: GatewaySettings) -> Home:
    """The home of batches that are sent without a broker."""
    return Home(True, f"{gateway.base_url} {gateway.client_id}", gateway.base_url)


def existing(directory: Path, batch: str, home: Home) -> Path:
    """The journal of a batch that must exist. Raises `Trouble`, `JournalError`."""
    check_batch_id(batch)
    path = find(directory, batch, home)
    if path is None:
        raise Trouble(no_batch(directory, batch, home), code=INVALID)
    return path


def no_batch(directory: Path, batch: str, home: Home | None = None) -> str:
    """Why it does not exist, for people."""
    elsewhere = []
    for path in journals_of(directory, batch):
        with closing(Journal(path, read_only=True)) as journal:
            elsewhere.append(journal.facts.place or journal.facts.gateway)
    if elsewhere and home is not None:
        setting = "GATEWAY_BASE_URL and GATEWAY_CLIENT_ID" if home.direct else "AMQP_URL and AMQP_PREFIX"
        return (
            f"batch {batch} was not sent to {home.place}, but to {'; '.join(elsewhere)}; correct {setting}, or sweep "
            "the file itself to send it here, too"
        )
    return f"no batch {batch} in {directory}; `qris-expire status` lists them"


def print_tally(title: str, tally: Tally) -> None:
    """Rows by status and reason; the last line is the input."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("status", overflow="fold")
    table.add_column("reason", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for status, reason, rows in tally.lines():
        table.add_row(status, reason, f"{rows:,}")
    table.add_section()
    table.add_row("total", "rows of the input", f"{tally.rows:,}")
    output().print(table)


def print_needs(journal: Journal, tally: Tally, again: str) -> None:
    """What people must do, about which bills; ``again`` is the command that sends unresolved ones again."""
    for need in NEEDS:
        bills = count(tally, need.reasons)
        if not bills:
            continue
        retry = f"; to send them again: `{again}`" if need.retry else ""
        print()
        tell(f"{need.title}: {plural(bills, 'bill')}; {need.what}{retry}")
        print_bills(journal.examples(need.reasons, EXAMPLES), bills)
    if tally.invalid:
        print()
        tell(f"invalid rows: {tally.invalid:,}; nothing was sent for them; the report says why")


def print_bills(bills: Sequence[tuple[int, str, str, str]], count: int | None = None) -> None:
    """The first ones of so many (else of those given): line, bill, merchant, and what the gateway said."""
    for line, bill, merchant, said in bills[:EXAMPLES]:
        print(f"  line {line}: {bill}{f' of {merchant}' if merchant else ''}{f': {said}' if said else ''}")
    more = (len(bills) if count is None else count) - EXAMPLES
    if more > 0:
        print(f"  … and {more:,} more; the report has all of them")
