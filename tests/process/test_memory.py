"""Nothing grows with the number of commands."""

import re
from pathlib import Path

import pytest

from tests.worker_process import WorkerProcess, working
from worker.core.settlement import REMEMBERED
from worker.sandbox.simulator import Simulator

FLAT_MIB = 6.0
"""What allocation may scatter. A list of commands would take more: 40,000 deliveries are some 60 MiB."""


def _resident_mib(worker: WorkerProcess) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{worker.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_is_flat(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Once the memory of settled commands is full, twice as many commands again take no more."""

    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="32", LOG_LEVEL="warning") as (
            worker,
            producer,
        ),
    ):
        producer.publish_many((f"a{number}" for number in range(REMEMBERED)), sweep_every=4, of=5)
        producer.collect_all(120)
        before = _resident_mib(worker)
        producer.publish_many((f"b{number}" for number in range(2 * REMEMBERED)), sweep_every=4, of=5)
        producer.collect_all(200)

        assert _resident_mib(worker) - before < FLAT_MIB
