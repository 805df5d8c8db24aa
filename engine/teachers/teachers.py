"""Frozen teachers: models that every rank holds whole, in the storage dtype, outside any DeepSpeed engine.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary, K teacher streams.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config.loading import build, read_yaml
from engine.config.settings import Config, TeacherConfig
from engine.data.batches import Batch, Step, TokenFile, to_device
from engine.data.tokenizer import Tokenizer
from engine.models.base import LanguageModel, Shape
from engine.models.compiled import compile_body
from engine.models.huggingface import load_model, require_folder
from engine.students.stopwatch import Stopwatch
from engine.system.errors import UserError
from engine.system.files import sha256
from engine.teachers.windows import Windows
from kernels import Projected

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def teacher_names(config: Config) -> list[str]:
    """Returns one name per teacher: its folder's or, where two folders have the same name, the whole path."""
    paths = [teacher.path for teacher in config.teachers]
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths


def teacher_streams(config: Config) -> tuple[list[str], list[float]]:
    """Returns the names and the weights of the K teacher streams; the weights sum to 1."""
    names = teacher_names(config)
    if config.objective.mix == "logits" and names:
        return ["+".join(names)], [1.0]
    return names, teacher_shares(config)


def teacher_shares(config: Config) -> list[float]:
    """Returns the weights of the teachers themselves, scaled to sum to 1."""
    total = sum(teacher.weight for teacher in config.teachers)
    return [teacher.weight / total for teacher in config.teachers]


