"""A search for hyperparameters, as BabyLlama-2 made for its teachers: each trial is a run; poor ones are stopped early.

    python recipes/sweep.py
    python recipes/sweep.py --config my_sweep.yaml trials=40

Optuna proposes (TPE, seeded), Hyperband prunes by the validation loss. A sweep that was killed goes on: finished trials
stand in <folder>/<name>/journal.log, and the one that was cut off is taken up again. At the end, and after every trial,
<folder>/<name>/ holds trials.csv, best first, and slice.svg, the loss against every parameter. Needs extra `search`.

Settings: recipes/sweep.yaml; `--settings` prints every one, with its default and meaning.
"""

import csv
import hashlib
import json
import math
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.cli import load
from engine.config.loading import as_dict, build, read_yaml
from engine.config.settings import Config, SweepConfig
from engine.search.trials import ended, open_study, require_library, run_trial, watch_run
from engine.system.errors import UserError, report_errors

RECIPES = Path(__file__).parent


def main() -> None:
    config = load(SweepConfig, sys.argv[1:], description=__doc__, default=RECIPES / "sweep.yaml")
    whole(config, {key: next(iter(vary.choices or (vary.low,))) for key, vary in config.parameters.items()})
    folder = Path(config.folder) / config.name
    base = {f"base.{key}": value for key, value in as_dict(whole(config, {})).items() if key != "run"}
    settings = {**base, "parameters": as_dict(config)["parameters"], "seed": config.seed}
    pruner = require_library("optuna").pruners.HyperbandPruner(
        reduction_factor=2
    )  # the first run shows how long they are
    study = open_study(folder / "journal.log", settings, pruner)

    def objective(trial: Any) -> float:
        chosen = {
            key: trial.suggest_categorical(key, list(vary.choices))
            if vary.choices
            else trial.suggest_float(key, vary.low, vary.high, log=vary.log)
            for key, vary in config.parameters.items()
        }
        return one_trial(config, folder, chosen, trial)

    while len(ended(study)) < config.trials:
        run_trial(study, objective, config.seed)
        write(folder, study, config.parameters)


def whole(config: SweepConfig, chosen: dict[str, Any]) -> Config:
    """The run of a trial; ValueError where it is none."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    return build(Config, read_yaml(Path(config.base)), [*config.overrides, *overrides])


def one_trial(config: SweepConfig, folder: Path, chosen: dict[str, Any], trial: Any) -> float:
    """The best validation loss of a run with the chosen values. A run is named after them, and so goes on."""
    name = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    place = {"run.name": name, "run.folder": str(folder / "runs")}
    settings = [f"{key}={json.dumps(value)}" for key, value in (chosen | place).items()]
    arguments = [RECIPES / "pretrain.py", "--config", config.base, *config.overrides, *settings]
    try:
        return min(watch_run(trial, arguments, folder / "runs" / name))
    except ValueError as error:
        raise UserError(f"trial {trial.number} ({chosen}): {error}") from None


def write(folder: Path, study: Any, parameters: Iterable[str]) -> None:
    """The table and the plot."""
    reached = {trial.number: min(trial.intermediate_values.values(), default=math.inf) for trial in ended(study)}
    trials = sorted(ended(study), key=lambda trial: (trial.state.name, reached[trial.number]))  # complete, then pruned
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "validation_loss", "evaluations", *parameters])
        for t in trials:
            values = [t.number, t.state.name.lower(), reached[t.number], len(t.intermediate_values)]
            writer.writerow([*values, *(t.params[key] for key in parameters)])
    print((folder / "trials.csv").read_text(), flush=True)
    if trials[0].state.name == "COMPLETE":
        from matplotlib import pyplot

        with warnings.catch_warnings(action="ignore"):  # it calls its plots experimental
            axes = require_library("optuna").visualization.matplotlib.plot_slice(study)
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).get_figure()
        figure.savefig(folder / "slice.svg")
        pyplot.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and not without ending the trial's run
    with report_errors():
        main()
