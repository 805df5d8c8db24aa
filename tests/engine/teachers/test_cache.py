"""A run that reads its teachers' hidden states from a cache is the run that computes them, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from engine.data.batches import Step
from engine.run.run import Run
from engine.teachers import cache, teachers
from engine.teachers.store import StateStore
from engine.train import train
from tests.engine.teachers.tiny_teachers import (
    BOTH,
    TINY,
    after_step,
    distilled,
    killed,
    losses,
    parts,
    require_equal_runs,
    settings,
    trace,
)

LONG = ("train.epochs=2.5",)  # 31 steps; the first epoch ends in step 13


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Returns a list that says of every teacher that is loaded whether only its head was."""
    heads_only, load_model = [], teachers.load_model

    def load(*arguments: Any, head_only: bool = False, **options: Any) -> Any:
        heads_only.append(head_only)
        return load_model(*arguments, head_only=head_only, **options)

    monkeypatch.setattr(teachers, "load_model", load)
    return heads_only


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a part take the states of a few chunks."""
    monkeypatch.setattr(cache, "PART_BYTES", 2000)


@pytest.mark.parametrize(
    ("names", "overrides"),
    [
        (BOTH, ("train.zero_stage=0",)),
        (BOTH, ("train.precision=bf16", "objective.mix=each", "train.micro_batch=2")),
        (("llama",), ("train.precision=bf16",)),
        (("gpt2",), ("train.zero_stage=1", "train.micro_batch=1", "objective.kl_everywhere=true")),
    ],
)
def test_chunks_that_are_kept_as_they_are_met(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[bool],
    names: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    def config(name: str, *more: str) -> Any:
        return distilled(folder, name, *LONG, *overrides, *more, teachers=names)

    small_parts(monkeypatch)
    path = f"cache.path={folder / 'cache'}"
    bodies: dict[int, list[bool]] = {}

    def note_bodies(run: Run, step: Step) -> None:
        bodies[step.number] = [teacher.model is None for teacher in run.teachers.teachers]
        if step.number == 14:  # What the first epoch has left is being written.
            for writer in run.teachers._writers:  # pyright: ignore[reportAttributeAccessIssue]
                writer._writing.result()

    train(config("live"))
    with after_step(note_bodies):
        train(config("fills", path))
    assert not any(any(freed) for step, freed in bodies.items() if step < 13), "an epoch computes all of its chunks"
    assert all(all(freed) for step, freed in bodies.items() if step > 15), "a body that is not needed is freed"
    assert len(parts(folder / "cache")) > 2 * len(names)
    before, loaded[:] = parts(folder / "cache"), []
    train(config("reads", path))
    assert loaded == [True] * len(names), "a whole cache needs no teacher's body"
    assert parts(folder / "cache") == before
    for name in ("fills", "reads"):
        require_equal_runs(folder, "live", name)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.chunks=random", "objective.mix=each"),
        ("train.chunks=fixed", "train.precision=bf16", "teachers.window=12"),
        ("train.chunks=random", "train.precision=bf16", "train.micro_batch=1", "teachers.1.window=22"),
    ],
)
def test_windows_of_its_own_are_all_computed_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[bool], overrides: tuple[str, ...]
) -> None:
    def config(name: str, *more: str) -> Any:
        return distilled(folder, name, *LONG, "teachers.context=stream", *overrides, *more)

    small_parts(monkeypatch)
    path = f"cache.path={folder / 'cache'}"
    train(config("live"))

    def require_no_body(run: Run, _: Step) -> None:
        assert [teacher.model for teacher in run.teachers.teachers] == [None, None]

    with after_step(require_no_body):
        train(config("fills", path))
    before, loaded[:] = parts(folder / "cache"), []
    assert len(before) > 4
    train(config("reads", path))
    assert loaded == [True, True]
    train(config("other", path, "train.micro_batch=2"))
    train(config("other_live", "train.micro_batch=2"))
    assert parts(folder / "cache") == before
    for name in ("fills", "reads"):
        require_equal_runs(folder, "live", name)
    require_equal_runs(folder, "other", "other_live")


def test_a_chunk_and_a_stream_beside_each_other(folder: Path) -> None:
    options = ("teachers.1.context=stream", "objective.mix=each", "students.0.family=gpt2", "students.0.dropout=0.2")
    for name, more in (("live", ()), ("fills", (f"cache.path={folder / 'cache'}",))):
        train(distilled(folder, name, *LONG, *options, *more))
    require_equal_runs(folder, "live", "fills")


@pytest.mark.parametrize(
    "overrides",
    [
        ("students.0.family=gpt2", "students.0.dropout=0.2", "train.micro_batch=2"),
        ("train.precision=bf16", "objective.mix=each"),
        ("cache.dtype=int8",),
        ("teachers.context=stream", "train.chunks=random", "cache.dtype=int8"),
    ],
)
def test_a_killed_run_ends_where_it_would_have_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """It dies in the first epoch, when some chunks are kept and others are lost, and in the second."""
    small_parts(monkeypatch)

    def config(name: str) -> Any:
        return distilled(folder, name, *LONG, "checkpoint.every=5", f"cache.path={folder / name}", *overrides)

    train(config("whole"))
    killed(config("broken"), 8)
    if "teachers.context=stream" not in overrides:
        assert 0 < len(parts(folder / "broken")) < len(parts(folder / "whole"))
    killed(config("broken"), 19)
    train(config("broken"))
    require_equal_runs(folder, "whole", "broken")
    if "cache.dtype=int8" not in overrides:
        train(distilled(folder, "live", *LONG, *overrides))
        require_equal_runs(folder, "live", "broken")


def test_a_run_that_reads_int8_states_is_the_run_that_wrote_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    options = (*LONG, f"cache.path={folder / 'cache'}", "cache.dtype=int8")
    train(distilled(folder, "live", *LONG))
    train(distilled(folder, "fills", *options))
    train(distilled(folder, "reads", *options))
    require_equal_runs(folder, "fills", "reads")
    assert losses(folder, "fills") == pytest.approx(losses(folder, "live"), rel=1e-2)
    assert losses(folder, "fills")[0] != losses(folder, "live")[0], (
        "the first step reads what is kept, not what is exact"
    )


def test_a_run_within_the_first_epoch_keeps_what_it_has_computed(folder: Path, loaded: list[bool]) -> None:
    path = f"cache.path={folder / 'cache'}"
    train(distilled(folder, "short", path, "train.steps=6"))
    assert [name.split("/")[0] for name in parts(folder / "cache")] == ["gpt2", "llama"]
    seen: list[Any] = []
    live_states = teachers.Teacher.states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers.Teacher, "states", lambda self, batch: seen.append(batch) or live_states(self, batch))
        train(distilled(folder, "again", path, "train.steps=6"))
        assert seen == []
        train(distilled(folder, "longer", path, "train.steps=9"))
        assert len(seen) == 2 * 3
    assert loaded == [False] * 6
    assert trace(folder, "again") == trace(folder, "short")


@pytest.mark.parametrize(("length", "moment"), [("train.epochs=2.5", 5), ("train.steps=6", 6)])
def test_a_writer_that_is_overtaken_writes_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, length: str, moment: int
) -> None:
    """Another run fills the cache while this one is in its first epoch, or about to write what it has at its end."""
    options = (length, f"cache.path={folder / 'cache'}")
    train(distilled(folder, "live", length))
    written: list[list[int]] = []
    write = StateStore.write

    def count(self: StateStore, blocks: list[int], contents: Any) -> None:
        written.append(list(blocks))
        write(self, blocks, contents)

    def overtake(_: Run, step: Step) -> None:
        if step.number == moment:
            Run.after_step = other_after_step
            train(distilled(folder, "other", *options))

    monkeypatch.setattr(StateStore, "write", count)
    other_after_step = Run.after_step
    with after_step(overtake):
        train(distilled(folder, "slow", *options))
    assert len(written) == 2, "each teacher's states, by one of the runs"
    for name in ("slow", "other"):
        require_equal_runs(folder, "live", name)


def test_students_of_a_run_teach_the_next(folder: Path) -> None:
    """Two of one run by their names, two of different runs whose folders have the same name, and one in two ways."""
    peers = [{"name": "a", **TINY}, {"name": "b", **TINY, "hidden": 24, "seed": 1}]
    train(settings(folder, "peers", "train.steps=4", f"students={peers}"))
    for kind, names, context in (
        ("siblings", ("peers/students/a", "peers/students/b"), "chunk"),
        ("namesakes", ("llama/students/one", "gpt2/students/one"), "chunk"),
        ("twice", ("llama", "llama"), "stream"),
    ):
        options = (*LONG, "objective.mix=each", f"teachers.1.context={context}")
        train(distilled(folder, f"{kind}-live", *options, teachers=names))
        for name in (f"{kind}-fills", f"{kind}-reads"):
            train(distilled(folder, name, *options, f"cache.path={folder / kind}", teachers=names))
            require_equal_runs(folder, f"{kind}-live", name)
        assert len(list((folder / kind).iterdir())) == 2, "each teacher has a folder of its own"
    assert sorted(path.name for path in (folder / "siblings").iterdir()) == ["a", "b"]
