"""Every way to hold it wrong: what a person reads is one line on standard error, what happened and what to do.

The exit code is the contract's. No traceback, and no secret: each URL here has a password, which nobody may see.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.brokers import PrivateBroker
from tests.commands import call
from tests.conftest import running
from tests.rabbit import Rabbit, address
from tests.servers import Authority, refusing_port, swallowing
from tests.worker_process import WorkerProcess
from worker.core.topology import topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Simulator

ROOT = Path(__file__).parents[2]
PASSWORD = "hunter2"


class Said(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty directory, with these settings and no others; checks what is true of every error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith(("AMQP_", "GATEWAY_", "METRICS_"))]:
        monkeypatch.delenv(name)

    def run(*arguments: str, **environ: str) -> Said:
        with monkeypatch.context() as patched:
            for name, value in environ.items():
                patched.setenv(name, value)
            capsys.readouterr()
            code = call(*arguments)
        return checked(Said(code, *capsys.readouterr()))

    return run


def checked(said: Said) -> Said:
    """No secret, no traceback, nothing that we did not foresee."""
    assert PASSWORD not in said.out + said.err
    assert "Traceback" not in said.out + said.err
    assert "unexpected" not in said.err
    return said


def only_line(said: Said) -> str:
    """The one line on standard error, which is for people."""
    (line,) = said.err.splitlines()
    assert line.startswith("qris-expire: ")
    return line


# --- the broker

TALKING = {
    "publish": ("publish", "1"),
    "publish --wait": ("publish", "1", "--wait"),
    "dead list": ("dead", "list"),
    "dead show": ("dead", "show", "m-1"),
    "dead redrive": ("dead", "redrive"),
    "dead purge": ("dead", "purge", "--yes"),
    "dead export": ("dead", "export"),
    "topology --apply": ("topology", "--apply"),
}
"""Commands that speak to the broker, each in one line when it cannot."""


@pytest.mark.parametrize("command", TALKING)
def test_no_broker(run: Run, command: str) -> None:
    """Nobody listens: the address, the system's word, and the setting; exit code 1."""

    port = refusing_port()

    said = run(*TALKING[command], AMQP_URL=f"amqp://u:{PASSWORD}@127.0.0.1:{port}/%2F")

    assert said.code == 1
    assert f"no broker answers at 127.0.0.1:{port} (Connection refused); start it, or correct AMQP_URL" in only_line(
        said
    )


def test_host_that_is_not_known(run: Run) -> None:
    """A host name without an address is reported as such."""

    line = only_line(run("publish", "1", AMQP_URL=f"amqp://u:{PASSWORD}@broker.invalid/"))

    assert "broker.invalid:5672 (" in line
    assert "correct AMQP_URL" in line


def test_port_that_stays_silent(run: Run) -> None:
    """Something that takes the connection and says nothing is no broker."""

    with swallowing() as port:
        said = run("publish", "1", AMQP_URL=f"amqp://u:{PASSWORD}@127.0.0.1:{port}/?stack_timeout=1")

    assert "something listens, but does not talk AMQP in time" in only_line(said)


def test_tls_to_a_plain_port(run: Run, amqp_url: str) -> None:
    """amqps:// to a port without TLS names the other scheme."""

    host, port = address(amqp_url)

    said = run("publish", "1", AMQP_URL=f"amqps://guest:{PASSWORD}@{host}:{port}/")

    assert said.code == 1
    assert "TLS: none is spoken there; amqp:// instead of amqps://" in only_line(said)


@pytest.mark.parametrize("command", ["publish", "dead list", "topology --apply"])
def test_wrong_password(run: Run, amqp_url: str, command: str) -> None:
    """The user is named, the password is not."""

    host, port = address(amqp_url)

    said = run(*TALKING[command], AMQP_URL=f"amqp://guest:{PASSWORD}@{host}:{port}/%2F")

    assert said.code == 1
    assert "refuses the login of 'guest'; correct user and password in AMQP_URL" in only_line(said)


