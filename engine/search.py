"""Finding the students that learn together.

When Babies Teach Babies (Iyer 2024) seeks student i (from 1) by its size alone: the shape nearest N/(i+1) parameters, N
those of a model to replace. Three ways to that: all shapes of the space (it is small), Bayesian optimisation as in the
paper, random draws. The fourth, `proxy`, scores whole cohorts by what they are for: the held-out loss of their ensemble
after a short run, every run of as many FLOPs as any other, so that a cohort is not better for being larger.
"""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import yaml

from engine.command import library
from engine.config import Count, Natural, Positive, StudentConfig, read_yaml
from engine.flops import training_a_token
from engine.models.families import Shape, parameter_count, shape_of

_STRICT = pydantic.ConfigDict(extra="forbid")
ROOT = Path(__file__).parents[1]
INVALID = -1e6  # the paper's score of a shape whose heads do not divide it


@dataclass(frozen=True)
class ProxyConfig:
    """Short runs of recipes/mutual.py. They need room for `trials` small runs in `folder`."""

    __pydantic_config__ = _STRICT
    config: str = "recipes/mutual.yaml"  # data, objective and optimizer; its students give way, all but learning rates
    flops: Positive = 1e13  # of a whole run, over all its students
    trials: Count = 30
    rungs: Count = 4  # evaluations in a run, at which it may be pruned
    folder: str = "runs/search"  # of the runs, and of what is known of them: a search goes on from there


@dataclass(frozen=True)
class SearchConfig:
    """What is sought, where, and how."""

    __pydantic_config__ = _STRICT
    method: Literal["exhaustive", "bayesian", "random", "proxy"] = "exhaustive"
    students: Count = 4
    replaced: Count = 124_697_433  # N, parameters: RoBERTa-base
    family: Literal["roberta", "llama", "gpt2"] = "roberta"
    layers: tuple[Count, ...] = (6, 8, 12, 16, 20)
    hidden: tuple[Count, ...] = (256, 512, 768, 1024, 2048)
    heads: tuple[Count, ...] = (8, 16, 32)
    ffn: Count = 3072
    positions: Count = 512
    vocabulary: Count = 50_265
    initial: Count = 30  # bayesian: random evaluations first; random: draws as many as both together
    evaluations: Count = 70  # bayesian: then so many guided ones
    seed: Natural = 0  # student i draws from seed + i − 1
    proxy: ProxyConfig = ProxyConfig()
    output: str = "students.yaml"  # beside it: a plot of the same name


@dataclass(frozen=True)
class Candidate:
    """A shape of the search space."""

    layers: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class Found:
    """A search's end for one student, or for a whole cohort."""

    students: tuple[Candidate, ...]
    scores: list[float]  # of every evaluation in turn, higher is better; NaN: pruned


Score = Callable[[Sequence[Candidate], Callable[[int, float], None]], float]  # of a cohort, and a call for each rung


class Space:
    """All shapes that a search may propose."""

    def __init__(self, config: SearchConfig) -> None:
        """Raises ValueError where no number of heads divides some width."""
        self.config = config
        for hidden in config.hidden:
            if all(hidden % heads for heads in config.heads):
                raise ValueError(f"hidden={hidden} is divisible by none of heads={list(config.heads)}: add a divisor")

    def all(self) -> Iterator[Candidate]:
        axes = itertools.product(self.config.layers, self.config.hidden, self.config.heads)
        return (Candidate(*shape) for shape in axes if shape[1] % shape[2] == 0)

    def student(self, candidate: Candidate, number: int) -> StudentConfig:
        return StudentConfig(
            name=f"student-{number}",
            family=self.config.family,
            ffn=self.config.ffn,
            positions=self.config.positions,
            seed=number,
            **vars(candidate),
        )

    def shape(self, candidate: Candidate) -> Shape:
        return shape_of(self.student(candidate, 1), self.config.vocabulary)

    @cache  # noqa: B019
    def size(self, candidate: Candidate) -> int:
        """Parameters. All layers have the same number, so models of one and two layers tell."""
        one, two = (parameter_count(self.shape(replace(candidate, layers=layers))) for layers in (1, 2))
        return one + (candidate.layers - 1) * (two - one)


def target(config: SearchConfig, number: int) -> float:
    """The parameters that student `number`, from 1, should have."""
    return config.replaced / (number + 1)


def exhaustive(space: Space, number: int) -> Found:
    """Of shapes equally near the target, the first in the order of the settings."""
    goal, shapes = target(space.config, number), list(space.all())
    scores = [-abs(space.size(shape) - goal) for shape in shapes]
    return Found((shapes[int(np.argmax(scores))],), scores)


