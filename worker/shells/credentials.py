"""What proves who we are, read from files that may be rotated while we run."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from worker.core.signing import KeyUnusable, Sign, load_private_key, signer, token_signature
from worker.shells.transport import trust

if TYPE_CHECKING:
    from worker.settings import GatewaySettings

log = structlog.get_logger()

KEPT: Final = "mend the mounted file; the old values stay in force"

_Stamp = tuple[tuple[int, int, int] | None, ...]


class CredentialsError(ValueError):
    """They cannot be used: one line, the variable's name first; never a secret."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One consistent set: senders see the old one or the new one, never a mixture."""

    key: RSAPrivateKey
    sign: Sign
    context: ssl.SSLContext | None


class Credentials:
    """Client secret, private key and CA as they are now. `refresh` re-reads what changed on disk; what cannot be used
    is refused with a log line, and the old set stays. Reading attributes is safe from any thread."""

    def __init__(self, settings: GatewaySettings, reread: Callable[[], GatewaySettings]) -> None:
        self._reread = reread
        self._files = _files(settings)
        self._stamp = _stamp(self._files)
        self._loaded = _load(settings)

    @property
    def sign(self) -> Sign:
        """Signs expire calls."""
        return self._loaded.sign

    @property
    def context(self) -> ssl.SSLContext | None:
        """Trust for https; the same object until a CA file was rotated. None for plain http."""
        return self._loaded.context

    @property
    def key_bits(self) -> int:
        """Size of the private key."""
        return self._loaded.key.key_size

    def token_signature(self, client_id: str, timestamp: str) -> str:
        """Signs token requests."""
        return token_signature(self._loaded.key, client_id, timestamp)

    def refresh(self) -> bool:
        """Looks whether a file changed (a mounted secret is swapped by renaming a link) and takes it over. True when a
        new set is in force."""
        stamp = _stamp(self._files)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self._loaded = _load(self._reread())
        except Exception as error:  # noqa: BLE001  # SettingsError, CredentialsError, OSError: all mean "not usable"
            log.error("credentials.kept", reason=str(error), action=KEPT)
            return False
        log.info("credentials.reloaded")
        return True


def _files(settings: GatewaySettings) -> Sequence[Path]:
    return [
        path
        for path in (
            settings.client_secret_file,
            settings.private_key_file,
            settings.private_key_passphrase_file,
            settings.ca_file,
        )
        if path is not None
    ]


def _stamp(files: Sequence[Path]) -> _Stamp:
    """Changes when any file does: inode, size and time of what each path leads to now."""

    def one(path: Path) -> tuple[int, int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    return tuple(one(path) for path in files)


def _load(settings: GatewaySettings) -> _Loaded:
    passphrase = settings.private_key_passphrase
    try:
        pem = settings.private_key_file.read_bytes()
        key = load_private_key(pem, None if passphrase is None else passphrase.get_secret_value())
    except KeyUnusable as error:
        raise CredentialsError(f"GATEWAY_PRIVATE_KEY_FILE: {error}") from None
    except OSError as error:
        raise CredentialsError(f"GATEWAY_PRIVATE_KEY_FILE: cannot be read ({error.strerror})") from None
    context = None
    if settings.base_url.startswith("https"):
        try:
            context = trust(settings.ca_file)
        except (ssl.SSLError, OSError):
            raise CredentialsError("GATEWAY_CA_FILE: holds no CA certificate in PEM") from None
    return _Loaded(key, signer(settings.signature, settings.client_secret.get_secret_value(), key), context)
