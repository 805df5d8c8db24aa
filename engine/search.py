"""Finding the students that learn together.

When Babies Teach Babies (Iyer 2024) seeks student i (from 1) by its size alone: the shape nearest N/(i+1) parameters, N
those of a model to replace. Three ways to that: all shapes of the space (it is small), Bayesian optimisation as in the
paper, random draws. The fourth, `proxy`, scores whole cohorts by what they are for: the held-out loss of their ensemble
after a short run, every run of as many FLOPs as any other, so that a cohort is not better for being larger.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import yaml

from engine.command import library
from engine.config import Config, Count, Natural, Positive, StudentConfig, as_dict, build, read_yaml
from engine.corpus.prepare import prepare
from engine.flops import training_a_token
from engine.models.families import Shape, parameter_count, shape_of
from engine.trials import ended, open_study, run_trial, watch_run

_STRICT = pydantic.ConfigDict(extra="forbid")
ROOT = Path(__file__).parents[1]
INVALID = -1e6  # the paper's score of a shape whose heads do not divide it
NO_PART = ("method", "replaced", "initial", "evaluations", "output", "proxy")  # settings that no cohort's score feels


@dataclass(frozen=True)
class ProxyConfig:
    """Short runs of recipes/mutual.py. They need room for `trials` small runs in `folder`."""

    __pydantic_config__ = _STRICT
    config: str = "recipes/mutual.yaml"  # data, objective, optimizer and, in turn, its students' learning rates
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
    vocabulary: Count = 50_265  # proxy: the data's instead
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


Score = Callable[[Sequence[Candidate], Any], float]  # of a cohort; reports to the Optuna trial, and may be pruned


class Space:
    """All shapes that a search may propose."""

    def __init__(self, config: SearchConfig, learning_rates: Sequence[float] = (StudentConfig.learning_rate,)) -> None:
        """Raises ValueError where no number of heads divides some width."""
        self.config, self.learning_rates = config, learning_rates
        for hidden in config.hidden:
            if all(hidden % heads for heads in config.heads):
                raise ValueError(f"hidden={hidden} is divisible by none of heads={list(config.heads)}: add a divisor")

    def all(self) -> Iterator[Candidate]:
        axes = product(self.config.layers, self.config.hidden, self.config.heads)
        return (Candidate(*shape) for shape in axes if shape[1] % shape[2] == 0)

    def students(self, cohort: Sequence[Candidate]) -> list[dict[str, Any]]:
        """Settings of a run's students, which take the learning rates in turn."""
        common = {"family": self.config.family, "ffn": self.config.ffn, "positions": self.config.positions}
        return [
            {"name": f"student-{i}", **vars(student), **common, "learning_rate": rate, "seed": i}
            for i, (student, rate) in enumerate(zip(cohort, cycle(self.learning_rates), strict=False), start=1)
        ]

    def shape(self, candidate: Candidate) -> Shape:
        return shape_of(StudentConfig(**self.students([candidate])[0]), self.config.vocabulary)

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


def proxy(
    space: Space, score: Score, journal: Path, *, trials: int, seed: int, base: Mapping[str, Any] | None = None
) -> Found:
    """The cohort with the lowest `score`, over `trials` in all, those that `journal` knows among them.

    Args:
        base: what a score depends on beside the settings of the space (ShortRun.decisive).

    Raises ValueError where the journal was made with others, or no run came to its end.
    """
    config = as_dict(space.config)
    settings = {key: value for key, value in config.items() if key not in NO_PART} | {"seed": seed, **(base or {})}
    settings |= {f"proxy.{key}": config["proxy"][key] for key in ("flops", "rungs")}
    study = open_study(journal, settings, library("optuna").pruners.MedianPruner(n_startup_trials=4))

    def objective(trial: Any) -> float:
        cohort = _proposed(space, trial.suggest_int)
        trial.set_user_attr("students", [vars(student) for student in cohort])
        return score(cohort, trial)

    while len(ended(study)) < trials:
        run_trial(study, objective, seed)
    scores = [math.nan if trial.state.name == "PRUNED" else -trial.value for trial in ended(study)]
    if all(map(math.isnan, scores)):
        raise ValueError(f"{journal}: the loss of every run was not finite; lower their learning rates")
    return Found(tuple(Candidate(**student) for student in study.best_trial.user_attrs["students"]), scores)


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
        """Prepares the data, whose vocabulary is that of all students, whatever `space` has.

        Raises ValueError where the settings leave no ensemble, or are not a run's.
        """
        config = space.config
        if config.students < 2:
            raise ValueError("students=1: a proxy run is scored by its ensemble; search for two students or more")
        settings = read_yaml(Path(config.proxy.config))
        given = [s["learning_rate"] for s in settings.get("students", ()) if "learning_rate" in s]
        any_students = Space(config, given or space.learning_rates).students([next(space.all())] * config.students)
        base = build(Config, settings | {"students": any_students})
        rates, prepared = [student.learning_rate for student in base.students], prepare(base.data)
        self.space = Space(replace(config, vocabulary=prepared.tokenizer.size), rates)
        self.config, self.base = config.proxy, as_dict(base)
        decisive = self.base | {"run": None, "students": rates, "data": prepared.identity}
        self.decisive = {f"base.{key}": value for key, value in decisive.items()}

    def steps(self, cohort: Sequence[Candidate]) -> int:
        """How many the FLOPs pay for."""
        batch, length = self.base["train"]["batch"], self.base["train"]["length"]
        a_token = sum(training_a_token(self.space.shape(student), length) for student in cohort)
        return max(self.config.rungs, int(self.config.flops / (a_token * batch * length)))

    def __call__(self, cohort: Sequence[Candidate], trial: Any) -> float:
        steps = self.steps(cohort)
        folder = Path(self.config.folder) / "-".join(f"{s.layers}x{s.hidden}h{s.heads}" for s in cohort)
        folder.mkdir(parents=True, exist_ok=True)
        changed = {
            "students": self.space.students(cohort),
            "run": {"name": "run", "folder": str(folder)},
            "train": {**self.base["train"], "steps": steps, "epochs": None},
            "optimizer": {**self.base["optimizer"], "warmup": steps // 10},
            "evaluation": {**self.base["evaluation"], "every": -(-steps // self.config.rungs)},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(self.base | changed))
        recipe = ROOT / "recipes" / "mutual.py"
        return watch_run(trial, [recipe, "--config", folder / "config.yaml"], folder / "run")[-1]


BY_SIZE = {"exhaustive": exhaustive, "bayesian": bayesian, "random": random}


def search(config: SearchConfig) -> tuple[Candidate, ...]:
    """The students found; also written to `config.output`, with a plot beside it."""
    space, output = Space(config), Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    by_size = config.method != "proxy"
    if by_size:
        found = [BY_SIZE[config.method](space, number) for number in range(1, config.students + 1)]
    else:
        score, journal = ShortRun(space), Path(config.proxy.folder) / "trials.journal"
        space = score.space
        found = [proxy(space, score, journal, trials=config.proxy.trials, seed=config.seed, base=score.decisive)]
    cohort = tuple(student for one in found for student in one.students)
    comment = f"# recipes/search.py, method {config.method}\n"
    for number, student in enumerate(cohort, start=1):
        sought = f", sought {target(config, number):,.0f}" if by_size else ""
        comment += f"# student-{number}: {space.size(student):,} parameters{sought}\n"
    output.write_text(comment + yaml.safe_dump({"students": space.students(cohort)}, sort_keys=False))
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
