"""How far a sweep is, on standard error: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final, Self

from worker.core.pace import Speed
from worker.core.sweep import Standing

LINE_EVERY: Final = 5.0
DRAW_EVERY: Final = 0.2


class Meter:
    """The `Screen` of the use cases. ``follow``: outcomes count too; ``publish``: and before them, publishing."""

    def __init__(self, name: str, *, publish: bool = True, follow: bool = True) -> None:
        self._name = name
        self._speeds = {what: Speed() for what, wanted in (("published", publish), ("outcomes", follow)) if wanted}
        self._marked_at = 0.0
        self._shown_at = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """A line that stays, above the bars."""
        if self._live is not None:
            self._live.console.print(text, soft_wrap=True, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)

    def reading(self, rows: int, done: int, size: int | None) -> None:
        """So many rows are read: ``done`` bytes, of ``size`` where that is known."""
        now = time.monotonic()
        if now - self._shown_at < (DRAW_EVERY if self._terminal else LINE_EVERY):
            return
        self._shown_at = now
        share = f", {done * 100 // size} %" if size else ""
        text = f"{self._name}: {rows:,} rows read{share}"
        if self._live is not None:
            self._live.update(text, refresh=True)
        else:
            self.line(text)

    def show(self, standing: Standing, trouble: str) -> None:
        """See `Screen`."""
        now = time.monotonic()
        if now - self._marked_at >= DRAW_EVERY:
            self._marked_at = now
            for what, speed in self._speeds.items():
                speed.mark(now, _done(standing, what))
            if self._live is not None:
                self._live.update(self._bars(standing, trouble), refresh=True)
        if self._live is None and now - self._shown_at >= LINE_EVERY:
            self._shown_at = now
            self.line(self._sentence(standing, trouble))

    def _sentence(self, standing: Standing, trouble: str) -> str:
        parts = [
            f"{_done(standing, what):,} of {standing.bills:,} {what} ({speed.per_second:,.0f}/s)"
            for what, speed in self._speeds.items()
        ]
        if standing.answered > standing.expired:
            parts.append(f"{standing.answered - standing.expired:,} not expired")
        what, speed = list(self._speeds.items())[-1]
        left = speed.left(standing.bills - _done(standing, what))
        if left:
            parts.append(f"about {_clock(left)} left")
        return f"{self._name}: {', '.join(parts)}{'; ' + trouble if trouble else ''}"

    def _bars(self, standing: Standing, trouble: str) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1), expand=True)
        for justify, ratio in (("left", None), ("left", 1), ("right", None), ("right", None), ("right", None)):
            grid.add_column(justify=justify, ratio=ratio, no_wrap=True)  # type: ignore[arg-type]
        for what, speed in self._speeds.items():
            done = _done(standing, what)
            left = speed.left(standing.bills - done)
            grid.add_row(
                what,
                ProgressBar(total=standing.bills, completed=done),
                f"{done:,}/{standing.bills:,}",
                f"{speed.per_second:,.0f}/s",
                _clock(left) if left is not None else "-:--",
            )
        lines: list[Any] = [Text(self._name, style="bold"), grid]
        bad = standing.answered - standing.expired
        if bad:
            lines.append(Text(f"{standing.expired:,} expired, {bad:,} not expired"))
        if trouble:
            lines.append(Text(trouble, style="yellow"))
        return Group(*lines)


def _done(standing: Standing, what: str) -> int:
    return standing.sent if what == "published" else standing.answered


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
