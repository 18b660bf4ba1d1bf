"""SNAP signatures over the exact bytes that are sent (gateway-api, section 3)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from binascii import b2a_base64
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from worker.core.scheme import NO_TOKEN, Scheme

Sign = Callable[[str, str, str, bytes, str], str]
"""``sign(method, path, access_token, body, timestamp)`` → the X-SIGNATURE header."""


class KeyUnusable(ValueError):
    """The bytes hold no RSA private key that can be used; the text says why and never shows the key."""


_DASHES: Final = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_BLOCK: Final = re.compile(
    rf"[{_DASHES}]+\s*BEGIN ([A-Z0-9 ]*?)\s*[{_DASHES}]+(.*?)[{_DASHES}]+\s*END [A-Z0-9 ]*?\s*[{_DASHES}]+", re.DOTALL
)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{64,}")
_OF_URLS: Final = str.maketrans("-_", "+/")
_INVISIBLE: Final = str.maketrans("", "", "\u200b\u200c\u200d\u2060\ufeff")
_OLD_HEADERS: Final = re.compile(r"\s*Proc-Type:\s*(\S+)\s+DEK-Info:\s*(\S+)\s+(.*)", re.DOTALL)


def load_private_key(data: bytes, passphrase: str | None = None) -> RSAPrivateKey:
    """The RSA key of a file, encrypted or not. Raises `KeyUnusable`.

    The content counts, not its label or its wrapping: PKCS#8 or PKCS#1, in PEM, in DER or in bare base64, in UTF-8 or
    UTF-16. Keys that are pasted into environment files, secret stores and word processors arrive with CRLF or a literal
    ``\\n``, on one line, in quotes, with a byte-order mark or with typographic dashes: all of it is read.
    """
    text = _text_of(data)
    given = passphrase.encode() if passphrase else None
    try:
        key = _load(data, text, given)
    except TypeError:
        # cryptography says it this way both when a passphrase is missing and when one is given for nothing.
        raise KeyUnusable(
            "it needs a passphrase; set GATEWAY_PRIVATE_KEY_PASSPHRASE"
            if given is None
            else "it has no passphrase; unset GATEWAY_PRIVATE_KEY_PASSPHRASE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable(_instead(text)) from None
    if not isinstance(key, RSAPrivateKey):
        raise KeyUnusable("it is no RSA key; the gateway's scheme needs one")
    if key.key_size < 2048:
        raise KeyUnusable(f"it has {key.key_size} bits; the gateway's scheme needs at least 2048")
    return key


def _text_of(data: bytes) -> str:
    """The file as text, without what editors and secret stores put around it; empty for DER."""
    if data[:1] == b"0" and data[1:2] in (b"\x80", b"\x81", b"\x82", b"\x83"):
        return ""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if encoding != "utf-16" and data[1:2] == b"\0":
        encoding = "utf-16-le"
    elif data[:1] == b"\0":
        encoding = "utf-16-be"
    text = data.decode(encoding, "replace").translate(_INVISIBLE)
    for written, meant in (("\\r", ""), ("\\n", "\n"), ("\\/", "/"), ("\r\n", "\n")):
        text = text.replace(written, meant)
    return text.strip(" \t\r\n\"'`\u2018\u2019\u201c\u201d") + "\n"


def _load(data: bytes, text: str, passphrase: bytes | None) -> object:
    """Raises TypeError about the passphrase, and ValueError or UnsupportedAlgorithm for what is no key."""
    if not text:
        return serialization.load_der_private_key(data, passphrase)
    blocks = _BLOCK.findall(text)
    if not blocks:
        raw = _unwrapped(text)
        if raw is None:
            raise ValueError("no key")
        return _load(raw, _text_of(raw), passphrase)
    label, body = next((block for block in blocks if block[0].endswith("PRIVATE KEY")), blocks[0])
    if "," in body or not label.endswith("PRIVATE KEY") or label.startswith("OPENSSH"):
        # An old PEM with headers of its own (Proc-Type, DEK-Info), or no private key: read as it is labelled.
        headers = _OLD_HEADERS.fullmatch(body)
        if headers is not None:  # a blank line ends them, which is gone where all is on one line
            body = f"Proc-Type: {headers[1]}\nDEK-Info: {headers[2]}\n\n{''.join(headers[3].split())}"
        pem = f"-----BEGIN {label}-----\n{body.strip()}\n-----END {label}-----\n"
        return serialization.load_pem_private_key(pem.encode(), passphrase)
    return serialization.load_der_private_key(base64.b64decode("".join(body.split()), validate=True), passphrase)


def _unwrapped(text: str) -> bytes | None:
    """What base64 without BEGIN and END holds: the key, or a whole file; None for what is no base64."""
    whole = "".join(text.split()).rstrip("=").translate(_OF_URLS)
    if "-----" in text or not _BASE64.fullmatch(whole) or len(whole) % 4 == 1:
        return None
    return base64.b64decode(whole + "=" * (-len(whole) % 4))


_INSTEAD: Final = {
    "BEGIN (?:TRUSTED |X509 )?CERT": "it is a certificate; give the private key that belongs to it",
    "PUBLIC KEY": "it is a public key, which is for the gateway; give the private one",
    "BEGIN OPENSSH": "it is in OpenSSH's own format; convert it: ssh-keygen -p -m PKCS8 -f KEY",
    "BEGIN PGP": "it is a PGP key; the gateway's scheme needs an RSA key in PEM",
    "BEGIN PKCS12|BEGIN PKCS7": "it is a bundle; extract the key: openssl pkcs12 -in FILE -nocerts -nodes",
    "ENCRYPTED": "its passphrase is another one; correct GATEWAY_PRIVATE_KEY_PASSPHRASE",
}


def _instead(text: str) -> str:
    """What content that is no readable key looks like, and what to do. Never shows any of it."""
    if not text:
        return "it is DER that holds no private key, or an encrypted one with another passphrase; give the private key"
    if not text.strip():
        return "it is empty; give the whole file as it was made"
    for mark, words in _INSTEAD.items():
        if re.search(mark, text):
            return words
    if "BEGIN" not in text and _unwrapped(text) is not None:
        return "it is base64 of no private key, or of an encrypted one with another passphrase; give the private key"
    if "BEGIN" not in text:
        return "it is no PEM: it has no line -----BEGIN PRIVATE KEY-----; give the whole file as it was made"
    if "END" not in text.partition("BEGIN")[2]:
        return "it is cut off: its line -----END …----- is missing; give the whole file"
    return "it is no PEM private key: what is between BEGIN and END is damaged; copy the file again, as it is"


def token_signature(key: RSAPrivateKey, client_id: str, timestamp: str) -> str:
    """X-SIGNATURE of the token request: RSA-SHA256, PKCS#1 v1.5, over ``client_id|timestamp``."""
    return _rsa(key, f"{client_id}|{timestamp}")


