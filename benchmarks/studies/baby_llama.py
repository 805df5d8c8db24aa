"""Baby Llama at nano scale: does distillation beat the same student trained alone, and which teacher helps?

    python benchmarks/studies/baby_llama.py --corpus texts
    python benchmarks/studies/baby_llama.py --corpus texts --seeds 1 --tokens 20000 --teacher-tokens 20000 --csv try.csv

Two teachers, a GPT-2 and a LLaMA, each larger than the student, are trained once. Then, for every seed, the student
learns alone (control), from both, from each, and from both by way of a cache of their predictions. With one seed all
arms begin with the same weights and read the same text in the same order, so that their differences are paired.

A finished run is a line of the CSV. Runs that stand there are not repeated, and a run that was killed goes on.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.studies.runs import append, is_done, rows, settings_of, study_parser, train_to_the_end
from engine.system.errors import report_errors

COLUMNS = ("arm", "seed", "validation_loss", "parameters", "tokens", "seconds", "git_commit")
TEACHERS = {
    "gpt2": {"family": "gpt2", "layers": 4, "hidden": 192, "heads": 6, "ffn": 768, "dropout": 0.1},
    "llama": {"layers": 4, "hidden": 192, "heads": 6, "ffn": 512},
}
STUDENT = {"layers": 3, "hidden": 128, "heads": 4, "ffn": 384}
ARMS = {
    "control": (),
    "both": ("gpt2", "llama"),
    "gpt2 alone": ("gpt2",),
    "llama alone": ("llama",),
    "cache": ("gpt2", "llama"),
}


def main() -> None:
    parser = study_parser(__file__, __doc__, tokens=1_000_000, teacher_tokens=2_000_000)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = parser.parse_args()

    for seed, (name, shape) in enumerate(TEACHERS.items(), start=101):
        settings = settings_of(arguments, f"teacher-{name}", [student(seed, shape)], seed, arguments.teacher_tokens)
        finish(arguments.csv, f"teacher {name}", seed, settings)
    for seed in arguments.seeds:
        for arm in (arm for arm in ARMS if arm in arguments.arms):
            name = f"{arm.replace(' ', '-')}-{seed}"
            settings = settings_of(arguments, name, [student(seed, STUDENT)], seed, arguments.tokens)
            if ARMS[arm]:
                settings["teachers"] = [{"path": str(arguments.folder / f"teacher-{name}")} for name in ARMS[arm]]
                settings["objective"] = {"ce_weight": 0.5, "teacher_weight": 0.5, "temperature": 2.0}
            if arm == "cache":
                settings["cache"] = {"path": str(arguments.folder / "cache"), "k": 32}
            finish(arguments.csv, arm, seed, settings)
    print(table(rows(arguments.csv)))


def student(seed: int, shape: dict[str, Any]) -> dict[str, Any]:
    return {"name": "model", "seed": seed, **shape}


def finish(path: Path, arm: str, seed: int, settings: dict[str, Any]) -> None:
    """Trains a run to its end and appends its line to the CSV, unless it stands there already."""
    if is_done(path, arm, seed):
        return
    summary = json.loads((train_to_the_end(settings) / "summary.json").read_text())
    (student,) = summary["students"]
    append(path, COLUMNS, [{**student, **summary, "arm": arm, "seed": seed}])


def table(lines_of_csv: list[dict[str, str]]) -> str:
    """Returns each arm's validation loss, and its difference from the control at the same seed, in Markdown."""
    losses = {(row["arm"], row["seed"]): float(row["validation_loss"]) for row in lines_of_csv}
    seconds = {(row["arm"], row["seed"]): float(row["seconds"]) for row in lines_of_csv}
    lines = [
        "| arm | nats/token, by seed | mean | minus control (mean ± s.d. of pairs) | s per run |",
        "|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(arm for arm, _ in losses):
        seeds = [seed for name, seed in losses if name == arm]
        arm_losses = [losses[arm, seed] for seed in seeds]
        pairs = [losses[arm, seed] - losses["control", seed] for seed in seeds if ("control", seed) in losses]
        spread = f" ± {statistics.stdev(pairs):.4f}" if len(pairs) > 1 else ""
        difference = f"{statistics.mean(pairs):+.4f}{spread}" if pairs and arm != "control" else ""
        time = statistics.mean(seconds[arm, seed] for seed in seeds)
        by_seed = ", ".join(f"{x:.4f}" for x in arm_losses)
        lines.append(f"| {arm} | {by_seed} | {statistics.mean(arm_losses):.4f} | {difference} | {time:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