def random(space: Space, number: int) -> Found:
    goal, shapes = target(space.config, number), list(space.all())
    draws = np.random.default_rng(space.config.seed + number - 1)
    drawn = draws.integers(len(shapes), size=space.config.initial + space.config.evaluations)
    scores = [-abs(space.size(shapes[i]) - goal) for i in drawn]
    return Found((shapes[drawn[int(np.argmax(scores))]],), scores)


def bayesian(space: Space, number: int) -> Found:
    """The paper's, but that every option is as wide as any other: floored indices up to the last left it one point."""
    config, goal = space.config, target(space.config, number)
    axes = {name: getattr(config, name) for name in ("layers", "hidden", "heads")}
    tried: list[tuple[float, Candidate]] = []

    def score(**places: float) -> float:
        shape = Candidate(**{n: options[min(int(places[n]), len(options) - 1)] for n, options in axes.items()})
        found = INVALID if shape.hidden % shape.heads else -abs(space.size(shape) - goal)
        tried.append((found, shape))
        return found

    optimizer = library("bayes_opt").BayesianOptimization(
        score,
        {name: (0, len(options)) for name, options in axes.items()},
        random_state=config.seed + number - 1,
        verbose=0,
        allow_duplicate_points=True,
    )
    optimizer.maximize(init_points=config.initial, n_iter=config.evaluations)
    scores = [found for found, _ in tried]
    return Found((tried[int(np.argmax(scores))][1],), scores)


