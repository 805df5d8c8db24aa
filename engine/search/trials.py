"""The trials of a search, each a run of a recipe: Optuna proposes and prunes, and a journal keeps what has ended."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.system.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.5


def require_library(name: str) -> Any:
    """Returns a module of the extra `search`, which not everyone needs; UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"no {name} here: install it with `pip install 'creche[search]'`") from None


def open_study(journal: Path, settings: Mapping[str, Any], pruner: Any) -> Any:
    """The study that `journal` holds, begun where there is none. A trial that was cut off is the next to be tried.

    Args:
        settings: all that decides what is proposed and how it is scored, equal to what JSON reads back.

    Raises ValueError where the journal was made with others.
    """
    optuna = require_library("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(
        require_library("optuna.storages.journal").JournalFileBackend(str(journal))
    )
    study = optuna.create_study(study_name="trials", storage=storage, pruner=pruner, load_if_exists=True)
    before = study.user_attrs.get("settings", settings)
    if differing := sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)):
        raise UserError(
            f"{journal}: made with other settings ({', '.join(differing)}); choose another folder, or delete "
            f"{journal.parent}"
        )
    study.set_user_attr("settings", settings)
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.enqueue_trial(trial.params, skip_if_exists=False)
        study.tell(trial.number, state=states.FAIL)
    return study


def ended(study: Any) -> list[Any]:
    """The trials that are complete or pruned."""
    states = require_library("optuna").trial.TrialState
    return study.get_trials(states=(states.COMPLETE, states.PRUNED))


def run_trial(study: Any, objective: Callable[[Any], float], seed: int) -> None:
    """One trial more. What it draws depends on the seed and the trials that have ended."""
    optuna = require_library("optuna")
    study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + len(ended(study)), n_startup_trials=8)
    trial = study.ask()
    try:
        study.tell(trial, objective(trial))
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def watch_run(trial: Any, arguments: Sequence[str | Path], folder: Path) -> list[float]:
    """The held-out loss, nats per token, at every evaluation of a run, reported to `trial` as they come.

    It is that of the ensemble or, of one student alone, its own. The run ends with the trial, however that ends.

    Args:
        arguments: a recipe and its command line, by which it trains in `folder`; what it prints goes to output.txt.

    Raises TrialPruned where the trial should be, or has diverged; ValueError where the run fails.
    """
    pruned = require_library("optuna").TrialPruned
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[float | None] = []
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT)
    try:
        while True:
            over = process.poll() is not None
            found = _losses(folder / "metrics.jsonl")
            for number, loss in enumerate(found[len(losses) :], start=len(losses) + 1):
                if loss is not None:
                    trial.report(loss, number)
                if loss is None or (not over and trial.should_prune()):
                    raise pruned
            losses = found
            if over:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        process.terminate()
        process.wait()
    if process.returncode or not losses:
        lines = (folder / "output.txt").read_text(errors="replace").splitlines()
        error = ([line for line in lines if line.startswith("error: ")] or lines or ["it prints nothing"])[-1]
        if "not finite" in error:
            raise pruned  # nothing is wrong with the search
        raise UserError(f"{folder / 'output.txt'}: the run failed, exit code {process.returncode}: {error}")
    return [loss for loss in losses if loss is not None]


def _losses(metrics: Path) -> list[float | None]:
    """Of every evaluation whose line is whole; None: not finite."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    evaluations = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"]
    return [(e.get("ensemble") or next(iter(e["students"].values())))["validation_loss"] for e in evaluations]
