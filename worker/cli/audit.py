"""Who moved or deleted dead letters, as one line of JSON on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from worker.core import jakarta
from worker.core.dead_letter import Filter
from worker.shells import operator

if TYPE_CHECKING:
    from worker.app.dead_letters import Order, Report


@contextmanager
def audit(event: str, chosen: Filter, facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """One line on standard error when it ends, however it ends: who, what, how much, from when to when."""
    import socket

    from worker.shells.logs import json_line

    began = time.time()
    failure = ""
    try:
        yield
    except BaseException as error:
        failure = " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        line: dict[str, Any] = {
            "event": event,
            "user": operator.user(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": jakarta.iso(began),
            "ended": jakarta.iso(time.time()),
            "filters": chosen.as_json(),
            **facts(),
        }
        if failure:
            line |= {"result": "failed", "error": failure}
        print(json_line("error" if failure else "info", line), file=sys.stderr, flush=True)


def redrive_facts(report: Report, order: Order) -> dict[str, Any]:
    """What was asked for and what came of it."""
    settings = {
        "limit": order.limit,
        "rate": order.rate or None,
        "canary": order.canary or None,
        "stopAtFailures": order.stop_at_failures,
    }
    return {
        **{name: value for name, value in settings.items() if value is not None},
        "there": report.there,
        "seen": report.seen,
        "matching": report.matching,
        "redriven": report.redriven,
        "noWayBack": report.without_lane,
        "outcomes": {f"{status}/{reason}": count for (status, reason), count in sorted(report.outcomes.items())},
        "result": report.ended.value,
    }
