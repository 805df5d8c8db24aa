"""A run's life around the loop: how it begins or resumes, what it records, when it evaluates and saves, how it ends.

    runs/<name>/
        config.yaml       the settings, resolved, with the commit of the code
        metrics.jsonl     engine.metrics
        tensorboard/
        checkpoints/      engine.checkpoint
        students/<name>/  Hugging Face folders of the best checkpoint
        milestones/<name>/chck_<n>M/   the same after n million words
        summary.json      the final table
        profile/          engine.profiling, where asked for
        report.html
        ranks.pid         process ids of the ranks on rank 0's node while it trains: where to send SIGTERM or SIGUSR1

S students, R streams.
"""

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine import checkpoint, profiling, schedule, teacher_cache
from engine import config as settings
from engine import ledger as ledgers
from engine.checkpoint import State
from engine.checks import check_profile, check_same, steps_of
from engine.cohort import Cohort, Outcome, Student, new_model
from engine.config import Config
from engine.corpus.prepare import prepare
from engine.data import HeldOutData, Step, TokenFile, TrainingData, WordStarts, shares
from engine.evaluation.tasks import Task, minimal_pairs, read_tasks
from engine.evaluation.watch import PAIRS, Watch
from engine.evaluation.zero_shot import ZeroShot
from engine.export import export_record, export_run, import_student, shape_of_folder
from engine.flops import Text
from engine.hardware import peak
from engine.journal import Journal
from engine.ledger import Ledger
from engine.masking import MaskedFile, Masking
from engine.metrics import MetricsLog
from engine.models.families import shape_of
from engine.objective import Coefficients, Tally, coefficients
from engine.outer_loop import OuterLoop, OuterState
from engine.progress import Progress
from engine.report import write_report
from engine.runtime import Runtime, git_commit
from engine.summary import final_table, summarise
from engine.teachers import NO_TEACHERS, STORAGE, Teachers, folder_of, identities, load_teachers

HELD_OUT_SEED = 0  # of its masks, in every run
MILESTONES = [digit * 10**decade for decade in (6, 7, 8) for digit in range(1, 10)] + [10**9]  # words


