"""`report.html`: a run on one page, drawn from what it recorded. Needs no network and, but for read-outs, no script.

Curves are SVG stretched to the page's width (1000 units across, one unit a pixel down); their labels are HTML beside
it, so that text keeps its size on any screen. A curve has at most `BUCKETS` points, each the mean over its share of the
steps, so the page's size does not grow with the run's length.

Legend: S students, K teachers, R = S + K streams, students first.
"""

import json
import math
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np

from engine.metrics import (
    EvaluationRecord,
    EventRecord,
    SkippedRecord,
    Summary,
    format_count,
    format_seconds,
    read_metrics,
    stream_names,
)

BUCKETS = 300
SPARK_BUCKETS = 60
COLOURS = 8
MOST_DOTS = 60
LISTED_EVENTS = 200
SPARK_HEIGHT = 34


def write_report(run_dir: Path) -> Path:
    """Writes `<run_dir>/report.html` from `metrics.jsonl`, `config.yaml` and, once the run has ended, `summary.json`.

    A run that was killed or still goes on gets a report of what it has recorded so far. Returns the report's path.
    Raises ValueError if there is no `metrics.jsonl` or a line of it, other than the last, is not a record.
    """
    metrics, summary_path, config_path = (run_dir / name for name in ("metrics.jsonl", "summary.json", "config.yaml"))
    if not metrics.exists():
        raise ValueError(f"{metrics} does not exist: expected the folder of a run that has begun")
    history = read_history(metrics)
    summary: Summary | None = json.loads(summary_path.read_text("utf-8")) if summary_path.exists() else None
    config = config_path.read_text("utf-8") if config_path.exists() else ""
    name = summary["run"] if summary else run_dir.resolve().name

    body = "\n".join(
        [
            header(name, history, summary, config),
            results(summary) if summary else "",
            losses(history, summary),
            pairs(history, summary),
            divergences(history),
            optimisation(history),
            throughput(history),
            events(history),
            samples(summary) if summary else "",
            f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>" if config else "",
        ]
    )
    template = Template(Path(__file__).with_name("report_template.html").read_text("utf-8"))
    report = run_dir / "report.html"
    aside = run_dir / "report.html.part"
    aside.write_text(template.substitute(title=escape(name), body=body), "utf-8")
    os.replace(aside, report)
    return report