@pytest.mark.parametrize("command", ["publish", "dead list", "topology --apply"])
def test_wrong_virtual_host(run: Run, amqp_url: str, command: str) -> None:
    """The virtual host is named, with both cures."""

    said = run(*TALKING[command], AMQP_URL=f"{amqp_url.rpartition('/')[0]}/nowhere")

    assert said.code == 1
    assert "the virtual host 'nowhere'; create it and give permission, or correct AMQP_URL" in only_line(said)


@pytest.mark.parametrize("command", [each for each in TALKING if each != "topology --apply"])
def test_no_topology(run: Run, amqp_url: str, command: str) -> None:
    """Exchanges and queues that are not there lead to the command that declares them."""

    said = run(*TALKING[command], AMQP_URL=amqp_url, AMQP_PREFIX="t.errors.nothing")

    assert said.code == 1
    assert "qris-expire topology --apply" in only_line(said)


def test_queues_of_another_type(run: Run, amqp_url: str, prefix: str) -> None:
    """A prefix whose queues are of another type is named by `topology` and, without changing anything, by `check`."""

    settings = {"AMQP_URL": amqp_url, "AMQP_PREFIX": prefix, "RETRY_DELAYS_SECONDS": "1"}
    run("topology", "--apply", **settings)

    said = run("topology", "--apply", **settings, AMQP_QUEUE_TYPE="classic")
    with Rabbit(amqp_url) as rabbit:
        rabbit.delete_queue(f"{prefix}.sweep")
    looked = run("check", **settings, AMQP_QUEUE_TYPE="classic")

    with Rabbit(amqp_url) as rabbit:
        assert not rabbit.has_queue(f"{prefix}.sweep")  # looked at, and not declared
    wanted = f"queue {prefix}.dead exists with x-queue-type quorum instead of classic; match AMQP_QUEUE_TYPE to it"
    assert said.code == looked.code == 1
    assert wanted in said.err
    assert wanted in looked.out


# --- a broker with TLS, and users that may not do everything


class Guarded(NamedTuple):
    """A broker's plain port, its TLS port, and the CA of its certificate."""

    plain: int
    tls: int
    ca: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A private broker that speaks TLS, with a user without permissions, one without a virtual host, and one that may
    not publish commands."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority("authority", folder)
    certificate, key = authority.issue("127.0.0.1")
    for path in (folder.parent.parent, folder.parent, folder, certificate, key, authority.file):
        path.chmod(path.stat().st_mode | 0o055)  # the broker may run as a user of its own
    port = free_port()
    config = {
        "listeners.ssl.default": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": str(authority.file),
        "ssl_options.certfile": str(certificate),
        "ssl_options.keyfile": str(key),
        "ssl_options.verify": "verify_none",
    }
    with running(PrivateBroker(config=config)) as broker:
        for user in ("powerless", "unwelcome", "reader"):
            broker.ctl("add_user", user, PASSWORD)
        with Rabbit(broker.url) as rabbit:
            rabbit.declare(topology("qris.expire", "quorum", ()))
        broker.ctl("set_permissions", "powerless", "^$", "^$", "^$")
        broker.ctl("set_permissions", "reader", ".*", "^amq.gen", ".*")
        yield Guarded(broker.port, port, str(authority.file))


def test_plain_to_a_tls_port(run: Run, guarded: Guarded) -> None:
    """amqp:// to a port for TLS names the other scheme."""

    said = run("publish", "1", AMQP_URL=f"amqp://guest:{PASSWORD}@127.0.0.1:{guarded.tls}/%2F")

    assert said.code == 1
    assert "one for TLS (amqps://)" in only_line(said)


def test_certificate_of_an_unknown_authority(run: Run, guarded: Guarded) -> None:
    """A certificate that nobody vouches for leads to AMQP_CA_FILE; with it, one of another name leads to the URL."""

    url = f"amqps://guest:{PASSWORD}@127.0.0.1:{guarded.tls}/%2F"

    unknown = run("publish", "1", AMQP_URL=url)
    other_name = run("publish", "1", AMQP_URL=url.replace("127.0.0.1", "localhost"), AMQP_CA_FILE=guarded.ca)
    trusted = run("publish", "1", AMQP_URL=url, AMQP_CA_FILE=guarded.ca)

    assert "set AMQP_CA_FILE" in only_line(unknown)
    assert "AMQP_URL needs the host's own name" in only_line(other_name)
    assert "refuses the login" in only_line(trusted)


