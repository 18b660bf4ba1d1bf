"""What several unit tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Jakarta"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    """This process in another zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()


@pytest.fixture(scope="module")
def plain_logs() -> Iterator[None]:
    """Log lines without colours, and tracebacks without every variable: structlog's own take half a second each."""
    before = structlog.get_config()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
        ]
    )
    yield
    structlog.configure(**before)
