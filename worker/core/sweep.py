"""A batch of bills: its id and its commands' ids, what outcomes say about it, and the sum that adds up to the input."""

from __future__ import annotations

import json
import re
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from worker.core import jakarta, mangled
from worker.core.delivery import BATCH_ID, COPY_ID, EFFECT_UNKNOWN, Message, Progress
from worker.core.lanes import SWEEP
from worker.core.outcome import Reason, Status
from worker.core.rows import JSON_FORM, Form
from worker.core.topology import Binding, Names, Queue, QueueType, Topology

BATCH_SIZE: Final = "batch-size"

UNUSED_SECONDS: Final = 3 * 86_400
"""A batch's inbox takes the outcomes of all sweeps while it exists; one that nobody follows for so long goes away."""

WINDOW: Final = 10_000
"""Bills of a batch without an outcome at any time, unless people say otherwise: bills that wait for a delayed round are
among them, so it bounds what an outage leaves at the broker."""

FIRST_AHEAD: Final = 100
QUEUED_SECONDS: Final = 0.5
"""Work that a sweep keeps in the lane. An outcome is answered by the next bill within 0.2 s."""
SHORT_SECONDS: Final = 0.1
LEAST_READY: Final = 10
MOST_READY: Final = 50
GROWTH: Final = 1.5
DECAY: Final = 0.9
UNSEEN_SECONDS: Final = 3.0
"""A worker that is just being started consumes by then."""

SPEED_SECONDS: Final = 15.0  # the rate that people see is that of the latest seconds

_COMMAND_NAMESPACE = uuid.UUID("b7a0c5b2-6a52-5c0e-9d0f-3f1c1b0f9316")
_BATCH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


# -- names ----------------------------------------------------------------------------------------------------------


def is_batch_id(text: str) -> bool:
    """1 to 64 letters, digits, ``.``, ``_``, ``-``: it names a queue and a file."""
    return _BATCH_ID.match(text) is not None


def batch_id(digest: str, epoch: float) -> str:
    """The default id, from the input's digest and the Jakarta date: the same input on another day is another batch."""
    return f"{jakarta.digits(epoch)[:8]}-{digest[:12]}"


def command_id(batch: str, bill: str, merchant: str) -> str:
    """The same UUID whenever this batch publishes this bill (of this merchant; empty: the worker's own)."""
    return str(uuid.uuid5(_COMMAND_NAMESPACE, f"{batch}\n{bill}\n{merchant}"))


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
            "message_id": command_id(batch.id, bill.bill, bill.merchant),
            "timestamp": int(epoch),
            "headers": {BATCH_ID: batch.id, BATCH_SIZE: batch.size, **again},
        },
    )


class Pace:
    """How many bills of a batch may be published ahead of its outcomes: enough that no worker waits, and few enough
    that other sweeps need not wait behind them. The lane is first in, first out: what one sweep has in it delays every
    other one by as much.

    All sweeps of a lane see the same numbers (its depth, and the outcomes of all of them) and so get equal shares.
    Times are monotonic seconds, passed in.
    """

    def __init__(self, window: int, now: float) -> None:
        self._window = window
        self._began = now
        self._outcomes = 0
        self._speed = Speed()
        self._grown = 0.0
        self._consumed = False

    def heard(self, outcomes: int) -> None:
        """So many outcomes of the lane came, of whatever batch."""
        self._outcomes += outcomes

    def seen(self, now: float, ahead: int, ready: int, consumers: int) -> None:
        """The lane as it is now: messages that wait in it, and its consumers. ``ahead``: of our own bills."""
        self._speed.mark(now, self._outcomes)
        self._consumed = self._consumed or consumers > 0
        rate = self._speed.per_second
        if ready < max(LEAST_READY, rate * SHORT_SECONDS):
            if ahead >= self.allowed(now):  # the workers are about to run dry, and it is for us to publish more
                self._grown = min(float(self._window), max(self._grown, ahead) * GROWTH)
        elif ready > max(MOST_READY, rate * QUEUED_SECONDS):
            self._grown *= DECAY

    def allowed(self, now: float) -> int:
        """Bills ahead. As many as the window has while no worker has been seen: there is nobody to be kept waiting."""
        if not self._consumed and now - self._began > UNSEEN_SECONDS:
            return self._window
        return min(self._window, round(max(FIRST_AHEAD, self._speed.per_second * QUEUED_SECONDS, self._grown)))


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
    """None if it is no outcome of ours: anybody may publish to the exchange."""
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
    """Whether a second outcome of a command tells more than the one that is known.

    A command may be told about twice: after a redelivery, a second publish, a redrive. What the gateway finally said
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
    published: int
    inbox: bool
    direct: bool
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
    """Where every row of the input is: invalid, a duplicate, not sent yet, waiting for its outcome, or told."""

    invalid: int = 0
    duplicates: int = 0
    unsent: int = 0
    waiting: int = 0
    told: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Bills with an outcome."""
        return sum(self.told.values())

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
    def expired(self) -> int:
        """Bills that are dead, as they should be."""
        return self._told(Status.EXPIRED)

    @property
    def all_expired(self) -> bool:
        """Whether nothing is left to be done about any bill."""
        return self.expired == self.bills

    @property
    def all_final(self) -> bool:
        """Whether the gateway has answered for good about every bill: expired, or rejected, as a paid one is."""
        return self._told(Status.EXPIRED, Status.REJECTED) == self.bills

    @property
    def unresolved(self) -> int:
        """Bills whose outcome may still be bettered by a redrive."""
        return self._told(Status.UNRESOLVED, Status.INVALID)

    def _told(self, *statuses: Status) -> int:
        return sum(count for (status, _), count in self.told.items() if status in statuses)

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


