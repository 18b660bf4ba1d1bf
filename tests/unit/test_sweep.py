"""A sweep's pure part: rows of every shape, ids, outcomes late or twice, the sum; and the use case on fakes."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import NOON, outcome
from tests.fakes import FakeClock
from worker.app.sweep import LAST_CONFIRMS_SECONDS, Ended, Sweep
from worker.core.command import Command, parse
from worker.core.delivery import COPY_ID, EFFECT_UNKNOWN
from worker.core.fleet.messages import Beat, BreakerState, Letter, OperatorOrders, Pause, encode_letter
from worker.core.needs import NEEDS, settled
from worker.core.outcome import Outcome, Reason, encode_outcome
from worker.core.pace import WINDOW, Pace, Speed
from worker.core.rows import BadRow, InputError, InputRows, Row, RowRules, read_lines
from worker.core.sweep import (
    Batch,
    Bill,
    Facts,
    Recorded,
    Tally,
    Told,
    Watermark,
    batch_command_id,
    batch_id,
    command_body,
    command_message,
    inbox,
    is_batch_id,
    read_outcome,
    supersedes,
)
from worker.core.topology import Names

NAMES = Names("p")
BATCH = Batch("b-1", 3)


def reading(text: str, **options: object) -> InputRows:
    return read_lines(re.findall(r"[^\n]*\n|[^\n]+", text), RowRules(**options))  # type: ignore[arg-type]


def rows(text: str, **options: object) -> list[Row | BadRow]:
    """Without the cells as they came."""
    return [row._replace(cells=()) for row in reading(text, **options)]


def bills(text: str, **options: object) -> list[tuple[str, str]]:
    found = rows(text, **options)
    assert all(isinstance(row, Row) for row in found), found
    return [(row.bill, row.merchant) for row in found if isinstance(row, Row)]


def reason(text: str, **options: object) -> tuple[int, str]:
    (bad,) = (row for row in rows(text, **options) if isinstance(row, BadRow))
    return bad.line, bad.reason


# --- CSV as people have it


@pytest.mark.parametrize(
    "text",
    [
        "billnumber,merchantId\n007,M1\n008,M2\n",
        "billNumber,MERCHANTID\r\n007,M1\r\n008,M2\r\n",
        "\ufeffbillnumber;merchantid\n007;M1\n008;M2",
        "note\tBill_Number\tMerchant Id\nx\t007\tM1\ny\t008\tM2\n",
        'sep=;\r\n"billnumber";"merchantId"\r\n"007";"M1"\r\n"008";"M2"\r\n',
        "\n\nbillnumber,merchantId,a,b\n\n 007 , M1 \n,,,\n008,M2,,,,,\n\n",
        'merchantId,name,billnumber\nM1,"Toko ""Jaya"", Abadi",007\nM2,"two\nlines of text",008\n',
        'name,merchantId,billnumber\nToko "Jaya",M1,007\n"Toko "Baru" Abadi",M2,008\n',
        "billnumber|merchantId\n007|M1\n008|M2\n",
    ],
)
def test_csv_of_any_dialect_is_read(text: str) -> None:
    """Byte-order mark, CRLF, quotes, delimiters, case and place of columns, blank lines: the bills are the same."""

    assert bills(text) == [("007", "M1"), ("008", "M2")]


def test_optional_columns_are_carried() -> None:
    """`reference` and `notAfter` go along; empty cells are absent ones."""

    text = "billnumber,reference,notAfter\n1,ORD-77,2026-11-22T23:59:59+07:00\n2,,\n"

    assert rows(text, merchant="M") == [
        Row(2, "1", "M", "ORD-77", "2026-11-22T23:59:59+07:00"),
        Row(3, "2", "M", None, None),
    ]


def test_merchant_of_the_command_line_serves_where_a_row_has_none() -> None:
    """The row's own merchant wins."""

    found = rows("billnumber,merchantId\n1,M1\n2,\n", merchant="M9")

    assert [row.merchant for row in found if isinstance(row, Row)] == ["M1", "M9"]


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ("1 2,M", "billnumber must be 1 to 64 printable ASCII"),
        ("é,M", "blanks; 'é' has latin small letter e with acute at position 1"),
        ("1\u200b2,M", "has zero width space at position 2"),
        ("1 2,M", "'1 2' has a blank at position 2"),
        ("1" * 65 + ",M", "billnumber must be 1 to 64 printable ASCII"),
        (",M", "billnumber is missing"),
        ("1.00921E+07,M", "what a spreadsheet made of it"),
        ("10.092.081,M", "billnumber '10.092.081' has the separators of thousands"),
        ('"10,092,082",M', "has the separators of thousands"),
        ("10\u00a0092\u00a0082,M", "has the separators of thousands"),
        ('"10092085,00",M', "has the decimals of a number"),
        ("10092086.0,M", "has the decimals of a number"),
        ("'0010092081,M", "begins with the apostrophe that marks a text cell"),
        ('"1,21E+08",M', "is a number in scientific notation"),
        ("-10092081,M", "has the sign of a number"),
        ("(10092081),M", "has the sign of a number"),
        ("Rp10.092.081,M", "is an amount"),
        ("22/11/2026,M", "is a date"),
        ("3-Des,M", "is a date"),
        ("12:30,M", "is a time"),
        ("#N/A,M", "is an error of the spreadsheet"),
        ("########,M", "is an error of the spreadsheet"),
        ("nan,M", "stands for no value at all"),
        ("=A1,M", "is a formula"),
        ('"""007""",M', "stands in quotes"),
        ("1,121.000.001", "merchantId '121.000.001' has the separators of thousands"),
        ('1,"1,21E+08"', "merchantId '1,21E+08' is a number in scientific notation"),
        ("1,121000001.0", "has the decimals of a number"),
        ("1,M M", "merchantId must be 1 to 64 printable ASCII"),
        ("1,M," + "x" * 129, "reference must have at most 128"),
        ("1,M,r,tomorrow", "notAfter: 'tomorrow' is not an RFC 3339 time"),
        ("1,M,r,,x", "has 5 fields where the header has 4"),
    ],
)
def test_bad_row_is_named_with_its_line(cells: str, why: str) -> None:
    """A row that is no command keeps the others and says where and why; the header is line 1."""

    text = f"billnumber,merchantId,reference,notAfter\n0,M\n\n{cells}\n2,M\n"

    line, said = reason(text)

    assert (line, why in said) == (4, True), said
    assert [row.line for row in rows(text)] == [2, 4, 5]


