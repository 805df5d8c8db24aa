"""Cases small enough for a test, and the answers of a variant's process, without the process."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, throughput
from benchmarks.cases import Case

SHAPES = ("2x32x4x48x2", "1x16x2x40", "1x24x2x24")
TEACHER_SHAPES = ("2x48x4x64", "1x32x2x64")
SETTINGS = ("train.length=16", "train.batch=4")
VOCAB_SIZE = 61


@pytest.fixture
def make_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Case]:
    """Makes cases of a task with S students and K teachers; every step reads the same text, in another order."""
    monkeypatch.setattr(cases, "SEQUENCES", 4)

    def make(task: str, students: int, teachers: int = 0, *overrides: str) -> Case:
        settings = [*SETTINGS, *overrides]
        return cases.case(tmp_path, task, students, teachers, VOCAB_SIZE, "auto", settings, SHAPES, TEACHER_SHAPES)

    return make


@pytest.fixture
def answers() -> Iterator[Callable[[str, Case, list[str]], list[Any]]]:
    """Has a variant obey commands in this process, and returns its answers, the last a traceback where it failed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def ask(name: str, case: Case, commands: list[str]) -> list[Any]:
        ours, theirs = multiprocessing.Pipe()
        for command in [*commands, ""]:
            ours.send(command)
        throughput.serve(theirs, name, case)
        return [ours.recv() for _ in commands if ours.poll()]

    yield ask
    for number, handler in handlers.items():  # The engine's would keep a test from being ended.
        signal.signal(number, handler)
