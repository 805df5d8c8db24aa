"""A gate that holds a training loop between two steps until it is told to go on, and reports where the time went.

The loop does not know of it: the functions that give the engine its steps and record them are replaced. The functions
that a step calls are wrapped, and for chosen steps their time is measured, with a wait for the device before and after
each. A collective counts as waiting until the last rank has come to it, and as communication from then on.
"""

import ctypes
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from benchmarks import timing
from engine import train
from engine.compute.profiling import top_operations
from engine.config.settings import Config
from engine.data.batches import Step
from engine.run.run import Run
from engine.students import gradients
from engine.students.cohort import Cohort, Verdict
from engine.students.gradients import Tally
from engine.students.outer_loop import OuterLoop
from engine.students.student import Student
from engine.teachers.teachers import Teachers

T = TypeVar("T")

PHASES = ("data", "teachers", "bodies", "loss", "backward", "optimizer", "communication", "waiting", "outer", "record")
REST = "rest"
PROFILED_STEPS = 3
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all_single"),
)


@dataclass(frozen=True)
class Report:
    """What a process reports after a step."""

    seconds: float
    losses: list[float]  # this rank's part of each student's loss, nats per token
    peak: int  # most bytes since the process was last told to forget: resident ones, or on a GPU those of torch
    imported: int = 0  # bytes that were resident before anything was built; 0 on a GPU
    split: dict[str, float] = field(default_factory=dict)  # seconds by phase, where the step was split
    communicated: int = 0  # bytes of the tensors given to collectives, where the step was split


class Over(Exception):
    """No further step is wanted."""


class Gate:
    """Holds a loop between its steps and obeys the commands that come through a connection.

    They are "step", "split" (a step whose time is split), "profile", "forget" (the peak so far), and an empty one,
    after which no step follows.
    """

    def __init__(self, connection: Connection, imported: int = 0) -> None:
        self.phases = Phases()
        self.losses: list[float] = []  # of the last step, for the report
        self._connection, self._imported = connection, imported
        self._begun: float | None = None
        self._profiler: torch.profiler.profile | None = None
        self._left = 0  # steps to take without being told

    def pause(self) -> None:
        """Reports the step that is over, and returns when the next one may begin; raises Over where none should."""
        _synchronize()
        now = time.perf_counter()
        if self._left > 1:
            self._left -= 1
            return
        if self._profiler is not None:
            self._profiler.stop()
            self._connection.send(top_operations(self._profiler))
            self._profiler = None
        elif self._begun is not None:
            split, communicated = self.phases.finish(now)
            seconds, peak = now - self._begun, _peak()
            self._connection.send(Report(seconds, self.losses, peak, self._imported, split, communicated))
        while command := self._connection.recv():
            if command == "forget":
                _forget_peak()
                self._connection.send(None)
                continue
            if command == "profile":
                self._left = PROFILED_STEPS
                self._profiler = torch.profiler.profile(activities=_activities(), record_shapes=True, with_flops=True)
                self._profiler.start()
            self._begun = time.perf_counter()
            if command == "split":
                self.phases.begin(self._begun)
            return
        raise Over

    def between(self, steps: Iterator[T]) -> Iterator[T]:
        """Yields each step when it may begin. The time that it takes to read a step counts as the step's."""
        while True:
            self.pause()
            with self.phases.of("data"):
                step = next(steps)
            yield step


def engine_loop(config: Config, gate: Gate) -> None:
    """Trains by `engine.train.train`, as every recipe does, and waits at the gate before every step."""
    steps_of_run, after_step_of_run, phases = Run.steps, Run.after_step, gate.phases

    def steps(run: Run) -> Iterator[Step]:
        return gate.between(steps_of_run(run))

    def after_step(run: Run, step: Step, tally: Tally, verdict: Verdict) -> None:
        after_step_of_run(run, step, tally, verdict)
        gate.losses = tally.losses_S.tolist()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Run, "steps", steps))
        stack.enter_context(mock.patch.object(Run, "after_step", after_step))
        for owner, name, phase in (
            (Teachers, "__call__", "teachers"),
            (Student, "body", "bodies"),
            (gradients, "linear_ensemble_kl", "loss"),
            (Student, "backward", "backward"),
            (Cohort, "update", "optimizer"),
            (OuterLoop, "before_step", "outer"),
            (OuterLoop, "after_step", "outer"),
            (Run, "after_step", "record"),
        ):
            stack.enter_context(mock.patch.object(owner, name, phases.wrapped(getattr(owner, name), phase)))
        for name in COLLECTIVES:  # before DeepSpeed takes them
            stack.enter_context(mock.patch.object(dist, name, phases.collective(getattr(dist, name))))
        train.train(config)


class Phases:
    """Measures the seconds of one step by phase. The time of a phase inside another one counts for the inner alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.communicated = 0
        self._open: list[str] = []
        self._since = 0.0

    def begin(self, now: float) -> None:
        self.seconds.clear()
        self.communicated, self._open, self._since = 0, [REST], now

    def finish(self, now: float) -> tuple[dict[str, float], int]:
        """Returns seconds by phase and the bytes communicated since `begin`; none where that was not called."""
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
            self._open = []
            return {phase: self.seconds[phase] for phase in (*PHASES, REST)}, self.communicated
        return {}, 0

    def _count(self) -> None:
        _synchronize()
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        if not self._open:
            yield
            return
        self._count()
        self._open.append(phase)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def wrapped(self, function: Callable[..., T], phase: str) -> Callable[..., T]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> T:
            with self.of(phase):
                return function(*args, **kwargs)

        return run

    def collective(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a collective of torch.distributed that is measured. An asynchronous one is waited for here."""
        barrier = dist.barrier

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._open or self._open[-1] in ("communication", "waiting"):
                return function(*args, **kwargs)
            with self.of("waiting"):
                barrier(group=kwargs.get("group"))
            with self.of("communication"):
                self.communicated += _moved((*args, *kwargs.values()))
                work = function(*args, **kwargs)
                if work is not None:
                    work.wait()
            return work

        return run


def _moved(arguments: Iterable[Any]) -> int:
    """Returns the bytes that a collective moves: those of its largest argument, as others are only a rank's part."""
    leaves = ([x for x in tree_leaves(argument) if isinstance(x, torch.Tensor)] for argument in arguments)
    return max((sum(x.nbytes for x in tensors) for tensors in leaves), default=0)


def _activities() -> list[torch.profiler.ProfilerActivity]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    return [*activities, torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else activities


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else timing.resident_bytes("VmHWM")


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # The heap may keep memory that was freed before the step began.
        timing.reset_peak_resident()