@pytest.mark.parametrize("value", ["10.092.081", "10092086.0", "1E+08", "22/11/2026", "nan", "-5", "'1"])
@pytest.mark.parametrize("row", ['"{}",M', '1,"{}"'])
def test_mangled_looking_value_can_be_meant(value: str, row: str) -> None:
    """Whoever has such bills says so; then it is taken as it is."""

    (found,) = rows("billnumber,merchantId\n" + row.format(value) + "\n", as_is=True)

    assert isinstance(found, Row)
    assert value in (found.bill, found.merchant)


@pytest.mark.parametrize(
    "value",
    [
        "10092081",
        "0010092081",
        "INV-2026-001",
        "QR.12.13",
        "12e45",
        "A1",
        "a'b",
        "M1",
        "1234-5678-9012",
        "x=1",
        "TRX#9",
    ],
)
def test_identifiers_are_not_taken_for_mangled_ones(value: str) -> None:
    """Digits, letters and signs as gateways give them."""

    assert bills(f"billnumber,merchantId\n{value},{value}\n") == [(value, value)]


def test_text_that_a_spreadsheet_was_made_to_keep_is_its_text() -> None:
    """The formula ="007" is how people keep leading zeros, and the value is certain."""

    assert bills('billnumber,merchantId\n"=""007""","=""M1"""\n') == [("007", "M1")]


def test_json_lines_of_a_program_that_takes_numbers_for_numbers_are_bad() -> None:
    """A string is no guarantee."""

    assert "has the decimals of a number" in reason('{"billnumber": "10092086.0", "merchantId": "M"}\n')[1]
    assert "in scientific notation" in reason('{"billnumber": "1", "merchantId": "1.21E+08"}\n')[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["0010092081"] * 8 + ["10092081", "92081"], "2 values of billnumber have fewer than 10 digits"),
        ([f"{number:08d}" for number in range(20)], None),
        ([str(10**number) for number in range(12)], None),
        (["1", "22"], None),
        (["12345678901234500000"] * 6, "end in zeros"),
        (["12345678901234500000"] * 6 + ["12345678901234567890"], None),
        ([f"INV-{number}" for number in range(90, 110)], None),
    ],
)
def test_digits_that_are_gone_are_seen_by_comparing(values: list[str], said: str | None) -> None:
    """No value alone shows that it lost leading zeros or its last digits; the column may."""

    found = reading("billnumber,merchantId\n" + "".join(f"{value},M\n" for value in values))
    assert len(list(found)) == len(values)

    remarks = found.remarks()
    assert len(remarks) == (0 if said is None else 1)
    assert said is None or said in remarks[0]


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("", None, "is empty"),
        ("\n \r\n", None, "is empty"),
        ("10092081\n10092082\n", 1, "no column billnumber"),
        ("a,billnumber,billNumber\n", 1, "twice"),
        ("billnumber,m\r1,M1\r2,M2\r", 1, "carriage returns"),
        ('billnumber,name\n1,"Toko\n2,foo\n3,"bar"\n', 2, "takes in a row, up to line 4"),
        ('billnumber,name\n1,"Toko\n2,foo\n3,"\n', 2, "takes in a row, up to line 4"),
        ('name,billnumber\n"Toko,1\n"bar",3\n', 2, "takes in a row, up to line 3"),
        ('billnumber,name,more\n1,"Toko\n2\n3\n', 2, "takes in a row, up to line 4"),
        ('billnumber,name\n1,"' + "x\n" * 100_000, 2, "quote"),
    ],
)
def test_input_that_cannot_be_trusted_is_refused_as_a_whole(text: str, line: int | None, why: str) -> None:
    """No header, an open quote that would swallow rows: nothing can be skipped, since it is unknown what it is."""

    with pytest.raises(InputError, match=why) as refused:
        rows(text)

    assert refused.value.line == line


