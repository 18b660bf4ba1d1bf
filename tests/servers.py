"""HTTP servers scripted byte by byte, their certificates, a proxy, and a partner that calls the simulated gateway."""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import itertools
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.builders import command
from worker.core.grant import Grant
from worker.core.request import Partner, SignedRequest, external_id, sign
from worker.core.signing import load_private_key, signer, token_signature
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Simulator
from worker.shells.gateway import Endpoint, GatewayClient, timestamp
from worker.shells.transport import trust

PATIENT: Final = 30.0  # seconds for what comes, on a loaded machine too

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_SILENT: Final = 60.0  # seconds after which a server gives a silent client up, so that no failed test hangs


class Peer:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self._rest = b""

    def request(self) -> bytes | None:
        """The next request, head and body as they came; None when the client has gone."""
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            more = self.sock.recv(65_536)
            if not more:
                return None
            data += more
        whole = end + 4 + _length(data[:end])
        while len(data) < whole:
            more = self.sock.recv(65_536)
            if not more:
                return None
            data += more
        self._rest = data[whole:]
        return data[:whole]

    def send(self, data: bytes) -> None:
        """These bytes."""
        self.sock.sendall(data)

    def trickle(self, data: bytes, every: float = 0.02) -> None:
        """Byte by byte, with a pause before each, until the client goes."""
        for at in range(len(data)):
            if self.gone(every):
                return
            self.sock.sendall(data[at : at + 1])

    def flood(self, data: bytes) -> None:
        """The same bytes again and again, until the client goes."""
        while True:
            self.sock.sendall(data)

    def gone(self, within: float) -> bool:
        """Whether the client closes within so many seconds (or says something, which it should not)."""
        return bool(select.select([self.sock], [], [], within)[0])

    def reset(self) -> None:
        """Close with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.sock.close()


Handler = Callable[[Peer], None]


@dataclass(slots=True)
class Server:
    """A running server, and what it has seen. A handler has one connection, which closes when the handler returns."""

    host: str
    port: int
    scheme: str = "http"
    requests: list[bytes] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    closed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def connections(self) -> int:
        """How many were accepted."""
        return len(self.peers)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.url_for(self.host)

    def url_for(self, host: str) -> str:
        """Where it is, under another name."""
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/v1.0/expire"


@contextmanager
def serving(handler: Handler, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server on a port of its own: ``handler`` runs in a thread for each connection."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=64) as listener:
        server = Server(host, listener.getsockname()[1], "https" if tls else "http")
        accepting = threading.Thread(target=_accept, args=(listener, server, handler, tls), daemon=True)
        accepting.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); closing alone does not
            accepting.join(_SILENT)
            for peer in server.peers:
                with contextlib.suppress(OSError):
                    peer.sock.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, server: Server, handler: Handler, tls: ssl.SSLContext | None) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno == errno.EMFILE:  # a test has taken every descriptor of this process, for a while
                select.select([], [], [], 0.01)
                continue
            return
        peer = Peer(sock, len(server.peers) + 1)
        server.peers.append(peer)
        threading.Thread(target=_serve, args=(peer, server, handler, tls), daemon=True).start()


def _serve(peer: Peer, server: Server, handler: Handler, tls: ssl.SSLContext | None) -> None:
    # An OSError: the client has gone, or refused our certificate. Both are what the test is about.
    with contextlib.suppress(OSError):
        peer.sock.settimeout(_SILENT)
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if tls is not None:
                peer.sock = _secured(peer.sock, tls)
            recorded = functools.partial(_recorded, peer.request, server)
            peer.request = recorded  # type: ignore[method-assign]
            handler(peer)
        finally:
            peer.sock.close()
            server.closed.release()


def _secured(raw: socket.socket, tls: ssl.SSLContext) -> ssl.SSLSocket:
    """The handshake. One that fails ends as in servers of the field: the alert goes out, and the rest is read, since a
    close before that would be a reset, which can overtake the alert."""
    secured = tls.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
    try:
        secured.do_handshake()
    except ssl.SSLError:
        plain = socket.socket(fileno=secured.detach())
        with contextlib.closing(plain), contextlib.suppress(OSError):
            plain.settimeout(_SILENT)
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(65_536):
                pass
        raise
    return secured


def _recorded(request: Callable[[], bytes | None], server: Server) -> bytes | None:
    whole = request()
    if whole is not None:
        server.requests.append(whole)
    return whole


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


# -- handlers -------------------------------------------------------------------------------------------------------


def answer(body: bytes = b"ok", *headers: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    """An HTTP answer; ``length`` is what it says its body has."""
    said = len(body) if length is None else length
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % said, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def always(data: bytes, *, close: bool = False) -> Handler:
    """These bytes for every request; ``close``: once, and the connection closes."""

    def handler(peer: Peer) -> None:
        while peer.request() is not None:
            peer.send(data)
            if close:
                return

    return handler


def after_request(then: Handler) -> Handler:
    """Read one request, then do that."""

    def handler(peer: Peer) -> None:
        if peer.request() is not None:
            then(peer)

    return handler


def tunnelling(authority: str, to: tuple[str, int]) -> Handler:
    """A proxy that knows one name: CONNECT to ``authority`` leads to ``to``, to anything else is forbidden."""

    def handler(peer: Peer) -> None:
        asked = peer.request()
        if asked is None:
            return
        if not asked.startswith(f"CONNECT {authority} ".encode()):
            peer.send(answer(b"", status=b"403 Forbidden"))
            return
        with socket.create_connection(to, _SILENT) as upstream:
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _pump(peer.sock, upstream)

    return handler


def _pump(left: socket.socket, right: socket.socket) -> None:
    other = {left: right, right: left}
    while True:
        readable, _, _ = select.select([left, right], [], [], _SILENT)
        if not readable:
            return
        for sock in readable:
            data = sock.recv(65_536)
            if not data:
                return
            other[sock].sendall(data)


@contextmanager
def swallowing() -> Iterator[int]:
    """A port on 127.0.0.1 where connecting takes for ever: its queue is full and nobody takes from it."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            waiting = held.enter_context(socket.socket())
            waiting.settimeout(0.1)
            try:
                waiting.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


