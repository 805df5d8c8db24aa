"""What the studies share: the settings of a nano run, training it to its end, and a CSV of the finished runs."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.loading import build
from engine.config.settings import Config
from engine.system.errors import UserError


def study_parser(
    script: str, description: str | None, *, tokens: int | None = None, teacher_tokens: int | None = None
) -> argparse.ArgumentParser:
    """Returns a study's command line; it has options for the tokens of students and teachers where it has defaults."""
    path = Path(script)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a folder of *.txt; every file is sampled in proportion")
    parser.add_argument("--words", type=int, default=700_000, help="words of the corpus to read")
    if tokens is not None:
        parser.add_argument("--tokens", type=int, default=tokens, help="tokens that each student reads")
    if teacher_tokens is not None:
        parser.add_argument("--teacher-tokens", type=int, default=teacher_tokens, help="tokens that each reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the documents to hold out")
    parser.add_argument("--evaluations", type=int, default=5, help="number of evaluations of a run")
    folder = Path("runs") / f"study-{path.stem.replace('_', '-')}"
    parser.add_argument("--folder", type=Path, default=folder, help="folder of the runs")
    parser.add_argument("--csv", type=Path, default=path.with_suffix(".csv"))
    return parser


def settings_of(
    arguments: argparse.Namespace, name: str, students: Sequence[Mapping[str, Any]], seed: int, tokens: int
) -> dict[str, Any]:
    """Returns the settings of a run in which every student reads `tokens` tokens, in the order of `seed`."""
    steps = max(10, tokens // (16 * 128))
    every = max(1, steps // arguments.evaluations)
    return {
        "students": [{"learning_rate": 3e-3, "max_length": 128, **student} for student in students],
        "run": {"name": name, "folder": str(arguments.folder), "log_every": 20},
        "data": {
            "path": arguments.corpus,
            "words": arguments.words,
            "validation": arguments.held_out,
            "tokenizer": {"vocab_size": 4096},
        },
        "optimizer": {"warmup": steps // 10},
        "train": {"steps": steps, "batch": 16, "length": 128, "seed": seed},
        "evaluation": {"every": every, "tokens": 50_000, "pairs": "none", "samples": 1},
        "checkpoint": {"every": every, "keep": 1},
    }


def train_to_the_end(settings: Mapping[str, Any]) -> Path:
    """Trains from the start or from the last checkpoint, and returns the run's folder.

    A run that is finished stays as it is. Raises UserError where the run was asked to stop.
    """
    from engine.train import train

    config = build(Config, dict(settings))
    train(config)
    folder = Path(config.run.folder) / config.run.name
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} was asked to stop before its end: the same command goes on")
    return folder


def records(folder: Path, kind: str) -> list[Mapping[str, Any]]:
    """Returns a run's records of one kind (engine.reporting.records)."""
    from engine.reporting.records import read_metrics

    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def rows(path: Path) -> list[dict[str, str]]:
    """Returns the lines of a CSV; there are none where it does not exist yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_done(path: Path, arm: str, seed: int) -> bool:
    return any(row["arm"] == arm and int(row["seed"]) == seed for row in rows(path))


def append(path: Path, columns: Sequence[str], new_rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends lines to a CSV, and begins it with a header. What is not in `columns` is left out."""
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(new_rows)
