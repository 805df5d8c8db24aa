"""Caches that several ranks and several runs fill at once, disks that refuse, and parts that are damaged; run as a
script, one of two ranks. (test_teachers.py shows that a cache stands in for its teachers.)"""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.loading import build
from engine.config.settings import Config
from engine.data.batches import Batch, TokenFile, TrainingData
from engine.system.distributed import Runtime, exit_process, init_distributed
from engine.system.errors import UserError
from engine.teachers import cache as teacher_cache
from engine.teachers.cache import CachedTeachers
from kernels import Projected

V, L = 50, 8
ALONE = Runtime(0, 1, 0, torch.device("cpu"))


class Bigrams:
    """A teacher that looks at one token."""

    def __call__(self, batch: Batch) -> list[Projected]:
        table_VD = torch.randn(V, 4, generator=torch.Generator().manual_seed(0))
        return [Projected(table_VD[batch.tokens_BL.flatten()], table_VD)]


def setup() -> None:
    """Puts two chunks in a part, and does without models on disk."""
    for name, value in {
        "CHUNKS_PER_PART": 2,
        "load_teachers": lambda *_: Bigrams(),
    }.items():
        setattr(teacher_cache, name, value)


@pytest.fixture(autouse=True)
def _stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNKS_PER_PART", "load_teachers"):
        monkeypatch.setattr(teacher_cache, name, None)  # to be set back
    setup()


def cache(folder: Path, runtime: Runtime = ALONE) -> CachedTeachers:
    """Returns the cache of seven chunks, in four parts."""
    tokens = folder.with_name(f"tokens-{runtime.rank}.bin")
    (np.arange(7 * L + 1) ** 2 % V).astype("<u2").tofile(tokens)
    settings = {
        "students": [{"name": "one", "layers": 1, "hidden": 16, "heads": 2, "ffn": 32}],
        "teachers": [{"path": "bigrams"}],
        "cache": {"path": str(folder), "k": 4},
        "train": {"length": L},
    }
    prepared: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=V, hash="tokens"), identity="text")
    data = TrainingData(
        TokenFile(tokens, "<u2", L),
        batch=2,
        micro_batch=None,
        seed=0,
        random_offsets=False,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    return teacher_cache.cached_teachers(build(Config, settings), prepared, data, runtime, ["bigrams"])


def parts(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file except the manifest."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def test_flipped_bytes_are_found_before_the_run_begins(tmp_path: Path) -> None:
    cache(tmp_path / "cache")
    part = tmp_path / "cache" / "part-00001.bin"
    whole = part.read_bytes()
    for at in (8, 30, len(whole) // 2, len(whole) - 1):  # where a record ends, in the records, their checksum
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"part-00001\.bin is damaged: delete it, and it is made again"):
            cache(tmp_path / "cache")
    part.unlink()
    cache(tmp_path / "cache")
    assert part.read_bytes() == whole


@pytest.mark.parametrize("dies", [False, True])
def test_two_runs_may_fill_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    cache(tmp_path / "whole")
    replace = os.replace

    def be_overtaken(aside: Path, target: Path) -> None:
        """Begins another run when this one has written its second part and has not renamed it."""
        if target.name == "part-00001.bin":
            monkeypatch.setattr(os, "replace", replace)
            with monkeypatch.context() as other, suppress(KeyboardInterrupt):
                other.setattr(os, "getpid", lambda: 1)
                if dies:
                    other.setattr(os, "replace", die)
                cache(tmp_path / "cache")
        replace(aside, target)

    def die(aside: Path, target: Path) -> None:
        """Ends the other run when it has written the same part."""
        if target.name == "part-00001.bin":
            raise KeyboardInterrupt
        replace(aside, target)

    monkeypatch.setattr(os, "replace", be_overtaken)
    cache(tmp_path / "cache")
    assert parts(tmp_path / "cache") == parts(tmp_path / "whole")


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("manifest.json", "part-00001.bin"):  # The second time the cache is whole, and nothing is written.
        (folder / f".{name}.{socket.gethostname()}.{ended.pid}.partial").write_bytes(b"half")
        cache(folder)
        assert sorted(parts(folder)) == [f"part-{number:05d}.bin" for number in range(4)]


def test_a_full_disk_leaves_nothing_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def until_it_is_full(self: Path, content: bytes) -> int:
        write_bytes(self, content[:100])
        if "part-00002" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, content)

    monkeypatch.setattr(Path, "write_bytes", until_it_is_full)
    with pytest.raises(UserError, match=r"part-00002\.bin could not be written .*No space left .*make room"):
        cache(tmp_path / "cache")
    assert sorted(parts(tmp_path / "cache")) == ["part-00000.bin", "part-00001.bin"]


def test_ranks_share_one_view_of_the_cache_and_of_what_went_wrong(
    spawn_ranks: Callable[..., None], tmp_path: Path
) -> None:
    spawn_ranks(Path(__file__), 2, tmp_path, timeout=120)


def main(folder: Path) -> None:
    setup()
    runtime = init_distributed()
    cache(folder / "whole", runtime)
    manifest_of = teacher_cache.manifest_of

    def overtake(*arguments: Any) -> dict[str, Any]:
        """Has another run fill the cache when rank 0 has looked and rank 1 has not."""
        if not runtime.is_main_process:
            time.sleep(1)
            shutil.copytree(folder / "whole", folder / "cache", dirs_exist_ok=True)
        return manifest_of(*arguments)

    teacher_cache.manifest_of = overtake
    cache(folder / "cache", runtime)
    assert parts(folder / "cache") == parts(folder / "whole")

    teacher_cache.manifest_of = manifest_of
    if runtime.is_main_process:
        (folder / "taken" / "part-00001.bin").mkdir(parents=True)  # the second rank's
        shutil.copy(folder / "whole" / "manifest.json", folder / "taken")
    with pytest.raises(UserError, match=r"rank 1: .*Is a directory: .*part-00001"):
        cache(folder / "taken", runtime)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process()
