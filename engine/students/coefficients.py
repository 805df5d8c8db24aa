"""The coefficients of the one loss, from the objective's settings and the students' weights ω.

Every recipe pays loss_i = a_i · CE_i + Σ_{j≠i} w_ij · T² · KL(p_j ‖ p_i) over R = S + K streams. Recipes differ in the
coefficients a and w alone.

S students, K teachers, R streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.settings import ObjectiveConfig


@dataclass(frozen=True)
class LossCoefficients:
    """What `kernels.linear_ensemble_kl` takes beside its streams, and under the same names."""

    ce_weight: Tensor  # [S] fp32
    kl_weight: Tensor | None  # [S, R] fp32; None where no student learns from another: then no KL is computed
    temperature: float
    divergence: str


@dataclass(frozen=True)
class LossWeighting:
    """How the loss's coefficients follow from the settings and from ω.

    Attributes:
        students: S.
        teacher_weights: the weights of the K teacher streams, which sum to 1.
        targets_per_sequence: the targets in one sequence. With objective.reduction = sequence divergences are
            multiplied by it: the papers' code averages cross-entropy over tokens, but sums divergences over a
            sequence's positions and averages them over sequences alone (KLDivLoss, `batchmean`).
    """

    objective: ObjectiveConfig
    students: int
    device: torch.device
    teacher_weights: Sequence[float] = ()
    targets_per_sequence: int = 1

    def coefficients(self, omega_S: Tensor | None = None) -> LossCoefficients:
        """Returns the coefficients of the formula in `ObjectiveConfig`, which are affine in `omega_S`, [S].

        `omega_S` is read only where objective.weighted is true, and is needed there.
        """
        objective, students = self.objective, self.students
        share_S = torch.ones(students, device=self.device)
        if objective.weighted:
            assert omega_S is not None, "objective.weighted needs the students' weights"
            share_S = students * omega_S.to(self.device, torch.float32)
        kl_weight_SR = None
        if self.teacher_weights or (students > 1 and objective.peer_weight != 0):
            per_peer = objective.peer_weight / (1 if objective.weighted else max(1, students - 1))
            peers_SS = per_peer * share_S.expand(students, -1)
            teachers_K = objective.teacher_weight * torch.tensor(self.teacher_weights, device=self.device)
            kl_weight_SR = torch.cat([peers_SS - peers_SS.diagonal().diag(), teachers_K.expand(students, -1)], dim=1)
            kl_weight_SR *= self.targets_per_sequence if objective.reduction == "sequence" else 1
        return LossCoefficients(
            objective.ce_weight * share_S, kl_weight_SR, objective.temperature, objective.divergence
        )
