"""How a run is made ready: from settings to everything that the loop works on, begun or resumed."""

import math
import os
import socket
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from engine.compute.hardware import peak_flops
from engine.compute.usage import Usage, new_usage
from engine.config import loading
from engine.config.settings import Config, EvaluationConfig
from engine.data.batches import HeldOutData, TokenFile, TrainingData, WordStarts, share_of_batch
from engine.data.masking import MaskedFile, Masking
from engine.data.prepare import Prepared, prepare
from engine.evaluation.evaluator import PAIRS, Evaluator
from engine.evaluation.tasks import Task, minimal_pairs, read_tasks
from engine.evaluation.zero_shot import ZeroShot
from engine.models.families import shape_of
from engine.models.huggingface import import_weights
from engine.reporting.metrics_log import MetricsLog
from engine.reporting.progress import Progress
from engine.run import checkpoint
from engine.run.check_settings import number_of_steps
from engine.run.folder import checkpoint_to_resume, lock
from engine.run.recorder import Recorder
from engine.run.run import Run
from engine.run.state import RunState, set_random_state
from engine.students.coefficients import LossWeighting
from engine.students.cohort import Cohort
from engine.students.outer_loop import OuterLoop, OuterState
from engine.students.student import Student, student_model
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.system.provenance import git_commit
from engine.teachers.cache import cached_teachers
from engine.teachers.teachers import STORAGE, Teachers, folder_of, hash_teachers, load_teachers

HELD_OUT_SEED = 0  # of the held-out text's masks, in every run


def build_run(config: Config, runtime: Runtime, stack: ExitStack) -> Run:
    """Returns the run that `config` asks for, ready to take its next step; a collective call.

    What is open while the run trains is closed by `stack`. Raises UserError for whatever a user can mend.
    """
    folder = Path(config.run.folder) / config.run.name
    source = checkpoint_to_resume(folder, config)
    tasks = _configured_tasks(config.evaluation)
    share_of_batch(config.train.batch, config.train.micro_batch, runtime.world_size)  # before the text is prepared

    with runtime.main_process_first():  # The other ranks find it prepared.
        prepared = prepare(config.data, log=print if runtime.is_main_process else lambda _: None)
    train_file = _token_file(config, prepared, prepared.train, config.train.seed)
    held_out_file = _token_file(config, prepared, prepared.validation, HELD_OUT_SEED)
    data = _training_data(config, prepared, train_file, runtime)
    steps = number_of_steps(config, train_file.chunks)
    evaluator = _evaluator(config, prepared, tasks, held_out_file, data.micro_batch, runtime)

    state = _state(config, prepared, folder, source)
    teachers = _teachers(config, prepared, train_file, runtime, state, stack)
    cohort = _cohort(config, prepared, source, state, runtime)
    weighting = LossWeighting(config.objective, len(cohort), runtime.device, teachers.weights, data.file.token_count(0))
    outer_data = _outer_data(config, held_out_file, data.micro_batch, runtime)
    outer_state = OuterState(state.omega, state.outer_updates) if state.omega else None
    outer_loop = OuterLoop(config.outer, steps, weighting, outer_data, outer_state)

    if not state.usage.students:
        state = replace(state, usage=_new_usage(config, teachers))
    topology = f"{runtime.world_size} rank(s), ZeRO {config.train.stage(runtime.world_size)}"
    previous_topology, state = state.topology, replace(state, topology=topology)
    peak = _peak_flops(config, runtime)

    log = _open_folder(config, folder, state, runtime, stack)
    progress = stack.enter_context(Progress(steps, start=state.step, rank=runtime.rank))
    recorder = Recorder(log, progress, cohort, teachers, runtime, state, clip=config.optimizer.clip, peak_flops=peak)
    if source is None:
        recorder.streams()
    else:
        if runtime.is_main_process:
            print(f"going on from {source}, step {state.step} of {steps}")
        if previous_topology != topology:
            recorder.event(state.step, f"goes on with {topology}, after {previous_topology}")
    return Run(
        config=config,
        runtime=runtime,
        folder=folder,
        prepared=prepared,
        data=data,
        total_steps=steps,
        evaluator=evaluator,
        teachers=teachers,
        cohort=cohort,
        outer_loop=outer_loop,
        recorder=recorder,
        state=state,
        stack=stack,
    )


def _configured_tasks(evaluation: EvaluationConfig) -> list[Task]:
    """Returns the zero-shot tasks that the settings name; the prepared folder's own pairs are not among them."""
    tasks = [] if evaluation.data is None else read_tasks(evaluation.tasks, Path(evaluation.data))
    if evaluation.pairs not in ("auto", "none"):
        tasks.append(minimal_pairs(PAIRS, Path(evaluation.pairs)))
    return tasks


def _token_file(config: Config, prepared: Prepared, path: Path, seed: int) -> TokenFile:
    dtype, length, tokenizer = prepared.manifest["dtype"], config.train.length, prepared.tokenizer
    if not config.masked:
        # The held-out loss counts every target.
        kl_everywhere = config.objective.kl_everywhere and path == prepared.train
        return TokenFile(path, dtype, length, kl_everywhere=kl_everywhere)
    assert tokenizer.mask is not None, "engine.run.check_settings wants data.tokenizer.mask"
    return MaskedFile(path, dtype, length, Masking(tokenizer.vocab_size, tokenizer.mask, tokenizer.special, seed))


