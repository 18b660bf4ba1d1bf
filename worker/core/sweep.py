"""A batch of bills: its id and its commands' ids, what outcomes say about it, and the sum that equals the input."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from worker.core import jakarta
from worker.core.command import name_uuid
from worker.core.delivery import BATCH_ID, COPY_ID, EFFECT_UNKNOWN, Message, Progress
from worker.core.lanes import SWEEP
from worker.core.outcome import Reason, Status
from worker.core.rows import JSON_FORM, Form
from worker.core.topology import Binding, Names, Queue, QueueType, Topology

BATCH_SIZE: Final = "batch-size"

UNUSED_SECONDS: Final = 3 * 86_400
"""A batch's inbox takes the outcomes of all sweeps while it exists; one that nobody follows for so long goes away."""

_COMMAND_NAMESPACE = uuid.UUID("b7a0c5b2-6a52-5c0e-9d0f-3f1c1b0f9316").bytes
_BATCH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


# -- names ----------------------------------------------------------------------------------------------------------


def is_batch_id(text: str) -> bool:
    """1 to 64 letters, digits, ``.``, ``_``, ``-``: it names a queue and a file."""
    return _BATCH_ID.match(text) is not None


def batch_id(digest: str, epoch: float) -> str:
    """The default id, from the input's digest and the Jakarta date: the same input on another day is another batch."""
    return f"{jakarta.digits(epoch)[:8]}-{digest[:12]}"


def batch_command_id(batch: str, bill: str, merchant: str) -> str:
    """The same UUID whenever this batch publishes this bill (of this merchant; empty: the worker's own)."""
    return name_uuid(_COMMAND_NAMESPACE, f"{batch}\n{bill}\n{merchant}".encode())


def inbox(names: Names, batch: str, queue_type: QueueType) -> Topology:
    """The batch's own durable queue, bound to all outcomes of the lane: a topic exchange cannot tell batches apart."""
    name = inbox_name(names, batch)
    arguments = {"x-queue-type": queue_type, "x-expires": UNUSED_SECONDS * 1000}
    return Topology((), (Queue(name, arguments),), (Binding(names.outcomes, name, f"{SWEEP}.*"),))


def inbox_name(names: Names, batch: str) -> str:
    """``P.outcomes.batch.<id>``"""
    return f"{names.outcomes}.batch.{batch}"


def follower_name(names: Names, batch: str) -> str:
    """The exclusive queue of the one process that follows the batch; it answers there who it is."""
    return f"{inbox_name(names, batch)}.follower"


# -- commands -------------------------------------------------------------------------------------------------------


class Bill(NamedTuple):
    """One bill of a batch. ``number`` counts the batch's bills from 1, in the order in which they are published.

    ``again``: how often it was sent again after it stayed unresolved; ``in_doubt``: it may have been expired then.
    """

    number: int
    bill: str
    merchant: str
    reference: str | None
    not_after: str | None
    again: int = 0
    in_doubt: bool = False


class Batch(NamedTuple):
    """What its commands have in common. ``size`` is the number of bills."""

    id: str
    size: int


def command_body(bill: Bill) -> bytes:
    """The command's JSON, as `command.parse` takes it."""
    fields: dict[str, Any] = {"billnumber": bill.bill}
    if bill.merchant:
        fields["additionalInfo"] = {"merchantId": bill.merchant}
    if bill.reference is not None:
        fields["reference"] = bill.reference
    if bill.not_after is not None:
        fields["notAfter"] = bill.not_after
    return _encode(fields).encode()


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # `dumps` would make one for every bill


def command_message(names: Names, batch: Batch, bill: Bill, epoch: float) -> Message:
    """The command as it is published. A worker that remembers the bill's first copy must not take this one for it."""
    again = {COPY_ID: f"retry-{bill.again}", EFFECT_UNKNOWN: bool(bill.in_doubt)} if bill.again else {}
    return Message(
        names.commands,
        SWEEP,
        command_body(bill),
        {
            "content_type": "application/json",
            "delivery_mode": 2,
            "message_id": batch_command_id(batch.id, bill.bill, bill.merchant),
            "timestamp": int(epoch),
            "headers": {BATCH_ID: batch.id, BATCH_SIZE: batch.size, **again},
        },
    )


class Watermark:
    """How far a batch is published without a gap: what a crash leaves behind it is published again, nothing else."""

    def __init__(self, through: int) -> None:
        self._last = through
        self._open: dict[int, None] = {}  # in the order of publishing, which is that of the numbers

    def published(self, number: int) -> None:
        """It is on its way. Numbers rise; those left out need no publishing."""
        self._last = number
        self._open[number] = None

    def confirmed(self, number: int) -> None:
        """The broker has it."""
        self._open.pop(number, None)

    @property
    def through(self) -> int:
        """Every bill up to here is with the broker."""
        return next(iter(self._open)) - 1 if self._open else self._last

    def __len__(self) -> int:
        """Bills on their way."""
        return len(self._open)


# -- outcomes -------------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What an outcome says, as the journal keeps it. ``external_ids`` are joined by blanks."""

    command_id: str
    bill: str
    status: str
    reason: str
    response_code: str | None
    response_message: str | None
    detail: str | None
    attempts: int
    effect_unknown: bool
    external_ids: str
    completed_at: str


def read_outcome(body: bytes) -> Told | None:
    """None if it is not our outcome: anybody may publish to the exchange."""
    try:
        fields = json.loads(body)
        status, reason = Status(fields["status"]), Reason(fields["reason"])
        told = Told(
            str(fields["commandId"]),
            str(fields["billnumber"]),
            str(status),
            str(reason),
            _text(fields.get("responseCode")),
            _text(fields.get("responseMessage")),
            _text(fields.get("detail")),
            int(fields["attempts"]),
            fields["effectUnknown"] is True,
            " ".join(map(str, fields["externalIds"])),
            str(fields["completedAt"]),
        )
        "\n".join(map(str, told)).encode()  # half of a surrogate pair cannot be kept
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return told


