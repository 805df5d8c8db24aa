"""What a run would take, without allocating any of it: parameters, tokens, steps, FLOPs, memory of a rank."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.compute.flops import Workload, inference, training_per_token
from engine.compute.hardware import peak_flops
from engine.compute.memory import peak_memory
from engine.config.loading import build, read_yaml
from engine.config.settings import Config, DataConfig
from engine.data.masking import PREDICTED_SHARE
from engine.models.base import Shape
from engine.models.families import parameter_count, shape_of
from engine.models.huggingface import shape_of_folder
from engine.run.check_settings import check, number_of_steps
from engine.system.errors import UserError
from engine.system.formatting import format_count
from engine.teachers.teachers import STORAGE, folder_of, stream_window

TOKENS_PER_WORD = 1.4  # of English with a vocabulary of 16,000; read only where the text is not prepared
BYTES_PER_WORD = 5.4
RANKS = (1, 2, 4, 8)


def describe_run(config: Config, recipes: Path) -> str:
    """Returns a table as text; `recipes` is the folder with the recipes of teachers that have not been trained yet.

    Raises UserError for settings that a run would refuse, but for teachers that are not there.
    """
    check(config, teachers=False)
    vocab_size = config.data.tokenizer.vocab_size or (1000 if config.data.path == "grammar" else 16000)
    students = {student.name: shape_of(student, vocab_size) for student in config.students}
    paths = [teacher.path for teacher in config.teachers]
    names = [path if paths.count(path) == 1 else f"{path} (number {i})" for i, path in enumerate(paths)]
    teachers = {name: teacher_shape(config, i, vocab_size, recipes) for i, name in enumerate(names)}
    text_tokens, exact = training_tokens(config.data)
    length = config.train.length
    steps = number_of_steps(config, chunks=-(-text_tokens // length))
    tokens = steps * config.train.batch * length
    student_flops = sum(training_per_token(shape, length) for shape in students.values()) * tokens
    cost = _teacher_cost(config, list(teachers.values()), text_tokens, steps * config.train.batch)
    teacher_flops = cost.live if config.cache is None else cost.filling + cost.heads
    flops, epochs = student_flops + teacher_flops, tokens / text_tokens
    about = "" if exact or config.train.epochs is None else "about "
    cache = [] if config.cache is None else _cache_lines(cost, flops, text_tokens, epochs, config)
    return "\n".join(
        [
            *(f"student {name}: {_description(shape)}" for name, shape in students.items()),
            *(f"teacher {name}: {_description(shape)}" for name, shape in teachers.items()),
            f"steps: {about}{steps:,} of {config.train.batch} × {length} tokens",
            f"tokens: {about}{tokens:,}, {epochs:.2f} times the text ({'' if exact else 'about '}{text_tokens:,})",
            f"FLOPs: {about}{flops:.3g}, the teachers' part {teacher_flops:.3g}",
            *cache,
            f"memory of a rank, GiB, {config.train.precision}, micro-batch as below (an estimate of tensors; allocator "
            "and libraries beside them)",
            *_memory_table(config, students, teachers),
        ]
    )


@dataclass(frozen=True)
class _TeacherCost:
    """Model FLOPs of the teachers' part in a run."""

    live: int  # all passes, where there is no cache
    filling: int  # of the bodies, to compute the states of the whole text once
    heads: int  # of the products with the heads, which every step does
    bytes_per_token: int  # of the hidden states in a cache


