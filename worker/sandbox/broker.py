"""A RabbitMQ node of our own, from the installed binaries, for the demo. The tests build on it.

A private node needs no root, no service manager and no file outside its own directory: cookie, data, logs
and ports are its own, and so is the port mapper (epmd) by which Erlang nodes find each other. It listens on
loopback only and ends with the process that started it.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Self

import pika

from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.session import BrokerError, BrokerRefused, connect_by
from worker.surroundings import ends_with_us

LOOPBACK = "127.0.0.1"

START_SECONDS = 120.0
"""The most a node may take to answer. Six are usual; three nodes on a busy machine need a minute."""

STOP_SECONDS = 30.0
"""The most a node may take to stop by itself before it is killed, so that nobody waits for a wedged one."""

PORTS = range(20_000, 29_000)
"""Ports of private nodes lie below the range (from 32768) that the kernel hands to outgoing connections.
Inside it, any client could take the port of a stopped node, and one that keeps dialling that port would in
the end connect to itself. `rabbitmqctl` also adds 10000 to one of them, which must stay a port."""

_TAKEN = re.compile(r"dist_port_already_used|eaddrinuse|address already in use", re.IGNORECASE)

_COMPLAINT = re.compile(r"\[error\] <[\d.]+> +((?!BOOT FAILED|=)\S.*)")

_INSTALL = "apt-get install -y --no-install-recommends rabbitmq-server"


class BrokerUnavailable(Exception):
    """There is no RabbitMQ to start, or it did not start. One line: what happened, what to do."""


class LoginResult(Enum):
    """What came of a login at an AMQP URL."""

    READY = "ready"
    REFUSED_LOGIN = "refused login"
    NOT_THERE = "not there"


def try_login(url: str, timeout: float) -> LoginResult:
    """Ask whether a broker at `url` accepts our login. `timeout` in seconds, for the whole handshake."""

    def dial(parameters: pika.URLParameters) -> pika.BlockingConnection:
        parameters.socket_timeout = parameters.stack_timeout = timeout
        # pika logs an absent broker as several errors; a plain look first keeps the usual case silent.
        if parameters.ssl_options is None and not _speaks_amqp(parameters.host, parameters.port, timeout):
            raise ConnectionRefusedError
        return pika.BlockingConnection(parameters)

    try:
        connect_by(dial, AmqpSettings(url=Secret(url)), "demo").close()
    except BrokerRefused:
        return LoginResult.REFUSED_LOGIN
    except BrokerError:
        return LoginResult.NOT_THERE
    return LoginResult.READY


def find_server() -> Path | None:
    """The `rabbitmq-server` script itself, or None.

    Not the wrapper that Debian puts into /usr/sbin: that one insists on the user `rabbitmq`.
    """
    return next((path for path in _candidates() if path.is_file() and os.access(path, os.X_OK)), None)


def install_server() -> None:
    """Install RabbitMQ with apt, where we may; raises BrokerUnavailable with the command to run elsewhere.

    Only the binaries are needed. Whether the package also starts a node of the system's is up to the
    machine's policy; if it tries and fails, apt calls that an error and we do not.
    """
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise BrokerUnavailable(_how_to_install())
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    complaint = ""
    for arguments in (["update"], _INSTALL.split()[1:]):
        done = subprocess.run([apt, *arguments], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            complaint = last_line(done.stderr)
    if find_server() is None:
        raise BrokerUnavailable(f"apt could not install RabbitMQ ({complaint}); try: {_INSTALL}")


def free_port() -> int:
    """A port of loopback that nobody listens on now; a later taker is possible, so be ready to retry."""
    while not _is_free(port := secrets.choice(PORTS)):
        pass
    return port


class PrivateBroker:
    """One node. As a context manager it starts, and leaves neither process nor (own) directory behind.

    `directory` holds everything and is kept; without one, a temporary directory is made and removed on
    `close`. Without `port` a free one is taken; it stays the same over `stop`, `kill` and `start`, and so do
    the data. Nodes that share a `home` can form a cluster; each needs a `name` of its own.
    """

    plugins: Sequence[str] = ()

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        name: str = "rabbit",
        home: "ErlangHome | None" = None,
    ) -> None:
        self._home = home or ErlangHome(directory)
        self._shared = home is not None
        self.node_directory = self._home.directory / name
        self._fixed_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._settled = False
        self._log_start = 0
        self.node = f"{name}@localhost"
        self.choose_ports()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Settled once the node has started: a first start moves to another port if this one is taken."""
        return f"amqp://guest:guest@{LOOPBACK}:{self.port}/%2F"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def server(self) -> Path:
        """The script that starts it; raises BrokerUnavailable where RabbitMQ is not installed."""
        server = find_server()
        if server is None:
            raise BrokerUnavailable(_how_to_install())
        return server

    def config(self) -> dict[str, str]:
        """The lines of rabbitmq.conf."""
        return {"listeners.tcp.default": f"{LOOPBACK}:{self.port}", "log.console": "false"}

    def start(self) -> None:
        """Start and wait until it speaks AMQP; raises BrokerUnavailable."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start and do not wait, so that the nodes of a cluster boot together."""
        if self.running:
            return
        server = self.server()
        self._reap()
        # Looked at beforehand: another broker there would answer our login, and ours would seem to be ready.
        if not _is_free(self.port):
            raise BrokerUnavailable(f"port {self.port} is taken; stop what listens there or choose another")
        self._home.open(server)
        self._write_files()
        self._process = _spawn([str(server)], self.environment(), self.node_directory)

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Wait until it speaks AMQP; raises BrokerUnavailable, and nothing is left running then."""
        deadline = time.monotonic() + timeout
        moves = 3
        while not (self.running and _speaks_amqp(LOOPBACK, self.port, 1.0)):
            # Ports that clients were told once are kept: a node that comes back elsewhere has not come back.
            if not self.running and moves and not self._settled and self._ports_were_taken():
                moves -= 1
                self.choose_ports()
                self.launch()
            elif not self.running or time.monotonic() > deadline:
                self.kill()
                raise BrokerUnavailable(f"{self.node} did not start: {self._reason()}")
            time.sleep(0.05)
        self._ready = self._settled = True

    def terminate(self) -> None:
        """Ask it to stop and do not wait. One that still boots is killed: it would finish its boot first."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if self._ready else signal.SIGKILL)

    def wait_stopped(self, timeout: float = STOP_SECONDS) -> None:
        """Wait for the end after `terminate`; kill it when `timeout` seconds are over."""
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reap()
        if not self._shared:
            self._home.close()

    def kill(self) -> None:
        """Stop it with SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()
        self._reap()

    def close(self) -> None:
        """Stop for good; a temporary directory is removed."""
        self.kill() if self._home.temporary else self.terminate()
        self.wait_stopped()
        if not self._shared:
            self._home.remove()

    def log_text(self) -> str:
        logs = [self.node_directory / "console.log", self.node_directory / "log" / f"{self.node}.log"]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.is_file())

    def _reason(self) -> str:
        if self.running:
            return f"no answer on port {self.port}"
        if self._ports_were_taken():
            return "one of its ports was taken meanwhile; try again"
        # The first complaint is the cause; what follows, at great length, are its consequences.
        complaint = _COMPLAINT.search(self.log_text()[self._log_start :])
        return complaint.group(1) if complaint else f"it exited; see the logs in {self.node_directory}"

    def _ports_were_taken(self) -> bool:
        return _TAKEN.search(self.log_text()[self._log_start :]) is not None

    def choose_ports(self) -> None:
        """Free ones, but for a port that was asked for."""
        self.port = self._fixed_port or free_port()
        self._dist_port = free_port()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait()
        self._process = None
        self._ready = False

    def _write_files(self) -> None:
        self.node_directory.mkdir(parents=True, exist_ok=True)
        (self.node_directory / "conf.d").mkdir(exist_ok=True)
        (self.node_directory / "empty").touch()
        conf = "".join(f"{key} = {value}\n" for key, value in self.config().items())
        (self.node_directory / "rabbitmq.conf").write_text(conf)
        (self.node_directory / "advanced.config").write_text("[].\n")
        (self.node_directory / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        self._log_start = len(self.log_text())

    def environment(self) -> dict[str, str]:
        at = self.node_directory
        return self._home.environment() | {
            # Makes the start script become the VM. Otherwise it stays around it, and a kill hits the shell.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            # Each of these replaces a file or directory of the system's.
            "RABBITMQ_CONF_ENV_FILE": str(at / "empty"),
            "RABBITMQ_CONFIG_FILE": str(at / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(at / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(at / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(at / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(at / "generated"),
            "RABBITMQ_MNESIA_BASE": str(at / "data"),
            "RABBITMQ_LOG_BASE": str(at / "log"),
            "RABBITMQ_PID_FILE": str(at / "pid"),
        }


class ErlangHome:
    """What nodes that may talk to each other share: the directory with the cookie, and the port mapper.

    The port mapper is ours, too. The machine's may belong to another user, and a node that finds none starts
    one as a daemon that outlives everything.
    """

    def __init__(self, directory: Path | None) -> None:
        self.temporary = directory is None
        self.directory = (directory or Path(tempfile.mkdtemp(prefix="qris-expire-broker-"))).resolve()
        # Also when nobody calls remove: at the collection of this object or at the end of the interpreter.
        self._remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        if not self.temporary:
            self._remove.detach()
        self._mapper: subprocess.Popen[bytes] | None = None
        self._mapper_port = 0

    def open(self, server: Path) -> None:
        """Write the cookie, start the port mapper that belongs to `server`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        cookie = self.directory / ".erlang.cookie"
        if not cookie.exists():
            # Erlang refuses a cookie that others may read.
            cookie.touch(mode=0o600)
            cookie.write_text(secrets.token_hex(20))
            cookie.chmod(0o400)
        for _ in range(5):
            if self._mapper is not None and self._mapper.poll() is None:
                return
            self._mapper_port = free_port()
            self._mapper = _spawn([_port_mapper(server)], self.environment(), self.directory)
            self._wait_for_mapper(self._mapper)
        raise BrokerUnavailable("epmd, Erlang's port mapper, does not start; is Erlang installed properly?")

    def close(self) -> None:
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()
        self._mapper = None

    def remove(self) -> None:
        if self.temporary:
            self._remove()

    def environment(self) -> dict[str, str]:
        """Made from scratch: one for RabbitMQ or Erlang could lead elsewhere, a secret of ours leak."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(self.directory),
            "TMPDIR": str(self.directory),
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_FLAGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_CRASH_DUMP_SECONDS": "0",
        }

    def _wait_for_mapper(self, mapper: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 10.0
        while mapper.poll() is None and not _listens(self._mapper_port):
            if time.monotonic() > deadline:
                mapper.kill()
                mapper.wait()
            time.sleep(0.01)


# The kernel ends a process with the thread that started it (see `surroundings`): so one thread, which lives until the
# interpreter ends, starts them all.
_KEEPER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="private-broker")


def _spawn(command: Sequence[str], environment: Mapping[str, str], directory: Path) -> subprocess.Popen[bytes]:
    def spawn() -> subprocess.Popen[bytes]:
        with (directory / "console.log").open("ab") as log:
            return subprocess.Popen(
                ends_with_us(command),
                env=dict(environment),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Out of reach of the terminal's ctrl-C: whoever uses the broker drains before it goes.
                start_new_session=True,
            )

    return _KEEPER.submit(spawn).result()


def _candidates() -> Iterator[Path]:
    if home := os.environ.get("RABBITMQ_HOME"):
        yield Path(home) / "sbin" / "rabbitmq-server"
    yield Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    versions = Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")
    yield from sorted(versions, key=_version, reverse=True)
    yield Path("/opt/rabbitmq/sbin/rabbitmq-server")
    if found := shutil.which("rabbitmq-server"):
        yield Path(found)


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _how_to_install() -> str:
    return f"RabbitMQ is not installed here; run as root: {_INSTALL}"


def _port_mapper(server: Path) -> str:
    # Its own comes first: there may be no other Erlang here.
    own = server.with_name("epmd")
    installed = map(str, Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
    found = str(own) if own.is_file() else shutil.which("epmd") or next(installed, None)
    if found is None:
        raise BrokerUnavailable(f"epmd of Erlang is not installed here; run as root: {_INSTALL}")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), 1.0).close()
    except OSError:
        return False
    return True


def _speaks_amqp(host: str, port: int, timeout: float) -> bool:
    """A broker answers the protocol header with a method frame (1), or with a header of its own (A)."""
    try:
        with socket.create_connection((host, port), timeout) as probe:
            probe.settimeout(timeout)
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return probe.recv(1) in (b"\x01", b"A")
    except OSError:
        return False


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
