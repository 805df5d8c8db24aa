"""Shows how a step's time and memory grow with students, vocabulary, length and teachers, with fitted exponents.

    python benchmarks/throughput.py --variants ours --students 1 2 4 8 --shape 4x256x8x768 --csv students.csv
    python benchmarks/growth.py students.csv vocabulary.csv length.csv teachers.csv --png growth.png

    python benchmarks/growth.py one-rank.csv,two-ranks.csv

It reads what benchmarks/throughput.py has written. A file, or several joined by commas, is a series over S, V, L, K or
ranks: over the one that takes several values in it. The others must be equal, but with ranks the batch may grow and the
ZeRO stage change. The fit is y ∝ xᵖ, with p by least squares of logarithms. Teachers begin at x = 0, so for them it is
what a teacher costs, as a share of a step without teachers.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.system.errors import UserError

AXES = {"students": "S", "vocabulary": "V", "length": "L", "teachers": "K", "ranks": "W"}
SAME = ("task", "precision", "backend", "divergence", "device")
WITH_RANKS = ("batch", "zero_stage")  # These may change with the ranks.


@dataclass(frozen=True)
class Series:
    axis: str  # a key of AXES
    x: np.ndarray
    milliseconds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mebibytes: np.ndarray  # at the peak, beyond state and imports
    tokens_per_second: np.ndarray
    batch: np.ndarray
    void: bool


def read(paths: str) -> Series:
    """Returns the rows of `ours` in their order along the axis.

    Raises UserError where nothing varies, or several things do.
    """
    rows: list[dict[str, str]] = []
    for path in paths.split(","):
        with Path(path).open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["variant"] == "ours"]
    varying = [key for key in (*AXES, *SAME, *WITH_RANKS) if len({row[key] for row in rows}) > 1]
    if "ranks" in varying:
        varying = [key for key in varying if key not in WITH_RANKS]
    if len(varying) != 1 or varying[0] not in AXES:
        raise UserError(f"{paths}: {', '.join(varying) or 'nothing'} varies; expected one of {', '.join(AXES)} alone")
    (axis,) = varying
    rows.sort(key=lambda row: int(row[axis]))

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    return Series(
        axis,
        column(axis),
        column("milliseconds"),
        column("milliseconds_low"),
        column("milliseconds_high"),
        column("beyond_state_mebibytes"),
        column("tokens_per_second"),
        column("batch"),
        any(row["void"] == "True" for row in rows),
    )


def exponent(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns p and c of the fit y ≈ c·xᵖ."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), float(np.exp(intercept))


def describe(series: Series) -> str:
    """Returns lines on time and memory; for students also how a step compares with as many steps of one student."""
    name, lines = AXES[series.axis], []
    for what, unit, y in (("step", "ms", series.milliseconds), ("memory beyond state", "MiB", series.mebibytes)):
        values = ", ".join(f"{name}={x:.0f} {value:.0f}" for x, value in zip(series.x, y, strict=True))
        if series.x[0] == 0:
            slope, first = np.polyfit(series.x, y, 1)
            fitted = f"{slope / first:+.2f} of it for each teacher"
        else:
            fitted = f"∝ {name}^{exponent(series.x, y)[0]:.2f}"
        lines.append(f"{what} {fitted} ({values} {unit})")
    if series.axis == "students" and series.x[0] == 1:
        ratios = series.milliseconds / (series.x * series.milliseconds[0])
        worst = f"{ratios.max():.2f}, {'at most' if ratios.max() <= 1.1 else 'ABOVE'} 1.1"
        listed = ", ".join(f"S={x:.0f} {ratio:.2f}" for x, ratio in zip(series.x, ratios, strict=True))
        lines.append(f"a step over as many steps of one student: {worst} ({listed})")
    if series.axis == "ranks":
        kind = "strong" if series.batch[0] == series.batch[-1] else "weak"
        gains = series.tokens_per_second / series.tokens_per_second[0]
        listed = ", ".join(f"W={x:.0f} {gain:.2f}" for x, gain in zip(series.x, gains, strict=True))
        lines.append(f"tokens a second, as many times those of the fewest ranks, {kind} scaling: {listed}")
    return "\n".join(("VOID: " if series.void else "") + line for line in lines)


def plot(all_series: Sequence[Series], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(all_series), figsize=(3.6 * len(all_series), 6), squeeze=False)
    for column, series in enumerate(all_series):
        for axis, y, label in zip(
            axes[:, column], (series.milliseconds, series.mebibytes), ("ms a step", "MiB beyond state"), strict=True
        ):
            axis.plot(series.x, y, "o")
            if series.x[0] > 0:
                slope, factor = exponent(series.x, y)
                axis.plot(series.x, factor * series.x**slope, ":", label=f"∝ {AXES[series.axis]}^{slope:.2f}")
                axis.set(xscale="log", yscale="log")
                axis.legend()
            axis.set(xlabel=AXES[series.axis], ylabel=label)
        axes[0, column].vlines(series.x, series.low, series.high)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+")
    parser.add_argument("--png", type=Path)
    chosen = parser.parse_args(argv)
    try:
        all_series = [read(path) for path in chosen.csv]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for series in all_series:
        print(describe(series))
    if chosen.png is not None:
        plot(all_series, chosen.png)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