def _teacher_cost(config: Config, shapes: Sequence[Shape], text_tokens: int, sequences: int) -> _TeacherCost:
    """Returns the teachers' part in a run that reads so many sequences of a text of so many tokens."""
    live = filling = heads = bytes_per_token = 0
    length, tokens = config.train.length, sequences * config.train.length
    itemsize = STORAGE[config.train.precision].itemsize
    for teacher, shape in zip(config.teachers, shapes, strict=True):
        windows, window, kept = sequences, length, length
        if teacher.context == "stream":
            window = stream_window(config, teacher, shape)
            kept = window // 2
            windows *= -(-length // kept) + (config.train.chunks == "random" or length % kept > 0)
        rows = tokens if shape.causal else round(tokens * PREDICTED_SHARE)
        live += inference(shape, Workload(windows, window, rows, rows, tokens)).model
        filling += inference(shape, Workload(-(-text_tokens // kept), window, rows=0, valid=0, tokens=0)).model
        heads += inference(shape, Workload(0, window, rows, rows, tokens)).model
        int8 = config.cache is not None and config.cache.dtype == "int8"
        bytes_per_token += shape.hidden + 4 if int8 else shape.hidden * itemsize
    return _TeacherCost(live, filling, heads, bytes_per_token)


def _cache_lines(cost: _TeacherCost, total: int, text_tokens: int, epochs: float, config: Config) -> list[str]:
    """Returns what the cache takes and what it saves beside live teachers; `total` is the run's FLOPs with it."""
    size = cost.bytes_per_token * text_tokens / 2**30
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, STORAGE[config.train.precision])
    saved = cost.live - cost.filling - cost.heads
    hours = "" if peak is None else f", {abs(saved) / peak / 3600:,.1f} hours at this device's {peak:.2g} FLOP/s"
    does = f"saves {saved:.3g} of {total + saved:.3g} FLOPs" if saved > 0 else f"costs {-saved:.3g} FLOPs more"
    pays_from = int(epochs * cost.filling / (cost.live - cost.heads)) + 1
    return [
        f"cache: {size:.2f} GiB, {cost.bytes_per_token:,} bytes a token of text; {cost.filling:.3g} FLOPs to fill it",
        f"cache: beside live teachers it {does}{hours}; it pays from epoch {pays_from} on",
    ]


def _memory_table(config: Config, students: dict[str, Shape], teachers: dict[str, Shape]) -> list[str]:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    # With a cache the bodies of those that read fixed chunks are there in the first epoch.
    streaming = [name for name, teacher in zip(teachers, config.teachers, strict=True) if teacher.context == "stream"]
    heads_only = [] if config.cache is None else streaming
    lines = ["  ".join(["ranks".rjust(8), "micro".rjust(6), *(f"ZeRO {stage}".rjust(8) for stage in range(4))])]
    for ranks in (number for number in RANKS if config.train.batch % number == 0):
        share = config.train.batch // ranks
        micro_batch = min(share, config.train.micro_batch or share)
        tokens = micro_batch * config.train.length
        needed = [
            peak_memory(config, students, teachers, tokens, ranks, stage, kind, heads_only=heads_only)
            for stage in range(4)
        ]
        cells = [f"{bytes_ / 2**30:8.2f}" for bytes_ in needed]
        if config.train.precision == "bf16":
            cells[0] = "–".rjust(8)  # engine.run.check_settings refuses it.
        lines.append("  ".join([str(ranks).rjust(8), str(micro_batch).rjust(6), *cells]))
    return lines


def training_tokens(data: DataConfig) -> tuple[int, bool]:
    """Returns the tokens of the training split, and whether they are counted, not guessed from words or bytes."""
    path = Path(data.path)
    if (path / "manifest.json").is_file():
        return json.loads((path / "manifest.json").read_text())["splits"]["train"]["tokens"], True
    words = data.words or 10**6
    if path.is_dir():
        sizes = (file.stat().st_size for kind in ("*.txt", "*.train") for file in path.glob(kind))
        available = int(sum(sizes) / BYTES_PER_WORD)
        words = min(available, data.words or available)
    return int(words * (1 - data.validation) * TOKENS_PER_WORD), False


def teacher_shape(config: Config, number: int, vocab_size: int, recipes: Path) -> Shape:
    """Returns a teacher's shape from its folder or, before it is trained, from the recipe that makes it."""
    teacher = config.teachers[number]
    if Path(teacher.path).is_dir():
        return shape_of_folder(folder_of(teacher), f"teachers: {teacher.path}")
    for recipe in sorted(recipes.glob("*.yaml")):
        settings = read_yaml(recipe)
        if not isinstance(settings.get("students"), list):  # It does not train.
            continue
        other = build(Config, settings)
        for student in other.students:
            run = Path(other.run.folder) / other.run.name
            if Path(teacher.path) in (run, run / "students" / student.name):
                return shape_of(student, vocab_size)
    raise UserError(f"teachers: {teacher.path}: no such folder, and no recipe in {recipes} makes it; train it first")


def _description(shape: Shape) -> str:
    parameters = parameter_count(shape)
    sizes = f"{shape.layers} layers × {shape.hidden}, {shape.heads} heads, {shape.ffn} inner"
    vocabulary = f"vocabulary {shape.vocab_size:,} ({format_count(parameters)})"
    return f"{parameters:,} parameters, {shape.title}, {sizes}, {vocabulary}"
