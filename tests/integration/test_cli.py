"""The command line as people and scripts see it: output, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import PrivateBroker
from tests.rabbit import Rabbit
from tests.waiting import wait_until
from worker.cli import COMMANDS
from worker.core.topology import Names, topology
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.session import BrokerError, connect, parameters, verify

ROOT = Path(__file__).parents[2]

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `qris-expire` in an empty directory and an environment of its own."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            env=surroundings(environ),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def broker(amqp_url: str, prefix: str) -> dict[str, str]:
    """Settings for a topology of this test's own, which is not declared yet."""
    return {"AMQP_URL": amqp_url, "AMQP_PREFIX": prefix, "RETRY_DELAYS_SECONDS": "1,2"}


@pytest.fixture
def declared(cli: Cli, broker: dict[str, str]) -> dict[str, str]:
    """The same, declared."""
    assert cli("topology", "--apply", **broker).returncode == 0
    return broker


def surroundings(environ: dict[str, str]) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environ}


def at(url: str) -> AmqpSettings:
    return AmqpSettings(url=Secret(url))


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


# --- help


HEAVY = {"cryptography", "greenlet", "pika", "prometheus_client", "requests", "rich", "structlog"}
"""Packages that take longer to import than all that `--help` needs."""


def imported(tmp_path: Path, *arguments: str, **environ: str) -> set[str]:
    """The packages that a command line imports; it must end with 0."""
    script = (
        f"import runpy, sys; sys.argv[1:] = {list(arguments)}\n"
        "try: runpy.run_module('worker', run_name='__main__')\n"
        "finally: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=surroundings(environ),
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["publish", "--help"], ["run", "--help-settings"], ["--version"]])
def test_help_imports_little(tmp_path: Path, arguments: list[str]) -> None:
    """Help imports nothing that is heavy, so that it comes at once."""

    packages = imported(tmp_path, *arguments)

    assert "argparse" in packages
    assert HEAVY.isdisjoint(packages)


def test_publish_imports_little(tmp_path: Path, declared: dict[str, str]) -> None:
    """A command that people and scripts call again and again imports the client of the broker, and no more."""

    packages = imported(tmp_path, "publish", "1", **declared)

    assert "pika" in packages
    assert (HEAVY - {"pika"}).isdisjoint(packages)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_names_its_settings(cli: Cli, command: str) -> None:
    """`--help` of a command that reads settings ends with their names; `--help-settings` explains each."""

    help_, explained = cli(command, "--help"), cli(command, "--help-settings")

    assert (help_.returncode, explained.returncode) == (0, 0), help_.stderr + explained.stderr
    assert all(f" {beginning}" in help_.stdout for beginning in COMMANDS[command])
    assert all(f"\n  {beginning}" in explained.stdout for beginning in COMMANDS[command])


def test_version(cli: Cli) -> None:
    """`--version` names the program and its version."""

    assert cli("--version").stdout.startswith("qris-expire ")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["publish"], ["publish", "1", "--nonsense"], ["publish", "1", "--lane", "x"]]
)
def test_wrong_usage_is_one_line(cli: Cli, arguments: list[str]) -> None:
    """Wrong usage is one line with the help to read; exit code 2."""

    done = cli(*arguments)

    assert done.returncode == 2
    assert "--help" in only_line(done.stderr)


# --- topology


def test_topology_prints_every_name(cli: Cli) -> None:
    """Without an option it prints lines, of which a narrow terminal cuts nothing, and speaks to nobody."""

    done = cli("topology", AMQP_URL="amqp://127.0.0.1:1", RETRY_DELAYS_SECONDS="7")

    assert done.returncode == 0, done.stderr
    assert "queue     qris.expire.sweep.retry.7  quorum\n" in done.stdout
    assert "          x-delivery-limit=50\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_topology_exports_definitions(cli: Cli) -> None:
    """`--definitions` prints JSON for the virtual host of the URL."""

    done = cli("topology", "--definitions", AMQP_URL="amqp://u:p@127.0.0.1:1/payments")

    exported = json.loads(done.stdout)
    assert {each["vhost"] for each in exported["queues"]} == {"payments"}


