"""The line that says who moved or deleted dead letters."""

from __future__ import annotations

import json
import os
import pwd

import pytest

from worker.cli.letters import audit
from worker.core.dead_letter import Filter


def line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return dict(json.loads(capsys.readouterr().err))


def test_what_was_done_is_told_however_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Facts are those at the end, and a failure is one of them."""

    facts: dict[str, object] = {"removed": 0, "result": "done"}

    @audit("dead.purge", Filter(), lambda: facts)
    def purge() -> None:
        facts["removed"] = 3
        raise ValueError("disk\nfull")

    with pytest.raises(ValueError, match="full"):
        purge()

    said = line(capsys)
    assert (said["event"], said["level"], said["removed"], said["error"]) == ("dead.purge", "error", 3, "disk full")
    assert said["result"] == "failed"


def test_a_user_without_a_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user has a number only; the work is done, and the line says which."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)

    with audit("dead.purge", Filter(), dict):
        pass

    assert line(capsys)["user"] == str(os.getuid())
