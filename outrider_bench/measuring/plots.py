"""SVG plots in one style. The only module that imports matplotlib (extra `bench`)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, installs

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#64b5cd", "#8c8c8c")
# An axis with at most this many different values labels each of them.
_FEW_TICKS = 4
_STYLE: Any = {
    "figure.figsize": (7.2, 4.2),
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    # Text stays text: files are small and searchable. Fixed ids: equal data gives equal files.
    "svg.fonttype": "none",
    "svg.hashsalt": "outrider",
}


@dataclass(frozen=True)
class Line:
    """A line of a plot. `ranges`: (least, most) at each point, drawn as a band.

    `has_marks`: draws a mark at each point.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    ranges: Sequence[tuple[float, float]] | None = None
    has_marks: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `level`: y of a dashed reference line."""

    x: str
    y: str
    lines: Sequence[Line]
    is_log_x: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Bar:
    """A median and its range. `is_peer`: of another system, drawn in another colour."""

    name: str
    value: float
    least: float
    most: float
    is_peer: bool = False


def require_matplotlib() -> None:
    """Raises ConfigError without matplotlib.

    Commands call it before the measurement, which takes minutes.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"matplotlib, which draws the plots, is not installed; {installs('bench')}"
        ) from None


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes the panels, side by side, to an SVG file. Raises ConfigError without matplotlib."""
    path.write_text(svg(title, panels), "utf-8")


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The panels, side by side, as SVG text. Raises ConfigError without matplotlib."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        width, height = _STYLE["figure.figsize"]
        scale = 1 if len(panels) == 1 else 0.72
        figure = Figure(figsize=(width * scale * len(panels), height), layout="constrained")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
        # A line has the same colour in all panels.
        names = dict.fromkeys(line.name for panel in panels for line in panel.lines)
        colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))
        for place, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(1, len(panels), place + 1), panel, colours)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def draw_bars(path: Path, title: str, unit: str, bars: Sequence[Bar]) -> None:
    """Writes a horizontal bar chart to an SVG file. Raises ConfigError without matplotlib."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        width, _ = _STYLE["figure.figsize"]
        figure = Figure(figsize=(width, 1.2 + 0.32 * len(bars)), layout="constrained")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
        axes: Any = figure.add_subplot()
        places, values = range(len(bars)), [bar.value for bar in bars]
        errors = [[b.value - b.least for b in bars], [b.most - b.value for b in bars]]
        colours = [_COLOURS[1 if bar.is_peer else 0] for bar in bars]
        axes.barh(places, values, color=colours, height=0.62)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor="#333333", capsize=2, lw=1)
        axes.set_yticks(places, [bar.name for bar in bars])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_panel(axes: Any, panel: Panel, colours: dict[str, str]) -> None:
    for line in panel.lines:
        colour = colours[line.name]
        marker = "o" if line.has_marks else ""
        axes.plot(line.xs, line.ys, marker=marker, ms=4, lw=1.6, color=colour, label=line.name)
        if line.ranges:
            least, most = zip(*line.ranges, strict=True)
            axes.fill_between(line.xs, least, most, color=colour, alpha=0.15, lw=0)
    if panel.level is not None:
        axes.axhline(panel.level, color="#888888", lw=1, ls="--")
    ticks = sorted({x for line in panel.lines for x in line.xs})
    if panel.is_log_x:
        axes.set_xscale("log", base=2)
    if panel.is_log_x or len(ticks) <= _FEW_TICKS:
        axes.set_xticks(ticks, [_number(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.legend()


def _number(value: float) -> str:
    whole = value >= 1000 and value % 1024 == 0
    return f"{value / 1024:g}k" if whole else f"{value:g}"
