"""The headline of the status page: is it well, what is wrong, what is to be done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from worker.core.catalogue import RESPONSE_CODES
from worker.core.condition import RULES, Condition, Level, Process, Situation, condition, kind_of
from worker.core.reading import Change, Reading, Sample
from worker.core.verdict import Kind
from worker.shells.metrics import Metrics, samples

NOW = 1_800_000_000.0
FINE = dict.fromkeys(("consumer", "publisher", "breaker", "throttle", "drain", "start"), "ok")


class Worker:
    """A worker's figures as the real catalogue writes them; up for an hour, connected, idle."""

    def __init__(self) -> None:
        self.metrics = Metrics("1.2.3")
        self.metrics.started(NOW - 3600)
        self.metrics.broker_connected(True)
        self.processes = [Process("", FINE)]
        self._oldest: list[Sample] = []
        self._before = self._read(NOW - 10)

    def oldest(self, published_at: float) -> None:
        """The oldest cancellation in hand."""
        self._oldest = [Sample("oldest_command_timestamp_seconds", {"lane": "cancellation"}, published_at)]

    def is_wrong(self, component: str, what: str) -> None:
        """As `/readyz` reports it."""
        self.processes = [Process("", {**FINE, component: what})]

    def look(self, *, first: bool = False) -> Condition:
        """The condition now, ten seconds after the last look, or at the first one."""
        now = self._read(NOW)
        return condition(Situation(now, None if first else Change(self._before, now), self.processes))

    def _read(self, at: float) -> Reading:
        return Reading(at, [*samples(self.metrics.render()), *self._oldest])


@pytest.fixture
def worker() -> Worker:
    return Worker()


def work(worker: Worker, commands: int = 4120, *, age: float = 0.2) -> None:
    """So many commands done in the last ten seconds."""
    for number in range(commands):
        worker.metrics.outcome("sweep" if number % 2 else "cancellation", "expired", "success", age, NOW - 1)


def test_working(worker: Worker) -> None:
    """A worker that works says how fast, and how long its commands waited."""

    work(worker)
    found = worker.look()
    assert (found.level, found.key, found.action, list(found.others)) == (Level.WELL, "working", "", [])
    assert found.text == "Working: 412/s, 95 % done within 0.2 s of their publication."


def test_working_at_the_first_look(worker: Worker) -> None:
    """Without an earlier look there is no rate, and none is made up."""

    worker.metrics.in_hand = Counter(sweep=12).__getitem__
    assert worker.look(first=True).text == "Working: 12 commands in hand."


def test_the_oldest_in_hand(worker: Worker) -> None:
    """The headline has the age of the oldest command in hand; a cancellation of a minute is a concern."""

    work(worker)
    worker.oldest(NOW - 0.3)
    assert worker.look().text == "Working: 412/s, oldest command 0.3 s."
    worker.oldest(NOW - 90)
    assert worker.look().text.endswith("But the oldest cancellation in hand is 1 min 30 s old.")


def test_after_an_idle_hour_nobody_is_stuck(worker: Worker) -> None:
    """Commands that have just come are no trouble, however long ago the last outcome was."""

    worker.metrics.in_hand = Counter(cancellation=3).__getitem__
    worker.oldest(NOW - 5)
    assert worker.look().level is Level.WELL


def test_slower_than_any_bound(worker: Worker) -> None:
    """Ages beyond the last bound of the histogram are reported as such."""

    work(worker, 50, age=9999)
    assert worker.look().text == "Working: 5.0/s, 95 % done within over 1 h of their publication."


def test_idle(worker: Worker) -> None:
    """Nothing to do is well, with the time of the last outcome if there was one."""

    assert worker.look().text == "Ready, nothing to do. No outcome yet since the start 1 h ago."
    worker.metrics.outcome("sweep", "expired", "success", 0.1, NOW - 720)
    worker._before = worker._read(NOW - 10)
    found = worker.look()
    assert (found.level, found.text) == (Level.WELL, "Ready, nothing to do. Last outcome 12 min ago.")


def broker_gone(worker: Worker) -> None:
    worker.metrics.broker_connected(False)
    worker.is_wrong("consumer", "connection refused")


def outage(worker: Worker) -> None:
    worker.is_wrong("breaker", "cancellation open")
    worker.metrics.held_until(NOW + 12)
    worker.metrics.request("expire", "", 20.0)


def systemic(worker: Worker) -> None:
    outage(worker)
    for _ in range(10):
        worker.metrics.request("expire", "4019300", 0.1)


