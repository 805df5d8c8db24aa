"""A run's journal: what all ranks have measured, as the records of engine.metrics, written and shown by rank 0.

S students, R streams.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from engine.checkpoint import State
from engine.cohort import Cohort, Outcome
from engine.data import Step
from engine.hardware import EnergyMeter
from engine.metrics import MetricsLog, Record, StepRecord, StudentEvaluation
from engine.objective import Tally
from engine.outer_loop import Update
from engine.progress import Progress
from engine.runtime import Runtime
from engine.teachers import Teachers


class Journal:
    """Speeds and energy in a step's record are those of all steps since the last such record."""

    def __init__(
        self,
        log: MetricsLog | None,
        progress: Progress,
        cohort: Cohort,
        teachers: Teachers,
        runtime: Runtime,
        state: State,
        *,
        clip: float,
        peak: float | None,
    ) -> None:
        """`log`: None on all ranks but 0. `clip`: as in OptimizerConfig. `peak`: all ranks' FLOP/s, where known."""
        self._log, self._progress = log, progress
        self._cohort, self._teachers, self._runtime = cohort, teachers, runtime
        self._clip, self._peak = clip, peak
        self._names = [student.name for student in cohort]
        self._meter = EnergyMeter(runtime.device)
        self._since, self._before = time.monotonic(), state  # when the last step's record was made, and of which state

    def position(self) -> int:
        """Bytes of metrics.jsonl, safe on the disk."""
        return self._log.position() if self._log else 0

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What happens in here is neither training time nor training's energy."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin
        self._meter.take()

    def streams(self) -> None:
        self._write({"kind": "streams", "step": 0, "students": self._names, "teachers": self._teachers.names})

    def event(self, step: int, text: str) -> None:
        self._write({"kind": "event", "step": step, "text": text})

    def skipped(self, step: int, students: Sequence[str]) -> None:
        reason = "loss or gradient not finite; no student stepped"
        self._write({"kind": "skipped", "step": step, "students": list(students), "reason": reason})

    def outer(self, step: int, update: Update) -> None:
        self._write(
            {
                "kind": "outer",
                "step": step,
                "omega": dict(zip(self._names, update.omega, strict=True)),
                "held_out_loss": update.loss,
                "shares": update.shares,
                "step_size": update.step_size,
                "seconds": update.seconds,
            }
        )
        if not all(math.isfinite(x) for term in update.gradient.values() for x in term):
            self.event(step, "the hypergradient is not finite: the students' weights stay as they are")

    def evaluation(self, step: int, found: Sequence[StudentEvaluation]) -> None:
        """`found`: of each student and, where there are several, last their ensemble."""
        students = dict(zip(self._names, found, strict=False))
        if len(found) > len(students):
            self._write({"kind": "evaluation", "step": step, "students": students, "ensemble": found[-1]})
        else:
            self._write({"kind": "evaluation", "step": step, "students": students})

    def step(self, state: State, step: Step, tally: Tally, outcome: Outcome, rates: Sequence[float]) -> State:
        """The record of `step`, taken at learning `rates` [S]; the state after it, with the time and the energy since
        the last record in its ledger. A collective call."""
        joules = self._meter.take()
        parts = [tally.losses_S[:, None], tally.ce_S[:, None]]
        table = torch.cat(parts if tally.kl_SR is None else [*parts, tally.kl_SR], dim=1)
        *flat, joules = self._runtime.agree(
            torch.cat([table.flatten(), table.new_tensor([math.nan if joules is None else joules])])
        )
        width = table.shape[1]
        rows = [flat[start : start + width] for start in range(0, len(flat), width)]
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        own_seconds = [student.clock.take() for student in self._cohort]
        ledger = state.ledger.clocked(
            seconds, own_seconds, self._teachers.clock.take(), joules if math.isfinite(joules) else None
        )
        state = replace(state, ledger=ledger)
        before, self._before = self._before, state
        steps, tokens = state.step - before.step, state.tokens - before.tokens
        flops, spent = ledger.flops, ledger.flops - before.ledger.flops
        record: StepRecord = {
            "kind": "step",
            "step": step.number,
            "epoch": step.epoch,
            "tokens": state.tokens,
            "words": state.words,
            "seconds": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "model_flops": flops.model,
            "hardware_flops": flops.hardware,
            "students": {
                name: {
                    "loss": loss,
                    "ce": ce / step.valid_tokens,
                    "grad_norm": norm,
                    "lr": rate,
                    "tokens_per_second": tokens / own,
                    "model_flops_per_second": (
                        ledger.students[name].model_flops - before.ledger.students[name].model_flops
                    )
                    / seconds,
                    "clipped": 0 < self._clip < norm,
                }
                for name, (loss, ce, *_), norm, rate, own in zip(
                    self._names, rows, outcome.gradient_norms, rates, own_seconds, strict=True
                )
            },
            "kl": [[x / step.valid_tokens for x in row[2:]] for row in rows if width > 2],
        }
        if self._peak is not None:
            record["mfu"], record["hfu"] = (x / seconds / self._peak for x in (spent.model, spent.hardware))
        if ledger.joules is not None:
            record["joules"] = ledger.joules
        self._write(record)
        return state

    def _write(self, record: Record) -> None:
        if self._log is not None:
            self._log.write(record)
            self._progress.show(record)
