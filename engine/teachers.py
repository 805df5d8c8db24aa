"""Frozen teachers: models that every rank holds whole, in the storage dtype, outside any DeepSpeed engine.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary, K teacher streams.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.cohort import Stopwatch
from engine.config import Config, TeacherConfig
from engine.data import Batch, Step
from engine.export import load_model, require_folder
from engine.models.compiled import compile_body
from engine.models.families import Model, projected
from engine.models.roberta import Roberta
from engine.tokenizer import Tokenizer
from kernels import Projected, TopK

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def streams_of(config: Config) -> tuple[list[str], list[float]]:
    """Names and weights ω, their sum 1, of the K teacher streams. A teacher's name is its folder's; where two have the
    same, their whole paths."""
    paths = [teacher.path for teacher in config.teachers]
    names = [Path(path).resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else paths
    if config.objective.mix == "logits" and names:
        return ["+".join(names)], [1.0]
    return names, shares_of(config)


def shares_of(config: Config) -> list[float]:
    total = sum(teacher.weight for teacher in config.teachers)
    return [teacher.weight / total for teacher in config.teachers]


class Teachers:
    """K streams of predictions for a batch, without gradient: each model's own, or one of them all."""

    def __init__(
        self, names: list[str], weights: list[float], models: Sequence[Model], shares: Sequence[float]
    ) -> None:
        """`names` and `weights` as `streams_of` gives them. If there is one for several models, it is the mean of their
        raw logits weighted by `shares` (Timiryasov & Tastet 2023), whose head is the concatenation of theirs:
        [ω₁h₁|ω₂h₂]·[W₁|W₂]ᵀ = ω₁h₁W₁ᵀ + ω₂h₂W₂ᵀ. The models' own heads become views of it: it is held once."""
        self.names, self.weights = names, weights
        self._models = [model.eval().requires_grad_(False) for model in models]
        self._mean: tuple[Tensor, Tensor | None] | None = None
        self.clock = Stopwatch(models[0].head.device if models else torch.device("cpu"))
        self._shares = shares
        if len(names) < len(models):
            biases = [w * m.head_bias for w, m in zip(shares, models, strict=True) if isinstance(m, Roberta)]
            weight_VD = torch.cat([model.head for model in models], dim=1)
            for model, part_VD in zip(models, weight_VD.split([m.shape.hidden for m in models], dim=1), strict=True):
                model.head.data = part_VD
            self._mean = weight_VD, torch.stack(biases).sum(0) if biases else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sequence[Projected | TopK]:
        """K streams over the batch's rows."""
        with self.clock.running():
            hidden = [model(batch.tokens_BL, batch.rows_N) for model in self._models]
        if self._mean is not None:
            shared = [w * hidden_ND for w, hidden_ND in zip(self._shares, hidden, strict=True)]
            return [Projected(torch.cat(shared, dim=1), *self._mean)]
        return [projected(model, hidden_ND) for model, hidden_ND in zip(self._models, hidden, strict=True)]

    def ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps as they are; who keeps predictions has more to do (engine.teacher_cache)."""
        return steps


NO_TEACHERS = Teachers([], [], [], [])


def folder_of(teacher: TeacherConfig) -> Path:
    """The Hugging Face folder that `teacher.path` names; ValueError where it names none, or it is not whole."""
    path, key = Path(teacher.path), f"teachers: {teacher.path}"
    students = sorted(folder.parent for folder in path.glob("students/[!.]*/config.json"))
    if not (path / "config.json").is_file() and students:
        if len(students) > 1:
            raise ValueError(f"{key} is a run of {len(students)} students: name one of them, such as {students[0]}")
        path = students[0]
    return require_folder(path, key)


def load_teachers(config: Config, tokenizer: Tokenizer, device: torch.device) -> Teachers:
    """The teachers of `config`, ready to predict.

    Raises ValueError, in one line, for a folder that is not whole or holds an unknown architecture, another tokenizer
    or vocabulary than the data's, weights that are not finite, or fewer positions than the sequences have.
    """
    models = []
    for teacher in config.teachers:
        key = f"teachers: {teacher.path}"
        model, _ = load_model(folder_of(teacher), key, tokenizer=tokenizer, dtype=STORAGE[config.train.precision])
        if model.shape.vocabulary != tokenizer.size:
            raise ValueError(
                f"{key}: its vocabulary has {model.shape.vocabulary} pieces, the data's tokenizer {tokenizer.size}: "
                "streams of one loss share a vocabulary; take the model that was trained with this tokenizer"
            )
        if isinstance(model, Roberta) != config.masked:
            kinds = ("the next token", "masked tokens")
            raise ValueError(
                f"{key} predicts {kinds[not config.masked]}, and the students {kinds[config.masked]}: take a teacher "
                "that predicts what they do"
            )
        if model.shape.positions < config.train.length:
            raise ValueError(
                f"{key} has {model.shape.positions} positions, fewer than train.length={config.train.length}: lower it"
            )
        models.append(model.to(device))
        if config.train.compile and config.cache is None:  # what is kept does not depend on how it was made
            compile_body(models[-1], learns=False)
    return Teachers(*streams_of(config), models, shares_of(config))


def identities(config: Config) -> tuple[str, ...]:
    """Of each teacher: a hash over all that decides what its folder's model predicts."""
    return tuple(_identity(folder_of(teacher)) for teacher in config.teachers)


def _identity(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
