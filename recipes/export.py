"""Exports a run's students as Hugging Face folders, which transformers and evaluation harnesses load.

    python recipes/export.py runs/mutual
    python recipes/export.py runs/mutual --checkpoint last --to exported
    python recipes/export.py runs/mutual --student best --to champion

A run exports the students of its best checkpoint when it ends. This recipe exports those of other checkpoints, and
those of a run that was stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.config.loading import build, read_yaml
from engine.config.settings import Config, StudentConfig
from engine.data.prepare import prepare
from engine.run.checkpoint import latest, read_state
from engine.run.export import export_run
from engine.run.state import RunState
from engine.system.errors import UserError, report_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--checkpoint", default="best", help="best (lowest mean validation loss), last, or a step's number"
    )
    parser.add_argument(
        "--student", help="a student's name, or best (lowest validation loss); without it, every student"
    )
    parser.add_argument("--to", type=Path, help="folder for the students' folders (default: RUN/students)")
    arguments = parser.parse_args()

    run: Path = arguments.run
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no config.yaml; expected a run's folder, such as runs/mutual")
    config = build(Config, read_yaml(run / "config.yaml"))
    newest = latest(run / "checkpoints")
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet: let it train until checkpoint.every")
    state = read_state(newest)
    if "best" in (arguments.checkpoint, arguments.student) and state.best_step is None:
        raise UserError(
            f"{run} has not been evaluated yet, so no checkpoint or student is best: take --checkpoint last"
        )
    step = chosen_step(arguments.checkpoint, state)
    students = chosen_students(arguments.student, config.students, state)
    for folder in export_run(run, config, prepare(config.data), step, arguments.to or run / "students", students):
        print(folder)


def chosen_step(checkpoint: str, state: RunState) -> int:
    """Returns the step of the checkpoint that the user asks for; `state` is that of the last one."""
    if checkpoint == "last":
        return state.step
    if checkpoint == "best" and state.best_step is not None:
        return state.best_step
    if not checkpoint.isdecimal():
        raise UserError(f"--checkpoint {checkpoint}: expected best, last, or a step's number")
    return int(checkpoint)


def chosen_students(name: str | None, students: Sequence[StudentConfig], state: RunState) -> Sequence[StudentConfig]:
    if name is None:
        return students
    if name == "best":
        losses = [evaluation["validation_loss"] for evaluation in state.best]
        return [students[losses.index(min(losses))]]
    names = [student.name for student in students]
    if name not in names:
        raise UserError(f"--student {name}: expected best, or one of {', '.join(names)}")
    return [students[names.index(name)]]


if __name__ == "__main__":
    with report_errors():
        main()
