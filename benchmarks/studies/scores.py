"""BabyLM's zero-shot scores at nano scale: students that learn together, the same students alone, and their ensembles.

    python benchmarks/studies/scores.py --data evaluation_data        after benchmarks/studies/babies.py

It scores the runs of that study on every item of every task. The arms of one seed begin with the same weights and read
the same text in the same order, so that differences between arms are paired.

The CSV has a line for every student and one for the ensemble, for each task and run; what it holds is not done again.
The scores.json, .csv and .svg of every model lie in <folder>/scores/<task>.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.studies.runs import append, rows
from engine.config.loading import build
from engine.config.settings import ScoreConfig
from engine.system.errors import report_errors

SCORES = ("items", "score", "strict_score", "standard_error", "chance", "baseline")
COLUMNS = ("arm", "seed", "model", "task", *SCORES, "git_commit")
TASKS = ("blimp_supplement", "wug_adj_nominalization", "blimp", "entity_tracking")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the evaluation data")
    parser.add_argument("--folder", type=Path, default=Path("runs/study-babies"), help="folder of that study's runs")
    parser.add_argument("--arms", nargs="+", default=["alone", "mutual"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    for task in arguments.tasks:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                key = (task, arm, str(seed))
                if all((row["task"], row["arm"], row["seed"]) != key for row in rows(arguments.csv)):
                    append(arguments.csv, COLUMNS, score_run(arguments, *key))
    print(table(rows(arguments.csv)))


def score_run(arguments: argparse.Namespace, task: str, arm: str, seed: str) -> list[dict[str, Any]]:
    """Returns the CSV's rows for one task and run."""
    from engine.evaluation.score_model import score_model  # It imports torch, which --help does not need.

    run = arguments.folder / f"{arm.replace(' ', '-')}-{seed}"
    folder = str(arguments.folder / "scores" / task)
    settings = {"model": str(run), "data": arguments.data, "tasks": (task,), "folder": folder}
    scores = score_model(build(ScoreConfig, settings))
    commit = json.loads((run / "summary.json").read_text())["git_commit"]
    key = {"arm": arm, "seed": seed, "task": task, "git_commit": commit}
    return [
        {**vars(task_score.mean), **key, "model": name.rpartition("-")[2]} for name, (task_score,) in scores.items()
    ]


def table(rows: list[dict[str, str]]) -> str:
    """Returns each task's and model's mean and standard deviation over the seeds, in per cent, as Markdown."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    by_seed: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        by_seed[row["task"], row["model"], row["arm"]][row["seed"]] = 100 * float(row["score"])
    columns = ["task", "chance", "no model", "model", *arms, *(f"{arm} − {arms[0]}, pairs" for arm in arms[1:])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for (task, model), row in {(row["task"], row["model"]): row for row in rows}.items():
        cells = [f"{100 * float(row[key]):.2f}" if row[key] else "–" for key in ("chance", "baseline")]
        cells = [task, *cells, model, *(_mean_and_deviation([*by_seed[task, model, arm].values()]) for arm in arms)]
        first = by_seed[task, model, arms[0]]
        for arm in arms[1:]:
            differences = [score - first[seed] for seed, score in by_seed[task, model, arm].items() if seed in first]
            cells.append(_mean_and_deviation(differences, "+"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float], sign: str = "") -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


if __name__ == "__main__":
    with report_errors():
        main()
