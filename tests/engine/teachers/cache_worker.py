"""One of two ranks that fill a cache and read it; test_cache_ranks.py runs it.

What is wrong fails an assertion, and the exit code is 1. At the end one rank's disk is full while it trains, and the
exit code is 2.
"""

import errno
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config.settings import Config
from engine.run import run
from engine.system.distributed import Runtime, exit_process, init_distributed
from engine.system.errors import report_errors
from engine.teachers import cache, store
from engine.teachers.store import StateStore, Stored
from engine.train import train
from tests.engine.teachers.tiny_teachers import distilled, killed, parts, refusal, require_equal_runs

CASES = {
    "chunk": ("objective.mix=each", "train.micro_batch=1"),
    "chunk-bf16": ("train.precision=bf16", "train.zero_stage=1"),
    "stream": ("teachers.context=stream", "train.chunks=random", "train.zero_stage=0"),
}


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Yields the blocks that this rank writes, by the teacher's name."""
    written: dict[str, list[int]] = {}
    write = StateStore.write

    def count(self: StateStore, blocks: Sequence[int], contents: Sequence[Stored]) -> None:
        written.setdefault(self.folder.name, []).extend(blocks)
        write(self, blocks, contents)

    StateStore.write = count
    try:
        yield written
    finally:
        StateStore.write = write


def compare(folder: Path, runtime: Runtime, name: str, overrides: tuple[str, ...]) -> None:
    """Trains live, twice with a cache, and once with deaths in between, and compares the runs."""

    def config(kind: str, *more: str) -> Config:
        return distilled(folder, f"{name}-{kind}", "train.epochs=2.5", "checkpoint.every=5", *overrides, *more)

    path = f"cache.path={folder / name}"
    train(config("live"))
    with counted() as written:
        train(config("fills", path))
    by_rank = runtime.all_gather(written)
    for teacher in ("llama", "gpt2"):
        shares = [set(written[teacher]) for written in by_rank]
        assert min(map(len, shares)) > 5, "both ranks write"
        if name.startswith("stream"):
            assert not shares[0] & shares[1], "nothing is written twice"
            assert sum(len(written[teacher]) for written in by_rank) == len(shares[0] | shares[1])
    with counted() as written:
        train(config("reads", path))
    assert runtime.all_gather(written) == [{}, {}]
    for death in (8, 19):
        killed(config("broken", f"cache.path={folder / name}-broken"), death)
    train(config("broken", f"cache.path={folder / name}-broken"))
    runtime.barrier()
    if runtime.is_main_process:
        for kind in ("fills", "reads", "broken"):
            require_equal_runs(folder, f"{name}-live", f"{name}-{kind}")
        assert not any(file.endswith(".partial") for file in parts(folder / name))
    runtime.barrier()


def slow_rank(folder: Path, runtime: Runtime) -> None:
    """One rank takes its time to write: the other one leaves it its share."""
    save = store.save_file

    def slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(0.02)
        save(*arguments, **options)

    store.save_file = slowly if runtime.rank == 1 else save
    with counted() as written:
        train(distilled(folder, "slow", *CASES["stream"], f"cache.path={folder / 'slow'}"))
    store.save_file = save
    one, other = runtime.all_gather(sorted(written["llama"]))
    assert len(one) + len(other) == len({*one, *other})
    assert abs(len(one) - len(other)) <= 4


def full_disk_of_one_rank(folder: Path, runtime: Runtime) -> None:
    """Where one rank cannot write, all end with its message."""
    save = store.save_file

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.save_file = refuse if runtime.rank == 1 else save
    message = refusal(distilled(folder, "full", *CASES["stream"], f"cache.path={folder / 'full'}"))
    assert message.startswith("rank 1: ")
    assert "could not be written ([Errno 28] No space left on device): make room and run again" in message
    store.save_file = save
    runtime.barrier()
    train(distilled(folder, "full", *CASES["stream"], f"cache.path={folder / 'full'}"))


def full_disk_of_one_rank_in_training(folder: Path, runtime: Runtime) -> None:
    """Ends both ranks, where one cannot write what it has computed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if runtime.rank == 1:
        store.save_file = refuse
    train(distilled(folder, "full-chunk", "train.epochs=2.5", f"cache.path={folder / 'full-chunk'}"))


def main(folder: Path) -> None:
    runtime = init_distributed()
    run.write_report = lambda folder: None
    cache.PART_BYTES = 2000
    for name, overrides in CASES.items():
        compare(folder, runtime, name, overrides)
    slow_rank(folder, runtime)
    full_disk_of_one_rank(folder, runtime)
    with report_errors():
        full_disk_of_one_rank_in_training(folder, runtime)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process()