# Line breaks together with delimiters may look like rows, and are refused then: see above.
CELLS = st.one_of(st.text("ab\"',;\t é", max_size=8), st.text("ab\"' \né", max_size=8))


@given(
    st.lists(st.tuples(st.from_regex(r"[0-9]{1,12}", fullmatch=True), CELLS), max_size=20),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_whatever_a_csv_writer_writes_is_read(
    table: list[tuple[str, str]], delimiter: str, ends: str, mark: bool
) -> None:
    """No bill is lost and none is changed, whatever stands in the other column: leading zeros stay."""

    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=ends)
    writer.writerow(("name", "billnumber"))
    writer.writerows((name, bill) for bill, name in table)

    found = bills(("\ufeff" if mark else "") + text.getvalue(), merchant="M")

    assert [bill for bill, _ in found] == [bill for bill, _ in table]


# --- JSON lines


def test_json_lines_are_commands() -> None:
    """An object on each line, as the queue takes it; the merchant may stand beside the bill; unknown fields go."""

    text = (
        '\ufeff{"billnumber": "007", "additionalInfo": {"merchantId": "M1"}, "reference": "r", "more": [1]}\r\n\n'
        '{"billNumber": "008", "merchantId": "M2", "notAfter": "2026-11-22T23:59:59+07:00"}\n'
    )

    assert rows(text) == [
        Row(1, "007", "M1", "r", None),
        Row(3, "008", "M2", None, "2026-11-22T23:59:59+07:00"),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"billnumber": 7}', "leading zeros"),
        ('{"billnumber": "7"', "not JSON"),
        ("7", "must be a JSON object"),
        ('{"billnumber": "7", "merchantId": 1}', "merchantId must be"),
        ('{"billnumber": "7", "merchantId": "a", "additionalInfo": {"merchantId": "b"}}', "differ"),
        ('{"billnumber": "7", "reference": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_json_line_is_named(line: str, why: str) -> None:
    """The rest of the input is read on."""

    number, said = reason(f'{{"billnumber": "1"}}\n{line}\n{{"billnumber": "2"}}\n', merchant="M")

    assert (number, why in said) == (2, True), said


@pytest.mark.parametrize("text", ["billnumber\n7\n", '{"billnumber": "7"}\n'])
def test_a_merchant_is_needed(text: str) -> None:
    """Where nothing serves in its place, a row without a merchant is bad."""

    assert "merchantId is missing" in reason(text)[1]


# --- ids and commands


def test_ids_are_those_of_batch_bill_and_merchant() -> None:
    """The same three give the same id for ever; another of any of them gives another."""

    assert batch_command_id("b", "1", "M") == "3d15a15c-4209-59fa-84ec-8d08c48cb5d7"
    assert (
        len({batch_command_id(*each) for each in [("b", "1", "M"), ("c", "1", "M"), ("b", "2", "M"), ("b", "1", "")]})
        == 4
    )


def test_default_batch_id_is_content_and_jakarta_day() -> None:
    """A new day begins in Jakarta, not in Greenwich."""

    evening = NOON + 11.5 * 3600

    assert batch_id("abcdef0123456789", NOON) == "20261122-abcdef012345"
    assert batch_id("abcdef0123456789", evening)[:8] == "20261122"
    assert batch_id("abcdef0123456789", evening + 3600)[:8] == "20261123"


@pytest.mark.parametrize(("text", "good"), [("a", True), ("A.b_c-1", True), ("", False), ("-a", False), ("a/b", False)])
def test_batch_id_can_name_a_queue_and_a_file(text: str, good: bool) -> None:
    """Letters, digits and a few signs."""

    assert is_batch_id(text) is good


def test_command_is_what_the_worker_parses() -> None:
    """The body is a valid command; properties say whose it is, and that it must survive."""

    bill = Bill(1, "007", "M1", "r é", "2026-11-22T23:59:59+07:00")

    message = command_message(NAMES, BATCH, bill, NOON + 0.9)

    assert parse(message.body) == Command("007", "M1", "r é", 1_795_366_799.0)
    assert parse(command_body(bill._replace(merchant="", reference=None, not_after=None)), "D") == Command("007", "D")
    assert (message.exchange, message.routing_key) == ("p.commands", "sweep")
    assert message.properties == {
        "content_type": "application/json",
        "delivery_mode": 2,
        "message_id": batch_command_id("b-1", "007", "M1"),
        "timestamp": int(NOON),
        "headers": {"batch-id": "b-1", "batch-size": 3},
    }


def test_inbox_goes_away_when_nobody_uses_it() -> None:
    """A durable queue bound to the lane's outcomes, with an end of its own."""

    made = inbox(NAMES, "b-1", "quorum")

    assert [queue.name for queue in made.queues] == ["p.outcomes.batch.b-1"]
    assert made.queues[0].arguments == {"x-queue-type": "quorum", "x-expires": 259_200_000}
    assert [(each.exchange, each.routing_key) for each in made.bindings] == [("p.outcomes", "sweep.*")]


@given(st.lists(st.integers(1, 3), max_size=40), st.randoms(use_true_random=False))
def test_watermark_has_no_gap_below(steps: list[int], rng: random.Random) -> None:
    """In whatever order confirms come, no bill up to the watermark is without one."""

    mark, sent, confirmed = Watermark(10), list[int](), set[int]()
    number = 10
    for step in steps:
        number += step
        sent.append(number)
        mark.published(number)
        if rng.random() < 0.6:
            done = rng.choice(sent)
            confirmed.add(done)
            mark.confirmed(done)
        assert all(each in confirmed for each in sent if each <= mark.through)
    for each in sent:
        mark.confirmed(each)
    assert (mark.through, len(mark)) == (number, 0)


# --- outcomes


def told(reason: Reason = Reason.SUCCESS, at: float = NOON, bill: str = "1", merchant: str = "M") -> Told:
    found = read_outcome(outcome_body(reason, at, bill, merchant))
    assert found is not None
    return found


def outcome_body(reason: Reason = Reason.SUCCESS, at: float = NOON, bill: str = "1", merchant: str = "M") -> bytes:
    return encode_outcome(made(reason, at, bill, merchant))


def made(reason: Reason, at: float, bill: str, merchant: str) -> Outcome:
    identity = batch_command_id(BATCH.id, bill, merchant)
    return outcome(
        reason, command_id=identity, billnumber=bill, merchant_id=merchant, completed_at=at, batch_id=BATCH.id
    )


def test_outcome_is_read_as_it_is_told() -> None:
    """What `encode` writes is understood."""

    found = told(Reason.PAID)

    assert (found.status, found.reason, found.bill, found.attempts) == ("rejected", "paid", "1", 1)
    assert found.completed_at == "2026-11-22T12:00:00.000+07:00"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"7",
        b"{}",
        outcome_body().replace(b'"status":"expired"', b'"status":"fine"'),
        outcome_body().replace(b'"attempts":1', b'"attempts":null'),
        outcome_body().replace(b'"Successful"', b'"\\ud800"'),
    ],
)
def test_what_is_no_outcome_is_ignored(body: bytes) -> None:
    """Anybody may publish to the exchange."""

    assert read_outcome(body) is None


