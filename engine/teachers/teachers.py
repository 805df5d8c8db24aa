"""Frozen teachers: models that every rank holds whole, in the storage dtype, outside any DeepSpeed engine.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary, K teacher streams.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config.settings import Config, TeacherConfig
from engine.data.batches import Batch, Step
from engine.data.tokenizer import Tokenizer
from engine.models.base import LanguageModel
from engine.models.compiled import compile_body
from engine.models.huggingface import load_model, require_folder
from engine.students.stopwatch import Stopwatch
from engine.system.errors import UserError
from engine.system.files import sha256
from kernels import Projected, TopK

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def teacher_streams(config: Config) -> tuple[list[str], list[float]]:
    """Returns the names and the weights of the K teacher streams; the weights sum to 1.

    A teacher's name is its folder's; where two folders have the same name, it is the whole path.
    """
    paths = [teacher.path for teacher in config.teachers]
    names = [Path(path).resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else paths
    if config.objective.mix == "logits" and names:
        return ["+".join(names)], [1.0]
    return names, teacher_shares(config)


def teacher_shares(config: Config) -> list[float]:
    """Returns the weights of the teachers themselves, scaled to sum to 1."""
    total = sum(teacher.weight for teacher in config.teachers)
    return [teacher.weight / total for teacher in config.teachers]


class Teachers:
    """K streams of predictions for a batch, without gradient: one per model, or one of all models together."""

    def __init__(
        self, names: list[str], weights: list[float], models: Sequence[LanguageModel], shares: Sequence[float]
    ) -> None:
        """Freezes the models. `names` and `weights` are as `teacher_streams` gives them.

        With one name for several models, their stream is the mean of their raw logits weighted by `shares` (Timiryasov
        & Tastet 2023). Its head is the concatenation of theirs: [ω₁h₁|ω₂h₂]·[W₁|W₂]ᵀ = ω₁h₁W₁ᵀ + ω₂h₂W₂ᵀ. The models'
        own heads become views of it, so that it is held once.
        """
        self.names, self.weights = names, weights
        self._models = [model.eval().requires_grad_(False) for model in models]
        self._shares = shares
        self._mean_head: tuple[Tensor, Tensor | None] | None = None
        self.clock = Stopwatch(models[0].head.device if models else torch.device("cpu"))
        if len(names) < len(models):
            biases = [w * m.head_bias for w, m in zip(shares, models, strict=True) if m.head_bias is not None]
            weight_VD = torch.cat([model.head for model in models], dim=1)
            for model, part_VD in zip(models, weight_VD.split([m.shape.hidden for m in models], dim=1), strict=True):
                model.head.data = part_VD
            self._mean_head = weight_VD, torch.stack(biases).sum(0) if biases else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sequence[Projected | TopK]:
        """Returns the K streams over the batch's rows."""
        with self.clock.running():
            hidden = [model(batch.tokens_BL, batch.rows_N) for model in self._models]
        if self._mean_head is not None:
            weighted = [w * hidden_ND for w, hidden_ND in zip(self._shares, hidden, strict=True)]
            return [Projected(torch.cat(weighted, dim=1), *self._mean_head)]
        return [model.project(hidden_ND) for model, hidden_ND in zip(self._models, hidden, strict=True)]

    def read_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yields the steps as they are. Cached teachers add their predictions (engine.teachers.cache)."""
        return steps


def folder_of(teacher: TeacherConfig) -> Path:
    """Returns the Hugging Face folder that `teacher.path` names; UserError where it names none, or it is not whole."""
    path, key = Path(teacher.path), f"teachers: {teacher.path}"
    students = sorted(folder.parent for folder in path.glob("students/[!.]*/config.json"))
    if (path / "config.json").is_file() or not students:
        return require_folder(path, key)
    if len(students) > 1:
        raise UserError(f"{key} is a run of {len(students)} students: name one of them, such as {students[0]}")
    return require_folder(students[0], key)


def load_teachers(config: Config, tokenizer: Tokenizer, device: torch.device) -> Teachers:
    """Returns the teachers of `config`, ready to predict.

    Raises UserError for a folder that is not whole or holds an unknown architecture, another tokenizer or vocabulary
    than the data's, weights that are not finite, or a model that reads shorter sequences than the students.
    """
    models = []
    for teacher in config.teachers:
        key = f"teachers: {teacher.path}"
        model, _ = load_model(folder_of(teacher), key, tokenizer=tokenizer, dtype=STORAGE[config.train.precision])
        if model.shape.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{key}: its vocabulary has {model.shape.vocab_size} tokens, the data's tokenizer "
                f"{tokenizer.vocab_size}: streams of one loss share a vocabulary; take a model that was trained with "
                "this tokenizer"
            )
        if model.shape.causal == config.masked:
            predicts = {True: "the next token", False: "masked tokens"}
            raise UserError(
                f"{key} predicts {predicts[model.shape.causal]}, and the students {predicts[not config.masked]}: take "
                "a teacher that predicts what they do"
            )
        if model.shape.max_length < config.train.length:
            raise UserError(
                f"{key} reads at most {model.shape.max_length} tokens, fewer than train.length={config.train.length}: "
                "lower it"
            )
        models.append(model.to(device))
        if config.train.compile and config.cache is None:  # What is kept does not depend on how it was computed.
            compile_body(models[-1], learns=False)
    return Teachers(*teacher_streams(config), models, teacher_shares(config))


def hash_teachers(config: Config) -> tuple[str, ...]:
    """Returns one hash per teacher, over every file that affects its predictions."""
    hashes = []
    for folder in map(folder_of, config.teachers):
        parts = (bytes.fromhex(sha256(folder / name)) for name in ("config.json", "model.safetensors"))
        hashes.append(hashlib.sha256(b"".join(parts)).hexdigest())
    return tuple(hashes)
