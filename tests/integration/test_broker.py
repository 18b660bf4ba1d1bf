"""Private brokers start anywhere, keep their data, and leave nothing behind."""

import socket
import subprocess
import sys
from pathlib import Path

import pika.exceptions
import pytest

from tests.brokers import INSTALLER, VERSIONS, PrivateBroker, PrivateCluster
from tests.conftest import in_ci, running
from tests.rabbit import Rabbit, by_way_of, new_prefix
from tests.waiting import wait_until
from worker.sandbox.broker import BrokerUnavailable, LoginResult, find_server, free_port, install_server, try_login


@pytest.fixture
def binaries() -> None:
    """RabbitMQ is installed; without it a test is skipped, loudly, and fails in CI."""
    if find_server() is None:
        give_up = pytest.fail if in_ci() else pytest.skip
        give_up("RabbitMQ is not installed")


ORPHAN_MAKER = """
import signal, sys, threading
from pathlib import Path
from tests.brokers import PrivateBroker

broker = PrivateBroker(Path(sys.argv[1]))
starter = threading.Thread(target=broker.launch)
starter.start()
starter.join()
print(broker.pid, flush=True)
signal.pause()
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_of(directory: Path) -> list[str]:
    """Whose working directory is in there: everything a broker starts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(directory):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def is_confirmed(url: str, queue: str, body: bytes) -> bool:
    # On a channel of its own each time: RabbitMQ 3.10.8 nacks on until the dead leader is back if the first
    # publish of a channel comes before there is a new leader, about 0.3 s.
    with Rabbit(url) as rabbit:
        try:
            rabbit.publish("", queue, body)
        except pika.exceptions.NackError:
            return False
    return True


def test_answers_tells_refused_from_absent(amqp_url: str) -> None:
    """A wrong password, a virtual host that does not exist and an empty port are distinguished from a broker."""

    host, _, _ = amqp_url.rpartition("/")
    wrong_login = amqp_url.replace(amqp_url.rpartition("@")[0], "amqp://guest:wrong")

    assert try_login(amqp_url, timeout=30) is LoginResult.READY
    assert try_login(wrong_login, timeout=30) is LoginResult.REFUSED_LOGIN
    assert try_login(f"{host}/{new_prefix()}", timeout=30) is LoginResult.REFUSED_LOGIN
    assert try_login(by_way_of(free_port(), amqp_url), timeout=30) is LoginResult.NOT_THERE


def test_rabbitmq_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RABBITMQ_HOME chooses the installation."""

    script = tmp_path / "sbin" / "rabbitmq-server"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setenv("RABBITMQ_HOME", str(tmp_path))

    assert find_server() == script


@pytest.mark.parametrize("version", VERSIONS)
def test_a_node_is_of_the_version_asked_for(version: str) -> None:
    """A private node of each version that is supported starts, and says that it is this version."""

    with running(PrivateBroker(version=version)) as broker:
        assert broker.ctl("version").strip().startswith(f"{version}.")


def test_a_version_that_cannot_be_had(tmp_path: Path) -> None:
    """The installer gives the reason in one line, and leaves nothing behind."""

    done = subprocess.run([INSTALLER, "9.9", tmp_path / "it"], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "RabbitMQ 9.9 cannot be had: choose 3.10, 4.0 or 4.3\n"
    assert not (tmp_path / "it").exists()


def test_install_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where we may not install, the error is one line with the command."""

    monkeypatch.setenv("PATH", "")

    with pytest.raises(BrokerUnavailable, match=r"^RabbitMQ .*apt-get install .* rabbitmq-server$"):
        install_server()


def test_free_ports_are_not_for_outgoing_connections() -> None:
    """A port of a private node is never one that the kernel gives to a client."""

    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    assert all(free_port() < lowest for _ in range(50))


def test_data_survive_a_kill(fresh: PrivateBroker) -> None:
    """After SIGKILL and a start, the same URL has the confirmed message in its queue."""

    url = fresh.url
    with Rabbit(url) as rabbit:
        rabbit.declare_queue("kept")
        rabbit.publish("", "kept", b"worth keeping")
    wait_until(lambda: fresh.would_remember("kept"), 30, "the queue is on disk")
    fresh.kill()
    assert try_login(url, timeout=30) is LoginResult.NOT_THERE

    fresh.start()

    assert fresh.url == url
    with Rabbit(url) as rabbit:
        assert rabbit.get_all("kept", 1, timeout=30)[0][1] == b"worth keeping"


def test_reset_empties(fresh: PrivateBroker) -> None:
    """A reset broker has no queue of before, and accepts our login."""

    with Rabbit(fresh.url) as rabbit:
        rabbit.declare_queue("gone", kind="classic")
    fresh.reset()

    with Rabbit(fresh.url) as rabbit:
        assert not rabbit.has_queue("gone")


def test_ctl_reaches_this_node_only(private_broker: PrivateBroker) -> None:
    """rabbitmqctl speaks with the private node, and a failure of it is one line."""

    private_broker.start()

    assert private_broker.ctl("eval", "os:getpid().").strip() == f'"{private_broker.pid}"'
    with pytest.raises(BrokerUnavailable, match=r"^rabbitmqctl eval failed: .+$"):
        private_broker.ctl("eval", "1 = 2.")


@pytest.mark.usefixtures("binaries")
def test_taken_port_is_refused(tmp_path: Path) -> None:
    """A port that was asked for and is taken is an error that names it, and nothing starts."""

    with socket.create_server(("127.0.0.1", 0)) as taker:
        port = taker.getsockname()[1]
        broker = PrivateBroker(tmp_path, port=port)

        with pytest.raises(BrokerUnavailable, match=f"port {port} is taken"):
            broker.start()
    assert not processes_of(tmp_path)


@pytest.mark.usefixtures("binaries")
def test_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL of whoever started a broker ends the broker; the end of the thread that did so does not."""

    command = [sys.executable, "-c", ORPHAN_MAKER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        broker = int(parent.stdout.readline())
        # It boots: the port mapper, the VM and a child of that.
        wait_until(lambda: len(processes_of(tmp_path)) > 2, 30, "the broker boots")
        assert is_alive(broker)

        parent.kill()

    wait_until(lambda: not processes_of(tmp_path), 30, "everything is gone")
    assert not is_alive(broker)


@pytest.mark.usefixtures("binaries")
def test_close_leaves_no_directory() -> None:
    """A broker that was closed while it booted has left neither process nor temporary directory."""

    broker = PrivateBroker()
    broker.launch()
    directory = broker.directory
    assert processes_of(directory)

    broker.close()

    assert not directory.exists()
    wait_until(lambda: not processes_of(directory), 30, "no process is left")


def test_cluster_survives_one_node(cluster: PrivateCluster) -> None:
    """With one of three nodes killed a quorum queue takes messages, and the node comes back at its URL."""

    queue = new_prefix()
    with Rabbit(cluster.urls[0]) as rabbit:
        rabbit.declare_queue(queue)
    wait_until(lambda: cluster.nodes[0].would_remember(queue), 30, "the queue is on disk")
    cluster.nodes[0].kill()

    wait_until(lambda: is_confirmed(cluster.urls[1], queue, b"still there"), 30, "a confirm of two nodes")

    cluster.nodes[0].start()
    with Rabbit(cluster.urls[0]) as rabbit:
        assert rabbit.get_all(queue, 1, timeout=30)[0][1] == b"still there"
        rabbit.delete_queue(queue)
