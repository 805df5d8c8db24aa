"""GPT-2: learned positions, LayerNorm before each branch, GELU, dropout (Radford et al. 2019).

Modules carry Hugging Face's names; their projections' weights are stored transposed (engine.models.huggingface).

B sequences, L positions, N rows to predict, D hidden, H heads, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.base import LanguageModel, Shape, check_length
from engine.models.dropout import attention, dropout, seeds_in_use


@dataclass(frozen=True)
class GPT2Shape(Shape):
    """The numbers that describe a GPT-2."""

    family: ClassVar[str] = "gpt2"
    title: ClassVar[str] = "GPT-2"


class Attention(nn.Module):
    def __init__(self, shape: GPT2Shape, site: int) -> None:
        super().__init__()
        self.width, self.site, self.dropout = shape.head_width, site, shape.dropout
        self.c_attn = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.c_proj = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x_BLD: Tensor, dropout_seeds_B: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.width)) for part in self.c_attn(x_BLD).chunk(3, -1))
        mixed_BLHd = attention(q, k, v, self.dropout, dropout_seeds_B, self.site, causal=True)
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

    def forward(self, x_BLD: Tensor, dropout_seeds_B: Tensor | None) -> Tensor:
        mixed_BLD = self.attn(self.ln_1(x_BLD), dropout_seeds_B)
        x_BLD = x_BLD + dropout(mixed_BLD, self.dropout, dropout_seeds_B, self.first_site + 1)
        return x_BLD + dropout(self.mlp(self.ln_2(x_BLD)), self.dropout, dropout_seeds_B, self.first_site + 2)


class GPT2(LanguageModel):
    """A GPT-2 whose forward pass stops at the final hidden state."""

    def __init__(self, shape: GPT2Shape, *, recompute: bool = False) -> None:
        super().__init__(shape, recompute=recompute)
        self.wte = nn.Embedding(shape.vocab_size, shape.hidden)
        self.wpe = nn.Embedding(shape.max_length, shape.hidden)
        self.h = nn.ModuleList(Block(shape, number) for number in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.hidden, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab_size, bias=False)
        self.tie_head()

    @property
    def embedding(self) -> nn.Embedding:
        return self.wte

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        length = check_length(tokens_BL, self.shape.max_length)
        dropout_seeds_B = seeds_in_use(dropout_seeds_B, self.shape.dropout, training=self.training)
        x_BLD = self.wte(tokens_BL) + self.wpe(torch.arange(length, device=tokens_BL.device))
        x_BLD = dropout(x_BLD, self.shape.dropout, dropout_seeds_B, site=0)
        for block in self.h:
            x_BLD = self.run_block(block, x_BLD, dropout_seeds_B)
        x_ND = x_BLD.flatten(0, 1)
        return self.ln_f(x_ND if rows_N is None else x_ND[rows_N])
