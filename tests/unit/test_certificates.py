"""When configured certificates end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.servers import Authority
from worker.shells.certificates import Expiries, first_end


def test_the_first_of_a_bundle_to_end(tmp_path: Path) -> None:
    """Of several certificates in one file the first to end counts, wherever it stands."""

    authority = Authority("ours", tmp_path)
    good, _ = authority.issue("localhost")
    expired, _ = authority.issue("localhost", expired=True)
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(good.read_text() + expired.read_text() + authority.file.read_text())
    assert first_end(bundle) == first_end(expired) < time.time() < first_end(good)


def test_what_is_set_and_what_is_not(tmp_path: Path) -> None:
    """A certificate that is set is told with its end, one that is not with none; a file that cannot be read keeps what
    was known."""

    file = Authority("ours", tmp_path).file
    ends: dict[str, float | None] = {}
    expiries = Expiries({"gateway_ca": file, "amqp_ca": None}, ends.__setitem__)
    expiries.look()
    assert ends == {"gateway_ca": first_end(file), "amqp_ca": None}
    before = dict(ends)
    file.write_text("no certificate")
    Expiries({"gateway_ca": file}, ends.__setitem__).look()
    file.unlink()
    Expiries({"gateway_ca": file}, ends.__setitem__).look()
    assert ends == before


def test_it_does_not_look_again_at_once(tmp_path: Path) -> None:
    """Called twice a second, it reads the files once a minute."""

    file = Authority("ours", tmp_path).file
    ends: dict[str, float | None] = {}
    expiries = Expiries({"gateway_ca": file}, ends.__setitem__)
    expiries.look()
    ends.clear()
    expiries.look()
    assert ends == {}


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nQUFB\n-----END CERTIFICATE-----\n"])
def test_a_file_without_a_certificate(text: str, tmp_path: Path) -> None:
    """A file that holds none is an error that says so."""

    file = tmp_path / "x.pem"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        first_end(file)
