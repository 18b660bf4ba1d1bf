"""The demo without a broker: a file of bills, swept straight to the simulated gateway by the engine of the worker."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

from rich.console import Console

from worker.sandbox.broker import free_port
from worker.sandbox.demo import FAULTS, LONGEST, DemoError, environment_of, fact, seen_by_gateway
from worker.sandbox.simulator import Script, Simulator

MERCHANT: Final = "121000001"
REPORT: Final = "report.csv"


def run(size: int, console: Console) -> None:
    """All of it. Raises `DemoError`; leaves no process or file behind, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="qris-expire-demo-") as name, Simulator(Script.parse(FAULTS)) as simulator:
        directory = Path(name)
        bills = _bills(size)
        file = directory / "bills.csv"
        file.write_text("billnumber,merchantId\n" + "".join(f"{bill},{MERCHANT}\n" for bill in bills))
        fact(console, "broker", "none: this shows the engine without one; with a RabbitMQ, `demo` shows everything")
        fact(console, "gateway", f"simulated at {simulator.base_url}, with faults on one call in ten")
        fact(console, "bills", f"{size} in a file; now runs: qris-expire sweep bills.csv --direct --report {REPORT}")
        started = time.monotonic()
        code = _sweep(directory, simulator)
        took = time.monotonic() - started
        rows = _report(directory)
        counts = Counter((row["status"], row["reason"]) for row in rows)
        if code not in (0, 1) or len(rows) != size or any(not row["status"] for row in rows):
            raise DemoError(f"the sweep ended with exit code {code} and {len(rows)} of {size} rows in its report")
        fact(console, "gateway", seen_by_gateway(simulator))
        fact(console, "speed", f"{took:.1f} s in all")
        console.print("a line of the report, of a bill that needed more than one call:")
        retried = next((row for row in rows if row["status"] == "expired" and int(row["attempts"]) > 1), rows[0])
        for column in ("billnumber", "status", "reason", "responseCode", "attempts", "effectUnknown", "completedAt"):
            console.print(f"  {column:<14} {retried[column]}", highlight=False, markup=False)
        expired = sum(count for (status, _), count in counts.items() if status == "expired")
        console.print(f"the sweep ended: {size} bills, {sum(counts.values())} outcomes, {expired} of them expired.")


def _bills(size: int) -> list[str]:
    special: list[str] = list(FAULTS["bills"])  # type: ignore[call-overload]
    return special + [f"S{number:06d}" for number in range(size - len(special))]


def _sweep(directory: Path, simulator: Simulator) -> int:
    # A sweep joins the fleet of the broker that it finds; the demo must find none.
    nowhere = {"AMQP_URL": f"amqp://127.0.0.1:{free_port()}/"}
    command = [sys.executable, "-m", "worker", "sweep", "bills.csv", "--direct", "--report", REPORT]
    try:
        return subprocess.run(
            [*command, "--state-dir", "journals"],
            env=environment_of(simulator, directory, nowhere),
            cwd=directory,
            timeout=LONGEST,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        raise DemoError(f"the sweep did not end within {LONGEST:.0f} s") from None


def _report(directory: Path) -> list[dict[str, str]]:
    path = directory / REPORT
    if not path.exists():
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))
