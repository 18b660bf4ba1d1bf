"""The client's key pair, for simulators that are given none."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

_PAIR_LOCK: Final = threading.Lock()


@functools.cache
def _generated() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def own_key() -> rsa.RSAPrivateKey:
    """The RSA-2048 pair of simulators without a given key: one per process, since making it takes a while."""
    with _PAIR_LOCK:
        return _generated()


def private_pem(key: rsa.RSAPrivateKey) -> bytes:
    """An unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private(path: Path, pem: bytes) -> None:
    """Writes a key that only its owner may read. A link is not followed: it may lead to a file that matters."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(pem)
