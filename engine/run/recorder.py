"""What a run writes down while it trains: what all ranks have measured, as records, written and shown by rank 0.

S students, R streams.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.compute.hardware import EnergyMeter
from engine.data.batches import Step
from engine.reporting.metrics_log import MetricsLog
from engine.reporting.progress import Progress
from engine.reporting.records import EvaluationRecord, Record, StepRecord, StudentEvaluation, StudentStep
from engine.run.state import RunState
from engine.students.cohort import Cohort, Verdict
from engine.students.gradients import Tally
from engine.students.outer_loop import OuterUpdate
from engine.system.distributed import Runtime
from engine.teachers.teachers import Teachers


@dataclass(frozen=True)
class Measurement:
    """What was measured since the last step's record, over all ranks."""

    losses: list[list[float]]  # per student: its loss, its summed cross-entropy and, where there are, R summed KLs
    seconds: float
    student_seconds: list[float]  # of each student's own passes on this rank
    teacher_seconds: float
    joules: float | None  # None: the devices do not report it


@dataclass
class Recorder:
    """Writes a run's records. It reads the run's state and never changes it."""

    log: MetricsLog | None  # None on all ranks but 0
    progress: Progress
    cohort: Cohort
    teachers: Teachers
    runtime: Runtime
    recorded: RunState  # the state at the last step's record; at first, the one that the run begins or goes on with
    clip: float  # the largest gradient norm; 0: gradients are not clipped
    peak_flops: float | None  # FLOP/s of all ranks' devices at most, where known

    def __post_init__(self) -> None:
        self._meter = EnergyMeter(self.runtime.device)
        self._measured_at = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts neither the time nor the energy of the block as training's."""
        begin = time.monotonic()
        yield
        self._measured_at += time.monotonic() - begin
        self._meter.take()

    def measure(self, tally: Tally) -> Measurement:
        """Returns what was measured since the last call; a collective call that waits for the device."""
        joules = self._meter.take()
        parts = [tally.losses_S[:, None], tally.ce_S[:, None]]
        table = torch.cat(parts if tally.kl_SR is None else [*parts, tally.kl_SR], dim=1)
        energy = table.new_tensor([math.nan if joules is None else joules])
        *flat, joules = self.runtime.all_reduce_sum(torch.cat([table.flatten(), energy]))
        width, now = table.shape[1], time.monotonic()
        seconds, self._measured_at = now - self._measured_at, now
        return Measurement(
            [flat[start : start + width] for start in range(0, len(flat), width)],
            seconds,
            [student.clock.take() for student in self.cohort],
            self.teachers.clock.take(),
            joules if math.isfinite(joules) else None,
        )

    def streams(self) -> None:
        self._write({"kind": "streams", "step": 0, "students": self.cohort.names, "teachers": self.teachers.names})

    def event(self, step: int, text: str) -> None:
        self._write({"kind": "event", "step": step, "text": text})

    def skipped(self, step: int, students: Sequence[str]) -> None:
        reason = "loss or gradient not finite; no student stepped"
        self._write({"kind": "skipped", "step": step, "students": list(students), "reason": reason})

    def outer_update(self, step: int, update: OuterUpdate) -> None:
        self._write(
            {
                "kind": "outer",
                "step": step,
                "omega": dict(zip(self.cohort.names, update.omega, strict=True)),
                "held_out_loss": update.loss,
                "shares": update.shares,
                "step_size": update.step_size,
                "seconds": update.seconds,
            }
        )
        if not all(math.isfinite(x) for term in update.gradient.values() for x in term):
            self.event(step, "the hypergradient is not finite: the students' weights stay as they are")

    def evaluation(self, step: int, evaluations: Sequence[StudentEvaluation]) -> None:
        """`evaluations`: one per student and, where there are several students, last their ensemble's."""
        students = dict(zip(self.cohort.names, evaluations, strict=False))
        record: EvaluationRecord = {"kind": "evaluation", "step": step, "students": students}
        if len(evaluations) > len(students):
            record["ensemble"] = evaluations[-1]
        self._write(record)

    def step(
        self, step: Step, state: RunState, measurement: Measurement, verdict: Verdict, learning_rates: Sequence[float]
    ) -> None:
        """Writes the record of `step`, which was taken at `learning_rates` [S].

        Its speeds are those of all steps since the last such record. The usage in `state` includes the measurement.
        """
        before, self.recorded = self.recorded, state
        usage, seconds = state.usage, measurement.seconds
        spent = usage.flops - before.usage.flops
        tokens = state.tokens - before.tokens
        students: dict[str, StudentStep] = {}
        for i, name in enumerate(self.cohort.names):
            loss, ce, *_ = measurement.losses[i]
            flops = usage.students[name].model_flops - before.usage.students[name].model_flops
            students[name] = {
                "loss": loss,
                "ce": ce / step.valid_tokens,
                "grad_norm": verdict.gradient_norms[i],
                "lr": learning_rates[i],
                "tokens_per_second": tokens / measurement.student_seconds[i],
                "model_flops_per_second": flops / seconds,
                "clipped": 0 < self.clip < verdict.gradient_norms[i],
            }
        record: StepRecord = {
            "kind": "step",
            "step": step.number,
            "epoch": step.epoch,
            "tokens": state.tokens,
            "words": state.words,
            "seconds": seconds / (state.step - before.step),
            "tokens_per_second": tokens / seconds,
            "model_flops": usage.flops.model,
            "hardware_flops": usage.flops.hardware,
            "students": students,
            "kl": [[kl / step.valid_tokens for kl in row[2:]] for row in measurement.losses if len(row) > 2],
        }
        if self.peak_flops is not None:
            record["mfu"] = spent.model / seconds / self.peak_flops
            record["hfu"] = spent.hardware / seconds / self.peak_flops
        if usage.joules is not None:
            record["joules"] = usage.joules
        self._write(record)

    def _write(self, record: Record) -> None:
        if self.log is not None:
            self.log.write(record)
            self.progress.show(record)
