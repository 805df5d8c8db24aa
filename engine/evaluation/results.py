"""From scores to what is reported: accuracies and how sure they are, beside what is reached without a model.

A tie is right for BabyLM's own code, which takes the first of the likeliest answers, and the first is the right one.
`score` follows it, `strict` counts ties as wrong. `chance` is a random answer's. `baseline` is the best of the rules
that need no model: of answers, always the one of fewest tokens, or of most; of classes, the most frequent; of a
correlation, that of the difference in tokens.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np

from engine.system.errors import UserError


@dataclass(frozen=True)
class SetScore:
    name: str
    items: int
    score: float  # accuracy, 0 to 1; a rank correlation; a share of variance: see `Task`
    strict: float  # as `score`, ties wrong
    error: float  # standard error of `score`
    chance: float
    baseline: float | None
    group: str | None = None  # BLiMP's phenomenon


@dataclass(frozen=True)
class TaskScore:
    """One model's scores of one task."""

    task: str
    sets: tuple[SetScore, ...]

    @property
    def mean(self) -> SetScore:
        """The unweighted mean over the sets, as BabyLM's tables have it."""
        return _mean("mean", self.sets)

    @property
    def phenomena(self) -> list[SetScore]:
        """BabyLM 2023's view of BLiMP: the sets of a phenomenon pooled."""
        groups = defaultdict(list)
        for one in self.sets:
            if one.group is not None:
                groups[one.group].append(one)
        return [pooled(name, sets) for name, sets in sorted(groups.items())]


def _mean(name: str, sets: Sequence[SetScore]) -> SetScore:
    baselines = [s.baseline for s in sets if s.baseline is not None]
    n = len(sets)
    return SetScore(
        name,
        items=sum(s.items for s in sets),
        score=sum(s.score for s in sets) / n,
        strict=sum(s.strict for s in sets) / n,
        error=math.sqrt(sum(s.error**2 for s in sets)) / n,
        chance=sum(s.chance for s in sets) / n,
        baseline=sum(baselines) / n if len(baselines) == n else None,
    )


def pooled(name: str, sets: Sequence[SetScore]) -> SetScore:
    """The sets as if they were one."""
    items = sum(s.items for s in sets)

    def weighted(attribute: str) -> float:
        return sum(getattr(s, attribute) * s.items for s in sets) / items

    score = weighted("score")
    return SetScore(
        name, items, score, weighted("strict"), _binomial(score, items), weighted("chance"), weighted("baseline")
    )


def _binomial(share: float, items: int) -> float:
    return math.sqrt(share * (1 - share) / items)


def accuracy(
    name: str, scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], group: str | None = None
) -> SetScore:
    """Of a set's items: each item's first answer should be the likeliest; lengths in tokens, for the baseline."""
    first_or_tied = sum(item[0] == max(item) for item in scores) / len(scores)
    alone = sum(item[0] > max(item[1:]) for item in scores) / len(scores)
    rules = [  # of several answers as long, any
        sum((n[0] == best(n)) / list(n).count(best(n)) for n in lengths) / len(lengths) for best in (min, max)
    ]
    chance = sum(1 / len(item) for item in scores) / len(scores)
    return SetScore(
        name, len(scores), first_or_tied, alone, _binomial(first_or_tied, len(scores)), chance, max(rules), group
    )