@pytest.mark.parametrize("command", TALKING)
def test_user_without_permission(run: Run, guarded: Guarded, command: str) -> None:
    """What the user may not touch is named, and what to give."""

    said = run(*TALKING[command], AMQP_URL=f"amqp://powerless:{PASSWORD}@127.0.0.1:{guarded.plain}/%2F")

    assert said.code == 1
    assert "the broker refuses access" in only_line(said)
    assert "give the user permission for it" in said.err


def test_sweep_that_may_not_publish_says_so(guarded: Guarded, tmp_path: Path) -> None:
    """What the broker refuses is tried again, since the reason may pass; whoever waits for it is told the reason."""
    (tmp_path / "bills.csv").write_text("billnumber,merchantId\n1001,M1\n1002,M1\n")
    settings = {
        "AMQP_URL": f"amqp://reader:{PASSWORD}@127.0.0.1:{guarded.plain}/%2F",
        "AMQP_DECLARE": "false",
        "RETRY_DELAYS_SECONDS": "none",
        "XDG_STATE_HOME": str(tmp_path),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "worker", "sweep", "bills.csv"],
        env={**os.environ, **settings},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as sweep:
        assert sweep.stderr is not None
        said = next((line for line in sweep.stderr if "refuse" in line), "it ended without a word of it")
        sweep.terminate()
        sweep.stderr.read()

    assert "the broker refuses message" in said
    assert "access to exchange 'qris.expire.commands' in vhost '/' refused for user 'reader'" in said


def test_user_without_a_virtual_host(run: Run, guarded: Guarded) -> None:
    """A user that may not enter the virtual host gets an error that says so."""

    said = run("publish", "1", AMQP_URL=f"amqp://unwelcome:{PASSWORD}@127.0.0.1:{guarded.plain}/%2F")

    assert "refuses 'unwelcome' the virtual host '/'; create it and give permission" in only_line(said)


# --- settings

SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "scheme": ({"AMQP_URL": f"http://u:{PASSWORD}@h/"}, "AMQP_URL: must begin with amqp:// or amqps://"),
    "at": ({"AMQP_URL": f"amqp://u:{PASSWORD}@x@h/"}, "AMQP_URL: has more than one '@'; percent-encode it as %40"),
    "option": ({"AMQP_URL": f"amqp://u:{PASSWORD}@h/?heart=1"}, "AMQP_URL: has an unknown option"),
    "unknown": ({"AMQP_PREFFIX": "x"}, "AMQP_PREFFIX: unknown setting; did you mean AMQP_PREFIX?"),
    "type": ({"AMQP_QUEUE_TYPE": "mirrored"}, "AMQP_QUEUE_TYPE: must be one of quorum, classic"),
    "prefix": ({"AMQP_PREFIX": "a b"}, "AMQP_PREFIX: must be letters, digits"),
    "no file": ({"AMQP_CA_FILE": "nowhere.pem"}, "AMQP_CA_FILE: no such file; mount it, or correct the path"),
    "directory": ({"AMQP_CA_FILE": "."}, "AMQP_CA_FILE: is not a regular file; give the path of one"),
    "secret's file": ({"AMQP_URL_FILE": "nowhere"}, "AMQP_URL_FILE: no such file; mount it, or correct the path"),
    "half a pair": (
        {"AMQP_URL": "amqps://h", "AMQP_CERT_FILE": __file__},
        "AMQP_KEY_FILE: goes together with AMQP_CERT_FILE; set both or neither",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("command", ["publish", "dead list", "topology --apply"])
def test_wrong_setting(run: Run, command: str, case: str) -> None:
    """A setting that cannot be used is named with its rule, before anything is connected to; exit code 2."""

    environ, words = SETTINGS[case]

    said = run(*TALKING[command], **environ)

    assert said.code == 2
    assert words in only_line(said)


def test_env_file_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    """A `.env` that is none, or not text, is named with the line."""

    (tmp_path / ".env").write_text("AMQP_PREFIX=x\nnonsense\n")
    line = only_line(run("publish", "1"))
    (tmp_path / ".env").write_bytes(b"AMQP_PREFIX=\xff\n")
    encoding = only_line(run("publish", "1"))
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    directory = only_line(run("publish", "1"))

    assert ".env: line 2 is not NAME=value; correct or quote it" in line
    assert ".env: is not UTF-8 text; save it as UTF-8" in encoding
    assert ".env: cannot be read (Is a directory)" in directory


# --- files

FILES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no input": (
        ("sweep", "nowhere.csv"),
        2,
        "nowhere.csv: cannot be read (No such file or directory); correct the path",
    ),
    "directory": (("sweep", "."), 2, ".: cannot be read (Is a directory); correct the path"),
    "empty": (("sweep", "empty.csv"), 2, "empty.csv: is empty: not even a header"),
    "UTF-16": (("sweep", "utf16.csv"), 2, "utf16.csv:1: is UTF-16; save it as UTF-8"),
    "header": (("sweep", "header.csv"), 2, "header.csv:1: has no column billnumber (or billNumber) in its header"),
    "report": (
        ("sweep", "good.csv", "--wait", "--report", "no/where.csv"),
        2,
        "the directory no does not exist; correct --report",
    ),
    "no batch": (("sweep", "--follow", "nothing"), 2, "no batch nothing in"),
    "no such batch": (("status", "nothing"), 2, "no batch nothing in"),
    "state": (("status", "--state-dir", "good.csv"), 1, "good.csv: Not a directory; give a directory as --state-dir"),
    "state of a sweep": (("sweep", "good.csv", "--state-dir", "good.csv"), 1, "give a directory as --state-dir"),
    "journal": (("status", "b1", "--state-dir", "."), 1, "b1.db: file is not a database; it is no journal any more"),
    "export": (
        ("dead", "export", "--output", "no/where"),
        1,
        "no/where cannot be written (No such file or directory)",
    ),
    "contract": (
        ("contract", "--output", "good.csv/x"),
        1,
        "cannot be written (Not a directory); give another --output",
    ),
    "demo": (("demo", "--save", "no/where"), 1, "no/where: cannot be written (No such file or directory)"),
    "script": (("simulator", "--port", "0", "--script", "good.csv"), 2, "good.csv: no JSON"),
    "no script": (
        ("simulator", "--port", "0", "--script", "no"),
        2,
        "no: No such file or directory; give another file",
    ),
    "key": (("simulator", "--port", "0", "--key-file", "good.csv"), 2, "good.csv is no readable key; give an RSA key"),
    "time": (("dead", "redrive", "--before", "noon"), 2, "--before: not an RFC 3339 time such as"),
    "purge": (("dead", "purge"), 2, "deleting is for good and nobody can be asked here; give --yes"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_file_or_argument(run: Run, amqp_url: str, tmp_path: Path, case: str) -> None:
    """A file that is not there, not readable or something else is named with what it is, and nothing is sent."""

    arguments, code, words = FILES[case]
    (tmp_path / "good.csv").write_text("billnumber,merchantId\n1,m\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "b1.db").write_text("no database")
    (tmp_path / "header.csv").write_text("a,b\n1,2\n")
    (tmp_path / "utf16.csv").write_bytes("billnumber\n1\n".encode("utf-16"))

    said = run(*arguments, AMQP_URL=amqp_url, AMQP_PREFIX="t.errors.files")

    assert said.code == code
    assert words in only_line(said)


def test_port_of_the_simulator_is_taken(run: Run) -> None:
    """A taken port leads to --port."""

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = run("simulator", "--port", str(port))

    assert said.code == 2
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use); give --port a free one" in only_line(said)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is full after a few pages."""
    at = tmp_path / "disk"
    at.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", at], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"a full disk was NOT tried: {mount.stderr.strip() or 'no mount here'}")
    yield at
    subprocess.run(["umount", at], check=True)


def test_full_disk_under_the_journal(run: Run, tmp_path: Path, small_disk: Path) -> None:
    """A journal that the disk has no room for is reported as that, and nothing was sent."""

    (tmp_path / "many.csv").write_text("billnumber,merchantId\n" + "".join(f"{n},m\n" for n in range(20_000)))

    port = refusing_port()
    said = run("sweep", "many.csv", "--state-dir", str(small_disk), AMQP_URL=f"amqp://u:{PASSWORD}@127.0.0.1:{port}")

    assert said.code == 1
    assert "disk" in said.err.splitlines()[0]
    assert "--state-dir" in said.err.splitlines()[0]


# --- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("publish", "BILL is missing"),
        ("publish 1 --lane x", "--lane must be one of cancellation, sweep"),
        ("publish 1 --timeout 0", "--timeout must be a number from 0.1 to 86400"),
        ("dead list --limit x", "--limit must be a whole number of at least 0"),
        ("dead", "a command is missing: list, show, redrive, export, purge"),
        ("dead nonsense", "no such command: nonsense"),
        ("nonsense", "no such command: nonsense"),
        ("contract yaml", "DOCUMENT must be one of asyncapi, command, outcome"),
        ("topology --apply --definitions", "exclude each other; give one"),
        ("check --probe ü", "--probe must be 1 to 64 printable ASCII characters"),
    ],
)
def test_wrong_usage(run: Run, arguments: str, words: str) -> None:
    """What was called wrongly is reported in words of ours, not of a library's; exit code 2."""

    said = run(*arguments.split())

    assert (said.code, said.out) == (2, "")
    assert words in only_line(said)


