"""One step's gradients: S forward passes, one loss, S backward passes.

N tokens, S students, K teachers, R streams.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.data.batches import IGNORED, Batch, Step
from engine.students.coefficients import LossCoefficients
from engine.students.cohort import Cohort
from kernels import LinearEnsembleKL, Projected, linear_ensemble_kl


class Tally:
    """A step's losses on this rank, over its micro-batches. They stay on the device until something is logged.

    losses_S are the normalised losses that the students minimise; ce_S and kl_SR are sums over tokens, in nats.
    """

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


def accumulate(
    cohort: Cohort,
    step: Step,
    coefficients: LossCoefficients,
    teachers: Callable[[Batch], Sequence[Projected]] = lambda batch: (),
) -> Tally:
    """Accumulates every student's gradient of its loss over the step's micro-batches, and returns the losses.

    `teachers` returns the streams of the K teachers for a batch.
    """
    tally = Tally(len(cohort), step.micro_batches[0].targets_N.device)
    for batch in step.micro_batches:
        with cohort.streams(batch) as streams:
            result = linear_ensemble_kl(
                streams,
                teachers(batch),
                batch.targets_N,
                ce_weight=coefficients.ce_weight,
                kl_weight=coefficients.kl_weight,
                normalizer=step.valid_tokens,
                temperature=coefficients.temperature,
                divergence=coefficients.divergence,
                kl_mask=batch.kl_mask_N,
                ignore_index=IGNORED,
            )
            for student, loss in zip(cohort, result.losses, strict=True):
                student.backward(loss, last=batch is step.micro_batches[-1])
        tally.add(result)
    return tally
