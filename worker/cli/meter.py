"""How far a sweep is, on standard error: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from worker.cli.screen import DRAW_EVERY, Display, bars
from worker.core.pace import Speed
from worker.core.sweep import Tally


class Meter(Display):
    """The `Screen` of the use cases. ``follow``: outcomes count too; ``publish``: and before them, publishing.
    ``remark``: what is shown while there is no other trouble, empty for nothing."""

    def __init__(
        self, name: str, *, publish: bool = True, follow: bool = True, remark: Callable[[], str] = str
    ) -> None:
        super().__init__()
        self._name = name
        self._remark = remark
        self._speeds = {what: Speed() for what, wanted in (("published", publish), ("outcomes", follow)) if wanted}
        self._marked_at = 0.0

    def reading(self, rows: int, done: int, size: int | None) -> None:
        """So many rows are read: ``done`` bytes, of ``size`` where that is known."""
        share = f", {done * 100 // size} %" if size else ""
        text = f"{self._name}: {rows:,} rows read{share}"
        self.draw(lambda: text, lambda: text)

    def show(self, tally: Tally, trouble: str) -> None:
        """See `Screen`."""
        now, trouble = time.monotonic(), trouble or self._remark()
        if now - self._marked_at >= DRAW_EVERY:
            self._marked_at = now
            for what, speed in self._speeds.items():
                speed.mark(now, _done(tally, what), tally.bills)
        self.draw(lambda: self._picture(tally, trouble), lambda: self._sentence(tally, trouble))

    def _sentence(self, tally: Tally, trouble: str) -> str:
        parts = [
            f"{_done(tally, what):,} of {tally.bills:,} {what} ({speed.per_second:,.0f}/s)"
            for what, speed in self._speeds.items()
        ]
        if tally.answered > tally.expired:
            parts.append(f"{tally.answered - tally.expired:,} not expired")
        what, speed = list(self._speeds.items())[-1]
        left = speed.left(tally.bills - _done(tally, what))
        if left:
            parts.append(f"about {_clock(left)} left")
        return f"{self._name}: {', '.join(parts)}{'; ' + trouble if trouble else ''}"

    def _picture(self, tally: Tally, trouble: str) -> Any:
        from rich.console import Group
        from rich.text import Text

        rows = []
        for what, speed in self._speeds.items():
            done = _done(tally, what)
            left = speed.left(tally.bills - done)
            texts = (
                f"{done:,}/{tally.bills:,}",
                f"{speed.per_second:,.0f}/s",
                "-:--" if left is None else _clock(left),
            )
            rows.append((what, done, tally.bills, texts))
        lines: list[Any] = [Text(self._name, style="bold"), bars(rows)]
        bad = tally.answered - tally.expired
        if bad:
            lines.append(Text(f"{tally.expired:,} expired, {bad:,} not expired"))
        if trouble:
            lines.append(Text(trouble, style="yellow"))
        return Group(*lines)


def _done(tally: Tally, what: str) -> int:
    return tally.sent if what == "published" else tally.answered


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
