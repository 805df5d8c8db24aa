"""Charts of a run as SVG, drawn by matplotlib, for a page that gives them its font and its light or dark colours."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np

from engine.system.formatting import format_count

BUCKETS = 300  # most points of a curve, so that a chart's size does not grow with the run's length
DOTTED = 40  # A curve of at most this many points shows a dot at each.
LEFT, RIGHT, TOP, BOTTOM = 50, 132, 8, 28  # pixels around the axes; the curves' names are to their right
NAME_LETTERS, NAME_HEIGHT = 14, 14  # most letters of a curve's name beside the axes, and pixels from one to the next

# The page's CSS variables. matplotlib draws each in a placeholder colour, which `_inline` replaces by the variable.
COLOURS = ("ink", "quiet", "grid", "alarm", *(f"c{i}" for i in range(8)))
PLACEHOLDERS = {name: f"#feed{i:02x}" for i, name in enumerate(COLOURS)}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.dpi": 72,  # as in SVG, where a point is a pixel
    "font.size": 12,
    "font.family": "DejaVu Sans",  # It comes with matplotlib and measures text, which the page sets in its own font.
    "text.parse_math": False,
    "axes.xmargin": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PLACEHOLDERS["grid"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}.color": PLACEHOLDERS["quiet"] for axis in ("xtick", "ytick")},
    "xtick.bottom": False,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Curve:
    """A line through the points (x, y), interrupted where y is NaN, and the band from `low` to `high` around it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    colour: str  # one of COLOURS
    faint: bool = False  # A faint curve is drawn paler, and its name is not shown.


def curve(
    name: str, steps: Sequence[float], values: Sequence[float | None] | np.ndarray, colour: str, points: int = BUCKETS
) -> Curve:
    """Returns a series as a curve of at most `points` points.

    Each point stands for several neighbouring steps: it is at the middle of them, and has the mean, the smallest and
    the largest of their finite values, or NaN where none is finite. None counts as NaN.
    """
    points = min(points, len(steps))
    rows = []
    for x, y in zip(np.array_split(steps, points), np.array_split(np.array(values, float), points), strict=True):
        finite = y[np.isfinite(y)]
        statistics = (finite.mean(), finite.min(), finite.max()) if finite.size else (math.nan,) * 3
        rows.append(((x[0] + x[-1]) / 2, *statistics))
    middle, mean, low, high = np.array(rows).T
    return Curve(name, middle, mean, low, high, colour)


