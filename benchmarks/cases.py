"""The configurations that are measured: runs as recipes have them, with random text and random models, and grids.

Text, students and teachers are written as the engine reads them, so that `engine.train.train` runs unchanged, and peers
read the same Hugging Face folders.

S students, K teachers.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.config.loading import as_dict, build
from engine.config.presets import PRESETS
from engine.config.settings import Config, DataConfig, TokenizerConfig
from engine.data import prepare
from engine.data.tokenizer import BOUNDARY, END, MASK, PAD, UNKNOWN, Tokenizer
from engine.models.base import Shape, initial_weights
from engine.models.families import new_model, shape_of
from engine.models.huggingface import export_model
from engine.system.errors import UserError
from engine.system.files import sha256

SPECIAL = (BOUNDARY, PAD, END, UNKNOWN, MASK)  # The padding token is number 1, as RoBERTas need.
STUDENTS = ("8x256x8x768", "8x256x4x768", "6x320x8x768")  # taken in turn
TEACHERS = ("12x384x6x1024", "8x512x8x1024")
TASKS: dict[str, dict[str, Any]] = {
    "plain": {"objective": {"peer_weight": 0.0}},
    "distil": {"objective": {"peer_weight": 0.0, "ce_weight": 0.5, "teacher_weight": 0.5, "temperature": 2.0}},
    "mutual": {},
}
STREAMS = {"plain": (1, 0), "distil": (1, 2), "mutual": (3, 0)}  # S and K by default
STEPS = 10**6  # more than any measurement takes
SEQUENCES = 1000  # of the training text


@dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    task: str
    config: Config
    vocab_size: int
    backend: str = "auto"  # of the kernels
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        train = self.config.train
        parts = [f"{self.task}, S={len(self.config.students)}, K={len(self.config.teachers)}, V={self.vocab_size}"]
        parts += [f"{train.batch} sequences of {train.length}, {train.precision}"]
        parts += [f"{self.backend} kernels"] if self.backend != "auto" else []
        return ", ".join([*parts, *self.overrides])

    @property
    def student_shapes(self) -> list[Shape]:
        return [shape_of(student, self.vocab_size) for student in self.config.students]


def grid(
    folder: Path,
    tasks: Sequence[str],
    students: Sequence[int],
    teachers: Sequence[int],
    vocabularies: Sequence[int],
    backends: Sequence[str],
    axes: Sequence[str],
    *,
    shapes: Sequence[str] = STUDENTS,
    teacher_shapes: Sequence[str] = TEACHERS,
) -> Iterator[Case]:
    """Yields every combination, and writes text and models into `folder`.

    Raises UserError for what is not a setting or a shape.

    Args:
        students, teachers: S and K; with none the task's own.
        axes: settings of a run with the values they take, such as train.batch=8,16.
    """
    choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in map(_split, axes)]
    for task, vocab_size, backend in itertools.product(tasks, vocabularies, backends):
        streams = itertools.product(students or STREAMS[task][:1], teachers or STREAMS[task][1:])
        for (S, K), overrides in itertools.product(streams, itertools.product(*choices)):
            yield case(folder, task, S, K, vocab_size, backend, overrides, shapes, teacher_shapes)


def _split(axis: str) -> tuple[str, str, str]:
    if "=" not in axis:
        raise UserError(f"{axis!r}: expected key=value[,value...], such as train.batch=8,16")
    return axis.partition("=")


def case(
    folder: Path,
    task: str,
    students: int,
    teachers: int,
    vocab_size: int,
    backend: str = "auto",
    overrides: Sequence[str] = (),
    shapes: Sequence[str] = STUDENTS,
    teacher_shapes: Sequence[str] = TEACHERS,
) -> Case:
    """Returns one configuration of a task, ready to run; UserError for what is not a setting or a shape."""
    settings: dict[str, Any] = {
        **TASKS[task],
        "data": {"path": str(folder / f"text-{vocab_size}")},
        "optimizer": {"schedule": "constant", "warmup": 0},
        "train": {"steps": STEPS, "batch": 8, "length": 128},
        "evaluation": {"every": STEPS, "pairs": "none"},
        "checkpoint": {"every": STEPS},
        "run": {
            "folder": str(folder / "runs"),
            "name": _digest(task, students, teachers, vocab_size, backend, overrides),
        },
        "students": [
            {"name": f"s{i}", "seed": i + 1, "learning_rate": 1e-3, **_shape(shapes[i % len(shapes)])}
            for i in range(students)
        ],
    }
    teacher_settings = [
        {"name": f"t{i}", "seed": 100 + i, **_shape(teacher_shapes[i % len(teacher_shapes)])} for i in range(teachers)
    ]
    config = build(Config, settings, overrides)
    length = config.train.length
    for model in (*settings["students"], *teacher_settings):
        model["max_length"] = max(model.get("max_length", 0), length)
    write_text(folder / f"text-{vocab_size}", vocab_size, SEQUENCES * length + 1)
    tokenizer = prepare.prepare(config.data, log=lambda _: None).tokenizer
    for model in settings["students"]:
        model["init"] = str(write_model(folder, model, vocab_size, tokenizer))
    settings["teachers"] = [
        {"path": str(write_model(folder, model, vocab_size, tokenizer))} for model in teacher_settings
    ]
    return Case(task, build(Config, settings, overrides), vocab_size, backend, tuple(overrides))


def _shape(text: str) -> dict[str, Any]:
    """Returns a model's settings from a preset's name, or from LAYERSxHIDDENxHEADSxFFN[xKV_HEADS]."""
    if text in PRESETS:
        return PRESETS[text]
    sizes = text.split("x")
    if len(sizes) not in (4, 5) or not all(map(str.isdecimal, sizes)):
        raise UserError(f"shape {text!r}: expected LAYERSxHIDDENxHEADSxFFN[xKV_HEADS] or one of {', '.join(PRESETS)}")
    return dict(zip(("layers", "hidden", "heads", "ffn", "kv_heads"), map(int, sizes), strict=False))


def write_model(folder: Path, settings: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer) -> Path:
    """Writes a Hugging Face folder of random weights, unless it exists already, and returns it."""
    (config,) = build(Config, {"students": [dict(settings)]}).students
    # Teachers are told apart by their folders' names.
    path = folder / "models" / _digest(config, vocab_size) / config.name
    if not path.exists():
        shape = shape_of(config, vocab_size)
        model = new_model(shape)
        initial_weights(model, config.layers, config.seed)
        export_model(path, shape, {n: p.detach() for n, p in model.named_parameters()}, tokenizer)
    return path


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def write_text(folder: Path, vocab_size: int, tokens: int) -> None:
    """Writes a prepared folder of random text, unless there is one already with as many tokens.

    Tokens are as frequent as words are (Zipf), so that embeddings are looked up, and their gradients added, as in text.
    """
    manifest = folder / prepare.MANIFEST
    if manifest.exists() and json.loads(manifest.read_text())["splits"]["train"]["tokens"] >= tokens:
        return
    dtype = np.dtype("<u2" if vocab_size <= prepare.SIXTEEN_BITS else "<u4")
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(vocab_size)
    tokenizer.export(folder / "tokenizer")
    token_ids = len(SPECIAL) + np.random.default_rng(0).zipf(1.2, tokens) % (vocab_size - len(SPECIAL))
    for name in ("train", "validation"):
        token_ids.astype(dtype).tofile(folder / f"{name}.bin")
    files = [p for p in folder.rglob("*") if p.is_file() and p != manifest]
    config = DataConfig(path=str(folder), tokenizer=TokenizerConfig(vocab_size=vocab_size, mask=True))
    content = {
        "format": prepare.FORMAT,
        "name": "random",
        "identity": hashlib.sha256(token_ids.tobytes()).hexdigest(),
        "dtype": dtype.name,
        "entropy_per_word": None,
        "splits": {name: {"tokens": tokens, "words": tokens} for name in ("train", "validation")},
        "sha256": {p.relative_to(folder).as_posix(): sha256(p) for p in files},
        "config": as_dict(config),
    }
    manifest.write_text(json.dumps(content))


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer whose vocabulary is the special tokens and words of a few letters."""
    words = [*SPECIAL, "a", *(f"w{i}" for i in range(vocab_size - len(SPECIAL) - 1))]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokens = {"bos_token": BOUNDARY, "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN, "mask_token": MASK}
    return Tokenizer(backend.to_str(), json.dumps(tokens))