def probing(worker: Worker) -> None:
    worker.is_wrong("breaker", "cancellation half-open")
    worker.metrics.held_until(NOW - 1)


def throttled(worker: Worker) -> None:
    worker.is_wrong("throttle", "throttled")
    worker.metrics.held_until(NOW + 8)


def blocked(worker: Worker) -> None:
    worker.is_wrong("publisher", "blocked by the broker (memory or disk alarm)")


def no_exchange(worker: Worker) -> None:
    worker.is_wrong("publisher", "the broker does not take messages for 'P.outcomes'")


def draining(worker: Worker) -> None:
    worker.is_wrong("drain", "draining")
    worker.metrics.in_hand = Counter(sweep=12).__getitem__


def starting(worker: Worker) -> None:
    worker.metrics.started(NOW - 2)
    worker.is_wrong("consumer", "opening")


def awaiting_token(worker: Worker) -> None:
    worker.is_wrong("start", "starting")


def unconfirmed(worker: Worker) -> None:
    worker.metrics.unconfirmed(57)


def stuck(worker: Worker) -> None:
    worker.metrics.in_hand = Counter(sweep=32).__getitem__
    worker.oldest(NOW - 180)


def silent(worker: Worker) -> None:
    worker.processes = [Process("process-0", {"detail": "not running"})]


def refused_token(worker: Worker) -> None:
    worker.metrics.token_refresh("refused")


def silent_token_service(worker: Worker) -> None:
    worker.metrics.token_refresh("error")


@pytest.mark.parametrize(
    ("happens", "level", "text", "action"),
    [
        (broker_gone, Level.TROUBLE, "Not connected to the broker: connection refused. Commands wait", "AMQP_URL"),
        (
            outage,
            Level.WAITING,
            "Paused: the gateway is failing (breaker: cancellation open), probing again in 12 s. Nothing is lost.",
            "call the gateway's provider. Most failures: no answer, or one without a code.",
        ),
        (
            systemic,
            Level.TROUBLE,
            "Paused: the gateway refuses our credentials or set-up (4019300), probing again in 12 s. Nothing is lost.",
            "qris-expire check tells which setting",
        ),
        (
            probing,
            Level.WAITING,
            "Paused: the gateway is failing (breaker: cancellation half-open), probing it now.",
            "when a probe",
        ),
        (
            throttled,
            Level.WAITING,
            'Paused: the gateway answers "too many requests", going on in 8.0 s.',
            "fleet limit",
        ),
        (blocked, Level.TROUBLE, "Paused: the broker is short of memory or disk", "rabbitmq-diagnostics alarms"),
        (no_exchange, Level.TROUBLE, "Outcomes cannot be published: the broker does not", "qris-expire check"),
        (draining, Level.WAITING, "Draining: takes nothing new, 12 commands in hand.", "WORKER_DRAIN_SECONDS"),
        (starting, Level.WAITING, "Starting: connecting to the broker.", "Wait"),
        (awaiting_token, Level.WAITING, "Starting: the first token", "GATEWAY_READ_TIMEOUT_SECONDS"),
        (unconfirmed, Level.TROUBLE, "The broker takes outcomes but confirms none: 57 wait.", "quorum"),
        (stuck, Level.TROUBLE, "32 commands in hand, but no outcome for 3 min.", "restart the worker"),
        (silent, Level.TROUBLE, "No worker process works: not running.", "process_died"),
        (refused_token, Level.TROUBLE, "The gateway refuses us a token.", "qris-expire check"),
        (silent_token_service, Level.CAUTION, "Ready, nothing to do. No outcome yet", "provider"),
    ],
)
def test_what_is_wrong_and_what_to_do(
    worker: Worker, happens: Callable[[Worker], None], level: Level, text: str, action: str
) -> None:
    """Each trouble has its level, its sentence and its remedy, at the first look or soon after."""

    happens(worker)
    found = worker.look()
    assert found.level is level
    assert found.text.startswith(text)
    assert action in found.action


def waits(worker: Worker, commands: int, before: int, *, done: int = 50) -> None:
    """So many cancellations wait now, and ten seconds ago; some end meanwhile."""
    worker.metrics.waiting("cancellation", before)
    worker._before = worker._read(NOW - 10)
    worker.metrics.waiting("cancellation", commands)
    work(worker, 2 * done)


