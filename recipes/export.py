"""Write the students of a run as Hugging Face folders, which transformers and the evaluation harnesses load.

    python recipes/export.py runs/mutual
    python recipes/export.py runs/mutual --checkpoint last --to exported

A run exports its best checkpoint by itself when it ends; this is for the others, and for runs that were stopped.
"""

import argparse
from pathlib import Path

from engine.checkpoint import latest, read_state
from engine.config import Config, build, read_yaml, user_errors
from engine.corpus.prepare import prepare
from engine.run import export_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--checkpoint", default="best", help="best (by validation loss), last, or a step's number")
    parser.add_argument("--to", type=Path, help="where the folders go (default: RUN/students)")
    arguments = parser.parse_args()

    if not (arguments.run / "config.yaml").is_file():
        raise ValueError(f"{arguments.run}: no config.yaml; expected a run's folder, such as runs/mutual")
    config = build(Config, read_yaml(arguments.run / "config.yaml"))
    step = None
    if arguments.checkpoint == "best":
        newest = latest(arguments.run / "checkpoints")
        step = None if newest is None else read_state(newest).best_step
        if newest is not None and step is None:
            raise ValueError(f"{arguments.run} has not been evaluated yet, so none is best: take --checkpoint last")
    elif arguments.checkpoint.isdecimal():
        step = int(arguments.checkpoint)
    elif arguments.checkpoint != "last":
        raise ValueError(f"--checkpoint {arguments.checkpoint}: expected best, last, or a step's number")
    for folder in export_run(arguments.run, config, prepare(config.data), step, arguments.to):
        print(folder)


if __name__ == "__main__":
    with user_errors():
        main()
