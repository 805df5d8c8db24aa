"""The ops of `peers.eager` by Liger's kernels, on a GPU. Some overwrite their arguments: pass copies.

N tokens, V vocabulary, S students, R streams.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from liger_kernel.transformers.functional import (
    liger_cross_entropy,
    liger_fused_add_rms_norm,
    liger_kl_div,
    liger_rms_norm,
    liger_rope,
    liger_swiglu,
)
from torch import Tensor

from benchmarks.peers import eager
from engine.config.settings import ObjectiveConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor]:
    return (liger_rms_norm(x, weight, eps),)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return liger_fused_add_rms_norm(x, residual, weight, eps)


def rotary(q_BLHd: Tensor, k_BLHd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates by Liger's kernel, which takes [B, H, L, d], a transposed view, and cosines and sines of [1, L, d]."""
    cos, sin = (torch.cat((table, table), dim=-1)[None] for table in (cos, sin))
    q, k = liger_rope(q_BLHd.transpose(1, 2), k_BLHd.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (liger_swiglu(gate, up),)


def ensemble_losses(logits_RNV: Sequence[Tensor], targets_N: Tensor, students: int) -> tuple[Tensor, ...]:
    """Returns `peers.eager.ensemble_losses` from Liger's cross-entropy and KL divergence.

    The divergence takes log-probabilities. Cross-entropy comes last, because it overwrites the logits with their
    gradient.
    """
    logs_RNV = [F.log_softmax(logits, dim=-1, dtype=torch.float32) for logits in logits_RNV]
    losses = []
    for i in range(students):
        kl = [_kl_div(logs_RNV[i], peer.detach()) for j, peer in enumerate(logs_RNV) if j != i]
        losses.append(_cross_entropy(logits_RNV[i], targets_N) + sum(kl) / max(1, len(kl)))
    return tuple(losses)


def objective_losses(
    logits_SNV: Sequence[Tensor], teachers_KNV: Sequence[Tensor], targets_N: Tensor, objective: ObjectiveConfig
) -> list[Tensor]:
    """Returns `peers.eager.objective_losses` from Liger's cross-entropy and KL divergence."""
    return eager.objective_losses(logits_SNV, teachers_KNV, targets_N, objective, _cross_entropy, _kl_div)


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    ce = liger_cross_entropy(logits_NV, targets_N)
    assert isinstance(ce, Tensor)  # It would be a record where extras are asked for.
    return ce


def _kl_div(log: Tensor, target_log: Tensor) -> Tensor:
    kl = liger_kl_div(log, target_log, reduction="batchmean", log_target=True)
    assert isinstance(kl, Tensor)
    return kl
