"""Is it well; if not, what is wrong, and what is to be done: one sentence each, from what metrics and probes say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Final

from worker.core.catalogue import NO_ANSWER
from worker.core.diagnosis import SKEW_WORTH_A_WARNING
from worker.core.lanes import CANCELLATION, SWEEP
from worker.core.reading import Change, Reading
from worker.core.verdict import Kind, Reply, judge
from worker.core.words import duration, number, plural, quantile, rate, share

NO_ANSWER_YET: Final = "no answer"
"""What is wrong with a process that runs and does not answer: it starts, or it hangs."""
STARTING_SECONDS: Final = 10.0
"""A process that is younger and not connected yet is starting, not in trouble."""
STUCK_SECONDS: Final = 120.0
"""Commands in hand and no outcome for so long: more than a round with its budget and a last call takes."""
UNCONFIRMED_SECONDS: Final = 10.0
"""A broker that confirms nothing for so long has a trouble; usual are milliseconds."""
OLD_SECONDS: Final = 60.0
"""A cancelled order's QR code can be paid meanwhile: nobody should wait so long in the real-time lane."""
SLOW_LANES: Final = {CANCELLATION: OLD_SECONDS, SWEEP: 3 * 3600.0}
"""A lane that needs longer than so many seconds to empty has a backlog; the alert QrisExpireBacklog has the same."""
THROTTLED_SHARE: Final = 0.05
"""As the alert QrisExpireThrottledOften."""
USED_UP: Final = 0.9
"""Beyond this share of the rate limit, the limit is what bounds the work."""
UNDATED_SHARE: Final = 0.01
"""As the alert QrisExpireCommandsUndated."""
REPEATED_SHARE: Final = 0.05
REPEATED_CALLS: Final = 5
"""Beyond both, repeated calls are worth a word: a single one on a quiet night is not."""


class Level(IntEnum):
    """How bad it is."""

    WELL = 0
    CAUTION = 1  # it works, and somebody should look
    WAITING = 2  # it does not work now, and will continue by itself
    TROUBLE = 3  # it does not work, and somebody must act


def is_fine(state: object) -> bool:
    """Whether a component of `/readyz` works: "ok", or "ok, but ..." where it has something to report."""
    return str(state).partition(",")[0] == "ok"


@dataclass(frozen=True, slots=True)
class Process:
    """A worker process and its components as `/readyz` has them: "ok", or what is wrong; `detail` when it is silent."""

    name: str
    components: Mapping[str, str]

    def wrong(self, component: str) -> str:
        """What is wrong with this component, "" when nothing is."""
        state = self.components.get(component, "ok")
        return "" if is_fine(state) else state


@dataclass(frozen=True, slots=True)
class Situation:
    """All there is to judge by. `change` reaches some seconds back; None until there was an earlier look."""

    now: Reading
    change: Change | None
    processes: Sequence[Process]

    def wrong(self, component: str) -> tuple[str, str]:
        """What is wrong with it in the first process that has it, and in how many of several: ("", "") when nothing."""
        found = [what for process in self.processes if (what := process.wrong(component))]
        some, total = len(found), len(self.processes)
        return (found[0], f" ({some} of {total} processes)" if some < total else "") if found else ("", "")

    def gained(self, name: str, **labels: str) -> float:
        """What a counter gained lately."""
        return self.change.value(name, **labels) if self.change else 0.0

    def gained_by(self, label: str, name: str) -> dict[str, float]:
        """The same for each value of one label."""
        return self.change.by(label, name) if self.change else {}

    def lately(self) -> str:
        """The time that `change` covers."""
        return f"in the last {duration(self.change.seconds)}" if self.change else ""

    @property
    def members(self) -> float:
        """How many times as much as these processes the whole fleet does, if all do alike."""
        return max(self.now.value("fleet_members") / len(self.processes), 1.0)

    @property
    def held(self) -> bool:
        """Whether something that is reported already keeps commands from being done."""
        components = ("breaker", "throttle", "consumer", "publisher", "drain")
        paused = self.now.value("consumption_paused", reason="operator") or self.now.value("member_sick")
        return bool(paused) or any(self.wrong(component)[0] for component in components)

    @property
    def throttled(self) -> float:
        """The share of the calls that the gateway answered with "too many requests" lately."""
        calls = self.gained("gateway_requests_total", operation="expire")
        return self.gained("retries_total", reason="throttled") / calls if calls else 0.0

    @property
    def limit_used(self) -> float:
        """The share of the fleet's rate limit that is used, if all members do alike; 0 without a limit."""
        limit = self.now.value("rate_limit")
        calls = self.change.rate("gateway_requests_total", operation="expire") if self.change else 0.0
        return self.members * calls / limit if limit else 0.0

    @property
    def in_hand(self) -> float:
        """Commands that senders hold."""
        return self.now.value("in_flight")

    @property
    def oldest(self) -> float:
        """When the oldest command in hand was published, of all lanes; 0 when that is unknown."""
        return min((at for at in self.now.by("lane", "oldest_command_timestamp_seconds").values() if at), default=0.0)

    @property
    def age(self) -> float:
        """Seconds since the start, of the process that has run longest."""
        return self.now.at - self.now.value("start_timestamp_seconds")


