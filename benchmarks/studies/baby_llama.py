"""Baby Llama at nano scale: does distillation beat the same student trained alone, and how should teachers read?

    python benchmarks/studies/baby_llama.py --corpus texts
    python benchmarks/studies/baby_llama.py --corpus texts --teacher-length 256 --arms control "stream, random"
    python benchmarks/studies/baby_llama.py --corpus texts --seeds 1 --tokens 20000 --teacher-tokens 20000 --csv try.csv

Two teachers, a GPT-2 and a LLaMA, each larger than the student, are trained once. Then, for every seed, the student
learns alone (control), from both, and from each. Students cut the text at the same places in every epoch, or at random
places; teachers read the students' chunks, or the text in windows of their own (stream). Teachers' hidden states come
from a cache, but where chunks are random and teachers read them. With one seed all arms begin with the same weights and
visit the text in the same order, so that their differences are paired.

A finished run is a line of the CSV. Runs that stand there are not repeated, and a run that was killed goes on.
"""

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.runs import append, is_done, rows, settings_of, study_parser, train_to_the_end
from engine.system.errors import report_errors

COLUMNS = (
    "arm",
    "seed",
    "validation_loss",
    "best_step",
    "parameters",
    "tokens",
    "model_flops",
    "seconds",
    "git_commit",
)
TEACHERS = {
    "gpt2": {"family": "gpt2", "layers": 4, "hidden": 192, "heads": 6, "ffn": 768, "dropout": 0.1},
    "llama": {"layers": 4, "hidden": 192, "heads": 6, "ffn": 512},
}
STUDENT = {"layers": 3, "hidden": 128, "heads": 4, "ffn": 384}


@dataclass(frozen=True)
class Arm:
    teachers: tuple[str, ...] = ()
    context: str = "chunk"
    chunks: str = "fixed"
    dtype: str | None = "exact"  # of the cache; None: the teachers are live
    steps: float = 1.0  # as a multiple of the control's


BOTH = ("gpt2", "llama")
ARMS = {
    "control": Arm(),
    "control, random": Arm(chunks="random"),
    "control, random, 1.7 × the steps": Arm(chunks="random", steps=1.7),
    "both": Arm(BOTH),
    "gpt2 alone": Arm(("gpt2",)),
    "llama alone": Arm(("llama",)),
    "both, random": Arm(BOTH, chunks="random", dtype=None),
    "stream": Arm(BOTH, "stream"),
    "stream, random": Arm(BOTH, "stream", "random"),
    "stream, random, int8": Arm(BOTH, "stream", "random", "int8"),
}


def main() -> None:
    parser = study_parser(__file__, __doc__, tokens=1_000_000, teacher_tokens=2_000_000)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--teacher-length", type=int, default=128, help="tokens of a sequence in the teachers' training"
    )
    arguments = parser.parse_args()

    for seed, (name, shape) in enumerate(TEACHERS.items(), start=101):
        length = arguments.teacher_length
        teacher = student(seed, {"max_length": length, **shape})
        settings = settings_of(arguments, f"teacher-{name}", [teacher], seed, arguments.teacher_tokens)
        settings["train"] |= {"length": length, "batch": 16 * 128 // length}
        finish(arguments.csv, f"teacher {name}", seed, settings)
    for seed in arguments.seeds:
        for name in arguments.arms:
            finish(arguments.csv, name, seed, settings_of_arm(arguments, name, seed))
    print(table(rows(arguments.csv)))


def settings_of_arm(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    arm, run = ARMS[name], f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
    settings = settings_of(arguments, run, [student(seed, STUDENT)], seed, round(arm.steps * arguments.tokens))
    settings["train"]["chunks"] = arm.chunks
    if arm.teachers:
        teachers = [
            {"path": str(arguments.folder / f"teacher-{name}"), "context": arm.context} for name in arm.teachers
        ]
        settings["teachers"] = teachers
        settings["objective"] = {"ce_weight": 0.5, "teacher_weight": 0.5, "temperature": 2.0}
        if arm.dtype is not None:
            path = arguments.folder / f"cache-{arm.context}-{arm.dtype}"
            settings["cache"] = {"path": str(path), "dtype": arm.dtype}
    return settings


def student(seed: int, shape: dict[str, Any]) -> dict[str, Any]:
    return {"name": "model", "seed": seed, **shape}


def finish(path: Path, arm: str, seed: int, settings: dict[str, Any]) -> None:
    """Trains a run to its end and appends its line to the CSV, unless it stands there already."""
    if is_done(path, arm, seed):
        return
    summary = json.loads((train_to_the_end(settings) / "summary.json").read_text())
    (student,) = summary["students"]
    usage = summary["usage"]
    flops = sum(part["model_flops"] for part in (*usage["students"].values(), usage["teachers"]))
    append(path, COLUMNS, [{**student, **summary, "arm": arm, "seed": seed, "model_flops": flops}])


def table(lines_of_csv: list[dict[str, str]]) -> str:
    """Returns each arm's validation loss, and its difference from the control at the same seed, in Markdown."""
    losses = {(row["arm"], row["seed"]): float(row["validation_loss"]) for row in lines_of_csv}
    seconds = {(row["arm"], row["seed"]): float(row["seconds"]) for row in lines_of_csv}
    flops = {row["arm"]: float(row["model_flops"]) for row in lines_of_csv}
    lines = [
        "| arm | nats/token, by seed | mean | minus control (mean ± s.d. of pairs) | FLOPs | s per run |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(arm for arm, _ in losses):
        seeds = [seed for name, seed in losses if name == arm]
        arm_losses = [losses[arm, seed] for seed in seeds]
        pairs = [losses[arm, seed] - losses["control", seed] for seed in seeds if ("control", seed) in losses]
        spread = f" ± {statistics.stdev(pairs):.4f}" if len(pairs) > 1 else ""
        difference = f"{statistics.mean(pairs):+.4f}{spread}" if pairs and arm != "control" else ""
        time = statistics.mean(seconds[arm, seed] for seed in seeds)
        by_seed = ", ".join(f"{x:.4f}" for x in arm_losses)
        mean = statistics.mean(arm_losses)
        lines.append(f"| {arm} | {by_seed} | {mean:.4f} | {difference} | {flops[arm]:.2e} | {time:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
