"""Scores a model, or a run's students and their ensemble, on the tasks that the settings name.

<folder>/<model>/scores.json   everything
                 scores.csv    one line per set, and one per task for the mean over its sets
                 scores.svg    a chart of the same
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from engine.config.loading import as_dict, read_yaml
from engine.config.settings import ScoreConfig
from engine.data.tokenizer import Tokenizer
from engine.evaluation.finetune import TEXTS, finetune, read_datasets
from engine.evaluation.log_probabilities import model_log_probabilities
from engine.evaluation.metrics import SetScore, TaskScore
from engine.evaluation.tasks import ZERO_SHOT, read_tasks
from engine.evaluation.zero_shot import ZeroShot
from engine.models.base import LanguageModel
from engine.models.huggingface import OMEGA, load_model
from engine.system.distributed import init_distributed
from engine.system.errors import UserError
from engine.system.files import write_text, written_aside
from engine.system.formatting import align_columns
from engine.system.provenance import git_commit


def score_model(config: ScoreConfig) -> dict[str, list[TaskScore]]:
    """Returns every model's scores by its name, after writing and printing them; a collective call.

    A run's models are its students and, where there are several, `<run>-ensemble`. Raises UserError for a mistake in
    the settings, the model's folder or the tasks' files, before anything is computed.
    """
    for name in config.tasks:
        if name not in (*ZERO_SHOT, *TEXTS):
            raise UserError(f"tasks: {name!r} is not known: expected some of {', '.join((*ZERO_SHOT, *TEXTS))}")
    model_path, data = Path(config.model), Path(config.data)
    tasks = read_tasks([name for name in config.tasks if name in ZERO_SHOT], data)
    classification = [read_datasets(name, data) for name in config.tasks if name in TEXTS]
    models, tokenizer = load_models(model_path)
    runtime = init_distributed()
    for model in models.values():
        model.to(runtime.device)
    names = [*models, f"{model_path.resolve().name}-ensemble"] if len(models) > 1 else list(models)
    scores: dict[str, list[TaskScore]] = {name: [] for name in names}
    if tasks:
        shapes = [model.shape for model in models.values()]
        questions = ZeroShot(
            tasks,
            tokenizer,
            runtime,
            max_length=min(shape.max_length for shape in shapes),
            share=all(shape.shares_prefixes for shape in shapes),
            masked=not all(shape.causal for shape in shapes),
        )
        with torch.inference_mode():
            log_probabilities = model_log_probabilities(list(models.values()), omega_of(model_path))
            scores = dict(zip(names, questions.scores(log_probabilities), strict=True))
    for name, model in models.items():
        folder = Path(config.folder) / name
        scores[name] += [finetune(task, model, tokenizer, config.finetune, folder, runtime) for task in classification]
    with runtime.main_process_first():
        if runtime.is_main_process:
            for name, tasks_scores in scores.items():
                if tasks_scores:
                    provenance = {"settings": as_dict(config), "git_commit": git_commit()}
                    write_scores(Path(config.folder) / name, name, tasks_scores, provenance)
            print(score_table(scores, sets=len(models) == 1))
    return scores


def load_models(path: Path) -> tuple[dict[str, LanguageModel], Tokenizer]:
    """Returns the model of a Hugging Face folder by the folder's name, or a run's exported students by theirs.

    Raises UserError where there are none, where not all of a run's students are there, or their tokenizers differ.
    """
    if (path / "config.json").is_file():
        model, tokenizer = load_model(path)
        return {path.resolve().name: model}, tokenizer
    folders = sorted(file.parent for file in path.glob("students/[!.]*/config.json"))
    if not folders:
        raise UserError(
            f"model={path}: expected a Hugging Face folder (config.json, model.safetensors, tokenizer.json), or a run "
            "that has exported its students; recipes/export.py exports those of a run that has not ended"
        )
    summary = path / "summary.json"
    students = json.loads(summary.read_text()).get("students", ()) if summary.is_file() else ()
    missing = {student["name"] for student in students} - {folder.name for folder in folders}
    if missing:
        raise UserError(
            f"model={path}: no students/{min(missing)}, and no ensemble without it: recipes/export.py writes it"
        )
    loaded = {f"{path.resolve().name}-{folder.name}": load_model(folder) for folder in folders}
    tokenizers = [tokenizer for _, tokenizer in loaded.values()]
    if len({tokenizer.hash for tokenizer in tokenizers}) > 1:
        raise UserError(f"model={path}: its students have different tokenizers: score them one by one")
    return {name: model for name, (model, _) in loaded.items()}, tokenizers[0]


def omega_of(path: Path) -> list[float] | None:
    """Returns the weights ω of a run's students in their ensemble, by their names in order; None where all are equal.

    Raises UserError where a weighted run's students were exported without their weights.
    """
    if (path / "students" / OMEGA).is_file():
        weights = json.loads((path / "students" / OMEGA).read_text())
        return [weights[name] for name in sorted(weights)]
    settings = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    if settings.get("objective", {}).get("weighted"):
        raise UserError(f"model={path}: its students have weights, and {OMEGA} is missing: recipes/export.py writes it")
    return None


def write_scores(folder: Path, model: str, scores: Sequence[TaskScore], provenance: Mapping[str, Any]) -> None:
    """Writes scores.json, scores.csv and scores.svg. Raises UserError where the disk refuses."""
    tasks = [{**asdict(t), "mean": asdict(t.mean), "phenomena": [asdict(p) for p in t.phenomena]} for t in scores]
    content = {"model": model, **provenance, "tasks": tasks}
    try:
        write_text(folder / "scores.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        with written_aside(folder / "scores.csv") as aside, aside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "task", *(column.name for column in fields(SetScore))))
            for task in scores:
                writer.writerows((model, task.task, *astuple(set_score)) for set_score in (*task.sets, task.mean))
        with written_aside(folder / "scores.svg") as aside:
            draw_scores(aside, model, scores)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error}): make room and score again") from None


def score_table(scores: Mapping[str, Sequence[TaskScore]], *, sets: bool) -> str:
    """Returns every model's scores in per cent as plain text: those of all sets, or only the tasks' means."""
    rows: list[Sequence[str]] = [("", "items", "score", "±", "strict", "chance", "no model")]
    columns = ("score", "standard_error", "strict_score", "chance", "baseline")
    for model, tasks in scores.items():
        rows.append((model, *[""] * 6))
        for task in tasks:
            for set_score in (*(task.sets if sets and len(task.sets) > 1 else ()), task.mean):
                name = f"    {set_score.name}" if set_score in task.sets else f"  {task.task}"
                numbers = (getattr(set_score, column) for column in columns)
                percents = ("–" if number is None else f"{100 * number:.2f}" for number in numbers)
                rows.append((name, f"{set_score.items:,}", *percents))
    return "\n".join(align_columns(rows))


def draw_scores(path: Path, model: str, scores: Sequence[TaskScore]) -> None:
    """Writes an SVG with each set's score and its standard error, and a tick at the score of random answers."""
    bars: list[SetScore] = []
    for task in scores:
        bars += [*sorted(task.sets, key=lambda bar: -bar.score), replace(task.mean, name=f"{task.task}, mean")]
    rows = range(len(bars))
    with mpl.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 1 + 0.2 * len(bars)))
        axes = figure.subplots()
        axes.errorbar([bar.score for bar in bars], rows, xerr=[bar.standard_error for bar in bars], fmt="o")
        axes.plot([bar.chance for bar in bars], rows, "|", color="grey")
        axes.set_yticks(rows, [bar.name for bar in bars])
        axes.invert_yaxis()
        axes.set_title(model)
        figure.savefig(path, format="svg", bbox_inches="tight")