@dataclass(frozen=True, slots=True)
class Concern:
    """Something to know: `text` is a sentence (for CAUTION and WELL one that follows "Working, but"), `action` what to
    do. `key` stays the same while the concern does, whatever its figures."""

    level: Level
    key: str
    text: str
    action: str


@dataclass(frozen=True, slots=True)
class Condition(Concern):
    """The headline with its action, and what else there is to know."""

    others: Sequence[Concern] = ()


_well: Final = partial(Concern, Level.WELL)
_caution: Final = partial(Concern, Level.CAUTION)
_waiting: Final = partial(Concern, Level.WAITING)
_trouble: Final = partial(Concern, Level.TROUBLE)


def condition(situation: Situation) -> Condition:
    """The worst comes first; among equals the order of `RULES`, in which causes come before their effects."""
    concerns = [concern for rule in RULES if (concern := rule(situation)) is not None]
    concerns.sort(key=lambda concern: -concern.level)
    if not concerns or concerns[0].level is Level.WELL:
        text, key = _working(situation)
        return Condition(Level.WELL, key, text, "", concerns)
    first, *others = concerns
    text = first.text
    if first.level is Level.CAUTION:
        text = f"{_working(situation)[0].removesuffix('.')}. But {text[0].lower()}{text[1:]}"
    return Condition(first.level, first.key, text, first.action, others)


def kind_of(code: str) -> Kind | None:
    """What the worker makes of an answer with this code; None for a code that is not listed."""
    if code == NO_ANSWER:
        return Kind.TRANSIENT
    if not code.isdecimal():
        return None
    if code.startswith("200"):  # a token's success, too, which is no verdict on a command
        return Kind.DONE
    return judge(Reply(int(code[:3]), b'{"responseCode":"%s"}' % code.encode())).kind


def _working(situation: Situation) -> tuple[str, str]:
    change, in_hand = situation.change, situation.in_hand
    done = change.rate("outcomes_total") if change else 0.0
    if done:
        return f"Working: {rate(done)}{_waited(situation)}.", "working"
    if in_hand:
        quiet = f", none finished {situation.lately()}" if change else ""
        return f"Working: {plural(in_hand, 'command')} in hand{quiet}.", "working"
    last = situation.now.value("last_outcome_timestamp_seconds")
    if last:
        return f"Ready, nothing to do. Last outcome {duration(situation.now.at - last)} ago.", "ready"
    return f"Ready, nothing to do. No outcome yet since the start {duration(situation.age)} ago.", "ready"


def _waited(situation: Situation) -> str:
    if situation.oldest:
        return f", oldest command {duration(max(situation.now.at - situation.oldest, 0.0))}"
    ages = situation.change.histogram("command_age_seconds") if situation.change else None
    if ages is None or not ages.count:
        return ""
    # How long an undated command waited in the queue is unknown.
    since = "first delivery" if situation.gained("commands_undated_total") else "publication"
    longest = ages.buckets[-2][0] if len(ages.buckets) > 1 else math.inf
    return f", 95 % done within {quantile(ages.quantile(0.95), longest)} of their {since}"


# -- the rules: a concern, or None ------------------------------------------------------------------------------------


def _silent(situation: Situation) -> Concern | None:
    what, some = situation.wrong("detail")
    if not what or situation.now.value("consumption_paused", reason="draining"):
        return None
    young = not situation.now.value("start_timestamp_seconds") or situation.gained("process_restarts_total")
    if what == NO_ANSWER_YET and young:
        return _waiting("starting", f"Starting{some}.", "Wait some seconds.")
    # While others do the work, the headline is how they do it.
    return Concern(
        Level.CAUTION if some else Level.TROUBLE,
        "silent",
        f"A worker process does not work: {what}{some}." if some else f"No worker process works: {what}.",
        "It hangs or is overloaded; its log says more. What probes /livez restarts it."
        if what == NO_ANSWER_YET
        else "The log says why (process_died). It starts again within 30 s; what it held is back in the queue.",
    )


