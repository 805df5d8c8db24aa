"""LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention, tied or untied head (Touvron et al. 2023).

The body ends at the final hidden state; the head is a weight that the loss multiplies itself, so that logits never
exist for a whole batch. Modules carry Hugging Face's names: with one prefix a state dictionary is theirs.

B sequences, L positions, N rows to predict, D hidden, H heads, V vocabulary, F inner width of the MLP.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from engine.config import StudentConfig
from engine.models.inputs import length_of


@dataclass(frozen=True)
class LlamaShape:
    """A LLaMA's shape; ValueError where the numbers do not fit one another."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    positions: int
    tied: bool
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not divisible by heads={self.heads}: choose a multiple")
        if self.hidden // self.heads % 2:
            raise ValueError(f"hidden/heads={self.hidden // self.heads} is odd: rotary positions need an even width")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}: choose a divisor")

    @classmethod
    def of(cls, student: StudentConfig, vocabulary: int) -> "LlamaShape":
        if student.dropout:
            raise ValueError(f"dropout={student.dropout}: a LLaMA has none; drop it, or take family=gpt2")
        return cls(
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            kv_heads=student.kv_heads or student.heads,
            ffn=student.ffn,
            vocabulary=vocabulary,
            positions=student.positions,
            tied=student.tied,
            rope_theta=student.rope_theta or cls.rope_theta,
            norm_eps=student.norm_eps or cls.norm_eps,
        )

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor, residual_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of branch and residual, normalised, and the sum itself: the next residual."""
        if residual_BLD is None:
            return kernels.rms_norm(x_BLD, self.weight, self.eps), x_BLD
        return kernels.rms_norm(x_BLD, self.weight, self.eps, residual_BLD)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.width = shape.head_width
        kv_hidden = shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_hidden, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_hidden, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x_BLD).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = kernels.rotary(q, k, cos, sin)
        mixed_BLHd = kernels.attention(q, k, v, causal=True)
        return self.o_proj(mixed_BLHd.flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x_BLD), self.up_proj(x_BLD)))


class Block(nn.Module):
    """Takes and returns (branch, residual), the sum still open, so that the next norm adds and normalises at once."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, branch_BLD: Tensor, residual_BLD: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        x_BLD, between_BLD = self.input_layernorm(branch_BLD, residual_BLD)
        mixed_BLD = self.self_attn(x_BLD, cos, sin)
        x_BLD, after_BLD = self.post_attention_layernorm(mixed_BLD, between_BLD)
        return self.mlp(x_BLD), after_BLD


class Llama(nn.Module):
    """A LLaMA whose forward pass stops at the hidden state; `head` is the weight [V, D] that makes logits of it."""

    def __init__(self, shape: LlamaShape, *, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def head(self) -> Tensor:
        return self.lm_head.weight

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None) -> Tensor:
        """Hidden states [N, D] of the rows to predict.

        Args:
            tokens_BL: [B, L] int64.
            rows_N: [N] int64, positions in the flattened batch; None: all B·L of them.
        """
        length = length_of(tokens_BL, self.shape.positions)
        table = rotary_table(self.shape.positions, self.shape.head_width, self.shape.rope_theta, tokens_BL.device)
        cos, sin = (angles.narrow(0, 0, length) for angles in table)
        branch_BLD, residual_BLD = self.embed_tokens(tokens_BL), None
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                branch_BLD, residual_BLD = checkpoint(layer, branch_BLD, residual_BLD, cos, sin, use_reentrant=False)
            else:
                branch_BLD, residual_BLD = layer(branch_BLD, residual_BLD, cos, sin)
        assert residual_BLD is not None, "there is at least one layer"
        branch_ND, residual_ND = branch_BLD.flatten(0, 1), residual_BLD.flatten(0, 1)
        if rows_N is not None:
            branch_ND, residual_ND = branch_ND[rows_N], residual_ND[rows_N]
        hidden_ND, _ = self.norm(branch_ND, residual_ND)
        return hidden_ND


def rotary_table(positions: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, d/2] in fp32 of d/2 frequencies (Su et al. 2021), d the width of a head.

    Kept outside the module: as a buffer it would be rounded to the parameters' dtype.
    """
    return _rotary_table(positions, width, theta, device)


@lru_cache(maxsize=32)
def _rotary_table(positions: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the first caller may be inside inference mode, a later one needs gradients
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
        return angle.cos().float().to(device), angle.sin().float().to(device)


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Matrices from N(0, 0.02²), norms at one, biases at zero, as LLaMA's and GPT-2's references do; drawn on the CPU,
    from the seed alone. `model` is of any family.

    The two projections that write into the residual stream are scaled by 1/√(2·layers) (GPT-2, Radford et al. 2019),
    so that its variance does not grow with depth.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        deviation = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
            deviation /= math.sqrt(2 * model.shape.layers)
        parameter.copy_(torch.empty_like(parameter, device="cpu").normal_(0.0, deviation, generator=generator))
