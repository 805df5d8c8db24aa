"""From the objective's settings to the coefficients of the one loss.

Every recipe pays loss_i = a_i · CE_i + Σ_{j≠i} w_ij · T² · KL(p_j ‖ p_i) over R = S + K streams; they differ in a and w
alone. S students, K teachers, R streams.
"""

from collections.abc import Sequence
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


def coefficients(
    objective: ObjectiveConfig,
    students: int,
    device: torch.device,
    *,
    teachers: Sequence[float] = (),
    labels: int = 1,
) -> Coefficients:
    """The formula of `ObjectiveConfig` as weights.

    Args:
        teachers: the K teacher streams' weights ω, their sum 1.
        labels: targets of a whole sequence. The papers' code averages cross-entropy over tokens, but sums divergences
            over a sequence's positions and averages over sequences alone (KLDivLoss, `batchmean`): as many times more.
    """
    ce_weight_S = torch.full((students,), objective.ce)
    kl_weight_SR = torch.cat(
        [
            torch.full((students, students), objective.peers / max(1, students - 1)).fill_diagonal_(0.0),
            objective.teachers * torch.tensor(teachers).expand(students, -1),
        ],
        dim=1,
    )
    if objective.reduction == "sequence":
        kl_weight_SR *= labels
    learn = bool(kl_weight_SR.any())
    return Coefficients(
        ce_weight_S.to(device), kl_weight_SR.to(device) if learn else None, objective.temperature, objective.divergence
    )