def _draining(situation: Situation) -> Concern | None:
    what, some = situation.wrong("drain")
    if not what:
        return None
    return _waiting(
        "draining",
        f"Draining{some}: takes nothing new, {plural(situation.in_hand, 'command')} in hand.",
        "Nothing: it ends by itself within WORKER_DRAIN_SECONDS, and what is not done goes back to its queue.",
    )


def _publisher(situation: Situation) -> Concern | None:
    what, some = situation.wrong("publisher")
    if what.startswith("blocked"):
        return _trouble(
            "broker_blocked",
            f"Paused: the broker is short of memory or disk and takes no messages{some}. Nothing is lost.",
            "On the broker: rabbitmq-diagnostics alarms; then free memory or disk. The worker goes on by itself.",
        )
    if not what or situation.wrong("consumer")[0]:
        return None
    return _trouble(
        "publisher",
        f"Outcomes cannot be published: {what}{some}. Commands stay in their queues; nothing is lost.",
        "Look at the broker: its alarms, its disks, the outcome exchange (qris-expire check).",
    )


def _disconnected(situation: Situation) -> Concern | None:
    what, some = situation.wrong("consumer")
    if not what:
        return None
    if situation.age < STARTING_SECONDS and not situation.now.value("last_outcome_timestamp_seconds"):
        return _waiting("starting", f"Starting: connecting to the broker{some}.", "Wait some seconds.")
    return _trouble(
        "disconnected",
        f"Not connected to the broker: {what}{some}. Commands wait in its queues; nothing is lost.",
        "Does the broker run, and is AMQP_URL right? qris-expire check tells. The worker connects by itself.",
    )


def _starting(situation: Situation) -> Concern | None:
    what, some = situation.wrong("start")
    if not what or situation.wrong("consumer")[0]:
        return None
    return _waiting(
        "starting",
        f"Starting: the first token is being asked for{some}.",
        "Wait for GATEWAY_READ_TIMEOUT_SECONDS at most; then the log says what the token service answered.",
    )


def _outage(situation: Situation) -> Concern | None:
    what, some = situation.wrong("breaker")
    if not what or situation.now.value("member_sick") >= len(situation.processes):
        return None
    left = situation.now.value("held_until_timestamp_seconds") - situation.now.at
    probe = f"probing again in {duration(left)}" if left >= 1 else "probing it now"
    code = _worst_code(situation)
    if code is not None and kind_of(code) is Kind.SYSTEMIC:
        return Concern(
            Level.TROUBLE,
            "refused",
            f"Paused{some}: the gateway refuses our credentials or set-up ({code}), {probe}. Nothing is lost.",
            "qris-expire check tells which setting to correct. It goes on when a probe succeeds.",
        )
    text = f"Paused{some}: the gateway is failing (breaker: {what}), {probe}. Nothing is lost."
    most = {None: "", NO_ANSWER: " Most failures: no answer, or one without a code."}.get(
        code, f" Most failures: {code}."
    )
    action = f"Nothing here: it goes on when a probe succeeds. If it lasts, call the gateway's provider.{most}"
    return _waiting("outage", text, action)


def _worst_code(situation: Situation) -> str | None:
    """The most frequent failure lately, else since the start; None without any."""
    calls = ("response_code", "gateway_requests_total")
    for by_code in (situation.gained_by(*calls), situation.now.by(*calls)):
        bad = {code: n for code, n in by_code.items() if n and (kind := kind_of(code)) is not None and kind.bad}
        if bad:
            return max(bad, key=bad.__getitem__)
    return None


def _throttled(situation: Situation) -> Concern | None:
    what, some = situation.wrong("throttle")
    if what:
        left = max(situation.now.value("held_until_timestamp_seconds") - situation.now.at, 0.0)
        return _waiting(
            "throttled",
            f'Paused{some}: the gateway answers "too many requests", going on in {duration(left)}. Nothing is lost.',
            "Nothing now. If it comes often, lower the limit: qris-expire fleet limit, "
            "GATEWAY_MAX_REQUESTS_PER_SECOND.",
        )
    if situation.throttled < THROTTLED_SHARE:
        return None
    return _caution(
        "throttled_often",
        f'The gateway answered {share(situation.throttled, 1)} of the calls with "too many requests" '
        f"{situation.lately()}.",
        "Lower the limit: qris-expire fleet limit, GATEWAY_MAX_REQUESTS_PER_SECOND. More workers make it worse.",
    )


