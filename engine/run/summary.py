"""What a run ends with: `summary.json`, and the same as a table."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from engine.compute.usage import as_dict
from engine.config.settings import Config
from engine.data.prepare import Prepared
from engine.reporting.records import Summary
from engine.run.state import RunState
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime
from engine.system.formatting import align_columns, format_count
from engine.system.provenance import device_name, git_commit


def summarise(
    config: Config,
    prepared: Prepared,
    cohort: Cohort,
    runtime: Runtime,
    state: RunState,
    best: RunState,
    peak_flops: float | None,
) -> Summary:
    """Returns the summary of the run that has come to `state`, and whose state at its best step was `best`."""
    folder = Path(config.run.folder) / config.run.name
    held_out = prepared.manifest["splits"]["validation"]
    tokens_per_word = held_out["tokens"] / held_out["words"]
    summary: Summary = {
        "run": config.run.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.usage.seconds,
        "world_size": runtime.world_size,
        "zero_stage": config.train.stage(runtime.world_size),
        "device": device_name(runtime.device),
        "data": {
            "name": prepared.manifest["name"],
            "train_tokens": prepared.manifest["splits"]["train"]["tokens"],
            "train_words": prepared.manifest["splits"]["train"]["words"],
            "tokens_per_word": tokens_per_word,
            # The entropy is that of the next token; a masked model sees both sides and has less left to predict.
            "entropy_per_word": None if config.masked else prepared.manifest["entropy_per_word"],
        },
        "students": [
            {
                "name": student.name,
                "parameters": student.parameters,
                "validation_loss": evaluation["validation_loss"],
                "validation_loss_per_word": evaluation["validation_loss"] * tokens_per_word,
                "pairs_accuracy": evaluation["pairs_accuracy"],
                "pairs_by_phenomenon": evaluation["pairs_by_phenomenon"],
                "tokens_per_second": state.tokens / usage.seconds,
                "folder": str(folder / "students" / student.name),
                "best_step": best.step,
                "samples": evaluation["samples"],
            }
            for student, evaluation, usage in zip(cohort, state.best, state.usage.students.values(), strict=True)
        ],
        "usage": as_dict(state.usage),
        "inherited_flops": asdict(state.usage.inherited_flops),
        "report": str(folder / "report.html"),
    }
    if peak_flops is not None:
        summary["peak_flops_per_second"] = peak_flops
    if best.omega:
        summary["omega"] = list(best.omega)
    return summary


def final_table(summary: Summary) -> str:
    """Returns the table that a run ends with, as plain text, so that no terminal, however narrow, cuts a path short."""
    data = summary["data"]
    rows = [("student", "parameters", "nats/token", "nats/word", "pairs", "own tokens/s")]
    for student in summary["students"]:
        pairs = student["pairs_accuracy"]
        rows.append(
            (
                student["name"],
                format_count(student["parameters"]),
                f"{student['validation_loss']:.4f}",
                f"{student['validation_loss_per_word']:.4f}",
                "-" if pairs is None else f"{pairs:.1%}",
                f"{student['tokens_per_second']:,.0f}",
            )
        )
    best = data["entropy_per_word"]
    if best is not None:
        rows.append(("best possible", "", f"{best / data['tokens_per_word']:.4f}", f"{best:.4f}", "", ""))
    header, *lines = align_columns(rows)
    rule, width = "-" * len(header), max(len(row[0]) for row in rows)
    folders = [f"{student['name'].ljust(width)}  {student['folder']}" for student in summary["students"]]
    if "report" in summary:
        folders.append(f"{'report'.ljust(width)}  {summary['report']}")
    return "\n".join([header, rule, *lines, rule, *folders])