def test_apply_twice_changes_nothing(cli: Cli, broker: dict[str, str]) -> None:
    """`--apply` declares everything, and again without complaint."""

    wanted = topology(broker["AMQP_PREFIX"], "quorum", (1, 2))
    with connect(at(broker["AMQP_URL"])) as connection:
        assert len(verify(connection, wanted)) == len(wanted.exchanges) + len(wanted.queues)

    assert cli("topology", "--apply", **broker).returncode == 0
    again = cli("topology", "--apply", **broker)

    assert (again.returncode, again.stderr) == (0, "")
    with connect(at(broker["AMQP_URL"])) as connection:
        assert verify(connection, wanted) == []


def test_classic_topology_can_be_declared(cli: Cli, broker: dict[str, str]) -> None:
    """`AMQP_QUEUE_TYPE=classic` is taken by the broker as well."""

    done = cli("topology", "--apply", **broker, AMQP_QUEUE_TYPE="classic")

    assert (done.returncode, done.stderr) == (0, "")


def test_queue_of_another_type_is_named(cli: Cli, declared: dict[str, str]) -> None:
    """Queues that exist otherwise are all named, with what differs and what to do; nothing is deleted."""

    done = cli("topology", "--apply", **declared, AMQP_QUEUE_TYPE="classic")

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == len(topology(declared["AMQP_PREFIX"], "quorum", (1, 2)).queues)
    assert f"queue {declared['AMQP_PREFIX']}.dead exists with x-queue-type quorum instead of classic" in (done.stderr)


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_delayed_command_returns_to_its_lane(cli: Cli, broker: dict[str, str], queue_type: str) -> None:
    """What waits in a retry queue comes back to the lane after its delay."""

    assert cli("topology", "--apply", **broker, AMQP_QUEUE_TYPE=queue_type).returncode == 0
    names = Names(broker["AMQP_PREFIX"])

    with Rabbit(broker["AMQP_URL"]) as rabbit:
        began = time.monotonic()
        rabbit.publish("", names.retry("sweep", 1), b"late")
        ((_, body),) = rabbit.get_all(names.queue("sweep"), 1, timeout=30)

    assert body == b"late"
    assert time.monotonic() - began >= 0.9


def test_outcome_that_nobody_asked_for_is_kept(declared: dict[str, str]) -> None:
    """The alternate exchange leads outcomes without a reader to their queue."""

    names = Names(declared["AMQP_PREFIX"])

    with Rabbit(declared["AMQP_URL"]) as rabbit:
        rabbit.publish(names.outcomes, "sweep.expired", b"{}")
        assert rabbit.get_all(names.unrouted, 1, timeout=30)[0][1] == b"{}"


# --- contract


def test_contract_prints_what_is_shipped(cli: Cli) -> None:
    """Each document is the package's own file; AsyncAPI comes unless another one is asked for."""

    for arguments, name in (([], "asyncapi"), (["command"], "command.schema"), (["outcome"], "outcome.schema")):
        done = cli("contract", *arguments)

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (ROOT / "worker" / "contract" / f"{name}.json").read_text()


def test_contract_has_the_names_of_the_prefix(cli: Cli) -> None:
    """Exchanges and queues are those of AMQP_PREFIX."""

    channels = json.loads(cli("contract", AMQP_PREFIX="shop.expire").stdout)["channels"]

    assert channels["commands"]["bindings"]["amqp"]["exchange"]["name"] == "shop.expire.commands"
    assert channels["deadLetters"]["address"] == "shop.expire.dead"


def test_contract_is_written(cli: Cli, tmp_path: Path) -> None:
    """`--output` writes all three; a place that cannot be written is reported."""

    done = cli("contract", "--output", "documents")
    (tmp_path / "file").touch()
    refused = cli("contract", "--output", "file/below")

    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "documents").iterdir()} == {
        "asyncapi.json",
        "command.schema.json",
        "outcome.schema.json",
    }
    assert refused.returncode == 1
    assert "give another --output" in only_line(refused.stderr)


