"""The ways to sign that a gateway may want, and what each needs; without the code that signs, which is heavy."""

from __future__ import annotations

from typing import Final, Literal

Scheme = Literal["hmac-sha512", "rsa-sha256", "rsa-sha256-no-token"]

WITH_SECRET: Final = "hmac-sha512"
"""The only scheme that signs with the client secret; the others need none."""
NO_TOKEN: Final = "rsa-sha256-no-token"
"""A gateway with this scheme has no token service: no token is asked for, and no Authorization is sent."""

_QUOTES: Final = {('"', '"'), ("'", "'"), ("`", "`"), ("\u201c", "\u201d"), ("\u2018", "\u2019")}


def oddity_of(secret: str) -> str:
    """What a pasted secret has too much, and what to do; empty when nothing."""
    if secret.startswith("\ufeff"):
        return "it begins with a byte-order mark; save the file without one"
    if secret != secret.strip():
        return "it begins or ends with a blank or a line break; remove that, unless it belongs to it"
    if not secret.isprintable():
        return "it holds characters that cannot be printed; save it as UTF-8 text"
    if len(secret) > 2 and (secret[0], secret[-1]) in _QUOTES:
        return "it stands in quotes; remove them, unless they belong to it"
    return ""
