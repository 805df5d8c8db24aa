"""BabyLM's zero-shot scores at nano scale: students that learn together, the same students alone, and their ensembles.

    python benchmarks/studies/scores.py --data evaluation_data        after benchmarks/studies/babies.py

Every item of every task, for the runs of that study. With one seed its arms begin with the same weights and read the
same text in the same order, so that differences between arms are paired.

A task's scores of a run are some lines of the CSV, one per student and one for the ensemble; what stands there is not
done again. scores.json, .csv and .svg of every model lie in <folder>/scores/<task>.
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

COLUMNS = ("arm", "seed", "model", "task", "items", "score", "strict", "error", "chance", "baseline", "git_commit")
TASKS = ("blimp_supplement", "wug_adj_nominalization", "blimp", "entity_tracking")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the evaluation data")
    parser.add_argument("--folder", type=Path, default=Path("runs/study-babies"), help="of that study's runs")
    parser.add_argument("--arms", nargs="+", default=["alone", "mutual"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    for task in arguments.tasks:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                asked = (task, arm, str(seed))
                if all((row["task"], row["arm"], row["seed"]) != asked for row in rows(arguments.csv)):
                    append(arguments.csv, COLUMNS, scored(arguments, *asked))
    print(table(rows(arguments.csv)))


def scored(arguments: argparse.Namespace, task: str, arm: str, seed: str) -> list[dict[str, Any]]:
    from engine.evaluation.scores import score_model  # imports torch

    run = arguments.folder / f"{arm.replace(' ', '-')}-{seed}"
    given = {"model": str(run), "data": arguments.data, "tasks": (task,)}
    scores = score_model(build(ScoreConfig, given | {"folder": str(arguments.folder / "scores" / task)}))
    about = {"arm": arm, "seed": seed, "git_commit": json.loads((run / "summary.json").read_text())["git_commit"]}
    return [
        {**vars(one.mean), **about, "model": name.rpartition("-")[2], "task": one.task}
        for name, (one,) in scores.items()
    ]


def table(found: list[dict[str, str]]) -> str:
    """Each task's and model's mean and standard deviation over the seeds, in per cent, as Markdown."""
    arms = list(dict.fromkeys(row["arm"] for row in found))
    by_seed: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in found:
        by_seed[row["task"], row["model"], row["arm"]][row["seed"]] = 100 * float(row["score"])
    columns = ["task", "chance", "no model", "model", *arms, *(f"{arm} − {arms[0]}, pairs" for arm in arms[1:])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for task, model in dict.fromkeys((row["task"], row["model"]) for row in found):
        row = next(row for row in found if (row["task"], row["model"]) == (task, model))
        cells = [f"{100 * float(row[key]):.2f}" if row[key] else "–" for key in ("chance", "baseline")]
        cells = [task, *cells, model, *(_spread([*by_seed[task, model, arm].values()], "") for arm in arms)]
        first = by_seed[task, model, arms[0]]
        for arm in arms[1:]:
            pairs = [score - first[seed] for seed, score in by_seed[task, model, arm].items() if seed in first]
            cells.append(_spread(pairs, "+"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], sign: str) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


if __name__ == "__main__":
    with report_errors():
        main()
