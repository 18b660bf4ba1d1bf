"""The first thing that a stranger runs."""

import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

from tests.rabbit import Rabbit

ROOT = Path(__file__).parents[2]


def test_the_demo_adds_up_and_leaves_nothing(amqp_url: str, tmp_path: Path) -> None:
    """From a checkout that is not installed, it ends by itself with an outcome for each command, and saves all."""

    saved = tmp_path / "messages.jsonl"
    # The interpreter below this environment's, and its packages by path: an editable install is not seen that way.
    environment = {"PATH": os.environ["PATH"], "AMQP_URL": amqp_url, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    done = subprocess.run(
        [Path(sys.base_prefix) / "bin" / "python3", "-m", "worker", "demo", "--commands", "60", "--save", saved],
        cwd=ROOT,
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "60 commands, 60 outcomes" in done.stdout
    assert "metrics at http" in done.stdout  # no line is broken where nobody reads by columns
    assert list(tmp_path.iterdir()) == [saved]
    messages = [json.loads(line) for line in saved.read_text().splitlines()]
    assert Counter(message["kind"] for message in messages) == {"command": 60, "outcome": 60, "dead letter": 4}
    ids = {
        kind: {m["properties"]["message_id"] for m in messages if m["kind"] == kind}
        for kind in ("command", "dead letter")
    }
    assert ids["dead letter"] < ids["command"]
    with Rabbit(amqp_url) as rabbit:
        prefix = next(word for word in done.stdout.split() if word.startswith("demo.")).rstrip(",")
        assert not rabbit.has_queue(f"{prefix}.sweep")
