"""A sweep: trials, pruning, the table, and going on."""

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from engine.system.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = """
students: [{name: one, layers: 1, hidden: 16, heads: 2, ffn: 32, max_length: 32}]
data: {words: 3000, tokenizer: {vocab_size: 400}}
optimizer: {warmup: 1}
train: {steps: 6, batch: 4, length: 32}
evaluation: {every: 3, tokens: 100, pairs: none, samples: 0}
"""
SWEEP = """
base: base.yaml
name: tiny
trials: 2
parameters:
  students.0.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
  optimizer.schedule: {choices: [linear, cosine]}
"""

PRETRAIN = """
import json, pathlib, sys
from engine.config.settings import Config
from engine.config.loading import build, read_yaml

config = build(Config, read_yaml(pathlib.Path(sys.argv[2])), sys.argv[3:])
for _ in range(2):
    loss = {"validation_loss": config.students[0].learning_rate}
    with pathlib.Path(config.run.folder, config.run.name, "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "evaluation", "students": {"one": loss}}) + "\\n")
"""


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in group}
    command = [sys.executable, str(ROOT / "recipes" / "sweep.py"), "--config", "sweep.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False)


def test_a_parameter_that_no_run_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("optimizer.schedule", "optimizer.schedul"))
    refused = sweep(tmp_path)
    assert refused.returncode == 2
    assert "error: unknown key 'optimizer.schedul': did you mean 'schedule'?" in refused.stderr
    assert not (tmp_path / "sweeps").exists()


Sweep = Callable[..., list[dict[str, str]]]


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep in this process, by a recipe that only says that it trains; the rows of its table."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "recipes" / "sweep.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "RECIPES", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain.py").write_text(PRETRAIN)
    (tmp_path / "base.yaml").write_text(BASE)

    def run(yaml: str = SWEEP, *arguments: str) -> list[dict[str, str]]:
        (tmp_path / "sweep.yaml").write_text(yaml)
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--config", "sweep.yaml", *arguments])
        recipe.main()
        with (tmp_path / "sweeps" / "tiny" / "trials.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_a_table_by_the_names_of_parameters(swept: Sweep) -> None:
    rows = swept() + swept(SWEEP, "trials=4")
    assert [len(rows), len({row["trial"] for row in rows})] == [6, 4]
    for row in rows:
        assert row["optimizer.schedule"] in ("linear", "cosine")
        assert float(row["validation_loss"]) == pytest.approx(float(row["students.0.learning_rate"]))
        assert (row["state"], row["evaluations"]) in [("complete", "2"), ("pruned", "1"), ("pruned", "2")]


@pytest.mark.parametrize(
    ("base", "yaml", "named"),
    [
        (BASE.replace("batch: 4", "batch: 8"), SWEEP, "base.train"),
        (BASE, SWEEP + "overrides: [data.seed=1]\n", "base.data"),
        (BASE, SWEEP + "  train.seed: {choices: [1, 2]}\nseed: 3\n", "parameters, seed"),
    ],
)
def test_a_sweep_of_something_else_is_refused(swept: Sweep, tmp_path: Path, base: str, yaml: str, named: str) -> None:
    swept(SWEEP, "trials=1")
    (tmp_path / "base.yaml").write_text(base)
    with pytest.raises(UserError, match=rf"tiny/journal.log was made with other settings of {named}:"):
        swept(yaml)


def test_a_run_whose_name_is_a_number(swept: Sweep, tmp_path: Path) -> None:
    swept("base: base.yaml\nname: tiny\ntrials: 1\nparameters: {train.seed: {choices: [34]}}")
    assert [path.name for path in (tmp_path / "sweeps" / "tiny" / "runs").iterdir()] == ["22640555"]


def test_hyperband_learns_how_long_runs_are(swept: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text(BASE.replace("steps: 6", "epochs: 6"))
    (tmp_path / "pretrain.py").write_text(PRETRAIN.replace("range(2)", "range(63)"))
    made = []

    class Pruner(optuna.pruners.HyperbandPruner):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            made.append(self)

    monkeypatch.setattr(optuna.pruners, "HyperbandPruner", Pruner)
    swept(SWEEP, "trials=1")
    (tmp_path / "pretrain.py").write_text(PRETRAIN + "__import__('time').sleep(1)")
    swept(SWEEP, "trials=2")
    assert made[-1]._n_brackets == 7, "63 evaluations, where train.steps' default has 166"


def test_a_failed_trial_is_named_by_its_values(swept: Sweep, tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text('import sys\nsys.exit("error: disk full")')
    with pytest.raises(UserError, match=r"trial 0 \(.*schedule.*\): .*output.txt: the run failed, .*error: disk full"):
        swept()


@pytest.mark.slow
def test_trials_a_table_and_going_on(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    table = tmp_path / "sweeps" / "tiny" / "trials.csv"
    for trials in (2, 3):
        done = sweep(tmp_path, f"trials={trials}")
        assert done.returncode == 0, done.stderr
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == trials
        complete = [float(row["validation_loss"]) for row in rows if row["state"] == "complete"]
        assert complete == sorted(complete)
        assert all(1e-4 <= float(row["students.0.learning_rate"]) <= 1e-2 for row in rows)
    assert len({row["students.0.learning_rate"] for row in rows}) == 3, "it does not begin again"
    assert (tmp_path / "sweeps" / "tiny" / "slice.svg").is_file()
