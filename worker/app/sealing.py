"""A token on its way between two processes: AES-256-GCM under a key that only the client's own secret gives."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PURPOSE: Final = b"qris-expire fleet token v1"
NONCE: Final = 12  # bytes, as AES-GCM wants them


class Sealing:
    """``secret``: what all processes of the fleet have and nobody else, as it is now; it may be rotated. ``scope``:
    what the token is for (base URL, prefix, client); a sealed token is good for nothing else."""

    def __init__(self, secret: Callable[[], bytes], scope: tuple[str, ...]) -> None:
        self._secret = secret
        self._scope = scope
        self._known: tuple[bytes, AESGCM] | None = None

    def close(self, value: str, generation: int) -> str:
        """Base64 of nonce and ciphertext. Each call has a new nonce."""
        nonce = os.urandom(NONCE)
        return b64encode(nonce + self._cipher().encrypt(nonce, value.encode(), self._bound(generation))).decode()

    def open(self, sealed: str, generation: int) -> str | None:
        """The value; None for what was sealed with another secret, for something else, or was changed on the way."""
        try:
            data = b64decode(sealed, validate=True)
            return self._cipher().decrypt(data[:NONCE], data[NONCE:], self._bound(generation)).decode()
        except (ValueError, InvalidTag):
            return None

    def _cipher(self) -> AESGCM:
        secret = self._secret()
        if self._known is None or self._known[0] != secret:
            key = HKDF(SHA256(), 32, salt=None, info=PURPOSE).derive(secret)
            self._known = secret, AESGCM(key)
        return self._known[1]

    def _bound(self, generation: int) -> bytes:
        return "\n".join((*self._scope, str(generation))).encode()