@dataclass(slots=True)
class Standing:
    """The sum as it changes, for people who watch. ``sent``: bills that need no publishing any more."""

    bills: int
    sent: int
    told: dict[tuple[str, str], int]

    def add(self, recorded: Recorded) -> None:
        """Outcomes came."""
        for key, by in recorded.changes.items():
            self.told[key] = self.told.get(key, 0) + by

    @property
    def answered(self) -> int:
        """Bills with an outcome."""
        return sum(self.told.values())

    @property
    def expired(self) -> int:
        """Bills that are dead, as they should be."""
        return sum(count for (status, _), count in self.told.items() if status == Status.EXPIRED)


class Speed:
    """How many a second, lately. Times are monotonic seconds, passed in."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def mark(self, now: float, done: int) -> None:
        """So many are done now."""
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_SECONDS:
            self._marks.popleft()

    @property
    def per_second(self) -> float:
        """0 before anything is known."""
        if len(self._marks) < 2:
            return 0.0
        (then, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - then) if now > then else 0.0

    def left(self, remaining: int) -> float | None:
        """Seconds for so many more; None when nothing moves."""
        rate = self.per_second
        return remaining / rate if rate > 0 else None


# -- the report -----------------------------------------------------------------------------------------------------

REPORT_COLUMNS: Final = (
    "line",
    "billnumber",
    "merchantId",
    "reference",
    "commandId",
    "status",
    "reason",
    "responseCode",
    "responseMessage",
    "detail",
    "attempts",
    "effectUnknown",
    "externalIds",
    "completedAt",
)
_SENT: Final = {"bill": "billnumber", "merchant": "merchantId", "reference": "reference"}
"""Columns of the input that are ours as well when they have these very names: they show what was sent."""


class ReportRow(Protocol):
    """A row of the input with what the journal knows of its bill."""

    def __getitem__(self, column: str, /) -> Any: ...


class Report:
    """The lines of a batch's report, one for each row of the input: its columns as they came, then ours."""

    def __init__(self, facts: Facts) -> None:
        form = facts.form
        self._facts = facts
        self._width = len(form.columns)
        self._shared = {
            name: form.places[ours]
            for ours, name in _SENT.items()
            if name in form.columns and ours in form.places and form.columns[form.places[ours]] == name
        }
        self._own = [column for column in REPORT_COLUMNS if column not in self._shared]

    def header(self) -> list[str]:
        """The names of the columns. One of the input that has the name of one of ours is told apart."""
        columns = [f"{name} (input)" if name in self._own else name for name in self._facts.form.columns]
        return [*columns, *self._own]

    def line(self, row: ReportRow) -> list[object]:
        """A row of the input."""
        cells: list[object] = list(json.loads(row["cells"]))
        cells += [""] * (self._width - len(cells))
        if len(cells) > self._width:  # an invalid row; nothing of it gets lost
            cells[self._width - 1 :] = [self._facts.form.delimiter.join(map(str, cells[self._width - 1 :]))]
        ours = self._skipped(row) or self._sent(row)
        if row["why"] is None:
            for name, place in self._shared.items():
                cells[place] = ours[name] or ""
        return cells + [ours.get(column) for column in self._own]

    def _skipped(self, row: ReportRow) -> dict[str, Any] | None:
        if row["why"] is not None:
            return {"line": row["line"], "status": "skipped", "reason": "invalid", "detail": row["why"]}
        if row["first"] == row["line"]:
            return None
        stands = f"the same bill of the same merchant as line {row['first']}, which stands for it"
        return {**self._identity(row), "status": "skipped", "reason": "duplicate", "detail": stands}

    def _identity(self, row: ReportRow) -> dict[str, Any]:
        return {
            "line": row["line"],
            "billnumber": row["bill"],
            "merchantId": row["merchant"],
            "reference": row["reference"],
            "commandId": command_id(self._facts.batch.id, row["bill"], row["merchant"]),
        }

    def _sent(self, row: ReportRow) -> dict[str, Any]:
        return {
            **self._identity(row),
            "status": row["status"] or ("waiting" if row["number"] <= self._facts.published else "unsent"),
            "reason": row["reason"],
            "responseCode": row["response_code"],
            "responseMessage": row["response_message"],
            "detail": row["detail"],
            "attempts": row["attempts"],
            "effectUnknown": None if row["status"] is None else "true" if row["effect_unknown"] else "false",
            "externalIds": row["external_ids"],
            "completedAt": row["completed_at"] if row["status"] else None,
        }


_FORMULA: Final = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER_LENGTH: Final = 11  # digits from which on a spreadsheet shows a number as 1,23E+11


def harmless(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula: text may come from a gateway, or from anybody."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def kept_as_text(cell: object) -> object:
    """A cell of a CSV file whose digits a spreadsheet keeps: those that it would take for a number or a date."""
    if not isinstance(cell, str) or mangled.unwrapped(cell) != cell:
        return cell
    if not cell.isascii() or '"' in cell or cell.startswith(_FORMULA):
        return harmless(cell)
    if cell.isdigit():
        changed = len(cell) > _NUMBER_LENGTH or (cell.startswith("0") and cell != "0")
    else:
        changed = any(map(str.isdigit, cell)) and " " not in cell and mangled.cause(cell) is not None
    return f'="{cell}"' if changed else harmless(cell)