@pytest.mark.parametrize(
    ("known", "new", "wins"),
    [
        (Reason.RETRIES_EXHAUSTED, Reason.SUCCESS, True),
        (Reason.RETRIES_EXHAUSTED, Reason.NOT_FOUND, True),
        (Reason.SUCCESS, Reason.RETRIES_EXHAUSTED, False),
        (Reason.SUCCESS, Reason.ALREADY_EXPIRED, False),
        (Reason.SUCCESS, Reason.NOT_FOUND, False),
        (Reason.NOT_FOUND, Reason.SUCCESS, True),
        (Reason.SUCCESS, Reason.PAID, True),
        (Reason.PAID, Reason.SUCCESS, False),
        (Reason.DEADLINE_PASSED, Reason.RETRIES_EXHAUSTED, True),
    ],
)
def test_second_outcome_counts_only_if_it_knows_more(known: Reason, new: Reason, wins: bool) -> None:
    """A final answer beats not knowing, paid is never hidden, and of two that do not know the later counts."""

    first = told(known)

    assert supersedes(told(new, NOON + 1), first.status, first.reason, first.completed_at) is wins


@given(st.permutations([Reason.RETRIES_EXHAUSTED, Reason.SUCCESS, Reason.NOT_FOUND, Reason.CREDENTIALS]))
def test_order_of_outcomes_does_not_matter(order: list[Reason]) -> None:
    """Whatever comes first, what is known in the end is the same."""

    now = told(order[0])
    for each in order[1:]:
        new = told(each)
        if supersedes(new, now.status, now.reason, now.completed_at):
            now = new

    assert now.reason == "success"