@dataclass
class History:
    """`metrics.jsonl` as columns. What was not finite is NaN."""

    students: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    steps: array = field(default_factory=lambda: array("d"))
    tokens_per_second: array = field(default_factory=lambda: array("d"))
    measures: dict[tuple[str, str], array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    kl: dict[tuple[int, int], array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    kl_steps: array = field(default_factory=lambda: array("d"))
    streams: int = 0  # R; 0 where there is no KL
    tokens: int = 0
    epoch: float = 0.0
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    skipped: list[SkippedRecord] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)

    def colour(self, student: str) -> str:
        return f"c{self.students.index(student) % COLOURS}"

    def evaluated(self, measure: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per student that has any: the steps and values of `measure` over the evaluations."""
        curves = {}
        for name in self.students:
            points = [
                (record["step"], record["students"][name][measure])
                for record in self.evaluations
                if name in record["students"] and record["students"][name][measure] is not None
            ]
            if points:
                steps, values = np.array(points, dtype=float).T
                curves[name] = downsample(steps, values)[:2]
        return curves


def read_history(path: Path) -> History:
    history = History()
    for record in read_metrics(path):
        match record["kind"]:
            case "streams":
                history.students, history.teachers = record["students"], record["teachers"]
            case "step":
                history.students = history.students or list(record["students"])
                history.tokens, history.epoch = record["tokens"], record["epoch"]
                history.steps.append(record["step"])
                history.tokens_per_second.append(_number(record["tokens_per_second"]))
                for name, numbers in record["students"].items():
                    for measure, value in numbers.items():
                        history.measures[name, measure].append(_number(value))
                if record["kl"]:
                    history.kl_steps.append(record["step"])
                for i, row in enumerate(record["kl"]):
                    history.streams = len(row)
                    for j, value in enumerate(row):
                        history.kl[i, j].append(_number(value))
            case "evaluation":
                history.evaluations.append(record)
            case "skipped":
                history.skipped.append(record)
            case "event":
                history.events.append(record)
    return history


def _number(value: object) -> float:
    return math.nan if value is None else float(value)  # pyright: ignore[reportArgumentType]


def header(name: str, history: History, summary: Summary | None, config: str) -> str:
    facts = []
    if summary:
        data = summary["data"]
        commit = summary["git_commit"]
        facts += [
            ("finished", datetime.fromisoformat(summary["finished"]).strftime("%-d %B %Y, %H:%M %Z").strip()),
            ("took", format_seconds(summary["seconds"])),
            ("steps", f"{summary['steps']:,}"),
            ("tokens seen", format_count(summary["tokens"])),
            ("on", f"{summary['world_size']} × {summary['device']}, ZeRO {summary['zero_stage']}"),
            ("data", f"{data['name']}, {format_count(data['train_words'])} words"),
        ]
    else:
        found = re.search(r"^# git[_ ]commit: (\S+)", config, re.MULTILINE)
        commit = found.group(1) if found else None
        last = f"{history.steps[-1]:,.0f}" if history.steps else "none yet"
        facts += [
            ("state", "not finished"),
            ("last step", last),
            ("tokens seen", format_count(history.tokens)),
        ]
    if history.epoch:
        facts.append(("epochs", f"{history.epoch:.2f}"))
    if commit:
        facts.append(("git commit", commit[:12]))
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    return f'<header><p class="kicker">Crèche, run</p><h1>{escape(name)}</h1><dl class="facts">{items}</dl></header>'


def results(summary: Summary) -> str:
    data, students = summary["data"], summary["students"]
    entropy = data["entropy_per_word"]
    has_pairs = any(student["pairs_accuracy"] is not None for student in students)
    columns = [("parameters", ""), ("validation loss", "nats per token"), ("validation loss", "nats per word")]
    columns += [("above the best", "nats per word")] if entropy is not None else []
    columns += [("minimal pairs", "right")] if has_pairs else []
    columns += [("speed", "tokens/s"), ("best at", "step")]
    head = "".join(f'<th>{title}<span class="unit">{unit}</span></th>' for title, unit in columns)
    best_loss = min(student["validation_loss_per_word"] for student in students)
    best_pairs = max(student["pairs_accuracy"] or 0.0 for student in students)

    rows = []
    for index, student in enumerate(students):
        loss, accuracy = student["validation_loss_per_word"], student["pairs_accuracy"]
        mark = ' class="best"' if loss == best_loss and len(students) > 1 else ""
        cells = [
            f"<td>{format_count(student['parameters'])}</td>",
            f"<td{mark}>{student['validation_loss']:.4f}</td>",
            f"<td{mark}>{loss:.4f}</td>",
        ]
        if entropy is not None:
            cells.append(f"<td{mark}>{loss - entropy:+.4f}</td>")
        if has_pairs:
            mark = ' class="best"' if accuracy == best_pairs and len(students) > 1 else ""
            cells.append(f"<td{mark}>{'' if accuracy is None else f'{accuracy:.1%}'}</td>")
        cells += [f"<td>{student['tokens_per_second']:,.0f}</td>", f"<td>{student['best_step']:,}</td>"]
        rows.append(
            f'<tr><th scope="row">{_swatch(index)}{escape(student["name"])}'
            f'<span class="folder">{escape(student["folder"])}</span></th>{"".join(cells)}</tr>'
        )
    if entropy is not None:
        rest = "<td></td>" * (len(columns) - 3)
        rows.append(
            '<tr class="floor"><th scope="row">best possible: the entropy of the source</th><td></td>'
            f"<td>{entropy / data['tokens_per_word']:.4f}</td><td>{entropy:.4f}</td>{rest}</tr>"
        )
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th>student</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def losses(history: History, summary: Summary | None) -> str:
    if not history.steps:
        return '<h2>Loss</h2><p class="note">No step has been recorded yet.</p>'
    validation = history.evaluated("validation_loss")
    training = {name: downsample(history.steps, history.measures[name, "ce"]) for name in history.students}
    curves = []
    for name, (steps, mean, low, high) in training.items():
        colour = history.colour(name)
        label = not validation
        curves.append(Curve(f"{name}, training", steps, mean, colour, thin=not label, band=(low, high), label=label))
    for name, (steps, values) in validation.items():
        curves.append(Curve(f"{name}, validation", steps, values, history.colour(name), dots=True, label_name=name))

    rules = []
    if summary and summary["data"]["entropy_per_word"] is not None:
        entropy = summary["data"]["entropy_per_word"] / summary["data"]["tokens_per_word"]
        rules.append((entropy, f"<b>{_value(entropy)}</b> best possible"))

    # The first steps fall from ln V and would press the rest of the curve flat; they are cut off, and the page says so.
    drawn = [*(mean for _, mean, _, _ in training.values()), *(values for _, values in validation.values())]
    drawn = [values[np.isfinite(values)] for values in drawn] + [np.array([height]) for height, _ in rules]
    drawn = [values for values in drawn if values.size] or [np.zeros(1)]
    low, top = min(values.min() for values in drawn), max(values.max() for values in drawn)
    high = max(np.quantile(values, 0.97) for values in drawn)
    note = "Faint: training batches, their mean and range. Strong: the held-out text."
    if not validation:
        note = "Training batches, their mean and range."
    if top - low > 1.35 * (high - low):
        peaks = (np.nanmax(highs) for _, _, _, highs in training.values() if np.isfinite(highs).any())
        note += f" Cut at the top: the first losses reached {max(peaks, default=top):.3g}."
    else:
        high = top
    figure = chart(
        "Cross-entropy",
        "nats per token",
        curves,
        history,
        linear_axis([low, high]),
        rules=rules,
        note=note,
        height=360,
    )
    return f'<h2>Loss</h2><div class="charts one">{figure}</div>'


def pairs(history: History, summary: Summary | None) -> str:
    curves = [
        Curve(name, steps, values * 100, history.colour(name), dots=True)
        for name, (steps, values) in history.evaluated("pairs_accuracy").items()
    ]
    if not curves:
        return ""
    axis = linear_axis([45.0, *(value for curve in curves for value in curve.values)])
    rules = [(50.0, "chance")]
    figure = chart("Accuracy", "% of pairs", curves, history, axis, rules=rules, height=240)
    table = phenomena(summary) if summary else ""
    return (
        '<h2>Minimal pairs</h2><p class="note">How often a student finds the grammatical sentence of a pair more'
        f' probable than the ungrammatical one.</p><div class="charts">{figure}{table}</div>'
    )


def phenomena(summary: Summary) -> str:
    """Accuracy per phenomenon and student: blue above chance, orange below."""
    students = summary["students"]
    names = list(dict.fromkeys(name for student in students for name in student["pairs_by_phenomenon"]))
    if not names:
        return ""
    head = "".join(f"<th>{_swatch(i)}{escape(student['name'])}</th>" for i, student in enumerate(students))
    rows = []
    for name in names:
        cells = []
        for student in students:
            value = student["pairs_by_phenomenon"].get(name)
            if value is None:
                cells.append("<td></td>")
            else:
                side = "--tint" if value >= 0.5 else "--low"
                cells.append(f'<td class="score" {_tint(abs(value - 0.5) * 2, side)}>{value:.1%}</td>')
        rows.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def divergences(history: History) -> str:
    """The KL matrix: its last values as a heat map, each cell with its course over the run."""
    if history.streams < 2:
        return ""
    names = stream_names(history.students, history.teachers, history.streams)
    off_diagonal = {pair: column for pair, column in history.kl.items() if pair[0] != pair[1]}
    courses = {pair: downsample(history.kl_steps, column, SPARK_BUCKETS) for pair, column in off_diagonal.items()}
    axis = log_axis(np.concatenate([mean for _, mean, _, _ in courses.values()]))
    last = max(1, len(history.kl_steps) // 50)

    students = len(history.students)
    head = "".join(f"<th>{_swatch(j)}{escape(name)}</th>" for j, name in enumerate(names[:students]))
    head += "".join(f'<th class="teacher">{escape(name)}</th>' for name in names[students:])
    rows = []
    for i, learner in enumerate(history.students):
        cells = []
        for j in range(history.streams):
            if i == j:
                cells.append('<td class="self"></td>')
                continue
            steps, mean, _, _ = courses[i, j]
            recent = np.asarray(history.kl[i, j][-last:])
            recent = recent[np.isfinite(recent)]
            value = recent.mean() if recent.size else math.nan
            share = axis.at(value) if value > 0 else 0.0
            colour = f"c{j % COLOURS}" if j < students else "ink"
            path = _path(steps, mean, step_axis(history), axis, SPARK_HEIGHT)
            cells.append(
                f'<td class="pair" {_tint(share)}>{_value(value)}'
                f'<svg class="spark {colour}" viewBox="0 0 1000 {SPARK_HEIGHT}" preserveAspectRatio="none"'
                f' aria-hidden="true"><path d="{path}"/></svg></td>'
            )
        rows.append(f'<tr><th scope="row">{_swatch(i)}{escape(learner)}</th>{"".join(cells)}</tr>')

    curves = []
    for i, learner in enumerate(history.students):
        others = [np.asarray(history.kl[i, j]) for j in range(history.streams) if j != i]
        steps, mean, low, high = downsample(history.kl_steps, np.mean(others, axis=0))
        curves.append(Curve(learner, steps, mean, history.colour(learner), band=(low, high)))
    title = "Mean over the streams a student learns from"
    figure = chart(title, "nats per token", curves, history, _log_axis_of(curves), height=220)
    over = f"the last {last:,} recorded steps" if last > 1 else "the last recorded step"
    return (
        '<h2>Who differs from whom</h2><p class="note">KL divergence, nats per token: how far the row’s student'
        f" is from the column’s stream. Numbers: mean over {over}; the darker, the farther. Curves: the whole run,"
        f" logarithmic, {axis.low:.2g} to {axis.high:.2g} in every cell.</p>"
        f'<div class="scroll"><table class="heat"><thead><tr><th>learner</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><div class="charts one">{figure}</div>'
    )


def optimisation(history: History) -> str:
    if not history.steps:
        return ""
    norms = _student_curves(history, "grad_norm", band=True)
    rates = _student_curves(history, "lr")
    clipped = []
    for name in history.students:
        column = np.asarray(history.measures[name, "clipped"])
        clipped.append(f"{escape(name)} {np.nanmean(column):.0%}" if np.isfinite(column).any() else escape(name))
    note = f"Before clipping. Steps clipped: {', '.join(clipped)}."
    return (
        '<h2>Optimisation</h2><div class="charts">'
        + chart("Gradient norm", "", norms, history, _log_axis_of(norms), note=note)
        + chart("Learning rate", "", rates, history, _axis_from_zero(rates))
        + "</div>"
    )


def throughput(history: History) -> str:
    if not history.steps:
        return ""
    steps, mean, low, high = downsample(history.steps, history.tokens_per_second)
    total = Curve("all", steps, mean, "ink", band=(low, high))
    speeds = [*_student_curves(history, "tokens_per_second"), total]
    flops = _student_curves(history, "model_flops_per_second")
    return (
        '<h2>Throughput</h2><div class="charts">'
        + chart("Tokens per second", "", speeds, history, _axis_from_zero(speeds))
        + chart("Model FLOP/s", "recomputation not counted", flops, history, _axis_from_zero(flops))
        + "</div>"
    )


def events(history: History) -> str:
    lines = [
        (record["step"], "skip", f"skipped: {', '.join(record['students'])}: {record['reason']}")
        for record in history.skipped
    ]
    lines += [(record["step"], "", record["text"]) for record in history.events]
    if not lines:
        return ""
    lines.sort(key=lambda line: line[0])
    items = [
        f'<li class="{kind}"><span>step {step:,}</span>{escape(text)}</li>'
        for step, kind, text in lines[:LISTED_EVENTS]
    ]
    if len(lines) > LISTED_EVENTS:
        items.append(f"<li><span></span>and {len(lines) - LISTED_EVENTS:,} more in metrics.jsonl</li>")
    return (
        '<h2>Events</h2><p class="note">Ticks on the step axes: red, a step that was skipped for every student;'
        f' grey, any other event.</p><ul class="events-list">{"".join(items)}</ul>'
    )


def samples(summary: Summary) -> str:
    columns = []
    for index, student in enumerate(summary["students"]):
        if student["samples"]:
            quotes = "".join(f"<blockquote>{escape(text)}</blockquote>" for text in student["samples"])
            columns.append(f"<div><h3>{_swatch(index)}{escape(student['name'])}</h3>{quotes}</div>")
    if not columns:
        return ""
    return (
        '<h2>In their own words</h2><p class="note">Generated by each student after the last step, unedited.</p>'
        f'<div class="samples">{"".join(columns)}</div>'
    )


def _student_curves(history: History, measure: str, *, band: bool = False) -> list["Curve"]:
    curves = []
    for name in history.students:
        steps, mean, low, high = downsample(history.steps, history.measures[name, measure])
        curves.append(Curve(name, steps, mean, history.colour(name), band=(low, high) if band else None))
    return curves


def _axis_from_zero(curves: Sequence["Curve"]) -> "Axis":
    return linear_axis([0.0, *(value for curve in curves for value in curve.values)])


def _log_axis_of(curves: Sequence["Curve"]) -> "Axis":
    return log_axis(np.concatenate([bound for curve in curves for bound in curve.band or (curve.values,)]))


def _swatch(index: int) -> str:
    return f'<i class="swatch c{index % COLOURS}"></i>'


def _tint(share: float, colour: str = "--tint") -> str:
    """A cell's background; faint enough at 1 that text stays legible on it in light and dark."""
    return f'style="background:rgb(var({colour}) / {0.04 + 0.4 * min(max(share, 0.0), 1.0):.2f})"'


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


def step_axis(history: History) -> Axis:
    first, last = history.steps[0], history.steps[-1]
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
    history: History,
    y: Axis,
    *,
    rules: Sequence[tuple[float, str]] = (),
    note: str = "",
    height: int = 240,
) -> str:
    """A figure over steps. `rules` are horizontal lines with the HTML of their labels."""
    x = step_axis(history)

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
        path = _path(curve.steps, curve.values, x, y, height)
        shapes.append(f'<path class="{style}" data-name="{escape(curve.name)}" d="{path}"/>')
        if curve.dots and len(curve.steps) <= MOST_DOTS:
            dots = "".join(f"M{point}h0" for point in _points(curve.steps, curve.values, x, y, height) if point)
            shapes.append(f'<path class="dots {style}" d="{dots}"/>')
        finite = curve.values[np.isfinite(curve.values)]
        if curve.label and finite.size:
            number, name = _value(finite[-1]), escape(curve.label_name or curve.name)
            labels.append((down(finite[-1]), curve.colour, f"<b>{number}</b> {name}", f"{number} {name}"))
    for kind, records, length in (("events", history.events, 7), ("skips", history.skipped, 12)):
        places = sorted({round(x.at(record["step"]) * 1000) for record in records})
        if places:
            shapes.append(f'<path class="{kind}" d="{"".join(f"M{place} {height}v-{length}" for place in places)}"/>')

    beside = [
        f'<span class="y" style="top:{down(tick):.0f}px">{_label(tick)}</span>'
        for tick in y.ticks()
        if 0 <= down(tick) <= height
    ]
    beside += [f'<span class="x" style="left:{x.at(tick) * 100:.1f}%">{tick:,.0f}</span>' for tick in x.ticks()]
    legend = "".join(f'<span class="{colour}">{text}</span>' for _, colour, text, _ in labels)
    for top, (_, colour, text, plain) in zip(_spread([label[0] for label in labels], height), labels, strict=True):
        beside.append(f'<span class="end {colour}" style="top:{top:.0f}px" title="{plain}">{text}</span>')
    scale = f'data-x0="{x.low:g}" data-x1="{x.high:.10g}" data-y0="{y.low:.6g}" data-y1="{y.high:.6g}"'
    return (
        f'<figure><figcaption><h3>{title}</h3><span class="kicker">{unit}</span><div class="about">{note}</div>'
        f'<div class="legend">{legend}</div>'
        f'</figcaption><div class="plot" style="height:{height}px" {scale}{" data-log" if y.log else ""}>'
        f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" role="img" aria-label="{title} over steps">'
        f'{"".join(shapes)}</svg>{"".join(beside)}<span class="x step">step</span>'
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


def _path(steps: np.ndarray, values: np.ndarray, x: Axis, y: Axis, height: int) -> str:
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


def _value(value: float) -> str:
    """A measured value, with three figures."""
    if abs(value) >= 1e3:
        return format_count(float(f"{value:.3g}"))
    return f"{value:#.3g}".removesuffix(".") if value == 0 or abs(value) >= 0.001 else _scientific(value)


def _scientific(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
