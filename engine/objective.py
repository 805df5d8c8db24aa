"""From the objective's settings to the coefficients of the one loss.

Every recipe pays loss_i = a_i · CE_i + Σ_{j≠i} w_ij · T² · KL(p_j ‖ p_i) over R = S + K streams; they differ in a and w
alone. S students, K teachers, R streams.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ObjectiveConfig


@dataclass(frozen=True)
class Coefficients:
    """What `kernels.linear_ensemble_kl` takes beside its streams; passed on with `**vars(...)`."""

    ce_weight: Tensor  # [S] fp32
    kl_weight: Tensor | None  # [S, R] fp32; None where no student learns from another: no KL is computed
    temperature: float
    divergence: str


def coefficients(objective: ObjectiveConfig, students: int, device: torch.device) -> Coefficients:
    """Deep mutual learning (Zhang et al. 2018): peers share `objective.peers` equally, w_ij = peers/(S−1)."""
    ce_weight_S = torch.full((students,), objective.ce, dtype=torch.float32, device=device)
    if students == 1 or objective.peers == 0.0:
        return Coefficients(ce_weight_S, None, objective.temperature, objective.divergence)
    kl_weight_SR = torch.full(
        (students, students), objective.peers / (students - 1), dtype=torch.float32, device=device
    )
    kl_weight_SR.fill_diagonal_(0.0)
    return Coefficients(ce_weight_S, kl_weight_SR, objective.temperature, objective.divergence)
