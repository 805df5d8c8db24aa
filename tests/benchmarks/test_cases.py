"""Grids of configurations, and the text and models that they are given."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import cases
from benchmarks.cases import Case
from engine.data.prepare import prepare
from engine.models.huggingface import import_weights
from engine.run.check_settings import check
from engine.system.errors import UserError


def grid(folder: Path, *axes: str, tasks: tuple[str, ...] = ("plain",)) -> list[Case]:
    shapes = {"shapes": ["1x32x2x40", "1x16x2x24"], "teacher_shapes": ["1x48x4x64"]}
    return list(cases.grid(folder, tasks, [], [], [61, 70], ["auto", "native"], ["train.length=16", *axes], **shapes))


def test_a_grid_has_every_combination_and_each_is_a_run_of_its_own(tmp_path: Path):
    grid_cases = grid(tmp_path, "train.batch=4,8", tasks=("distil", "mutual"))
    seen = {(c.task, c.vocab_size, c.backend, c.config.train.batch) for c in grid_cases}
    assert len(grid_cases) == len(seen) == 2 * 2 * 2 * 2
    assert len({c.config.run.name for c in grid_cases}) == len(grid_cases)
    assert {(c.task, len(c.config.students), len(c.config.teachers)) for c in grid_cases} == {
        ("distil", 1, 2),
        ("mutual", 3, 0),
    }
    for case in grid_cases:
        check(case.config)
    models = {student.init for c in grid_cases for student in c.config.students}
    assert len(models) == 3 * 2, "one of each seed and vocabulary, whatever the task"


def test_text_and_models_are_what_the_engine_reads(tmp_path: Path):
    *_, case = grid(tmp_path, "students.0.tied=false")
    prepared = prepare(case.config.data, log=lambda _: None)
    assert prepared.tokenizer.vocab_size == case.vocab_size == 70
    tokens = np.fromfile(prepared.train, np.uint16)
    assert len(tokens) == cases.SEQUENCES * 16 + 1
    counts = np.bincount(tokens, minlength=70)
    assert (counts[: len(cases.SPECIAL)] == 0).all()
    assert counts.max() > 10 * np.median(counts[len(cases.SPECIAL) :]), "a few are frequent"
    (student,) = case.config.students
    weights = import_weights(student, case.student_shapes[0], prepared.tokenizer)
    assert {"weight/embed_tokens.weight", "weight/lm_head.weight"} <= weights.keys(), "untied, as the setting says"


@pytest.mark.parametrize(
    ("axis", "message"),
    [("train.batch", "key=value"), ("train.bach=4", "did you mean 'batch'"), ("train.batch=x", "x")],
)
def test_what_is_no_axis(axis: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        grid(tmp_path, axis)
