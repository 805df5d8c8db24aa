"""What a run says of a cache that is damaged or another one's, of a disk that refuses and of a teacher that overflows:
one line, and nothing that is wrong is used."""

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.config.settings import Config
from engine.teachers import cache, store
from engine.train import train
from tests.engine.teachers.tiny_teachers import distilled, losses, parts, refusal, require_equal_runs

FIXED, STREAM = (), ("teachers.context=stream", "train.chunks=random")


def cached(folder: Path, name: str, *overrides: str) -> Config:
    return distilled(folder, name, "train.epochs=1.5", f"cache.path={folder / 'cache'}", *overrides)


def scale_weights(folder: Path, teacher: str, pattern: str, factor: float) -> None:
    path = folder / "runs" / teacher / "students" / "one" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: factor * t if pattern in name else t for name, t in tensors.items()}, path, {"format": "pt"})


def write_manifest(folder: Path, **changed: Any) -> None:
    path = folder / "cache" / "llama" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("kind", "spoil", "overrides", "expected"),
    [
        (FIXED, None, ("data.seed=5",), "holds other states: its data is '"),
        (FIXED, None, ("train.length=8",), "holds other states: its train.length is 16, this run's 8"),
        (FIXED, None, ("objective.kl_everywhere=true", "train.length=8"), "its train.length is 16, this run's 8"),
        (FIXED, None, ("train.precision=bf16",), "its precision is 'fp32', this run's 'bf16'"),
        (FIXED, None, ("cache.dtype=int8",), "its dtype is 'exact', this run's 'int8'"),
        (FIXED, None, ("teachers.context=stream",), "its context is 'chunk', this run's 'stream'"),
        (STREAM, None, ("teachers.0.window=24",), "its window is 32, this run's 24"),
        (STREAM, None, ("teachers.context=chunk", "train.chunks=fixed"), "its context is 'stream', this run's 'chunk'"),
        (FIXED, lambda f: scale_weights(f, "gpt2", "", 1.01), (), "its teacher is '"),
        (FIXED, lambda f: write_manifest(f, blocks=48), (), "its blocks is 48, this run's 49"),
        (FIXED, lambda f: write_manifest(f, format=2), (), "its format is 2, this run's 3"),
        (FIXED, lambda f: (f / "cache/llama/manifest.json").write_text("{"), (), "/manifest.json is damaged: delete"),
        (FIXED, lambda f: (f / "cache/llama/manifest.json").unlink(), (), "holds something else, without a manifest"),
    ],
)
def test_a_cache_of_anything_else_is_refused_by_name(
    folder: Path,
    kind: tuple[str, ...],
    spoil: Callable[[Path], object] | None,
    overrides: tuple[str, ...],
    expected: str,
) -> None:
    train(cached(folder, "first", *kind))
    if spoil is not None:
        spoil(folder)
    before = parts(folder / "cache")
    assert expected in refusal(cached(folder, "other", *kind, *overrides))
    assert parts(folder / "cache") == before
    assert not (folder / "runs" / "other").exists(), "before anything is written"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()
    path.write_bytes(content)


def copy_over(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    shutil.copy(source, target)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda one, other, foreign: flip(one, -1), "{one} is damaged: delete it, and its states are computed again"),
        (lambda one, other, foreign: flip(one, 100), "{one}"),
        (lambda one, other, foreign: copy_over(other, one), "{one} is damaged"),
        (lambda one, other, foreign: copy_over(foreign, one.with_name(foreign.name)), "belongs to another cache than"),
    ],
)
@pytest.mark.parametrize("kind", [FIXED, STREAM])
def test_a_damaged_part_ends_the_run_and_is_made_again(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, ...],
    spoil: Callable[[Path, Path, Path], None],
    expected: str,
) -> None:
    monkeypatch.setattr(cache, "PART_BYTES", 2000)
    train(cached(folder, "first", *kind))
    before = parts(folder / "cache")
    one, other, *_ = sorted((folder / "cache" / "llama").glob("part-*"))
    spoil(one, other, max((folder / "cache" / "gpt2").glob("part-*")))
    assert expected.format(one=one) in refusal(cached(folder, "second", *kind))
    damaged = {name for name, content in parts(folder / "cache").items() if content != before.get(name)}
    for name in damaged:
        (folder / "cache" / name).unlink()
    train(cached(folder, "third", *kind))
    require_equal_runs(folder, "first", "third")


def test_a_part_that_is_damaged_while_the_run_reads_it_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum of a block is looked at when it is read, at whatever step that is."""
    monkeypatch.setattr(cache, "PART_BYTES", 2000)
    train(cached(folder, "first"))
    flip(max((folder / "cache" / "llama").glob("part-*"), key=lambda part: part.stat().st_mtime_ns), -1)
    message = refusal(cached(folder, "second"))
    assert "is damaged: delete it, and its states are computed again" in message
    assert 5 < len(losses(folder, "second")) < 13, "the last part of the first epoch"
    assert losses(folder, "second") == losses(folder, "first")[: len(losses(folder, "second"))]


@pytest.mark.parametrize("kind", [FIXED, STREAM])
@pytest.mark.parametrize("dtype", ["exact", "int8"])
def test_states_that_overflow_are_refused_and_not_kept(folder: Path, kind: tuple[str, ...], dtype: str) -> None:
    scale_weights(folder, "llama", "model.norm", 3e38)
    message = refusal(cached(folder, "overflows", f"cache.dtype={dtype}", *kind))
    assert f"{folder / 'cache' / 'llama'}: the teacher's hidden states are not finite (NaN or infinite)" in message
    assert not any(name.startswith("llama") for name in parts(folder / "cache"))


@pytest.mark.parametrize("kind", [FIXED, STREAM])
def test_a_full_disk_ends_the_run_and_leaves_nothing_half(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cache, "PART_BYTES", 2000)
    train(distilled(folder, "live", "train.epochs=1.5", *kind))
    numbers, save = itertools.count(), store.save_file

    def until_it_is_full(tensors: Any, path: Path, **options: Any) -> None:
        if next(numbers) >= 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", until_it_is_full)
        message = refusal(cached(folder, "refused", *kind))
    assert message.startswith(str(folder / "cache"))
    assert "could not be written ([Errno 28] No space left on device): make room and run again" in message
    left = parts(folder / "cache")
    assert len(left) == 3
    assert not any(name.endswith(".partial") for name in left)
    train(cached(folder, "refused", *kind))
    assert left.items() <= parts(folder / "cache").items()
    require_equal_runs(folder, "live", "refused")


MASKED = ("students.0.family=roberta", "data.tokenizer.mask=true")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((*MASKED, "cache.path=x"), "cache: every epoch masks other tokens, so the teachers' hidden states change"),
        ((*MASKED, "teachers.context=stream"), "teachers.context=stream: a teacher of robertas reads the sequences"),
        (("cache.path=x", "train.chunks=random"), "a teacher with context=chunk reads other sequences in every epoch"),
        (("cache.path=x", "teachers.0.context=stream", "train.chunks=random"), "with context=chunk reads other"),
        (("cache.path=x", "teachers=[]", "objective.temperature=1"), "cache without teachers"),
        (("teachers.window=16",), "teachers: window=16 belongs to context=stream"),
        (("teachers.context=stream", "teachers.window=34"), "reads at most 32 tokens, fewer than its window=34"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(
    folder: Path, overrides: tuple[str, ...], expected: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert expected in refusal(distilled(folder, "refused", *overrides))
    assert sorted(folder.rglob("*")) == before
