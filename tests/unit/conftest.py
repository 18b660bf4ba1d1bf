"""What several unit tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Jakarta"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    """This process in another zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()
