"""Floating-point operations of matrix products, counted from shapes: two for each multiply-add.

Model FLOPs are what the mathematics needs: every product of the forward pass once and twice more for its gradients,
with attention for those pairs of positions alone that see one another. Hardware FLOPs are what is computed: they also
count what the backward pass computes again, and the pairs that a mask hides. Neither counts what is no matrix product
(looking up embeddings, norms, softmax, the loss's own arithmetic, the optimizer), as is usual (Chowdhery et al. 2022,
appendix B). The product with a model's head takes place in the loss, and is counted once.

B sequences, L positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.settings import OuterConfig
from engine.data.batches import Step
from engine.data.masking import PREDICTED_SHARE
from engine.models.base import Shape


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, by both counts of this module's docstring."""

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
        """Returns what all ranks read in a step, of which `step` is one rank's equal share."""
        batches = step.micro_batches
        sequences, length = world_size * sum(len(b.tokens_BL) for b in batches), batches[0].tokens_BL.shape[1]
        rows = sequences * length if batches[0].rows_N is None else step.valid_tokens
        return cls(sequences, length, rows, step.valid_tokens, step.tokens)


def training(shape: Shape, work: Workload, *, recompute: bool = False, unfused: bool | None = None) -> Flops:
    """Returns the FLOPs of the forward and the backward pass, with the head's part in the loss.

    Args:
        recompute: whether the backward pass computes every block's activations again. It leaves out the product at the
            block's end where no gradient needs the result.
        unfused: whether attention multiplies whole squares and keeps the scores. Fused attention leaves out what a mask
            hides, and computes the scores again. None is as the models do it: unfused where there is dropout.
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
    """Returns the FLOPs of a forward pass and the head, which are a teacher's part in a step."""
    head = _head(shape, work.rows)
    return Flops(_body(shape, work) + head, _body(shape, work, squares=unfused) + head)


def training_per_token(shape: Shape, length: int) -> int:
    """Returns the model FLOPs of training per token of text, rounded. A masked model predicts a share of the tokens."""
    tokens = 20 * length  # 15% of this is a whole number.
    rows = tokens if shape.causal else round(tokens * PREDICTED_SHARE)
    return round(training(shape, Workload(20, length, rows, rows, tokens)).model / tokens)


def outer_update(
    shapes: Sequence[Shape], train: Workload, held_out: Workload, config: OuterConfig, divergence: str = "forward"
) -> Flops:
    """Returns the FLOPs of one update of the students' weights (engine.students.hypergradient)."""
    total = Flops()
    for shape in shapes:
        body, head = _body(shape, held_out), _head(shape, held_out.rows)
        if config.terms == "direct":  # a forward pass, and the gradient of the mixed head
            total += Flops(body + 2 * head, body + 2 * head)
            continue
        total += Flops(3 * (body + head), 3 * (body + head) + _scores(shape, held_out))
        # Each product becomes three: its value, and two for its tangent. Attention is not fused here.
        train_head = 3 * _head(shape, train.valid)
        total += Flops(3 * _body(shape, train) + train_head, 3 * _body(shape, train, squares=True) + train_head)
    if config.terms == "all" and divergence == "forward":
        # the tangents of S students times the probabilities of S students
        products = 2 * len(shapes) ** 2 * shapes[0].vocab_size * train.valid
        total += Flops(products, products)
    return total


def _body(shape: Shape, work: Workload, *, squares: bool = False) -> int:
    """Returns the FLOPs of a forward pass up to the hidden state.

    `squares`: attention also multiplies the pairs of positions that a mask hides.
    """
    return _blocks(shape, work, squares=squares) + 2 * shape.head_matrices * work.rows * shape.hidden**2


def _blocks(shape: Shape, work: Workload, *, squares: bool) -> int:
    mlp = shape.mlp_matrices * shape.hidden * shape.ffn
    weights = 2 * shape.hidden * (shape.hidden + shape.kv_hidden) + mlp
    return 2 * shape.layers * work.sequences * work.length * weights + 2 * _scores(shape, work, squares=squares)


def _scores(shape: Shape, work: Workload, *, squares: bool = False) -> int:
    """Returns the FLOPs of one of attention's two products."""
    pairs = work.length * (work.length + 1) // 2 if shape.causal and not squares else work.length**2
    return 2 * shape.layers * work.sequences * pairs * shape.hidden


def _head(shape: Shape, rows: int) -> int:
    return 2 * rows * shape.hidden * shape.vocab_size
