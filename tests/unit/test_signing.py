"""Signatures: known answers from public documentation, and the keys people really have."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from worker.core.scheme import Scheme, oddity_of
from worker.core.signing import (
    KeyUnusable,
    load_private_key,
    signer,
    string_to_sign,
    token_signature,
)

VECTORS: dict[str, dict[str, Any]] = {
    vector["id"]: vector for vector in json.loads((Path(__file__).parent / "signing_vectors.json").read_bytes())
}
HMAC_VECTOR = VECTORS["midtrans-symmetric-node"]
RSA_VECTOR = VECTORS["midtrans-notify-sign-node"]
HASH_VECTOR = VECTORS["doku-body-hash"]
PLAIN = NoEncryption()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@cache
def key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key of the tests' own."""
    return rsa.generate_private_key(65_537, bits)


def pem(format_: PrivateFormat = PrivateFormat.PKCS8, encryption: KeySerializationEncryption = PLAIN) -> bytes:
    """The key as files hold it."""
    return key().private_bytes(Encoding.PEM, format_, encryption)


def assert_signed(public: rsa.RSAPublicKey, signature: str, text: str) -> None:
    """The signature is RSA-SHA256, PKCS#1 v1.5, over the text."""
    public.verify(base64.b64decode(signature, validate=True), text.encode(), padding.PKCS1v15(), hashes.SHA256())


def test_hmac_known_answer() -> None:
    """HMAC-SHA512 gives the published signature for the published input."""

    inputs = HMAC_VECTOR["inputs"]
    body = inputs["body_minified"].encode()
    sign = signer("hmac-sha512", inputs["client_secret"], key())

    signature = sign(inputs["method"], inputs["path"], inputs["access_token"], body, inputs["timestamp"])

    assert signature == HMAC_VECTOR["expected"]


@pytest.mark.parametrize(("vector", "scheme"), [(HMAC_VECTOR, "hmac-sha512"), (RSA_VECTOR, "rsa-sha256-no-token")])
def test_string_to_sign_known_answer(vector: dict[str, Any], scheme: Scheme) -> None:
    """The string to sign is the published one, with the token and without."""

    inputs = vector["inputs"]
    body = inputs["body_minified"].encode()

    text = string_to_sign(scheme, inputs["method"], inputs["path"], "myaccesstoken", body, inputs["timestamp"])

    assert text == vector["intermediate"]["string_to_sign"]


@pytest.mark.parametrize("vector", [HMAC_VECTOR, RSA_VECTOR])
def test_vectors_are_minified(vector: dict[str, Any]) -> None:
    """The published compact body is the published body without the blanks outside its values."""

    inputs = vector["inputs"]

    assert json.dumps(json.loads(inputs["body_raw"]), separators=(",", ":")) == inputs["body_minified"]


def test_rsa_known_answer() -> None:
    """The published RSA signature is one over our string to sign."""

    inputs = RSA_VECTOR["inputs"]
    public = serialization.load_pem_public_key(inputs["public_key_pem"].encode())
    assert isinstance(public, rsa.RSAPublicKey)
    body = inputs["body_minified"].encode()
    text = string_to_sign("rsa-sha256-no-token", inputs["method"], inputs["path"], "", body, inputs["timestamp"])

    assert_signed(public, RSA_VECTOR["expected"], text)
    with pytest.raises(InvalidSignature):
        assert_signed(public, RSA_VECTOR["expected"], text + " ")


def test_body_hash_known_answer() -> None:
    """The body's hash is lower-case hex of SHA-256 over its very bytes, blanks inside values kept."""

    body = HASH_VECTOR["inputs"]["body_minified"].encode()

    assert string_to_sign("rsa-sha256-no-token", "POST", "/p", "", body, "t") == f"POST:/p:{HASH_VECTOR['expected']}:t"


@given(TEXTS, TEXTS, st.binary(max_size=50), TEXTS)
def test_hmac_is_over_five_parts(secret: str, token: str, body: bytes, moment: str) -> None:
    """Under hmac-sha512 secret and string are UTF-8, and the token is part of the string."""

    text = f"POST:/qr:{token}:{hashlib.sha256(body).hexdigest()}:{moment}"
    expected = base64.b64encode(hmac.new(secret.encode(), text.encode(), "sha512").digest()).decode()

    assert signer("hmac-sha512", secret, key())("POST", "/qr", token, body, moment) == expected


