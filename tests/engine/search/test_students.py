"""The search for students by their size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from engine.config.loading import build
from engine.config.settings import Config, SearchConfig
from engine.models.families import new_model
from engine.models.llama import LlamaShape
from engine.search.students import METHODS, Space, search, target
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
    for candidate in Space(NANO).candidates():
        shape = Space(NANO).shape(candidate)
        assert isinstance(shape, LlamaShape)
        assert shape.layers == candidate.layers
        with torch.device("meta"):
            sizes[candidate] = sum(p.numel() for p in new_model(shape).parameters())
    assert len(sizes) == 4 * 3 + 4, "only 96 is divisible by 3 heads"
    for number, student in enumerate(students, start=1):
        assert student == min(sizes, key=lambda s: abs(sizes[s] - 2_000_000 / (number + 1)))


def test_the_papers_method_stays_in_the_space_and_repeats_itself(tmp_path: Path) -> None:
    config = replace(NANO, method="bayesian", students=1, output=str(tmp_path / "students.yaml"))
    (student,), again = search(config), METHODS["bayesian"](Space(config), 1)
    assert student == again.student
    assert len(again.scores) == 5 + 4
    assert student in set(Space(config).candidates())
    assert max(again.scores) == -abs(Space(config).size(student) - target(config, 1))


def test_its_output_is_a_runs_settings(tmp_path: Path) -> None:
    students = search(replace(NANO, output=str(tmp_path / "students.yaml")))
    config = build(Config, yaml.safe_load((tmp_path / "students.yaml").read_text()))
    assert [(s.layers, s.hidden, s.heads) for s in config.students] == [(s.layers, s.hidden, s.heads) for s in students]
    assert [s.seed for s in config.students] == [1, 2]


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(UserError, match="hidden=50 is divisible by none of"):
        Space(replace(NANO, hidden=(50,)))
