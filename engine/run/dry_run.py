"""What a run would take, without allocating any of it: parameters, tokens, steps, FLOPs, memory of a rank."""

import json
from pathlib import Path

import torch

from engine.compute.flops import training_per_token
from engine.compute.memory import peak_memory
from engine.config.loading import build, read_yaml
from engine.config.settings import Config, DataConfig
from engine.models.base import Shape
from engine.models.families import parameter_count, shape_of
from engine.models.huggingface import shape_of_folder
from engine.run.check_settings import check, number_of_steps
from engine.system.errors import UserError
from engine.system.formatting import format_count
from engine.teachers.teachers import folder_of

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
    teachers = {t.path: teacher_shape(config, i, vocab_size, recipes) for i, t in enumerate(config.teachers)}
    text_tokens, exact = training_tokens(config.data)
    length = config.train.length
    steps = number_of_steps(config, chunks=-(-text_tokens // length))
    tokens = steps * config.train.batch * length
    student_flops = sum(training_per_token(shape, length) for shape in students.values()) * tokens
    predicted = min(text_tokens, tokens) if config.cache is not None else tokens
    teacher_flops = sum(training_per_token(shape, length) // 3 for shape in teachers.values()) * predicted
    about = "" if exact or config.train.epochs is None else "about "
    return "\n".join(
        [
            *(f"student {name}: {_description(shape)}" for name, shape in students.items()),
            *(f"teacher {name}: {_description(shape)}" for name, shape in teachers.items()),
            f"steps: {about}{steps:,} of {config.train.batch} × {length} tokens",
            f"tokens: {about}{tokens:,}, {tokens / text_tokens:.2f} times the text "
            f"({'' if exact else 'about '}{text_tokens:,})",
            f"FLOPs: {about}{student_flops + teacher_flops:.3g}, the teachers' part {teacher_flops:.3g}",
            f"memory of a rank, GiB, {config.train.precision}, micro-batch as below (an estimate of tensors; allocator "
            "and libraries beside them)",
            *_memory_table(config, students, teachers),
        ]
    )


def _memory_table(config: Config, students: dict[str, Shape], teachers: dict[str, Shape]) -> list[str]:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    lines = ["  ".join(["ranks".rjust(8), "micro".rjust(6), *(f"ZeRO {stage}".rjust(8) for stage in range(4))])]
    for ranks in (number for number in RANKS if config.train.batch % number == 0):
        share = config.train.batch // ranks
        micro_batch = min(share, config.train.micro_batch or share)
        tokens = micro_batch * config.train.length
        needed = [peak_memory(config, students, teachers, tokens, ranks, stage, kind) for stage in range(4)]
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
