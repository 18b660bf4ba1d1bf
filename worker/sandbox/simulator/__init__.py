"""The payment gateway, simulated: an HTTP server that checks what the gateway checks, and fails on request.

A request goes one way:

    bytes (`server`) → Request → Claim (`checks`, pure) → `books`: tokens, ids, bills, `script` → Fault → bytes

`Fault` is anything but a plain success: a refusal that the checks ask for, or what the script asks for.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, generate_private_key

from worker.sandbox.simulator.books import Books, Call, SimulatorReport
from worker.sandbox.simulator.checks import SIGNATURES, Registration
from worker.sandbox.simulator.script import PLAIN, Fault, Pattern, Rate, Script, ScriptError
from worker.sandbox.simulator.server import Server

__all__ = [
    "EXPIRE_PATH",
    "Call",
    "Fault",
    "Pattern",
    "Rate",
    "Script",
    "ScriptError",
    "Simulator",
    "SimulatorReport",
    "own_key",
    "private_pem",
    "write_private",
]

TOKEN_PATH: Final = "/access-token/b2b"
EXPIRE_PATH: Final = "/qr/qr-mpm-expire-billnumber"


_PAIR_LOCK: Final = threading.Lock()


@functools.cache
def _generated() -> RSAPrivateKey:
    return generate_private_key(public_exponent=65537, key_size=2048)


def own_key() -> RSAPrivateKey:
    """The RSA-2048 pair of simulators without a given key: one per process, since making it takes a while."""
    with _PAIR_LOCK:
        return _generated()


def private_pem(key: RSAPrivateKey) -> bytes:
    """An unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private(path: Path, pem: bytes) -> None:
    """Writes a key that only its owner may read. A link is not followed: it may lead to a file that matters."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(pem)


class Simulator:
    """The gateway on a port of its own; a context manager. Safe to use from several threads.

    `port` 0 takes a free one at the first `start`, which later ones keep: stopped, it refuses connections, started
    again it remembers everything. Without `public_key`, a key pair is made (`private_key_pem`). `keep_calls` bounds
    `SimulatorReport.calls`. Raises ValueError for an unknown `signature`, `start` OSError when it cannot listen.
    """

    def __init__(
        self,
        script: Script = PLAIN,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        client_id: str = "demo-client",
        client_secret: str = "demo-secret",
        channel_id: str = "95051",
        public_key: RSAPublicKey | None = None,
        signature: str = "hmac-sha512",
        sign_path: str = EXPIRE_PATH,
        base_path: str = "/v1.0",
        keep_calls: int = 1000,
    ) -> None:
        if signature not in SIGNATURES:
            raise ValueError(f"signature is one of {', '.join(SIGNATURES)}, not {signature!r}")
        self.books = Books(script, keep_calls)
        self.registration = Registration(
            client_id=client_id,
            client_secret=client_secret.encode(),
            channel_id=channel_id,
            public_key=public_key or own_key().public_key(),
            signature=signature,
            sign_path=sign_path,
        )
        self.token_path = base_path + TOKEN_PATH
        self.expire_path = base_path + EXPIRE_PATH
        self.port = port
        self._host, self._base_path = host, base_path
        self._has_private_key = public_key is None
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen, and serve in a thread of its own. Does nothing when it already does."""
        if self._server is not None:
            return self
        server = Server((self._host, self.port), self)
        self.port = server.server_address[1]
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="simulator", daemon=True
        )
        self._server = server
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and close every connection, calls in flight included."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join()
        server.cut()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        """The GATEWAY_BASE_URL of a worker on this machine."""
        host = "127.0.0.1" if self._host in ("", "0.0.0.0") else self._host
        return f"http://{host}:{self.port}{self._base_path}"

    @property
    def private_key_pem(self) -> bytes:
        """The client's private key, PKCS#8. Raises ValueError when only a public key was given."""
        if not self._has_private_key:
            raise ValueError("the simulator was given a public key only; the private key is with its owner")
        return private_pem(own_key())

    def environment(self, key_file: Path) -> dict[str, str]:
        """The GATEWAY_ settings of a worker that talks to this simulator.

        Writes the private key to `key_file` (mode 0600), unless a public key was given: then the file is
        taken to hold the private key that belongs to it.
        """
        if self._has_private_key:
            write_private(key_file, self.private_key_pem)
        loopback = self.base_url.startswith(("http://127.", "http://localhost:"))
        allowed = {} if loopback else {"GATEWAY_ALLOW_HTTP": "true"}
        return allowed | {
            "GATEWAY_BASE_URL": self.base_url,
            "GATEWAY_CLIENT_ID": self.registration.client_id,
            "GATEWAY_CLIENT_SECRET": self.registration.client_secret.decode(),
            "GATEWAY_PRIVATE_KEY_FILE": str(key_file.absolute()),
            "GATEWAY_CHANNEL_ID": self.registration.channel_id,
            "GATEWAY_SIGNATURE": self.registration.signature,
            "GATEWAY_SIGN_PATH": self.registration.sign_path,
        }

    def report(self, *, bills: bool = True) -> SimulatorReport:
        """What it has seen. `bills=False` leaves `calls_by_bill` empty: cheap, however many there were."""
        return self.books.report(bills=bills)

    def replace(self, script: Script) -> None:
        """Play another script, from its start, while running. Tokens, ids, bills and counts stay."""
        self.books.replace(script)