def test_a_backlog_of_undated_commands(worker: Worker) -> None:
    """3,582 undated cancellations wait and become more: the page is not green, though nothing is old."""

    waits(worker, 3582, 3552)
    for _ in range(80):
        worker.metrics.received("cancellation")
        worker.metrics.undated("cancellation")
    found = worker.look()
    assert (found.level, found.key) == (Level.CAUTION, "backlog")
    assert "3,582 commands wait in the lane cancellation and become more" in found.text
    assert "11 min 56 s at the present rate" in found.text
    assert "WORKER_CONCURRENCY" in found.action
    assert [other.key for other in found.others] == ["undated"]
    assert "have no timestamp" in found.others[0].text
    assert "of their first delivery. But 3,582" in found.text


def test_the_backlog_is_judged_by_what_the_whole_fleet_does(worker: Worker) -> None:
    """Four members work it off four times as fast as this one: what takes less than a minute is no concern."""

    worker.metrics.fleet_members(40)
    waits(worker, 3582, 3552)
    assert worker.look().level is Level.WELL


def test_a_backlog_that_nobody_works_on(worker: Worker) -> None:
    """Commands wait and none ends."""

    waits(worker, 12, 12, done=0)
    found = worker.look()
    assert (found.level, found.key) == (Level.CAUTION, "backlog")
    assert "12 commands wait in the lane cancellation, and none has ended in the last 10 s" in found.text


@pytest.mark.parametrize("reason", ["throttled", "limit", "breaker"])
def test_nobody_is_told_to_add_load(worker: Worker, reason: str) -> None:
    """While the gateway asks for less, fails, or the rate limit is used up, no advice is to add workers."""

    waits(worker, 3582, 3552)
    worker.oldest(NOW - 90)
    for _ in range(100):
        worker.metrics.request("expire", "2009300", 0.1)
    if reason == "throttled":
        for _ in range(10):
            worker.metrics.retry("throttled")
    elif reason == "limit":
        worker.metrics.rate_limit(10)
    else:
        worker.is_wrong("breaker", "cancellation open")
    found = worker.look()
    actions = " ".join([found.action, *(other.action for other in found.others)])
    assert "WORKER_CONCURRENCY" not in actions
    assert "replicas" not in actions
    assert {"throttled": "too many requests", "limit": "its rate limit of 10/s", "breaker": "failing"}[reason] in (
        " ".join([found.text, *(other.text for other in found.others)])
    )


def test_paused_by_an_operator(worker: Worker) -> None:
    """A pause is reported with how to end it, and is no trouble; readiness may say who did it."""

    worker.metrics.paused("operator", True)
    waits(worker, 3582, 3552, done=0)
    found = worker.look()
    assert (found.level, found.key) == (Level.WAITING, "operator")
    assert found.text.startswith("An operator has paused the fleet. Commands wait in their queues")
    assert "qris-expire fleet resume" in found.action
    assert [other.key for other in found.others] == []
    worker.is_wrong("operator", "ok, sweep paused by budi since 23:10 (maintenance)")
    assert worker.look().action.endswith("Sweep paused by budi since 23:10 (maintenance).")


def test_a_process_that_is_not_in_its_fleet(worker: Worker) -> None:
    """Without its fleet a process may make no call under a limit: the page says so, with what is known."""

    worker.is_wrong("fleet", "no permits without it: connection refused")
    found = worker.look()
    assert (found.level, found.key) == (Level.TROUBLE, "fleet")
    assert "Not in the fleet: no permits without it: connection refused." in found.text
    worker.metrics.started(NOW - 2)
    assert worker.look().text == "Starting: joining the fleet."


def test_a_lane_paused_by_an_operator(worker: Worker) -> None:
    """While other commands end, a pause is a remark."""

    worker.metrics.paused("operator", True)
    work(worker)
    found = worker.look()
    assert (found.level, found.key) == (Level.CAUTION, "operator")
    assert found.text.startswith("Working: 412/s, ")
    assert "an operator has paused a part of the fleet" in found.text


def test_a_sick_member(worker: Worker) -> None:
    """A process that alone fails at the gateway says so, before what follows from it."""

    worker.metrics.member_sick(True)
    worker.metrics.fleet_members(5)
    worker.is_wrong("breaker", "cancellation open")
    found = worker.look()
    assert (found.level, found.key) == (Level.TROUBLE, "sick")
    assert found.text.startswith("This process fails at the gateway while others of the fleet succeed.")
    assert "egress" in found.action


