"""A training loop that waits between two steps until it is told to take the next, and says where its time went.

Nothing in the loop knows of it. The engine's loop is entered where its steps come from and where they are recorded; a
step is split by wrapping the functions that it calls, for chosen steps alone, with a wait for the device at each seam.
A collective counts as waiting until the last rank has come to it, and as communication from there.
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
from engine.students.cohort import Cohort, Verdict
from engine.students.gradients import Tally
from engine.students.outer_loop import OuterLoop
from engine.students.student import Student
from engine.teachers.frozen import Teachers

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
    """What a process says after a step."""

    seconds: float
    losses: list[float]  # of each student, nats per token, this rank's part of them
    peak: int  # bytes since the process was last told to forget: resident, or on a GPU torch's own
    imported: int = 0  # bytes resident before anything was built; on a GPU 0
    split: dict[str, float] = field(default_factory=dict)  # seconds by phase, of a step that was split
    communicated: int = 0  # bytes of the tensors given to collectives, of such a step


class Over(Exception):
    """Nothing more to do."""


class Gate:
    """Obeys commands: "step", "split" (a step whose time is split), "profile", "forget", and none: it is over."""

    def __init__(self, connection: Connection, imported: int = 0) -> None:
        self.phases = Phases()
        self.losses: list[float] = []  # of the last step, for the report
        self._connection, self._imported = connection, imported
        self._begun: float | None = None
        self._profiler: torch.profiler.profile | None = None
        self._left = 0  # steps to take without being told

    def pause(self) -> None:
        """Between two steps: reports the one that is over, returns when the next may begin. Raises Over."""
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
        """The steps, each when it may begin; reading it is part of it."""
        while True:
            self.pause()
            with self.phases.of("data"):
                step = next(steps)
            yield step


def engine_loop(config: Config, gate: Gate) -> None:
    """`engine.train.train`, as every recipe calls it."""

    class Gated(Run):
        def profiled(self, steps: Iterator[Step]) -> Iterator[Step]:
            return gate.between(super().profiled(steps))

        def record(self, step: Step, tally: Tally, outcome: Verdict) -> None:
            super().record(step, tally, outcome)
            gate.losses = tally.losses_S.tolist()

    phases = gate.phases
    with ExitStack() as stack:
        for place, name, phase in (
            (Teachers, "__call__", "teachers"),
            (Student, "body", "bodies"),
            (train, "linear_ensemble_kl", "loss"),
            (Student, "backward", "backward"),
            (Cohort, "step", "optimizer"),
            (OuterLoop, "before_step", "outer"),
            (OuterLoop, "after_step", "outer"),
            (Gated, "record", "record"),
        ):
            stack.enter_context(mock.patch.object(place, name, phases.wrapped(getattr(place, name), phase)))
        for name in COLLECTIVES:  # before DeepSpeed takes them
            stack.enter_context(mock.patch.object(dist, name, phases.collective(getattr(dist, name))))
        stack.enter_context(mock.patch.object(train, "Run", Gated))
        train.train(config)


class Phases:
    """Seconds by phase of one step: a phase within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.communicated = 0
        self._open: list[str] = []
        self._since = 0.0

    def begin(self, now: float) -> None:
        self.seconds.clear()
        self.communicated, self._open, self._since = 0, [REST], now

    def finish(self, now: float) -> tuple[dict[str, float], int]:
        """Seconds by phase and the bytes communicated since `begin`; nothing where that was not called."""
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
        """Of torch.distributed; one that nobody has to wait for is waited for here."""
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
    """The bytes that a collective moves: its largest argument is the whole, where another is a rank's part."""
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
        ctypes.CDLL(None).malloc_trim(0)  # what building left behind, and the heap keeps, is no step's
        timing.reset_peak_resident()
