"""A model's, or a whole run's, scores of the tasks that the settings name: computed, printed, and written down.

<folder>/<model>/scores.json   everything
                 scores.csv    a line for every set
                 scores.svg    a plot of the same
"""

import json
from pathlib import Path
from typing import Any

import torch

from engine.config.loading import as_dict, read_yaml
from engine.config.settings import ScoreConfig
from engine.data.tokenizer import Tokenizer
from engine.evaluation import results
from engine.evaluation.finetune import CLASSIFICATION, finetune, read_classification
from engine.evaluation.scoring import model_log_probabilities
from engine.evaluation.tasks import ZERO_SHOT, read_tasks
from engine.evaluation.zero_shot import ZeroShot
from engine.models.base import LanguageModel
from engine.models.huggingface import OMEGA, load_model
from engine.system.distributed import init_distributed
from engine.system.errors import UserError
from engine.system.provenance import git_commit


def score_model(config: ScoreConfig) -> dict[str, list[results.TaskScore]]:
    """Every model's scores, by its name: a run's students and, if they are several, `<run>-ensemble`; collective.

    Raises ValueError for whatever a user can mend, before anything is computed where that can be known before.
    """
    known = (*ZERO_SHOT, *CLASSIFICATION)
    for name in config.tasks:
        if name not in known:
            raise UserError(f"tasks: {name!r} is not known: expected some of {', '.join(known)}")
    tasks = read_tasks([name for name in config.tasks if name in ZERO_SHOT], Path(config.data))
    learnt = [read_classification(name, Path(config.data)) for name in config.tasks if name in CLASSIFICATION]
    models, tokenizer = load_models(Path(config.model))
    masked = any(not model.shape.causal for model in models.values())
    runtime = init_distributed()
    for model in models.values():
        model.to(runtime.device)
    names = [*models, f"{Path(config.model).resolve().name}-ensemble"] if len(models) > 1 else list(models)
    scores: dict[str, list[results.TaskScore]] = {name: [] for name in names}
    if tasks:
        max_length = min(model.shape.max_length for model in models.values())
        share = all(model.shape.shares_prefixes for model in models.values())
        questions = ZeroShot(tasks, tokenizer, runtime, max_length=max_length, share=share, masked=masked)
        with torch.inference_mode():
            log_probabilities = model_log_probabilities(list(models.values()), omega_of(Path(config.model)))
            for name, found in zip(names, questions.scores(log_probabilities), strict=True):
                scores[name] += found
    for name, model in models.items():
        folder = Path(config.folder) / name
        scores[name] += [finetune(task, model, tokenizer, config.finetune, folder, runtime) for task in learnt]
    with runtime.main_process_first():
        if runtime.is_main_process:
            for name, own in scores.items():
                if own:
                    about = {"settings": as_dict(config), "git_commit": git_commit()}
                    results.write(Path(config.folder) / name, name, own, **about)
            print(results.table(scores, sets=len(models) == 1))
    return scores


def load_models(path: Path) -> tuple[dict[str, LanguageModel], Tokenizer]:
    """The model of a Hugging Face folder, by the folder's name; or those of a run, by theirs."""
    if (path / "config.json").is_file():
        model, tokenizer = load_model(path)
        return {path.resolve().name: model}, tokenizer
    folders = sorted(file.parent for file in path.glob("students/[!.]*/config.json"))
    if not folders:
        raise UserError(
            f"model={path}: expected a Hugging Face folder (config.json, model.safetensors, tokenizer.json), or a run "
            "that has exported its students; recipes/export.py does that for one that has not ended"
        )
    missing = {student["name"] for student in _summary(path).get("students", ())} - {folder.name for folder in folders}
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
    """The weights of a run's students in their ensemble, in the order of their names; None: alike.

    Raises ValueError where they were exported without.
    """
    if (path / "students" / OMEGA).is_file():
        weights = json.loads((path / "students" / OMEGA).read_text())
        return [weights[name] for name in sorted(weights)]
    settings = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    if settings.get("objective", {}).get("weighted"):
        raise UserError(f"model={path}: its students have weights, and {OMEGA} is missing: recipes/export.py writes it")
    return None


def _summary(path: Path) -> dict[str, Any]:
    """Of a run that has ended; else, or of a Hugging Face folder, nothing."""
    return json.loads((path / "summary.json").read_text()) if (path / "summary.json").is_file() else {}
