"""Spans as a collector gets them from a real worker, and the trace in every line of a command's log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests import builders
from tests.waiting import wait_until
from tests.worker_process import working
from worker.core.command import Command
from worker.core.ports import Attempt
from worker.core.settlement import GiveBack
from worker.core.trace import Trace, read
from worker.core.verdict import NoReply, judge
from worker.sandbox.simulator import Script, Simulator
from worker.shells.tracing import Tracing, from_environment

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
FAULTS: dict[str, Any] = {
    "patterns": [
        {"match": "^twice", "faults": [{"code": "5009300"}]},
        {"match": "^never", "faults": [{"code": "5009300", "repeat": True}]},
    ]
}


class Collector:
    """What came in by OTLP over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.spans: list[Span] = []

    def of(self, kind: Span.SpanKind.ValueType) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]


@contextmanager
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    found.spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def link_ids(span: Span) -> list[tuple[str, str]]:
    return [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_spans_of_a_command(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Deliveries link to their producer and to the round before; calls and publications are their children; only what
    ends badly has the status of an error; an unsampled command has no spans; every line of the log has its trace."""

    with (
        collector() as found,
        Simulator(Script.parse(FAULTS)) as gateway,
        working(
            amqp_url, prefix, gateway, tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{found.port}", OTEL_BSP_SCHEDULE_DELAY="200",
            RETRY_MAX_ATTEMPTS="2", RETRY_DELAYS_SECONDS="1", BREAKER_FAILURES="1000",
        ) as (worker, producer),
    ):  # fmt: skip
        producer.publish("unsampled-1", headers={"traceparent": UNSAMPLED})
        producer.publish("twice-1", headers={"traceparent": SAMPLED})
        producer.collect_all(60)
        wait_until(lambda: found.of(Span.SPAN_KIND_CONSUMER), 30, "the span of the delivery")
        (delivery,) = found.of(Span.SPAN_KIND_CONSUMER)
        _, trace_id, span_id, _ = SAMPLED.split("-")
        assert link_ids(delivery) == [(trace_id, span_id)]
        assert delivery.status.code == Status.STATUS_CODE_UNSET
        assert attributes(delivery)["messaging.system"] == "rabbitmq"
        assert attributes(delivery)["qris.status"] == "expired"
        calls, publications = found.of(Span.SPAN_KIND_CLIENT), found.of(Span.SPAN_KIND_PRODUCER)
        assert [attributes(call)["qris.verdict"] for call in calls] == ["transient", "done"]
        assert [attributes(each)["messaging.destination.name"] for each in publications] == [f"{prefix}.outcomes"]
        for child in (*calls, *publications):
            assert (child.trace_id, child.parent_span_id) == (delivery.trace_id, delivery.span_id)
            assert child.status.code == Status.STATUS_CODE_UNSET

        producer.publish("never-1", headers={"traceparent": SAMPLED})
        producer.collect_all(60)
        wait_until(lambda: len(found.of(Span.SPAN_KIND_CONSUMER)) == 3, 30, "the spans of both rounds")
        first, second = sorted(found.of(Span.SPAN_KIND_CONSUMER), key=lambda span: span.start_time_unix_nano)[1:]
        assert link_ids(second) == [(trace_id, span_id), (first.trace_id.hex(), first.span_id.hex())]
        assert [first.status.code, second.status.code] == [Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR]

        lines = [line for line in worker.events() if "command_id" in line]
        assert {line["trace_id"] for line in lines} == {SAMPLED.split("-")[1], UNSAMPLED.split("-")[1]}


class Untouchable:
    """A tracer that nobody may ask for anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize("headers", [{}, {"traceparent": UNSAMPLED}, {"traceparent": "nonsense"}])
def test_an_unsampled_command_does_not_touch_the_library(headers: dict[str, str]) -> None:
    """The sampled bit is looked at first: nothing of the library is called for a command that nobody samples."""

    tracing, delivery = Tracing(Untouchable()), builders.delivery(headers=headers)
    tracing.begin(delivery)
    attempt = Attempt(delivery, Command("1", "2"), 1, "9", judge(NoReply(sent=True, error="x")), None, 0.1)
    tracing.attempted(attempt)
    tracing.published(delivery, "outcomes", "sweep.expired", "m", 0.1)
    tracing.end(delivery, GiveBack())


def test_no_endpoint_no_tracing() -> None:
    """Without an endpoint, or with the SDK switched off, nothing is recorded."""

    for environ in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}):
        tracing, delivery = from_environment("1", environ), builders.delivery(headers={"traceparent": SAMPLED})
        tracing.begin(delivery)
        assert delivery.progress.trace is None


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (SAMPLED, Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)),
        (UNSAMPLED, Trace("1af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=False)),
        (SAMPLED.encode(), Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)),
        (f"cc{SAMPLED[2:]}-more", Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)),
        (SAMPLED.upper(), None),
        (SAMPLED.replace("00-", "ff-", 1), None),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", None),
        ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01", None),
        (SAMPLED[:-1], None),
        ("", None),
        (7, None),
        (None, None),
    ],
)  # fmt: skip
def test_traceparent(header: object, trace: Trace | None) -> None:
    """A traceparent is read as the standard has it, and what is none is no trace."""

    assert read(header) == trace