@pytest.mark.parametrize(("scheme", "parts"), [("rsa-sha256", "POST:/qr:tok"), ("rsa-sha256-no-token", "POST:/qr")])
def test_rsa_schemes(scheme: Scheme, parts: str) -> None:
    """The RSA schemes differ in the token only."""

    signature = signer(scheme, "secret", key())("POST", "/qr", "tok", b"{}", "t")

    assert_signed(key().public_key(), signature, f"{parts}:{hashlib.sha256(b'{}').hexdigest()}:t")


def test_token_signature() -> None:
    """The token request is signed over client id, a bar and the timestamp."""

    signature = token_signature(key(), "client-1", "2026-11-22T12:00:00.000+07:00")

    assert_signed(key().public_key(), signature, "client-1|2026-11-22T12:00:00.000+07:00")


def bare(raw: bytes) -> bytes:
    """What stands between BEGIN and END."""
    return b"".join(raw.strip().split(b"\n")[1:-1])


def relabelled(raw: bytes) -> bytes:
    """PKCS#8 under the label of PKCS#1, and the reverse."""
    if b"RSA PRIVATE KEY" in raw:
        return raw.replace(b"RSA PRIVATE KEY", b"PRIVATE KEY")
    return raw.replace(b"PRIVATE KEY", b"RSA PRIVATE KEY")


PASTED: dict[str, Callable[[bytes], bytes]] = {
    "clean": lambda raw: raw,
    "crlf": lambda raw: raw.replace(b"\n", b"\r\n"),
    "cr": lambda raw: raw.replace(b"\n", b"\r"),
    "literal": lambda raw: raw.replace(b"\n", b"\\n"),
    "literal crlf": lambda raw: raw.replace(b"\n", b"\\r\\n"),
    "blanks": lambda raw: b"\n  " + raw.strip(),
    "indented": lambda raw: raw.replace(b"\n", b"\n    "),
    "one line": lambda raw: raw.replace(b"\n", b" "),
    "other label": relabelled,
    "bare base64": bare,
    "bare base64 in lines": lambda raw: b"\n".join(raw.strip().split(b"\n")[1:-1]) + b"\n",
    "base64 of the file": base64.b64encode,
    "base64 of the file in lines": base64.encodebytes,
    "der": lambda raw: base64.b64decode(bare(raw)),
    "byte-order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "utf-16": lambda raw: raw.decode().encode("utf-16"),
    "utf-16 without a mark": lambda raw: raw.decode().encode("utf-16-le"),
    "utf-16, big end first": lambda raw: raw.decode().encode("utf-16-be"),
    "quotes": lambda raw: b'"' + raw.strip() + b'"',
    "single quotes": lambda raw: b"'" + raw + b"'\n",
    "typographic quotes": lambda raw: f"\u201c{raw.decode()}\u201d".encode(),
    "dashes of a word processor": lambda raw: raw.replace(b"-----", "\u2014\u2014-".encode()),
    "invisible blanks": lambda raw: raw.replace(b"\n", "\u200b\n".encode()),
    "slashes escaped, as in JSON": lambda raw: raw.replace(b"\n", b"\\n").replace(b"/", b"\\/"),
    "bare base64 for URLs": lambda raw: bare(raw).translate(bytes.maketrans(b"+/", b"-_")),
    "bare base64 without padding": lambda raw: bare(raw).rstrip(b"="),
    "base64 of the file without padding": lambda raw: base64.b64encode(raw).rstrip(b"="),
    "base64 of base64": lambda raw: base64.b64encode(base64.b64encode(raw)),
    "other dashes": lambda raw: raw.replace(b"-----", ("\u2013" * 5).encode()),
    "behind a certificate": lambda raw: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" + raw,
    "with attributes": lambda raw: b"Bag Attributes\n    localKeyID: 01\nKey Attributes: <No Attributes>\n" + raw,
}


