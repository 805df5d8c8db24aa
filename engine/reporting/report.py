"""`report.html`: one page that shows a run from what it has recorded, without a network or scripts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.reporting.charts import Chart, Curve, curve, format_value
from engine.reporting.records import EvaluationRecord, OuterRecord, StepRecord, Summary, read_metrics
from engine.system.errors import UserError
from engine.system.files import write_text
from engine.system.formatting import format_count, format_seconds

KL_POINTS = 100  # most points of a divergence's curve
NEGLIGIBLE = 0.01  # a share of the hypergradient's terms other than the direct one that is not worth their time


def write_report(run_dir: Path) -> Path:
    """Writes `<run_dir>/report.html` from `metrics.jsonl`, `config.yaml` and, once the run has ended, `summary.json`.

    It returns the report's path. A run that was killed or is still going on gets a report of what it has recorded so
    far. Raises UserError where there is no `metrics.jsonl`, or a line of it other than the last is not a record.
    """
    metrics, summary_path, config_path = (run_dir / name for name in ("metrics.jsonl", "summary.json", "config.yaml"))
    if not metrics.exists():
        raise UserError(f"{metrics} does not exist: name the folder of a run that has begun, such as runs/mutual")
    history = read_history(metrics)
    summary: Summary | None = json.loads(summary_path.read_text("utf-8")) if summary_path.exists() else None
    config = config_path.read_text("utf-8") if config_path.exists() else ""

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader = FileSystemLoader(Path(__file__).parent)
    environment.filters.update(count=format_count, seconds=format_seconds, value=format_value)
    page = environment.get_template("report_template.html").render(
        name=summary["run"] if summary else run_dir.resolve().name,
        facts=facts(history, summary, config),
        summary=summary,
        loss=loss(history, summary),
        pairs=pairs(history),
        divergences=divergences(history),
        sections={
            "Whom the ensemble trusts": weights(history),
            "Optimisation": optimisation(history),
            "Throughput": throughput(history),
        },
        compute=compute(history, summary),
        events=history.events,
        config=config,
    )
    report = run_dir / "report.html"
    write_text(report, page)
    return report


@dataclass
class History:
    """The records of `metrics.jsonl`, by kind. A number that was not finite is None."""

    students: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    outer: list[OuterRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    events: list[tuple[int, str, str]] = field(default_factory=list)  # step, "event" or "skipped", text

    def chart(self, title: str, unit: str, curves: list[Curve], **options: Any) -> Chart:
        """Returns a chart over all steps of which a number is recorded, in which all events are marked."""
        steps = _steps([*self.steps, *self.evaluations, *self.outer])
        marks = {
            colour: [step for step, event_kind, _ in self.events if event_kind == kind]
            for colour, kind in (("quiet", "event"), ("alarm", "skipped"))
        }
        return Chart(title, unit, curves, min(steps), max(steps), marks=marks, **options)

    def totals(self, measure: str) -> np.ndarray:
        """Returns `measure` of the whole run at each recorded step, NaN where it is not known."""
        return np.array([record.get(measure) for record in self.steps], float)

    def recorded(self, measure: str) -> list[Curve]:
        """Returns one curve per student: `measure` over the steps."""
        return self._curves(self.steps, measure)

    def evaluated(self, measure: str) -> list[Curve]:
        """Returns one curve per student: `measure` over the evaluations. Where no evaluation has it, there is none."""
        scores = [student[measure] for record in self.evaluations for student in record["students"].values()]
        return self._curves(self.evaluations, measure) if any(score is not None for score in scores) else []

    def _curves(self, records: Sequence[StepRecord | EvaluationRecord], measure: str) -> list[Curve]:
        return [
            curve(name, _steps(records), [record["students"][name][measure] for record in records], colour(i))
            for i, name in enumerate(self.students)
        ]


def _steps(records: Sequence[StepRecord | EvaluationRecord | OuterRecord]) -> list[int]:
    return [record["step"] for record in records]


def colour(stream: int) -> str:
    """Returns the colour of a stream's curves; it is the same in all charts."""
    return f"c{stream % 8}"