# --- broker


def test_refused_login_is_told_without_the_password(cli: Cli, amqp_url: str) -> None:
    """A wrong password is reported with address and user, never with the password."""

    (params,) = parameters(at(amqp_url))
    url = f"amqp://guest:hunter2@{params.host}:{params.port}/"

    done = cli("publish", "1", AMQP_URL=url)

    assert done.returncode == 1
    assert f"{params.host}:{params.port} refuses the login of 'guest'" in only_line(done.stderr)
    assert "hunter2" not in done.stderr


def test_missing_virtual_host_is_told(cli: Cli, amqp_url: str) -> None:
    """A virtual host that does not exist is reported by its name."""

    done = cli("publish", "1", AMQP_URL=f"{amqp_url.rpartition('/')[0]}/nowhere")

    assert done.returncode == 1
    assert "virtual host 'nowhere'" in only_line(done.stderr)


def test_absent_broker_is_told(cli: Cli) -> None:
    """Every node that was tried is named with the reason."""

    done = cli("topology", "--apply", AMQP_URL="amqp://127.0.0.1:1,amqp://127.0.0.1:2")

    assert done.returncode == 1
    assert "127.0.0.1:1 (Connection refused), 127.0.0.1:2 (Connection refused)" in only_line(done.stderr)


def test_the_next_node_is_tried(cli: Cli, broker: dict[str, str]) -> None:
    """A node that is gone does not matter while another answers."""

    broker["AMQP_URL"] = f"amqp://127.0.0.1:1,{broker['AMQP_URL']}"

    assert cli("topology", "--apply", **broker).returncode == 0


def test_options_of_the_url_win() -> None:
    """Our defaults hold unless the URL says otherwise; the connection has a name."""

    ours, theirs = parameters(at("amqp://a,amqp://b?heartbeat=5&socket_timeout=1"), "test")

    assert (ours.heartbeat, ours.socket_timeout, ours.stack_timeout) == (20, 5, 10)
    assert (ours.connection_attempts, ours.blocked_connection_timeout) == (1, None)
    assert (theirs.heartbeat, theirs.socket_timeout, theirs.stack_timeout) == (5, 1, 10)
    assert ours.client_properties["connection_name"].startswith("qris-expire test ")


def test_unusable_tls_files_are_told(tmp_path: Path) -> None:
    """A CA file without certificates is reported by its variable."""

    empty = tmp_path / "ca.pem"
    empty.write_text("nothing")

    with pytest.raises(BrokerError, match="AMQP_CA_FILE holds no CA certificates"):
        parameters(AmqpSettings(url=Secret("amqps://host"), ca_file=empty))


# --- publish


