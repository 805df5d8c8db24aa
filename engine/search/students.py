"""A search for the students that learn together, by their size alone, as in When Babies Teach Babies (Iyer 2024)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

from engine.config.settings import SearchConfig, StudentConfig
from engine.models.families import parameter_count, shape_of
from engine.search.trials import require_library
from engine.system.errors import UserError
from engine.system.files import write_text

INVALID = -1e6  # the paper's score of a shape whose heads do not divide its width
WRITTEN = ("name", "layers", "hidden", "heads", "family", "ffn", "max_length", "learning_rate", "seed")  # of a student

Tried = list[tuple[float, StudentConfig]]  # all evaluations in turn, each with its score


def candidate(config: SearchConfig, number: int, layers: int, hidden: int, heads: int) -> StudentConfig:
    """Returns student `number`, from 1, with a shape of the search space."""
    return StudentConfig(
        f"student-{number}",
        layers,
        hidden,
        heads,
        config.ffn,
        max_length=config.max_length,
        family=config.family,
        seed=number,
    )


def size(config: SearchConfig, student: StudentConfig) -> int:
    """Returns the number of parameters, from models of one and two blocks, as all blocks have equally many."""
    shape = shape_of(student, config.vocab_size)
    one_block, two_blocks = (parameter_count(replace(shape, layers=layers)) for layers in (1, 2))
    return one_block + (shape.layers - 1) * (two_blocks - one_block)


def target(config: SearchConfig, number: int) -> float:
    """Returns the number of parameters that student `number`, from 1, should have."""
    return config.replaced_parameters / (number + 1)


def score(config: SearchConfig, student: StudentConfig, number: int) -> float:
    """Returns minus the distance of a shape from the size that student `number` should have."""
    if student.hidden % student.heads:
        return INVALID
    return -abs(size(config, student) - target(config, number))


def exhaustive(config: SearchConfig, number: int) -> Tried:
    """Tries every shape whose heads divide its width, in the order of the settings."""
    shapes = product(config.layers, config.hidden, config.heads)
    students = [candidate(config, number, *shape) for shape in shapes if shape[1] % shape[2] == 0]
    return [(score(config, student, number), student) for student in students]


def bayesian(config: SearchConfig, number: int) -> Tried:
    """Searches as the paper does, by Bayesian optimisation of the index of each option.

    Here every option has the same width. The paper's indices are rounded down, so that its last option is one point.
    """
    axes = {name: getattr(config, name) for name in ("layers", "hidden", "heads")}
    tried: Tried = []

    def try_options(**indices: float) -> float:
        options = {name: values[min(int(indices[name]), len(values) - 1)] for name, values in axes.items()}
        student = candidate(config, number, **options)
        tried.append((score(config, student, number), student))
        return tried[-1][0]

    optimizer = require_library("bayes_opt").BayesianOptimization(
        try_options,
        {name: (0, len(values)) for name, values in axes.items()},
        random_state=config.seed + number - 1,
        verbose=0,
        allow_duplicate_points=True,
    )
    optimizer.maximize(init_points=config.initial, n_iter=config.evaluations)
    return tried


METHODS = {"exhaustive": exhaustive, "bayesian": bayesian}


def search(config: SearchConfig) -> list[StudentConfig]:
    """Returns the best students, and writes them to `config.output`, with a plot beside it.

    Of shapes that score the same the first one is taken. Raises UserError for a width that no number of heads divides.
    """
    for hidden in config.hidden:
        if all(hidden % heads for heads in config.heads):
            raise UserError(f"hidden={hidden} is divisible by none of heads={list(config.heads)}: add a divisor")
    tried = [METHODS[config.method](config, number) for number in range(1, config.students + 1)]
    students = [max(of_student, key=lambda scored: scored[0])[1] for of_student in tried]
    comment = f"# recipes/search.py, method {config.method}\n"
    for number, student in enumerate(students, start=1):
        wanted = target(config, number)
        comment += f"# student-{number}: {size(config, student):,} parameters, sought {wanted:,.0f}\n"
    content = {"students": [{name: getattr(student, name) for name in WRITTEN} for student in students]}
    output = Path(config.output)
    write_text(output, comment + yaml.safe_dump(content, sort_keys=False))
    plot(tried, output.with_suffix(".svg"))
    return students


def plot(tried: Sequence[Tried], path: Path) -> None:
    """Draws the distance from the target size, of every evaluation and of the best so far, for each student."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, of_student in enumerate(tried, start=1):
        scores = np.array([score for score, _ in of_student])
        distances = np.where(scores > INVALID, -scores, np.nan) / 1e6
        evaluations, colour = np.arange(1, len(distances) + 1), f"C{number - 1}"
        axes.plot(evaluations, distances, ".", color=colour, alpha=0.3)
        axes.plot(evaluations, np.fmin.accumulate(distances), color=colour, label=f"student {number}")
    axes.set(xlabel="evaluation", ylabel="parameters off target, millions", yscale="log")
    axes.legend()
    figure.savefig(path)
