import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine import search as module
from engine.config import Config, build
from engine.flops import training_a_token
from engine.models.families import model_of
from engine.models.llama import LlamaShape
from engine.search import Candidate, ProxyConfig, SearchConfig, ShortRun, Space, proxy, random_cohort, search, target

PAPER = SearchConfig()
NANO = SearchConfig(
    students=2,
    replaced=2_000_000,
    family="llama",
    layers=(1, 2, 3, 5),
    hidden=(32, 64, 96),
    heads=(4, 3),
    ffn=128,
    positions=32,
    vocabulary=500,
    initial=5,
    evaluations=4,
)


def test_the_papers_targets_give_the_papers_students(tmp_path: Path) -> None:
    found = search(replace(PAPER, output=str(tmp_path / "found" / "students.yaml")))
    assert [(s.layers, s.hidden) for s in found] == [(8, 512), (16, 256), (8, 256), (6, 256)]
    assert (tmp_path / "found" / "students.svg").read_text().startswith("<?xml")


def test_exhaustive_equals_brute_force(tmp_path: Path) -> None:
    found = search(replace(NANO, output=str(tmp_path / "students.yaml")))
    sizes = {}
    for candidate in Space(NANO).all():
        shape = Space(NANO).shape(candidate)
        assert isinstance(shape, LlamaShape)
        assert shape.layers == candidate.layers
        with torch.device("meta"):
            sizes[candidate] = sum(p.numel() for p in model_of(shape).parameters())
    assert len(sizes) == 4 * 3 + 4, "only 96 is divisible by 3 heads"
    for number, student in enumerate(found, start=1):
        assert student == min(sizes, key=lambda s: abs(sizes[s] - 2_000_000 / (number + 1)))


@pytest.mark.parametrize("method", ["bayesian", "random"])
def test_other_ways_stay_in_the_space_and_repeat_themselves(tmp_path: Path, method: Any) -> None:
    config = replace(NANO, method=method, students=1, output=str(tmp_path / "students.yaml"))
    found, other = search(config), module.BY_SIZE[method](Space(config), 1)
    assert found == other.students
    assert len(other.scores) == 5 + 4
    assert found[0] in set(Space(config).all())
    assert max(other.scores) == -abs(Space(config).size(found[0]) - target(config, 1))


def test_its_output_is_a_runs_settings(tmp_path: Path) -> None:
    found = search(replace(NANO, output=str(tmp_path / "students.yaml")))
    config = build(Config, yaml.safe_load((tmp_path / "students.yaml").read_text()))
    assert [(s.layers, s.hidden, s.heads) for s in config.students] == [(s.layers, s.hidden, s.heads) for s in found]
    assert [s.seed for s in config.students] == [1, 2]


def depth(cohort: Sequence[Candidate], report: Callable[[int, float], None]) -> float:
    """Likes few layers in the first student and many in the second; says so at once."""
    value = cohort[0].layers - cohort[1].layers + cohort[0].hidden / 1000
    for rung in range(3):
        report(rung, value)
    return value


def test_proxy_search_finds_the_best_cohort_and_prunes_poor_ones(tmp_path: Path) -> None:
    found = proxy(Space(NANO), depth, tmp_path / "trials", trials=40, seed=0)
    assert (found.students[0].layers, found.students[1].layers) == (1, 5)
    assert len(found.scores) == 40
    assert 5 < sum(map(math.isnan, found.scores)) < 35


def test_a_proxy_search_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    seen: list[tuple[Candidate, ...]] = []

    def remembered(cohort: Sequence[Candidate], report: Callable[[int, float], None]) -> float:
        seen.append(tuple(cohort))
        return depth(cohort, report)

    whole = proxy(Space(NANO), remembered, tmp_path / "whole", trials=14, seed=3)
    uninterrupted, seen[:] = list(seen), []

    def interrupted(cohort: Sequence[Candidate], report: Callable[[int, float], None]) -> float:
        if len(seen) == 9:
            raise KeyboardInterrupt
        return remembered(cohort, report)

    with pytest.raises(KeyboardInterrupt):
        proxy(Space(NANO), interrupted, tmp_path / "parts", trials=14, seed=3)
    parts = proxy(Space(NANO), remembered, tmp_path / "parts", trials=14, seed=3)
    assert seen == uninterrupted
    assert parts.students == whole.students


@pytest.mark.parametrize("like", [(Candidate(2, 64, 4), Candidate(3, 32, 4)), (Candidate(2, 32, 4),) * 3])
def test_a_random_control_has_the_size_of_what_it_is_compared_with(like: tuple[Candidate, ...]) -> None:
    space = Space(replace(NANO, hidden=(32, 48, 64, 80, 96), layers=(1, 2, 3, 4, 5, 6, 7)))
    controls = [random_cohort(space, like, seed=seed) for seed in (1, 2)]
    size = sum(map(space.size, like))
    for control in controls:
        assert len(control) == len(like)
        assert sum(map(space.size, control)) == pytest.approx(size, rel=0.05)
    assert controls[0] != controls[1]


RECIPE = """
import json, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
folder = __import__("pathlib").Path(config["run"]["folder"], config["run"]["name"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("w", buffering=1) as file:
    for loss in (3.0, 2.5, 2.25):
        file.write(json.dumps({"kind": "step"}) + "\\n")
        file.write(json.dumps({"kind": "evaluation", "ensemble": {"validation_loss": loss}}) + "\\n")
        time.sleep(WAIT)
"""


def short_run(folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> ShortRun:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mutual.py").write_text(recipe)
    (folder / "base.yaml").write_text("train: {batch: 4, length: 8}\nstudents: [{learning_rate: 0.5}]\n")
    monkeypatch.setattr(module, "ROOT", folder)
    settings = ProxyConfig(config=str(folder / "base.yaml"), folder=str(folder / "runs"), flops=1e10)
    return ShortRun(Space(replace(NANO, proxy=settings)))


def test_a_short_run_spends_its_flops_and_is_scored_by_its_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reported = short_run(tmp_path, monkeypatch, RECIPE.replace("WAIT", "0")), []
    cohort = [Candidate(2, 64, 4), Candidate(5, 96, 3)]
    assert run(cohort, lambda rung, loss: reported.append((rung, loss))) == 2.25
    assert reported == [(0, 3.0), (1, 2.5), (2, 2.25)]
    settings = yaml.safe_load(next((tmp_path / "runs").glob("*/config.yaml")).read_text())
    config = build(Config, settings)
    assert [s.learning_rate for s in config.students] == [0.5, 0.5]
    spent = config.train.steps * 32 * sum(training_a_token(run.space.shape(s), 8) for s in cohort)
    assert spent == pytest.approx(1e10, rel=0.05)


def test_a_pruned_run_is_ended_and_a_failed_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pruned(Exception):
        pass

    def prune(rung: int, loss: float) -> None:
        raise Pruned

    cohort = [Candidate(2, 64, 4), Candidate(5, 96, 3)]
    run = short_run(tmp_path, monkeypatch, RECIPE.replace("WAIT", "60"))
    with pytest.raises(Pruned):
        run(cohort, prune)
    (tmp_path / "recipes" / "mutual.py").write_text("raise SystemExit(2)")
    with pytest.raises(ValueError, match=r"output.txt: the run failed, exit code 2"):
        run(cohort[:1] * 2, prune)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden=50 is divisible by none of"):
        Space(replace(NANO, hidden=(50,)))
    with pytest.raises(ValueError, match="students=1: a proxy run is scored by its ensemble"):
        ShortRun(Space(replace(NANO, students=1)))