# --- the sum


def test_sum_is_the_input() -> None:
    """Every row of the input stands in exactly one line of the table."""

    told = {("unresolved", "credentials"): 1, ("expired", "success"): 11, ("rejected", "paid"): 1}
    tally = Tally(told, invalid=2, duplicates=3, unsent=5, waiting=7)

    assert tally.rows == 30
    assert sum(count for _, _, count in tally.lines()) == tally.rows
    assert [status for status, _, _ in tally.lines()] == [
        "expired", "rejected", "unresolved", "waiting", "unsent", "skipped", "skipped"
    ]  # fmt: skip
    assert not settled(tally, rejected=False, percent=5.0)
    assert settled(Tally(invalid=2, told={("expired", "success"): 1}), rejected=False, percent=5.0)


def test_every_reason_needs_something_of_people_or_nothing() -> None:
    """None is left out of the list of what must be done, and none stands in it twice."""

    listed = [reason for need in NEEDS for reason in need.reasons]

    assert sorted([*listed, Reason.SUCCESS, Reason.ALREADY_EXPIRED]) == sorted(Reason)


@pytest.mark.parametrize(
    ("told", "rejected", "percent", "good"),
    [
        ({("expired", "success"): 100}, False, 5.0, True),
        ({("expired", "success"): 99, ("rejected", "paid"): 1}, False, 5.0, False),
        ({("expired", "success"): 99, ("rejected", "paid"): 1}, True, 5.0, True),
        ({("expired", "success"): 95, ("rejected", "not_found"): 5}, True, 5.0, True),
        ({("expired", "success"): 94, ("rejected", "not_found"): 6}, True, 5.0, False),
        (
            {("expired", "success"): 94, ("rejected", "invalid_merchant"): 3, ("rejected", "not_found"): 3},
            True,
            5.0,
            False,
        ),
        ({("expired", "success"): 94, ("rejected", "not_found"): 6}, True, 6.0, True),
        ({("expired", "success"): 1, ("rejected", "not_found"): 99}, True, 100.0, True),
        ({("expired", "success"): 99, ("unresolved", "credentials"): 1}, True, 5.0, False),
    ],
)
def test_exit_code_is_by_what_people_must_do(
    told: dict[tuple[str, str], int], rejected: bool, percent: float, good: bool
) -> None:
    """A few unknown bills are typing errors, many are a wrong file: not good even where rejected ones are."""

    assert settled(Tally(told=told), rejected=rejected, percent=percent) is good


def test_bill_that_is_sent_again_is_another_copy() -> None:
    """The worker may remember the first one as settled; what is in doubt stays so."""

    first = command_message(NAMES, BATCH, Bill(1, "1", "M", None, None), NOON)
    again = command_message(NAMES, BATCH, Bill(4, "1", "M", None, None, 1, True), NOON)

    assert again.properties["message_id"] == first.properties["message_id"]
    assert {name: again.properties["headers"][name] for name in (COPY_ID, EFFECT_UNKNOWN)} == {
        COPY_ID: "retry-1",
        EFFECT_UNKNOWN: True,
    }
    assert COPY_ID not in first.properties["headers"]


def test_what_the_gateway_refused_is_final() -> None:
    """Expired and rejected bills are final; unresolved ones, and those without an outcome, are not."""

    told = {("expired", "success"): 1, ("rejected", "paid"): 1}

    assert settled(Tally(told=told), rejected=True, percent=5.0)
    assert not settled(Tally(waiting=1, told=told), rejected=True, percent=5.0)
    unresolved = {("unresolved", "retries_exhausted"): 1}
    assert not settled(Tally(told=told | unresolved), rejected=True, percent=5.0)


def test_speed_is_that_of_the_latest_seconds() -> None:
    """A slow start is forgotten; without movement it is unknown how long it takes."""

    speed = Speed()
    assert speed.left(10) is None
    for second in range(100):
        speed.mark(float(second), 0 if second < 50 else (second - 50) * 10)

    assert speed.per_second == pytest.approx(10)
    assert speed.left(100) == pytest.approx(10)


