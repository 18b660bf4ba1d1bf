"""RabbitMQ nodes and clusters for the tests: the demo's private node, and what only tests do to one."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.sandbox import broker
from worker.sandbox.broker import LOOPBACK, BrokerUnavailable, ErlangHome, free_port, last_line

VERSIONS = ("3.10", "4.0", "4.3")
"""The oldest that is supported, the first of 4.x, and the one that RabbitMQ's cluster operator installs."""

INSTALLER = Path(__file__).parents[1] / ".ci" / "broker"

CTL_SECONDS = 90.0
"""The most one `rabbitmqctl` may take: a node that hangs must fail its test, not the suite."""

_LISTENERS = {"rabbitmq_management": "management.tcp", "rabbitmq_prometheus": "prometheus.tcp"}


@cache
def installed(version: str) -> Path:
    """The home of RabbitMQ `version` ("4.3") beside the tests' packages; fetched first where it is not there yet.

    Raises BrokerUnavailable with the reason.
    """
    command = [str(INSTALLER), version, str(Path(sys.prefix) / f"rabbitmq-{version}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BrokerUnavailable(last_line(done.stderr))
    return Path(last_line(done.stdout))


class PrivateBroker(broker.PrivateBroker):
    """A node that can be emptied, asked and disturbed.

    `plugins` are names such as `rabbitmq_management`; the listeners of management and prometheus get ports of
    their own, see `http_port`. `config` is added to rabbitmq.conf. `version` is one that `.ci/broker` installs;
    without it, the RabbitMQ at RABBITMQ_HOME or the machine's own is started.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        plugins: Sequence[str] = (),
        config: Mapping[str, str] | None = None,
        port: int | None = None,
        name: str = "rabbit",
        home: ErlangHome | None = None,
        version: str | None = None,
    ) -> None:
        self._version = version
        self._more_config = dict(config or {})
        self.plugins = tuple(plugins)
        super().__init__(directory, port=port, name=name, home=home)

    def __repr__(self) -> str:
        return f"PrivateBroker({self.node}, port={self.port}, {'running' if self.running else 'stopped'})"

    @property
    def pid(self) -> int:
        """Of the Erlang VM itself, not of a shell around it."""
        if self._process is None:
            raise BrokerUnavailable(f"{self.node} is not running; start it first")
        return self._process.pid

    @property
    def directory(self) -> Path:
        """Holds everything that it writes."""
        return self._home.directory

    def server(self) -> Path:
        """That of its version."""
        return installed(self._version) / "sbin" / "rabbitmq-server" if self._version else super().server()

    def http_port(self, plugin: str) -> int:
        """Where `rabbitmq_management` or `rabbitmq_prometheus` listens."""
        return self._http_ports[plugin]

    def config(self) -> dict[str, str]:
        """Those of the node itself, of its plugins' listeners, and what was added."""
        lines = super().config()
        for plugin, port in self._http_ports.items():
            lines |= {f"{_LISTENERS[plugin]}.ip": LOOPBACK, f"{_LISTENERS[plugin]}.port": str(port)}
        return lines | self._more_config

    def choose_ports(self) -> None:
        """Also those of the plugins."""
        super().choose_ports()
        self._http_ports = {plugin: free_port() for plugin in self.plugins if plugin in _LISTENERS}

    def would_remember(self, queue: str) -> bool:
        """Whether this quorum queue would come back after `kill`; only of the default virtual host.

        A node writes the queue into its list of members (names.dets) a second after its declaration, though
        publishes are confirmed before. Killed in between and started again, RabbitMQ 3.10.8 lets all use of
        that queue time out.
        """
        names = self.node_directory / "data" / self.node / "quorum" / self.node / "names.dets"
        # With its length before it, so that no longer name passes for this one.
        member = f"%2F_{queue}".encode()
        return names.is_file() and bytes([len(member)]) + member in names.read_bytes()

    def stop(self) -> None:
        """Stop as an operator would: queues are closed properly, data and ports are kept."""
        self.terminate()
        self.wait_stopped()

    def restart(self) -> None:
        """Stop and start on the same data and ports."""
        self.stop()
        self.start()

    def reset(self) -> None:
        """Empty it: every queue, exchange and connection goes, guest stays. Takes a second or two."""
        self.ctl("delete_vhost", "/")
        self.ctl("add_vhost", "/")
        self.ctl("set_permissions", "-p", "/", "guest", ".*", ".*", ".*")

    @contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """While inside, the broker blocks every connection that publishes."""
        self.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            yield
        finally:
            self.ctl("set_vm_memory_high_watermark", "0.4")

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` against this node (up to a second of CPU each) and return what it prints."""
        command = [str(self.server().with_name("rabbitmqctl")), "-q", "-n", self.node, *arguments]
        try:
            done = subprocess.run(
                command,
                env=self.environment(),
                cwd=self.node_directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=CTL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BrokerUnavailable(f"rabbitmqctl {arguments[0]} hung for {CTL_SECONDS:g} s") from None
        if done.returncode != 0:
            said = last_line(done.stderr) or last_line(done.stdout)
            raise BrokerUnavailable(f"rabbitmqctl {arguments[0]} failed: {said}")
        return done.stdout

    def log_tail(self, lines: int = 30) -> str:
        """The end of what the node printed and logged."""
        return "\n".join(self.log_text().splitlines()[-lines:])


class PrivateCluster:
    """Several nodes that form one cluster, so that quorum queues have a quorum to lose."""

    def __init__(self, nodes: int = 3, *, config: Mapping[str, str] | None = None, version: str | None = None) -> None:
        self._home = ErlangHome(None)
        names = [f"rabbit{number}" for number in range(1, nodes + 1)]
        discovery = {"cluster_formation.peer_discovery_backend": "classic_config"} | {
            f"cluster_formation.classic_config.nodes.{number}": f"{name}@localhost"
            for number, name in enumerate(names, 1)
        }
        self.nodes = tuple(
            PrivateBroker(name=name, home=self._home, config=discovery | dict(config or {}), version=version)
            for name in names
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        """One per node, in the order of `nodes`."""
        return [node.url for node in self.nodes]

    def start(self) -> None:
        """Start every node that is not running, together, and wait until all see each other."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready()
        self.nodes[0].ctl("await_online_nodes", str(len(self.nodes)), "--timeout", "60")

    def stop(self) -> None:
        """Stop all together; data and ports are kept."""
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.wait_stopped()
        self._home.close()

    def close(self) -> None:
        """Stop for good; the temporary directory is removed, so nobody waits for tidy data."""
        for node in self.nodes:
            node.kill()
        self._home.close()
        self._home.remove()
