"""`report.html`: a run on one page, drawn from what it recorded. Needs no network and, but for read-outs, no script.

Legend: S students, K teachers, R = S + K streams, students first.
"""

import json
import math
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from engine.charts import (
    Axis,
    Curve,
    Timeline,
    chart,
    downsample,
    format_value,
    linear_axis,
    log_axis,
    path,
    step_axis,
)
from engine.metrics import (
    EvaluationRecord,
    EventRecord,
    OuterRecord,
    SkippedRecord,
    Summary,
    format_count,
    format_seconds,
    read_metrics,
    stream_names,
)

SPARK_BUCKETS = 60
COLOURS = 8
LISTED_EVENTS = 200
SPARK_HEIGHT = 34
NEGLIGIBLE = 0.01  # share of the hypergradient's terms beside the first


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
            weights(history),
            optimisation(history),
            throughput(history),
            compute(history, summary),
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
    model_flops: array = field(default_factory=lambda: array("d"))
    mfu: array = field(default_factory=lambda: array("d"))
    hfu: array = field(default_factory=lambda: array("d"))
    measures: dict[tuple[str, str], array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    kl: dict[tuple[int, int], array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    kl_steps: array = field(default_factory=lambda: array("d"))
    streams: int = 0  # R; 0 where there is no KL
    tokens: int = 0
    epoch: float = 0.0
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    skipped: list[SkippedRecord] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    outer: list[OuterRecord] = field(default_factory=list)

    def colour(self, student: str) -> str:
        return f"c{self.students.index(student) % COLOURS}"

    def timeline(self) -> Timeline:
        return Timeline(self.steps, [e["step"] for e in self.events], [s["step"] for s in self.skipped])

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
                for measure in ("model_flops", "mfu", "hfu"):
                    getattr(history, measure).append(_number(record.get(measure)))
                for name, numbers in record["students"].items():
                    for measure, value in numbers.items():
                        history.measures[name, measure].append(_number(value))
                if record["kl"]:
                    history.kl_steps.append(record["step"])
                for i, row in enumerate(record["kl"]):
                    history.streams = len(row)
                    for j, value in enumerate(row):
                        history.kl[i, j].append(_number(value))
            case "outer":
                history.outer.append(record)
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
    columns += [("own speed", "tokens/s"), ("best at", "step")]
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
        rules.append((entropy, f"<b>{format_value(entropy)}</b> best possible"))

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
        history.timeline(),
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
    figure = chart("Accuracy", "% of pairs", curves, history.timeline(), axis, rules=rules, height=240)
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
            line = path(steps, mean, step_axis(history.steps), axis, SPARK_HEIGHT)
            cells.append(
                f'<td class="pair" {_tint(share)}>{format_value(value)}'
                f'<svg class="spark {colour}" viewBox="0 0 1000 {SPARK_HEIGHT}" preserveAspectRatio="none"'
                f' aria-hidden="true"><path d="{line}"/></svg></td>'
            )
        rows.append(f'<tr><th scope="row">{_swatch(i)}{escape(learner)}</th>{"".join(cells)}</tr>')

    curves = []
    for i, learner in enumerate(history.students):
        others = [np.asarray(history.kl[i, j]) for j in range(history.streams) if j != i]
        steps, mean, low, high = downsample(history.kl_steps, np.mean(others, axis=0))
        curves.append(Curve(learner, steps, mean, history.colour(learner), band=(low, high)))
    title = "Mean over the streams a student learns from"
    figure = chart(title, "nats per token", curves, history.timeline(), _log_axis_of(curves), height=220)
    over = f"the last {last:,} recorded steps" if last > 1 else "the last recorded step"
    return (
        '<h2>Who differs from whom</h2><p class="note">KL divergence, nats per token: how far the row’s student'
        f" is from the column’s stream. Numbers: mean over {over}; the darker, the farther. Curves: the whole run,"
        f" logarithmic, {axis.low:.2g} to {axis.high:.2g} in every cell.</p>"
        f'<div class="scroll"><table class="heat"><thead><tr><th>learner</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><div class="charts one">{figure}</div>'
    )


def weights(history: History) -> str:
    """The students' weights ω over the run, and what moved them."""
    if not history.outer:
        return ""
    steps = [float(record["step"]) for record in history.outer]
    curves = [
        Curve(name, *downsample(steps, [record["omega"][name] for record in history.outer])[:2], history.colour(name))
        for name in history.students
    ]
    terms = {"direct": "the ensemble itself", "own": "their own cross-entropy", "peers": "what they teach the others"}
    shares = {term: np.mean([_number(record["shares"][term]) for record in history.outer]) for term in terms}
    listed = ", ".join(f"{shares[term]:.1%} {text}" for term, text in terms.items())
    note = f"Moved by {listed} (the hypergradient’s terms; means over {len(history.outer):,} updates)."
    if shares["own"] + shares["peers"] < NEGLIGIBLE:
        note += " How ω changes what the students learn is negligible here: outer.terms=first would do without it."
    figure = chart("Weights of the students", "", curves, history.timeline(), _axis_from_zero(curves), note=note)
    return f'<h2>Whom the ensemble trusts</h2><div class="charts one">{figure}</div>'


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
        + chart("Gradient norm", "", norms, history.timeline(), _log_axis_of(norms), note=note)
        + chart("Learning rate", "", rates, history.timeline(), _axis_from_zero(rates))
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
        + chart(
            "Tokens per second",
            "total, and each student by the time of its own work",
            speeds,
            history.timeline(),
            _axis_from_zero(speeds),
        )
        + chart("Model FLOP/s", "recomputation not counted", flops, history.timeline(), _axis_from_zero(flops))
        + _utilisation(history)
        + "</div>"
    )


def _utilisation(history: History) -> str:
    curves = []
    for name, column, colour in (("MFU", history.mfu, "ink"), ("HFU", history.hfu, "c0")):
        steps, mean, low, high = downsample(history.steps, np.asarray(column) * 100)
        curves.append(Curve(name, steps, mean, colour, band=(low, high)))
    if not any(np.isfinite(curve.values).any() for curve in curves):
        return ""
    note = "MFU: model FLOPs of students, teachers and outer loop. HFU: also what is formed again, or masked."
    unit = "% of what the devices could do"
    return chart("Utilisation", unit, curves, history.timeline(), _axis_from_zero(curves), note=note)


def compute(history: History, summary: Summary | None) -> str:
    """The ledger, and the loss against it."""
    flops, before = np.asarray(history.model_flops), 0
    parts = []
    if summary and "ledger" in summary:
        before = summary.get("before", {}).get("model", 0)
        parts.append(_ledger(summary["ledger"], before))
    if flops.size and np.isfinite(flops).all():
        evaluated = history.evaluated("validation_loss") or {
            name: downsample(history.steps, history.measures[name, "ce"])[:2] for name in history.students
        }
        curves = [
            Curve(name, np.interp(steps, history.steps, flops + before), values, history.colour(name), dots=True)
            for name, (steps, values) in evaluated.items()
        ]
        axis = linear_axis([value for curve in curves for value in curve.values])
        note = "All of the run’s, its teachers’ own training included where it is known."
        spans = Timeline((flops + before).tolist())
        figure = chart("Loss", "nats per token", curves, spans, axis, note=note, over="model FLOP")
        parts.append(f'<div class="charts one">{figure}</div>')
    return f"<h2>Compute</h2>{''.join(parts)}" if parts else ""


def _ledger(ledger: dict[str, Any], before: int) -> str:
    accounts = [*ledger["students"].items(), ("teachers, as they taught", ledger["teachers"])]
    accounts.append(("outer loop", ledger["outer"]))
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{format_count(one[key])}</td>" for key in ("tokens", "words", "model_flops", "hardware_flops"))
        + f"<td>{format_seconds(one['seconds'])}</td></tr>"
        for name, one in accounts
        if one["model_flops"]
    ]
    if before:
        rest = "<td></td>" * 2
        rows.append(f'<tr><th scope="row">teachers’ own training</th>{rest}<td>{format_count(before)}</td>{rest}</tr>')
    head = "".join(
        f"<th>{title}</th>" for title in ("", "tokens", "words", "model FLOPs", "hardware FLOPs", "own seconds")
    )
    notes = [f"{format_seconds(ledger['seconds'])} of training in all; the joint loss is nobody’s own."]
    if "joules" in ledger:
        notes.append(f"The devices report {format_count(ledger['joules'] / 3.6e6)} kWh.")
    if ledger["untold"]:
        notes.append(f"What these cost to train is not known: {', '.join(ledger['untold'])}.")
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div><p class="note">{escape(" ".join(notes))}</p>'
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


def _student_curves(history: History, measure: str, *, band: bool = False) -> list[Curve]:
    curves = []
    for name in history.students:
        steps, mean, low, high = downsample(history.steps, history.measures[name, measure])
        curves.append(Curve(name, steps, mean, history.colour(name), band=(low, high) if band else None))
    return curves


def _axis_from_zero(curves: Sequence[Curve]) -> Axis:
    return linear_axis([0.0, *(value for curve in curves for value in curve.values)])


def _log_axis_of(curves: Sequence[Curve]) -> Axis:
    return log_axis(np.concatenate([bound for curve in curves for bound in curve.band or (curve.values,)]))


def _swatch(index: int) -> str:
    return f'<i class="swatch c{index % COLOURS}"></i>'


def _tint(share: float, colour: str = "--tint") -> str:
    """A cell's background; faint enough at 1 that text stays legible on it in light and dark."""
    return f'style="background:rgb(var({colour}) / {0.04 + 0.4 * min(max(share, 0.0), 1.0):.2f})"'
