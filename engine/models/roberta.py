"""RoBERTa for masked language modelling: learned positions, LayerNorm after each branch, exact GELU (Liu et al. 2019).

The body ends where the head's dense layer has transformed the hidden state, for the rows to predict alone; what is left
of the head is the embedding's weight and a bias. Modules carry Hugging Face's names: with the prefix `roberta.` on all
but the head a state dictionary is theirs.

B sequences, L positions, N rows to predict, D hidden, H heads, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.config import StudentConfig
from engine.models.dropout import attention, dropped
from engine.models.inputs import draws_in_use, length_of


@dataclass(frozen=True)
class RobertaShape:
    """A RoBERTa's shape; ValueError where the numbers do not fit one another."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    positions: int
    dropout: float = 0.0  # of embeddings, attention weights and both branches
    norm_eps: float = 1e-5
    padding: int = 1  # the padding token's id; positions are counted from the one after it

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not divisible by heads={self.heads}: choose a multiple")

    @classmethod
    def of(cls, student: StudentConfig, vocabulary: int) -> "RobertaShape":
        for name in ("kv_heads", "rope_theta"):
            if getattr(student, name) is not None:
                raise ValueError(f"{name}={getattr(student, name)}: a RoBERTa has none; drop it, or take family=llama")
        if not student.tied:
            raise ValueError("tied=false: a RoBERTa's head shares the embedding's weight; drop it")
        return cls(
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            ffn=student.ffn,
            vocabulary=vocabulary,
            positions=student.positions,
            dropout=student.dropout,
            norm_eps=student.norm_eps or cls.norm_eps,
        )

    @property
    def tied(self) -> bool:
        return True

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


class Output(nn.Module):
    """The end of a branch: project, drop, add the residual, normalise."""

    def __init__(self, width: int, shape: RobertaShape, site: int) -> None:
        super().__init__()
        self.site, self.dropout = site, shape.dropout
        self.dense = nn.Linear(width, shape.hidden)
        self.LayerNorm = nn.LayerNorm(shape.hidden, shape.norm_eps)

    def forward(self, branch: Tensor, residual_BLD: Tensor, draws_B: Tensor | None) -> Tensor:
        return self.LayerNorm(residual_BLD + dropped(self.dense(branch), self.dropout, draws_B, self.site))


class Attention(nn.Module):
    def __init__(self, shape: RobertaShape, site: int) -> None:
        super().__init__()
        self.width, self.site, self.dropout = shape.head_width, site, shape.dropout
        self.self = nn.ModuleDict({name: nn.Linear(shape.hidden, shape.hidden) for name in ("query", "key", "value")})
        self.output = Output(shape.hidden, shape, site + 1)

    def forward(self, x_BLD: Tensor, draws_B: Tensor | None) -> Tensor:
        q, k, v = (projection(x_BLD).unflatten(-1, (-1, self.width)) for projection in self.self.values())
        mixed_BLHd = attention(q, k, v, self.dropout, draws_B, self.site, causal=False)
        return self.output(mixed_BLHd.flatten(-2), x_BLD, draws_B)


class Block(nn.Module):
    def __init__(self, shape: RobertaShape, number: int) -> None:
        super().__init__()
        first_site = 1 + 3 * number
        self.attention = Attention(shape, first_site)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(shape.hidden, shape.ffn)})
        self.output = Output(shape.ffn, shape, first_site + 2)

    def forward(self, x_BLD: Tensor, draws_B: Tensor | None) -> Tensor:
        x_BLD = self.attention(x_BLD, draws_B)
        return self.output(F.gelu(self.intermediate["dense"](x_BLD)), x_BLD, draws_B)


class Head(nn.Module):
    """The transformation before the logits, and their bias."""

    def __init__(self, shape: RobertaShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden)
        self.layer_norm = nn.LayerNorm(shape.hidden, shape.norm_eps)
        self.bias = nn.Parameter(torch.zeros(shape.vocabulary))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.layer_norm(F.gelu(self.dense(x_ND)))


class Roberta(nn.Module):
    """Its forward pass stops before the logits, which are hidden · `head`ᵀ + `head_bias`: [V, D] and [V]."""

    def __init__(self, shape: RobertaShape, *, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(shape.vocabulary, shape.hidden),
                "position_embeddings": nn.Embedding(shape.positions + shape.padding + 1, shape.hidden),
                "token_type_embeddings": nn.Embedding(1, shape.hidden),
                "LayerNorm": nn.LayerNorm(shape.hidden, shape.norm_eps),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(shape, number) for number in range(shape.layers))})
        self.lm_head = Head(shape)

    @property
    def embedding(self) -> nn.Module:
        return self.embeddings["word_embeddings"]

    @property
    def head(self) -> Tensor:
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def head_bias(self) -> Tensor:
        return self.lm_head.bias

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, draws_B: Tensor | None = None) -> Tensor:
        """Transformed hidden states [N, D] of the rows to predict.

        Args:
            tokens_BL: [B, L] int64, masked.
            rows_N: [N] int64, positions in the flattened batch; None: all B·L of them.
            draws_B: [B] int64, what each sequence's dropout is drawn from (engine.models.dropout); only in training.
        """
        return self.lm_head(self.states(tokens_BL, rows_N, draws_B))

    def states(self, tokens_BL: Tensor, rows_N: Tensor | None = None, draws_B: Tensor | None = None) -> Tensor:
        """As `forward`, before the head transforms them: what another head than the language model's begins with."""
        length = length_of(tokens_BL, self.shape.positions)
        draws_B = draws_in_use(draws_B, self.shape.dropout, training=self.training)
        word, position, token_type, norm = self.embeddings.values()
        positions_L = self.shape.padding + 1 + torch.arange(length, device=tokens_BL.device)
        x_BLD = norm(word(tokens_BL) + position(positions_L) + token_type(torch.zeros_like(positions_L)))
        x_BLD = dropped(x_BLD, self.shape.dropout, draws_B, site=0)
        for block in self.encoder["layer"]:  # pyright: ignore[reportGeneralTypeIssues]
            if self.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, draws_B, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, draws_B)
        x_ND = x_BLD.flatten(0, 1)
        return x_ND if rows_N is None else x_ND[rows_N]
