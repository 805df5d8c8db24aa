"""LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention, tied or untied head (Touvron et al. 2023).

Modules carry Hugging Face's names: with one prefix a state dictionary is theirs.

B sequences, L positions, N rows to predict, D hidden, H heads, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from engine.config.settings import StudentConfig
from engine.models.base import LanguageModel, Shape, check_length
from engine.system.errors import UserError


@dataclass(frozen=True)
class LlamaShape(Shape):
    """The numbers that describe a LLaMA. It has no dropout."""

    norm_eps: float = 1e-6
    kv_heads: int = field(kw_only=True)
    rope_theta: float = 10000.0

    family: ClassVar[str] = "llama"
    title: ClassVar[str] = "LLaMA"
    shares_prefixes: ClassVar[bool] = True
    mlp_matrices: ClassVar[int] = 3
    foreign_settings: ClassVar[tuple[str, ...]] = ("dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width % 2:
            raise UserError(f"hidden/heads={self.head_width} is odd: rotary positions need an even width; change one")
        if self.heads % self.kv_heads:
            raise UserError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}: choose a divisor")

    @classmethod
    def _own_settings(cls, student: StudentConfig) -> dict[str, Any]:
        return {"kv_heads": student.kv_heads or student.heads, "rope_theta": student.rope_theta or cls.rope_theta}

    @property
    def weight_shape(self) -> Self:
        return replace(self, max_length=1)

    @property
    def kv_hidden(self) -> int:
        return self.kv_heads * self.head_width


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # from q, k, v [B, L, H, D_head] to what attention mixes, the same


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor, residual_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the normalised sum of branch and residual, and the sum itself, which is the next residual."""
        if residual_BLD is None:
            return kernels.rms_norm(x_BLD, self.weight, self.eps), x_BLD
        return kernels.rms_norm(x_BLD, self.weight, self.eps, residual_BLD)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.width = shape.head_width
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_hidden, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_hidden, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (p(x_BLD).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = kernels.rotary(q, k, cos, sin)
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x_BLD), self.up_proj(x_BLD)))


class Block(nn.Module):
    """Takes and returns (branch, residual) before they are added, so that the next norm adds and normalises at once."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, branch_BLD: Tensor, residual_BLD: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x_BLD, between_BLD = self.input_layernorm(branch_BLD, residual_BLD)
        mixed_BLD = self.self_attn(x_BLD, cos, sin, attend)
        x_BLD, after_BLD = self.post_attention_layernorm(mixed_BLD, between_BLD)
        return self.mlp(x_BLD), after_BLD


class Llama(LanguageModel):
    """A LLaMA whose forward pass stops at the final hidden state."""

    def __init__(self, shape: LlamaShape, *, recompute: bool = False) -> None:
        super().__init__(shape, recompute=recompute)
        self.rope_theta = shape.rope_theta
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab_size, bias=False)
        self.tie_head()

    @property
    def embedding(self) -> nn.Embedding:
        return self.embed_tokens

    def rotary_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines [max_length, D_head/2] of all positions."""
        return rotary_table(self.shape.max_length, self.shape.head_width, self.rope_theta, device)

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        """Returns what `LanguageModel.forward` says; a LLaMA has no dropout and reads no seeds."""
        length = check_length(tokens_BL, self.shape.max_length)
        cos, sin = (angles.narrow(0, 0, length) for angles in self.rotary_tables(tokens_BL.device))
        return self._hidden_states(tokens_BL, rows_N, cos, sin, kernels.attention)

    def tree_states(
        self, tokens_BL: Tensor, position_ids_BL: Tensor, subtree_ends_BL: Tensor, rows_U: Tensor
    ) -> Tensor:
        """Returns the hidden states [U, D] of texts that share prefixes, as `LanguageModel.tree_states` says.

        Each token attends to those before it in whose subtree it lies. Everything but attention reads the batch as one
        sequence of B·L tokens, each rotated by its position in its own text.
        """
        rows, length = tokens_BL.shape
        cos, sin = (angles[position_ids_BL.flatten()] for angles in self.rotary_tables(tokens_BL.device))
        index_L = torch.arange(length, device=tokens_BL.device)
        masked_BLL = (subtree_ends_BL[:, None, :] <= index_L[:, None]) | (index_L > index_L[:, None])
        bias_B1LL = torch.zeros(rows, 1, length, length, device=tokens_BL.device, dtype=self.head.dtype)
        bias_B1LL.masked_fill_(masked_BLL[:, None], -torch.inf)

        def tree_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(rows, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            mixed_BHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B1LL, enable_gqa=grouped)
            return mixed_BHLd.transpose(1, 2).flatten(0, 1)[None]

        return self._hidden_states(tokens_BL.view(1, -1), rows_U, cos, sin, tree_attention)

    def _hidden_states(
        self, tokens_BL: Tensor, rows_N: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        branch_BLD, residual_BLD = self.embed_tokens(tokens_BL), None
        for layer in self.layers:
            branch_BLD, residual_BLD = self.run_block(layer, branch_BLD, residual_BLD, cos, sin, attend)
        assert residual_BLD is not None, "there is at least one layer"
        branch_ND, residual_ND = branch_BLD.flatten(0, 1), residual_BLD.flatten(0, 1)
        if rows_N is not None:
            branch_ND, residual_ND = branch_ND[rows_N], residual_ND[rows_N]
        hidden_ND, _ = self.norm(branch_ND, residual_ND)
        return hidden_ND


def rotary_table(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines [length, width/2] in fp32 of width/2 frequencies (Su et al. 2021).

    They are kept outside the module: as a buffer they would be rounded to the parameters' dtype.
    """
    return _rotary_table(length, width, theta, device)


@lru_cache(maxsize=32)
def _rotary_table(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # The first caller may be in inference mode, and a later one needs gradients.
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return angle.cos().float().to(device), angle.sin().float().to(device)
