"""A search for hyperparameters, as BabyLlama-2 made for its teachers: each trial is a run; poor ones are stopped early.

    python recipes/sweep.py
    python recipes/sweep.py --config my_sweep.yaml trials=40

Optuna proposes (TPE, seeded), Hyperband prunes by the validation loss. A sweep that was killed goes on: finished trials
stand in <folder>/<name>/journal.log, and the one that was cut off is taken up again. At the end, and after every trial,
<folder>/<name>/ holds trials.csv, best first, and slice.svg, the loss against every parameter. Wants the extra `sweep`.

Settings: recipes/sweep.yaml; every one there is, with what it means, in engine/config.py.
"""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.command import library
from engine.config import Config, SweepConfig, build, load, read_yaml, user_errors

RECIPES = Path(__file__).parent
SECONDS_BETWEEN_LOOKS = 0.5


def main() -> None:
    config = load(SweepConfig, sys.argv[1:], description=__doc__, default=RECIPES / "sweep.yaml")
    whole(config, {key: next(iter(vary.choices or (vary.low,))) for key, vary in config.parameters.items()})
    optuna = library("optuna")
    folder = Path(config.folder) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(
        library("optuna.storages.journal").JournalFileBackend(str(folder / "journal.log"))
    )
    base = whole(config, {})
    study = optuna.create_study(
        study_name=config.name,
        storage=storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=config.seed),
        pruner=optuna.pruners.HyperbandPruner(
            min_resource=1, max_resource=max(1, base.train.steps // base.evaluation.every), reduction_factor=2
        ),
    )
    states = optuna.trial.TrialState
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))  # or a resumed one would repeat
    for trial in study.get_trials(states=[states.RUNNING]):  # cut off: its run goes on under another number
        study.enqueue_trial(trial.params, skip_if_exists=False)
        study.tell(trial.number, state=states.FAIL)

    def objective(trial: Any) -> float:
        chosen = {
            key: trial.suggest_categorical(key, list(vary.choices))
            if vary.choices
            else trial.suggest_float(key, vary.low, vary.high, log=vary.log)
            for key, vary in config.parameters.items()
        }
        return one_trial(config, folder, chosen, trial)

    ended = study.get_trials(states=[states.COMPLETE, states.PRUNED])
    for _ in range(len(ended), config.trials):
        study.optimize(objective, n_trials=1)
        write(folder, study)


def whole(config: SweepConfig, chosen: dict[str, Any]) -> Config:
    """The run of a trial; ValueError where it is none."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    return build(Config, read_yaml(Path(config.base)), [*config.overrides, *overrides])


def one_trial(config: SweepConfig, folder: Path, chosen: dict[str, Any], trial: Any) -> float:
    """The best validation loss of a run with the chosen values. A run is named after them, and so goes on."""
    pruned = library("optuna").TrialPruned
    name = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    settings = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    command = [sys.executable, str(RECIPES / "pretrain.py"), "--config", config.base, *config.overrides, *settings]
    place = [f"run.name={name}", f"run.folder={folder / 'runs'}"]
    metrics = folder / "runs" / name / "metrics.jsonl"
    losses: list[float] = []
    with (
        subprocess.Popen([*command, *place], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process,
        ended_with(process),
    ):
        while True:
            ended = process.poll() is not None
            found = validation_losses(metrics)
            for number, loss in enumerate(found[len(losses) :], start=len(losses) + 1):
                trial.report(loss, number)
            losses = found
            if ended:
                break
            if losses and trial.should_prune():
                raise pruned
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if process.returncode != 0:
            lines = process.stderr.read().splitlines() if process.stderr else []
            if "not finite" not in (lines or [""])[-1]:
                raise ValueError(f"trial {trial.number} ({chosen}): {(lines or ['it failed'])[-1]}")
            raise pruned  # it diverged: nothing is wrong with the sweep
    return min(losses)


@contextmanager
def ended_with(process: subprocess.Popen[str]) -> Iterator[None]:
    """No run outlives its trial, nor the sweep where that is asked to stop."""
    try:
        yield
    finally:
        process.terminate()


def validation_losses(metrics: Path) -> list[float]:
    if not metrics.is_file():
        return []
    complete = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    evaluations = [record for record in map(json.loads, complete) if record["kind"] == "evaluation"]
    return [next(iter(record["students"].values()))["validation_loss"] for record in evaluations]


def write(folder: Path, study: Any) -> None:
    """The table and the plot."""
    optuna = library("optuna")
    states = optuna.trial.TrialState
    ended = study.get_trials(states=[states.COMPLETE, states.PRUNED])
    reached = {trial.number: min(trial.intermediate_values.values(), default=float("inf")) for trial in ended}
    ended.sort(key=lambda trial: (trial.state != states.COMPLETE, reached[trial.number]))
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "validation_loss", "evaluations", *ended[0].params])
        for t in ended:
            values = [t.number, t.state.name.lower(), reached[t.number], len(t.intermediate_values)]
            writer.writerow([*values, *t.params.values()])
    print((folder / "trials.csv").read_text(), flush=True)
    if any(trial.state == states.COMPLETE for trial in ended):
        with warnings.catch_warnings(action="ignore"):  # it calls its plots experimental
            axes = optuna.visualization.matplotlib.plot_slice(study)
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).get_figure()
        figure.savefig(folder / "slice.svg")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and not without ending the trial's run
    with user_errors():
        main()
