"""Charts over steps, drawn as SVG in HTML: axes, curves, labels that keep out of one another's way.

Curves are stretched to the page's width (1000 units across, one unit a pixel down); their labels are HTML beside the
picture, so that text keeps its size on any screen. A curve has at most `BUCKETS` points, each the mean over its share
of the steps, so a chart's size does not grow with the run's length.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from engine.metrics import format_count

BUCKETS = 300
MOST_DOTS = 60


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Shares of the axis, 0 at `low`, 1 at `high`. On a logarithmic axis 0 and less lie at the bottom."""
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        at_least = np.where(values > self.low, values, np.where(np.isnan(values), np.nan, self.low))
        return np.log(at_least / self.low) / math.log(self.high / self.low)

    def at(self, value: float) -> float:
        return float(self.place(np.array([value]))[0])

    def ticks(self) -> list[float]:
        if not self.log:
            spacing = _round_spacing((self.high - self.low) / 6)
            first, last = math.ceil(self.low / spacing - 1e-9), math.floor(self.high / spacing + 1e-9)
            return [n * spacing for n in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(ticks) <= 6:
                return ticks
        return ticks[:: math.ceil(len(ticks) / 6)]


def linear_axis(values: Iterable[float]) -> Axis:
    """An axis around the finite ones of `values`, its ends round numbers."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high == low:
        low, high = low - abs(low) / 2, high + abs(high) / 2 or 1.0
    spacing = _round_spacing((high - low) / 10)
    return Axis(math.floor(low / spacing + 1e-9) * spacing, math.ceil(high / spacing - 1e-9) * spacing)


def log_axis(values: np.ndarray) -> Axis:
    """A logarithmic axis around the positive ones of `values`; the lowest hundredth may lie below it."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Axis(0.0, 1.0)
    low, high = float(np.quantile(positive, 0.01)), float(positive.max())
    return Axis(low / 1.15, high * 1.15, log=True)


def step_axis(steps: Sequence[float]) -> Axis:
    first, last = steps[0], steps[-1]
    return Axis(first, last if last > first else first + 1)


def _round_spacing(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Curve:
    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    band: tuple[np.ndarray, np.ndarray] | None = None
    thin: bool = False
    dots: bool = False
    label: bool = True
    label_name: str | None = None  # where the name beside the curve's end is shorter than the read-out's


@dataclass(frozen=True)
class Timeline:
    """The steps a chart spans, and those it marks."""

    steps: Sequence[float]
    events: Sequence[float] = ()
    skipped: Sequence[float] = ()


def downsample(
    steps: Sequence[float], values: Sequence[float] | np.ndarray, buckets: int = BUCKETS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a series into at most `buckets` runs: each one's middle step, and mean, least and greatest finite value.

    A run without any finite value is NaN and breaks the curve.
    """
    x, y = np.asarray(steps), np.asarray(values)
    edges = np.linspace(0, len(x), min(buckets, len(x)) + 1).astype(int)
    columns = []
    for start, stop in pairwise(edges):
        finite = y[start:stop][np.isfinite(y[start:stop])]
        three = (finite.mean(), finite.min(), finite.max()) if finite.size else (math.nan,) * 3
        columns.append(((x[start] + x[stop - 1]) / 2, *three))
    middle, mean, low, high = np.array(columns).T
    return middle, mean, low, high


def chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    timeline: Timeline,
    y: Axis,
    *,
    rules: Sequence[tuple[float, str]] = (),
    note: str = "",
    height: int = 240,
    over: str = "step",
) -> str:
    """A figure over steps, or what `over` names. `rules` are horizontal lines with the HTML of their labels."""
    x = step_axis(timeline.steps)

    def down(value: float) -> float:
        return height * (1 - y.at(value))

    shapes = [f'<path class="grid" d="{"".join(f"M0 {down(tick):.1f}H1000" for tick in y.ticks())}"/>']
    labels = []
    for curve in curves:
        if curve.band:
            low, high = curve.band
            shapes.append(f'<path class="band {curve.colour}" d="{_area(curve.steps, low, high, x, y, height)}"/>')
    for value, text in rules:
        shapes.append(f'<path class="rule" d="M0 {down(value):.1f}H1000"/>')
        labels.append((down(value), "ink", text, text))
    for curve in curves:
        style = f"thin {curve.colour}" if curve.thin else curve.colour
        line = path(curve.steps, curve.values, x, y, height)
        shapes.append(f'<path class="{style}" data-name="{escape(curve.name)}" d="{line}"/>')
        if curve.dots and len(curve.steps) <= MOST_DOTS:
            dots = "".join(f"M{point}h0" for point in _points(curve.steps, curve.values, x, y, height) if point)
            shapes.append(f'<path class="dots {style}" d="{dots}"/>')
        finite = curve.values[np.isfinite(curve.values)]
        if curve.label and finite.size:
            number, name = format_value(finite[-1]), escape(curve.label_name or curve.name)
            labels.append((down(finite[-1]), curve.colour, f"<b>{number}</b> {name}", f"{number} {name}"))
    for kind, steps, length in (("events", timeline.events, 7), ("skips", timeline.skipped, 12)):
        places = sorted({round(x.at(step) * 1000) for step in steps})
        if places:
            shapes.append(f'<path class="{kind}" d="{"".join(f"M{place} {height}v-{length}" for place in places)}"/>')

    beside = [
        f'<span class="y" style="top:{down(tick):.0f}px">{_label(tick)}</span>'
        for tick in y.ticks()
        if 0 <= down(tick) <= height
    ]
    mark = "{:,.0f}".format if over == "step" else _label
    beside += [f'<span class="x" style="left:{x.at(tick) * 100:.1f}%">{mark(tick)}</span>' for tick in x.ticks()]
    legend = "".join(f'<span class="{colour}">{text}</span>' for _, colour, text, _ in labels)
    for top, (_, colour, text, plain) in zip(_spread([label[0] for label in labels], height), labels, strict=True):
        beside.append(f'<span class="end {colour}" style="top:{top:.0f}px" title="{plain}">{text}</span>')
    kind = f'data-over="{over}"{" data-log" if y.log else ""}'
    scale = f'data-x0="{x.low:g}" data-x1="{x.high:.10g}" data-y0="{y.low:.6g}" data-y1="{y.high:.6g}"'
    return (
        f'<figure><figcaption><h3>{title}</h3><span class="kicker">{unit}</span><div class="about">{note}</div>'
        f'<div class="legend">{legend}</div>'
        f'</figcaption><div class="plot" style="height:{height}px" {kind} {scale}>'
        f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" role="img" aria-label="{title} over {over}s">'
        f'{"".join(shapes)}</svg>{"".join(beside)}<span class="x step">{over}</span>'
        '<div class="cursor"><div class="readout"></div></div></div></figure>'
    )


def _points(steps: np.ndarray, values: np.ndarray, x: Axis, y: Axis, height: int) -> list[str]:
    """SVG coordinates, `""` where the value is NaN."""
    # A value far off the axis is clipped by the picture's edge; the bound only keeps its digits few.
    down = np.clip(height * (1 - y.place(values)), -height, 2 * height)
    pairs = zip(x.place(steps) * 1000, down, strict=True)
    return ["" if math.isnan(v) else f"{_short(h)} {_short(v)}" for h, v in pairs]


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _stretches(points: list[str]) -> list[list[str]]:
    """The runs of points between gaps."""
    stretches: list[list[str]] = [[]]
    for point in points:
        if point:
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def path(steps: np.ndarray, values: np.ndarray, x: Axis, y: Axis, height: int) -> str:
    return "".join("M" + " ".join(stretch) for stretch in _stretches(_points(steps, values, x, y, height)))


def _area(steps: np.ndarray, low: np.ndarray, high: np.ndarray, x: Axis, y: Axis, height: int) -> str:
    upper = _stretches(_points(steps, high, x, y, height))
    lower = _stretches(_points(steps, low, x, y, height))
    return "".join(f"M{' '.join(top + bottom[::-1])}Z" for top, bottom in zip(upper, lower, strict=True))


def _spread(places: list[float], height: float, least: float = 15.0) -> list[float]:
    """Moves labels apart, to at least `least` pixels from one to the next, and keeps them beside the picture."""
    order = sorted(range(len(places)), key=places.__getitem__)
    result = list(places)
    bound = 0.0
    for index in order:
        result[index] = bound = max(result[index], bound)
        bound += least
    bound = height
    for index in reversed(order):
        result[index] = bound = min(result[index], bound)
        bound -= least
    return result


def _label(value: float) -> str:
    """An axis label: at most three figures; thousands as k, M, G, T."""
    if abs(value) >= 1e3:
        return format_count(value)
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.01 else _scientific(value)


def format_value(value: float) -> str:
    """A measured value, with three figures."""
    if abs(value) >= 1e3:
        return format_count(float(f"{value:.3g}"))
    return f"{value:#.3g}".removesuffix(".") if value == 0 or abs(value) >= 0.001 else _scientific(value)


def _scientific(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
