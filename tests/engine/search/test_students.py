"""The search for students by their size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from engine.config.loading import build
from engine.config.settings import Config, SearchConfig
from engine.models.families import new_model, shape_of
from engine.search.students import METHODS, search, size, target
from engine.system.errors import UserError

PAPER = SearchConfig()
NANO = SearchConfig(
    students=2,
    replaced_parameters=2_000_000,
    family="llama",
    layers=(1, 2, 3, 5),
    hidden=(32, 64, 96),
    heads=(4, 3),
    ffn=128,
    max_length=32,
    vocab_size=500,
    initial=5,
    evaluations=4,
)


def test_the_papers_targets_give_the_papers_students(tmp_path: Path) -> None:
    students = search(replace(PAPER, output=str(tmp_path / "found" / "students.yaml")))
    assert [(s.layers, s.hidden) for s in students] == [(8, 512), (16, 256), (8, 256), (6, 256)]
    assert (tmp_path / "found" / "students.svg").read_text().startswith("<?xml")


def test_exhaustive_equals_brute_force(tmp_path: Path) -> None:
    students = search(replace(NANO, output=str(tmp_path / "students.yaml")))
    sizes = {}
    for _, student in METHODS["exhaustive"](NANO, 1):
        shape = shape_of(student, NANO.vocab_size)
        assert (shape.family, shape.layers) == ("llama", student.layers)
        with torch.device("meta"):
            sizes[student.layers, student.hidden, student.heads] = sum(p.numel() for p in new_model(shape).parameters())
    assert len(sizes) == 4 * 3 + 4, "only 96 is divisible by 3 heads"
    for number, student in enumerate(students, start=1):
        assert (student.layers, student.hidden, student.heads) == min(
            sizes, key=lambda s: abs(sizes[s] - 2_000_000 / (number + 1))
        )


def test_the_papers_method_stays_in_the_space_and_repeats_itself(tmp_path: Path) -> None:
    config = replace(NANO, method="bayesian", students=1, output=str(tmp_path / "students.yaml"))
    (student,), again = search(config), METHODS["bayesian"](config, 1)
    scores = [score for score, _ in again]
    assert student == again[scores.index(max(scores))][1]
    assert len(again) == 5 + 4
    assert student in {candidate for _, candidate in METHODS["exhaustive"](config, 1)}
    assert max(scores) == -abs(size(config, student) - target(config, 1))


def test_its_output_is_a_runs_settings(tmp_path: Path) -> None:
    students = search(replace(NANO, output=str(tmp_path / "students.yaml")))
    config = build(Config, yaml.safe_load((tmp_path / "students.yaml").read_text()))
    assert [(s.layers, s.hidden, s.heads) for s in config.students] == [(s.layers, s.hidden, s.heads) for s in students]
    assert [s.seed for s in config.students] == [1, 2]


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden=50 is divisible by none of"):
        search(replace(NANO, hidden=(50,), output=str(tmp_path / "students.yaml")))
    assert not list(tmp_path.iterdir())
