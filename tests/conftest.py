"""What tests share: spawning the ranks of a process group, and finding real text."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def corpus() -> Path:
    """A folder of real text in BabyLM's layout; tests that want one are skipped where there is none."""
    path = Path(os.environ.get("CRECHE_CORPUS", ROOT.parent / "shared" / "data" / "corpus"))
    if not path.is_dir():
        pytest.skip("no corpus: set CRECHE_CORPUS to a folder of *.txt")
    return path


@pytest.fixture(scope="session")
def spawn_ranks() -> Callable[..., None]:
    """Run `script arguments...` once per rank and wait; the first that ends with another `code` fails the test."""

    def spawn(script: Path, world_size: int, *arguments: object, timeout: int = 500, code: int = 0) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        ranks = []
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(script), *map(str, arguments)],
                    env=os.environ | {key: str(value) for key, value in place.items()},
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        for rank, output in zip(ranks, outputs, strict=True):
            assert rank.returncode == code, output[-4000:]

    return spawn