def test_speed_stays_when_all_is_done() -> None:
    """It does not fall while the rest of the work goes on: published bills wait for their outcomes."""

    speed = Speed()
    for second in range(10):
        speed.mark(float(second), second * 10, 90)
    before = speed.per_second
    for second in range(10, 60):
        speed.mark(float(second), 90, 90)

    assert speed.per_second == before == 10.0


# --- the use case


class FakeJournal:
    """Keeps everything in memory; `published_through` is what a crash would find."""

    def __init__(self, size: int, published: int = 0) -> None:
        self.bills = [Bill(number, str(number), "M", None, None) for number in range(1, size + 1)]
        self.known: dict[str, Told] = {}
        self.facts = Facts(Batch(BATCH.id, size), "f.csv", "d", NOON, 0, 0, published, True, False)

    def unsent(self, after: int, limit: int) -> list[Bill]:
        found = [bill for bill in self.bills if bill.number > after and bill.bill not in self.known]
        return found[:limit]

    def published(self, through: int) -> None:
        self.facts = self.facts._replace(published=through)

    def record(self, outcomes: Sequence[Told]) -> Recorded:
        recorded = Recorded()
        for each in outcomes:
            if each.bill not in self.known:
                self.known[each.bill] = each
                recorded.numbers.append(int(each.bill))
                recorded.change(each.status, each.reason, 1)
        return recorded

    def stop(self, who: str) -> None:
        self.facts = self.facts._replace(stopped=who)

    def tally(self) -> Tally:
        answered = {("expired", "success"): len(self.known)} if self.known else {}
        sent = sum(1 for bill in self.bills if bill.number <= self.facts.published and bill.bill not in self.known)
        return Tally(unsent=len(self.bills) - sent - len(self.known), waiting=sent, told=answered)


class FakeScreen:
    """Remembers what was shown last."""

    def __init__(self) -> None:
        self.trouble = ""
        self.tally: Tally | None = None

    def show(self, tally: Tally, trouble: str) -> None:
        self.tally, self.trouble = tally, trouble


class Stage:
    """A sweep of ``size`` bills, played by hand."""

    def __init__(
        self, size: int, *, follow: bool = True, journal: FakeJournal | None = None, window: int = WINDOW
    ) -> None:
        self.journal = journal or FakeJournal(size)
        self.clock = FakeClock()
        self.screen = FakeScreen()
        self.signals = 0
        self.sweep = Sweep(
            self.journal,
            NAMES,
            follow=follow,
            stop=lambda: self.signals,
            screen=self.screen,
            clock=self.clock,
            window=window,
        )

    def send(self) -> list[int]:
        sent = []
        while (following := self.sweep.next()) is not None:
            sent.append(following[0])
        return sent

    def look(self, trouble: str = "", after: float = 1.0) -> bool:
        self.clock.sleep(after)
        return self.sweep.look(trouble)


def test_sweep_ends_when_every_bill_has_an_outcome() -> None:
    """It is done when all is published, confirmed and reported, and not before."""

    stage = Stage(3)

    assert stage.send() == [1, 2, 3]
    assert stage.look()
    for number in (3, 1, 2):
        stage.sweep.confirmed(number)
    stage.sweep.outcomes([outcome_body(bill="1"), outcome_body(bill="1"), b"noise", outcome_body(bill="2")])
    assert stage.look()
    stage.sweep.outcomes([outcome_body(bill="3")])

    assert not stage.look()
    assert stage.sweep.ended is Ended.DONE
    assert stage.journal.facts.published == 3


def test_sweep_that_follows_nothing_ends_with_the_last_confirm() -> None:
    """Without --wait outcomes are somebody else's."""

    stage = Stage(2, follow=False)
    stage.send()
    stage.sweep.confirmed(1)
    assert stage.look()
    stage.sweep.confirmed(2)

    assert not stage.look()


def test_journal_never_runs_ahead_of_the_confirms() -> None:
    """What is noted as published is confirmed without a gap: a crash forgets nothing."""

    stage = Stage(5)
    stage.send()
    for number in (1, 2, 4, 5):
        stage.sweep.confirmed(number)
    stage.look()

    assert stage.journal.facts.published == 2


def test_resumed_sweep_publishes_what_is_left() -> None:
    """Bills behind the watermark that have their outcome already are not published again."""

    journal = FakeJournal(5, published=2)
    journal.record([told(bill="4")])

    stage = Stage(5, journal=journal)

    assert stage.send() == [3, 5]


def test_sweep_with_nothing_to_publish_only_follows() -> None:
    """It is not asked for messages then, and ends all the same."""

    stage = Stage(2, journal=FakeJournal(2, published=2))
    assert stage.look()
    stage.sweep.outcomes([outcome_body(bill="1"), outcome_body(bill="2")])

    assert not stage.look()
    assert stage.sweep.ended is Ended.DONE


