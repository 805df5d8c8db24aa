"""What all model families share: the numbers that describe a model, and the interface of its body and head.

B sequences, L positions, N rows to predict, D hidden, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config.settings import StudentConfig
from engine.system.errors import UserError
from kernels import Projected


@dataclass(frozen=True)
class Shape:
    """The numbers that describe a model. Raises UserError where they do not fit one another.

    Families differ in class attributes and properties, so that other code asks for those and not for the family.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab_size: int
    max_length: int
    tied: bool = True
    dropout: float = 0.0  # of embeddings, attention weights, and the attention and feed-forward branches
    norm_eps: float = 1e-5

    family: ClassVar[str]
    title: ClassVar[str]  # the family's name in text
    causal: ClassVar[bool] = True  # whether a position sees only those before it; otherwise tokens are masked
    shares_prefixes: ClassVar[bool] = False  # whether the family has `LanguageModel.tree_states`
    mlp_matrices: ClassVar[int] = 2  # matrices [hidden, ffn] of one block
    head_matrices: ClassVar[int] = 0  # matrices [hidden, hidden] between the last block and the logits
    foreign_settings: ClassVar[tuple[str, ...]] = ("kv_heads", "rope_theta")  # those of StudentConfig it lacks

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise UserError(f"hidden={self.hidden} is not divisible by heads={self.heads}: choose a multiple")

    @classmethod
    def from_settings(cls, student: StudentConfig, vocab_size: int) -> Self:
        """Returns the shape that a student's settings describe; a setting that is null takes the family's default.

        Raises UserError for a setting that the family does not have.
        """
        for name in cls.foreign_settings:
            value = getattr(student, name)
            if value:
                raise UserError(f"{name}={value}: a {cls.title} has none; drop it, or take another family")
        return cls(
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            ffn=student.ffn,
            vocab_size=vocab_size,
            max_length=student.max_length,
            tied=student.tied,
            dropout=student.dropout,
            norm_eps=student.norm_eps or cls.norm_eps,
            **cls._own_settings(student),
        )

    @classmethod
    def _own_settings(cls, student: StudentConfig) -> dict[str, Any]:
        """Returns the fields that only this family has."""
        return {}

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_hidden(self) -> int:
        """Width of all keys (or values) of one position together."""
        return self.hidden

    @property
    def weight_shape(self) -> Self:
        """This shape without what its weights do not depend on; models of equal weight shapes share weight files."""
        return replace(self, dropout=0.0)

    @property
    def ends_in_product(self) -> bool:
        """Whether a block ends in a matrix product, whose result recomputation omits: no backward pass needs it."""
        return self.dropout == 0


class LanguageModel(nn.Module, ABC):
    """A model whose forward pass stops at the hidden state: its logits are hidden · `head`ᵀ + `head_bias`.

    The loss multiplies by the head itself, so that logits never exist for a whole batch.
    """

    lm_head: Any

    def __init__(self, shape: Shape, *, recompute: bool = False) -> None:
        """With `recompute` the backward pass computes the blocks' activations again instead of keeping them."""
        super().__init__()
        self.shape, self.recompute = shape, recompute

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The embedding of the tokens."""

    @property
    def head(self) -> Tensor:
        """The weight [V, D] that makes logits of hidden states."""
        return self.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """The bias [V] of the logits; None where the family has none."""
        return None

    def tie_head(self) -> None:
        """Shares the embedding's weight with the output head, where the shape says so."""
        if self.shape.tied:
            self.lm_head.weight = self.embedding.weight

    @abstractmethod
    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        """Returns the hidden states [N, D] of the rows to predict.

        Args:
            tokens_BL: [B, L] int64; masked, where the model predicts masked tokens.
            rows_N: [N] int64, positions in the flattened batch; None: all B·L of them.
            dropout_seeds_B: [B] int64, one seed per sequence (engine.models.dropout); read in training only.
        """

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Returns what `block` does; where the model recomputes, only the inputs are kept for the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def project(self, hidden_ND: Tensor) -> Projected:
        """Returns the model's stream of logits, not multiplied out."""
        return Projected(hidden_ND, self.head, self.head_bias)

    def tree_states(
        self, tokens_BL: Tensor, position_ids_BL: Tensor, subtree_ends_BL: Tensor, rows_U: Tensor
    ) -> Tensor:
        """Returns the hidden states [U, D] of texts that share prefixes (engine.evaluation.log_probabilities).

        Only families whose `shape.shares_prefixes` is true have it.

        Args:
            tokens_BL: [B, L] int64, one tree of texts per sequence.
            position_ids_BL: [B, L] int64, the position of each token in its own text.
            subtree_ends_BL: [B, L] int64, the end of each token's subtree, which attends to the token.
            rows_U: [U] int64, the positions in the flattened batch whose states are wanted.
        """
        raise ValueError(f"a {self.shape.title} reads every text by itself: make its trees with share=False")

    def states(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        """Returns the hidden states [N, D] that a head of another kind reads, such as engine.models.classifier's."""
        return self(tokens_BL, rows_N, dropout_seeds_B)


def check_length(tokens_BL: Tensor, max_length: int) -> int:
    """Returns L; raises ValueError where it is more than the model can read."""
    length = tokens_BL.shape[1]
    if length > max_length:
        raise ValueError(f"a sequence of {length} tokens is longer than the model's max_length={max_length}")
    return length


def initial_weights(model: nn.Module, layers: int, seed: int) -> None:
    """Draws a model's weights on the CPU, from the seed alone.

    Matrices come from N(0, 0.02²), norms are one and biases zero, as in LLaMA's and GPT-2's references. In these two
    families the projections that write into the residual stream are scaled by 1/√(2·layers), so that its variance does
    not grow with depth (Radford et al. 2019); RoBERTa's are not.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        deviation = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
            deviation /= (2 * layers) ** 0.5
        drawn = torch.empty_like(parameter, device="cpu").normal_(0.0, deviation, generator=generator)
        parameter.data.copy_(drawn)
