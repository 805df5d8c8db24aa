"""The outer loop of weighted mutual learning (Iyer 2024): it learns the weights ω of S students on held-out text."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.settings import OuterConfig
from engine.data.batches import Step, TrainingData
from engine.students.coefficients import LossCoefficients, LossWeighting
from engine.students.cohort import Cohort, Verdict
from engine.students.hypergradient import FunctionalStudent, Parameters, hypergradient


@dataclass(frozen=True)
class OuterUpdate:
    """One update of ω, for the record."""

    omega: list[float]  # ω after the update
    loss: float  # L2 before the update, nats per token
    gradient: dict[str, list[float]]  # the terms direct, own and peers, which add up to the hypergradient
    shares: dict[str, float]  # each term's share in what moved ω
    step_size: float
    seconds: float
    held_out: Step  # the held-out text that it read


@dataclass(frozen=True)
class OuterState:
    """What a checkpoint keeps of the outer loop. Floats survive JSON bit for bit."""

    omega: tuple[float, ...]
    updates: int = 0


class OuterLoop:
    """The students' weights ω over a run: `before_step` and `after_step` go around every optimizer step.

    Every `config.every` steps ω makes a step of mirror descent along the hypergradient. Where `config.every` is None, ω
    stays as it is.
    """

    def __init__(
        self,
        config: OuterConfig,
        steps: int,
        weighting: LossWeighting,
        held_out: TrainingData | None,
        state: OuterState | None = None,
    ) -> None:
        """
        Args:
            steps: of the whole run.
            held_out: the held-out split, cut into steps like training data; update u reads step u. None: ω is constant.
            state: a checkpoint's, to go on from.
        """
        self._config, self._steps, self._weighting, self._held_out = config, steps, weighting, held_out
        initial = config.initial or (1.0,) * weighting.students
        self.state = state or OuterState(tuple(w / sum(initial) for w in initial))
        self.last_update: OuterUpdate | None = None  # the update that the last step brought, if there was one
        self._students: list[FunctionalStudent] = []
        self._before: list[Parameters] = []

    @property
    def omega_S(self) -> Tensor:
        """The weights ω [S], float64, on the device."""
        return torch.tensor(self.state.omega, dtype=torch.float64, device=self._weighting.device)

    def coefficients(self) -> LossCoefficients:
        """Returns the loss's coefficients at the present ω."""
        return self._weighting.coefficients(self.omega_S)

    def is_due(self, step: int) -> bool:
        """Returns whether ω is updated after this step."""
        return self._config.every is not None and step % self._config.every == 0

    def step_size(self, step: int) -> float:
        """Returns the step size of mirror descent, which falls over the run as half a cosine."""
        first, last = self._config.step_size, self._config.last_step_size
        return last + (first - last) * (1 + math.cos(math.pi * step / self._steps)) / 2

    def before_step(self, step: Step, cohort: Cohort) -> None:
        """Copies the parameters that the step will change, where an update will need them; a collective call."""
        self._before = []
        if self.is_due(step.number) and self._config.terms == "all":
            self._before = [{name: p.clone() for name, p in student.full_parameters().items()} for student in cohort]

    def after_step(
        self, step: Step, cohort: Cohort, coefficients: LossCoefficients, verdict: Verdict
    ) -> LossCoefficients:
        """Returns the coefficients of the next step; they are new where ω was updated. A collective call.

        A step that was skipped brings no update.
        """
        self.last_update, before, self._before = None, self._before, []
        if not self.is_due(step.number) or verdict.skipped:
            return coefficients
        assert self._held_out is not None, "an update reads held-out text"
        begin = time.perf_counter()
        self._students = self._students or [FunctionalStudent(s.shape, s.config.seed) for s in cohort]
        after = [student.full_parameters() for student in cohort]
        (held_out,) = self._held_out.steps(self.state.updates + 1, self.state.updates + 1)
        # What the step multiplied gradients by. AdamW's own scaling is left out: the paper's inner step is plain SGD.
        inner_step_sizes = [s.optimizer.param_groups[0]["lr"] / s.divisor.item() for s in cohort]
        gradient = hypergradient(
            self._students,
            before or after,
            after,
            inner_step_sizes,
            step,
            held_out,
            self.omega_S,
            self._weighting,
            terms=self._config.terms,
        )
        omega, total, step_size = list(self.state.omega), gradient.total.tolist(), self.step_size(step.number)
        if all(map(math.isfinite, total)):
            omega = mirror_descent(omega, total, step_size, self._config.min_weight)
        self.state = OuterState(tuple(omega), self.state.updates + 1)
        seconds = time.perf_counter() - begin
        self.last_update = OuterUpdate(
            omega, gradient.loss, gradient.terms(), gradient.shares(), step_size, seconds, held_out
        )
        return self.coefficients()


def mirror_descent(
    omega: Sequence[float], gradient: Sequence[float], step_size: float, min_weight: float
) -> list[float]:
    """Returns ω_i·e^{−η·g_i} / Σ_j ω_j·e^{−η·g_j}, with no weight below min_weight / (1 + S·min_weight)."""
    gradient_S = torch.tensor(gradient, dtype=torch.float64)
    log_S = torch.tensor(omega, dtype=torch.float64).log() - step_size * (gradient_S - gradient_S.min())
    moved_S = log_S.softmax(0).clamp(min=min_weight)
    return (moved_S / moved_S.sum()).tolist()
