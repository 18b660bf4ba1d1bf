"""A partner's first day: `check` and `sign` at a gateway that checks everything, with one thing wrong at a time."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from tests.commands import call
from tests.servers import Authority, always, answer, refusing_port, serving
from worker.sandbox.simulator import EXPIRE_PATH, Fault, Script, Simulator, checks, own_key, private_pem

SECRET = "a-secret-of-the-test"
EXPIRE = EXPIRE_PATH


class Said(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    def line(self, subject: str) -> str:
        """The last line about the subject."""
        return [line for line in self.out.splitlines() if line.startswith(subject)][-1]


Run = Callable[..., Said]


@pytest.fixture
def simulated() -> Iterator[Simulator]:
    with Simulator(client_secret=SECRET) as running:
        yield running


@pytest.fixture
def settings(simulated: Simulator, tmp_path: Path) -> dict[str, str]:
    """Settings that are all right, for a broker that is not there."""
    return {
        **simulated.environment(tmp_path / "key.pem"),
        "GATEWAY_MERCHANT_ID": "121000001",
        "AMQP_URL": f"amqp://127.0.0.1:{refusing_port()}",
    }


@pytest.fixture
def run(
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command with the settings, some of them changed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **changed: str) -> Said:
        for name, value in {**settings, **changed}.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = call(*arguments)
        said = Said(code, *capsys.readouterr())
        # Whatever goes wrong, no secret is shown, and nothing comes but lines for people.
        for secret in (SECRET, "PRIVATE KEY-----\n"):
            assert secret not in said.out + said.err
        assert "Traceback" not in said.err
        return said

    return run


# --- what a token shows


def test_all_right(run: Run, simulated: Simulator) -> None:
    """Key, token and clock are ok, and no expire was sent."""

    said = run("check")

    assert re.match(r"token +ok +good for 900 s", said.line("token"))
    assert re.match(r"clock +ok ", said.line("clock"))
    assert simulated.report().expire_calls == 0


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "client": ({"GATEWAY_CLIENT_ID": "another"}, "correct GATEWAY_CLIENT_ID"),
    "version": ({"GATEWAY_BASE_URL": "{base}/v2"}, "GATEWAY_BASE_URL must end with the version"),
    "no version": ({"GATEWAY_BASE_URL": "{origin}"}, "GATEWAY_BASE_URL must end with the version"),
    "token path": ({"GATEWAY_TOKEN_PATH": "/access-token/b2c"}, "GATEWAY_TOKEN_PATH"),
    "nobody there": (
        {"GATEWAY_BASE_URL": "http://127.0.0.1:{closed}/v1.0"},
        "correct host and port in GATEWAY_BASE_URL",
    ),
    "host": ({"GATEWAY_BASE_URL": "https://gateway.invalid/v1.0"}, "the host name is not known here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_setting_shows_in_the_token(run: Run, simulated: Simulator, case: str) -> None:
    """Client, address and version that are wrong are distinguished by the token's answer; exit code 1."""

    origin = simulated.base_url.removesuffix("/v1.0")
    changed, cure = WRONG[case]
    places = {"origin": origin, "base": simulated.base_url, "closed": str(refusing_port())}

    said = run("check", **{name: value.format(**places) for name, value in changed.items()})

    assert said.code == 1
    assert said.line("token").startswith("token     FAILED")
    assert cure in said.line("token")


def _key_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_another_key(run: Run, tmp_path: Path) -> None:
    """A key that the gateway does not have the public half of is laid to the key."""

    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    said = run("check", GATEWAY_PRIVATE_KEY_FILE=_key_file(tmp_path / "other.pem", private_pem(other)))

    assert "GATEWAY_PRIVATE_KEY_FILE is not the key whose public half" in said.line("token")
    assert said.line("key").startswith("key       ok")


@pytest.mark.parametrize(
    "damage", [(b"\n", b"\r\n"), (b"\n", b"\\n"), (b"\n", b"\\r\\n")], ids=["CRLF", "\\n", "\\r\\n"]
)
def test_key_as_pasted(run: Run, tmp_path: Path, damage: tuple[bytes, bytes]) -> None:
    """A key with CRLF or a literal backslash n works as it is."""

    pasted = private_pem(own_key()).replace(*damage)

    said = run("check", GATEWAY_PRIVATE_KEY_FILE=_key_file(tmp_path / "pasted.pem", pasted))

    assert said.line("token").startswith("token     ok")


