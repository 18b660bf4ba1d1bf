"""The tour of the first hour, command by command, as a newcomer types it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.readme import ROOT
from tests.waiting import wait_until
from worker.sandbox.broker import free_port

TEXT = (ROOT / "worker" / "manual" / "first-hour.md").read_text()
SECONDS = 60.0


def steps() -> Iterator[tuple[str, str]]:
    """Every command, and what it prints: `…` stands for anything."""
    for block in re.findall(r"(?:^    .*\n)+", TEXT, re.MULTILINE):
        command, shown = "", ""
        for line in [*block.splitlines(), "    $ "]:
            if line.startswith("    $ "):
                if command:
                    yield command, shown
                command, shown = line.removeprefix("    $ "), ""
            else:
                shown += line.strip() + "\n"


def pattern(shown: str) -> re.Pattern[str]:
    """What matches the page's text of an output, whatever the width of its columns."""
    words = [re.escape(word).replace("…", ".*") for word in shown.split()]
    return re.compile(r"\s*".join(words) + r"\s*", re.DOTALL)


class Terminals:
    """What the three terminals have in common: a directory and an environment."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.environment = dict(environment)

    @contextmanager
    def background(self, command: str) -> Iterator[Path]:
        """A program that runs on; the file with what it prints."""
        output = self.directory / f"{command.split()[1]}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(command.split(), env=self.environment, cwd=self.directory, stdout=file)
        try:
            yield output
            process.terminate()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
            process.wait()

    def read(self, output: Path, expected: re.Pattern[str]) -> None:
        """Until a program in the background has printed it all."""
        wait_until(lambda: expected.fullmatch(output.read_text()), SECONDS, output.name)

    def look(self, command: str, expected: re.Pattern[str]) -> None:
        """Until a command that changes nothing, or the same each time, prints it."""
        wait_until(lambda: expected.fullmatch(self.run(command)), SECONDS, command)

    def run(self, command: str) -> str:
        """What one command prints."""
        done = subprocess.run(
            ["bash", "-c", command],
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.stdout


def test_the_first_hour(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Each command of the tour prints what the page shows."""
    gateway, metrics = str(free_port()), str(free_port())
    terminals = Terminals(
        tmp_path,
        {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "AMQP_URL": amqp_url,
            "AMQP_PREFIX": prefix,
            "RETRY_DELAYS_SECONDS": "none",
            "BREAKER_COOLDOWN_SECONDS": "3",
            "BREAKER_MAX_COOLDOWN_SECONDS": "3",
            "METRICS_PORT": metrics,
        },
    )

    def ours(text: str) -> str:
        return text.replace("8093", gateway).replace("9108", metrics).replace("under trial", f"under {prefix}")

    with ExitStack() as stack:
        for command, shown in steps():
            expected = pattern(ours(shown).replace("trial.dead", f"{prefix}.dead"))
            match ours(command):
                case "qris-expire simulator":
                    output = stack.enter_context(terminals.background(f"qris-expire simulator --port {gateway}"))
                    terminals.read(output, expected)
                    terminals.environment |= dict(re.findall(r"^export (\w+)=(.+)$", output.read_text(), re.MULTILINE))
                case "qris-expire run":
                    stack.enter_context(terminals.background("qris-expire run"))
                    terminals.look(f"curl -s localhost:{metrics}/readyz", pattern('{"status": "ok", …}'))
                case curl if curl.startswith("curl"):
                    terminals.look(curl, expected)
                case other:
                    printed = terminals.run(other)
                    assert expected.fullmatch(printed), f"{command}\n{printed}\nthe page:\n{shown}"
