"""What pika's exceptions about a connection mean, in a few words for people, without the password that some contain."""

from __future__ import annotations

import re
import ssl
from typing import Final

from pika.adapters.utils.connection_workflow import AMQPConnectorStackTimeout
from pika.exceptions import (
    AMQPHeartbeatTimeout,
    AuthenticationError,
    ConnectionClosedByBroker,
    IncompatibleProtocolError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    StreamLostError,
)

ACCESS_REFUSED: Final = 403
MISSING: Final = 404
LOCKED: Final = 405  # another connection's exclusive queue; basic.get where a quorum queue has a single active consumer
MISMATCH: Final = 406  # it exists with other properties
NOT_ALLOWED: Final = 530  # also a virtual host that does not exist

_QUOTED = re.compile(r"'[^']*'")
_CLOSED = re.compile(r"ConnectionClosedByBroker: \((\d+)\) (['\"])(.*)\2", re.DOTALL)
_CAUSE = re.compile(r"Error\((?:\d+, )?(['\"])(.*)\1\)")


def refusal(error: BaseException) -> int | None:
    """The reply code with which the broker refused our login (403) or virtual host (530); None if it did not.

    RabbitMQ says 530 for a limit of connections, too, of a node, a virtual host or a user: that is no refusal, since it
    passes when another connection ends. pika calls every connection that ends during the login a probable refusal, one
    that the network broke, too. The broker's own close says so, and pika keeps no more than its text.
    """
    code, said = _closed(error) or (0, "")
    if code in (ACCESS_REFUSED, NOT_ALLOWED):
        return None if _names_a_limit(said) else code
    return ACCESS_REFUSED if isinstance(error, AuthenticationError) else None


def limit(error: BaseException) -> str | None:
    """The broker's words when it refused a connection or channel because of a limit; None if it did not."""
    code, said = _closed(error) or (0, "")
    return said if code == NOT_ALLOWED and _names_a_limit(said) else None


def reason(error: BaseException) -> str:
    """The innermost cause: pika wraps the system's errors several times."""
    closed = _closed(error)
    if limit(error) is not None:
        return f"the broker takes no more of our connections or channels: {limit(error)}"
    if isinstance(error, AuthenticationError):
        return "the broker takes no login by user and password (it does not offer PLAIN)"
    if refusal(error) == ACCESS_REFUSED:
        return "the broker refuses our login"
    if refusal(error) == NOT_ALLOWED and closed is not None:
        return f"the broker refuses us this vhost: {closed[1]}"
    if closed is not None:
        return f"closed by the broker: {closed[0]} {closed[1]}"
    for cause in (getattr(error, "exception", None), *reversed(getattr(error, "exceptions", ())), *error.args):
        if isinstance(cause, BaseException):
            return reason(cause)
    match error:
        case ProbableAuthenticationError() | ProbableAccessDeniedError():
            return f"the connection was lost during the login ({_cause(error)})"
        case IncompatibleProtocolError():
            said = _cause(error)
            return (
                f"our greeting was not answered ({said}): no AMQP port, one for TLS (amqps://), or a broker that starts"
            )
        case AMQPConnectorStackTimeout():
            return "something listens, but does not talk AMQP in time"
        case AMQPHeartbeatTimeout():
            return "the connection was lost (no heartbeat from the broker)"
        case StreamLostError():
            return f"the connection was lost ({_cause(error)})"
        case ssl.SSLCertVerificationError():
            why = error.verify_message.rstrip(".")
            return f"TLS: the certificate is not trusted ({why}); {_trust_cure(why)}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "TLS: none is spoken there; amqp:// instead of amqps://, or the port for TLS"
        case ssl.SSLError(reason=str(said)) if _OF_OUR_CERTIFICATE.search(said):
            words = said.lower().replace("_", " ")
            return f"TLS: the broker refuses our certificate ({words}); set AMQP_CERT_FILE and AMQP_KEY_FILE"
        case ssl.SSLError(reason=str(said)):
            return f"TLS: {said.lower().replace('_', ' ')}"
        case OSError(strerror=str(strerror)):
            return strerror
        case ValueError() if "getpeername" in str(error):
            return _cause(error)
    return f"{type(error).__name__} {' '.join(map(str, error.args))}".replace("\n", " ").rstrip()[:200]


NO_PLAIN: Final = "let it offer PLAIN to this user (auth_mechanisms in rabbitmq.conf)"


def cure(error: BaseException) -> str:
    """What to do about a refused login."""
    return (
        NO_PLAIN if isinstance(error, AuthenticationError) else "correct AMQP_URL: user, password, vhost, permissions"
    )


def remedy(code: int | None, said: str) -> str:
    """What to do about what cannot be declared or is not there, by the broker's reply code and words; begins with
    ``; ``, or is empty."""
    if _names_a_limit(said):
        return "; raise that limit at the broker, or delete queues that nobody needs"
    if "home node" in said:
        return "; start that node again: a classic queue has no other copy"
    match code:
        case 403:
            return "; give the user configure, write and read permission for it"
        case 404:
            return "; run `qris-expire topology --apply`, or tell its owner"
        case 406:
            return "; match AMQP_QUEUE_TYPE to it, or delete it once it is empty"
    return ""


_OF_OUR_CERTIFICATE: Final = re.compile("ALERT_(?:CERTIFICATE|BAD_CERTIFICATE|UNSUPPORTED_CERTIFICATE|UNKNOWN_CA)")


def _trust_cure(why: str) -> str:
    """What helps against a certificate that OpenSSL refuses in these words."""
    if "mismatch" in why:
        return "AMQP_URL needs the host's own name"
    if "expired" in why or "not yet valid" in why:
        return "have it renewed, or set this machine's clock"
    return "have it renewed" if "too weak" in why or "revoked" in why else "set AMQP_CA_FILE"


def _names_a_limit(said: str) -> bool:
    """Whether the broker says that a limit is reached; a name in what it says may hold these words, too."""
    words = _QUOTED.sub("", said)
    return "limit" in words and "reached" in words and not words.endswith("not found")


def _closed(error: BaseException) -> tuple[int, str] | None:
    """Reply code and text of the close that the broker sent, if it sent one."""
    if isinstance(error, ConnectionClosedByBroker):
        return error.reply_code, error.reply_text
    if isinstance(error, (ProbableAuthenticationError, ProbableAccessDeniedError)):
        found = _CLOSED.search(str(error))
        return (int(found[1]), found[3]) if found else None
    return None


def _cause(error: BaseException) -> str:
    """The system's words inside a text of pika's."""
    text = " ".join(map(str, error.args))
    found = _CAUSE.search(text)
    if found is not None:
        return found[2]
    return "it hung up" if "EOF" in text else text[:200]
