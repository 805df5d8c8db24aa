"""Charts over a run's time: SVG by matplotlib for a page that lends them its font and, light or dark, its colours."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np

from engine.system.formatting import format_count

BUCKETS = 300  # points of a curve, at most: a chart's size does not grow with the run's length
DOTTED = 40  # a curve of at most as many points shows each
LEFT, RIGHT, TOP, BOTTOM = 50, 132, 8, 28  # pixels around the axes; to their right stand the curves' names
NAME_LETTERS, NAME_HEIGHT = 14, 14

# The page's CSS variables. matplotlib draws in a colour that stands for one, and `_inline` puts the variable there.
COLOURS = ("ink", "quiet", "grid", "alarm", *(f"c{i}" for i in range(8)))
STAND_INS = {name: f"#feed{i:02x}" for i, name in enumerate(COLOURS)}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.dpi": 72,  # SVG's: a point is a pixel
    "font.size": 12,
    "font.family": "DejaVu Sans",  # comes with matplotlib; it measures text that the page sets in its own font
    "text.parse_math": False,
    "axes.xmargin": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": STAND_INS["grid"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}.color": STAND_INS["quiet"] for axis in ("xtick", "ytick")},
    "xtick.bottom": False,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Curve:
    """A line through `y` at `x`, broken where it is NaN, and the band around it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    colour: str  # of COLOURS
    faint: bool = False  # and without its name


def curve(
    name: str, steps: Sequence[float], values: Sequence[float | None] | np.ndarray, colour: str, points: int = BUCKETS
) -> Curve:
    """A series cut into at most `points` runs: each one's middle step, and mean, least and greatest finite value.

    A run without any finite value is NaN. None counts as NaN.
    """
    points = min(points, len(steps))
    columns = []
    for x, y in zip(np.array_split(steps, points), np.array_split(np.array(values, float), points), strict=True):
        finite = y[np.isfinite(y)]
        three = (finite.mean(), finite.min(), finite.max()) if finite.size else (math.nan,) * 3
        columns.append(((x[0] + x[-1]) / 2, *three))
    middle, mean, low, high = np.array(columns).T
    return Curve(name, middle, mean, low, high, colour)


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    curves: Sequence[Curve]
    first: float  # from left
    last: float  # to right
    over: str = "step"
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)  # places on the axis, by colour
    span: tuple[float | None, float | None] = (None, None)  # from bottom to top; None: as the curves need
    log: bool = False  # 0 and less lie at the bottom
    bands: bool = False  # drawn from each curve's `low` to its `high`
    rules: Mapping[str, float] = field(default_factory=dict)  # horizontal lines, by name
    note: str = ""

    def ends(self) -> list[tuple[float, str, str]]:
        """What stands at the right: last finite value, name and colour of curves and rules; the lowest first."""
        named = ((curve, curve.y[np.isfinite(curve.y)]) for curve in self.curves if not curve.faint)
        ends = [(values[-1], curve.name, curve.colour) for curve, values in named if values.size]
        return sorted(ends + [(value, name, "ink") for name, value in self.rules.items()])

    def svg(self, width: int, height: int) -> str:
        """The chart as an element of HTML, `width` × `height` pixels where the page does not stretch it."""
        import matplotlib  # not before: it takes a second, and one rank alone draws, once
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

        # A salt of its own: what drawings define needs names that differ throughout the page.
        with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": f"{self.title} {width}"}):
            figure = Figure((width / 72, height / 72))
            box = (LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / height)
            axes = figure.add_axes(box)
            for curve in self.curves:
                paint = {"color": STAND_INS[curve.colour], "alpha": 0.5 if curve.faint else 1}
                dots = "o" if len(curve.x) <= DOTTED else ""
                axes.plot(curve.x, curve.y, linewidth=1.6, marker=dots, markersize=4, **paint)
            for value in self.rules.values():
                axes.axhline(value, color=STAND_INS["ink"], linewidth=1, dashes=(5, 4))
            if self.log and any((curve.y > 0).any() for curve in self.curves):
                axes.set_yscale("log")
                low, high = axes.get_ylim()
                locator = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
            else:
                locator = MaxNLocator(height // 40, steps=[1, 2, 2.5, 5, 10])
            axes.yaxis.set_major_locator(locator)
            axes.yaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: format_value(value))
            axes.set_xlim(self.first, max(self.last, self.first + 1))
            axes.set_ylim(*self.span)
            for curve in self.curves:  # after the limits, which are the lines' own
                if self.bands and (curve.high > curve.low).any():
                    paint = {"color": STAND_INS[curve.colour], "alpha": 0.11, "linewidth": 0}
                    axes.fill_between(curve.x, curve.low, curve.high, **paint)
            for colour, places in self.marks.items():
                shares = np.unique(np.interp(places, axes.get_xlim(), (0, BUCKETS)).round()) / BUCKETS
                paint = {"color": STAND_INS[colour], "markersize": 16, "markeredgewidth": 1.5}
                axes.plot(shares, 0 * shares, "|", transform=axes.transAxes, **paint)
            left = {"color": STAND_INS["quiet"], "ha": "right", "va": "top", "transform": None}
            axes.text(LEFT - 8, BOTTOM - 7, self.over, None, **left)
            ends = self.ends()
            heights = [axes.transData.transform((self.first, value))[1] for value, _, _ in ends]
            for (value, name, colour), at in zip(ends, _spread(heights, height - TOP), strict=True):
                right = {"color": STAND_INS[colour], "va": "center", "transform": None, "gid": "end"}
                axes.text(width - RIGHT + 9, at, f"{format_value(value)} {name:.{NAME_LETTERS}}", None, **right)
            file = StringIO()
            bare = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=bare)
        return _inline(file.getvalue(), f"0 0 {width} {height}")


def _spread(heights: Sequence[float], top: float) -> np.ndarray:
    """Moves ascending heights apart, to at least NAME_HEIGHT from one to the next and none above `top`."""
    room = NAME_HEIGHT * np.arange(len(heights))
    return np.minimum(np.maximum.accumulate(np.maximum(heights, BOTTOM) - room) + room, top - room[::-1])


def _inline(svg: str, box: str) -> str:
    """An SVG file's picture for HTML: no prologue, no idle names, tenths of pixels, the page's colours."""
    svg = re.sub("<svg[^>]*>", f'<svg viewBox="{box}">', svg[svg.index("<svg") :])
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace(' id="end"', ' class="end"')
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda numbers: re.sub(r"(\.\d)\d+|\n", r"\1", numbers[0]), svg)
    return re.sub("#feed(..)", lambda stand_in: f"var(--{COLOURS[int(stand_in[1], 16)]})", svg)


def format_value(value: float) -> str:
    """Three figures and, where it is large, a unit; a dash for NaN."""
    if math.isnan(value):
        return "–"
    value = float(f"{value:.3g}")
    small = 0 < abs(value) < 0.001
    return np.format_float_scientific(value, trim="-", exp_digits=1) if small else format_count(value)
