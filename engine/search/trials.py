"""The trials of a sweep are runs of a recipe. Optuna proposes and prunes them, and a journal keeps the results."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.system.errors import UserError

POLL_SECONDS = 0.5


def require_library(name: str) -> Any:
    """Returns a module of the optional dependencies `search`; UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: run `pip install 'creche[search]'`") from None


def open_study(journal: Path, settings: Mapping[str, Any], pruner: Any) -> Any:
    """Returns the study in the file `journal`, a new one where there is none. A trial that was interrupted comes next.

    Raises UserError where the journal was made with other `settings`: everything that affects what is proposed and how
    it is scored, as JSON reads it back.
    """
    optuna = require_library("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    study = optuna.create_study(study_name="trials", storage=storage, pruner=pruner, load_if_exists=True)
    before = study.user_attrs.get("settings", settings)
    differing = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    if differing:
        raise UserError(
            f"{journal} was made with other settings of {', '.join(differing)}: restore them, choose another folder, "
            f"or delete {journal.parent}"
        )
    study.set_user_attr("settings", settings)
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.enqueue_trial(trial.params, skip_if_exists=False)
        study.tell(trial.number, state=states.FAIL)
    return study


def ended(study: Any) -> list[Any]:
    """Returns the trials that are complete or pruned."""
    states = require_library("optuna").trial.TrialState
    return study.get_trials(states=(states.COMPLETE, states.PRUNED))


def run_trial(study: Any, objective: Callable[[Any], float], seed: int) -> None:
    """Runs one more trial. What is proposed depends on the seed and on the trials that have ended."""
    optuna = require_library("optuna")
    study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + len(ended(study)), n_startup_trials=8)
    trial = study.ask()
    try:
        study.tell(trial, objective(trial))
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def watch_run(trial: Any, arguments: Sequence[str | Path], folder: Path) -> list[float]:
    """Runs a recipe and returns its held-out losses in nats per token, which it reports to `trial` as they come.

    The loss is the ensemble's or, of a single student, the student's. The run is ended in any case. `arguments` are the
    recipe and its command line; it trains in `folder`, and what it prints goes to output.txt there.

    Raises TrialPruned where the trial should be pruned or has diverged, UserError where the run fails.
    """
    pruned = require_library("optuna").TrialPruned
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[float | None] = []
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT)
    try:
        while True:
            has_ended = process.poll() is not None
            reported, losses = len(losses), _losses(folder / "metrics.jsonl")
            for number, loss in enumerate(losses[reported:], start=reported + 1):
                if loss is not None:
                    trial.report(loss, number)
                if loss is None or (not has_ended and trial.should_prune()):
                    raise pruned
            if has_ended:
                break
            time.sleep(POLL_SECONDS)
    finally:
        process.terminate()
        process.wait()
    if process.returncode or not losses:
        lines = (folder / "output.txt").read_text(errors="replace").splitlines()
        error = ([line for line in lines if line.startswith("error: ")] or lines or ["it prints nothing"])[-1]
        if "not finite" in error:
            raise pruned
        raise UserError(f"{folder / 'output.txt'}: the run failed, exit code {process.returncode}: {error}")
    return [loss for loss in losses if loss is not None]


def _losses(metrics: Path) -> list[float | None]:
    """Returns the held-out loss of every evaluation so far; None for one that is not finite."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []  # The last line may be half written.
    records = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"]
    return [(r.get("ensemble") or next(iter(r["students"].values())))["validation_loss"] for r in records]
