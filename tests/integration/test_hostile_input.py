"""Whatever a producer can put into a message, against one running consumer: one outcome each, and no harm done."""

import json
import math
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import pika
import pika.data
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tests.rabbit import Message, delete_topology, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Outcome, Producer, Scrape, WorkerProcess, command_body
from worker.core.delivery import CARRIED_HEADERS, PROGRESS_HEADERS
from worker.core.lanes import LANES
from worker.sandbox.simulator import Fault, Pattern, Script, Simulator
from worker.shells.amqp import codec

MOST_HEADERS = 100 * 1024
"""Bytes of headers that a producer may send: they must fit one frame of 128 KiB."""

ANSWERS = Script(patterns=(Pattern("^never", (Fault(code="5009300", repeat=True),)),))

WITHOUT_SHRINKING = settings(max_examples=60, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""A failure may cost the worker its life, so that each of a hundred smaller examples would cost a restart."""


class Raw(bytes):
    """A field value as it goes over the wire, its kind first: pika has no way to write most of them."""


@dataclass(frozen=True)
class Hostile:
    """One message to be; `sign` is the text by which its outcome is known, whatever the properties say."""

    body: Callable[[str], bytes]
    properties: Mapping[str, Any]
    lane: str = "cancellation"


def good(sign: str) -> bytes:
    return command_body(sign, reference=sign)


def failing(sign: str) -> bytes:
    return command_body(f"never-{sign}", reference=sign)


def bad(sign: str) -> bytes:
    """JSON without a bill: the reference is echoed."""
    return json.dumps({"reference": sign, "billnumber": 7}).encode()


class Bench:
    """The worker under test; it is started again on empty queues after a failure, so that one is told from the next."""

    def __init__(self, worker: WorkerProcess, producer: Producer) -> None:
        self.worker = worker
        self.producer = producer
        self.rabbit = producer.rabbit
        self.names = producer.names
        self.starts = 1
        self._said = 0
        self._signs = (f"s{number}" for number in count(1))

    def send(self, messages: Iterable[Hostile]) -> dict[str, tuple[Hostile, bytes]]:
        """Publish them; what was sent, by sign."""
        sent = {}
        for message in messages:
            sign = next(self._signs)
            body = message.body(sign)
            self.rabbit.publish(self.names.commands, message.lane, body, **message.properties)
            sent[sign] = message, body
        return sent

    def answers(self, number: int, timeout: float = 30) -> list[Outcome]:
        """The next outcomes, and that there are no others."""
        outcomes = self.producer.collect(number, timeout)
        marker = next(self._signs)
        self.rabbit.publish(self.names.commands, "cancellation", good(marker), message_id=marker)
        (last,) = self.producer.collect(1, 30)
        assert last.command_id == marker, f"one outcome too many: {last}"
        return outcomes

    def parked(self, number: int) -> list[Message]:
        """The dead letters, which are exactly so many."""
        letters = self.rabbit.take(self.names.dead, number, 30)
        assert self.rabbit.depth(self.names.dead) == 0
        return letters

    def unharmed(self) -> None:
        """It runs, is ready, and never said that something is wrong with itself, as a lost connection would be."""
        assert self.worker.running, self.worker.last_words()
        components = self.worker.components()
        assert components == dict.fromkeys(components, "ok")
        said = self.worker.events()[self._said :]
        # The end of a command that an operator has to look at is a warning by itself, and so is an old broker.
        expected = {"command.ended", "broker.unfit", "broker.policies_unseen"}
        assert [line for line in said if line["level"] != "info" and line["event"] not in expected] == []

    def settled(self) -> None:
        """After all of them: no connection was lost, and nothing is unsettled."""
        assert self.worker.metrics()("broker_reconnects_total") == 0
        # An outcome may be here before its confirm is there.
        wait_until(lambda: self._settled(self.worker.metrics()), 30, "nothing is unsettled")

    def _settled(self, metrics: Scrape) -> bool:
        return metrics("publishes_unconfirmed") == metrics("in_flight") == 0

    def restart(self) -> None:
        """After a failure."""
        self.worker.kill9()
        lanes = [self.names.queue(lane) for lane in LANES]
        for queue in (*lanes, self.names.dead, self.producer.inbox):
            wait_until(lambda queue=queue: self._emptied(queue), 30, "empty")  # type: ignore[misc]
        self._said = len(self.worker.events())
        self.worker.start().wait_ready()
        self.starts += 1

    def _emptied(self, queue: str) -> bool:
        """What a killed worker held comes back a moment later."""
        self.rabbit.purge(queue)
        return self.rabbit.depth(queue) == 0


@pytest.fixture(scope="module")
def bench(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    prefix = new_prefix()
    tolerant: Any = None

    def encode_raw(pieces: list[bytes], value: Any) -> int:
        if isinstance(value, Raw):
            pieces.append(value)
            return len(value)
        return int(tolerant(pieces, value))

    with pytest.MonkeyPatch.context() as patch:
        # The tests read back what they sent, with the same pika: it has to survive that, too.
        patch.setattr(pika.data, "decode_value", pika.data.decode_value)
        patch.setattr(pika.data, "encode_value", pika.data.encode_value)
        codec.tolerate()
        tolerant, pika.data.encode_value = pika.data.encode_value, encode_raw
        with (
            Simulator(ANSWERS) as gateway,
            WorkerProcess(
                amqp_url,
                prefix,
                gateway,
                tmp_path_factory.mktemp("bench"),
                BREAKER_FAILURES="10000",
                RETRY_DELAYS_SECONDS="1",
            ) as worker,
        ):
            worker.wait_ready()
            with Producer(amqp_url, prefix) as producer:
                bench = Bench(worker, producer)
                yield bench
                bench.settled()
    delete_topology(amqp_url, prefix)


# -- the codec alone


def read(encoded: bytes) -> Any:
    value, after = pika.data.decode_value(encoded, 0)
    assert after == len(encoded)
    return value


def written(value: Any) -> bytes:
    pieces: list[bytes] = []
    assert pika.data.encode_value(pieces, value) == sum(map(len, pieces))
    return b"".join(pieces)


@pytest.fixture
def codec_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("decode_value", "encode_value"):
            patch.setattr(pika.data, name, getattr(pika.data, name))
        codec.tolerate()
        yield


@pytest.mark.usefixtures("codec_alone")
def test_what_pika_cannot_hold_is_passed_on() -> None:
    """Floats of any size, times without a date and bottomless tables are read, and written again as they were."""

    for value in (0.5, 1e300, -1e-300, math.inf, -math.inf, 1e15 + 0.5):
        assert read(packed(b"d", "d", value)) == value
        assert written(value) == packed(b"d", "d", value)
    assert math.isnan(read(packed(b"d", "d", math.nan)))
    assert read(packed(b"f", "f", 0.5)) == 0.5
    for late in (packed(b"T", "Q", 253_402_300_800), packed(b"T", "Q", 2**64 - 1)):
        assert written(read(late)) == late
    for deep in (nested(25_000, tables=False), nested(18_000, tables=True)):
        value = read(deep)
        assert written(value) == deep
        assert read(deep) == value, "the depth is counted afresh"


# -- bodies

KEYS = st.sampled_from(["billnumber", "billNumber", "additionalInfo", "merchantId", "reference", "notAfter", "x"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=70)
    | st.sampled_from(["b-1", "2026-11-22T23:59:59+07:00", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"])
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
COMMANDS = st.fixed_dictionaries(
    {"billnumber": st.text(max_size=66) | st.just("b-1"), "additionalInfo": JSON | st.just({"merchantId": "M1"})},
    optional={"billNumber": LEAVES, "reference": LEAVES, "notAfter": LEAVES},
)


def utf8(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def ascii_only(value: object) -> bytes:
    return json.dumps(value).encode()


def damage(at: int, by: bytes) -> Callable[[bytes], bytes]:
    return lambda body: body[: at % (len(body) + 1)] + by + body[at % (len(body) + 1) + len(by) :]


DAMAGES = st.builds(damage, st.integers(0, 300), st.binary(max_size=3) | st.sampled_from([b",", b"}", b'"', b"\x00"]))
WRITTEN = st.sampled_from([utf8, ascii_only])
BODIES = (
    st.binary(max_size=300)
    | st.builds(lambda write, value: write(value), WRITTEN, JSON | COMMANDS)
    | st.builds(lambda write, value, harm: harm(write(value)), WRITTEN, COMMANDS, DAMAGES)
    | st.builds(
        lambda unit, number: unit * number,
        st.sampled_from([b"[", b'{"a":', b"1", b" ", b"\xff", b'"', b"\\u0000", b"-", b"[{}"]),
        st.sampled_from([1, 10, 20_000, 65_536, 65_537, 70_000]),
    )
)


def padded(length: int) -> bytes:
    """A valid command of exactly so many bytes."""
    start = b'{"billnumber":"b-1","additionalInfo":{"merchantId":"M1"},"pad":"'
    return start + b"x" * (length - len(start) - 2) + b'"}'


@WITHOUT_SHRINKING
@given(bodies=st.lists(BODIES, min_size=1, max_size=12))
@example(bodies=[b"", b" ", b"null", b"{}", b"[]", b'"x"', b"0", b"\xef\xbb\xbf{}", b"NaN", b"{}{}", b'{"a":1}\x00'])
@example(bodies=[padded(65_536), padded(65_537), b"x" * 1_000_000])
@example(bodies=[good("b-2").decode().encode(encoding) for encoding in ("utf-16", "utf-32", "utf-8-sig")])
@example(
    bodies=[
        b'{"billnumber":"b-1","billnumber":"b-1","additionalInfo":{"merchantId":"M1"}}',
        b'{"billnumber":"b-1","additionalInfo":{"merchantId":"M1"},"\\ud800":1,"\\ud800":2}',
        b'{"billnumber":"b-1","additionalInfo":{"merchantId":"M1"},"reference":"\\ud800\\u0000\\uffff"}',
        b'{"billnumber":"b-1","additionalInfo":{"merchantId":"M1"},"n":' + b"9" * 60_000 + b"}",
        b'{"billnumber":"b-1","additionalInfo":{"merchantId":"M1"},"n":1e999999}',
        b'{"billnumber":"b-1","additionalInfo":{"merchantId":"M1"},"notAfter":"2026-02-30T00:00:00Z"}',
    ]
)
def test_any_body_gets_one_outcome(bench: Bench, bodies: list[bytes]) -> None:
    """Arbitrary bytes and near-JSON: one outcome each, and what is invalid is parked as it came, byte for byte."""

    ids = {f"body-{time.monotonic_ns()}-{number}": body for number, body in enumerate(bodies)}
    try:
        for identity, body in ids.items():
            bench.rabbit.publish(bench.names.commands, "sweep", body, message_id=identity)
        outcomes = bench.answers(len(ids))
        assert {outcome.command_id for outcome in outcomes} == set(ids)
        statuses = {outcome.command_id: outcome.fields["status"] for outcome in outcomes}
        late = {it.command_id for it in outcomes if it.fields["reason"] == "deadline_passed"}
        assert set(statuses.values()) <= {"expired", "invalid", "unresolved"}
        assert late == {identity for identity, status in statuses.items() if status == "unresolved"}
        for identity, body in ids.items():
            try:
                is_object = isinstance(json.loads(body.decode(), parse_int=str), dict)
            except (ValueError, RecursionError):
                is_object = False
            assert is_object or statuses[identity] == "invalid", body[:100]
        letters = bench.parked(sum(status != "expired" for status in statuses.values()))
        for letter in letters:
            assert letter.body == ids[letter.properties.message_id]
            assert statuses[letter.properties.message_id] != "expired"
        bench.unharmed()
    except AssertionError:
        bench.restart()
        raise


# -- properties


def packed(kind: bytes, form: str, *values: Any) -> Raw:
    return Raw(kind + struct.pack(">" + form, *values))


def sized(kind: bytes, content: bytes) -> Raw:
    return Raw(packed(kind, "I", len(content)) + content)


def table(fields: Mapping[bytes, bytes]) -> bytes:
    return b"".join(bytes([len(name)]) + name + value for name, value in fields.items())


def nested(depth: int, *, tables: bool) -> Raw:
    """Lists in lists, or tables in tables."""
    value = b"V"
    for _ in range(depth):
        value = b"F" + struct.pack(">I", len(value) + 2) + b"\x01k" + value if tables else sized(b"A", value)
    return Raw(value)


SHORT_NAMES = st.binary(max_size=20) | st.sampled_from(
    [b"batch-id", b"a" * 255, b"\xff" * 255, b"", b"\x00", b"dead-at"]
)
FIELDS: st.SearchStrategy[Raw] = st.one_of(
    # No NaN and no infinity: RabbitMQ throws the producer out that sends one (3.10: 541, an internal error).
    st.floats(allow_nan=False, allow_infinity=False).map(lambda it: packed(b"d", "d", it)),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda it: packed(b"f", "f", it)),
    st.integers(0, 2**64 - 1).map(lambda it: packed(b"T", "Q", it)),
    st.builds(lambda scale, it: packed(b"D", "Bi", scale, it), st.integers(0, 255), st.integers(-(2**31), 2**31 - 1)),
    st.integers(-(2**63), 2**63 - 1).map(lambda it: packed(b"l", "q", it)),
    st.integers(-(2**31), 2**31 - 1).map(lambda it: packed(b"I", "i", it)),
    st.integers(0, 2**32 - 1).map(lambda it: packed(b"i", "I", it)),
    st.integers(0, 2**16 - 1).map(lambda it: packed(b"u", "H", it)),
    st.integers(-(2**15), 2**15 - 1).map(lambda it: packed(b"s", "h", it)),
    st.integers(-128, 127).map(lambda it: packed(b"b", "b", it)),
    st.integers(0, 255).map(lambda it: packed(b"B", "B", it)),
    st.booleans().map(lambda it: packed(b"t", "?", it)),
    st.just(Raw(b"V")),
    st.binary(max_size=40).map(lambda it: sized(b"S", it)),
    st.binary(max_size=40).map(lambda it: sized(b"x", it)),
    st.builds(lambda depth, tables: nested(depth, tables=tables), st.integers(0, 3000), st.booleans()),
)
VALUES = st.recursive(
    FIELDS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda it: sized(b"A", b"".join(it)))
        | st.dictionaries(SHORT_NAMES, inner, max_size=4).map(lambda it: sized(b"F", table(it)))
    ),
    max_leaves=6,
)
OURS = st.sampled_from([name.encode() for name in (*PROGRESS_HEADERS, *CARRIED_HEADERS)])
OTHERS = st.sampled_from(
    [
        b"x-death",
        b"x-delivery-count",
        b"x-first-death-queue",
        b"dead-reason",
        b"attempts",
        b"last-response-code",
        b"\xff\xfe",
    ]
)
HEADERS = st.dictionaries(OURS | OTHERS | SHORT_NAMES, VALUES, max_size=6)
SHORT = st.text(max_size=60).filter(lambda it: len(it.encode()) < 256) | st.binary(max_size=255)
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": SHORT,
        "content_encoding": SHORT,
        "headers": HEADERS,
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "correlation_id": SHORT,
        "reply_to": SHORT,
        "expiration": st.sampled_from(["600000", "4294967295"]),
        "message_id": SHORT,
        "timestamp": st.integers(0, 2**64 - 1),
        "type": SHORT,
        "user_id": st.just("guest"),
        "app_id": SHORT,
        "cluster_id": SHORT,
    },
)
MESSAGES = st.builds(Hostile, st.sampled_from([good, bad]), PROPERTIES, st.sampled_from(["cancellation", "sweep"]))


def with_headers(**headers: Any) -> list[Hostile]:
    """A good and a bad command with each of them."""
    return [
        Hostile(body, {"headers": {name.replace("_", "-"): value}}, lane)
        for name, value in headers.items()
        for body, lane in ((good, "sweep"), (bad, "cancellation"))
    ]


HUGE = 1e300
FULL = {f"h{number}": "x" * 1000 for number in range(MOST_HEADERS // 1024)}
RUBBISH: list[Any] = [
    "x" * 200,
    b"\xff" * 9,
    -1,
    2**63 - 1,
    None,
    True,
    [1, [2]],
    {"a": None},
    packed(b"d", "d", HUGE),
    packed(b"T", "Q", 2**64 - 1),
    nested(2000, tables=True),
]


@WITHOUT_SHRINKING
@given(messages=st.lists(MESSAGES, min_size=1, max_size=10))
@example(messages=with_headers(a=packed(b"d", "d", HUGE), b=packed(b"f", "f", 3e38), batch_id=packed(b"d", "d", -HUGE)))
@example(messages=with_headers(a=packed(b"T", "Q", 253_402_300_800), b=packed(b"T", "Q", 2**64 - 1)))
@example(
    messages=with_headers(a=nested(3000, tables=False), b=nested(3000, tables=True), batch_id=nested(2000, tables=True))
)
@example(messages=with_headers(a=packed(b"D", "Bi", 255, -(2**31)), b=packed(b"D", "Bi", 0, 2**31 - 1)))
@example(messages=[Hostile(body, {"headers": FULL, "reply_to": "r" * 255}) for body in (good, bad)])
@example(messages=[Hostile(body, {"headers": {"batch-id": "b" * MOST_HEADERS}}) for body in (good, bad)])
@example(messages=[Hostile(body, {"headers": {"traceparent": ["t" * 250] * 400}}) for body in (good, bad)])
@example(
    messages=[
        Hostile(
            body, {"message_id": b"\xff" * 255, "correlation_id": b"\xfe" * 255, "type": b"\xff", "reply_to": b"\x80"}
        )
        for body in (good, bad)
    ]
)
@example(
    messages=[
        Hostile(body, {"user_id": "guest", "expiration": "600000", "headers": {"CC": ["nowhere"], "BCC": ["nowhere"]}})
        for body in (good, bad)
    ]
)
@example(
    messages=[Hostile(body, {"headers": dict.fromkeys(PROGRESS_HEADERS, it)}) for it in RUBBISH for body in (good, bad)]
)
def test_any_properties_get_one_outcome(bench: Bench, messages: list[Hostile]) -> None:
    """Whatever AMQP allows in properties and headers: a good command expires, a bad one is parked as it came."""

    try:
        sent = bench.send(messages)
        outcomes = bench.answers(len(sent))
        assert {outcome.fields["reference"] for outcome in outcomes} == set(sent)
        invalid = {sign: body for sign, (message, body) in sent.items() if message.body is bad}
        for outcome in outcomes:
            wanted = ("invalid", 0) if outcome.fields["reference"] in invalid else ("expired", 1)
            made = outcome.fields["attempts"] - _attempts_claimed(sent[outcome.fields["reference"]][0])
            assert (outcome.fields["status"], made if wanted[1] else 0) == wanted
        assert sorted(letter.body for letter in bench.parked(len(invalid))) == sorted(invalid.values())
        bench.unharmed()
    except AssertionError:
        bench.restart()
        raise


def _attempts_claimed(message: Hostile) -> int:
    """What a forged header says about earlier rounds, if it is a number that could be one."""
    headers = message.properties.get("headers") or {}
    value: Any = headers.get("qris-attempts", headers.get(b"qris-attempts"))
    if isinstance(value, Raw):
        value = read(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def test_hostile_headers_survive_a_delayed_round(bench: Bench) -> None:
    """What goes through a retry queue and is parked in the end keeps its headers, exact to the bit."""

    headers = {
        "huge": packed(b"d", "d", HUGE),
        "half": packed(b"d", "d", 0.5),
        "late": packed(b"T", "Q", 2**63),
        "deep": nested(1500, tables=True),
        "text": sized(b"S", b"\xff\xfe"),
        "x-death": "not a list",
        "CC": ["nowhere"],
    }
    (sign,) = bench.send([Hostile(failing, {"headers": headers, "user_id": "guest", "expiration": "600000"}, "sweep")])
    (outcome,) = bench.answers(1)
    assert (outcome.fields["reference"], outcome.fields["reason"]) == (sign, "retries_exhausted")
    assert outcome.fields["attempts"] == 8
    (letter,) = bench.parked(1)
    kept = letter.properties.headers
    assert (kept["huge"], kept["half"]) == (HUGE, 0.5)
    assert (written(kept["late"]), written(kept["deep"])) == (headers["late"], headers["deep"])
    assert kept["text"] == b"\xff\xfe"
    assert kept["dead-reason"] == "retries_exhausted"
    assert not {"CC", "x-death"} & kept.keys()
    # Still the process, and the connection, that the first test of this module met.
    assert bench.starts == 1
    bench.unharmed()