def test_publish_sends_a_command(cli: Cli, declared: dict[str, str]) -> None:
    """The command is persistent, identified, dated, and holds what was asked for."""

    names = Names(declared["AMQP_PREFIX"])

    done = cli(
        "publish", "0012", "--merchant-id", "m1", "--reference", "ORD-77", "--lane", "sweep",
        "--not-after", "2026-11-22T23:59:59+07:00", **declared,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    with Rabbit(declared["AMQP_URL"]) as rabbit:
        ((properties, body),) = rabbit.get_all(names.queue("sweep"), 1, timeout=30)
    assert only_line(done.stdout) == f"published {properties.message_id} to {names.queue('sweep')}"
    assert json.loads(body) == {
        "billnumber": "0012",
        "additionalInfo": {"merchantId": "m1"},
        "reference": "ORD-77",
        "notAfter": "2026-11-22T23:59:59+07:00",
    }
    assert (properties.delivery_mode, properties.content_type) == (2, "application/json")
    assert abs(properties.timestamp - time.time()) < 60


@pytest.mark.parametrize(
    "arguments",
    [[""], ["a b"], ["x" * 65], ["ü"], ["1", "--merchant-id", ""], ["1", "--not-after", "tomorrow"],
     ["1", "--reference", "x" * 129]],
)  # fmt: skip
def test_invalid_command_is_not_published(cli: Cli, arguments: list[str]) -> None:
    """What the worker would refuse is refused before it is sent; exit code 2."""

    done = cli("publish", *arguments, AMQP_URL="amqp://127.0.0.1:1")

    assert done.returncode == 2
    assert only_line(done.stderr).endswith("nothing was published")


@pytest.mark.parametrize("options", [[], ["--wait"]])
def test_publish_without_topology_says_what_to_do(cli: Cli, broker: dict[str, str], options: list[str]) -> None:
    """Without the exchanges, the error names the command that declares them."""

    done = cli("publish", "1", *options, **broker)

    assert done.returncode == 1
    assert "qris-expire topology --apply" in only_line(done.stderr)


def test_lane_without_queue_says_what_to_do(cli: Cli, declared: dict[str, str]) -> None:
    """A command that no queue takes is not reported as published."""

    with Rabbit(declared["AMQP_URL"]) as rabbit:
        rabbit.delete_queue(Names(declared["AMQP_PREFIX"]).queue("cancellation"))

    done = cli("publish", "1", **declared)

    assert done.returncode == 1
    assert "qris-expire topology --apply" in only_line(done.stderr)


@contextmanager
def answering(url: str, names: Names, *outcomes: dict[str, Any]) -> Iterator[None]:
    """Takes one cancellation and answers with the outcomes; ``commandId`` is the command's unless given."""

    def answer() -> None:
        with Rabbit(url) as rabbit:
            ((properties, _),) = rabbit.get_all(names.queue("cancellation"), 1, timeout=30)
            for outcome in outcomes:
                body = json.dumps({"commandId": properties.message_id, **outcome}).encode()
                rabbit.publish(names.outcomes, "cancellation.some", body)

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(("status", "code"), [("expired", 0), ("rejected", 1)])
def test_wait_prints_our_outcome(cli: Cli, declared: dict[str, str], status: str, code: int) -> None:
    """`--wait` prints the outcome of its own command, not another's; exit code 0 if it is expired."""

    names = Names(declared["AMQP_PREFIX"])
    others = {"commandId": "another", "status": "expired", "reference": "not ours"}

    with answering(declared["AMQP_URL"], names, others, {"status": status, "reference": "é"}):
        done = cli("publish", "1", "--wait", "--timeout", "30", **declared)

    assert done.returncode == code, done.stderr
    outcome = json.loads(only_line(done.stdout))
    assert (outcome["status"], outcome["reference"]) == (status, "é")


def test_wait_ends_without_an_answer(cli: Cli, declared: dict[str, str]) -> None:
    """Without an answer in time it says so, and the command stays published."""

    names = Names(declared["AMQP_PREFIX"])

    done = cli("publish", "1", "--wait", "--timeout", "0.3", **declared)

    assert done.returncode == 1
    assert "no outcome within 0.3 s" in only_line(done.stderr)
    with Rabbit(declared["AMQP_URL"]) as rabbit:
        wait_until(lambda: rabbit.depth(names.queue("cancellation")) == 1, 30, "the command in its queue")


def test_a_wait_that_the_operator_ends_says_what_is_published(
    cli: Cli, tmp_path: Path, fresh: PrivateBroker, prefix: str
) -> None:
    """When its connection is closed at the broker, `publish --wait` says that the command stays published."""
    broker = {"AMQP_URL": fresh.url, "AMQP_PREFIX": prefix}
    assert cli("topology", "--apply", **broker).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "publish", "1", "--wait"],
        env=surroundings(broker),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Rabbit(fresh.url) as rabbit:
        wait_until(lambda: rabbit.depth(Names(prefix).queue("cancellation")) == 1, 30, "the command in its queue")

    fresh.ctl("close_all_connections", "maintenance")
    _, said = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "is published and stays so; only the wait for its outcome ended" in only_line(said)
    assert "maintenance" in said


# --- simulator