def test_some_sick_members(worker: Worker) -> None:
    """Of several processes on one page, the number of sick ones is reported."""

    worker.metrics.member_sick(True)
    worker.processes = [Process("process-0", FINE), Process("process-1", FINE)]
    work(worker)
    found = worker.look()
    assert found.level is Level.CAUTION
    assert "1 of 2 processes fails at the gateway while others of the fleet succeed" in found.text


def test_causes_stand_before_their_effects(worker: Worker) -> None:
    """When the broker is gone, what follows from it is not the headline."""

    broker_gone(worker)
    worker.metrics.in_hand = Counter(sweep=3).__getitem__
    worker.metrics.unconfirmed(3)
    found = worker.look()
    assert found.key == "disconnected"
    assert [other.key for other in found.others] == []


def test_the_worst_is_the_headline_and_the_rest_is_told(worker: Worker) -> None:
    """A refusal outranks a dead letter and a crooked clock, which stay on the page."""

    systemic(worker)
    worker.metrics.dead_letter("malformed_json")
    worker.metrics.clock_skew(-45)
    found = worker.look()
    assert found.key == "refused"
    assert [other.text for other in found.others] == [
        "1 dead letter in the last 10 s: 1 malformed_json.",
        "This machine's clock is 45 s behind the gateway's.",
    ]


def test_working_but(worker: Worker) -> None:
    """What somebody should look at follows the good news."""

    work(worker)
    for _ in range(700):
        worker.metrics.request("expire", "2009300", 0.1)
        worker.metrics.retry("transient")
    for _ in range(4300):
        worker.metrics.request("expire", "2009300", 0.1)
    found = worker.look()
    assert found.level is Level.CAUTION
    assert found.text == (
        "Working: 412/s, 95 % done within 0.2 s of their publication. "
        "But 14 % of the calls are repeats, most of them transient."
    )


def test_old_dead_letters_are_a_note(worker: Worker) -> None:
    """Dead letters of before do not spoil the headline, and are not forgotten either."""

    worker.metrics.dead_letter("credentials")
    worker._before = worker._read(NOW - 10)
    found = worker.look()
    assert found.level is Level.WELL
    assert [other.text for other in found.others] == ["1 dead letter since the start: 1 credentials."]
    assert "qris-expire dead list" in found.others[0].action


def test_one_process_of_several(worker: Worker) -> None:
    """With several processes the headline says how many are concerned."""

    bad = Process("process-1", {**FINE, "consumer": "connection refused"})
    worker.processes = [Process("process-0", FINE), bad, Process("process-2", FINE)]
    assert "connection refused (1 of 3 processes)" in worker.look().text
    worker.processes = [Process("process-0", FINE), Process("process-1", {"detail": "not running"})]
    work(worker)
    found = worker.look()
    assert found.level is Level.CAUTION
    assert found.text.startswith("Working: 412/s, ")
    assert found.text.endswith("But a worker process does not work: not running (1 of 2 processes).")


def test_a_process_that_does_not_answer_yet(worker: Worker) -> None:
    """A process that has just been started is starting; one that should answer, and does not, hangs."""

    worker.processes = [Process("process-0", FINE), Process("process-1", {"detail": "no answer"})]
    assert "hangs" in worker.look().action
    worker.metrics.started(0)
    worker.processes = [Process("process-0", {"detail": "no answer"})]
    found = worker.look(first=True)
    assert (found.level, found.text) == (Level.WAITING, "Starting.")


def test_a_quiet_retry_is_no_news(worker: Worker) -> None:
    """A few repeated calls leave the headline well."""

    worker.metrics.request("expire", "2009300", 0.1)
    worker.metrics.retry("token")
    assert worker.look().level is Level.WELL


def test_every_known_code_has_a_meaning() -> None:
    """The codes of the catalogue are judged as the worker judges them; a success is done for each service."""

    assert {
        code: kind_of(code) for code in ("2009300", "2007300", "4019300", "4299300", "5009300", "none", "other")
    } == {
        "2009300": Kind.DONE,
        "2007300": Kind.DONE,
        "4019300": Kind.SYSTEMIC,
        "4299300": Kind.THROTTLED,
        "5009300": Kind.TRANSIENT,
        "none": Kind.TRANSIENT,
        "other": None,
    }
    assert None not in {kind_of(code) for code in RESPONSE_CODES}


def test_no_rule_is_written_twice(worker: Worker) -> None:
    """Each rule stands once in the table, and a worker that is well breaks none."""

    work(worker)
    assert len(set(RULES)) == len(RULES)
    assert worker.look().others == []
