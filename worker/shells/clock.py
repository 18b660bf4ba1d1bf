"""The system's time, for whatever is handed a clock."""

from __future__ import annotations

import time


class SystemClock:
    """The `Clock` of the core's ports."""

    epoch = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