def read_history(path: Path) -> History:
    """Returns what a `metrics.jsonl` records."""
    history = History()
    for record in read_metrics(path):
        match record["kind"]:
            case "streams":
                history.students, history.teachers = record["students"], record["teachers"]
            case "step":
                history.steps.append(record)
            case "outer":
                history.outer.append(record)
            case "evaluation":
                history.evaluations.append(record)
            case "skipped":
                text = f"skipped: {', '.join(record['students'])}: {record['reason']}"
                history.events.append((record["step"], "skipped", text))
            case "event":
                history.events.append((record["step"], "event", record["text"]))
    return history


def facts(history: History, summary: Summary | None, config: str) -> dict[str, str]:
    """Returns what stands at the top of the page, by name."""
    last = history.steps[-1] if history.steps else None
    if summary:
        data, commit = summary["data"], summary["git_commit"]
        facts = {
            "finished": datetime.fromisoformat(summary["finished"]).strftime("%-d %B %Y, %H:%M %Z").strip(),
            "took": format_seconds(summary["seconds"]),
            "steps": f"{summary['steps']:,}",
            "tokens seen": format_count(summary["tokens"]),
            "on": f"{summary['world_size']} × {summary['device']}, ZeRO {summary['zero_stage']}",
            "data": f"{data['name']}, {format_count(data['train_words'])} words",
        }
    else:
        comment = re.search(r"^# git_commit: (\S+)", config, re.MULTILINE)
        commit = comment.group(1) if comment else None
        facts = {"state": "not finished", "last step": f"{last['step']:,}" if last else "none yet"}
    if last:
        facts.setdefault("tokens seen", format_count(last["tokens"]))
        facts["epochs"] = f"{last['epoch']:.2f}"
    if commit:
        facts["git commit"] = commit[:12]
    return facts


def loss(history: History, summary: Summary | None) -> list[Chart]:
    """Returns the chart of the cross-entropy on training batches and held-out text."""
    if not history.steps:
        return []
    training, validation = history.recorded("ce"), history.evaluated("validation_loss")
    note = "Training batches, their mean and range."
    if validation:
        training = [replace(curve, faint=True) for curve in training]
        note = "Faint: training batches, their mean and range. Strong: the held-out text."
    curves, rules = [*training, *validation], {}
    if summary and summary["data"]["entropy_per_word"] is not None:
        rules["best possible"] = summary["data"]["entropy_per_word"] / summary["data"]["tokens_per_word"]

    # The losses of the first steps, which fall from ln V, would press the rest of a curve flat. So the chart is cut off
    # above most of the values, and the note says so.
    finite = [values for curve in curves if (values := curve.y[np.isfinite(curve.y)]).size] or [np.zeros(1)]
    low, top = min([*rules.values(), *(values.min() for values in finite)]), max(values.max() for values in finite)
    high = max(np.quantile(values, 0.97) for values in finite)
    cut = top - low > 1.35 * (high - low)
    if cut:
        peak = np.nanmax([curve.high for curve in training], initial=top)
        note += f" Cut at the top: the first losses reached {peak:.3g}."
    span = (None, high if cut else None)
    return [history.chart("Cross-entropy", "nats per token", curves, span=span, bands=True, rules=rules, note=note)]


def pairs(history: History) -> list[Chart]:
    """Returns the chart of the accuracy on minimal pairs, where there are any."""
    curves = [replace(curve, y=100 * curve.y) for curve in history.evaluated("pairs_accuracy")]
    return [history.chart("Accuracy", "% of pairs", curves, rules={"chance": 50})] if curves else []


