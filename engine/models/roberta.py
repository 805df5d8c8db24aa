"""RoBERTa for masked language modelling: learned positions, LayerNorm after each branch, exact GELU (Liu et al. 2019).

The body ends where the head's dense layer has transformed the hidden state, for the rows to predict alone. What is left
of the head is the embedding's weight and a bias. Modules carry Hugging Face's names: with the prefix `roberta.` on all
but the head a state dictionary is theirs.

B sequences, L positions, N rows to predict, D hidden, H heads, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.base import LanguageModel, Shape, check_length
from engine.models.dropout import attention, dropout, seeds_in_use
from engine.system.errors import UserError


@dataclass(frozen=True)
class RobertaShape(Shape):
    """The numbers that describe a RoBERTa. Its head shares the embedding's weight."""

    padding: int = 1  # the padding token's id; positions are counted from the one after it

    family: ClassVar[str] = "roberta"
    title: ClassVar[str] = "RoBERTa"
    causal: ClassVar[bool] = False
    head_matrices: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.tied:
            raise UserError("tied=false: a RoBERTa's head shares the embedding's weight; drop it")
        super().__post_init__()

    @property
    def ends_in_product(self) -> bool:
        return False  # A norm ends a block.


class Output(nn.Module):
    """The end of a branch: project, drop, add the residual, normalise."""

    def __init__(self, width: int, shape: RobertaShape, site: int) -> None:
        super().__init__()
        self.site, self.dropout = site, shape.dropout
        self.dense = nn.Linear(width, shape.hidden)
        self.LayerNorm = nn.LayerNorm(shape.hidden, shape.norm_eps)

    def forward(self, branch: Tensor, residual_BLD: Tensor, dropout_seeds_B: Tensor | None) -> Tensor:
        return self.LayerNorm(residual_BLD + dropout(self.dense(branch), self.dropout, dropout_seeds_B, self.site))


class Attention(nn.Module):
    def __init__(self, shape: RobertaShape, site: int) -> None:
        super().__init__()
        self.width, self.site, self.dropout = shape.head_width, site, shape.dropout
        self.self = nn.ModuleDict({name: nn.Linear(shape.hidden, shape.hidden) for name in ("query", "key", "value")})
        self.output = Output(shape.hidden, shape, site + 1)

    def forward(self, x_BLD: Tensor, dropout_seeds_B: Tensor | None) -> Tensor:
        q, k, v = (projection(x_BLD).unflatten(-1, (-1, self.width)) for projection in self.self.values())
        mixed_BLHd = attention(q, k, v, self.dropout, dropout_seeds_B, self.site, causal=False)
        return self.output(mixed_BLHd.flatten(-2), x_BLD, dropout_seeds_B)


class Block(nn.Module):
    def __init__(self, shape: RobertaShape, number: int) -> None:
        super().__init__()
        first_site = 1 + 3 * number
        self.attention = Attention(shape, first_site)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(shape.hidden, shape.ffn)})
        self.output = Output(shape.ffn, shape, first_site + 2)

    def forward(self, x_BLD: Tensor, dropout_seeds_B: Tensor | None) -> Tensor:
        x_BLD = self.attention(x_BLD, dropout_seeds_B)
        return self.output(F.gelu(self.intermediate["dense"](x_BLD)), x_BLD, dropout_seeds_B)


class Head(nn.Module):
    """The transformation before the logits, and their bias."""

    def __init__(self, shape: RobertaShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden)
        self.layer_norm = nn.LayerNorm(shape.hidden, shape.norm_eps)
        self.bias = nn.Parameter(torch.zeros(shape.vocab_size))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.layer_norm(F.gelu(self.dense(x_ND)))


class Roberta(LanguageModel):
    """A RoBERTa whose forward pass stops before the logits."""

    def __init__(self, shape: RobertaShape, *, recompute: bool = False) -> None:
        super().__init__(shape, recompute=recompute)
        self.first_position = shape.padding + 1
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(shape.vocab_size, shape.hidden),
                "position_embeddings": nn.Embedding(shape.max_length + self.first_position, shape.hidden),
                "token_type_embeddings": nn.Embedding(1, shape.hidden),
                "LayerNorm": nn.LayerNorm(shape.hidden, shape.norm_eps),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(shape, number) for number in range(shape.layers))})
        self.lm_head = Head(shape)

    def tie_head(self) -> None:
        """The head is the embedding's weight already."""

    @property
    def embedding(self) -> nn.Embedding:
        words = self.embeddings["word_embeddings"]
        assert isinstance(words, nn.Embedding)
        return words

    @property
    def head(self) -> Tensor:
        return self.embedding.weight

    @property
    def head_bias(self) -> Tensor:
        return self.lm_head.bias

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        return self.lm_head(self.states(tokens_BL, rows_N, dropout_seeds_B))

    def states(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        """Returns what `forward` does, before the language model's head transforms it."""
        length = check_length(tokens_BL, self.shape.max_length)
        dropout_seeds_B = seeds_in_use(dropout_seeds_B, self.shape.dropout, training=self.training)
        word, position, token_type, norm = self.embeddings.values()
        positions_L = self.first_position + torch.arange(length, device=tokens_BL.device)
        x_BLD = norm(word(tokens_BL) + position(positions_L) + token_type(torch.zeros_like(positions_L)))
        x_BLD = dropout(x_BLD, self.shape.dropout, dropout_seeds_B, site=0)
        for block in self.encoder["layer"]:  # pyright: ignore[reportGeneralTypeIssues]
            x_BLD = self.run_block(block, x_BLD, dropout_seeds_B)
        x_ND = x_BLD.flatten(0, 1)
        return x_ND if rows_N is None else x_ND[rows_N]
