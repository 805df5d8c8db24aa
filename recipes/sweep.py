"""A search for hyperparameters, as BabyLlama-2 made for its teachers: each trial is a run; poor ones are stopped early.

    python recipes/sweep.py
    python recipes/sweep.py --config my_sweep.yaml trials=40

Optuna proposes (TPE, seeded), and Hyperband prunes by the validation loss. A sweep that was killed goes on where it
stopped: <folder>/<name>/journal.log holds the finished trials, and the interrupted one is run again. After every trial
<folder>/<name>/ holds trials.csv, best first, and slice.svg, the loss over every parameter. It needs the optional
dependencies `search`.

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
    # An unknown parameter is a mistake that is shown before anything is written.
    settings_of_run(config, {key: next(iter(vary.choices or (vary.low,))) for key, vary in config.parameters.items()})
    folder = Path(config.folder) / config.name
    base = {f"base.{key}": value for key, value in as_dict(settings_of_run(config, {})).items() if key != "run"}
    settings = {**base, "parameters": as_dict(config)["parameters"], "seed": config.seed}
    # Without max_resource the pruner learns from the first run how many evaluations there are.
    pruner = require_library("optuna").pruners.HyperbandPruner(reduction_factor=2)
    study = open_study(folder / "journal.log", settings, pruner)

    def objective(trial: Any) -> float:
        values = {
            key: trial.suggest_categorical(key, list(vary.choices))
            if vary.choices
            else trial.suggest_float(key, vary.low, vary.high, log=vary.log)
            for key, vary in config.parameters.items()
        }
        return best_loss(config, folder, values, trial)

    while len(ended(study)) < config.trials:
        run_trial(study, objective, config.seed)
        write_results(folder, study, config.parameters)


def settings_of_run(config: SweepConfig, values: dict[str, Any]) -> Config:
    """Returns the settings of a trial's run; UserError where they do not fit."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return build(Config, read_yaml(Path(config.base)), [*config.overrides, *overrides])


def best_loss(config: SweepConfig, folder: Path, values: dict[str, Any], trial: Any) -> float:
    """Returns the best validation loss of a run with these values. The run is named after them, and so goes on."""
    name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    run = {"run.name": name, "run.folder": str(folder / "runs")}
    overrides = [f"{key}={json.dumps(value)}" for key, value in (values | run).items()]
    arguments = [RECIPES / "pretrain.py", "--config", config.base, *config.overrides, *overrides]
    try:
        return min(watch_run(trial, arguments, folder / "runs" / name))
    except UserError as error:
        raise UserError(f"trial {trial.number} ({values}): {error}") from None


def write_results(folder: Path, study: Any, parameters: Iterable[str]) -> None:
    """Writes the table and the plot, and prints the table."""
    losses = {trial.number: min(trial.intermediate_values.values(), default=math.inf) for trial in ended(study)}
    # Complete trials come before pruned ones.
    trials = sorted(ended(study), key=lambda trial: (trial.state.name, losses[trial.number]))
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "validation_loss", "evaluations", *parameters])
        for trial in trials:
            result = [trial.number, trial.state.name.lower(), losses[trial.number], len(trial.intermediate_values)]
            writer.writerow([*result, *(trial.params[key] for key in parameters)])
    print((folder / "trials.csv").read_text(), flush=True)
    if trials[0].state.name == "COMPLETE":
        from matplotlib import pyplot

        with warnings.catch_warnings(action="ignore"):  # Optuna warns that its plots are experimental.
            axes = require_library("optuna").visualization.matplotlib.plot_slice(study)
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).get_figure()
        figure.savefig(folder / "slice.svg")
        pyplot.close(figure)


if __name__ == "__main__":
    # By default SIGTERM would end this process without ending the trial's run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with report_errors():
        main()
