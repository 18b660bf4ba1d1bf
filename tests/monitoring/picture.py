"""The dashboard as a picture, from what Prometheus answered: for people to look at, since no Grafana is here.

Not Grafana's own rendering: the places, titles, legends, units and colours of the panels are the dashboard's, the lines
are drawn by matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from tests.monitoring import dashboard
from tests.monitoring.live import Recording, Series

COLUMN, LINE = 0.85, 0.36  # inches
COLOURS: Final = {"red": "#d44a3a", "orange": "#ed8128", "green": "#299c46", "text": "#24292e"}


def draw(recording: Recording) -> bytes:
    """A PNG with every panel in its place."""
    panels = {panel.title + str(number): panel for number, panel in enumerate(dashboard.panels())}
    queue = iter(panels.values())
    placed = dashboard.dashboard()["panels"]
    lines = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in placed)
    figure = plt.figure(figsize=(24 * COLUMN, lines * LINE), dpi=72)
    for each in placed:
        at = each["gridPos"]
        box = (at["x"] / 24, 1 - (at["y"] + at["h"]) / lines, at["w"] / 24, at["h"] / lines)
        if each["type"] == "row":
            figure.text(0.004, box[1] + box[3] / 4, f"▾ {each['title']}", fontsize=13, weight="bold")
        else:
            panel = next(queue)
            answers = [(legend, recording.answers[expr]) for expr, legend in panel.queries]
            (_stat if panel.kind == "stat" else _lines)(figure, box, panel, answers, recording)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def shown(value: float, unit: str) -> str:
    """A number as a panel with this unit would show it."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{value * 100:.4g} %"
    if unit == "s":
        return (
            f"{value * 1000:.3g} ms"
            if 0 < abs(value) < 1
            else f"{value:.3g} s"
            if abs(value) < 90
            else f"{value / 60:.3g} min"
        )
    return f"{value:.3g}{'/s' if unit == 'ops' else ''}" if value < 1000 else f"{value:,.0f}"


def _stat(figure: Any, box: Any, panel: dashboard.Panel, answers: list[tuple[str, Series]], _: Recording) -> None:
    samples = answers[0][1][0]["values"] if answers[0][1] else []
    value = next((float(v) for _, v in reversed(samples) if v != "NaN"), math.nan)
    colour = next((c for limit, c in reversed(panel.steps) if limit is None or value >= limit), "text")
    text = panel.states[int(value)] if panel.states and not math.isnan(value) else shown(value, panel.unit)
    x, y, w, h = box
    figure.patches.append(
        Rectangle((x + 0.001, y), w - 0.002, h * 0.97, transform=figure.transFigure, fill=False, ec="#ccc")
    )
    figure.text(x + w / 2, y + h * 0.8, panel.title, ha="center", fontsize=9)
    figure.text(x + w / 2, y + h * 0.3, text, ha="center", fontsize=19, color=COLOURS[colour], weight="bold")


def _lines(
    figure: Any, box: Any, panel: dashboard.Panel, answers: list[tuple[str, Series]], recording: Recording
) -> None:
    x, y, w, h = box
    axes = figure.add_axes((x + 0.028, y + h * 0.26, w - 0.034, h * 0.6))
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.set_xlim(0, recording.end - recording.start)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit)))
    drawn = [
        (_legend(legend, one["metric"]), [(t - recording.start, float(v)) for t, v in one["values"]])
        for legend, series in answers
        for one in series
    ]
    if panel.stacked and drawn:
        times = sorted({t for _, points in drawn for t, _ in points})
        heights = [[dict(points).get(t, 0.0) for t in times] for _, points in drawn]
        axes.stackplot(times, heights, labels=[name for name, _ in drawn], alpha=0.75)
    else:
        for name, points in drawn:
            style = {"drawstyle": "steps-post"} if panel.stepped else {}
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, **style)
    for limit, colour in panel.steps[1:]:
        axes.axhline(limit, color=COLOURS[colour], linestyle="--", linewidth=0.8)
    if panel.minimum is not None:
        axes.set_ylim(bottom=panel.minimum)
    if panel.states:
        axes.set_yticks(range(len(panel.states)), panel.states)
    axes.legend(
        fontsize=6.5, loc="upper left", bbox_to_anchor=(-0.03, -0.1), ncols=3 if panel.width > 4 else 2, frameon=False,
        handlelength=1, columnspacing=1,
    )  # fmt: skip


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), template)
