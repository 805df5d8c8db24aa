"""What a run would take, without allocating any of it: parameters, tokens, steps, FLOPs, memory of a rank.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary.
"""

import json
from pathlib import Path

import torch

from engine.checks import check, steps_of
from engine.cohort import LARGEST_BUCKET
from engine.config import Config, DataConfig, build, read_yaml
from engine.export import shape_of_folder
from engine.flops import training_a_token
from engine.metrics import format_count
from engine.models.families import Shape, parameter_count, shape_of
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape
from engine.teachers import folder_of

TOKENS_A_WORD = 1.4  # of English at 16,000 pieces; only where the text is not prepared
BYTES_A_WORD = 5.4
LOGITS = {"cpu": 96 * 2**20, "cuda": 2**30}  # bytes of them at a time, at most (kernels.ops.linear_ensemble_kl)
RANKS = (1, 2, 4, 8)


def report(config: Config, beside: Path) -> str:
    """A table as text.

    Args:
        beside: the folder of the YAML, where the recipes of teachers are that have not been trained yet.

    Raises ValueError for settings that a run would refuse, but for teachers that are not there.
    """
    check(config, teachers=False)
    vocabulary = config.data.tokenizer.pieces or (1000 if config.data.path == "grammar" else 16000)
    students = {student.name: shape_of(student, vocabulary) for student in config.students}
    teachers = {teacher.path: teacher_shape(config, i, vocabulary, beside) for i, teacher in enumerate(config.teachers)}
    known, exact = training_tokens(config.data)
    length, chunks = config.train.length, -(-known // config.train.length)
    steps = steps_of(config, chunks)
    tokens = steps * config.train.batch * length
    learning = sum(training_a_token(shape, length) for shape in students.values()) * tokens
    seen = min(known, tokens) if config.cache is not None else tokens
    teaching = sum(training_a_token(shape, length) // 3 for shape in teachers.values()) * seen
    about = "" if exact or config.train.epochs is None else "about "
    kind = "cuda" if torch.cuda.is_available() else "cpu"

    lines = [
        f"{kind} {name}: {parameter_count(shape):,} parameters, {_described(shape)}"
        for kind, models in (("student", students), ("teacher", teachers))
        for name, shape in models.items()
    ]
    lines += [
        f"steps: {about}{steps:,} of {config.train.batch} × {length} tokens",
        f"tokens: {about}{tokens:,}, {tokens / known:.2f} times the text ({'' if exact else 'about '}{known:,})",
        f"FLOPs: {about}{learning + teaching:.3g}, the teachers' part {teaching:.3g}",
        f"memory of a rank, GiB, {config.train.precision}, micro-batch as below (an estimate of tensors; allocator "
        "and libraries beside them)",
        "  ".join(["ranks".rjust(8), "micro".rjust(6), *(f"ZeRO {stage}".rjust(8) for stage in range(4))]),
    ]
    for ranks in RANKS:
        if config.train.batch % ranks:
            continue
        share = config.train.batch // ranks
        micro = min(share, config.train.micro_batch or share)
        needed = [memory(config, students, teachers, micro * length, ranks, stage, kind) for stage in range(4)]
        cells = [f"{bytes_ / 2**30:8.2f}" for bytes_ in needed]
        if config.train.precision == "bf16":
            cells[0] = "–".rjust(8)  # refused (engine.checks)
        lines.append("  ".join([str(ranks).rjust(8), str(micro).rjust(6), *cells]))
    return "\n".join(lines)


def memory(
    config: Config,
    students: dict[str, Shape],
    teachers: dict[str, Shape],
    tokens: int,
    ranks: int,
    stage: int,
    kind: str = "cpu",
) -> float:
    """Bytes of tensors at a step's peak, of one of `ranks` that takes `tokens` at once, on devices of this `kind`.

    A peak is where the loss is, with all that the bodies keep, or at the end, with every gradient.
    """
    train, shapes = config.train, students.values()
    storage, sizes = 2 if train.precision == "bf16" else 4, [parameter_count(shape) for shape in shapes]
    buckets = [min(size, LARGEST_BUCKET) for size in sizes]
    kept = sum(sizes) * storage / (ranks if stage == 3 else 1)  # weights
    kept += sum(sizes) * (8 if stage == 0 else 12 / ranks)  # moments; ZeRO has fp32 weights beside them
    if stage == 3:  # gradients, before and after they are shared out; weights that stay gathered
        kept += storage * (sum(buckets) + sum(sizes) / ranks + (sum(buckets) if ranks > 1 else 0))
    gradients = storage * sum(sizes) if stage < 3 else 0
    flat = storage * max(buckets) if stage > 0 or ranks > 1 else 0  # one student's, on their way to the other ranks

    there = {} if config.cache is not None else teachers
    R = len(shapes) + (len(there) if config.objective.mix == "each" else min(1, len(there)))
    at_loss = min(LOGITS[kind], 4.0 * tokens * R * max(shape.vocabulary for shape in shapes))
    for shape in shapes:
        layers = 1 if train.recompute else shape.layers
        ends = 2 * shape.hidden * shape.layers if train.recompute else 0
        at_loss += tokens * storage * (layers * activations(shape, train.length) + ends + 4 * shape.hidden)
        at_loss += 4 * shape.vocabulary * shape.hidden  # the head's gradient, summed in fp32
    if tokens * ranks < train.batch * train.length:  # of micro-batches before
        at_loss += gradients
    for shape in there.values():
        at_loss += tokens * storage * (activations(shape, train.length) + shape.hidden)
    of_teachers = storage * sum(parameter_count(shape) for shape in there.values())
    return kept + of_teachers + max(at_loss, gradients + flat)


def activations(shape: Shape, length: int) -> int:
    """Elements that a layer keeps for its backward pass, per token: what enters each product and each nonlinearity."""
    if isinstance(shape, LlamaShape):
        return 7 * shape.hidden + 2 * shape.kv_heads * shape.head_width + 3 * shape.ffn
    attention = 3 * shape.heads * length if shape.dropout else 0  # its weights before and after dropout, and the mask
    return (10 if shape.dropout else 8) * shape.hidden + 2 * shape.ffn + attention


def training_tokens(data: DataConfig) -> tuple[int, bool]:
    """Tokens of the training split, and whether that is known rather than guessed from its words or bytes."""
    path = Path(data.path)
    if (path / "manifest.json").is_file():
        return json.loads((path / "manifest.json").read_text())["splits"]["train"]["tokens"], True
    words = data.words or 10**6
    if path.is_dir():
        there = sum(file.stat().st_size for kind in ("*.txt", "*.train") for file in path.glob(kind)) / BYTES_A_WORD
        words = min(int(there), data.words or int(there))
    return int(words * (1 - data.validation) * TOKENS_A_WORD), False


def teacher_shape(config: Config, number: int, vocabulary: int, beside: Path) -> Shape:
    """From the teacher's folder or, before it is trained, from the recipe beside this one that makes it."""
    teacher = config.teachers[number]
    if Path(teacher.path).is_dir():
        return shape_of_folder(folder_of(teacher), f"teachers: {teacher.path}")
    for recipe in sorted(beside.glob("*.yaml")):
        settings = read_yaml(recipe)
        if not isinstance(settings.get("students"), list):  # it does not train
            continue
        other = build(Config, settings)
        for student in other.students:
            run = Path(other.run.folder) / other.run.name
            if Path(teacher.path) in (run, run / "students" / student.name):
                return shape_of(student, vocabulary)
    raise ValueError(f"teachers: {teacher.path}: no such folder, and no recipe in {beside} makes it; train it first")


def _described(shape: Shape) -> str:
    family = {LlamaShape: "LLaMA", GPT2Shape: "GPT-2", RobertaShape: "RoBERTa"}[type(shape)]
    sizes = f"{shape.layers} layers × {shape.hidden}, {shape.heads} heads, {shape.ffn} inner"
    return f"{family}, {sizes}, {shape.vocabulary:,} pieces ({format_count(parameter_count(shape))})"
