"""All students of a run: they all step together, or none does, where a NaN or an infinity appears.

Gradients reach an engine through its own loss alone, so that no graph is shared between engines.

N tokens, D hidden, S students.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor

from engine.data.batches import Batch
from engine.students.student import Student
from engine.system.distributed import Runtime
from kernels import Projected


@dataclass(frozen=True)
class Verdict:
    """How a step ended, the same on every rank."""

    gradient_norms: list[float]  # per student, before clipping; NaN or infinite if the gradient is not finite
    not_finite: list[int]  # indices of the students whose loss or gradient is not finite; if any, no student stepped
    stop: bool  # whether some rank was asked to stop

    @property
    def skipped(self) -> bool:
        return bool(self.not_finite)


class Cohort(list[Student]):
    """All students of a run."""

    def __init__(self, students: Sequence[Student], runtime: Runtime) -> None:
        super().__init__(students)
        self._runtime = runtime

    @property
    def names(self) -> list[str]:
        return [student.name for student in self]

    @contextmanager
    def streams(self, batch: Batch) -> Iterator[list[Projected]]:
        """Yields every student's stream of logits; under ZeRO 3 the heads are whole on every rank until the block ends.

        They are gathered once the bodies have run: a body releases the embedding that it has used, and a tied head with
        it.
        """
        hidden = [student.body(batch) for student in self]
        models = [student.model for student in self if student.zero_stage == 3]
        heads = [head for model in models for head in (model.head, model.head_bias) if head is not None]
        with deepspeed.zero.GatheredParameters(heads) if heads else nullcontext():
            yield [student.model.project(hidden_ND) for student, hidden_ND in zip(self, hidden, strict=True)]

    def update(self, losses_S: Tensor, ce_S: Tensor, learning_rates: Sequence[float], *, stop: bool) -> Verdict:
        """Has every student step, or none if a loss or gradient of one is not finite on any rank; a collective call.

        One all-reduce tells every rank the norms, which losses are not finite, and whether a rank was asked to stop.
        The host waits for it.

        Args:
            losses_S, ce_S: this rank's losses and cross-entropies, summed over micro-batches.
        """
        squares_S = torch.stack([student.squared_gradient_norm() for student in self])
        # Multiplied by zero, what is finite vanishes, and what is not becomes NaN.
        packed = torch.cat([squares_S + 0.0 * losses_S.float(), 0.0 * ce_S.float(), squares_S.new_tensor([stop])])
        *sums, stopping_ranks = self._runtime.all_reduce_sum(packed)
        norms = [math.sqrt(square) if square >= 0 else math.nan for square in sums[: len(self)]]
        # Through the divergence one student's NaN reaches the losses of all; a cross-entropy is a student's own.
        not_finite = [i for i, zero_or_nan in enumerate(sums[len(self) :]) if zero_or_nan != 0]
        not_finite = not_finite or [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        for student, learning_rate, norm in zip(self, learning_rates, norms, strict=True):
            if not_finite:
                student.discard_gradients()
            else:
                student.step(learning_rate, norm)
        return Verdict(norms, not_finite, stop=stopping_ranks > 0)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts all models in evaluation mode, without gradients, for the block."""
        for student in self:
            student.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for student in self:
                student.engine.train()
