"""What a step needs of memory, estimated from shapes.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary, R streams.
"""

from engine.config.settings import Config
from engine.models.base import Shape
from engine.models.families import parameter_count
from engine.students.zero import LARGEST_BUCKET

LOGITS = {"cpu": 96 * 2**20, "cuda": 2**30}  # the most bytes of logits at a time (kernels.ops.linear_ensemble_kl)


def peak_memory(
    config: Config,
    students: dict[str, Shape],
    teachers: dict[str, Shape],
    tokens: int,
    ranks: int,
    stage: int,
    kind: str = "cpu",
) -> float:
    """Returns the bytes of tensors at a step's peak, on one rank.

    The peak is at the loss, with all that the bodies keep, or at the end, with every gradient.

    Args:
        tokens: what the rank takes at once.
        ranks: their number. stage: ZeRO's.
        kind: of the devices, "cpu" or "cuda".
    """
    train, shapes = config.train, students.values()
    storage, sizes = 2 if train.precision == "bf16" else 4, [parameter_count(shape) for shape in shapes]
    buckets = [min(size, LARGEST_BUCKET) for size in sizes]
    kept = sum(sizes) * storage / (ranks if stage == 3 else 1)  # weights
    kept += sum(sizes) * (8 if stage == 0 else 12 / ranks)  # moments; ZeRO has fp32 weights beside them
    if stage == 3:  # gradients before and after they are shared out; weights that stay gathered
        kept += storage * (sum(buckets) + sum(sizes) / ranks + (sum(buckets) if ranks > 1 else 0))
    gradients = storage * sum(sizes) if stage < 3 else 0
    flat = storage * max(buckets) if stage > 0 or ranks > 1 else 0  # one student's, on their way to the other ranks

    live = {} if config.cache is not None else teachers
    streams = len(shapes) + (len(live) if config.objective.mix == "each" else min(1, len(live)))
    at_loss = min(LOGITS[kind], 4.0 * tokens * streams * max(shape.vocab_size for shape in shapes))
    for shape in shapes:
        layers = 1 if train.recompute else shape.layers
        block_inputs = 2 * shape.hidden * shape.layers if train.recompute else 0
        at_loss += tokens * storage * (layers * activations(shape, train.length) + block_inputs + 4 * shape.hidden)
        at_loss += 4 * shape.vocab_size * shape.hidden  # the head's gradient, summed in fp32
    if tokens * ranks < train.batch * train.length:
        at_loss += gradients  # of earlier micro-batches
    for shape in live.values():
        at_loss += tokens * storage * (activations(shape, train.length) + shape.hidden)
    teacher_weights = storage * sum(parameter_count(shape) for shape in live.values())
    return kept + teacher_weights + max(at_loss, gradients + flat)


def activations(shape: Shape, length: int) -> int:
    """Returns the elements that a block keeps per token for its backward pass: what enters each product and each
    nonlinearity."""
    if shape.mlp_matrices == 3:
        return 7 * shape.hidden + 2 * shape.kv_hidden + 3 * shape.ffn
    attention = 3 * shape.heads * length if shape.dropout else 0  # its weights before and after dropout, and the mask
    return (10 if shape.dropout else 8) * shape.hidden + 2 * shape.ffn + attention
