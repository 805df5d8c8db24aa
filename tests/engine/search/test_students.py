import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna import TrialPruned

from engine.compute.flops import training_per_token
from engine.config.loading import build
from engine.config.settings import Config
from engine.models.families import new_model, shape_of
from engine.models.llama import LlamaShape
from engine.search import students as module
from engine.search.students import Candidate, Found, ProxyConfig, SearchConfig, ShortRun, Space, proxy, search, target

PAPER = SearchConfig()
NANO = SearchConfig(
    students=2,
    replaced=2_000_000,
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
            sizes[candidate] = sum(p.numel() for p in new_model(shape).parameters())
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


def depth(cohort: Sequence[Candidate], trial: Any) -> float:
    """Likes few layers in the first student and many in the second; says so at once."""
    value = cohort[0].layers - cohort[1].layers + cohort[0].hidden / 1000
    for rung in range(3):
        trial.report(value, rung)
        if trial.should_prune():
            raise TrialPruned
    return value


def test_proxy_search_finds_the_best_cohort_and_prunes_poor_ones(tmp_path: Path) -> None:
    found = proxy(Space(NANO), depth, tmp_path / "trials", trials=40, seed=0)
    assert (found.students[0].layers, found.students[1].layers) == (1, 5)
    assert len(found.scores) == 40
    assert 5 < sum(map(math.isnan, found.scores)) < 35


def test_a_proxy_search_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    seen: list[tuple[Candidate, ...]] = []

    def remembered(cohort: Sequence[Candidate], trial: Any) -> float:
        seen.append(tuple(cohort))
        return depth(cohort, trial)

    whole = proxy(Space(NANO), remembered, tmp_path / "whole", trials=14, seed=3)
    uninterrupted, seen[:] = list(seen), []

    def interrupted(cohort: Sequence[Candidate], trial: Any) -> float:
        if len(seen) == 9:
            raise KeyboardInterrupt
        return remembered(cohort, trial)

    with pytest.raises(KeyboardInterrupt):
        proxy(Space(NANO), interrupted, tmp_path / "parts", trials=14, seed=3)
    parts = proxy(Space(NANO), remembered, tmp_path / "parts", trials=14, seed=3)
    assert seen == uninterrupted
    assert parts.students == whole.students


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": (8, 9)}, "layers"),
        ({"ffn": 64, "family": "gpt2"}, "family, ffn"),
        ({"proxy": ProxyConfig(flops=2e13, rungs=3)}, "proxy.flops, proxy.rungs"),
    ],
)
def test_a_journal_of_another_search_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    def asked(config: SearchConfig, trials: int = 2, batch: int = 4) -> Found:
        base = {"base.train": {"batch": batch}}
        return proxy(Space(config), depth, tmp_path / "trials", trials=trials, seed=0, base=base)

    asked(NANO)
    with pytest.raises(ValueError, match=rf"trials: made with other settings \({named}\); choose another folder"):
        asked(replace(NANO, **changes))
    with pytest.raises(ValueError, match=r"other settings \(base.train\)"):
        asked(NANO, batch=8)
    more = replace(NANO, output="elsewhere.yaml", proxy=ProxyConfig(trials=3, folder="elsewhere"))
    assert len(asked(more, trials=3).scores) == 3


def test_a_search_that_finds_nothing_says_so(tmp_path: Path) -> None:
    def diverging(cohort: Sequence[Candidate], trial: Any) -> float:
        raise TrialPruned

    with pytest.raises(ValueError, match="the loss of every run was not finite; lower their learning rates"):
        proxy(Space(NANO), diverging, tmp_path / "trials", trials=2, seed=0)


RECIPE = """
import json, sys, yaml
config = yaml.safe_load(open(sys.argv[2]))
folder = __import__("pathlib").Path(config["run"]["folder"], config["run"]["name"])
with (folder / "metrics.jsonl").open("w") as file:
    for loss in (3.0, 2.5, 2.25):
        file.write(json.dumps({"kind": "step"}) + "\\n")
        file.write(json.dumps({"kind": "evaluation", "ensemble": {"validation_loss": loss}}) + "\\n")
"""
COHORT = [Candidate(2, 64, 4), Candidate(5, 96, 3)]


@pytest.fixture
def short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShortRun:
    """Of runs that only say that they train, on text of 400 pieces, where the space has 50,265."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mutual.py").write_text(RECIPE)
    data = {"words": 3000, "folder": str(tmp_path / "prepared"), "tokenizer": {"vocab_size": 400}}
    train, students = {"batch": 4, "length": 8, "epochs": 3}, [{"learning_rate": 0.5}, {"learning_rate": "25e-2"}]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": data, "train": train, "students": students}))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    budget = ProxyConfig(str(tmp_path / "base.yaml"), flops=1e10, trials=2, folder=str(tmp_path / "runs"))
    return ShortRun(Space(replace(NANO, vocab_size=50_265, proxy=budget)))


@dataclass
class Trial:
    """As much of Optuna's as a run sees."""

    reported: list[tuple[float, int]] = field(default_factory=list)

    def report(self, value: float, step: int) -> None:
        self.reported.append((value, step))

    def should_prune(self) -> bool:
        return False


def test_a_short_run_spends_its_flops_and_is_scored_by_its_ensemble(short_run: ShortRun, tmp_path: Path) -> None:
    trial = Trial()
    assert short_run(COHORT, trial) == 2.25
    assert trial.reported == [(3.0, 1), (2.5, 2), (2.25, 3)]
    settings = yaml.safe_load(next((tmp_path / "runs").glob("*/config.yaml")).read_text())
    config = build(Config, settings)
    assert [s.learning_rate for s in config.students] == [0.5, 0.25]
    assert config.train.epochs is None, "they would win over the steps"
    shapes = [shape_of(student, 400) for student in config.students]
    spent = config.train.steps * 32 * sum(training_per_token(shape, 8) for shape in shapes)
    assert spent == pytest.approx(1e10, rel=0.05)


def test_a_proxy_searchs_output_is_what_its_trials_ran_with(short_run: ShortRun, tmp_path: Path) -> None:
    config = replace(short_run.space.config, method="proxy", output=str(tmp_path / "students.yaml"), vocab_size=50_265)
    found = search(config)
    text = (tmp_path / "students.yaml").read_text()
    assert [s["learning_rate"] for s in yaml.safe_load(text)["students"]] == [0.5, 0.25]
    sizes = [f"# student-{i}: {short_run.space.size(student):,} parameters" for i, student in enumerate(found, start=1)]
    assert text.splitlines()[:3] == ["# recipes/search.py, method proxy", *sizes], "no size was sought"
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | {"objective": {"temperature": 2.0}}))
    with pytest.raises(ValueError, match=r"trials.journal: made with other settings \(base.objective\)"):
        search(config)


def test_a_failed_short_run_is_an_error(short_run: ShortRun, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "mutual.py").write_text("raise SystemExit(2)")
    with pytest.raises(ValueError, match=r"output.txt: the run failed, exit code 2"):
        short_run(COHORT, Trial())


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden=50 is divisible by none of"):
        Space(replace(NANO, hidden=(50,)))
    with pytest.raises(ValueError, match="students=1: a proxy run is scored by its ensemble"):
        ShortRun(Space(replace(NANO, students=1)))