@dataclass(frozen=True)
class Chart:
    """Several curves over one axis, with a title and a note."""

    title: str
    unit: str
    curves: Sequence[Curve]
    first: float  # the left end of the horizontal axis
    last: float  # its right end
    over: str = "step"  # its unit
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)  # positions of ticks on the axis, by colour
    span: tuple[float | None, float | None] = (None, None)  # bottom and top of the axes; None is as the curves need
    log: bool = False  # whether the vertical axis is logarithmic; values of 0 or less then lie at the bottom
    bands: bool = False  # whether each curve's band is drawn
    rules: Mapping[str, float] = field(default_factory=dict)  # horizontal lines, by name
    note: str = ""

    def ends(self) -> list[tuple[float, str, str]]:
        """Returns what is written at the right, the lowest first: last finite value, name and colour of each line."""
        finite = ((curve, curve.y[np.isfinite(curve.y)]) for curve in self.curves if not curve.faint)
        ends = [(values[-1], curve.name, curve.colour) for curve, values in finite if values.size]
        return sorted(ends + [(value, name, "ink") for name, value in self.rules.items()])

    def svg(self, width: int, height: int) -> str:
        """Returns the chart as an HTML element of `width` × `height` pixels, which the page may stretch."""
        # matplotlib takes a second to import, and only rank 0 draws, once.
        import matplotlib
        from matplotlib.figure import Figure

        # With the same salt, two drawings of a page would define the same names.
        with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": f"{self.title} {width}"}):
            figure = Figure((width / 72, height / 72))
            box = (LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / height)
            axes = figure.add_axes(box)
            self._draw_curves(axes)
            self._scale_axes(axes, height)
            # Bands and marks come after the limits of the axes, which follow the lines alone.
            self._draw_bands_and_marks(axes)
            self._write_names(axes, width, height)
            file = StringIO()
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        return _inline(file.getvalue(), f"0 0 {width} {height}")

    def _draw_curves(self, axes: Any) -> None:
        for curve in self.curves:
            marker, alpha = "o" if len(curve.x) <= DOTTED else "", 0.5 if curve.faint else 1
            style = {"color": PLACEHOLDERS[curve.colour], "alpha": alpha, "marker": marker, "markersize": 4}
            axes.plot(curve.x, curve.y, linewidth=1.6, **style)
        for value in self.rules.values():
            axes.axhline(value, color=PLACEHOLDERS["ink"], linewidth=1, dashes=(5, 4))

    def _scale_axes(self, axes: Any, height: int) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

        locator: Any = MaxNLocator(height // 40, steps=[1, 2, 2.5, 5, 10])
        if self.log and any((curve.y > 0).any() for curve in self.curves):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            locator = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: format_value(value))
        axes.set_xlim(self.first, max(self.last, self.first + 1))
        axes.set_ylim(*self.span)

    def _draw_bands_and_marks(self, axes: Any) -> None:
        for curve in self.curves:
            if self.bands and (curve.high > curve.low).any():
                style: Any = {"color": PLACEHOLDERS[curve.colour], "alpha": 0.11, "linewidth": 0}
                axes.fill_between(curve.x, curve.low, curve.high, **style)
        for colour, positions in self.marks.items():
            shares = np.unique(np.interp(positions, axes.get_xlim(), (0, BUCKETS)).round()) / BUCKETS
            style = {"color": PLACEHOLDERS[colour], "markersize": 16, "markeredgewidth": 1.5}
            axes.plot(shares, 0 * shares, "|", transform=axes.transAxes, **style)

    def _write_names(self, axes: Any, width: int, height: int) -> None:
        """Writes the unit of the horizontal axis to its left, and the names of curves and rules to the right."""
        quiet = PLACEHOLDERS["quiet"]
        axes.text(LEFT - 8, BOTTOM - 7, self.over, None, color=quiet, ha="right", va="top", transform=None)
        ends = self.ends()
        heights = [axes.transData.transform((self.first, value))[1] for value, _, _ in ends]
        for (value, name, colour), y in zip(ends, _spread(heights, height - TOP), strict=True):
            text = f"{format_value(value)} {name:.{NAME_LETTERS}}"
            style: Any = {"color": PLACEHOLDERS[colour], "va": "center", "transform": None, "gid": "end"}
            axes.text(width - RIGHT + 9, y, text, None, **style)


def _spread(heights: Sequence[float], top: float) -> np.ndarray:
    """Returns ascending heights moved apart, so that neighbours differ by NAME_HEIGHT and none is above `top`."""
    offsets = NAME_HEIGHT * np.arange(len(heights))
    return np.minimum(np.maximum.accumulate(np.maximum(heights, BOTTOM) - offsets) + offsets, top - offsets[::-1])


def _inline(svg: str, box: str) -> str:
    """Returns an SVG file's picture as HTML, without names that nothing refers to, in tenths of a pixel and the page's
    colours."""
    svg = re.sub("<svg[^>]*>", f'<svg viewBox="{box}">', svg[svg.index("<svg") :])
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace(' id="end"', ' class="end"')
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda numbers: re.sub(r"(\.\d)\d+|\n", r"\1", numbers[0]), svg)
    return re.sub("#feed(..)", lambda colour: f"var(--{COLOURS[int(colour[1], 16)]})", svg)


def format_value(value: float) -> str:
    """Returns three significant digits and, for a large value, a unit such as M; a dash for NaN."""
    if math.isnan(value):
        return "–"
    value = float(f"{value:.3g}")
    small = 0 < abs(value) < 0.001
    return np.format_float_scientific(value, trim="-", exp_digits=1) if small else format_count(value)
