"""What a run would take, said beforehand; for every recipe in the repository."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.compute.memory import LOGITS
from engine.config.loading import build, read_yaml
from engine.config.settings import Config
from engine.run import dry_run
from engine.run.dry_run import describe_run
from engine.system.errors import UserError
from kernels.ops.linear_ensemble_kl import native, triton

RECIPES = Path(__file__).parents[3] / "recipes"
PUBLISHED = {
    "gpt2-705m-original": (704_732_160, 6, 256),
    "gpt2-705m-later": (704_928_768, 4, 128),
    "llama-360m-original": (359_973_888, 4, 128),
    "llama-360m-later": (359_973_888, 4, 128),
    "student-58m": (58_343_936, 6, 32),
    "control-58m": (58_343_936, 6, 32),
    "teacher-1": (345_355_200, 8, 128),
    "teacher-2": (345_355_200, 8, 128),
    "student": (345_355_200, 8, 128),
    "published": (59_930_201, 100, 180),
}
RUNS = [path for path in RECIPES.glob("bab*/*.yaml") if path.stem != "prepare"]
YAMLS = sorted([*RUNS, *(RECIPES / f"{n}.yaml" for n in ("pretrain", "distill", "mutual"))])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = build(Config, read_yaml(path))
    found = describe_run(config, path.parent)
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    assert found.count("teacher runs/") == len(config.teachers)
    if path.stem in PUBLISHED and path.parent.name != "recipes":
        parameters, epochs, batch = PUBLISHED[path.stem]
        assert f": {parameters:,} parameters" in found.splitlines()[0]
        assert config.train.epochs == epochs
        assert config.train.batch == batch
        assert f"{epochs}.00 times the text" in found


def test_numbers_by_hand(tmp_path: Path) -> None:
    """A LLaMA of 1 layer: every number can be worked out."""
    student = {"name": "a", "layers": 1, "hidden": 8, "heads": 2, "ffn": 16, "tied": False, "max_length": 16}
    settings = {
        "students": [student],
        "data": {"tokenizer": {"vocab_size": 100}},
        "train": {"steps": 10, "batch": 4, "length": 16, "micro_batch": 1},
        "optimizer": {"warmup": 1},
    }
    found = describe_run(build(Config, settings), tmp_path)
    parameters = 2 * 100 * 8 + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8
    assert f"student a: {parameters:,} parameters" in found
    assert "steps: 10 of 4 × 16 tokens" in found
    assert "tokens: 640, " in found
    flops = 640 * 6 * (4 * 8 * 8 + 3 * 8 * 16 + 8 * 17 + 100 * 8)
    assert f"FLOPs: {flops:.3g}, the teachers' part 0" in found
    rows = [line.split() for line in found.splitlines() if re.match(r" +[124] ", line)]
    assert [row[:2] for row in rows] == [["1", "1"], ["2", "1"], ["4", "1"]], "8 ranks do not divide 4 sequences"


@pytest.mark.parametrize(
    ("overrides", "window", "live_windows", "pays_from"),
    [
        ([], 16, 200, 2),
        (["teachers.context=stream"], 32, 200, 2),  # A live teacher reads one window for a fixed sequence of 16 tokens,
        (["teachers.context=stream", "train.chunks=random"], 32, 400, 1),  # and two for one that begins anywhere.
        (["teachers.context=stream", "teachers.window=8"], 8, 800, 2),
    ],
)
def test_a_cache_by_hand(
    overrides: list[str], window: int, live_windows: int, pays_from: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(dry_run, "training_tokens", lambda data: (400, True))
    monkeypatch.setattr(dry_run, "peak_flops", lambda device, dtype: 1e6)
    student = {"name": "a", "layers": 1, "hidden": 8, "heads": 2, "ffn": 16, "tied": False, "max_length": 64}
    teacher = {"students": [{**student, "hidden": 16}], "run": {"name": "by-hand"}}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    settings = {
        "students": [student],
        "teachers": [{"path": "runs/by-hand"}],
        "cache": {"path": "cache"},
        "data": {"tokenizer": {"vocab_size": 100}},
        "train": {"steps": 50, "batch": 4, "length": 16},
        "optimizer": {"warmup": 1},
    }
    said = describe_run(build(Config, settings, overrides), tmp_path)
    assert f"cache: {400 * 64 / 2**30:.2f} GiB, 64 bytes a token of text" in said
    weights, pairs = 4 * 16 * 16 + 3 * 16 * 16, window * (window + 1) // 2
    body = 2 * window * weights + 4 * pairs * 16
    kept = window if overrides == [] else window // 2
    filling, heads, live = 400 // kept * body, 3200 * 2 * 16 * 100, live_windows * body
    assert f"{filling:.3g} FLOPs to fill it" in said
    student_flops = 3200 * 6 * (4 * 8 * 8 + 3 * 8 * 16 + 8 * 17 + 100 * 8)
    saved, whole = live - filling, student_flops + live + heads
    assert f"it saves {saved:.3g} of {whole:.3g} FLOPs, {saved / 3.6e9:,.1f} hours at this device's 1e+06" in said
    assert said.count(f"it pays from epoch {pays_from} on") == 1
    less = describe_run(build(Config, settings, [*overrides, "cache.dtype=int8"]), tmp_path)
    assert "20 bytes a token of text" in less


def test_one_teacher_may_teach_in_two_ways() -> None:
    path = RECIPES / "distill.yaml"
    twice = ["teachers=[{path: runs/teacher}, {path: runs/teacher, context: stream}]", "cache.path=x"]
    fixed = ["train.chunks=fixed", "objective.mix=each"]
    said = describe_run(build(Config, read_yaml(path), [*twice, *fixed]), path.parent)
    assert said.count("teacher runs/teacher (number") == 2


def test_memory_falls_with_ranks_and_no_gpt2_is_allocated() -> None:
    path = RECIPES / "baby_llama" / "gpt2-705m-original.yaml"
    before = torch.random.get_rng_state()
    found = describe_run(build(Config, read_yaml(path), ["train.micro_batch=1"]), path.parent)
    table = [[float(x) for x in line.split()[3:]] for line in found.splitlines() if re.match(r" +[1248] ", line)]
    assert all(column == sorted(column, reverse=True) for column in map(list, zip(*table, strict=True)))
    weights = 704_732_160 * (2 + 2 + 12) / 2**30
    assert weights < table[0][0] < 1.3 * weights, "bf16 weights and gradients, fp32 weights and moments"
    eight_ranks = 704_732_160 * (2 + 2 + 12 / 8) / 2**30
    assert eight_ranks < table[3][0] < 1.3 * eight_ranks
    assert torch.equal(before, torch.random.get_rng_state()), "nothing was drawn"


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_is_what_a_step_takes(world_size: int, tmp_path: Path, spawn_ranks: Callable[..., None]) -> None:
    """Two students of 1.2M parameters, or of many layers; what an allocator and gloo take beside is not in it."""
    spawn_ranks(Path(__file__).with_name("memory_worker.py"), world_size, tmp_path)
    findings = json.loads((tmp_path / f"findings-{world_size}.json").read_text())
    assert len(findings) == 10
    for case, bytes_ in findings.items():
        assert bytes_["said"] == pytest.approx(bytes_["found"], rel=0.12), case


def test_the_loss_takes_what_the_kernels_allow_it() -> None:
    assert LOGITS == {"cpu": native.BUDGET, "cuda": triton.CHUNK_BYTES}


def test_a_teacher_that_nobody_makes_is_named(tmp_path: Path) -> None:
    path = RECIPES / "distill.yaml"
    with pytest.raises(UserError, match=r"teachers: runs/nobody: no such folder, and no recipe in .* makes it"):
        describe_run(build(Config, read_yaml(path), ["teachers.0.path=runs/nobody"]), path.parent)