def test_interrupted_sweep_waits_for_the_confirms_of_what_is_out() -> None:
    """After ctrl-C nothing more goes out; what is out is confirmed, noted, and then it ends."""

    stage = Stage(3)
    stage.sweep.next()
    stage.signals = 1

    assert stage.sweep.next() is None
    assert stage.look(after=LAST_CONFIRMS_SECONDS / 2)
    stage.sweep.confirmed(1)
    assert not stage.look()
    assert stage.sweep.ended is Ended.STOPPED
    assert stage.journal.facts.published == 1


@pytest.mark.parametrize("more", ["time", "signal"])
def test_interrupted_sweep_does_not_wait_for_a_silent_broker(more: str) -> None:
    """A few seconds, or a second ctrl-C, end the wait."""

    stage = Stage(3)
    stage.send()
    stage.signals = 1
    assert stage.look()
    stage.signals += more == "signal"

    assert not stage.look(after=LAST_CONFIRMS_SECONDS + 1 if more == "time" else 0.1)


def test_no_more_bills_than_the_window_are_without_an_outcome() -> None:
    """The next one goes out when one is answered, whichever that is; confirms alone make no room."""

    stage = Stage(9, window=3)

    assert stage.send() == [1, 2, 3]
    for number in (1, 2, 3):
        stage.sweep.confirmed(number)
    assert stage.send() == []
    stage.sweep.outcomes([outcome_body(bill="3"), outcome_body(bill="3"), outcome_body(bill="9")])
    assert stage.send() == [4]
    stage.sweep.outcomes([outcome_body(bill="1"), outcome_body(bill="2")])
    assert stage.send() == [5, 6]


def test_resumed_sweep_counts_what_waits_already() -> None:
    """What an earlier process published is within the window too."""

    stage = Stage(9, journal=FakeJournal(9, published=3), window=5)

    assert stage.send() == [4, 5]


def test_without_wait_there_is_no_window() -> None:
    """Nobody follows the outcomes, so it is unknown when there is room."""

    assert len(Stage(300, follow=False, window=3).send()) == 300


def test_stopped_batch_publishes_no_more_and_ends_with_its_outcomes() -> None:
    """What is out is followed to its end, the rest stays unsent; the journal knows who stopped it."""

    stage = Stage(9, window=3)
    stage.send()
    for number in (1, 2, 3):
        stage.sweep.confirmed(number)

    said = stage.sweep.cut("ana@desk", NOON)

    assert said == "3 of 9 bills are published, 3 of them have no outcome yet"
    stage.sweep.outcomes([outcome_body(bill="1"), outcome_body(bill="2")])
    assert stage.send() == []
    assert stage.look()
    assert "stopped by ana@desk" in stage.screen.trouble
    stage.sweep.outcomes([outcome_body(bill="3")])
    assert not stage.look()
    assert stage.sweep.ended is Ended.CUT
    assert stage.journal.facts.stopped == "ana@desk"


def test_order_to_stop_that_is_older_than_the_resumption_is_void() -> None:
    """It may wait in the inbox while nobody reads it, and somebody may have resumed the batch since."""

    journal = FakeJournal(3)
    journal.facts = journal.facts._replace(resumed_at=NOON)
    stage = Stage(3, journal=journal)

    stage.sweep.cut("ana@desk", NOON - 1)
    assert stage.send() == [1, 2, 3]
    stage.sweep.cut("ana@desk", NOON + 1)
    assert stage.journal.facts.stopped


class Lane:
    """A lane with workers that answer ``rate`` bills a second, ``hands`` at once, and sweeps that share it."""

    def __init__(self, rate: float, hands: int) -> None:
        self.rate, self.hands, self.now = rate, hands, 0.0
        self.queue: deque[int] = deque()
        self.in_hand: deque[int] = deque()
        self.sweeps: list[tuple[Pace, list[int]]] = []  # and (published, answered)
        self.busy = 0.0

    def join(self) -> int:
        self.sweeps.append((Pace(WINDOW, self.now), [0, 0]))
        return len(self.sweeps) - 1

    def run(self, seconds: float, step: float = 0.05) -> None:
        end, credit, looks = self.now + seconds, 0.0, 0
        while self.now < end - 1e-9:
            self.now += step
            credit += self.rate * step
            looks += 1
            for pace, (published, answered) in self.sweeps:
                if looks % 5 == 0:
                    pace.seen(self.now, published - answered, len(self.queue), 1)
            for number, (pace, counts) in enumerate(self.sweeps):
                while counts[0] - counts[1] < pace.allowed(self.now):
                    counts[0] += 1
                    self.queue.append(number)
            while self.queue and len(self.in_hand) < self.hands:
                self.in_hand.append(self.queue.popleft())
            done = 0
            while self.in_hand and credit >= 1:
                credit -= 1
                done += 1
                self.sweeps[self.in_hand.popleft()][1][1] += 1
                if self.queue:
                    self.in_hand.append(self.queue.popleft())
            credit = min(credit, max(1.0, self.rate * step))
            self.busy += done
            for pace, _ in self.sweeps:
                pace.heard(done)