def supersedes(new: Told, status: str, reason: str, completed_at: str) -> bool:
    """Whether a second outcome of a command says more than the one that is known.

    A command may have two outcomes: after a redelivery, a second publish, a redrive. What the gateway finally said
    beats not knowing, whatever came first. Of two final answers, paid is never hidden (it may be a refund), and a bill
    that was expired once stays expired. Of two that know nothing, the later counts.
    """
    old_rank, new_rank = _rank(status, reason), _rank(new.status, new.reason)
    return new_rank > old_rank or (new_rank == old_rank == 0 and new.completed_at > completed_at)


def _rank(status: str, reason: str) -> int:
    if reason == Reason.PAID:
        return 3
    return {Status.EXPIRED: 2, Status.REJECTED: 1}.get(Status(status), 0)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


STOP: Final = "qris.expire.sweep.stop"
"""Type of a message in a batch's inbox that ends its publishing; its body says who wants that, for people."""

# -- what the journal knows -----------------------------------------------------------------------------------------


class Home(NamedTuple):
    """Where a batch is sent: to one broker, virtual host and prefix, or straight to one gateway.

    ``id`` tells it from every other one; it is None while a broker does not answer. ``place`` is for people.
    """

    direct: bool
    id: str | None
    place: str


class Facts(NamedTuple):
    """What is said about a batch as a whole. Times are seconds since the epoch.

    ``broker`` and ``gateway`` are the ids of the homes that it was sent to, empty before; ``place`` is the broker's.
    ``stopped`` says who stopped it and when; nothing more of it is published until somebody resumes it.
    """

    batch: Batch
    source: str
    digest: str
    created_at: float
    invalid: int
    duplicates: int
    published: int = 0
    inbox: bool = False
    direct: bool = False
    broker: str = ""
    gateway: str = ""
    place: str = ""
    form: Form = JSON_FORM
    stopped: str = ""
    resumed_at: float = 0.0


def belongs(facts: Facts, home: Home) -> bool:
    """Whether what the journal calls sent was sent there, as far as can be known: not if it was sent elsewhere."""
    known = facts.gateway if home.direct else facts.broker
    return not known or home.id is None or known == home.id


def unfinished(facts: Facts, tally: Tally) -> bool:
    """Whether a sweep would go on with it: bills are unsent, or somebody follows outcomes that have not come."""
    return tally.unsent > 0 or ((facts.inbox or facts.direct) and tally.waiting > 0)


class Job(NamedTuple):
    """A bill to be sent without a broker. ``begun``: it may have been sent by a process that died."""

    bill: Bill
    begun: bool
    progress: Progress


@dataclass(slots=True)
class Recorded:
    """What a number of outcomes changed in the sum, by status and reason: a replaced outcome takes one away."""

    changes: dict[tuple[str, str], int] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    """Bills that had no outcome before."""

    def change(self, status: str, reason: str, by: int) -> None:
        """So many more of them."""
        self.changes[status, reason] = self.changes.get((status, reason), 0) + by


# -- the sum --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Where every row of the input is: invalid, a duplicate, not sent yet, waiting for its outcome, or answered.

    ``told``: bills with an outcome, by status and reason.
    """

    told: dict[tuple[str, str], int] = field(default_factory=dict)
    invalid: int = 0
    duplicates: int = 0
    unsent: int = 0
    waiting: int = 0
    """While a sweep runs it is one too small for each bill whose outcome came before the broker's confirm."""

    def add_sent(self) -> None:
        """One more bill needs no publishing any more."""
        if self.unsent:
            self.unsent -= 1
            self.waiting += 1

    def add(self, recorded: Recorded) -> None:
        """Outcomes came."""
        self.waiting -= len(recorded.numbers)
        for key, by in recorded.changes.items():
            self.told[key] = self.told.get(key, 0) + by

    @property
    def answered(self) -> int:
        """Bills with an outcome."""
        return sum(self.told.values())

    @property
    def expired(self) -> int:
        """Bills whose QR codes are expired."""
        return self.ended(Status.EXPIRED)

    def ended(self, *statuses: Status) -> int:
        """Bills with an outcome of one of these statuses."""
        return sum(count for (status, _), count in self.told.items() if status in statuses)

    @property
    def bills(self) -> int:
        """All bills of the batch."""
        return self.unsent + self.waiting + self.answered

    @property
    def sent(self) -> int:
        """Bills that need no publishing any more."""
        return self.waiting + self.answered

    @property
    def rows(self) -> int:
        """All rows of the input: the sum."""
        return self.bills + self.invalid + self.duplicates

    @property
    def unresolved(self) -> int:
        """Bills whose outcome may still be bettered by a redrive."""
        return self.ended(Status.UNRESOLVED, Status.INVALID)

    def lines(self) -> Iterator[tuple[str, str, int]]:
        """(status, reason, rows), what people look for first; lines that are no outcome only where there are any."""
        for status in Status:
            for (each, reason), count in sorted(self.told.items()):
                if each == status:
                    yield each, reason, count
        for name, why, count in (
            ("waiting", "no outcome yet", self.waiting),
            ("unsent", "not published yet", self.unsent),
            ("skipped", "duplicate rows, sent once", self.duplicates),
            ("skipped", "invalid rows", self.invalid),
        ):
            if count:
                yield name, why, count
