"""Trials: a journal that goes on and refuses what is another's, and a run that is watched, pruned and ended."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from engine.search.trials import ended, open_study, run_trial, watch_run
from engine.system.errors import UserError

BEGIN = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
def say(loss, **more):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "evaluation", "students": {"one": {"validation_loss": loss}}, **more}) + "\\n")
"""


@pytest.fixture
def study(tmp_path: Path) -> Any:
    return open_study(tmp_path / "journal", {"seed": 1}, optuna.pruners.NopPruner())


class Watched:
    """A trial that is pruned once it has reported so many losses."""

    def __init__(self, patience: int = 99) -> None:
        self.reported: list[tuple[int, float]] = []
        self.patience = patience

    def report(self, loss: float, step: int) -> None:
        self.reported.append((step, loss))

    def should_prune(self) -> bool:
        return len(self.reported) >= self.patience


@pytest.fixture(autouse=True)
def no_run_hangs() -> Iterator[None]:
    signal.alarm(100)
    yield
    signal.alarm(0)


def run(folder: Path, recipe: str, trial: Watched) -> list[float]:
    (folder / "recipe.py").write_text(BEGIN + recipe)
    return watch_run(trial, [folder / "recipe.py", folder / "run"], folder / "run")


def test_a_run_reports_its_one_students_loss_or_the_ensembles(tmp_path: Path) -> None:
    trial = Watched()
    recipe = 'say(3.0)\nsay(2.5, ensemble={"validation_loss": 2.25})\n(folder / "metrics.jsonl").open("a").write("{")'
    assert run(tmp_path, recipe, trial) == [3.0, 2.25]
    assert trial.reported == [(1, 3.0), (2, 2.25)]


def test_a_run_may_say_more_than_a_pipe_holds(tmp_path: Path) -> None:
    assert run(tmp_path, 'sys.stderr.write("x" * 1_000_000)\nsay(2.0)', Watched()) == [2.0]
    assert (tmp_path / "run" / "output.txt").stat().st_size == 1_000_000


def test_a_pruned_run_is_ended_and_one_that_is_over_is_not_pruned(tmp_path: Path) -> None:
    with pytest.raises(optuna.TrialPruned):
        run(tmp_path, "say(3.0)\ntime.sleep(60)\nsay(2.0)", Watched(1))
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    assert run(tmp_path, "say(3.0)\nsay(2.0)", Watched(2)) == [3.0, 2.0]


@pytest.mark.parametrize(
    "recipe",
    [
        "say(3.0)\nsay(None)\ntime.sleep(60)",
        "say(3.0)\nsay(None)",
        'print("progress")\nprint("error: one: loss or gradient not finite", file=sys.stderr)\nsys.exit(2)',
    ],
)
def test_a_run_that_diverges_is_pruned(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(optuna.TrialPruned):
        run(tmp_path, recipe, Watched())


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (
            'print("loss not finite")\nprint("error: disk full", file=sys.stderr)\nprint("bye")\nsys.exit(2)',
            "2: error: disk full",
        ),
        ('print("progress")\nraise RuntimeError("broken")', "1: RuntimeError: broken"),
        ("sys.exit(3)", "3: it prints nothing"),
        ('print("done")', "0: done"),
    ],
)
def test_a_run_that_fails_says_why(tmp_path: Path, recipe: str, why: str) -> None:
    with pytest.raises(UserError, match=f"run/output.txt: the run failed, exit code {why}$"):
        run(tmp_path, recipe, Watched())


def test_a_trial_that_was_cut_off_is_the_next(study: Any, tmp_path: Path) -> None:
    def lost(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(study, lost, seed=0)
    again = open_study(tmp_path / "journal", {"seed": 1}, optuna.pruners.NopPruner())
    run_trial(again, lambda trial: trial.suggest_float("x", 0, 1), seed=5)
    (done,) = ended(again)
    assert done.params == again.trials[0].params


def test_a_study_of_other_settings_is_refused(study: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"journal was made with other settings of new, seed: restore them, choose another folder, or"
    ):
        open_study(tmp_path / "journal", {"seed": 2, "new": [1]}, optuna.pruners.NopPruner())