class Teacher:
    """A frozen model: its body, which computes hidden states, and its head."""

    def __init__(self, model: LanguageModel, windows: Windows | None = None) -> None:
        """Freezes the model. Without `windows`, or with those of fixed chunks, it reads what the students read."""
        self.model: LanguageModel | None = model.eval().requires_grad_(False)  # None: the body has been freed.
        self.shape, self.head, self.head_bias = model.shape, model.head, model.head_bias
        self.windows = windows

    def states(self, batch: Batch) -> Tensor:
        """Returns the hidden states [N, D] of the batch's rows, and computes them."""
        assert self.model is not None
        if self.windows is None or not self.windows.stream:
            return self.model(batch.tokens_BL, batch.rows_N)
        pieces = self.windows.pieces(batch.begins)
        blocks = sorted({piece.block for piece in pieces})
        computed = dict(zip(blocks, self.states_of_blocks(blocks), strict=True))
        return torch.cat([computed[piece.block][piece.start : piece.stop] for piece in pieces])

    def states_of_blocks(self, blocks: Sequence[int]) -> list[Tensor]:
        """Returns the hidden states of each block, [block length, D], and computes them."""
        assert self.model is not None
        assert self.windows is not None
        states, size = [], self.windows.at_once
        for first in range(0, len(blocks), size):
            group = list(blocks[first : first + size])
            windows_BW = torch.from_numpy(self.windows.read(group + [group[-1]] * (size - len(group))))
            hidden_BWD = self.model(to_device(windows_BW, self.head.device)).view(*windows_BW.shape, -1)
            for hidden_WD, block in zip(hidden_BWD, group, strict=False):
                kept = self.windows.first_kept(block)
                states.append(hidden_WD[kept : kept + self.windows.block_length])
        return states

    def reads(self, batch: Batch) -> tuple[int, int]:
        """Returns how many sequences, and of which length, the model reads for the batch."""
        if self.windows is None or not self.windows.stream:
            sequences, length = batch.tokens_BL.shape
            return sequences, length
        blocks, size = len({piece.block for piece in self.windows.pieces(batch.begins)}), self.windows.at_once
        return -(-blocks // size) * size, self.windows.length

    def share_head(self, head_VD: Tensor) -> None:
        """Takes a view of a larger head in place of the teacher's own, which has the same numbers."""
        self.head = head_VD
        if self.model is not None:
            self.model.head.data = head_VD


class Teachers:
    """K streams of predictions for a batch, without gradient: one per teacher, or one of all teachers together."""

    cached = False  # whether the teachers' hidden states come from a cache

    def __init__(
        self, names: list[str], weights: list[float], teachers: Sequence[Teacher], shares: Sequence[float]
    ) -> None:
        """`names` and `weights` are as `teacher_streams` gives them.

        With one name for several teachers, their stream is the mean of their raw logits weighted by `shares`
        (Timiryasov & Tastet 2023). Its head is the concatenation of theirs: [ω₁h₁|ω₂h₂]·[W₁|W₂]ᵀ = ω₁h₁W₁ᵀ + ω₂h₂W₂ᵀ.
        The teachers' own heads become views of it, so that it is held once.
        """
        self.names, self.weights = names, weights
        self.teachers = list(teachers)
        self._shares = shares
        self._mean_head: tuple[Tensor, Tensor | None] | None = None
        self.clock = Stopwatch(teachers[0].head.device if teachers else torch.device("cpu"))
        if len(names) < len(teachers):
            biases = [w * t.head_bias for w, t in zip(shares, teachers, strict=True) if t.head_bias is not None]
            weight_VD = torch.cat([teacher.head for teacher in teachers], dim=1)
            parts = weight_VD.split([teacher.shape.hidden for teacher in teachers], dim=1)
            for teacher, part_VD in zip(teachers, parts, strict=True):
                teacher.share_head(part_VD)
            self._mean_head = weight_VD, torch.stack(biases).sum(0) if biases else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Projected]:
        """Returns the K streams over the batch's rows."""
        with self.clock.running():
            hidden = [self.states(number, batch) for number in range(len(self.teachers))]
        if self._mean_head is not None:
            weighted = [w * hidden_ND for w, hidden_ND in zip(self._shares, hidden, strict=True)]
            return [Projected(torch.cat(weighted, dim=1), *self._mean_head)]
        return [Projected(h, t.head, t.head_bias) for t, h in zip(self.teachers, hidden, strict=True)]

    def states(self, number: int, batch: Batch) -> Tensor:
        """Returns one teacher's hidden states [N, D] of the batch's rows: those that the batch has, or new ones."""
        states_ND = batch.teacher_states[number] if batch.teacher_states else None
        return self.teachers[number].states(batch) if states_ND is None else states_ND

    def read_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yields the steps as they are. Cached teachers add their hidden states (engine.teachers.cache)."""
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


def load_teachers(config: Config, tokenizer: Tokenizer, file: TokenFile, device: torch.device) -> Teachers:
    """Returns the teachers of `config`, ready to predict the text in `file`; UserError as `load_teacher` raises it."""
    teachers = [load_teacher(config, teacher, tokenizer, file, device) for teacher in config.teachers]
    return Teachers(*teacher_streams(config), teachers, teacher_shares(config))


def load_teacher(
    config: Config,
    teacher: TeacherConfig,
    tokenizer: Tokenizer,
    file: TokenFile,
    device: torch.device,
    *,
    with_body: bool = True,
) -> Teacher:
    """Returns one teacher of `config` on the device; without its body only its head is read.

    Raises UserError for a folder that is not whole or holds an unknown architecture, another tokenizer or vocabulary
    than the data's, weights that are not finite, or a model that reads shorter sequences than it would have to.
    """
    key, dtype = f"teachers: {teacher.path}", STORAGE[config.train.precision]
    model, _ = load_model(folder_of(teacher), key, tokenizer=tokenizer, dtype=dtype, head_only=not with_body)
    _check_shape(config, teacher, model.shape, tokenizer)
    (model if with_body else model.lm_head).to(device)
    if config.train.compile and with_body:
        compile_body(model, learns=False)
    loaded = Teacher(model, windows_of(config, teacher, model.shape, file))
    if not with_body:
        loaded.model = None
    return loaded


def _check_shape(config: Config, teacher: TeacherConfig, shape: Shape, tokenizer: Tokenizer) -> None:
    """Raises UserError where a model of this shape cannot teach the students of `config`."""
    key = f"teachers: {teacher.path}"
    if shape.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{key}: its vocabulary has {shape.vocab_size} tokens, the data's tokenizer {tokenizer.vocab_size}: "
            "streams of one loss share a vocabulary; take a model that was trained with this tokenizer"
        )
    if shape.causal == config.masked:
        predicts = {True: "the next token", False: "masked tokens"}
        raise UserError(
            f"{key} predicts {predicts[shape.causal]}, and the students {predicts[not config.masked]}: take a teacher "
            "that predicts what they do"
        )
    if teacher.context == "chunk" and shape.max_length < config.train.length:
        raise UserError(
            f"{key} reads at most {shape.max_length} tokens, fewer than train.length={config.train.length}: lower it"
        )
    if teacher.window is not None and teacher.window > shape.max_length:
        raise UserError(
            f"{key} reads at most {shape.max_length} tokens, fewer than its window={teacher.window}: lower it"
        )


def windows_of(config: Config, teacher: TeacherConfig, shape: Shape, file: TokenFile) -> Windows:
    """Returns the windows in which a teacher of this shape reads the text in `file`."""
    if teacher.context == "chunk":
        return Windows(file, config.train.length, stream=False)
    return Windows(file, stream_window(config, teacher, shape), stream=True)


def stream_window(config: Config, teacher: TeacherConfig, shape: Shape) -> int:
    """Returns the tokens of a window of a teacher with the context stream.

    By default they are twice the students' length, so that each token has as much context as a student's last one. But
    a window is no longer than the model can read and, where a run made it, no longer than that run's sequences: states
    at positions that were never trained are worth nothing.
    """
    if teacher.window is not None:
        return teacher.window
    longest, path = min(2 * config.train.length, shape.max_length), Path(teacher.path)
    for run in (path, path.parent.parent):  # The teacher is a run, or a folder of its `students`.
        if (run / "students").is_dir() and (run / "config.yaml").is_file():
            longest = min(longest, build(Config, read_yaml(run / "config.yaml")).train.length)
    return max(2, longest - longest % 2)


def hash_teachers(config: Config) -> tuple[str, ...]:
    """Returns one hash per teacher, over every file that affects its predictions."""
    hashes = []
    for folder in map(folder_of, config.teachers):
        parts = (bytes.fromhex(sha256(folder / name)) for name in ("config.json", "model.safetensors"))
        hashes.append(hashlib.sha256(b"".join(parts)).hexdigest())
    return tuple(hashes)
