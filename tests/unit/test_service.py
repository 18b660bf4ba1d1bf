"""One worker process as it is wired, without a broker: what becomes of a command in a sender's hands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import builders
from worker.core.breaker import State
from worker.core.settlement import Entry
from worker.core.verdict import Kind, Verdict
from worker.sandbox.simulator import Simulator
from worker.service import Worker
from worker.settings import load

FAILED = Verdict(Kind.TRANSIENT, None, True, None, "")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """One that was not started, whose breaker opens at the first failure and wants a probe at once."""
    environ = Simulator(port=1).environment(tmp_path / "key.pem")
    impatient = {"BREAKER_FAILURES": "1", "BREAKER_COOLDOWN_SECONDS": "0.001"}
    made = Worker(load(environ=environ | impatient, env_file=None))
    yield made
    made.calls.fibers.close()


def test_a_probe_that_the_broker_takes_back_is_followed_by_another(worker: Worker) -> None:
    """Its connection went before the sender began: nothing was sent, so the gateway is still to be tested."""
    taken_back = builders.delivery()
    taken_back.entry = Entry(taken_back.key)
    worker.gate.record(FAILED, probe=False)
    worker.gate.probing()

    assert worker.work(taken_back, probe=True) is False
    assert worker.gate.holds().breaker is State.OPEN
    assert worker.gate.probe_due()
