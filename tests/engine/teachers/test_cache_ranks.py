"""Several processes at one cache: the ranks of a run, runs side by side, and runs that are killed while they write."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.teachers.tiny_teachers import parts, require_equal_runs

pytestmark = pytest.mark.slow


def test_two_ranks_fill_and_read_one_cache(spawn_ranks: Callable[..., None], folder: Path) -> None:
    """In the end one of them cannot write, and both end with the exit code 2."""
    spawn_ranks(Path(__file__).with_name("cache_worker.py"), 2, folder, timeout=200, code=2)


@pytest.mark.parametrize("kind", ["chunk", "stream"])
def test_killed_writers_and_runs_side_by_side(folder: Path, kind: str) -> None:
    """SIGKILL comes while the cache is filled; a run that goes on, and runs at once, end as one that nobody touched."""
    worker = Path(__file__).with_name("kill_worker.py")
    command = [sys.executable, str(worker), str(folder), kind, "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = [path.name for path in (folder / "runs").iterdir() if path.name.startswith(("killed", "beside"))]
    assert len(names) == 2 + 2
    for name in names:
        require_equal_runs(folder, "whole", name)
    for cache in folder.glob("cache-*"):
        assert not any(file.endswith(".partial") for file in parts(cache))
