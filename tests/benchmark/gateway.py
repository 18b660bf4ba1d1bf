"""The simulated gateway in a process of its own. It checks every signature, token and external id.

It costs about 0.1 ms of another core for each call, the same for every contender, and counts for none of them.
"""

import json
import shlex
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.benchmark.contenders import BenchmarkError, Process
from tests.waiting import wait_until

START_SECONDS: Final = 30.0


class Gateway:
    """One that serves; `settings` make a worker talk to it."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.settings = settings
        self._root = "http://" + urlsplit(settings["GATEWAY_BASE_URL"]).netloc

    def check(self) -> None:
        """BenchmarkError if it had to refuse anybody: then somebody did not do the job."""
        with urllib.request.urlopen(f"{self._root}/_simulator/report", timeout=30) as answer:
            report = json.load(answer)
        if wrong := {name: report[name] for name in ("signature_failures", "duplicates") if report[name]}:
            raise BenchmarkError(f"the gateway refused calls: {wrong}")


@contextmanager
def serving(latency: float, directory: Path) -> Iterator[Gateway]:
    """A new one, which takes `latency` seconds to answer; it is gone afterwards."""
    argv = [sys.executable, "-m", "worker", "simulator", "--port", "0", "--latency", str(latency)]
    with Process("gateway", argv, {}, directory) as process:

        def ready() -> bool:
            process.check()
            return "# ready" in process.output()

        wait_until(ready, START_SECONDS, "the simulated gateway serves")
        yield Gateway(_settings(process.output()))


def _settings(output: str) -> dict[str, str]:
    """The lines `export NAME=value` that it prints."""
    words = (shlex.split(line) for line in output.splitlines() if line.startswith("export "))
    return dict(word[1].partition("=")[::2] for word in words)