def test_unusable_key(run: Run, tmp_path: Path) -> None:
    """A public key, no key and a locked one are each reported as what they are, with the setting."""

    locked = own_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"right"))
    file = tmp_path / "unusable.pem"

    public = run("check", GATEWAY_PRIVATE_KEY_FILE=_key_file(file, b"-----BEGIN PUBLIC KEY-----\nMII\n")).line("key")
    nothing = run("check", GATEWAY_PRIVATE_KEY_FILE=_key_file(file, b"hello")).line("key")
    without = run("check", GATEWAY_PRIVATE_KEY_FILE=_key_file(file, locked)).line("key")
    wrong = run("check", GATEWAY_PRIVATE_KEY_FILE=str(file), GATEWAY_PRIVATE_KEY_PASSPHRASE="wrong-one")
    right = run("check", GATEWAY_PRIVATE_KEY_FILE=str(file), GATEWAY_PRIVATE_KEY_PASSPHRASE="right")

    assert "GATEWAY_PRIVATE_KEY_FILE: it is a public key" in public
    assert "it is no PEM" in nothing
    assert "set GATEWAY_PRIVATE_KEY_PASSPHRASE" in without
    assert "correct GATEWAY_PRIVATE_KEY_PASSPHRASE" in wrong.line("key")
    assert "wrong-one" not in wrong.out
    assert right.line("token").startswith("token     ok")


def test_clock_that_is_refused(run: Run, simulated: Simulator) -> None:
    """A clock that the gateway does not take is reported as such, with the seconds."""

    simulated.replace(Script(clock_offset=1000))

    said = run("check")

    assert "set this machine's clock by NTP" in said.line("token")
    assert re.search(r"clock +warning +(99\d|100\d)\.\d s behind the gateway's \(± 0\.5 s\)", said.line("clock"))


def test_clock_that_is_still_taken(run: Run, simulated: Simulator) -> None:
    """A clock that is off but taken is a warning, and no failure of the token."""

    simulated.replace(Script(clock_offset=90))

    said = run("check")

    assert said.line("token").startswith("token     ok")
    assert re.match(r"clock     warning  (89|90)\.\d s behind", said.line("clock"))


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (Fault(html=403), "IP allow-list"),
        (Fault(html=302), "set GATEWAY_BASE_URL to the API's own address"),
        (Fault(code="4037300", message="Unauthorized. Client Forbidden Access API"), "ask the provider to enable it"),
        (Fault(code="5007300"), "says nothing about our settings"),
        (Fault(reset="before"), "it hung up"),
        (Fault(body="hello"), "this is not the gateway's API"),
    ],
    ids=["allow-list", "redirect", "forbidden", "general error", "reset", "no API"],
)
def test_what_stands_in_front(run: Run, simulated: Simulator, fault: Fault, cure: str) -> None:
    """What a firewall, a proxy or the gateway itself answers is distinguished from our own mistakes."""

    simulated.replace(Script(token_faults=(fault,)))

    assert cure in run("check").line("token")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority("authority", tmp_path)


@pytest.mark.parametrize(
    ("names", "trusted", "cure"),
    [(["127.0.0.1"], False, "set GATEWAY_CA_FILE"), (["gateway.example"], True, "another host name")],
    ids=["unknown CA", "another name"],
)
def test_certificates(run: Run, authority: Authority, names: list[str], trusted: bool, cure: str) -> None:
    """A certificate of an unknown authority is another mistake than one of another name."""

    trust = {"GATEWAY_CA_FILE": str(authority.file)} if trusted else {}

    with serving(always(answer()), tls=authority.server(*names)) as server:
        said = run("check", GATEWAY_BASE_URL=f"https://127.0.0.1:{server.port}/v1.0", **trust)

    assert cure in said.line("token")


def test_plain_http_to_an_https_port(run: Run, authority: Authority) -> None:
    """http:// to a port that speaks TLS sends to https://."""

    context = authority.server("127.0.0.1")
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    with serving(always(answer()), tls=context) as server:
        said = run("check", GATEWAY_BASE_URL=f"http://127.0.0.1:{server.port}/v1.0")

    assert "https" in said.line("token")


# --- what only an expire call shows