@pytest.mark.parametrize(("rate", "hands"), [(1000, 64), (50, 24), (5000, 1000), (100, 2000), (2, 8)])
def test_pace_keeps_the_workers_busy_and_the_lane_short(rate: float, hands: int) -> None:
    """Whatever they do in a second: nearly all of that is done, with a second of work or a hundred bills queued."""

    lane = Lane(rate, hands)
    lane.join()
    lane.run(20)
    before = lane.busy
    lane.run(20)

    assert lane.busy - before >= 0.95 * rate * 20
    assert len(lane.queue) <= max(150, rate)


def test_two_sweeps_get_equal_shares() -> None:
    """The one that came later is not behind the other's window."""

    lane = Lane(800, 64)
    lane.join()
    lane.run(20)
    second = lane.join()
    lane.run(0.7)
    assert lane.sweeps[second][1][1] > 0
    before = [counts[1] for _, counts in lane.sweeps]
    lane.run(20)

    shares = [counts[1] - earlier for (_, counts), earlier in zip(lane.sweeps, before, strict=True)]
    assert min(shares) / max(shares) > 0.7, shares


def test_pace_fills_the_window_while_nobody_works() -> None:
    """After a moment in which a worker that is being started would have come; then nobody is kept waiting."""

    pace = Pace(5000, 0.0)
    pace.seen(1.0, 0, 0, 0)
    assert pace.allowed(1.0) < 5000
    assert pace.allowed(5.0) == 5000
    pace.seen(6.0, 5000, 5000, 1)
    assert pace.allowed(6.0) < 5000


def test_silence_is_put_as_a_question() -> None:
    """When everything is published and nothing comes back, somebody should look whether a worker runs."""

    stage = Stage(1)
    stage.send()
    assert stage.sweep.next() is None
    stage.sweep.confirmed(1)
    stage.look(after=30)

    assert stage.screen.trouble == "no outcome for 30 s; does a worker run?"
    stage.sweep.lane(1, 0)
    stage.look()
    assert stage.screen.trouble == "no outcome for 31 s: no worker consumes p.sweep; none runs, or all are paused"
    stage.sweep.lane(7, 2)
    stage.look()
    assert stage.screen.trouble == "no outcome for 32 s: 7 commands in p.sweep, 2 consumers"
    stage.look("the broker is away")
    assert stage.screen.trouble == "the broker is away"


@pytest.mark.parametrize(
    ("beat", "said"),
    [
        (
            Beat(1, 1, 0.0, breakers={"sweep": BreakerState(2, 60.0, 40.2)}),
            "paused: the gateway is failing, next probe in 40 s",
        ),
        (
            Beat(1, 1, 0.0, breakers={"sweep": BreakerState(1, 60.0, 0.0)}),
            "paused: the gateway is failing, it is being probed",
        ),
        (Beat(1, 1, 0.0, breakers={"cancellation": BreakerState(2, 60.0, 40.0)}), ""),
        (Beat(1, 1, 0.0, hold=12.0), "paused: the gateway asks for fewer calls, for 12 s more"),
        (
            Beat(1, 1, 0.0, orders=OperatorOrders(1, {"sweep": Pause("ana@desk", "maintenance")})),
            "paused by ana@desk (maintenance): `qris-expire fleet resume` ends it",
        ),
        (Beat(1, 1, 0.0, orders=OperatorOrders(1, {"sweep": Pause("ana@desk")}), pauses={"sweep": 0.0}), ""),
        (Beat(1, 1, 0.0), ""),
    ],
)
def test_pause_of_the_fleet_is_told_at_once(beat: Beat, said: str) -> None:
    """Why nothing goes on, and until when; what was heard long ago is not told."""

    stage = Stage(1)
    stage.send()
    stage.sweep.fleet(b"noise")
    stage.sweep.fleet(encode_letter(Letter("leader", "client", beat)))
    stage.look(after=0.1)

    assert stage.screen.trouble == said
    stage.look(after=10)
    assert stage.screen.trouble == ""


def test_command_bodies_are_plain_json() -> None:
    """Letters beyond ASCII stay readable."""

    assert json.loads(command_body(Bill(1, "1", "", "é", None))) == {"billnumber": "1", "reference": "é"}
