"""The ops of `kernels/` as people write them in torch. What `torch.compile` is given is these functions, unchanged.

What is in fp32 whatever the storage stays float64 where that is given, so that the same functions give exact results.

B sequences, L positions, N tokens, D hidden, H heads, V vocabulary, S students, R streams.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor]:
    """As LLaMA's modelling code in `transformers`."""
    x32 = wide(x)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype),)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return *rms_norm(total, weight, eps), total


def rotary(q_BLHd: Tensor, k_BLHd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `transformers` does it, where cosines and sines [L, d/2] are repeated to [L, d]."""
    cos, sin = (torch.cat((table, table), dim=-1).to(q_BLHd.dtype).unsqueeze(1) for table in (cos, sin))
    return q_BLHd * cos + _rotate_half(q_BLHd) * sin, k_BLHd * cos + _rotate_half(k_BLHd) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (F.silu(gate) * up,)


def ensemble_losses(logits_RNV: Sequence[Tensor], targets_N: Tensor, students: int) -> tuple[Tensor, ...]:
    """Mutual learning (Zhang et al. 2018) or distillation, the peers and teachers constant: student i pays

        mean CE_i + mean over tokens and the R − 1 others j of KL(p_j ‖ p_i)

    One log-softmax a stream, not one a pair: the better of the two ways it is written.
    """
    logits_RNV = [wide(logits) for logits in logits_RNV]
    logs_RNV = [F.log_softmax(logits, dim=-1) for logits in logits_RNV]
    losses = []
    for i in range(students):
        loss = F.cross_entropy(logits_RNV[i], targets_N)
        for j, peer in enumerate(logs_RNV):
            if j != i:
                kl = F.kl_div(logs_RNV[i], peer.detach(), reduction="batchmean", log_target=True)
                loss = loss + kl / (len(logs_RNV) - 1)
        losses.append(loss)
    return tuple(losses)
