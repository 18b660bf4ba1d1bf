"""What operators see: one wide log line and the counters of every attempt, and a line for the end of each command."""

from __future__ import annotations

import logging
import time
from typing import Any, Final, assert_never

import structlog

from worker.core.delivery import Delivery
from worker.core.diagnosis import SKEW_WORTH_A_WARNING
from worker.core.ports import Attempt
from worker.core.settlement import Crashed, Delay, Disposition, GiveBack, Hold, Report, TakenBack
from worker.core.verdict import Kind, Verdict
from worker.shells.metrics import Metrics
from worker.shells.tracing import Tracing

_SKEW_EVERY: Final = 60.0


def tell_fate(log: Any, delivery: Delivery, disposition: Disposition, seconds: float | None = None) -> None:
    """One line for each way out of this process that a command has: an outcome, a dead letter beside it, a delayed
    round, or back to the broker. ``seconds``: from the delivery to its ack."""
    attempts = delivery.progress.attempts
    match disposition:
        case Report(outcome):
            dead_lettered = outcome.dead_lettered
            (log.warning if dead_lettered else log.info)(
                "command.ended",
                command_id=delivery.command_id,  # one by one: to unpack a dictionary here costs a fifth of the line
                trace_id=delivery.trace_id,
                lane=delivery.lane,
                batch_id=delivery.batch_id,
                billnumber=outcome.billnumber,
                status=outcome.status,
                reason=outcome.reason,
                attempts=outcome.attempts,
                dead_lettered=dead_lettered,
                response_code=outcome.response_code,
                response_message=outcome.response_message,
                detail=outcome.detail,
                effect_unknown=outcome.effect_unknown,
                external_ids=outcome.external_ids,
                seconds=None if seconds is None else round(seconds, 4),
            )
        case Delay(wait, round_):
            about = _about(delivery)
            log.info("command.delayed", **about, attempts=attempts, round=round_, seconds_until_retry=wait)
        case GiveBack():
            log.info("command.returned", **_about(delivery), attempts=attempts)
        case TakenBack():
            log.info("command.taken_back", **_about(delivery), attempts=attempts, reason="its connection was lost")
        case Hold() | Crashed():
            pass  # it stays here; or its traceback was logged
        case _:
            assert_never(disposition)


def _about(delivery: Delivery) -> dict[str, str | None]:
    return {
        "command_id": delivery.command_id,
        "trace_id": delivery.trace_id,
        "lane": delivery.lane,
        "batch_id": delivery.batch_id,
    }


class Telemetry:
    """Metrics and logs of what senders see."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing or Tracing()
        self._log = structlog.get_logger().bind()  # bound once: the lazy proxy would bind at every line
        self._skew_told = float("-inf")

    def attempted(self, attempt: Attempt) -> None:
        """See `Observer`."""
        verdict, delivery = attempt.verdict, attempt.delivery
        if delivery.trace is not None:
            self._tracing.attempted(attempt)
        if attempt.external_id is not None:
            self._metrics.request("expire", verdict.code or "", attempt.seconds)
        log = self._log.error if verdict.kind is Kind.SYSTEMIC else self._log.info
        if verdict.kind.final:  # the command ends with it, and that line says all of this
            if not self._log.is_enabled_for(logging.DEBUG):
                return
            log = self._log.debug
        log(
            "attempt",
            command_id=delivery.command_id,
            trace_id=delivery.trace_id,
            lane=delivery.lane,
            billnumber=attempt.command.billnumber,
            batch_id=delivery.batch_id,
            attempt=attempt.number,
            external_id=attempt.external_id,
            verdict=verdict.kind.label,
            response_code=verdict.code,
            message=verdict.message,
            http_status=attempt.status,
            effect_unknown=verdict.effect_unknown,
            note=verdict.note,
            seconds=round(attempt.seconds, 4),
        )

    def retrying(self, verdict: Verdict) -> None:
        """See `Observer`."""
        self._metrics.retry(verdict.kind.label)

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """One exchange with the token service."""
        self._metrics.request(operation, response_code, seconds)

    def clock_skew(self, seconds: float) -> None:
        """How far our clock is ahead of the gateway's."""
        self._metrics.clock_skew(seconds)
        now = time.monotonic()
        if abs(seconds) > SKEW_WORTH_A_WARNING and now - self._skew_told > _SKEW_EVERY:
            self._skew_told = now
            self._log.warning(
                "clock.skewed",
                seconds=round(seconds, 1),
                action="set this machine's clock (NTP); signatures carry its time",
            )

    def token_refresh(self, result: str) -> None:
        """A token request ended."""
        self._metrics.token_refresh(result)
        (self._log.info if result == "ok" else self._log.error)("token.refresh", result=result)

    def token_expiry(self, timestamp: float) -> None:
        """The token in use is good until then."""
        self._metrics.token_expiry(timestamp)
