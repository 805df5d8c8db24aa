"""Floating-point operations of matrix products, counted from shapes: two for each multiply-add.

Model FLOPs are what the mathematics asks for: every product of the forward pass once and of its gradients twice,
attention for the pairs of positions that see one another. Hardware FLOPs are what is computed: also what is formed
again in the backward pass, and pairs that a mask hides. Whatever is no matrix product counts nothing in either (looking
up embeddings, norms, softmax, the loss's own arithmetic, the optimizer), as is usual (Chowdhery et al. 2022, appendix
B). The head of a model is that of its loss: it is never multiplied elsewhere.

B sequences, L positions, N rows to predict, D hidden, V vocabulary, S students.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import OuterConfig
from engine.data import Step
from engine.masking import SHARE
from engine.models.families import Shape
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape


@dataclass(frozen=True)
class Flops:
    model: int = 0
    hardware: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __sub__(self, other: "Flops") -> "Flops":
        return Flops(self.model - other.model, self.hardware - other.hardware)


@dataclass(frozen=True)
class Text:
    """What passes read: B sequences of L tokens, of which N rows reach the head, and `valid` of them have a target;
    `tokens` of the text, which are fewer where it ends."""

    sequences: int
    length: int
    rows: int
    valid: int
    tokens: int

    @classmethod
    def whole(cls, sequences: int, length: int) -> "Text":
        """Every position predicts."""
        return cls(sequences, length, *3 * (sequences * length,))

    @classmethod
    def of(cls, step: Step, ranks: int) -> "Text":
        """A step's, over all ranks."""
        batches = step.micro_batches
        sequences, length = ranks * sum(len(batch.tokens_BL) for batch in batches), batches[0].tokens_BL.shape[1]
        rows = sequences * length if batches[0].rows_N is None else step.valid_tokens
        return cls(sequences, length, rows, step.valid_tokens, step.tokens)


def training(shape: Shape, text: Text, *, recompute: bool = False, explicit: bool | None = None) -> Flops:
    """Forward and backward, the head's part in the loss included.

    Args:
        recompute: every block's activations are formed again in the backward pass, but for the product that ends it,
            where nothing behind needs its result.
        explicit: attention multiplies whole squares and keeps them; else the fused way, which sees what it must, and
            forms the scores again. None: as the models do, explicit with dropout.
    """
    explicit = _dropout(shape) > 0 if explicit is None else explicit
    model = 3 * (_body(shape, text) + _head(shape, text.rows))
    hardware = 3 * (_body(shape, text, squares=explicit) + _head(shape, text.rows))
    if not explicit:
        hardware += _scores(shape, text)
    if recompute:
        hardware += _blocks(shape, text, squares=explicit)
        if isinstance(shape, LlamaShape) or (isinstance(shape, GPT2Shape) and shape.dropout == 0):
            hardware -= 2 * shape.layers * text.sequences * text.length * shape.ffn * shape.hidden
    return Flops(model, hardware)


def inference(shape: Shape, text: Text, *, explicit: bool = False) -> Flops:
    """A forward pass and the head: a teacher's part in a step. Averaging several teachers' logits adds nothing."""
    head = _head(shape, text.rows)
    return Flops(_body(shape, text) + head, _body(shape, text, squares=explicit) + head)


def training_a_token(shape: Shape, length: int) -> int:
    """Model FLOPs of a token of the text, to a whole number; a RoBERTa predicts a share of them."""
    tokens = 20 * length  # 15% of so many is a whole number
    rows = round(tokens * SHARE) if isinstance(shape, RobertaShape) else tokens
    return round(training(shape, Text(20, length, rows, rows, tokens)).model / tokens)


def outer_update(
    shapes: Sequence[Shape], train: Text, held_out: Text, config: OuterConfig, divergence: str = "forward"
) -> Flops:
    """An update of the students' weights (engine.outer_loop), by the method and the terms of `config`."""
    total = Flops()
    for shape in shapes:
        total += _held_out_gradient(shape, held_out, config)
    if config.terms == "first":
        return total
    students = len(shapes)
    if config.method == "forward" and divergence == "forward":  # S tangents with S probabilities
        products = 2 * students**2 * shapes[0].vocabulary * train.valid
        total += Flops(products, products)
    if config.method != "backward":  # their sum, weighted by the loss's dependence on ω
        total += Flops(2 * students**3, 2 * students**3)
    for shape in shapes:
        body, squares = _body(shape, train), _body(shape, train, squares=True)
        if config.method == "forward":  # the primal product, and two for its tangent, in torch's own operations
            head = 3 * _head(shape, train.valid)
            total += Flops(3 * body + head, 3 * squares + head)
        elif config.method == "backward":  # one forward pass, S losses and backward passes
            explicit = _dropout(shape) > 0
            kept = squares if explicit else body
            again = 0 if explicit else _scores(shape, train)
            head = 3 * students * _head(shape, train.rows)
            total += Flops(
                (1 + 2 * students) * body + head,
                (1 + 2 * students) * kept + students * again + head,
            )
        else:  # a forward pass at the point and one on either side; every stream's head for each
            kept = squares if _dropout(shape) > 0 else body
            head = 2 * students * _head(shape, train.rows)
            total += Flops(3 * body + head, 3 * kept + head)
    return total


def _held_out_gradient(shape: Shape, text: Text, config: OuterConfig) -> Flops:
    logits = config.ensemble == "logits"
    rows = text.rows if logits else text.valid
    body, head = _body(shape, text), _head(shape, rows)
    if config.terms == "first":  # of logits, the mixed head's gradient; of probabilities, nothing behind them
        both = body + (2 if logits else 1) * head
        return Flops(both, both)
    return Flops(3 * (body + head), 3 * body + _scores(shape, text) + (3 if logits else 4) * head)


def _body(shape: Shape, text: Text, *, squares: bool = False) -> int:
    """A forward pass up to the hidden state."""
    dense = 2 * text.rows * shape.hidden**2 if isinstance(shape, RobertaShape) else 0
    return _blocks(shape, text, squares=squares) + dense


def _blocks(shape: Shape, text: Text, *, squares: bool) -> int:
    mlp = (3 if isinstance(shape, LlamaShape) else 2) * shape.hidden * shape.ffn
    narrow = shape.kv_heads * shape.head_width if isinstance(shape, LlamaShape) else shape.hidden
    weights = 2 * shape.hidden * (shape.hidden + narrow) + mlp
    linear = 2 * shape.layers * text.sequences * text.length * weights
    return linear + 2 * _scores(shape, text, squares=squares)


def _scores(shape: Shape, text: Text, *, squares: bool = False) -> int:
    """One of attention's two products, over the pairs of positions that see one another."""
    length, causal = text.length, not isinstance(shape, RobertaShape)
    pairs = length * (length + 1) // 2 if causal and not squares else length**2
    return 2 * shape.layers * text.sequences * pairs * shape.hidden


def _head(shape: Shape, rows: int) -> int:
    return 2 * rows * shape.hidden * shape.vocabulary


def _dropout(shape: Shape) -> float:
    return 0.0 if isinstance(shape, LlamaShape) else shape.dropout
