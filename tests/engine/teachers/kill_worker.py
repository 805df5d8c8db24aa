"""Runs that are killed while they fill a cache, and runs side by side; test_cache_ranks.py runs it.

Each run is a forked process, so that torch is imported once. A kill comes when a random number of parts is there, or
when a part is half written.
"""

import importlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from engine.run import run
from engine.teachers import cache
from engine.train import train
from tests.engine.teachers.tiny_teachers import distilled

OPTIONS = {
    "chunk": ("objective.mix=each",),
    "stream": ("objective.mix=each", "teachers.context=stream", "train.chunks=random"),
}


def start(folder: Path, kind: str, name: str, cache_name: str) -> int:
    """Returns the process id of a run that trains."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        path = f"cache.path={folder / cache_name}"
        train(distilled(folder, name, "train.epochs=2.5", "checkpoint.every=3", *OPTIONS[kind], path))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_while_it_writes(child: int, folder: Path, parts: int, *, half: bool) -> str:
    """Kills a run when so many parts are there, with `half` while a further one is written; returns what it left."""
    while len(list(folder.glob("*/part-*"))) < parts or (half and not list(folder.glob("*/.part-*"))):
        if os.waitpid(child, os.WNOHANG)[0]:
            return "it had ended"
        time.sleep(0.0003)
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    return f"{len(list(folder.glob('*/part-*')))} parts, {len(list(folder.glob('*/.*.partial')))} half ones"


def main(folder: Path, kind: str, kills: int) -> None:
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # Each run would take seconds for it.
    cache.PART_BYTES = 2000
    run.write_report = lambda folder: None
    assert wait(start(folder, kind, "whole", "cache-whole")) == 0
    whole = len(list((folder / "cache-whole").glob("*/part-*")))
    for number in range(kills):
        generator, name = random.Random(number), f"killed-{number}"
        for _ in range(2):
            child = start(folder, kind, name, f"cache-{name}")
            parts = generator.randrange(whole)
            left = kill_while_it_writes(child, folder / f"cache-{name}", parts, half=generator.random() < 0.7)
            print(f"{name}: {left} of {whole}", flush=True)
        assert wait(start(folder, kind, name, f"cache-{name}")) == 0
    beside = [start(folder, kind, f"beside-{number}", "cache-beside") for number in range(2)]
    assert [wait(child) for child in beside] == [0, 0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
