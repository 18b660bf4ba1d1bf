"""SNAP signatures over the exact bytes that are sent (gateway-api: token service 73 and the transaction signature)."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from typing import Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

Scheme = Literal["hmac-sha512", "rsa-sha256", "rsa-sha256-no-token"]
Sign = Callable[[str, str, str, bytes, str], str]
"""``sign(method, path, access_token, body, timestamp)`` → the X-SIGNATURE header."""


class KeyUnusable(ValueError):
    """The PEM holds no RSA private key that can be used; the text says why and never shows the key."""


def load_private_key(pem: bytes, passphrase: str | None = None) -> RSAPrivateKey:
    """The RSA key of a PKCS#8 or PKCS#1 PEM, encrypted or not. Raises `KeyUnusable`.

    Keys pasted into environment files and secret stores arrive with CRLF or a literal ``\\n``: both are mended.
    """
    mended = pem.replace(b"\\r", b"").replace(b"\\n", b"\n").replace(b"\r\n", b"\n").strip() + b"\n"
    try:
        key = serialization.load_pem_private_key(mended, passphrase.encode() if passphrase else None)
    except TypeError:
        # cryptography says it this way both when a passphrase is missing and when one is given for nothing.
        raise KeyUnusable(
            "it needs a passphrase; set GATEWAY_PRIVATE_KEY_PASSPHRASE"
            if passphrase is None
            else "it has no passphrase; unset GATEWAY_PRIVATE_KEY_PASSPHRASE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable(_instead(mended)) from None
    if not isinstance(key, RSAPrivateKey):
        raise KeyUnusable("it is no RSA key; the gateway's scheme needs one")
    if key.key_size < 2048:
        raise KeyUnusable(f"it has {key.key_size} bits; the gateway's scheme needs at least 2048")
    return key


_INSTEAD: Final = (
    (b"BEGIN CERTIFICATE", "it is a certificate; give the private key that belongs to it"),
    (b"PUBLIC KEY", "it is a public key, which is for the gateway; give the private one"),
    (b"BEGIN OPENSSH", "it is in OpenSSH's own format; convert it: ssh-keygen -p -m PKCS8 -f KEY"),
    (b"ENCRYPTED", "its passphrase is another one; correct GATEWAY_PRIVATE_KEY_PASSPHRASE"),
)


def _instead(pem: bytes) -> str:
    """What bytes that are no readable key look like, and what to do. Never shows any of them."""
    for mark, text in _INSTEAD:
        if mark in pem:
            return text
    if pem.startswith(b"0\x82"):
        return "it is DER, not PEM; convert it: openssl pkey -inform DER -in KEY -out KEY.pem"
    if b"-----BEGIN" not in pem:
        return "it is no PEM: it has no line -----BEGIN PRIVATE KEY-----; give the whole file as it was made"
    if b"-----END" not in pem:
        return "it is cut off: its line -----END …----- is missing; give the whole file"
    return "it is no PEM private key: what is between BEGIN and END is damaged; copy the file again, as it is"


def token_signature(key: RSAPrivateKey, client_id: str, timestamp: str) -> str:
    """X-SIGNATURE of the token request: RSA-SHA256, PKCS#1 v1.5, over ``client_id|timestamp``."""
    return _rsa(key, f"{client_id}|{timestamp}")


def string_to_sign(method: str, path: str, access_token: str | None, body: bytes, timestamp: str) -> str:
    """``METHOD:path:token:lower(hex(sha256(body))):timestamp``; without the token where the scheme has none."""
    digest = hashlib.sha256(body).hexdigest()
    if access_token is None:
        return f"{method}:{path}:{digest}:{timestamp}"
    return f"{method}:{path}:{access_token}:{digest}:{timestamp}"


def text_to_sign(scheme: Scheme, method: str, path: str, access_token: str, body: bytes, timestamp: str) -> str:
    """`string_to_sign` under ``scheme``, with the token or without."""
    token = None if scheme == "rsa-sha256-no-token" else access_token
    return string_to_sign(method, path, token, body, timestamp)


def signer(scheme: Scheme, client_secret: str, key: RSAPrivateKey) -> Sign:
    """The function that signs transactions under ``scheme``."""
    match scheme:
        case "hmac-sha512":
            secret = client_secret.encode()
            return lambda method, path, token, body, timestamp: _b64(
                hmac.digest(secret, text_to_sign(scheme, method, path, token, body, timestamp).encode(), "sha512")
            )
        case "rsa-sha256" | "rsa-sha256-no-token":
            return lambda method, path, token, body, timestamp: _rsa(
                key, text_to_sign(scheme, method, path, token, body, timestamp)
            )


def _rsa(key: RSAPrivateKey, text: str) -> str:
    return _b64(key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