class Run:
    """Everything the loop works on, made ready to go on from where the run stands."""

    def __init__(self, config: Config, runtime: Runtime, stack: ExitStack) -> None:
        self.config, self.runtime, self._stack = config, runtime, stack
        self.folder = Path(config.run.folder) / config.run.name
        self.checkpoints = self.folder / "checkpoints"
        found = self._found()
        tasks = self._tasks()
        shares(config.train.batch, config.train.micro_batch, runtime.world)  # refused before the text is prepared

        with runtime.main_first():  # the others find it prepared
            self.prepared = prepare(config.data, say=print if runtime.is_main else lambda _: None)
        train_file = self._file(self.prepared.train, config.train.seed, open_end=config.objective.kl_everywhere)
        held_out_file = self._file(self.prepared.validation, HELD_OUT_SEED)
        self.data = TrainingData(
            train_file,
            batch=config.train.batch,
            micro_batch=config.train.micro_batch,
            seed=config.train.seed,
            random_offsets=config.train.chunks == "random",
            word_starts=WordStarts(self.prepared.tokenizer.surfaces()),
            rank=runtime.rank,
            world=runtime.world,
            device=runtime.device,
        )
        self.steps = steps_of(config, train_file.chunks)
        check_profile(config.run, self.steps, runtime)
        held_out = HeldOutData(
            held_out_file,
            tokens=config.evaluation.tokens,
            batch=self.data.micro_batch,
            rank=runtime.rank,
            world=runtime.world,
            device=runtime.device,
        )
        if config.evaluation.pairs == "auto":
            tasks.append(minimal_pairs(PAIRS, self.prepared.pairs))
        positions = min(student.positions for student in config.students)
        tokenizer = self.prepared.tokenizer
        questions = ZeroShot(tasks, tokenizer, runtime, positions=positions, share=False, masked=config.masked)
        self.watch = Watch(config.evaluation, held_out, questions, tokenizer, runtime)

        self.state = State(self.prepared.identity) if found is None else checkpoint.read_state(found)
        if self.state.data != self.prepared.identity:
            raise ValueError(
                f"{self.folder} was trained on data {self.state.data[:8]}, and data.path={config.data.path} is now "
                f"{self.prepared.identity[:8]}: restore the text, or choose another run.name"
            )
        self.teachers = self._teachers(found)
        self.cohort = self._cohort(found)
        self.outer_data = self._outer_data(held_out_file)
        outer_state = OuterState(self.state.omega, self.state.outer_updates) if self.state.omega else None
        self.outer = OuterLoop(config.outer, len(self.cohort), self.steps, self.weigh, runtime, outer_state)

        self._teacher_shapes = [shape_of_folder(folder_of(t), f"teachers: {t.path}") for t in config.teachers]
        if not self.state.ledger.students:
            self.state = replace(self.state, ledger=self._new_ledger())
        self.peak = self._peak()
        self.journal = self._begin_folder(found, stack)

    def _found(self) -> Path | None:
        """The checkpoint to go on from. ValueError where the folder is another run's, or not as `resume` wants it."""
        resume, exists = self.config.run.resume, (self.folder / "config.yaml").is_file()
        if exists and resume == "never":
            raise ValueError(f"{self.folder} exists and run.resume=never: choose another run.name, or run.resume=auto")
        if exists:
            check_same(self.config, self.folder / "config.yaml")
        found = checkpoint.latest(self.checkpoints)
        if found is None and resume == "always":
            raise ValueError(f"{self.checkpoints} holds no checkpoint and run.resume=always: take run.resume=auto")
        return found

    def _tasks(self) -> list[Task]:
        """The zero-shot tasks that the settings name; the prepared folder's own pairs are not among them."""
        evaluation = self.config.evaluation
        tasks = [] if evaluation.data is None else read_tasks(evaluation.tasks, Path(evaluation.data))
        return tasks if evaluation.pairs in ("auto", "none") else [*tasks, minimal_pairs(PAIRS, Path(evaluation.pairs))]

    def _file(self, path: Path, seed: int, *, open_end: bool = False) -> TokenFile:
        dtype, length, tokenizer = self.prepared.manifest["dtype"], self.config.train.length, self.prepared.tokenizer
        if not self.config.masked:
            return TokenFile(path, dtype, length, open_end=open_end)
        assert tokenizer.mask is not None, "data.tokenizer.mask"
        return MaskedFile(path, dtype, length, Masking(tokenizer.size, tokenizer.mask, tokenizer.special, seed))

    def _outer_data(self, held_out: TokenFile) -> TrainingData | None:
        """What the outer loop reads; None where ω stays as it is."""
        sequences, world = self.config.outer.sequences, self.runtime.world
        if self.config.outer.every is None:
            return None
        if sequences % world or sequences > held_out.chunks:
            raise ValueError(
                f"outer.sequences={sequences}: expected a multiple of the {world} rank(s), and at most the "
                f"{held_out.chunks} sequences of the held-out split"
            )
        share = sequences // world
        return TrainingData(
            held_out,
            batch=sequences,
            micro_batch=math.gcd(share, self.data.micro_batch),
            seed=self.config.train.seed,
            random_offsets=False,
            rank=self.runtime.rank,
            world=world,
            device=self.runtime.device,
        )

    def _teachers(self, found: Path | None) -> Teachers:
        if not self.config.teachers:
            return NO_TEACHERS
        found_there = identities(self.config)
        if found is not None and self.state.teachers != found_there:
            paths = ", ".join(teacher.path for teacher in self.config.teachers)
            raise ValueError(
                f"{self.folder} has learnt from others than {paths} now hold: restore them, or choose another run.name"
            )
        self.state = replace(self.state, teachers=found_there)
        if self.config.cache is not None:
            return teacher_cache.teachers(self.config, self.prepared, self.data, self.runtime, found_there)
        return load_teachers(self.config, self.prepared.tokenizer, self.runtime.device)

    def _cohort(self, found: Path | None) -> Cohort:
        vocabulary = self.prepared.tokenizer.size
        students = []
        for config in self.config.students:
            record = None
            if found is not None:
                record = checkpoint.read_student(found, config.name)
            elif config.init is not None:
                record = import_student(config, shape_of(config, vocabulary), self.prepared.tokenizer)
            model = new_model(config, vocabulary, record, recompute=self.config.train.recompute)
            student = Student(config, model, self.config.train, self.config.optimizer, self.runtime)
            if found is not None and record is not None:
                student.restore(record, self.state.updates)
            students.append(student)
        if found is not None:
            checkpoint.set_random_state(self.state.random_state)
        return Cohort(students, self.runtime)

    def _new_ledger(self) -> Ledger:
        length, cached = self.config.train.length, None
        if self.config.cache is not None:
            cached = (self._teacher_shapes, Text.whole(self.data.file.chunks, length))
        folders = [folder_of(teacher) for teacher in self.config.teachers]
        folders += [Path(student.config.init) for student in self.cohort if student.config.init is not None]
        run = f"{self.config.run.name}, begun {datetime.now(UTC).isoformat(timespec='seconds')}"
        return ledgers.begin(run, [student.name for student in self.cohort], folders, cached)

    def _peak(self) -> float | None:
        """FLOP/s of all ranks' devices at most, where known; a collective call."""
        self.runtime.barrier()  # ranks that share a CPU are measured side by side
        own = peak(self.runtime.device, STORAGE[self.config.train.precision])
        values = torch.tensor([math.nan if own is None else own], dtype=torch.float64, device=self.runtime.device)
        (total,) = self.runtime.agree(values)
        return total if math.isfinite(total) else None

    def _begin_folder(self, found: Path | None, stack: ExitStack) -> Journal:
        log: MetricsLog | None = None
        ranks: list[Any] = [None] * self.runtime.world
        dist.all_gather_object(ranks, (socket.gethostname(), os.getpid()))
        with self.runtime.main_first():
            if self.runtime.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Of rank 0's node: on another, the same number is another process. One that is told tells all.
                self._lock([pid for host, pid in ranks if host == socket.gethostname()], stack)
                settings.save(self.config, self.folder / "config.yaml", git_commit=git_commit())
                log = stack.enter_context(MetricsLog(self.folder, self.state.metrics_position))
        progress = stack.enter_context(Progress(self.steps, start=self.state.step, rank=self.runtime.rank))
        place = f"{self.runtime.world} rank(s), ZeRO {self.config.train.stage(self.runtime.world)}"
        before, self.state = self.state.place, replace(self.state, place=place)
        clip = self.config.optimizer.clip
        journal = Journal(
            log, progress, self.cohort, self.teachers, self.runtime, self.state, clip=clip, peak=self.peak
        )
        if found is None:
            journal.streams()
        elif self.runtime.is_main:
            print(f"going on from {found}, step {self.state.step} of {self.steps}")
        if before not in ("", place):
            journal.event(self.state.step, f"goes on with {place}, after {before}")
        return journal

    def _lock(self, pids: list[int], stack: ExitStack) -> None:
        """Leave the process ids in the folder, and hold it: ValueError where another run does."""
        path = self.folder / "ranks.pid"
        file = stack.enter_context(path.open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{self.folder} is being trained right now, by processes {file.read().strip()}: wait for them, stop "
                "them, or choose another run.name"
            ) from None
        file.truncate(0)
        file.write(" ".join(map(str, pids)) + "\n")
        file.flush()
        stack.callback(path.unlink, missing_ok=True)

    def profiled(self, steps: Iterator[Step]) -> Iterator[Step]:
        chosen, memory = self.config.run.profile, self.config.run.memory_snapshot
        return profiling.profiled(steps, chosen, self.folder / "profile", self.runtime, memory=memory)

    def weigh(self, omega_S: Tensor) -> Coefficients:
        """The loss's coefficients where ω are the students' weights."""
        return coefficients(
            self.config.objective,
            len(self.cohort),
            self.runtime.device,
            omega=omega_S if self.config.objective.weighted else None,
            teachers=self.teachers.weights,
            labels=self.data.file.predicted(0),
        )

    def learning_rates(self, step: Step) -> list[float]:
        factor = schedule.factor(self.config.optimizer, step.number, self.steps)
        return [student.config.learning_rate * factor for student in self.cohort]

    def record(self, step: Step, tally: Tally, outcome: Outcome) -> None:
        """Write down what the step did; evaluate and save where that is due."""
        skipped, words = bool(outcome.bad), self.state.words + step.words
        milestones = [n for n in MILESTONES if self.config.checkpoint.milestones and self.state.words < n <= words]
        every = self.config.evaluation.every_words
        evaluate = every is not None and self.state.words // every < words // every
        self.state = replace(
            self.state,
            step=step.number,
            tokens=self.state.tokens + step.tokens,
            words=words,
            updates=self.state.updates + (not skipped),
            skipped_in_a_row=self.state.skipped_in_a_row + 1 if skipped else 0,
            omega=self.outer.state.omega if self.config.objective.weighted else (),
            outer_updates=self.outer.state.updates,
            ledger=self._spent(step),
        )
        last = step.number == self.steps
        evaluate = evaluate or last or step.number % self.config.evaluation.every == 0
        save = last or outcome.stop or step.number % self.config.checkpoint.every == 0
        if skipped or evaluate or save or milestones or step.number % self.config.run.log_every == 0:
            self.state = self.journal.step(self.state, step, tally, outcome, self.learning_rates(step))
        if self.outer.last is not None:
            self.journal.outer(self.state.step, self.outer.last)
        if skipped:
            self._skip(outcome)
        if not (evaluate or save or milestones):
            return
        with self.journal.off_the_clock():
            improved = evaluate and self._evaluate()
            for milestone in milestones:
                self._export_milestone(milestone)
            if improved or save:
                self._save()  # last: a run that goes on from here has all the records of this step

    def _spent(self, step: Step) -> Ledger:
        """The ledger with what the step has cost."""
        update = self.outer.last
        cost = ledgers.step_cost(
            self.config,
            [student.shape for student in self.cohort],
            self._teacher_shapes if self.config.cache is None else [],
            Text.of(step, self.runtime.world),
            None if update is None else update.text,
        )
        seconds = 0.0 if update is None else update.seconds
        return self.state.ledger.spend(cost, tokens=step.tokens, words=step.words, outer_seconds=seconds)

    def _skip(self, outcome: Outcome) -> None:
        """Raises ValueError where too many steps in a row were skipped."""
        names = [self.cohort[i].name for i in outcome.bad]
        self.journal.skipped(self.state.step, names)
        if self.state.skipped_in_a_row >= self.config.train.skip_limit:
            raise ValueError(
                f"{', '.join(names)}: loss or gradient not finite {self.state.skipped_in_a_row} steps in a row, up to "
                f"step {self.state.step}; lower the learning rate; the last checkpoint is "
                f"{checkpoint.latest(self.checkpoints) or 'none'}"
            )

    def _evaluate(self) -> bool:
        """Evaluate every student; whether the mean validation loss is the best so far."""
        found, phenomena = self.watch.evaluate(self.cohort, self.state.omega)
        self.journal.evaluation(self.state.step, found)
        mean = sum(one["validation_loss"] for one in found[: len(self.cohort)]) / len(self.cohort)
        improved = math.isfinite(mean) and (self.state.best_loss is None or mean < self.state.best_loss)
        if improved:
            best = self.watch.describe(self.cohort, found, phenomena)
            self.state = replace(self.state, best_step=self.state.step, best_loss=mean, best=best)
        return improved

    def _export_milestone(self, words: int) -> None:
        """Every student as BabyLM asks for it after so many words; a collective call."""
        folder = self.folder / "milestones"
        records = [student.record() for student in self.cohort]
        name, ledger = f"chck_{words // 10**6}M", self.state.ledger
        with self.runtime.main_first():
            if self.runtime.is_main:
                for student, record in zip(self.cohort, records, strict=True):
                    export_record(folder / student.name / name, student.config, record, self.prepared.tokenizer, ledger)
        text = f"{name}: every student exported after {self.state.words:,} words, {self.state.tokens:,} tokens"
        self.journal.event(self.state.step, text)

    def _save(self) -> None:
        position, random_state = self.journal.position(), checkpoint.random_state()
        self.state = replace(self.state, metrics_position=position, random_state=random_state)
        checkpoint.save(self.checkpoints, self.cohort, self.state, self.runtime, keep=self.config.checkpoint.keep)

    def pause(self) -> None:
        """Asked to stop: the checkpoint is written; say how to go on."""
        with self.runtime.main_first():
            if self.runtime.is_main:
                write_report(self.folder)
                self._stack.close()
                print(f"stopped at step {self.state.step} as asked; the same command goes on from there")

    def finish(self) -> None:
        """Export the best checkpoint's students, write the summary and the report, print the table.

        Raises ValueError where there is none: no evaluation found a finite loss.
        """
        if self.state.best_step is None:
            raise ValueError(f"{self.folder}: no finite validation loss in the whole run; lower the learning rates")
        with self.runtime.main_first():
            if self.runtime.is_main:
                export_run(self.folder, self.config, self.prepared, self.state.best_step)
                omega = checkpoint.read_state(checkpoint.at_step(self.checkpoints, self.state.best_step)).omega
                summary = summarise(
                    self.folder,
                    self.config,
                    self.prepared,
                    self.cohort,
                    self.runtime,
                    self.state,
                    omega=omega,
                    peak=self.peak,
                )
                (self.folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
                write_report(self.folder)
                self._stack.close()  # the progress display ends before the table begins
                print(final_table(summary))