def correlation(
    name: str, ours: Sequence[float], theirs: Sequence[float], lengths: Sequence[Sequence[int]]
) -> SetScore:
    """Spearman's rank correlation of what is ours, for the first of two answers against the second, with theirs; its
    standard error from Fisher's z. The answers' lengths in tokens, for the baseline."""
    r, n = _spearman(ours, theirs), len(theirs)
    rule = abs(_spearman([a - b for a, b in lengths], theirs))
    return SetScore(name, n, r, r, (1 - r * r) / math.sqrt(n - 3), 0.0, rule)


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """0 where one of them is constant."""
    a, b = (_ranks(np.asarray(x, dtype=float)) for x in (one, other))
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, the mean one for values that are equal."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def explained(name: str, outcome: np.ndarray, controls: np.ndarray, surprisal: np.ndarray) -> SetScore:
    """The share of what `controls` [n, k] leave unexplained of `outcome` [n] that `surprisal` [n] explains, by least
    squares with every product of two controls: the partial R² of BabyLM's reading task (de Varda et al. 2023). Rows
    that hold a NaN are left out, as there. Standard error: 2R(1−R²)/√n."""
    k = controls.shape[1]
    products = [controls[:, i] * controls[:, j] for i in range(k) for j in range(i)]
    base = np.column_stack([np.ones(len(outcome)), controls, *products])
    both = np.column_stack([base, surprisal])
    whole = np.isfinite(both).all(1) & np.isfinite(outcome)

    def left(x: np.ndarray) -> float:
        x, y = x[whole], outcome[whole]
        x = x / np.abs(x).max(0).clip(1e-30)  # columns of like size, so that lstsq drops none
        return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum())

    share = 1 - left(both) / left(base)
    error = 2 * math.sqrt(max(share, 0.0)) * (1 - share) / math.sqrt(whole.sum())
    return SetScore(name, int(whole.sum()), share, share, error, 0.0, None)


def write(folder: Path, model: str, scores: Sequence[TaskScore], **about: object) -> None:
    """scores.json, scores.csv and scores.svg. Raises ValueError where the disk refuses."""
    whole = {
        "model": model,
        **about,
        "tasks": [
            {"task": t.task, "mean": asdict(t.mean), "sets": [asdict(s) for s in t.sets]}
            | ({"phenomena": [asdict(s) for s in t.phenomena]} if t.phenomena else {})
            for t in scores
        ],
    }
    columns = ("name", "items", "score", "strict", "error", "chance", "baseline", "group")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
        with (folder / "scores.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("model", "task", *columns))
            for task in scores:
                for one in (*task.sets, task.mean):
                    rows.writerow((model, task.task, *(getattr(one, column) for column in columns)))
        (folder / "scores.svg").write_text(plot(model, scores))
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error}): make room and score again") from None


def table(scores: Mapping[str, Sequence[TaskScore]], *, sets: bool) -> str:
    """Every model's scores in per cent, as plain text; with `sets` of each set, else the tasks' means."""
    rows: list[tuple[str, ...]] = [("", "items", "score", "±", "ties wrong", "chance", "no model")]
    for model, tasks in scores.items():
        rows.append((model, *[""] * 6))
        for task in tasks:
            for one in (*(task.sets if sets and len(task.sets) > 1 else ()), task.mean):
                name = f"  {task.task}" if one.name == "mean" else f"    {one.name}"
                numbers = (one.score, one.error, one.strict, one.chance, one.baseline)
                rows.append((name, f"{one.items:,}", *("–" if x is None else f"{100 * x:.2f}" for x in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def plot(model: str, scores: Sequence[TaskScore]) -> str:
    """Each set's score with its standard error, and a tick where chance lies, as SVG."""
    marks, place = [], 40
    for task in scores:
        for one in (*sorted(task.sets, key=lambda s: -s.score), task.mean):
            bold, name = (' font-weight="bold"', task.task) if one.name == "mean" else ("", one.name)
            shares = one.score - one.error, one.score, one.score + one.error, one.chance
            low, at, high, chance = (330 + 400 * share for share in shares)
            marks.append(
                f'<text x="320" y="{place + 4}" text-anchor="end"{bold}>{escape(name)}</text>'
                f'<path d="M330 {place}h400" stroke="#ddd"/><path d="M{chance:.1f} {place - 5}v10" stroke="#999"/>'
                f'<path d="M{low:.1f} {place}H{high:.1f}" stroke="#246" stroke-width="3"/>'
                f'<circle cx="{at:.1f}" cy="{place}" r="4" fill="#246"/>'
                f'<text x="740" y="{place + 4}"{bold}>{100 * one.score:.1f}</text>'
            )
            place += 16
        place += 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{place}" font-family="sans-serif" font-size="11">'
        f'<rect width="800" height="{place}" fill="white"/><text x="330" y="20" font-size="14">{escape(model)}</text>'
        f"{''.join(marks)}</svg>\n"
    )
