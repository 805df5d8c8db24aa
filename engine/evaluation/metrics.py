"""Scores and how sure they are, beside what is reached without a model.

BabyLM's own code takes the first of the likeliest answers, and the first is the right one, so that a tie counts as
right; `score` follows it, and in `strict_score` a tie is wrong. `chance` is what random answers score. `baseline` is
the best of the rules that need no model: always the answer with the fewest tokens, or with the most; the most frequent
class; for a correlation, the difference in tokens instead of the model's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class SetScore:
    """The score of one model on one set of items."""

    name: str
    items: int
    score: float  # accuracy (0 to 1), a rank correlation, or a share of variance
    strict_score: float  # the same where a tie is wrong; for fine-tuning, the last epoch's instead of the best one's
    standard_error: float  # of `score`
    chance: float
    baseline: float | None
    phenomenon: str | None = None  # the phenomenon of BLiMP that the set belongs to


@dataclass(frozen=True)
class TaskScore:
    """The scores of one model on one task."""

    task: str
    sets: tuple[SetScore, ...]

    @property
    def mean(self) -> SetScore:
        """The unweighted mean over the sets, which BabyLM's tables show."""
        return _weighted_mean("mean", self.sets, [1] * len(self.sets))

    @property
    def phenomena(self) -> list[SetScore]:
        """The sets of each phenomenon pooled, as BabyLM 2023 reports BLiMP."""
        names = sorted({s.phenomenon for s in self.sets if s.phenomenon is not None})
        return [pooled(name, [s for s in self.sets if s.phenomenon == name]) for name in names]


def _weighted_mean(name: str, sets: Sequence[SetScore], weights: Sequence[int]) -> SetScore:
    def mean(values: Sequence[float]) -> float:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    baselines = [s.baseline for s in sets if s.baseline is not None]
    squared_error = sum((s.standard_error * weight) ** 2 for s, weight in zip(sets, weights, strict=True))
    return SetScore(
        name,
        items=sum(s.items for s in sets),
        score=mean([s.score for s in sets]),
        strict_score=mean([s.strict_score for s in sets]),
        standard_error=math.sqrt(squared_error) / sum(weights),
        chance=mean([s.chance for s in sets]),
        baseline=mean(baselines) if len(baselines) == len(sets) else None,
    )


def pooled(name: str, sets: Sequence[SetScore]) -> SetScore:
    """Returns the accuracy over the items of all sets together."""
    mean = _weighted_mean(name, sets, [s.items for s in sets])
    return replace(mean, standard_error=binomial_error(mean.score, mean.items))


def binomial_error(share: float, items: int) -> float:
    """Returns the standard error of a share of independent items."""
    return math.sqrt(share * (1 - share) / items)


def accuracy(
    name: str, scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], phenomenon: str | None = None
) -> SetScore:
    """Returns the share of items whose first answer is the likeliest.

    `scores` holds each answer's log-probability per item, `lengths` each answer's length in tokens for the baseline.
    """
    items = len(scores)
    score = sum(item[0] == max(item) for item in scores) / items
    strict_score = sum(item[0] > max(item[1:]) for item in scores) / items
    baselines = [  # Among answers of one length a rule takes any.
        sum((n[0] == best(n)) / list(n).count(best(n)) for n in lengths) / items for best in (min, max)
    ]
    chance = sum(1 / len(item) for item in scores) / items
    error = binomial_error(score, items)
    return SetScore(name, items, score, strict_score, error, chance, max(baselines), phenomenon)


def correlation(
    name: str, differences: Sequence[float], human: Sequence[float], lengths: Sequence[Sequence[int]]
) -> SetScore:
    """Returns Spearman's rank correlation with people's judgements; its standard error is from Fisher's z.

    Per item, `differences` holds the model's log-probability of the first answer minus that of the second, `human` what
    people prefer, and `lengths` both answers' lengths in tokens for the baseline.
    """
    r, items = _spearman(differences, human), len(human)
    baseline = abs(_spearman([first - second for first, second in lengths], human))
    return SetScore(name, items, r, r, (1 - r * r) / math.sqrt(items - 3), 0.0, baseline)


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    return pearson(_ranks(np.asarray(x, dtype=float)), _ranks(np.asarray(y, dtype=float)))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Pearson's correlation, or 0 where all values of x, or of y, are equal."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks; equal values share their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def explained_variance(name: str, outcome: np.ndarray, controls: np.ndarray, surprisal: np.ndarray) -> SetScore:
    """Returns the share of the variance of `outcome` [n] that `surprisal` [n] explains beyond `controls` [n, k].

    It is the partial R² of BabyLM's reading task (de Varda et al. 2023): two least-squares fits with the controls and
    the products of every two of them, one with surprisal as well. Rows with a NaN are left out, as there. The standard
    error is 2R(1 − R²)/√n.
    """
    k = controls.shape[1]
    products = [controls[:, i] * controls[:, j] for i in range(k) for j in range(i)]
    without = np.column_stack([np.ones(len(outcome)), controls, *products])
    with_surprisal = np.column_stack([without, surprisal])
    complete = np.isfinite(with_surprisal).all(1) & np.isfinite(outcome)
    items = int(complete.sum())

    def squared_residuals(predictors: np.ndarray) -> float:
        x, y = predictors[complete], outcome[complete]
        x = x / np.abs(x).max(0).clip(1e-30)  # lstsq drops columns that are much smaller than others.
        return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum())

    share = 1 - squared_residuals(with_surprisal) / squared_residuals(without)
    error = 2 * math.sqrt(max(share, 0.0)) * (1 - share) / math.sqrt(items)
    return SetScore(name, items, share, share, error, 0.0, None)
