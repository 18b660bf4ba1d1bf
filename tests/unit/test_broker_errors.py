"""What ends a connection to the broker is told with the cure that helps."""

from __future__ import annotations

import ssl

import pytest

from worker.shells.amqp.errors import reason


def untrusted(why: str) -> ssl.SSLCertVerificationError:
    """A certificate that OpenSSL refuses in these words."""
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]")
    error.verify_message = why
    return error


def alert(name: str) -> ssl.SSLError:
    """An alert of the broker, by OpenSSL's name."""
    error = ssl.SSLError(1, f"[SSL: {name}]")
    error.reason = name
    return error


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (untrusted("Hostname mismatch, certificate is not valid for 'b'."), "AMQP_URL needs the host's own name"),
        (untrusted("IP address mismatch, certificate is not valid for '1'."), "AMQP_URL needs the host's own name"),
        (untrusted("unable to get local issuer certificate"), "set AMQP_CA_FILE"),
        (untrusted("self-signed certificate in certificate chain"), "set AMQP_CA_FILE"),
        (untrusted("certificate has expired"), "have it renewed, or set this machine's clock"),
        (untrusted("certificate is not yet valid"), "have it renewed, or set this machine's clock"),
        (untrusted("EE certificate key too weak"), "have it renewed"),
        (untrusted("certificate revoked"), "have it renewed"),
        (alert("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "set AMQP_CERT_FILE and AMQP_KEY_FILE"),
        (alert("SSLV3_ALERT_BAD_CERTIFICATE"), "set AMQP_CERT_FILE and AMQP_KEY_FILE"),
        (alert("SSLV3_ALERT_CERTIFICATE_EXPIRED"), "set AMQP_CERT_FILE and AMQP_KEY_FILE"),
        (alert("TLSV1_ALERT_UNKNOWN_CA"), "set AMQP_CERT_FILE and AMQP_KEY_FILE"),
        (alert("WRONG_VERSION_NUMBER"), "amqp:// instead of amqps://"),
    ],
)
def test_trouble_with_tls_leads_to_its_cure(error: ssl.SSLError, cure: str) -> None:
    """An expired certificate is not helped by another CA, nor a client certificate that is missing by another port."""

    said = reason(error)

    assert cure in said
    assert ("AMQP_CA_FILE" in said) == ("AMQP_CA_FILE" in cure)