def _training_data(config: Config, prepared: Prepared, file: TokenFile, runtime: Runtime) -> TrainingData:
    return TrainingData(
        file,
        batch=config.train.batch,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        random_offsets=config.train.chunks == "random",
        word_starts=WordStarts(prepared.tokenizer.surfaces()),
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )


def _outer_data(config: Config, held_out: TokenFile, micro_batch: int, runtime: Runtime) -> TrainingData | None:
    """Returns what the outer loop reads; None where ω stays as it is."""
    sequences, world_size = config.outer.sequences, runtime.world_size
    if config.outer.every is None:
        return None
    if sequences % world_size or sequences > held_out.chunks:
        raise UserError(
            f"outer.sequences={sequences}: expected a multiple of the {world_size} rank(s), and at most the "
            f"{held_out.chunks} sequences of the held-out split; change it"
        )
    return TrainingData(
        held_out,
        batch=sequences,
        micro_batch=math.gcd(sequences // world_size, micro_batch),
        seed=config.train.seed,
        random_offsets=False,
        rank=runtime.rank,
        world_size=world_size,
        device=runtime.device,
    )


def _evaluator(
    config: Config, prepared: Prepared, tasks: list[Task], file: TokenFile, batch: int, runtime: Runtime
) -> Evaluator:
    held_out = HeldOutData(
        file,
        tokens=config.evaluation.tokens,
        batch=batch,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    if config.evaluation.pairs == "auto":
        tasks = [*tasks, minimal_pairs(PAIRS, prepared.pairs)]
    max_length = min(student.max_length for student in config.students)
    questions = ZeroShot(tasks, prepared.tokenizer, runtime, max_length=max_length, share=False, masked=config.masked)
    return Evaluator(config.evaluation, held_out, questions, prepared.tokenizer, runtime)


def _state(config: Config, prepared: Prepared, folder: Path, source: Path | None) -> RunState:
    """Returns the state of the checkpoint, or a new one. UserError where data or teachers have changed."""
    teachers = hash_teachers(config)
    if source is None:
        return RunState(prepared.identity, teachers)
    state = checkpoint.read_state(source)
    if state.data != prepared.identity:
        raise UserError(
            f"{folder} was trained on data {state.data[:8]}, and data.path={config.data.path} is now "
            f"{prepared.identity[:8]}: restore the text, or choose another run.name"
        )
    if state.teachers != teachers:
        paths = ", ".join(teacher.path for teacher in config.teachers)
        raise UserError(
            f"{folder} has learnt from other teachers than {paths} now hold: restore them, or choose another run.name"
        )
    return state


def _teachers(
    config: Config, prepared: Prepared, file: TokenFile, runtime: Runtime, state: RunState, stack: ExitStack
) -> Teachers:
    if config.cache is not None:
        return cached_teachers(config, prepared, file, runtime, state.teachers, stack)
    return load_teachers(config, prepared.tokenizer, file, runtime.device)


def _cohort(config: Config, prepared: Prepared, source: Path | None, state: RunState, runtime: Runtime) -> Cohort:
    vocab_size = prepared.tokenizer.vocab_size
    students = []
    for student_config in config.students:
        weights = None
        if source is not None:
            weights = checkpoint.read_student(source, student_config.name)
        elif student_config.init is not None:
            weights = import_weights(student_config, shape_of(student_config, vocab_size), prepared.tokenizer)
        model = student_model(student_config, vocab_size, weights, recompute=config.train.recompute)
        student = Student(student_config, model, config.train, config.optimizer, runtime)
        if source is not None and weights is not None:
            student.restore(weights, state.updates)
        students.append(student)
    if source is not None:
        set_random_state(state.random_state)
    return Cohort(students, runtime)


def _new_usage(config: Config, teachers: Teachers) -> Usage:
    folders = [folder_of(teacher) for teacher in config.teachers]
    folders += [Path(student.init) for student in config.students if student.init is not None]
    run = f"{config.run.name}, begun {datetime.now(UTC).isoformat(timespec='seconds')}"
    return new_usage(run, [student.name for student in config.students], folders, teachers)


def _peak_flops(config: Config, runtime: Runtime) -> float | None:
    """Returns the FLOP/s of all ranks' devices at most, where known; a collective call."""
    runtime.barrier()  # Ranks that share a CPU are measured side by side.
    peak = peak_flops(runtime.device, STORAGE[config.train.precision])
    value = torch.tensor([math.nan if peak is None else peak], dtype=torch.float64, device=runtime.device)
    (total,) = runtime.all_reduce_sum(value)
    return total if math.isfinite(total) else None


def _open_folder(
    config: Config, folder: Path, state: RunState, runtime: Runtime, stack: ExitStack
) -> MetricsLog | None:
    """Locks the folder and writes the settings; returns the log of its records, on rank 0 alone."""
    log: MetricsLog | None = None
    ranks = runtime.all_gather((socket.gethostname(), os.getpid()))
    with runtime.main_process_first():
        if runtime.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            # Only the process ids of rank 0's node: elsewhere the same id is a different process. One rank tells all.
            lock(folder, [pid for host, pid in ranks if host == socket.gethostname()], stack)
            loading.save(config, folder / "config.yaml", git_commit=git_commit())
            log = stack.enter_context(MetricsLog(folder, state.metrics_position))
    return log