def test_probe_expires_the_bill(run: Run, simulated: Simulator) -> None:
    """`--probe` sends one real expire, says so before, and then that all is right."""

    said = run("check", "--probe", "PROBE-1")

    sending, result = (line for line in said.out.splitlines() if line.startswith("probe"))
    assert "sending  a real expire call for bill PROBE-1 of merchant 121000001" in sending
    assert result.startswith("probe     ok       the bill is expired now")
    assert simulated.report().calls_by_bill == {"PROBE-1": 1}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault(code="4049301", message="QR not Found"),
            "it does not know the bill; path, signature and channel are right",
        ),
        (Fault(code="4049314"), "the bill is paid"),
        (Fault(code="4039300"), "the bill had expired before"),
    ],
    ids=["unknown bill", "paid", "expired before"],
)
def test_probe_of_any_bill_proves_the_settings(run: Run, simulated: Simulator, fault: Fault, words: str) -> None:
    """A bill that is unknown, paid or expired shows as well that all settings are right."""

    simulated.replace(Script(bills={"PROBE-1": (fault,)}))

    line = run("check", "--probe", "PROBE-1").line("probe")

    assert line.startswith("probe     ok")
    assert words in line


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (Fault(code="4049308"), "correct GATEWAY_MERCHANT_ID"),
        (Fault(code="4039319"), "blacklisted"),
        (Fault(code="4049300"), "ask the provider to enable it for GATEWAY_CLIENT_ID"),
        (Fault(code="4009301"), "change GATEWAY_BILL_FIELD"),
        (Fault(html=403), "IP allow-list"),
        (Fault(code="5009300"), "says nothing about our settings"),
    ],
    ids=["merchant", "blacklisted", "forbidden", "bill field", "allow-list", "general error"],
)
def test_probe_tells_refusals_apart(run: Run, simulated: Simulator, fault: Fault, cure: str) -> None:
    """What the gateway refuses an expire for is reported with its cure, after one call."""

    simulated.replace(Script(bills={"PROBE-1": (fault,)}))

    said = run("check", "--probe", "PROBE-1")

    assert said.code == 1
    assert said.line("probe").startswith("probe     FAILED")
    assert cure in said.line("probe")
    assert simulated.report().expire_calls == 1


@pytest.mark.parametrize(
    ("changed", "cure", "calls"),
    [
        ({"GATEWAY_SIGN_PATH": f"/v1.0{EXPIRE}"}, f"set GATEWAY_SIGN_PATH={EXPIRE}:", 2),
        ({"GATEWAY_SIGNATURE": "rsa-sha256"}, "set GATEWAY_SIGNATURE=hmac-sha512:", 3),
        ({"GATEWAY_CLIENT_SECRET": "another"}, "GATEWAY_CLIENT_SECRET is wrong;", 6),
        ({"GATEWAY_CLIENT_SECRET": "another "}, "is wrong, and it begins or ends with a blank", 6),
        ({"GATEWAY_CHANNEL_ID": "1"}, "correct GATEWAY_CHANNEL_ID first", 1),
        ({"GATEWAY_CHANNEL_HEADERS": "X-CHANNEL"}, "then GATEWAY_CHANNEL_HEADERS", 1),
        ({"GATEWAY_EXPIRE_PATH": "/qr/qr-mpm-expire"}, "else see GATEWAY_EXPIRE_PATH", 0),
    ],
    ids=["signed path", "scheme", "secret", "secret with a blank", "channel", "channel header", "path"],
)  # fmt: skip
def test_probe_tells_wrong_settings_apart(
    run: Run, simulated: Simulator, changed: dict[str, str], cure: str, calls: int
) -> None:
    """A wrong signed path, scheme and secret are refused in the same words, and distinguished by trying the others."""

    said = run("check", "--probe", "PROBE-1", **changed)

    assert said.code == 1
    assert cure in said.line("probe")
    assert simulated.report().expire_calls == calls


def test_version_in_the_signed_path(run: Run, tmp_path: Path) -> None:
    """A provider that signs the version as well is found out by trying, too."""

    with Simulator(client_secret=SECRET, sign_path="/v1.0/qr/qr-mpm-expire-billnumber") as other:
        environment = other.environment(tmp_path / "key.pem") | {"GATEWAY_SIGN_PATH": ""}
        said = run("check", "--probe", "PROBE-1", **environment)

    assert "set GATEWAY_SIGN_PATH=/v1.0/qr/qr-mpm-expire-billnumber: signed so, the call is taken" in said.line("probe")


def test_probe_without_a_token(run: Run, simulated: Simulator) -> None:
    """Without a token nothing is sent."""

    said = run("check", "--probe", "PROBE-1", GATEWAY_CLIENT_ID="another")

    assert said.line("probe").startswith("probe     skipped")
    assert simulated.report().expire_calls == 0


@pytest.mark.parametrize("arguments", [("--probe", "a b"), ("--probe", "B", "--merchant-id", "ü")])
def test_probe_of_what_is_no_bill(run: Run, arguments: tuple[str, ...]) -> None:
    """A bill or merchant that cannot be one ends with exit code 2 before anything is looked at."""

    said = run("check", *arguments)

    assert (said.code, said.out) == (2, "")
    assert "printable ASCII" in said.err


# --- sign


def _headers(said: Said) -> dict[str, str]:
    pairs = (line.split(maxsplit=1)[1].split(": ", 1) for line in said.out.splitlines() if line.startswith("header"))
    return {name: value for name, value in pairs}  # noqa: C416  # mypy cannot tell that they are pairs


