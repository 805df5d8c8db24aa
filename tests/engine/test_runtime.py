"""How a rank learns that it should stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import os, time
from engine.runtime import StopSignal
stop = StopSignal()
print(os.getpid(), flush=True)
for _ in range(600):
    if stop:
        print("stops", flush=True)
        break
    time.sleep(0.05)
"""
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}])"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "launcher dies"])
def test_a_rank_hears_of_it(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, cwd=ROOT) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        if how == "launcher dies":
            launcher.kill()
        else:
            os.kill(rank, signal.Signals[how])
        assert launcher.stdout.readline() == "stops\n"
