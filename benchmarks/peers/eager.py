"""The ops of `kernels/` as people write them in torch. `torch.compile` gets these same functions.

Where they compute in fp32 whatever the storage is, float64 stays float64, so that they also give exact results.

B sequences, L positions, N tokens, D hidden, H heads, V vocabulary, S students, K teachers, R streams.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.settings import ObjectiveConfig


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor]:
    """Normalises as LLaMA's modelling code in `transformers` does."""
    x32 = at_least_fp32(x)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype),)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return *rms_norm(total, weight, eps), total


def rotary(q_BLHd: Tensor, k_BLHd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates as `transformers` does. Cosines and sines are [L, d/2], and are repeated to [L, d]."""
    cos, sin = (torch.cat((table, table), dim=-1).to(q_BLHd.dtype).unsqueeze(1) for table in (cos, sin))
    return q_BLHd * cos + _rotate_half(q_BLHd) * sin, k_BLHd * cos + _rotate_half(k_BLHd) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (F.silu(gate) * up,)


def _kl_div(log: Tensor, target_log: Tensor) -> Tensor:
    return F.kl_div(log, target_log, reduction="batchmean", log_target=True)


def ensemble_losses(logits_RNV: Sequence[Tensor], targets_N: Tensor, students: int) -> tuple[Tensor, ...]:
    """Returns the losses of mutual learning (Zhang et al. 2018) or distillation, with peers and teachers constant.

    Student i pays mean CE_i + mean over tokens and the R − 1 others j of KL(p_j ‖ p_i). Of the two ways in which people
    write it, this is the faster: one log-softmax per stream, and not one per pair.
    """
    logits_RNV = [at_least_fp32(logits) for logits in logits_RNV]
    logs_RNV = [F.log_softmax(logits, dim=-1) for logits in logits_RNV]
    losses = []
    for i in range(students):
        loss = F.cross_entropy(logits_RNV[i], targets_N)
        for j, peer in enumerate(logs_RNV):
            if j != i:
                kl = _kl_div(logs_RNV[i], peer.detach())
                loss = loss + kl / (len(logs_RNV) - 1)
        losses.append(loss)
    return tuple(losses)


def objective_losses(
    logits_SNV: Sequence[Tensor],
    teachers_KNV: Sequence[Tensor],
    targets_N: Tensor,
    objective: ObjectiveConfig,
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    kl_div: Callable[[Tensor, Tensor], Tensor] = _kl_div,
) -> list[Tensor]:
    """Returns the losses of `ObjectiveConfig` as the papers' codes write them, with peers and teachers constant.

    The teachers' logits are averaged with equal weights (Timiryasov & Tastet 2023). Cross-entropy comes last, because
    Liger's overwrites the logits.
    """
    T, students = objective.temperature, len(logits_SNV)
    logits_SNV = [at_least_fp32(logits) for logits in logits_SNV]
    divergences: list[list[Tensor]] = [[] for _ in range(students)]
    has_peers = objective.peer_weight > 0 and students > 1
    if teachers_KNV or has_peers:
        logs_SNV = [F.log_softmax(logits / T if T != 1 else logits, dim=-1) for logits in logits_SNV]
        for i in range(students if has_peers else 0):
            for j in range(students):
                if j != i:
                    kl = kl_div(logs_SNV[i], logs_SNV[j].detach())
                    divergences[i].append(objective.peer_weight / (students - 1) * T**2 * kl)
        if teachers_KNV:
            mean = torch.stack([at_least_fp32(logits) for logits in teachers_KNV]).mean(0)
            log_NV = F.log_softmax(mean / T if T != 1 else mean, dim=-1)
            for i in range(students):
                divergences[i].append(objective.teacher_weight * T**2 * kl_div(logs_SNV[i], log_NV))
    weighted_ce = [objective.ce_weight * cross_entropy(logits, targets_N) for logits in logits_SNV]
    return [sum(kl, ce) for kl, ce in zip(divergences, weighted_ce, strict=True)]
