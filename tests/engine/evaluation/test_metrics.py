import math

import numpy as np
import pytest

from engine.evaluation.metrics import TaskScore, accuracy, correlation, explained_variance


def test_ties_are_right_for_babylm_and_wrong_in_the_strict_count() -> None:
    score = accuracy("set", [[-1.0, -2.0], [-2.0, -2.0], [-3.0, -1.0], [-1.0, -4.0]], [[3, 4], [3, 3], [3, 4], [5, 4]])
    assert (score.score, score.strict_score, score.chance) == (0.75, 0.5, 0.5)
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert score.baseline == (1 + 0.5 + 1 + 0) / 4, "always the shorter: two of four, and a half for the tie"


def test_several_answers() -> None:
    score = accuracy("set", [[-1.0, -2.0, -3.0], [-2.0, -1.0, -2.0]], [[9, 9, 3], [9, 3, 3]])
    assert (score.score, score.chance) == (0.5, pytest.approx(1 / 3))
    assert score.baseline == (0.5 + 1) / 2, "always the longest"


def test_a_mean_over_sets_and_one_over_items() -> None:
    small = accuracy("small", [[0.0, -1.0]] * 2, [[1, 1]] * 2, "one")
    large = accuracy("large", [[0.0, -1.0]] * 3 + [[-1.0, 0.0]] * 5, [[1, 1]] * 8, "one")
    other = accuracy("other", [[-1.0, 0.0]] * 4, [[1, 1]] * 4, "two")
    task = TaskScore("task", (small, large, other))
    assert task.mean.score == pytest.approx((1 + 3 / 8 + 0) / 3)
    assert task.mean.standard_error == pytest.approx(large.standard_error / 3)
    assert [(p.name, p.items, p.score) for p in task.phenomena] == [("one", 10, 0.5), ("two", 4, 0.0)]


def test_rank_correlation() -> None:
    lengths = [[3, 2], [2, 2], [4, 5], [2, 5]]  # the first longer by 1, 0, -1, -3
    assert correlation("", [1, 2, 3, 40], [0, 1, 2, 3], lengths).score == pytest.approx(1)
    assert correlation("", [3, 2, 1, 0], [0, 1, 2, 3], lengths).score == pytest.approx(-1)
    constant = correlation("", [1, 1, 1, 1], [0, 1, 2, 3], lengths)
    assert (constant.score, constant.baseline) == (0, pytest.approx(1)), "the shorter, always"
    assert correlation("", [1, 2, 3, 40], [0, 1, 2, 3], [[1, 1]] * 4).baseline == 0


def test_explained_variance_is_that_of_two_regressions() -> None:
    random = np.random.default_rng(0)
    controls, surprisal = random.normal(size=(200, 2)) * [1, 1e4], random.normal(size=200)
    outcome = controls[:, 0] + controls[:, 0] * controls[:, 1] / 1e4 + 0.5 * surprisal + random.normal(size=200)
    controls[0, 0], outcome[1] = np.nan, np.nan
    kept = slice(2, None)
    base = np.column_stack([np.ones(200), controls, controls.prod(1)])[kept]
    total = ((outcome[kept] - outcome[kept].mean()) ** 2).sum()
    r2 = []
    for x in (base, np.column_stack([base, surprisal[kept]])):
        hat = x @ np.linalg.solve(x.T @ x, x.T @ outcome[kept])
        r2.append(1 - ((outcome[kept] - hat) ** 2).sum() / total)
    score = explained_variance("", outcome, controls, surprisal)
    assert score.items == 198
    assert score.score == pytest.approx((r2[1] - r2[0]) / (1 - r2[0]))
    assert score.score == pytest.approx(0.2, abs=4 * score.standard_error)
