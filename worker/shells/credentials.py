"""What proves who we are, read from files that may be rotated while we run."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from worker.core.signing import KeyUnusable, load_private_key, signer, token_signature
from worker.shells.transport import Unusable, trust

if TYPE_CHECKING:
    from worker.settings import GatewaySettings, Secret

log = structlog.get_logger()

KEPT: Final = "correct the mounted file; until then the old values are used, and the file is tried again"

_Stamp = tuple[tuple[int, int, int] | None, ...]


class CredentialsError(ValueError):
    """They cannot be used: one line, the variable's name first; never a secret."""


class Credentials:
    """Client secret, private key, CA and client certificate as they are now. `refresh` reads again what changed on
    disk; what cannot be used is refused with a log line, the old set stays, and the files are tried again until they
    can be used. Reading attributes is safe from any thread."""

    def __init__(self, settings: GatewaySettings, reread: Callable[[], GatewaySettings]) -> None:
        self._reread = reread
        self._files = [value for value in vars(settings).values() if isinstance(value, Path)]
        self._stamp = _stamp(self._files)
        self._problem = ""
        self._load(settings)

    @property
    def key_bits(self) -> int:
        """Size of the private key."""
        return self._key.key_size

    def token_signature(self, client_id: str, timestamp: str) -> str:
        """Signs token requests."""
        return token_signature(self._key, client_id, timestamp)

    def refresh(self, *, asked: bool = False) -> bool:
        """Looks whether a file changed (a mounted secret is swapped by renaming a link), and takes it over. When an
        operator ``asked`` for it, all are read again. True when a new set is in force.

        Files that could not be used are tried at every call: what helps them (a permission, a second file that belongs
        to the first) need not change what `_stamp` sees.
        """
        stamp = _stamp(self._files)
        if stamp == self._stamp and not self._problem and not asked:
            return False
        try:
            self._load(self._reread())
        except Exception as error:  # noqa: BLE001  # SettingsError, CredentialsError, OSError: all mean "not usable"
            if stamp != self._stamp or str(error) != self._problem:
                log.error("credentials.kept", reason=str(error), action=KEPT)
            self._stamp, self._problem = stamp, str(error)
            return False
        self._stamp, self._problem = stamp, ""
        log.info("credentials.reloaded")
        return True

    def _load(self, settings: GatewaySettings) -> None:
        """Takes over one consistent set: nothing of it before all of it could be read. Raises `CredentialsError`."""
        passphrase, secret = _text(settings.private_key_passphrase), _text(settings.client_secret)
        key = _key(settings, passphrase or None)
        context: ssl.SSLContext | None = None
        if settings.base_url.startswith("https"):
            try:
                context = trust(settings.ca_file, settings.cert_file, settings.key_file)
            except Unusable as error:
                raise CredentialsError(f"{settings.variable(error.setting)}: {error}") from None
        sign = signer(settings.signature, secret, key)
        shared = secret.encode() or key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        self._key = key
        self.sign = sign
        """Signs expire calls."""
        self.context = context
        """Trust for https and the client certificate; the same object until a file was rotated. None for plain http."""
        self.secrets = tuple(filter(None, (secret, passphrase)))
        """What must not be in any text, even if the gateway sends it to us."""
        self.shared = shared
        """What all processes with our credentials have and nobody else: the client secret, without one the key."""


def _stamp(files: Sequence[Path]) -> _Stamp:
    """Changes when any file does: inode, size and time of what each path leads to now."""

    def one(path: Path) -> tuple[int, int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    return tuple(one(path) for path in files)


def _text(secret: Secret | None) -> str:
    return "" if secret is None else secret.get_secret_value()


def _key(settings: GatewaySettings, passphrase: str | None) -> RSAPrivateKey:
    if settings.private_key is not None:
        variable, data = "GATEWAY_PRIVATE_KEY", settings.private_key.get_secret_value().encode()
    else:
        assert settings.private_key_file is not None  # one of the two is set
        variable = "GATEWAY_PRIVATE_KEY_FILE"
        try:
            data = settings.private_key_file.read_bytes()
        except OSError as error:
            raise CredentialsError(f"{variable}: cannot be read ({error.strerror})") from None
    try:
        return load_private_key(data, passphrase)
    except KeyUnusable as error:
        raise CredentialsError(f"{variable}: {error}") from None
