"""Times as the gateway and the outcomes write them: Asia/Jakarta, ``+07:00``, whatever ``TZ`` says."""

from __future__ import annotations

import time

# Indonesia's western zone has had no daylight saving since 1964, so the offset is a constant and needs no tz database.
OFFSET_SECONDS = 7 * 3600


def iso(epoch: float, *, milliseconds: bool = True) -> str:
    """``2026-11-22T21:00:00.123+07:00`` for seconds since the epoch; without the fraction when told so."""
    whole, thousandths = divmod(round(epoch * 1000), 1000)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole + OFFSET_SECONDS))
    return f"{moment}.{thousandths:03d}+07:00" if milliseconds else f"{moment}+07:00"


def digits(epoch: float) -> str:
    """17 digits, ``yyyyMMddHHmmssSSS`` in Jakarta."""
    whole, thousandths = divmod(round(epoch * 1000), 1000)
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(whole + OFFSET_SECONDS)) + f"{thousandths:03d}"