def test_sign_shows_everything_but_secrets(run: Run, simulated: Simulator) -> None:
    """String to sign, body and headers are printed, the token is a placeholder, and nothing reaches the gateway."""

    said = run("sign", "10092081", "--timestamp", "2026-11-22T12:00:00+07:00")

    body = '{"billnumber":"10092081","additionalInfo":{"merchantId":"121000001"}}'
    assert (said.code, said.err) == (0, "no expire was sent\n")
    assert f"body            {body}\n" in said.out
    signed = checks.string_to_sign(
        "hmac-sha512", EXPIRE_PATH, "ACCESS-TOKEN", body.encode(), "2026-11-22T12:00:00.000+07:00"
    )
    assert f"string to sign  {signed.decode()}\n" in said.out
    assert _headers(said)["X-SIGNATURE"] == "***"
    assert simulated.report().token_calls == simulated.report().expire_calls == 0


@pytest.mark.parametrize("scheme", checks.SIGNATURES)
def test_sign_is_what_the_gateway_checks(run: Run, simulated: Simulator, scheme: str) -> None:
    """What is printed is a signature by the gateway's own rule, under every scheme."""

    said = run("sign", "10092081", "--token", "tok", "--show-secrets", GATEWAY_SIGNATURE=scheme)

    headers = _headers(said)
    (body,) = re.findall(r"^body +(.*)$", said.out, re.MULTILINE)
    (text,) = re.findall(r"^string to sign +(.*)$", said.out, re.MULTILINE)
    signed = checks.string_to_sign(scheme, EXPIRE_PATH, "tok", body.encode(), headers["X-TIMESTAMP"])
    assert text == signed.decode()
    assert headers["Authorization"] == "Bearer tok"
    if scheme == "hmac-sha512":
        assert checks.hmac_signed(SECRET.encode(), signed, headers["X-SIGNATURE"])
    else:
        assert checks.rsa_signed(simulated.registration.public_key, signed, headers["X-SIGNATURE"])


def test_sign_without_a_token(run: Run) -> None:
    """Where the scheme has none, there is no Authorization, and the string to sign has no place for it."""

    said = run("sign", "10092081", GATEWAY_SIGNATURE="rsa-sha256-no-token", GATEWAY_CLIENT_SECRET="")

    assert said.code == 0
    assert "Authorization" not in _headers(said)
    assert "ACCESS-TOKEN" not in said.out


def test_check_without_a_token(run: Run, simulated: Simulator) -> None:
    """The same scheme: nobody is asked for a token, and all is ok."""

    said = run("check", GATEWAY_SIGNATURE="rsa-sha256-no-token", GATEWAY_CLIENT_SECRET="")

    assert "none is asked for" in said.line("token")
    assert simulated.report().token_calls == 0


def test_sign_with_a_real_token(run: Run, simulated: Simulator) -> None:
    """`--fetch-token` asks for one; it is shown only when asked for."""

    hidden = run("sign", "10092081", "--fetch-token")
    shown = run("sign", "10092081", "--fetch-token", "--show-secrets")

    assert _headers(hidden)["Authorization"] == "Bearer ***"
    assert ":***:" in hidden.out
    assert len(_headers(shown)["Authorization"]) > len("Bearer ") + 20
    assert (simulated.report().token_calls, simulated.report().expire_calls) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "changed", "code", "words"),
    [
        (("a b",), {}, 2, "BILL must be 1 to 64 printable ASCII"),
        (("1",), {"GATEWAY_MERCHANT_ID": ""}, 2, "give --merchant-id, or set GATEWAY_MERCHANT_ID"),
        (("1", "--timestamp", "noon"), {}, 2, "--timestamp: not an RFC 3339 time"),
        (("1", "--token", "t", "--fetch-token"), {}, 2, "exclude each other"),
        (("1",), {"GATEWAY_PRIVATE_KEY_FILE": "/nowhere"}, 2, "GATEWAY_PRIVATE_KEY_FILE: no such file"),
        (("1", "--fetch-token"), {"GATEWAY_CLIENT_ID": "another"}, 1, "correct GATEWAY_CLIENT_ID"),
    ],
    ids=["bill", "merchant", "time", "tokens", "key", "client"],
)
def test_sign_says_what_is_wrong(
    run: Run, arguments: tuple[str, ...], changed: dict[str, str], code: int, words: str
) -> None:
    """One line, what to do, and the exit code."""

    said = run("sign", *arguments, **changed)

    assert (said.code, said.out) == (code, "")
    assert words in said.err
    assert len(said.err.splitlines()) == 1