@pytest.mark.parametrize("there", [True, False])
def test_the_simulator_s_key_follows_no_link(cli: Cli, tmp_path: Path, there: bool) -> None:
    """A link that somebody put where the key is kept would make us write into their file, or take their key."""
    target = tmp_path / "target"
    if there:
        target.write_text("matters")
    (tmp_path / "simulator-key.pem").symlink_to(target)

    done = cli("simulator", "--port", "0")

    assert done.returncode == 2
    assert "symbolic link" in only_line(done.stderr)
    assert target.exists() == there
    assert not there or target.read_text() == "matters"


# --- run


@pytest.fixture
def valid(tmp_path: Path) -> dict[str, str]:
    """Settings that `run` takes."""
    key = tmp_path / "key.pem"
    key.write_text("a key")
    return {
        "AMQP_URL": "amqp://127.0.0.1:1",
        "GATEWAY_BASE_URL": "http://127.0.0.1:1/v1.0",
        "GATEWAY_CLIENT_ID": "client",
        "GATEWAY_CLIENT_SECRET": "secret",
        "GATEWAY_PRIVATE_KEY_FILE": str(key),
        "GATEWAY_CHANNEL_ID": "95051",
    }


def test_run_reports_all_problems_before_it_connects(cli: Cli, valid: dict[str, str]) -> None:
    """Exit code 2, one line per problem, nothing on standard output."""

    del valid["GATEWAY_CLIENT_ID"]

    done = cli("run", **valid, WORKER_CONCURRENCY="0", BREAKER_FALIURES="1")

    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split()[1] for line in done.stderr.splitlines()] == [
        "BREAKER_FALIURES:",
        "GATEWAY_CLIENT_ID:",
        "WORKER_CONCURRENCY:",
    ]


def test_settings_come_from_the_env_file_too(cli: Cli, tmp_path: Path, valid: dict[str, str]) -> None:
    """`.env` of the working directory is read."""

    (tmp_path / ".env").write_text("WORKER_CONCURRENCY=0\n")

    assert "WORKER_CONCURRENCY" in only_line(cli("run", **valid).stderr)


def test_signal_during_the_imports_is_not_lost(tmp_path: Path, valid: dict[str, str]) -> None:
    """A SIGTERM that comes before the worker is up drains it: exit code 0, nothing was taken."""

    script = (
        "import os, signal, sys; from worker import signals; signals.install();"
        "os.kill(os.getpid(), signal.SIGTERM);"
        "from worker.cli import main; sys.exit(main(['run']))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        env=surroundings(valid),
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, b"")


def test_waiting_for_signals_ends_with_one() -> None:
    """`signals.wait` returns when one has come, at once if it is there already."""

    script = (
        "import os, signal; from worker import signals; signals.install(); me = os.getpid();"
        "assert signals.wait(0) == 0;"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(me, signal.SIGTERM));"
        "signal.setitimer(signal.ITIMER_REAL, 0.05);"
        "assert signals.wait(30) == 1; assert signals.wait(30) == 1;"
        "os.kill(me, signal.SIGINT); assert signals.wait(0) == 2; assert signals.names() == ['SIGTERM', 'SIGINT']"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], env=surroundings({}), timeout=60, capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")


def test_unexpected_error_is_one_line(cli: Cli, tmp_path: Path) -> None:
    """An error that nobody foresaw is one line with a hint; `--debug` shows where it came from."""

    (tmp_path / "sitecustomize.py").write_text(
        "import uuid\ndef broken():\n    raise RuntimeError('amqp://u:hunter2@host')\nuuid.uuid4 = broken\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"

    plain = cli("publish", "1", PYTHONPATH=path)
    traced = cli("--debug", "publish", "1", PYTHONPATH=path)

    assert (plain.returncode, traced.returncode) == (1, 1)
    assert only_line(plain.stderr).startswith("qris-expire: unexpected: RuntimeError: amqp://***@host; ")
    assert "Traceback" in traced.stderr
    assert "hunter2" not in plain.stderr + traced.stderr