@pytest.mark.parametrize("format_", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("damage", PASTED.values(), ids=PASTED.keys())
def test_keys_as_people_paste_them(format_: PrivateFormat, damage: Callable[[bytes], bytes]) -> None:
    """PKCS#8 and PKCS#1 are read by their content, whatever an editor or a secret store has made of the file."""

    assert load_private_key(damage(pem(format_))).private_numbers() == key().private_numbers()


@pytest.mark.parametrize("damage", ["clean", "crlf", "utf-16", "bare base64", "der", "dashes of a word processor"])
def test_encrypted_keys_as_people_paste_them(damage: str) -> None:
    """The same with a passphrase."""
    raw = PASTED[damage](pem(PrivateFormat.PKCS8, BestAvailableEncryption(b"right")))

    assert load_private_key(raw, "right").private_numbers() == key().private_numbers()


@pytest.mark.parametrize("format_", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_encrypted_keys(format_: PrivateFormat) -> None:
    """An encrypted key opens with its passphrase."""

    raw = pem(format_, BestAvailableEncryption("päss".encode()))

    assert load_private_key(raw, "päss").private_numbers() == key().private_numbers()


@pytest.mark.parametrize("damage", ["clean", "one line", "literal crlf", "base64 of the file", "indented"])
def test_old_encrypted_keys_as_people_paste_them(damage: str) -> None:
    """PKCS#1 with a passphrase has headers of its own, which a blank line ends."""
    raw = PASTED[damage](pem(PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"right")))

    assert load_private_key(raw, "right").private_numbers() == key().private_numbers()


@cache
def unusable() -> dict[str, tuple[bytes, str | None, str]]:
    """Keys that cannot be used, the passphrase, and a word of the reason."""
    locked = pem(encryption=BestAvailableEncryption(b"right"))
    return {
        "no passphrase": (locked, None, "needs a passphrase"),
        "empty passphrase": (locked, "", "needs a passphrase"),
        "wrong passphrase": (locked, "wrong", "correct GATEWAY_PRIVATE_KEY_PASSPHRASE"),
        "passphrase for nothing": (pem(), "right", "has no passphrase"),
        "public": (
            key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            None,
            "public key.*give the private one",
        ),
        "certificate": (pem().replace(b"PRIVATE KEY", b"CERTIFICATE"), None, "is a certificate"),
        "openssh": (
            ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, PLAIN)[:200],
            None,
            "ssh-keygen -p -m PKCS8",
        ),
        "DER of a public key": (
            key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            None,
            "give the private key",
        ),
        "a request": (pem().replace(b"PRIVATE KEY", b"CERTIFICATE REQUEST"), None, "give the private key"),
        "without its first line": (pem().split(b"\n", 1)[1], None, "no line -----BEGIN PRIVATE KEY-----"),
        **{
            f"without its first line, {cut} letters less": (
                pem().split(b"\n", 1)[1][cut:],
                None,
                "no line -----BEGIN PRIVATE KEY-----",
            )
            for cut in (1, 2, 3)
        },
        "damaged": (pem()[:80] + b"????" + pem()[84:], None, "damaged"),
        "elliptic": (
            ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, PLAIN),
            None,
            "no RSA key",
        ),
        "short": (key(1024).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, PLAIN), None, "1024 bits"),
        "empty": (b"", None, "is empty"),
        "blank lines": (b" \n" * 40, None, "is empty"),
        "wrong passphrase of bare base64": (bare(locked), "wrong", "passphrase"),
        "base64 of a public key": (
            bare(key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
            None,
            "give the private key",
        ),
        "cut": (pem()[:400], None, "cut off"),
    }


@pytest.mark.parametrize("case", sorted(unusable()))
def test_unusable_keys(case: str) -> None:
    """A key that cannot be used is refused with the reason, and without the key or the passphrase."""

    raw, passphrase, reason = unusable()[case]

    with pytest.raises(KeyUnusable, match=reason) as refused:
        load_private_key(raw, passphrase)
    assert not raw.strip() or raw[40:60].decode("latin-1") not in str(refused.value)
    assert "right" not in str(refused.value)


@given(st.binary(max_size=200), st.none() | st.text(max_size=10))
def test_any_bytes_as_a_key(raw: bytes, passphrase: str | None) -> None:
    """Bytes that are no key are refused, and nothing else is raised."""

    with pytest.raises(KeyUnusable):
        load_private_key(b"-----BEGIN PRIVATE KEY-----\n" + raw, passphrase)


@pytest.mark.parametrize(
    ("secret", "oddity"),
    [
        ("plain", ""),
        ('it\'s "fine"', ""),
        ("\ufeffsecret", "byte-order mark"),
        (" secret", "blank"),
        ("secret\n", "line break"),
        ("s\0e\0c\0r\0e\0t\0", "UTF-8"),
        ('"secret"', "quotes"),
        ("'secret'", "quotes"),
        ("\u201csecret\u201d", "quotes"),
    ],
)
def test_oddities_of_secrets(secret: str, oddity: str) -> None:
    """What an editor or a shell has added to a secret is named, and the secret is not."""

    found = oddity_of(secret)

    assert oddity in found
    assert bool(found) == bool(oddity)
    assert "secret" not in found
