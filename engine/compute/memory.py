"""The memory that a step takes, estimated from shapes."""

from collections.abc import Collection

from engine.config.settings import Config
from engine.models.base import Shape
from engine.models.families import parameter_count
from engine.students.zero import LARGEST_BUCKET

LOGITS = {"cpu": 96 * 2**20, "cuda": 2**30}  # the most bytes of logits at once (kernels.ops.linear_ensemble_kl)


def peak_memory(
    config: Config,
    students: dict[str, Shape],
    teachers: dict[str, Shape],
    tokens: int,
    ranks: int,
    stage: int,
    kind: str = "cpu",
    *,
    heads_only: Collection[str] = (),
) -> float:
    """Returns the bytes of tensors at a step's peak, on one rank.

    The peak is at the loss, where the bodies' activations are kept, or at the end, where every gradient is.

    Args:
        students, teachers: shapes by name.
        tokens: how many the rank takes at once, in one micro-batch.
        kind: of the devices, "cpu" or "cuda".
        heads_only: the names of teachers whose hidden states come from a cache, so that their bodies are not there.
    """
    train, shapes = config.train, students.values()
    storage = 2 if train.precision == "bf16" else 4  # bytes of a weight, a gradient or an activation
    sizes = [parameter_count(shape) for shape in shapes]
    buckets = [min(size, LARGEST_BUCKET) for size in sizes]
    constant = sum(sizes) * storage / (ranks if stage == 3 else 1)  # the weights
    constant += sum(sizes) * (8 if stage == 0 else 12 / ranks)  # AdamW's moments; ZeRO keeps fp32 weights beside them.
    if stage == 3:  # the gradients before and after they are shared out, and the weights that stay gathered
        constant += storage * (sum(buckets) + sum(sizes) / ranks + (sum(buckets) if ranks > 1 else 0))
    gradients = storage * sum(sizes) if stage < 3 else 0
    flat_gradients = storage * max(buckets) if stage > 0 or ranks > 1 else 0  # one student's, on the way to other ranks

    bodies = {name: shape for name, shape in teachers.items() if name not in heads_only}
    streams = len(shapes) + (len(teachers) if config.objective.mix == "each" else min(1, len(teachers)))
    at_loss = min(LOGITS[kind], 4.0 * tokens * streams * max(shape.vocab_size for shape in shapes))
    for shape in shapes:
        layers = 1 if train.recompute else shape.layers
        block_inputs = 2 * shape.hidden * shape.layers if train.recompute else 0
        at_loss += tokens * storage * (layers * _activations(shape, train.length) + block_inputs + 4 * shape.hidden)
        at_loss += 4 * shape.vocab_size * shape.hidden  # the head's gradient, summed in fp32
    if tokens * ranks < train.batch * train.length:
        at_loss += gradients  # of earlier micro-batches
    at_loss += tokens * storage * sum(_activations(shape, train.length) for shape in bodies.values())
    at_loss += tokens * storage * sum(shape.hidden for shape in teachers.values())
    teacher_weights = storage * sum(parameter_count(shape) for shape in bodies.values())
    teacher_weights += storage * sum(teachers[name].hidden * teachers[name].vocab_size for name in heads_only)
    return constant + teacher_weights + max(at_loss, gradients + flat_gradients)


def _activations(shape: Shape, length: int) -> int:
    """Returns the elements per token that a block keeps: what enters each product and each nonlinearity."""
    if shape.mlp_matrices == 3:
        return 7 * shape.hidden + 2 * shape.kv_hidden + 3 * shape.ffn
    attention = 3 * shape.heads * length if shape.dropout else 0  # its weights before and after dropout, and the mask
    return (10 if shape.dropout else 8) * shape.hidden + 2 * shape.ffn + attention
