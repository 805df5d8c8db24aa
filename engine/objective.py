"""The one loss: its coefficients from the objective's settings, and what it adds up to over a step.

Every recipe pays loss_i = a_i · CE_i + Σ_{j≠i} w_ij · T² · KL(p_j ‖ p_i) over R = S + K streams; they differ in a and w
alone. S students, K teachers, R streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ObjectiveConfig
from kernels import LinearEnsembleKL


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
    omega: Tensor | None = None,
    teachers: Sequence[float] = (),
    labels: int = 1,
) -> Coefficients:
    """The formula of `ObjectiveConfig` as weights.

    Args:
        omega: [S], the students' weights where `objective.weighted`; the coefficients are affine in them.
        teachers: the K teacher streams' weights ω, their sum 1.
        labels: targets of a whole sequence. The papers' code averages cross-entropy over tokens, but sums divergences
            over a sequence's positions and averages over sequences alone (KLDivLoss, `batchmean`): as many times more.
    """
    share_S = torch.ones(students, device=device) if omega is None else students * omega.to(device, torch.float32)
    among = objective.peers / (1 if objective.weighted else max(1, students - 1))
    peers_SS = among * share_S.expand(students, -1)
    kl_weight_SR = torch.cat(
        [
            peers_SS - peers_SS.diagonal().diag(),
            objective.teachers * torch.tensor(teachers, device=device).expand(students, -1),
        ],
        dim=1,
    )
    if objective.reduction == "sequence":
        kl_weight_SR *= labels
    alone = not teachers and (students == 1 or objective.peers == 0)
    return Coefficients(
        objective.ce * share_S, None if alone else kl_weight_SR, objective.temperature, objective.divergence
    )


class Tally:
    """What a step's micro-batches add up to on this rank; it stays on the device until something is logged."""

    def __init__(self, students: int, device: torch.device) -> None:
        self.losses_S = torch.zeros(students, dtype=torch.float64, device=device)
        self.ce_S = torch.zeros(students, dtype=torch.float64, device=device)
        self.kl_SR: Tensor | None = None

    def add(self, result: LinearEnsembleKL) -> None:
        self.losses_S += torch.stack(result.losses).detach()
        self.ce_S += result.ce.sum(-1, dtype=torch.float64)
        if result.kl is not None:
            kl_SR = result.kl.sum(-1, dtype=torch.float64)
            self.kl_SR = kl_SR if self.kl_SR is None else self.kl_SR + kl_SR
