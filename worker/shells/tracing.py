"""Spans for OpenTelemetry: each delivery, call and publication of a command whose producer samples its trace.

Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` is set and the extra `otel` is installed. The spans follow the conventions for
messaging (opentelemetry.io/docs/specs/semconv/messaging): the span of a delivery *links* to its producer's, and that of
a delayed round to the round's before, since nobody waits for either. A span has the status of an error only when the
command ended so: an attempt that is made again is no error.

The sampled bit is looked at before the library is: for a command that is not sampled, all of this costs one look at it.
Everything here belongs to the loop's thread.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from typing import Any, Final

import structlog

from worker.core.delivery import Delivery
from worker.core.ports import Attempt
from worker.core.settlement import Delay, Disposition, Report
from worker.core.trace import Trace

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
MOST_OPEN: Final = 20_000
"""Deliveries with a span at a time: more than a process holds, so that spans that never end do not add up."""

log = structlog.get_logger()


class Tracing:
    """The spans of one process. Without a tracer, every method does nothing."""

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer
        self._open: dict[int, Any] = {}  # by the trace object of a delivery, which its attempts carry, too

    def begin(self, delivery: Delivery) -> None:
        """A command was delivered."""
        trace = delivery.trace
        if self._tracer is None or trace is None or not trace.sampled or len(self._open) >= MOST_OPEN:
            return
        from opentelemetry.trace import SpanKind

        links = [_link(trace), *([_link(delivery.progress.trace)] if delivery.progress.trace else [])]
        span = self._open[id(trace)] = self._tracer.start_span(
            f"process {delivery.lane}",
            kind=SpanKind.CONSUMER,
            links=links,
            attributes={
                **_MESSAGING,
                "messaging.operation.type": "process",
                "messaging.operation.name": "process",
                "messaging.destination.name": delivery.lane,
                "messaging.message.id": delivery.command_id,
                "qris.round": delivery.progress.round,
            },
        )
        context = span.get_span_context()
        delivery.progress.trace = Trace(f"{context.trace_id:032x}", f"{context.span_id:016x}", sampled=True)

    def attempted(self, attempt: Attempt) -> None:
        """An expire call has ended, or there was no token for it."""
        trace = attempt.delivery.trace
        if id(trace) not in self._open or attempt.external_id is None:
            return
        attributes = {
            "http.request.method": "POST",
            "qris.attempt": attempt.number,
            "qris.external_id": attempt.external_id,
            "qris.verdict": attempt.verdict.kind.label,
            "qris.response_code": attempt.verdict.code or "",
        }
        if attempt.status is not None:
            attributes["http.response.status_code"] = attempt.status
        self._ended_now(trace, "expire", "CLIENT", attempt.seconds, attributes)

    def published(self, delivery: Delivery, exchange: str, routing_key: str, message_id: str, seconds: float) -> None:
        """The broker has confirmed what was published for a command, after so many seconds."""
        if id(delivery.trace) not in self._open:
            return
        destination = exchange or routing_key
        attributes = {
            **_MESSAGING,
            "messaging.operation.type": "send",
            "messaging.operation.name": "publish",
            "messaging.destination.name": destination,
            "messaging.rabbitmq.destination.routing_key": routing_key,
            "messaging.message.id": message_id,
        }
        self._ended_now(delivery.trace, f"publish {destination}", "PRODUCER", seconds, attributes)

    def end(self, delivery: Delivery, disposition: Disposition) -> None:
        """The command has left this process."""
        span = self._open.pop(id(delivery.trace), None)
        if span is None:
            return
        match disposition:
            case Report(outcome):
                span.set_attributes({"qris.status": outcome.status, "qris.reason": outcome.reason})
                if outcome.dead_lettered:
                    from opentelemetry.trace import Status, StatusCode

                    span.set_attribute("error.type", str(outcome.reason))
                    span.set_status(Status(StatusCode.ERROR, str(outcome.reason)))
            case Delay(wait, _):
                span.set_attribute("qris.delayed_seconds", wait)
            case _:
                span.set_attribute("qris.status", "returned")
        span.end()

    def _ended_now(
        self, trace: Trace | None, name: str, kind: str, seconds: float, attributes: Mapping[str, Any]
    ) -> None:
        """A span that ends now, in that of the delivery with this trace."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        now = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(self._open[id(trace)]),
            kind=SpanKind[kind],
            start_time=now - int(seconds * 1e9),
            attributes=attributes,
        )
        span.end(now)


_MESSAGING: Final = {"messaging.system": "rabbitmq"}


def _link(trace: Trace) -> Any:
    from opentelemetry.trace import Link, SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    return Link(SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), is_remote=True, trace_flags=flags))


def from_environment(version: str, environ: Mapping[str, str] = os.environ) -> Tracing:
    """Tracing as the standard variables of OpenTelemetry configure it; nothing without an endpoint."""
    wanted = any(environ.get(name) for name in ENDPOINTS) and environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
    if not wanted:
        return Tracing()
    if not all(importlib.util.find_spec(name) for name in ("opentelemetry", "opentelemetry.sdk")):
        log.warning("tracing.unavailable", action="install the extra: pip install 'qris-expire-worker[otel]'")
        return Tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": environ.get("OTEL_SERVICE_NAME") or "qris-expire-worker"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer("qris-expire-worker", version))