def proxy(space: Space, score: Score, journal: Path, *, trials: int, seed: int) -> Found:
    """The cohort with the lowest `score`, over `trials` in all, those that `journal` knows among them.

    A trial that was interrupted is tried again, as the same cohort: trial t draws from seed and t.
    """
    optuna, states = library("optuna"), library("optuna").trial.TrialState
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="students",
        storage=optuna.storages.JournalStorage(library("optuna.storages.journal").JournalFileBackend(str(journal))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
    while (done := len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + done, n_startup_trials=8)
        trial = study.ask()
        cohort = _proposed(space, trial.suggest_int)

        def report(rung: int, value: float, trial: Any = trial) -> None:
            trial.report(value, rung)
            if trial.should_prune():
                raise optuna.TrialPruned

        trial.set_user_attr("students", [vars(student) for student in cohort])
        try:
            study.tell(trial, score(cohort, report))
        except optuna.TrialPruned:
            study.tell(trial, state=states.PRUNED)
    ended = study.get_trials(states=(states.COMPLETE, states.PRUNED))
    best = tuple(Candidate(**student) for student in study.best_trial.user_attrs["students"])
    return Found(best, [math.nan if t.state == states.PRUNED or t.value is None else -t.value for t in ended])


def random_cohort(space: Space, like: Sequence[Candidate], seed: int) -> tuple[Candidate, ...]:
    """A control for `like`: as many random students, together nearest it in parameters, of 200 draws; of 20,000 more
    where that is more than 5% off, as it is at the ends of the space."""
    draws, shapes = np.random.default_rng(seed), list(space.all())
    goal = sum(map(space.size, like))

    def drawn(count: int) -> list[tuple[Candidate, ...]]:
        return [tuple(shapes[i] for i in draws.integers(len(shapes), size=len(like))) for _ in range(count)]

    def off(cohort: Sequence[Candidate]) -> int:
        return abs(sum(map(space.size, cohort)) - goal)

    found = min(drawn(200), key=off)
    return found if off(found) <= 0.05 * goal else min([found, *drawn(20_000)], key=off)


def _proposed(space: Space, suggest: Callable[[str, int, int], int]) -> list[Candidate]:
    config, cohort = space.config, []
    for number in range(1, config.students + 1):
        layers = config.layers[suggest(f"layers-{number}", 0, len(config.layers) - 1)]
        hidden = config.hidden[suggest(f"hidden-{number}", 0, len(config.hidden) - 1)]
        dividing = [heads for heads in config.heads if hidden % heads == 0]
        heads = dividing[suggest(f"heads-{number}", 0, len(config.heads) - 1) % len(dividing)]
        cohort.append(Candidate(layers, hidden, heads))
    return cohort


class ShortRun:
    """Scores a cohort by a run of recipes/mutual.py: the held-out loss of its ensemble when the FLOPs are spent."""

    def __init__(self, space: Space) -> None:
        """Raises ValueError where the settings leave no ensemble, or are not a run's."""
        self.space, self.config = space, space.config.proxy
        if space.config.students < 2:
            raise ValueError("students=1: a proxy run is scored by its ensemble; search for two students or more")
        self.settings = read_yaml(Path(self.config.config))
        train = self.settings.get("train", {})
        if "batch" not in train or "length" not in train:
            raise ValueError(f"{self.config.config}: proxy runs need train.batch and train.length; give them")
        self.batch, self.length = train["batch"], train["length"]
        rates = [student.get("learning_rate", 1e-3) for student in self.settings.get("students", [])] or [1e-3]
        self.learning_rate = rates[0]

    def steps(self, cohort: Sequence[Candidate]) -> int:
        """How many the FLOPs pay for."""
        a_token = sum(training_a_token(self.space.shape(student), self.length) for student in cohort)
        return max(self.config.rungs, int(self.config.flops / (a_token * self.batch * self.length)))

    def __call__(self, cohort: Sequence[Candidate], report: Callable[[int, float], None]) -> float:
        steps = self.steps(cohort)
        folder = Path(self.config.folder) / "-".join(f"{s.layers}x{s.hidden}h{s.heads}" for s in cohort)
        folder.mkdir(parents=True, exist_ok=True)
        changed = {
            "students": students_yaml(self.space, cohort, learning_rate=self.learning_rate)["students"],
            "run": {"name": "run", "folder": str(folder)},
            "train": {**self.settings["train"], "steps": steps},
            "optimizer": {**self.settings.get("optimizer", {}), "warmup": steps // 10},
            "evaluation": {**self.settings.get("evaluation", {}), "every": -(-steps // self.config.rungs)},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(self.settings | changed))
        command = [sys.executable, str(ROOT / "recipes" / "mutual.py"), "--config", str(folder / "config.yaml")]
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            losses: list[float] = []
            while True:
                ended = process.poll() is not None
                now = list(_ensemble_losses(folder / "run" / "metrics.jsonl"))
                for rung in range(len(losses), len(now)):
                    report(rung, now[rung])
                losses = now
                if ended:
                    break
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        if process.returncode or not losses:
            raise ValueError(f"{folder / 'output.txt'}: the run failed, exit code {process.returncode}; see there")
        return losses[-1]


def _ensemble_losses(metrics: Path) -> Iterator[float]:
    """Nats per token, of every evaluation whose line is whole."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    for record in map(json.loads, lines):
        if record["kind"] == "evaluation":
            yield record["ensemble"]["validation_loss"]


def students_yaml(space: Space, cohort: Sequence[Candidate], learning_rate: float = 1e-3) -> dict[str, Any]:
    """Settings of a run, as far as its students are concerned."""
    common = {"family": space.config.family, "ffn": space.config.ffn, "positions": space.config.positions}
    return {
        "students": [
            {"name": f"student-{i}", **vars(student), **common, "learning_rate": learning_rate, "seed": i}
            for i, student in enumerate(cohort, start=1)
        ]
    }


BY_SIZE = {"exhaustive": exhaustive, "bayesian": bayesian, "random": random}


def search(config: SearchConfig) -> tuple[Candidate, ...]:
    """The students found; also written to `config.output`, with a plot beside it."""
    space, output = Space(config), Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if config.method == "proxy":
        journal = Path(config.proxy.folder) / "trials.journal"
        found = [proxy(space, ShortRun(space), journal, trials=config.proxy.trials, seed=config.seed)]
    else:
        found = [BY_SIZE[config.method](space, number) for number in range(1, config.students + 1)]
    cohort = tuple(student for one in found for student in one.students)
    comment = f"# recipes/search.py, method {config.method}\n"
    for number, student in enumerate(cohort, start=1):
        comment += f"# student-{number}: {space.size(student):,} parameters, sought {target(config, number):,.0f}\n"
    output.write_text(comment + yaml.safe_dump(students_yaml(space, cohort), sort_keys=False))
    plot(found, config, output.with_suffix(".svg"))
    return cohort


def plot(found: Sequence[Found], config: SearchConfig, path: Path) -> None:
    """Every evaluation, and the best so far: distance from the target size, or the ensemble's held-out loss."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    by_size = config.method != "proxy"
    for number, one in enumerate(found, start=1):
        scores = np.array(one.scores)
        values = np.where(scores > INVALID, -scores, np.nan) / 1e6 if by_size else -scores
        turns, colour = np.arange(1, len(values) + 1), f"C{number - 1}"
        axes.plot(turns, values, ".", color=colour, alpha=0.3)
        axes.plot(turns, np.fmin.accumulate(values), color=colour, label=f"student {number}" if by_size else "best")
    axes.set(xlabel="evaluation", ylabel="parameters off target, millions" if by_size else "ensemble, nats per token")
    if by_size:
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