def _fleet_lost(situation: Situation) -> Concern | None:
    what, some = situation.wrong("fleet")
    if situation.wrong("consumer")[0] or not what:
        return None
    if situation.age < STARTING_SECONDS:
        return _waiting("starting", f"Starting: joining the fleet{some}.", "Wait some seconds.")
    return Concern(
        Level.CAUTION if some else Level.TROUBLE,
        "fleet",
        f"Not in the fleet: {what}{some}. Commands stay in their queues; nothing is lost.",
        "Processes of a fleet speak through the broker: look at the log, and at qris-expire check.",
    )


def _operator(situation: Situation) -> Concern | None:
    if not situation.now.value("consumption_paused", reason="operator"):
        return None
    told = [process.components.get("operator", "ok").removeprefix("ok, ") for process in situation.processes]
    who = next((f" {what[0].upper()}{what[1:]}." for what in told if what != "ok"), "")
    action = f"To go on: qris-expire fleet resume.{who}"
    if situation.gained("outcomes_total"):
        return _caution("operator", "An operator has paused a part of the fleet.", action)
    return _waiting(
        "operator",
        "An operator has paused the fleet. Commands wait in their queues; nothing is lost.",
        action,
    )


def _sick(situation: Situation) -> Concern | None:
    sick, total = situation.now.value("member_sick"), len(situation.processes)
    if not sick:
        return None
    alone = sick >= total
    who = "This process fails" if total == 1 else "These processes fail" if alone else f"{number(sick)} of {total} "
    who += "" if alone else "processes fails" if sick == 1 else "processes fail"
    return Concern(
        Level.TROUBLE if alone else Level.CAUTION,
        "sick",
        f"{who} at the gateway while others of the fleet succeed. It has given its commands back, takes no others, and "
        "tests itself.",
        "Look at its way out: DNS, routes, egress rules, the node's clock. If it is the node, start it elsewhere.",
    )


def _backlog(situation: Situation) -> Concern | None:
    change = situation.change
    if change is None or situation.held:
        return None
    for lane, most in SLOW_LANES.items():
        waiting = situation.now.value("commands_waiting", lane=lane)
        per_second = situation.members * change.rate("outcomes_total", lane=lane)
        before = change.before("commands_waiting", lane=lane)
        if not waiting or waiting < most * per_second or not before:
            continue
        trend = "become more" if waiting > before else "become fewer"
        text = f"{plural(waiting, 'command')} wait in the lane {lane}"
        text += (
            f" and {trend}: about {duration(waiting / per_second)} at the present rate."
            if per_second
            else f", and none has ended {situation.lately()}."
        )
        return _caution("backlog", text, _more_work(situation))
    return None


def _more_work(situation: Situation) -> str:
    """What to do when more comes than ends."""
    if situation.limit_used >= USED_UP:
        return "The rate limit bounds the work: agree on a higher one with the provider. More workers do not help."
    if situation.held or situation.throttled >= THROTTLED_SHARE:
        return "Nothing here: the gateway asks for less or fails. More workers make it worse."
    return "Is the gateway slow (see below)? Else more WORKER_CONCURRENCY, processes or replicas."


def _at_the_limit(situation: Situation) -> Concern | None:
    limit = situation.now.value("rate_limit")
    if situation.limit_used < USED_UP or not situation.now.value("commands_waiting"):
        return None
    return _well(
        "limit",
        f"The fleet works at its rate limit of {rate(limit)}.",
        "More workers do not help. qris-expire fleet shows the limit and who set it.",
    )


def _undated(situation: Situation) -> Concern | None:
    undated, commands = situation.now.value("commands_undated_total"), situation.now.value("commands_total")
    if undated < UNDATED_SHARE * commands or not undated:
        return None
    return _well(
        "undated",
        f"{number(undated)} of {plural(commands, 'command')} since the start have no timestamp: their ages count from "
        "the first delivery.",
        "Ask the producer to set the property timestamp.",
    )


def _unconfirmed(situation: Situation) -> Concern | None:
    waiting = situation.now.value("publishes_unconfirmed")
    change = situation.change
    if not waiting or change is None or change.seconds < UNCONFIRMED_SECONDS:
        return None
    if change.value("publish_confirm_seconds_count") or situation.wrong("consumer")[0]:
        return None
    return _trouble(
        "unconfirmed",
        f"The broker takes outcomes but confirms none: {number(waiting)} wait. Nothing is lost.",
        "Look at the broker's disks and quorum: rabbitmq-diagnostics alarms, rabbitmq-queues quorum_status QUEUE.",
    )


