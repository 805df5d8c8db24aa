"""Does the proxy search find students that do better together than random ones of the same size?

    python benchmarks/studies/search.py --corpus texts
    python benchmarks/studies/search.py --corpus texts --seeds 1 --trials 2 --flops 1e10 --csv try.csv

For every seed, engine.search.students looks for three students among tiny LLaMAs (30 shapes), by short runs of as many FLOPs as
one another, each scored by the held-out loss of its ensemble. Then the students found, and random ones that together
are as large, are trained from other initial weights, on the text in another order, for `LONGER` times as many FLOPs:
all by mutual learning. The search's own FLOPs are those of all its trials' training, pruned ones up to there.

A finished run is a line of the CSV; what stands there is not done again, and a search that was killed goes on.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from benchmarks.studies.runs import (
    append,
    argument_parser,
    flops_of,
    is_done,
    records,
    rows,
    settings_of,
    train_to_the_end,
)
from engine.system.errors import report_errors
from engine.search.students import Candidate, ProxyConfig, SearchConfig, ShortRun, Space, proxy

COLUMNS = ("arm", "seed", "students", "parameters", "validation_loss", "tokens", "model_flops", "search_flops")
LENGTH, PIECES = 64, 1024
LONGER = 2
CONTROLS = 2
SPACE = SearchConfig(
    students=3,
    family="llama",
    layers=(1, 2, 3, 4, 6, 8),
    hidden=(16, 32, 48, 64, 96),
    heads=(4,),
    ffn=128,
    max_length=LENGTH,
)


def main() -> None:
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("--trials", type=int, default=14, help="of the search, for each seed")
    parser.add_argument("--flops", type=float, default=1e11, help="of a trial")
    arguments = parser.parse_args()

    def settings(name: str, seed: int) -> dict[str, Any]:
        common = settings_of(arguments, name, [{}], seed, tokens=0)
        common["data"]["tokenizer"] = {"vocab_size": PIECES}
        common["train"] |= {"length": LENGTH}
        common["evaluation"] |= {"tokens": 20_000, "samples": 0}
        common["checkpoint"] = {"every": 10**6, "keep": 1}
        return common

    searches = {}
    for seed in arguments.seeds:  # all before the first run in this process, whose port theirs would take
        folder = arguments.folder / f"search-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "base.yaml").write_text(yaml.safe_dump(settings("base", seed)))
        budget = ProxyConfig(str(folder / "base.yaml"), arguments.flops, arguments.trials, folder=str(folder))
        run = ShortRun(Space(replace(SPACE, seed=seed, proxy=budget)))
        journal = folder / "trials.journal"
        best = proxy(run.space, run, journal, trials=arguments.trials, seed=seed, base=run.decisive).students
        searches[seed] = run, best, sum(flops_of(path.parent) for path in folder.glob("*/run/metrics.jsonl"))

    for seed, (run, best, searched) in searches.items():
        for arm, cohort in arms(run.space, best, seed):
            if is_done(arguments.csv, arm, seed):
                continue
            chosen = settings(f"{arm.replace(' ', '-')}-{seed}", 1000 + seed)
            students = run.space.students(cohort)
            chosen["students"] = [{**s, "seed": 1000 * seed + s["seed"]} for s in students]
            steps = LONGER * run.steps(cohort)
            chosen["train"]["steps"] = chosen["evaluation"]["every"] = steps
            chosen["optimizer"]["warmup"] = steps // 10
            folder = train_to_the_end(chosen)
            summary = json.loads((folder / "summary.json").read_text())
            last = records(folder, "evaluation")[-1]
            found = {
                "students": " ".join(f"{s.layers}x{s.hidden}" for s in cohort),
                "parameters": sum(map(run.space.size, cohort)),
                "model_flops": flops_of(folder),
                "search_flops": searched if arm == "found" else 0,
            }
            append(arguments.csv, COLUMNS, [{**summary, **last["ensemble"], **found, "arm": arm, "seed": seed}])
    print(table(rows(arguments.csv)))


def arms(space: Space, best: Sequence[Candidate], seed: int) -> Iterator[tuple[str, Sequence[Candidate]]]:
    """The students found, and their controls, none of which is the same set of shapes."""
    yield "found", best
    seen, draw = {frozenset(best)}, 0
    while len(seen) <= CONTROLS:
        draw += 1
        cohort = random_cohort(space, best, seed=1000 * seed + draw)
        if frozenset(cohort) not in seen:
            seen.add(frozenset(cohort))
            yield f"random {len(seen) - 1}", cohort


def random_cohort(space: Space, like: Sequence[Candidate], seed: int) -> tuple[Candidate, ...]:
    """A control for `like`: as many random students, together nearest it in parameters, of 200 draws; of 20,000 more
    where that is more than 5% off, as it is at the ends of the space."""
    dropout_seeds, shapes = np.random.default_rng(seed), list(space.all())
    goal = sum(map(space.size, like))

    def drawn(count: int) -> list[tuple[Candidate, ...]]:
        return [tuple(shapes[i] for i in dropout_seeds.integers(len(shapes), size=len(like))) for _ in range(count)]

    def off(cohort: Sequence[Candidate]) -> int:
        return abs(sum(map(space.size, cohort)) - goal)

    found = min(drawn(200), key=off)
    return found if off(found) <= 0.05 * goal else min([found, *drawn(20_000)], key=off)


def table(found: list[dict[str, str]]) -> str:
    """For each seed, the loss of the students found and those of their controls, as Markdown."""
    lines = [
        "| seed | found: ensemble, nats/token (students, parameters) | random ones | found − mean | search, FLOPs |"
    ]
    lines.append("|---|---|---|---|---|")
    differences = []
    for best in (row for row in found if row["arm"] == "found"):
        controls = [row for row in found if row["arm"] != "found" and row["seed"] == best["seed"]]
        losses = [float(row["validation_loss"]) for row in controls]
        differences.append(float(best["validation_loss"]) - statistics.mean(losses))
        cells = [best["seed"], shown(best), ", ".join(map(shown, controls)), f"{differences[-1]:+.4f}"]
        lines.append(f"| {' | '.join(cells)} | {float(best['search_flops']):.2e} |")
    if len(differences) > 1:
        lines.append(f"\n{statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f} over seeds")
    return "\n".join(lines)


def shown(row: dict[str, str]) -> str:
    return f"{float(row['validation_loss']):.4f} ({row['students']}, {int(row['parameters']) / 1e3:.0f}k)"


if __name__ == "__main__":
    with report_errors():
        main()