def string_to_sign(scheme: Scheme, method: str, path: str, access_token: str, body: bytes, timestamp: str) -> str:
    """``METHOD:path:token:lower(hex(sha256(body))):timestamp``; without the token where the scheme has none."""
    digest = hashlib.sha256(body).hexdigest()
    if scheme == NO_TOKEN:
        return f"{method}:{path}:{digest}:{timestamp}"
    return f"{method}:{path}:{access_token}:{digest}:{timestamp}"


def signer(scheme: Scheme, client_secret: str, key: RSAPrivateKey) -> Sign:
    """The function that signs transactions under ``scheme``. ``client_secret`` is empty where it has none."""
    match scheme:
        case "hmac-sha512":
            keyed = hmac.new(client_secret.encode(), digestmod="sha512")  # to make it takes as long as the rest

            def sign(method: str, path: str, token: str, body: bytes, timestamp: str) -> str:
                code = keyed.copy()
                code.update(string_to_sign(scheme, method, path, token, body, timestamp).encode())
                return b2a_base64(code.digest(), newline=False).decode("ascii")

            return sign
        case "rsa-sha256" | "rsa-sha256-no-token":
            return lambda method, path, token, body, timestamp: _rsa(
                key, string_to_sign(scheme, method, path, token, body, timestamp)
            )


def _rsa(key: RSAPrivateKey, text: str) -> str:
    return base64.b64encode(key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())).decode("ascii")