def _stuck(situation: Situation) -> Concern | None:
    # Since the last outcome, but not longer than there was something to do: after an idle hour nobody is stuck.
    since = [situation.now.value(f"{event}_timestamp_seconds") for event in ("last_outcome", "start")]
    oldest = situation.oldest
    quiet = situation.now.at - max(*since, oldest) if oldest else 0.0
    if not situation.in_hand or situation.held or quiet < STUCK_SECONDS:
        return None
    if situation.change is None or situation.gained("commands_total") or situation.gained("delayed_retries_total"):
        return None
    return _trouble(
        "stuck",
        f"{plural(situation.in_hand, 'command')} in hand, but no outcome for {duration(quiet)}.",
        "Look at the gateway's times below and at the log. If calls neither end nor fail, restart the worker: "
        "nothing is lost.",
    )


def _no_token(situation: Situation) -> Concern | None:
    gains = situation.gained_by("result", "token_refreshes_total")
    failed = {result: gain for result, gain in gains.items() if gain and result != "ok"}
    if not failed or situation.now.value("token_expiry_timestamp_seconds") > situation.now.at:
        return None
    refused = failed.get("refused", 0) > 0
    return Concern(
        Level.TROUBLE if refused else Level.CAUTION,
        "token",
        "The gateway refuses us a token." if refused else "No token: the token service gives no proper answer.",
        "Run qris-expire check: client id, key or clock." if refused else "If it lasts, call the gateway's provider.",
    )


def _old(situation: Situation) -> Concern | None:
    oldest = situation.now.value("oldest_command_timestamp_seconds", lane="cancellation")
    age = situation.now.at - oldest if oldest else 0.0
    if age < OLD_SECONDS or situation.held:
        return None
    return _caution("old", f"The oldest cancellation in hand is {duration(age)} old.", _more_work(situation))


def _dying(situation: Situation) -> Concern | None:
    return _dead(situation.gained_by("reason", "dead_letters_total"), Level.CAUTION, situation.lately())


def _dead_before(situation: Situation) -> Concern | None:
    if situation.gained("dead_letters_total"):
        return None
    return _dead(situation.now.by("reason", "dead_letters_total"), Level.WELL, "since the start")


def _dead(by_reason: Mapping[str, float], level: Level, when: str) -> Concern | None:
    reasons = sorted(((n, reason) for reason, n in by_reason.items() if n), reverse=True)
    if not reasons:
        return None
    words = ", ".join(f"{number(n)} {reason}" for n, reason in reasons[:3])
    return Concern(
        level,
        "dead_letters",
        f"{plural(sum(by_reason.values()), 'dead letter')} {when}: {words}{', …' if len(reasons) > 3 else ''}.",
        "qris-expire dead list shows those that are still there; when the cause is repaired, qris-expire dead redrive.",
    )


def _repeated(situation: Situation) -> Concern | None:
    gains = situation.gained_by("reason", "retries_total")
    gains.pop("throttled", None)  # has a concern of its own
    calls, repeated = situation.gained("gateway_requests_total", operation="expire"), sum(gains.values())
    if situation.wrong("breaker")[0] or situation.wrong("throttle")[0]:
        return None  # why is said already
    if repeated < REPEATED_CALLS or repeated < REPEATED_SHARE * calls or not calls:
        return None
    most = max(gains, key=gains.__getitem__)
    return _caution(
        "repeated",
        f"{share(min(repeated, calls), calls)} of the calls are repeats, most of them {most}.",
        "See the gateway's answers below. Commands that keep failing wait in the broker for their next round.",
    )


def _skewed(situation: Situation) -> Concern | None:
    skew = situation.now.value("clock_skew_seconds")
    if abs(skew) <= SKEW_WORTH_A_WARNING:
        return None
    way = "ahead of" if skew > 0 else "behind"
    return _caution(
        "skew",
        f"This machine's clock is {duration(abs(skew))} {way} the gateway's.",
        "Repair the time service (NTP): signatures carry the time, and the gateway may refuse them.",
    )


def _restarted(situation: Situation) -> Concern | None:
    restarts, lately = situation.now.value("process_restarts_total"), situation.gained("process_restarts_total")
    if not restarts:
        return None
    count, when = (lately, situation.lately()) if lately else (restarts, "since the start")
    return Concern(
        Level.CAUTION if lately else Level.WELL,
        "restarted",
        f"Processes died and were started again {when}: {number(count)}.",
        "The log says why: process_died.",
    )


RULES: Final[Sequence[Callable[[Situation], Concern | None]]] = (
    _silent,
    _draining,
    _publisher,
    _disconnected,
    _starting,
    _sick,
    _fleet_lost,
    _operator,
    _outage,
    _throttled,
    _unconfirmed,
    _stuck,
    _no_token,
    _backlog,
    _old,
    _dying,
    _repeated,
    _skewed,
    _restarted,
    _dead_before,
    _at_the_limit,
    _undated,
)