# --- run


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Run]:
    """Runs `run` against a simulator, with some settings changed, until it ends by itself."""
    with Simulator() as gateway:
        settings = {
            **gateway.environment(tmp_path / "key.pem"),
            "AMQP_URL": f"amqp://u:{PASSWORD}@127.0.0.1:{refusing_port()}",
            "METRICS_HOST": "127.0.0.1",
            "METRICS_PORT": str(free_port()),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "*",
        }

        def run(**changed: str) -> Said:
            done = subprocess.run(
                [sys.executable, "-m", "worker", "run"],
                env={**settings, **changed},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return checked(Said(done.returncode, done.stdout, done.stderr))

        yield run


ENDS: dict[str, tuple[dict[str, str], int, str]] = {
    "key": (
        {"GATEWAY_PRIVATE_KEY_FILE": str(ROOT / "LICENSE")},
        2,
        "GATEWAY_PRIVATE_KEY_FILE: it is no PEM: it has no line -----BEGIN PRIVATE KEY-----",
    ),
    "no key": ({"GATEWAY_PRIVATE_KEY_FILE": "nowhere.pem"}, 2, "GATEWAY_PRIVATE_KEY_FILE: no such file"),
    "missing": ({"GATEWAY_CLIENT_ID": ""}, 2, "GATEWAY_CLIENT_ID: is not set; set it."),
    "unknown": ({"WORKER_CONCURENCY": "1"}, 2, "WORKER_CONCURENCY: unknown setting; did you mean WORKER_CONCURRENCY?"),
    "http": ({"GATEWAY_BASE_URL": "http://gateway.example/v1.0"}, 2, "plain http is only for loopback; use https"),
    "CA": (
        {"GATEWAY_BASE_URL": "https://127.0.0.1:1/v1.0", "GATEWAY_CA_FILE": __file__},
        2,
        "GATEWAY_CA_FILE: holds no CA certificate in PEM",
    ),
    "proxy": (
        {"GATEWAY_BASE_URL": "https://gateway.example/v1.0", "HTTPS_PROXY": f"ftp://u:{PASSWORD}@h", "NO_PROXY": ""},
        2,
        "HTTPS_PROXY: must be the URL of an HTTP proxy",
    ),
    "address": ({"METRICS_HOST": "192.0.2.1"}, 2, "set METRICS_HOST to an address of this host"),
    "client": (
        {"GATEWAY_CLIENT_ID": "another"},
        3,
        "Unknown Client; it does not know this client: correct GATEWAY_CLIENT_ID",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_worker_that_cannot_begin(worker: Run, case: str) -> None:
    """What waiting cannot cure ends it at once: 2 for settings, 3 for credentials, with a line for people as well."""

    changed, code, words = ENDS[case]

    said = worker(**changed)

    assert said.code == code
    assert words in only_line(said)


def test_metrics_port_is_taken(worker: Run) -> None:
    """A taken port leads to METRICS_PORT, with one process and with several."""

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        alone, family = worker(METRICS_PORT=port), worker(METRICS_PORT=port, WORKER_PROCESSES="2")

    for said in (alone, family):
        assert said.code == 2
        assert "the port is taken; stop what holds it, or set METRICS_PORT to a free one" in only_line(said)


def test_broker_refuses_the_worker(worker: Run, amqp_url: str) -> None:
    """A wrong password ends it with 3, with one process and with several; the log of a child says why."""

    host, port = address(amqp_url)
    url = f"amqp://guest:{PASSWORD}@{host}:{port}/%2F"

    alone, family = worker(AMQP_URL=url), worker(AMQP_URL=url, WORKER_PROCESSES="2")

    assert alone.code == family.code == 3
    assert "correct AMQP_URL: user, password, vhost, permissions" in only_line(alone)
    assert "the line above with exit_code says why" in only_line(family)
    assert "correct AMQP_URL: user, password, vhost, permissions" in family.out


WAITS: dict[str, tuple[dict[str, str], str, str]] = {
    "no permission": (
        {"AMQP_URL": "amqp://powerless:{password}@127.0.0.1:{plain}/%2F"},
        "broker.waiting",
        "refused for user 'powerless'; give the user configure, write and read permission for it",
    ),
    "another type": ({"AMQP_QUEUE_TYPE": "classic"}, "broker.waiting", "match AMQP_QUEUE_TYPE to it"),
    "undeclared": (
        {"AMQP_DECLARE": "false", "AMQP_PREFIX": "another"},
        "broker.waiting",
        "' in vhost '/'; run `qris-expire topology --apply`, or tell its owner",  # of whichever connection looks first
    ),
    "no TLS": (
        {"AMQP_URL": "amqps://guest:{password}@127.0.0.1:{plain}/"},
        "broker.waiting",
        "amqp:// instead of amqps://",
    ),
    "TLS": ({"AMQP_URL": "amqp://guest:{password}@127.0.0.1:{tls}/"}, "broker.waiting", "one for TLS (amqps://)"),
    "CA": ({"AMQP_URL": "amqps://guest:{password}@127.0.0.1:{tls}/"}, "broker.waiting", "set AMQP_CA_FILE"),
    "wrong path": ({"GATEWAY_TOKEN_PATH": "/token"}, "gateway.waiting", "GATEWAY_BASE_URL must end with the version"),
    "no gateway": (
        {"GATEWAY_BASE_URL": "http://127.0.0.1:{closed}/v1.0"},
        "gateway.waiting",
        "nothing listens there: correct host and port in GATEWAY_BASE_URL",
    ),
}


@pytest.mark.parametrize("case", WAITS)
def test_worker_that_waits_says_for_what(guarded: Guarded, tmp_path: Path, case: str) -> None:
    """What may pass by itself is waited for, and the log says what happened and what to do; SIGTERM ends it with 0."""

    changed, event, words = WAITS[case]
    places = {**guarded._asdict(), "password": PASSWORD, "closed": refusing_port()}
    settings = {name: value.format(**places) for name, value in changed.items()}
    url = settings.pop("AMQP_URL", f"amqp://guest:guest@127.0.0.1:{guarded.plain}/%2F")

    with (
        Simulator() as gateway,
        WorkerProcess(url, settings.pop("AMQP_PREFIX", "qris.expire"), gateway, tmp_path, **settings) as worker,
    ):
        (said, *_) = worker.wait_for(lambda: worker.events(event), 30, event)
        worker.stop()

    assert words in f"{said['reason']}; {said.get('action')}"
    checked(Said(0, worker.log(), worker.errors()))
