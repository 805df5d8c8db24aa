"""What the tests of teachers share: two trained teachers, and a folder with a copy of them."""

import shutil
from pathlib import Path

import pytest

from engine.run import run
from tests.engine.teachers.tiny_teachers import BOTH, train_teachers


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two trained teachers, not to be written to."""
    return train_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out report.html, which takes most of a tiny run's time."""
    monkeypatch.setattr(run, "write_report", lambda folder: None)


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Returns a folder with a copy of the teachers, to spoil and to train in."""
    for part in ("prepared", *(f"runs/{name}/students" for name in BOTH)):
        shutil.copytree(models / part, tmp_path / part)
    return tmp_path
