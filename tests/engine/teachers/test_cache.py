"""Caches that several ranks and several runs fill at once, disks that refuse, and parts that are damaged; run as a
script, one of two ranks. (That a cache stands in for its teachers: test_teachers.py.)"""

import errno
import os
import shutil
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
from engine.system import distributed as runtime
from engine.system.distributed import Runtime
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
    """Two chunks a part, and no models on disk."""
    for name, value in {
        "CHUNKS_A_PART": 2,
        "load_teachers": lambda *_: Bigrams(),
    }.items():
        setattr(teacher_cache, name, value)


@pytest.fixture(autouse=True)
def _stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNKS_A_PART", "load_teachers"):
        monkeypatch.setattr(teacher_cache, name, None)  # to be set back
    setup()


def cache(folder: Path, place: Runtime = ALONE) -> CachedTeachers:
    """Of seven chunks, in four parts."""
    tokens = folder.with_name(f"tokens-{place.rank}.bin")
    (np.arange(7 * L + 1) ** 2 % V).astype("<u2").tofile(tokens)
    settings = {
        "students": [{"name": "one", "layers": 1, "hidden": 16, "heads": 2, "ffn": 32}],
        "teachers": [{"path": "bigrams"}],
        "cache": {"path": str(folder), "k": 4},
        "train": {"length": L},
    }
    prepared: Any = SimpleNamespace(tokenizer=SimpleNamespace(size=V, hash="pieces"), identity="text")
    data = TrainingData(
        TokenFile(tokens, "<u2", L),
        batch=2,
        micro_batch=None,
        seed=0,
        random_offsets=False,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
    )
    return teacher_cache.teachers(build(Config, settings), prepared, data, place, ["bigrams"])


def parts(folder: Path) -> dict[str, bytes]:
    """All that is there but the manifest."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def test_flipped_bytes_are_found_before_the_run_begins(tmp_path: Path) -> None:
    cache(tmp_path / "cache")
    part = tmp_path / "cache" / "part-00001.bin"
    whole = part.read_bytes()
    for place in (8, 30, len(whole) // 2, len(whole) - 1):  # where a record ends, in the records, their checksum
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"part-00001\.bin is damaged: delete it, and it is made again"):
            cache(tmp_path / "cache")
    part.unlink()
    cache(tmp_path / "cache")
    assert part.read_bytes() == whole


@pytest.mark.parametrize("dies", [False, True])
def test_two_runs_may_fill_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    cache(tmp_path / "whole")
    rename = Path.rename

    def be_overtaken(self: Path, target: Path) -> Path:
        """By a run that begins when this one has written its second part and has not put it in its place."""
        if target.name == "part-00001.bin":
            monkeypatch.setattr(Path, "rename", rename)
            with monkeypatch.context() as other, suppress(KeyboardInterrupt):
                other.setattr(os, "getpid", lambda: 1)
                if dies:
                    other.setattr(Path, "rename", die)
                cache(tmp_path / "cache")
        return rename(self, target)

    def die(self: Path, target: Path) -> Path:
        """With the same part written."""
        if target.name == "part-00001.bin":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", be_overtaken)
    cache(tmp_path / "cache")
    assert parts(tmp_path / "cache") == parts(tmp_path / "whole")


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("manifest.1.partial", "part-00001.1.partial"):
        (folder / name).write_bytes(b"half")
        cache(folder)
        assert sorted(parts(folder)) == [f"part-{number:05d}.bin" for number in range(4)]


def test_a_full_disk_leaves_nothing_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def until_it_is_full(self: Path, content: bytes) -> int:
        write_bytes(self, content[:100])
        if self.name.startswith("part-00002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, content)

    monkeypatch.setattr(Path, "write_bytes", until_it_is_full)
    with pytest.raises(ValueError, match=r"part-00002\.bin could not be written .*No space left .*make room"):
        cache(tmp_path / "cache")
    assert sorted(parts(tmp_path / "cache")) == ["part-00000.bin", "part-00001.bin"]


def test_ranks_share_one_view_of_the_cache_and_of_what_went_wrong(
    spawn_ranks: Callable[..., None], tmp_path: Path
) -> None:
    spawn_ranks(Path(__file__), 2, tmp_path, timeout=120)


def main(folder: Path) -> None:
    setup()
    place = runtime.start()
    cache(folder / "whole", place)
    manifest_of = teacher_cache.manifest_of

    def overtake(*arguments: Any) -> dict[str, Any]:
        """Another run finishes all when rank 0 has looked and rank 1 has not."""
        if not place.is_main_process:
            time.sleep(1)
            shutil.copytree(folder / "whole", folder / "cache", dirs_exist_ok=True)
        return manifest_of(*arguments)

    teacher_cache.manifest_of = overtake
    cache(folder / "cache", place)
    assert parts(folder / "cache") == parts(folder / "whole")

    teacher_cache.manifest_of = manifest_of
    if place.is_main_process:
        (folder / "taken" / "part-00001.bin").mkdir(parents=True)  # the second rank's
        shutil.copy(folder / "whole" / "manifest.json", folder / "taken")
    with pytest.raises(ValueError, match=r"rank 1: .*Is a directory: .*part-00001"):
        cache(folder / "taken", place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    runtime.end()