def divergences(history: History) -> dict[str, Any] | None:
    """Returns the matrix of KL divergences over the last steps, each value's share of the largest one, and the charts.

    Without divergences it returns None.
    """
    records = [record for record in history.steps if record["kl"]]
    if not records:
        return None
    names, steps = [*history.students, *history.teachers], _steps(records)
    kl = np.array([record["kl"] for record in records], float)  # [steps, S, R]
    curves = [
        [curve(name, steps, kl[:, i, j], colour(j), KL_POINTS) for j, name in enumerate(names) if j != i]
        for i in range(len(history.students))
    ]
    values = np.concatenate([curve.y for row in curves for curve in row])
    positive = values[values > 0]
    span = (positive.min() / 1.15, positive.max() * 1.15) if positive.size else (None, None)  # the same in all charts
    last = np.full((len(curves), len(names)), np.nan)
    last[~np.eye(*last.shape, dtype=bool)] = [curve.y[-1] for row in curves for curve in row]
    return {
        "names": names,
        "steps": max(1, len(steps) // KL_POINTS),
        "last": last,
        "shares": np.nan_to_num(last / np.nanmax(last, initial=1e-9)),
        "charts": [
            history.chart(f"{name} learns from", "nats per token", row, span=span, log=True)
            for name, row in zip(history.students, curves, strict=True)
        ],
    }


def weights(history: History) -> list[Chart]:
    """Returns the chart of the students' weights ω; its note says what moved them."""
    if not history.outer:
        return []
    steps = _steps(history.outer)
    curves = [
        curve(name, steps, [record["omega"][name] for record in history.outer], colour(i))
        for i, name in enumerate(history.students)
    ]
    terms = {"direct": "the ensemble itself", "own": "their own cross-entropy", "peers": "what they teach the others"}
    shares = np.array([[record["shares"][term] for term in terms] for record in history.outer], float).mean(0)
    listed = ", ".join(f"{share:.1%} {text}" for share, text in zip(shares, terms.values(), strict=True))
    note = f"Moved by {listed} (the hypergradient’s terms; means over {len(steps):,} updates)."
    if shares[1:].sum() < NEGLIGIBLE:
        note += " How ω changes what the students learn is negligible here: outer.terms=direct would do without it."
    return [history.chart("Weights of the students", "", curves, span=(0, None), note=note)]


def optimisation(history: History) -> list[Chart]:
    """Returns the charts of gradient norms and learning rates."""
    if not history.steps:
        return []
    clipped = (
        f"{name} {np.mean([record['students'][name]['clipped'] for record in history.steps]):.0%}"
        for name in history.students
    )
    note = f"Before clipping. Steps clipped: {', '.join(clipped)}."
    return [
        history.chart("Gradient norm", "", history.recorded("grad_norm"), log=True, bands=True, note=note),
        history.chart("Learning rate", "", history.recorded("lr"), span=(0, None)),
    ]


def throughput(history: History) -> list[Chart]:
    """Returns the charts of tokens and FLOPs per second, and of the devices' utilisation where it is known."""
    if not history.steps:
        return []
    students, flops = history.recorded("tokens_per_second"), history.recorded("model_flops_per_second")
    steps = _steps(history.steps)
    total = curve("all", steps, history.totals("tokens_per_second"), "ink")
    unit = "total, and each student by the time of its own work"
    charts = [
        history.chart("Tokens per second", unit, [*students, total], span=(0, None), bands=True),
        history.chart("Model FLOP/s", "recomputation not counted", flops, span=(0, None)),
    ]
    mfu, hfu = (100 * history.totals(measure) for measure in ("mfu", "hfu"))
    if np.isfinite([mfu, hfu]).any():
        curves = [curve("MFU", steps, mfu, "ink"), curve("HFU", steps, hfu, "c0")]
        unit = "% of what the devices could do"
        note = "MFU: model FLOPs of students, teachers and outer loop. HFU: also what is formed again, or masked."
        charts.append(history.chart("Utilisation", unit, curves, span=(0, None), bands=True, note=note))
    return charts


def compute(history: History, summary: Summary | None) -> list[Chart]:
    """Returns the chart of the loss over the FLOPs that it took, where every step records them."""
    flops = history.totals("model_flops")
    if not flops.size or not np.isfinite(flops).all():
        return []
    flops += summary["inherited_flops"]["model"] if summary and "inherited_flops" in summary else 0
    losses = history.evaluated("validation_loss") or history.recorded("ce")
    curves = [replace(curve, x=np.interp(curve.x, _steps(history.steps), flops)) for curve in losses]
    note = "All of the run’s, its teachers’ own training included where it is known."
    return [Chart("Loss", "nats per token", curves, flops[0], flops[-1], "FLOP", note=note)]
