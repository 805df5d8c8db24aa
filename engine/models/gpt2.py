"""GPT-2: learned positions, LayerNorm before each branch, GELU, dropout (Radford et al. 2019).

The body ends at the final hidden state, as LLaMA's does. Modules carry Hugging Face's names; theirs keep the weights of
projections transposed (engine.export).

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
class GPT2Shape:
    """A GPT-2's shape; ValueError where the numbers do not fit one another."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    positions: int
    tied: bool = True
    dropout: float = 0.0  # of embeddings, attention weights and both branches
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not divisible by heads={self.heads}: choose a multiple")

    @classmethod
    def of(cls, student: StudentConfig, vocabulary: int) -> "GPT2Shape":
        for name in ("kv_heads", "rope_theta"):
            if getattr(student, name) is not None:
                raise ValueError(f"{name}={getattr(student, name)}: a GPT-2 has none; drop it, or take family=llama")
        return cls(
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            ffn=student.ffn,
            vocabulary=vocabulary,
            positions=student.positions,
            tied=student.tied,
            dropout=student.dropout,
            norm_eps=student.norm_eps or cls.norm_eps,
        )

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


class Attention(nn.Module):
    def __init__(self, shape: GPT2Shape, site: int) -> None:
        super().__init__()
        self.width, self.site, self.dropout = shape.head_width, site, shape.dropout
        self.c_attn = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.c_proj = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x_BLD: Tensor, draws_B: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.width)) for part in self.c_attn(x_BLD).chunk(3, -1))
        mixed_BLHd = attention(q, k, v, self.dropout, draws_B, self.site, causal=True)
        return self.c_proj(mixed_BLHd.flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.hidden, shape.ffn)
        self.c_proj = nn.Linear(shape.ffn, shape.hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BLD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, shape: GPT2Shape, number: int) -> None:
        super().__init__()
        self.first_site, self.dropout = 1 + 3 * number, shape.dropout
        self.ln_1 = nn.LayerNorm(shape.hidden, shape.norm_eps)
        self.attn = Attention(shape, self.first_site)
        self.ln_2 = nn.LayerNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BLD: Tensor, draws_B: Tensor | None) -> Tensor:
        x_BLD = x_BLD + dropped(self.attn(self.ln_1(x_BLD), draws_B), self.dropout, draws_B, self.first_site + 1)
        return x_BLD + dropped(self.mlp(self.ln_2(x_BLD)), self.dropout, draws_B, self.first_site + 2)


class GPT2(nn.Module):
    """A GPT-2 whose forward pass stops at the hidden state; `head` is the weight [V, D] that makes logits of it."""

    def __init__(self, shape: GPT2Shape, *, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.wte = nn.Embedding(shape.vocabulary, shape.hidden)
        self.wpe = nn.Embedding(shape.positions, shape.hidden)
        self.h = nn.ModuleList(Block(shape, number) for number in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.hidden, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.wte.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.wte

    @property
    def head(self) -> Tensor:
        return self.lm_head.weight

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, draws_B: Tensor | None = None) -> Tensor:
        """Hidden states [N, D] of the rows to predict.

        Args:
            tokens_BL: [B, L] int64.
            rows_N: [N] int64, positions in the flattened batch; None: all B·L of them.
            draws_B: [B] int64, what each sequence's dropout is drawn from (engine.models.dropout); only in training.
        """
        length = length_of(tokens_BL, self.shape.positions)
        draws_B = draws_in_use(draws_B, self.shape.dropout, training=self.training)
        x_BLD = self.wte(tokens_BL) + self.wpe(torch.arange(length, device=tokens_BL.device))
        x_BLD = dropped(x_BLD, self.shape.dropout, draws_B, site=0)
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, draws_B, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, draws_B)
        x_ND = x_BLD.flatten(0, 1)
        return self.ln_f(x_ND if rows_N is None else x_ND[rows_N])
