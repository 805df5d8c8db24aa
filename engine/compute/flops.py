"""Floating-point operations of matrix products, counted from shapes: two for each multiply-add.

Model FLOPs are what the mathematics asks for: every product of the forward pass once and of its gradients twice,
attention for the pairs of positions that see one another. Hardware FLOPs are what is computed: also what the backward
pass forms again, and the pairs that a mask hides. What is no matrix product (looking up embeddings, norms, softmax, the
loss's own arithmetic, the optimizer) counts nothing in either, as is usual (Chowdhery et al. 2022, appendix B). The
head of a model is counted in its loss and is multiplied nowhere else.

B sequences, L positions, N rows to predict, D hidden, V vocabulary, S students.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.settings import OuterConfig
from engine.data.batches import Step
from engine.data.masking import MASKED_SHARE
from engine.models.base import Shape


@dataclass(frozen=True)
class Flops:
    model: int = 0
    hardware: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __sub__(self, other: "Flops") -> "Flops":
        return Flops(self.model - other.model, self.hardware - other.hardware)


@dataclass(frozen=True)
class Workload:
    """The text that a pass reads, over all ranks."""

    sequences: int
    length: int  # tokens of a sequence
    rows: int  # rows that reach the head
    valid: int  # rows that have a target
    tokens: int  # tokens of the text, which are fewer than sequences × length where the text ends

    @classmethod
    def whole(cls, sequences: int, length: int) -> "Workload":
        """Returns the workload in which every position predicts."""
        return cls(sequences, length, *3 * (sequences * length,))

    @classmethod
    def of_step(cls, step: Step, world_size: int) -> "Workload":
        batches = step.micro_batches
        sequences, length = world_size * sum(len(b.tokens_BL) for b in batches), batches[0].tokens_BL.shape[1]
        rows = sequences * length if batches[0].rows_N is None else step.valid_tokens
        return cls(sequences, length, rows, step.valid_tokens, step.tokens)


def training(shape: Shape, work: Workload, *, recompute: bool = False, unfused: bool | None = None) -> Flops:
    """Returns the FLOPs of forward and backward, with the head's part in the loss.

    Args:
        recompute: the backward pass forms every block's activations again, but for the product that ends it where
            nothing behind needs its result.
        unfused: attention multiplies whole squares and keeps them; fused attention leaves out what a mask hides, and
            forms the scores again. None: as the models do, unfused with dropout.
    """
    unfused = shape.dropout > 0 if unfused is None else unfused
    model = 3 * (_body(shape, work) + _head(shape, work.rows))
    hardware = 3 * (_body(shape, work, squares=unfused) + _head(shape, work.rows))
    if not unfused:
        hardware += _scores(shape, work)
    if recompute:
        hardware += _blocks(shape, work, squares=unfused)
        if shape.ends_in_product:
            hardware -= 2 * shape.layers * work.sequences * work.length * shape.ffn * shape.hidden
    return Flops(model, hardware)


def inference(shape: Shape, work: Workload, *, unfused: bool = False) -> Flops:
    """Returns the FLOPs of a forward pass and the head, a teacher's part in a step. Averaging the logits of several
    teachers adds nothing."""
    head = _head(shape, work.rows)
    return Flops(_body(shape, work) + head, _body(shape, work, squares=unfused) + head)


def training_per_token(shape: Shape, length: int) -> int:
    """Returns the model FLOPs of training per token of text, to a whole number. A RoBERTa predicts a share of them."""
    tokens = 20 * length  # 15% of so many is a whole number.
    rows = tokens if shape.causal else round(tokens * MASKED_SHARE)
    return round(training(shape, Workload(20, length, rows, rows, tokens)).model / tokens)


def outer_update(
    shapes: Sequence[Shape], train: Workload, held_out: Workload, config: OuterConfig, divergence: str = "forward"
) -> Flops:
    """Returns the FLOPs of one update of the students' weights (engine.students.hypergradient)."""
    total = sum((_held_out_gradient(shape, held_out, config) for shape in shapes), Flops())
    if config.terms == "direct":
        return total
    students = len(shapes)
    if divergence == "forward":  # S tangents times S probabilities
        products = 2 * students**2 * shapes[0].vocab_size * train.valid
        total += Flops(products, products)
    total += Flops(2 * students**3, 2 * students**3)  # the derivatives weighted by those of the coefficients
    for shape in shapes:  # The primal product, and two for its tangent, in torch's own operations.
        head = 3 * _head(shape, train.valid)
        total += Flops(3 * _body(shape, train) + head, 3 * _body(shape, train, squares=True) + head)
    return total


def _held_out_gradient(shape: Shape, work: Workload, config: OuterConfig) -> Flops:
    body, head = _body(shape, work), _head(shape, work.rows)
    if config.terms == "direct":  # a forward pass, and the gradient of the mixed head
        return Flops(body + 2 * head, body + 2 * head)
    return Flops(3 * (body + head), 3 * (body + head) + _scores(shape, work))


def _body(shape: Shape, work: Workload, *, squares: bool = False) -> int:
    """A forward pass up to the hidden state."""
    head_matrices = 2 * shape.head_matrices * work.rows * shape.hidden**2
    return _blocks(shape, work, squares=squares) + head_matrices


def _blocks(shape: Shape, work: Workload, *, squares: bool) -> int:
    mlp = shape.mlp_matrices * shape.hidden * shape.ffn
    weights = 2 * shape.hidden * (shape.hidden + shape.kv_hidden) + mlp
    linear = 2 * shape.layers * work.sequences * work.length * weights
    return linear + 2 * _scores(shape, work, squares=squares)


def _scores(shape: Shape, work: Workload, *, squares: bool = False) -> int:
    """One of attention's two products, over the pairs of positions that see one another."""
    length = work.length
    pairs = length * (length + 1) // 2 if shape.causal and not squares else length**2
    return 2 * shape.layers * work.sequences * pairs * shape.hidden


def _head(shape: Shape, rows: int) -> int:
    return 2 * rows * shape.hidden * shape.vocab_size