def refusing_port() -> int:
    """A port on 127.0.0.1 where nobody listens; the kernel gives it to nobody else, not even to who calls there."""
    return free_port()


# -- certificates ---------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority of the tests' own."""

    def __init__(self, name: str, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            _certificate(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def trust(self) -> ssl.SSLContext:
        """A client's context that trusts this authority and no other."""
        return trust(self.file)

    def server(
        self, *names: str, common_name_only: bool = False, expired: bool = False, wants_client: bool = False
    ) -> ssl.SSLContext:
        """A server's context with a certificate for these names and addresses; ``wants_client``: it asks for a client
        certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names, common_name_only=common_name_only, expired=expired))
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.file)
        return context

    def issue(self, *names: str, common_name_only: bool = False, expired: bool = False) -> tuple[Path, Path]:
        """The files of a new certificate and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        identity = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        builder = _certificate(subject, self._name, key.public_key(), expired=expired)
        if not common_name_only:
            alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(identity, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        stem = self._folder / f"{x509.random_serial_number():x}"
        certificate_file, key_file = stem.with_suffix(".pem"), stem.with_suffix(".key")
        certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(private)
        return certificate_file, key_file


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, expired: bool = False
) -> x509.CertificateBuilder:
    now = datetime.now(UTC) - timedelta(days=9 if expired else 0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


# -- a partner of the simulated gateway -----------------------------------------------------------------------------


class RecordingObserver:
    """The client's `ExchangeObserver`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.skews: list[float] = []

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((operation, response_code))

    def clock_skew(self, seconds: float) -> None:
        self.skews.append(seconds)


def endpoint(base_url: str, *, connect: float = PATIENT, read: float = PATIENT) -> Endpoint:
    """Where the services are under a base URL."""
    return Endpoint(f"{base_url}/access-token/b2b", f"{base_url}/qr/qr-mpm-expire-billnumber", connect, read)


_key = functools.cache(load_private_key)  # checking an RSA key takes longer than most tests


class SimulatedPartner:
    """Signs as the worker does, for a simulator that knows it."""

    _serials = itertools.count()

    def __init__(self, simulator: Simulator) -> None:
        self._key = _key(simulator.private_key_pem)
        self._partner = Partner(simulator.registration.client_id, simulator.registration.channel_id)
        self._sign = signer("hmac-sha512", simulator.registration.client_secret.decode(), self._key)

    def token(self, client: GatewayClient) -> Grant:
        """One token request."""
        moment = timestamp(time.time(), milliseconds=True)
        client_id = self._partner.client_id
        return client.fetch_token(client_id, moment, token_signature(self._key, client_id, moment))

    def request(self, token: str, *, late: float = 0.0) -> SignedRequest:
        """One signed expire call, ``late`` seconds after it was signed."""
        moment = time.time()
        identity = external_id(moment, 1, next(self._serials))
        return sign(command(), self._partner, self._sign, token, moment - late, identity)
