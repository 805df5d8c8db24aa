"""The tokens, words, FLOPs, seconds and energy that a run has used, separately for students, teachers and outer loop.

An exported student carries the usage of its run, up to the checkpoint that it was exported from, as `usage.json`. Where
such a folder becomes a teacher, the run that learns from it counts its training as well.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from engine.compute.flops import Flops, Workload, inference, outer_update, training
from engine.config.settings import Config
from engine.data.batches import Step
from engine.models.base import Shape
from engine.system.errors import UserError
from engine.teachers.teachers import Teachers

FILE = "usage.json"


@dataclass(frozen=True)
class ModelUsage:
    """What one student, all teachers together, or the outer loop have used, over all ranks."""

    tokens: int = 0  # of the text, masked or not
    words: int = 0  # that began in these tokens
    model_flops: int = 0
    hardware_flops: int = 0
    seconds: float = 0.0  # of their own passes, on rank 0; the joint loss is in none of them

    def plus(self, flops: Flops, *, tokens: int, words: int = 0, seconds: float = 0.0) -> "ModelUsage":
        return ModelUsage(
            self.tokens + tokens,
            self.words + words,
            self.model_flops + flops.model,
            self.hardware_flops + flops.hardware,
            self.seconds + seconds,
        )


@dataclass(frozen=True)
class StepCost:
    """What one step uses, over all ranks."""

    students: list[Flops]
    teachers: Flops
    teacher_tokens: int
    outer: Flops
    outer_tokens: int


@dataclass(frozen=True)
class Usage:
    """What a run has used."""

    run: str = ""  # its name and when it began
    students: dict[str, ModelUsage] = field(default_factory=dict)
    teachers: ModelUsage = ModelUsage()  # their forward passes here, those that filled the cache, and their heads'
    outer: ModelUsage = ModelUsage()
    seconds: float = 0.0  # of training, from start to start; ranks side by side count once
    joules: float | None = None  # of all devices while training; None where they do not report it
    inherited: "tuple[Usage, ...]" = ()  # of the runs that made the teachers and the initial weights
    unknown: tuple[str, ...] = ()  # folders of teachers and initial weights that do not say

    def parts(self) -> Iterator[tuple[str, ModelUsage]]:
        """Yields the name and usage of every student, of the teachers and of the outer loop."""
        yield from self.students.items()
        yield from (("teachers", self.teachers), ("outer loop", self.outer))

    @property
    def flops(self) -> Flops:
        """The FLOPs of this run alone."""
        return sum((Flops(part.model_flops, part.hardware_flops) for _, part in self.parts()), Flops())

    @property
    def inherited_flops(self) -> Flops:
        """The FLOPs of the runs that made the teachers and initial weights, and of theirs in turn, each run once."""
        return sum((usage.flops for usage in self._ancestors().values()), Flops())

    def _ancestors(self) -> "dict[str, Usage]":
        """Returns the inherited usages by run. Where two of one run were inherited, the later one counts."""
        ancestors: dict[str, Usage] = {}
        for inherited in self.inherited:
            for run, usage in ({inherited.run: inherited} | inherited._ancestors()).items():
                if run not in ancestors or ancestors[run].seconds < usage.seconds:
                    ancestors[run] = usage
        return ancestors

    def add_step(self, cost: StepCost, *, tokens: int, words: int, outer_seconds: float = 0.0) -> "Usage":
        """Returns the usage with a step's FLOPs and text added.

        Seconds other than the outer loop's are added by `add_time`.
        """
        pairs = zip(self.students.items(), cost.students, strict=True)
        teacher_words = words if cost.teacher_tokens else 0
        return replace(
            self,
            students={name: used.plus(flops, tokens=tokens, words=words) for (name, used), flops in pairs},
            teachers=self.teachers.plus(cost.teachers, tokens=cost.teacher_tokens, words=teacher_words),
            outer=self.outer.plus(cost.outer, tokens=cost.outer_tokens, seconds=outer_seconds),
        )

    def add_time(self, seconds: float, students: Sequence[float], teachers: float, joules: float | None) -> "Usage":
        """Returns the usage with the seconds of the run, of each student and of all teachers added, and the joules.

        `joules` is None where the devices do not report them.
        """
        pairs = zip(self.students.items(), students, strict=True)
        return replace(
            self,
            students={name: replace(used, seconds=used.seconds + more) for (name, used), more in pairs},
            teachers=replace(self.teachers, seconds=self.teachers.seconds + teachers),
            seconds=self.seconds + seconds,
            joules=self.joules if joules is None else (self.joules or 0.0) + joules,
        )


def step_cost(
    config: Config,
    students: Sequence[Shape],
    teachers: Sequence[tuple[Shape, Workload]],
    work: Workload,
    held_out: Workload | None,
) -> StepCost:
    """Returns what a step uses.

    Args:
        teachers: each with what it reads in the step; no sequences where its hidden states are read from a cache.
        held_out: what an update of the outer loop read in this step; None where there was no update.
    """
    outer, outer_tokens = Flops(), 0
    if held_out is not None:
        outer = outer_update(students, work, held_out, config.outer, config.objective.divergence)
        outer_tokens = held_out.tokens + (work.tokens if config.outer.terms == "all" else 0)
    return StepCost(
        [training(shape, work, recompute=config.train.recompute) for shape in students],
        sum((inference(shape, read) for shape, read in teachers), Flops()),
        max((read.tokens for _, read in teachers), default=0),
        outer,
        outer_tokens,
    )


def teachers_work(teachers: Teachers, step: Step, work: Workload, world_size: int) -> list[tuple[Shape, Workload]]:
    """Returns each teacher's shape and what it reads in a step, of which `work` is what the students read.

    Where the hidden states come from a cache, only the products with the heads are left.
    """
    result = []
    for teacher in teachers.teachers:
        reads = [teacher.reads(batch) for batch in step.micro_batches]
        sequences = 0 if teachers.cached else world_size * sum(count for count, _ in reads)
        tokens = 0 if teachers.cached else work.tokens
        result.append((teacher.shape, replace(work, sequences=sequences, length=reads[0][1], tokens=tokens)))
    return result


def new_usage(run: str, students: Sequence[str], folders: Sequence[Path], teachers: Teachers) -> Usage:
    """Returns the usage of a run that begins; `folders` are those of teachers and initial weights.

    What it takes to fill the teachers' cache counts in full, whichever run does it.

    Raises UserError where a usage.json in one of the folders is damaged.
    """
    inherited = {str(folder): read_usage(folder) for folder in folders}
    filling, tokens = Flops(), 0
    for teacher in teachers.teachers if teachers.cached else ():
        windows = teacher.windows
        assert windows is not None
        filling += inference(teacher.shape, Workload(windows.blocks, windows.length, rows=0, valid=0, tokens=0))
        tokens = max(tokens, windows.blocks * windows.block_length)
    return Usage(
        run,
        {name: ModelUsage() for name in students},
        ModelUsage().plus(filling, tokens=tokens),
        inherited=tuple(usage for usage in inherited.values() if usage is not None),
        unknown=tuple(folder for folder, usage in inherited.items() if usage is None),
    )


def read_usage(folder: Path) -> Usage | None:
    """Returns what it took to train a folder's model; None without a usage.json, UserError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return pydantic.TypeAdapter(Usage).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise UserError(
            f"{path} is damaged ({error.errors()[0]['msg']}): delete it, or export the model again"
        ) from None


def as_dict(usage: Usage) -> dict[str, Any]:
    """Returns the usage for JSON, without the energy where no device reports it."""
    return pydantic.TypeAdapter(Usage).dump_python(usage, mode="json", exclude_none=True)


def as_json(usage: Usage) -> str:
    """Returns the content of usage.json."""
    return json.dumps(as_dict(usage), indent=1) + "\n"
