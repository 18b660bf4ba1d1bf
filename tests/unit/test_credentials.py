"""What proves who we are: taken over when its files change, and kept when they cannot be used."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.servers import Authority
from worker.sandbox.simulator import own_key, private_pem
from worker.settings import AmqpSettings, GatewaySettings, load
from worker.shells.amqp.session import tls_context
from worker.shells.credentials import Credentials, CredentialsError


class Mounted:
    """The files of a gateway's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority("ours", folder)
        self.environ = {
            "GATEWAY_BASE_URL": "https://gateway.example/v1.0",
            "GATEWAY_CLIENT_ID": "client",
            "GATEWAY_CHANNEL_ID": "95051",
        }
        self.put("CLIENT_SECRET", b"first\n")
        self.put("PRIVATE_KEY", private_pem(own_key()))

    def put(self, name: str, content: bytes) -> Path:
        """Mounts a file, as a volume of secrets does: by renaming."""
        file = self.folder / name
        self.environ[f"GATEWAY_{name}_FILE"] = str(file)
        (self.folder / "new").write_bytes(content)
        (self.folder / "new").replace(file)
        return file

    def put_certificate(self, files: tuple[Path, Path]) -> None:
        self.put("CERT", files[0].read_bytes())
        self.put("KEY", files[1].read_bytes())

    def settings(self) -> GatewaySettings:
        return load(GatewaySettings, environ=self.environ, env_file=None)

    def credentials(self) -> Credentials:
        settings = self.settings()
        return Credentials(settings, settings.reread)


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    """A secret and a key."""
    return Mounted(tmp_path)


def kept(lines: list[MutableMapping[str, Any]]) -> list[str]:
    return [line["reason"] for line in lines if line["event"] == "credentials.kept"]


def test_a_rotated_secret_is_taken_over(mounted: Mounted) -> None:
    """Once, and only when its file changed."""
    credentials = mounted.credentials()

    assert not credentials.refresh()
    mounted.put("CLIENT_SECRET", b"second\n")
    assert credentials.refresh()
    assert credentials.secrets == ("second",)
    assert not credentials.refresh()


def test_a_file_that_could_not_be_read_is_read_once_it_can(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission that is given later changes neither the content nor the time of a file."""
    credentials = mounted.credentials()
    file = mounted.put("CLIENT_SECRET", b"second\n")
    before, opened = file.stat(), Path.open

    def denied(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **options)

    with structlog.testing.capture_logs() as lines:
        with monkeypatch.context() as forbidden:
            forbidden.setattr(Path, "open", denied)
            assert [credentials.refresh() for _ in range(3)] == [False] * 3
        assert credentials.secrets == ("first",)
        assert file.stat() == before
        assert credentials.refresh()

    assert credentials.secrets == ("second",)
    assert len(kept(lines)) == 1
    assert "cannot be read (Permission denied)" in kept(lines)[0]


def test_two_files_that_are_rotated_one_after_the_other(mounted: Mounted) -> None:
    """A certificate without its key is not used, and both are once the key is there."""
    mounted.put_certificate(mounted.authority.issue("old"))
    credentials = mounted.credentials()
    context, (certificate, key) = credentials.context, mounted.authority.issue("new")

    with structlog.testing.capture_logs() as lines:
        mounted.put("CERT", certificate.read_bytes())
        assert not credentials.refresh()
        assert credentials.context is context
        mounted.put("KEY", key.read_bytes())
        assert credentials.refresh()

    assert credentials.context is not context
    assert kept(lines) == ["GATEWAY_KEY_FILE: is not the key of the certificate in GATEWAY_CERT_FILE"]


def test_the_context_trusts_no_common_name(mounted: Mounted) -> None:
    """A certificate names its host in subjectAltName, the gateway's as well as the broker's."""
    context = mounted.credentials().context
    broker = tls_context(load(AmqpSettings, environ={"AMQP_URL": "amqps://broker.example"}, env_file=None))

    assert isinstance(context, ssl.SSLContext)
    assert not context.hostname_checks_common_name
    assert not broker.hostname_checks_common_name


ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("CERT", b"rubbish", "GATEWAY_CERT_FILE: holds no certificate in PEM"),
        ("KEY", b"rubbish", "GATEWAY_KEY_FILE: holds no private key in PEM"),
        ("KEY", ENCRYPTED, "GATEWAY_KEY_FILE: is encrypted; decrypt it"),
        ("CA", b"rubbish", "GATEWAY_CA_FILE: holds no CA certificate in PEM"),
        ("PRIVATE_KEY", b"rubbish", "GATEWAY_PRIVATE_KEY_FILE: it is no PEM"),
    ],
)
def test_what_cannot_be_used_is_named(mounted: Mounted, name: str, content: bytes, problem: str) -> None:
    """By its variable, with what is wrong; the content stays out of it, and nobody is asked for a passphrase."""
    mounted.put_certificate(mounted.authority.issue("worker"))
    mounted.put(name, content)

    with pytest.raises(CredentialsError, match=problem) as refused:
        mounted.credentials()
    assert "rubbish" not in str(refused.value)


def test_a_key_in_its_variable(mounted: Mounted) -> None:
    """Its text is read like a file's, with line ends that a secret store has escaped."""
    del mounted.environ["GATEWAY_PRIVATE_KEY_FILE"]
    mounted.environ["GATEWAY_PRIVATE_KEY"] = private_pem(own_key()).decode().replace("\n", "\\n")

    assert mounted.credentials().key_bits == own_key().key_size
    mounted.environ["GATEWAY_PRIVATE_KEY"] = "rubbish"
    with pytest.raises(CredentialsError, match=r"\AGATEWAY_PRIVATE_KEY: it is no PEM"):
        mounted.credentials()
