"""A search for the students that learn together, by their size alone, as in When Babies Teach Babies (Iyer 2024)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from engine.config.settings import SearchConfig, StudentConfig
from engine.models.base import Shape
from engine.models.families import parameter_count, shape_of
from engine.search.trials import require_library
from engine.system.errors import UserError
from engine.system.files import write_text

INVALID = -1e6  # the paper's score of a shape whose heads do not divide its width


@dataclass(frozen=True)
class Candidate:
    """A shape of the search space."""

    layers: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class SearchResult:
    """The best shape, and the scores of all evaluations in turn: minus the distance from the target size."""

    student: Candidate
    scores: list[float]


class Space:
    """All shapes that a search may propose."""

    def __init__(self, config: SearchConfig) -> None:
        """Raises UserError for a width that no number of heads divides."""
        self.config = config
        for hidden in config.hidden:
            if all(hidden % heads for heads in config.heads):
                raise UserError(f"hidden={hidden} is divisible by none of heads={list(config.heads)}: add a divisor")

    def candidates(self) -> Iterator[Candidate]:
        """Yields every shape whose heads divide its width."""
        axes = product(self.config.layers, self.config.hidden, self.config.heads)
        return (Candidate(*shape) for shape in axes if shape[1] % shape[2] == 0)

    def settings(self, candidate: Candidate, number: int) -> dict[str, Any]:
        """Returns the settings of a run's student `number`, from 1."""
        return {
            "name": f"student-{number}",
            **vars(candidate),
            "family": self.config.family,
            "ffn": self.config.ffn,
            "max_length": self.config.max_length,
            "learning_rate": StudentConfig.learning_rate,
            "seed": number,
        }

    def shape(self, candidate: Candidate) -> Shape:
        return shape_of(StudentConfig(**self.settings(candidate, 1)), self.config.vocab_size)

    @cache  # noqa: B019
    def size(self, candidate: Candidate) -> int:
        """Returns the number of parameters, from models of one and two blocks, as all blocks have equally many."""
        one_block, two_blocks = (parameter_count(self.shape(replace(candidate, layers=n))) for n in (1, 2))
        return one_block + (candidate.layers - 1) * (two_blocks - one_block)

    def score(self, candidate: Candidate, number: int) -> float:
        """Returns minus the distance of a shape from the size that student `number` should have."""
        return -abs(self.size(candidate) - target(self.config, number))


def target(config: SearchConfig, number: int) -> float:
    """Returns the number of parameters that student `number`, from 1, should have."""
    return config.replaced_parameters / (number + 1)


def exhaustive(space: Space, number: int) -> SearchResult:
    """Tries every shape. Among shapes equally near to the target it takes the first in the order of the settings."""
    candidates = list(space.candidates())
    scores = [space.score(candidate, number) for candidate in candidates]
    return SearchResult(candidates[int(np.argmax(scores))], scores)


def bayesian(space: Space, number: int) -> SearchResult:
    """Searches as the paper does, by Bayesian optimisation of the index of each option.

    Here every option has the same width. The paper's indices are rounded down, so that its last option is one point.
    """
    config = space.config
    axes = {name: getattr(config, name) for name in ("layers", "hidden", "heads")}
    tried: list[tuple[float, Candidate]] = []

    def score(**indices: float) -> float:
        options = {name: values[min(int(indices[name]), len(values) - 1)] for name, values in axes.items()}
        candidate = Candidate(**options)
        valid = candidate.hidden % candidate.heads == 0
        tried.append((space.score(candidate, number) if valid else INVALID, candidate))
        return tried[-1][0]

    optimizer = require_library("bayes_opt").BayesianOptimization(
        score,
        {name: (0, len(values)) for name, values in axes.items()},
        random_state=config.seed + number - 1,
        verbose=0,
        allow_duplicate_points=True,
    )
    optimizer.maximize(init_points=config.initial, n_iter=config.evaluations)
    scores = [value for value, _ in tried]
    return SearchResult(tried[int(np.argmax(scores))][1], scores)


METHODS = {"exhaustive": exhaustive, "bayesian": bayesian}


def search(config: SearchConfig) -> list[Candidate]:
    """Returns the best students, and writes them to `config.output`, with a plot beside it."""
    space, output = Space(config), Path(config.output)
    results = [METHODS[config.method](space, number) for number in range(1, config.students + 1)]
    students = [result.student for result in results]
    comment = f"# recipes/search.py, method {config.method}\n"
    for number, student in enumerate(students, start=1):
        wanted = target(config, number)
        comment += f"# student-{number}: {space.size(student):,} parameters, sought {wanted:,.0f}\n"
    settings = {"students": [space.settings(student, number) for number, student in enumerate(students, start=1)]}
    write_text(output, comment + yaml.safe_dump(settings, sort_keys=False))
    plot(results, output.with_suffix(".svg"))
    return students


def plot(results: Sequence[SearchResult], path: Path) -> None:
    """Draws the distance from the target size, of every evaluation and of the best so far, for each student."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(results, start=1):
        scores = np.array(result.scores)
        distances = np.where(scores > INVALID, -scores, np.nan) / 1e6
        evaluations, colour = np.arange(1, len(distances) + 1), f"C{number - 1}"
        axes.plot(evaluations, distances, ".", color=colour, alpha=0.3)
        axes.plot(evaluations, np.fmin.accumulate(distances), color=colour, label=f"student {number}")
    axes.set(xlabel="evaluation", ylabel="parameters off target, millions", yscale="log")
    axes.legend()
    figure.savefig(path)
