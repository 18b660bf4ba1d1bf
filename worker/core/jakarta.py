"""Times as the gateway and the outcomes write them: Asia/Jakarta, ``+07:00``, whatever ``TZ`` says."""

from __future__ import annotations

import time
from functools import lru_cache

# Indonesia's western zone has had no daylight saving since 1964, so the offset is a constant and needs no tz database.
OFFSET_SECONDS = 7 * 3600


def iso(epoch: float, *, milliseconds: bool = True) -> str:
    """``2026-11-22T21:00:00.123+07:00`` for seconds since the epoch; without the fraction when told so."""
    whole, thousandths = divmod(round(epoch * 1000), 1000)
    moment = _formatted("%Y-%m-%dT%H:%M:%S", whole)
    return f"{moment}.{thousandths:03d}+07:00" if milliseconds else f"{moment}+07:00"


def digits(epoch: float) -> str:
    """17 digits, ``yyyyMMddHHmmssSSS`` in Jakarta."""
    whole, thousandths = divmod(round(epoch * 1000), 1000)
    return f"{_formatted('%Y%m%d%H%M%S', whole)}{thousandths:03d}"


@lru_cache(maxsize=256)
def _formatted(pattern: str, whole: int) -> str:
    """Four times are written for every command, most of them within the same few seconds."""
    return time.strftime(pattern, time.gmtime(whole + OFFSET_SECONDS))
