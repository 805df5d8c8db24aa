"""Tiny teachers, the runs that learn from them in a second, and what a run has left to compare."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.loading import build
from engine.config.settings import Config
from engine.data.batches import Step
from engine.run import checkpoint
from engine.run.run import Run
from engine.students.cohort import Verdict
from engine.students.gradients import Tally
from engine.system.errors import UserError
from engine.teachers import cache
from engine.train import train

TINY = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 32}
VOCAB_SIZE = 400
BOTH = ("llama", "gpt2")


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def settings(folder: Path, name: str, *overrides: str, **student: Any) -> Config:
    """Returns the settings of a run; 16 positions, so that an epoch of 49 sequences takes 12 steps and a quarter."""
    config = {
        "students": [{"name": "one", "learning_rate": 1e-2, **TINY, **student}],
        "run": {"name": name, "folder": str(folder / "runs"), "log_every": 1},
        "data": {"folder": str(folder / "prepared"), "words": 330, "tokenizer": {"vocab_size": VOCAB_SIZE}},
        "optimizer": {"warmup": 1},
        "train": {"steps": 6, "batch": 4, "length": 16},
        "evaluation": {"every": 1000, "tokens": 100, "pairs": "none", "samples": 1, "sample_tokens": 4},
    }
    return build(Config, config, overrides)


def train_teachers(folder: Path) -> Path:
    """Trains two teachers of different families and widths for some steps."""
    train(settings(folder, "llama", hidden=24, tied=False))
    train(settings(folder, "gpt2", family="gpt2", dropout=0.1, seed=1))
    return folder


def distilled(folder: Path, name: str, *overrides: str, teachers: tuple[str, ...] = BOTH) -> Config:
    """Returns the settings of a run that learns from the teachers in the folder."""
    paths = ", ".join(f"{{path: {folder / 'runs' / t}}}" for t in teachers)
    objective = ("objective.ce_weight=0.5", "objective.temperature=2")
    return settings(folder, name, f"teachers=[{paths}]", *objective, *overrides)


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the records of a run's steps."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def losses(folder: Path, name: str) -> list[float]:
    return [step["students"]["one"]["loss"] for step in steps(folder, name)]


def refusal(config: Config) -> str:
    """Returns the one line of the error that ends a run."""
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trace(folder: Path, name: str) -> list[Any]:
    """Returns every recorded number of a run that what it learns decides, but nothing that the clock decides."""
    own = ("loss", "ce", "grad_norm", "lr")
    return [[s["step"], s["tokens"], s["kl"], *(s["students"]["one"][key] for key in own)] for s in steps(folder, name)]


def final(folder: Path, name: str) -> dict[str, Tensor]:
    """Returns the weights and moments in a run's last checkpoint."""
    last = checkpoint.latest(folder / "runs" / name / "checkpoints")
    assert last is not None
    return checkpoint.read_student(last, "one")


def require_equal_runs(folder: Path, one: str, other: str) -> None:
    """Asserts that two runs have recorded the same losses and ended with the same weights, bit for bit."""
    assert trace(folder, one) == trace(folder, other)
    ends = final(folder, one), final(folder, other)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@contextmanager
def after_step(act: Callable[[Run, Step], None]) -> Iterator[None]:
    """Calls `act` after every step of the runs in the block."""
    original = Run.after_step

    def recorded(self: Run, step: Step, tally: Tally, verdict: Verdict) -> None:
        original(self, step, tally, verdict)
        act(self, step)

    Run.after_step = recorded
    try:
        yield
    finally:
        Run.after_step = original


def killed(config: Config, number: int) -> None:
    """Trains until the step of this number is recorded; of the states then in memory nothing is written."""

    def die(_: Run, step: Step) -> None:
        if step.number == number:
            raise Killed

    def drop(self: cache.CachedTeachers) -> None:
        for writer in self._writers:
            writer._thread.shutdown()

    close = cache.CachedTeachers.close
    cache.CachedTeachers.close = drop
    try:
        with after_step(die):
            train(config)
    except Killed:
        return
    finally:
        cache.CachedTeachers.close = close
    raise AssertionError("the run was to be killed and was not")


def parts(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file of a cache except the manifests, by its path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
