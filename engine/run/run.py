"""A run around the loop: what it records, when it evaluates and saves, how it pauses and finishes."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from engine.compute import profiling
from engine.compute.flops import Workload
from engine.compute.usage import step_cost, teachers_work
from engine.config.settings import Config
from engine.data.batches import Step, TrainingData
from engine.data.prepare import Prepared
from engine.evaluation.evaluator import Evaluator
from engine.reporting.report import write_report
from engine.run import checkpoint
from engine.run.export import export_run, export_student
from engine.run.recorder import Recorder
from engine.run.state import RunState, random_state
from engine.run.summary import final_table, summarise
from engine.students.cohort import Cohort, Verdict
from engine.students.gradients import Tally
from engine.students.outer_loop import OuterLoop
from engine.students.schedule import learning_rate
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.teachers.teachers import Teachers

MILESTONES = [digit * 10**decade for decade in (6, 7, 8) for digit in range(1, 10)] + [10**9]  # words


@dataclass(kw_only=True)
class Run:
    """Everything that the loop works on. `engine.run.build.build_run` makes it; `state` is what changes."""

    config: Config
    runtime: Runtime
    folder: Path
    prepared: Prepared
    data: TrainingData
    total_steps: int
    evaluator: Evaluator
    teachers: Teachers
    cohort: Cohort
    outer_loop: OuterLoop
    recorder: Recorder
    state: RunState
    stack: ExitStack  # closes what is open while the run trains

    def steps(self) -> Iterator[Step]:
        """Yields the steps that are left, profiled where the settings ask for it."""
        steps = self.teachers.read_ahead(self.data.steps(self.state.step + 1, self.total_steps))
        return profiling.profiled(steps, self.config.run.profile, self.folder / "profile", self.runtime)

    def learning_rates(self, step: Step) -> list[float]:
        """Returns each student's learning rate in the step."""
        optimizer, steps = self.config.optimizer, self.total_steps
        return [learning_rate(student.config, optimizer, step.number, steps) for student in self.cohort]

    def after_step(self, step: Step, tally: Tally, verdict: Verdict) -> None:
        """Counts the step, writes it down, and evaluates and saves where that is due; a collective call.

        Raises UserError where too many steps in a row were skipped.
        """
        previous, self.state = self.state, self._state_after(step, verdict)
        words_before, words = previous.words, self.state.words
        milestones = [m for m in MILESTONES if self.config.checkpoint.milestones and words_before < m <= words]
        every_words = self.config.evaluation.every_words
        words_due = every_words is not None and words_before // every_words < words // every_words
        last = step.number == self.total_steps
        evaluate = last or words_due or step.number % self.config.evaluation.every == 0
        save = last or verdict.stop or step.number % self.config.checkpoint.every == 0
        if verdict.skipped or evaluate or save or milestones or step.number % self.config.run.log_every == 0:
            self._record_step(step, tally, verdict)
        if self.outer_loop.last_update is not None:
            self.recorder.outer_update(self.state.step, self.outer_loop.last_update)
        if verdict.skipped:
            self._record_skip(verdict)
        if not (evaluate or save or milestones):
            return
        with self.recorder.paused():
            improved = evaluate and self._evaluate()
            for milestone in milestones:
                self._export_milestone(milestone)
            if improved or save:
                self._save()  # It comes last: a run that goes on from here has all the records of this step.

    def _state_after(self, step: Step, verdict: Verdict) -> RunState:
        state, skipped = self.state, verdict.skipped
        update, world_size = self.outer_loop.last_update, self.runtime.world_size
        work = Workload.of_step(step, world_size)
        cost = step_cost(
            self.config,
            [student.shape for student in self.cohort],
            teachers_work(self.teachers, step, work, world_size),
            work,
            None if update is None else Workload.of_step(update.held_out, world_size),
        )
        seconds = 0.0 if update is None else update.seconds
        return replace(
            state,
            step=step.number,
            tokens=state.tokens + step.tokens,
            words=state.words + step.words,
            updates=state.updates + (not skipped),
            skipped_in_a_row=state.skipped_in_a_row + 1 if skipped else 0,
            omega=self.outer_loop.state.omega if self.config.objective.weighted else (),
            outer_updates=self.outer_loop.state.updates,
            usage=state.usage.add_step(cost, tokens=step.tokens, words=step.words, outer_seconds=seconds),
        )

    def _record_step(self, step: Step, tally: Tally, verdict: Verdict) -> None:
        measured = self.recorder.measure(tally)
        usage = self.state.usage.add_time(
            measured.seconds, measured.student_seconds, measured.teacher_seconds, measured.joules
        )
        self.state = replace(self.state, usage=usage)
        self.recorder.step(step, self.state, measured, verdict, self.learning_rates(step))

    def _record_skip(self, verdict: Verdict) -> None:
        names = [self.cohort.names[i] for i in verdict.not_finite]
        self.recorder.skipped(self.state.step, names)
        if self.state.skipped_in_a_row >= self.config.train.skip_limit:
            raise UserError(
                f"{', '.join(names)}: loss or gradient not finite {self.state.skipped_in_a_row} steps in a row, up to "
                f"step {self.state.step}; lower the learning rate; the last checkpoint is "
                f"{checkpoint.latest(self.folder / 'checkpoints') or 'none'}"
            )

    def _evaluate(self) -> bool:
        """Evaluates every student; returns whether the mean validation loss is the best so far."""
        evaluations, phenomena = self.evaluator.evaluate(self.cohort, self.state.omega)
        self.recorder.evaluation(self.state.step, evaluations)
        losses = [evaluation["validation_loss"] for evaluation in evaluations[: len(self.cohort)]]
        mean = sum(losses) / len(losses)
        improved = math.isfinite(mean) and (self.state.best_loss is None or mean < self.state.best_loss)
        if improved:
            best = self.evaluator.describe(self.cohort, evaluations, phenomena)
            self.state = replace(self.state, best_step=self.state.step, best_loss=mean, best=best)
        return improved

    def _export_milestone(self, words: int) -> None:
        """Exports every student as BabyLM asks for it after so many words; a collective call."""
        folder, name = self.folder / "milestones", f"chck_{words // 10**6}M"
        states = [student.state() for student in self.cohort]
        with self.runtime.main_process_first():
            if self.runtime.is_main_process:
                for student, weights in zip(self.cohort, states, strict=True):
                    export_student(
                        folder / student.name / name, student.config, weights, self.prepared.tokenizer, self.state.usage
                    )
        text = f"{name}: every student exported after {self.state.words:,} words, {self.state.tokens:,} tokens"
        self.recorder.event(self.state.step, text)

    def _save(self) -> None:
        log = self.recorder.log
        position = log.position() if log else 0
        self.state = replace(self.state, metrics_position=position, random_state=random_state())
        keep = self.config.checkpoint.keep
        checkpoint.save(self.folder / "checkpoints", self.cohort, self.state, self.runtime, keep=keep)

    def stop(self) -> None:
        """Writes the report of a run that was asked to stop and has saved its checkpoint, and says how to resume it."""
        with self.runtime.main_process_first():
            if self.runtime.is_main_process:
                write_report(self.folder)
                self.stack.close()
                print(f"stopped at step {self.state.step} as asked; the same command goes on from there")

    def finish(self) -> None:
        """Exports the best checkpoint's students, writes the summary and the report, and prints the table.

        Raises UserError where no evaluation gave a finite loss.
        """
        best_step, students, peak = self.state.best_step, self.config.students, self.recorder.peak_flops
        if best_step is None:
            raise UserError(f"{self.folder}: no finite validation loss in the whole run; lower the learning rates")
        with self.runtime.main_process_first():
            if self.runtime.is_main_process:
                export_run(self.folder, self.config, self.prepared, best_step, self.folder / "students", students)
                best = checkpoint.read_state(checkpoint.at_step(self.folder / "checkpoints", best_step))
                summary = summarise(self.config, self.prepared, self.cohort, self.runtime, self.state, best, peak)
                (self.folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
                write_report(self.folder)
                self.stack.close()  # The progress display ends before the table begins.
                print(final_table(summary))
