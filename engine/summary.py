"""What a run ends with: `summary.json`, and the same as a table."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from engine.checkpoint import State
from engine.cohort import Cohort
from engine.config import Config
from engine.corpus.prepare import Prepared
from engine.ledger import as_dict
from engine.metrics import StudentSummary, Summary, format_count
from engine.runtime import Runtime, device_name, git_commit


def summarise(
    folder: Path,
    config: Config,
    prepared: Prepared,
    cohort: Cohort,
    runtime: Runtime,
    state: State,
    *,
    omega: Sequence[float],
    peak: float | None,
) -> Summary:
    """The summary of the run in `folder` that has come to `state`.

    Args:
        omega: the students' weights at the best step; empty where they have none.
        peak: FLOP/s of all ranks' devices at most, where known.
    """
    held_out = prepared.manifest["splits"]["validation"]
    tokens_per_word = held_out["tokens"] / held_out["words"]
    assert state.best_step is not None, "a run that ends well has been evaluated"
    students: list[StudentSummary] = [
        {
            "name": student.name,
            "parameters": student.parameters,
            "validation_loss": best["validation_loss"],
            "validation_loss_per_word": best["validation_loss"] * tokens_per_word,
            "pairs_accuracy": best["pairs_accuracy"],
            "pairs_by_phenomenon": best["pairs_by_phenomenon"],
            "tokens_per_second": state.tokens / account.seconds,
            "folder": str(folder / "students" / student.name),
            "best_step": state.best_step,
            "samples": best["samples"],
        }
        for student, best, account in zip(cohort, state.best, state.ledger.students.values(), strict=True)
    ]
    summary: Summary = {
        "run": config.run.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.ledger.seconds,
        "world_size": runtime.world,
        "zero_stage": config.train.stage(runtime.world),
        "device": device_name(runtime.device),
        "data": {
            "name": prepared.manifest["name"],
            "train_tokens": prepared.manifest["splits"]["train"]["tokens"],
            "train_words": prepared.manifest["splits"]["train"]["words"],
            "tokens_per_word": tokens_per_word,
            # Of the next token; who sees both sides has less left to predict.
            "entropy_per_word": None if config.masked else prepared.manifest["entropy_per_word"],
        },
        "students": students,
        "ledger": as_dict(state.ledger),
        "before": asdict(state.ledger.before),
        "report": str(folder / "report.html"),
    }
    if peak is not None:
        summary["peak_flops_per_second"] = peak
    if omega:
        summary["omega"] = list(omega)
    return summary


def final_table(summary: Summary) -> str:
    """The table a run ends with. Plain text, so that no terminal, however narrow, cuts a path short."""
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:], rule]
    lines += [f"{student['name'].ljust(widths[0])}  {student['folder']}" for student in summary["students"]]
    if "report" in summary:
        lines.append(f"{'report'.ljust(widths[0])}  {summary['report']}")
    return "\n".join(line.rstrip() for line in lines)
