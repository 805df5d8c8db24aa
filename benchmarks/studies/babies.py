"""When Babies Teach Babies at nano scale: does learning together beat learning alone, and do learnt weights help?

    python benchmarks/studies/babies.py --corpus texts
    python benchmarks/studies/babies.py --corpus texts --seeds 1 --tokens 20000 --teacher-tokens 20000 --csv try.csv

Three students of different shapes train in every arm. With one seed they begin with the same weights and read the same
text in the same order in every arm, so that the differences between arms are paired:

    alone           in one process, but none learns from another: their ensemble is that of independent models
    mutual          deep mutual learning (Zhang et al. 2018): cross-entropy and the mean divergence from the peers
    fixed           weighted mutual learning (Iyer 2024) with equal weights that stay as they are
    weighted        the same with the weights learnt by the outer loop
    weighted third  the same at α = 1/3, where equal weights are `mutual`: learnt weights are the only difference
    taught          mutual, and a larger teacher, trained once on the same text, in the same loss
    taught apart    the same teacher, and none learns from a peer
    heirs           mutual, and the finished students of `alone` with that seed as teachers: the mean of their logits
    heirs apart     the same teachers, and none learns from a peer: the control of `heirs`
    longer          each student alone and for three times as many steps: one model with about a whole cohort's FLOPs

With `--words 60000 --held-out 0.3 --tokens 800000 --evaluations 20` the text is read about a dozen times, and every
model has its best loss before the end. That is the regime of the papers, which their claims are about.

A finished run is several lines of the CSV, one per student and one for the ensemble, with the loss at the end and the
best of all evaluations. Runs that stand there are not repeated, and a run that was killed goes on. FLOPs are the whole
run's, with the outer loop and the teachers' predictions, but without the teachers' own training.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.studies.runs import append, is_done, records, rows, settings_of, study_parser, train_to_the_end
from engine.system.errors import report_errors

COLUMNS = (
    *("arm", "seed", "model", "validation_loss", "best_loss", "best_step"),
    *("omega", "tokens", "model_flops", "seconds", "git_commit"),
)
STUDENTS = {
    "deep": {"layers": 6, "hidden": 96, "heads": 4, "ffn": 256},
    "wide": {"layers": 2, "hidden": 160, "heads": 4, "ffn": 448},
    "small": {"layers": 3, "hidden": 96, "heads": 4, "ffn": 256},
}
MAX_LENGTH = 1024  # longer than the students' own sequences, as scores.py reads longer texts
TEACHER = {"layers": 4, "hidden": 192, "heads": 6, "ffn": 512}
APART: dict[str, Any] = {"objective": {"peer_weight": 0.0}}
ARMS: dict[str, dict[str, Any]] = {
    "alone": APART,
    "mutual": {},
    "fixed": {"objective": {"ce_weight": 0.5, "peer_weight": 0.5, "weighted": True}},
    "weighted": {"objective": {"ce_weight": 0.5, "peer_weight": 0.5, "weighted": True}, "outer": {"every": 5}},
    "weighted third": {
        "objective": {"ce_weight": 2 / 3, "peer_weight": 1 / 3, "weighted": True},
        "outer": {"every": 5},
    },
    "taught": {},
    "taught apart": APART,
    "heirs": {},
    "heirs apart": APART,
}
LONGER = "longer"


def main() -> None:
    parser = study_parser(__file__, __doc__, tokens=400_000, teacher_tokens=800_000)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, LONGER], default=[*ARMS, LONGER])
    arguments = parser.parse_args()

    def run(arm: str, seed: int, students: list[dict[str, Any]], tokens: int, **changes: Any) -> None:
        name = f"{arm.replace(' ', '-')}-{seed}"
        finish(arguments.csv, arm, seed, settings_of(arguments, name, students, seed, tokens) | changes)

    run("teacher", 102, [{"name": "teacher", "seed": 102, **TEACHER}], arguments.teacher_tokens)
    for seed in arguments.seeds:
        students = [
            {"name": name, "seed": 10 * seed + i, "max_length": MAX_LENGTH, **shape}
            for i, (name, shape) in enumerate(STUDENTS.items())
        ]
        for arm in (arm for arm in ARMS if arm in arguments.arms):
            run(arm, seed, students, arguments.tokens, teachers=teachers(arm, seed, arguments.folder), **ARMS[arm])
        for student in students if LONGER in arguments.arms else ():
            run(f"{LONGER} {student['name']}", seed, [student], len(students) * arguments.tokens)
    print(table(rows(arguments.csv)))


def teachers(arm: str, seed: int, folder: Path) -> list[dict[str, str]]:
    if arm.startswith("taught"):
        return [{"path": str(folder / "teacher-102")}]
    if arm.startswith("heirs"):
        return [{"path": str(folder / f"alone-{seed}" / "students" / name)} for name in STUDENTS]
    return []


def finish(path: Path, arm: str, seed: int, settings: dict[str, Any]) -> None:
    """Trains a run to its end and appends its lines to the CSV, unless they stand there already."""
    if is_done(path, arm, seed):
        return
    folder = train_to_the_end(settings)
    summary = json.loads((folder / "summary.json").read_text())
    names = [student["name"] for student in summary["students"]]
    curves: dict[str, list[tuple[float, int]]] = {}
    for record in records(folder, "evaluation"):
        ensemble = {"ensemble": record["ensemble"]} if "ensemble" in record else {}
        for name, evaluation in (record["students"] | ensemble).items():
            curves.setdefault(name, []).append((evaluation["validation_loss"], record["step"]))
    flops = max((record["model_flops"] for record in records(folder, "step")), default=0)
    run = {**summary, "arm": arm, "seed": seed, "model_flops": flops}
    weights = dict(zip(names, summary.get("omega", ()), strict=False))
    append(
        path,
        COLUMNS,
        [
            {
                **run,
                "model": name,
                "validation_loss": curve[-1][0],
                "best_loss": min(curve)[0],
                "best_step": min(curve)[1],
                "omega": weights.get(name, ""),
            }
            for name, curve in curves.items()
        ],
    )


def table(lines_of_csv: list[dict[str, str]]) -> str:
    """Returns the best losses by arm and model, with their differences from `alone` at the same seed, in Markdown."""
    losses = {
        (row["arm"], row["model"], row["seed"]): float(row["best_loss"] or row["validation_loss"])
        for row in lines_of_csv
    }
    lines = [
        "| arm | model | nats/token, by seed | minus alone (mean ± s.d. of pairs) | FLOPs, run | ω |",
        "|---|---|---|---|---|---|",
    ]
    for arm, model in dict.fromkeys((arm, model) for arm, model, _ in losses):
        by_seed = {row["seed"]: row for row in lines_of_csv if (row["arm"], row["model"]) == (arm, model)}
        values = [losses[arm, model, seed] for seed in by_seed]
        pairs = [
            losses[arm, model, seed] - losses["alone", model, seed]
            for seed in by_seed
            if ("alone", model, seed) in losses
        ]
        spread = f" ± {statistics.stdev(pairs):.4f}" if len(pairs) > 1 else ""
        difference = f"{statistics.mean(pairs):+.4f}{spread}" if pairs and arm != "alone" else ""
        flops = statistics.mean(float(row["model_flops"]) for row in by_seed.values())
        omega = ", ".join(f"{float(row['omega']):.3f}" for row in by_seed.values() if row["omega"])
        losses_by_seed = ", ".join(f"{x:.4f}" for x in values)
        lines.append(f"| {arm} | {model} | {losses_by_seed} | {difference} | {flops:.2e} | {omega} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
