"""A sweep: trials, pruning, the table, and going on."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = """
students: [{name: one, layers: 1, hidden: 16, heads: 2, ffn: 32, positions: 32}]
data: {words: 3000, tokenizer: {pieces: 400}}
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


@pytest.mark.slow
def test_trials_a_table_and_going_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
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
