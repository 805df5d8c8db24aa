"""Write the students of a run as Hugging Face folders, which transformers and the evaluation harnesses load.

    python recipes/export.py runs/mutual
    python recipes/export.py runs/mutual --checkpoint last --to exported
    python recipes/export.py runs/mutual --student best --to champion

A run exports its best checkpoint by itself when it ends; this is for the others, and for runs that were stopped.
"""

import argparse
from pathlib import Path

from engine.config.loading import build, read_yaml
from engine.config.settings import Config
from engine.data.prepare import prepare
from engine.run.checkpoint import latest, read_state
from engine.run.export import export_run
from engine.system.errors import UserError, report_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--checkpoint", default="best", help="best (by validation loss), last, or a step's number")
    parser.add_argument("--student", help="one of them by name, or best: by validation loss (default: every one)")
    parser.add_argument("--to", type=Path, help="where the folders go (default: RUN/students)")
    arguments = parser.parse_args()

    if not (arguments.run / "config.yaml").is_file():
        raise UserError(f"{arguments.run}: no config.yaml; expected a run's folder, such as runs/mutual")
    config = build(Config, read_yaml(arguments.run / "config.yaml"))
    newest = latest(arguments.run / "checkpoints")
    state = None if newest is None else read_state(newest)
    if "best" in (arguments.checkpoint, arguments.student) and state is not None and state.best_step is None:
        raise UserError(f"{arguments.run} has not been evaluated yet, so none is best: take --checkpoint last")
    step = None
    if arguments.checkpoint == "best":
        step = None if state is None else state.best_step
    elif arguments.checkpoint.isdecimal():
        step = int(arguments.checkpoint)
    elif arguments.checkpoint != "last":
        raise UserError(f"--checkpoint {arguments.checkpoint}: expected best, last, or a step's number")
    names = [student.name for student in config.students]
    if arguments.student == "best" and state is not None:
        losses = [one["validation_loss"] for one in state.best]
        names = [names[losses.index(min(losses))]]
    elif arguments.student is not None:
        if arguments.student not in names:
            raise UserError(f"--student {arguments.student}: expected best, or one of {', '.join(names)}")
        names = [arguments.student]
    for folder in export_run(arguments.run, config, prepare(config.data), step, arguments.to, names):
        print(folder)


if __name__ == "__main__":
    with report_errors():
        main()
