"""What a run has cost so far: tokens, words, FLOPs, seconds and energy, of students, teachers and outer loop apart.

An exported student carries the ledger of its run, up to the checkpoint that it was exported from, as `ledger.json`.
Where such a folder becomes a teacher, the run that learns from it counts its training as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from engine.config import Config
from engine.flops import Flops, Text, inference, outer_update, training
from engine.models.families import Shape

NAME = "ledger.json"
NOTHING = Flops()


@dataclass(frozen=True)
class Account:
    """What one party has cost over all ranks. Tokens are those of the text, masked or not."""

    tokens: int = 0
    words: int = 0  # begun by them
    model_flops: int = 0
    hardware_flops: int = 0
    seconds: float = 0.0  # of its own passes on rank 0; the joint loss is nobody's own

    def plus(self, flops: Flops = NOTHING, *, tokens: int = 0, words: int = 0, seconds: float = 0.0) -> "Account":
        return Account(
            self.tokens + tokens,
            self.words + words,
            self.model_flops + flops.model,
            self.hardware_flops + flops.hardware,
            self.seconds + seconds,
        )


@dataclass(frozen=True)
class Ledger:
    """A run's. `trained` is what its teachers' own training cost, and that of initial weights, where folders say."""

    run: str = ""  # its name and when it began
    students: dict[str, Account] = field(default_factory=dict)
    teachers: Account = Account()  # all of them: their forward passes here, or those that filled the cache
    outer: Account = Account()
    seconds: float = 0.0  # training, over all sittings; ranks side by side count once
    joules: float | None = None  # of all devices while training; None: they do not report it
    trained: "tuple[Ledger, ...]" = ()
    untold: tuple[str, ...] = ()  # folders that do not say

    def accounts(self) -> Iterator[tuple[str, Account]]:
        yield from self.students.items()
        yield from (("teachers", self.teachers), ("outer loop", self.outer))

    @property
    def flops(self) -> Flops:
        """Of this run."""
        accounts = [account for _, account in self.accounts()]
        return Flops(sum(a.model_flops for a in accounts), sum(a.hardware_flops for a in accounts))

    @property
    def before(self) -> Flops:
        """Of their runs, and of their teachers' in turn, each once."""
        return sum((ledger.flops for ledger in self._ancestors().values()), NOTHING)

    def _ancestors(self) -> "dict[str, Ledger]":
        """By run; of one that students were taken from at two checkpoints, the later."""
        found: dict[str, Ledger] = {}
        for ledger in self.trained:
            for key, one in ({ledger.run: ledger} | ledger._ancestors()).items():
                if key not in found or found[key].seconds < one.seconds:
                    found[key] = one
        return found

    def spend(self, step: "Cost", *, tokens: int, words: int, outer_seconds: float = 0.0) -> "Ledger":
        """A step's FLOPs, by students' order; the seconds of all but the outer loop come with `clocked`."""
        pairs = zip(self.students.items(), step.students, strict=True)
        return replace(
            self,
            students={name: account.plus(flops, tokens=tokens, words=words) for (name, account), flops in pairs},
            teachers=self.teachers.plus(step.teachers, tokens=step.taught, words=words if step.taught else 0),
            outer=self.outer.plus(step.outer, tokens=step.outer_tokens, seconds=outer_seconds),
        )

    def clocked(self, seconds: float, students: Sequence[float], teachers: float, joules: float | None) -> "Ledger":
        pairs = zip(self.students.items(), students, strict=True)
        return replace(
            self,
            students={name: account.plus(seconds=own) for (name, account), own in pairs},
            teachers=self.teachers.plus(seconds=teachers),
            seconds=self.seconds + seconds,
            joules=self.joules if joules is None else (self.joules or 0.0) + joules,
        )


@dataclass(frozen=True)
class Cost:
    """A step's, over all ranks."""

    students: tuple[Flops, ...]
    teachers: Flops = NOTHING
    taught: int = 0  # tokens that teachers read
    outer: Flops = NOTHING
    outer_tokens: int = 0


def step_cost(
    config: Config,
    students: Sequence[Shape],
    teachers: Sequence[Shape],
    text: Text,
    held_out: Text | None,
) -> Cost:
    """`teachers`: those that predict in the step; none with a cache. `held_out`: what an update of the outer loop read
    in this step; None: there was none."""
    outer, outer_tokens = NOTHING, 0
    if held_out is not None:
        outer = outer_update(students, text, held_out, config.outer, config.objective.divergence)
        outer_tokens = held_out.tokens + (text.tokens if config.outer.terms == "both" else 0)
    return Cost(
        tuple(training(shape, text, recompute=config.train.recompute) for shape in students),
        sum((inference(shape, text) for shape in teachers), NOTHING),
        text.tokens if teachers else 0,
        outer,
        outer_tokens,
    )


def begin(
    run: str, students: Sequence[str], folders: Sequence[Path], cached: tuple[Sequence[Shape], Text] | None
) -> Ledger:
    """A new run's ledger. `folders`: of teachers and initial weights; `cached`: teachers' shapes and the text whose
    predictions are read from a cache instead. Filling it is counted in full, whoever did it.

    Raises ValueError for a ledger.json that is damaged.
    """
    told = {str(folder): read(folder) for folder in folders}
    account = Account()
    if cached is not None:
        shapes, text = cached
        account = account.plus(sum((inference(shape, text) for shape in shapes), NOTHING), tokens=text.tokens)
    return Ledger(
        run,
        {name: Account() for name in students},
        account,
        trained=tuple(ledger for ledger in told.values() if ledger is not None),
        untold=tuple(name for name, ledger in told.items() if ledger is None),
    )


def read(folder: Path) -> Ledger | None:
    """What a student's folder cost to train; None where it does not say. ValueError where it is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        return pydantic.TypeAdapter(Ledger).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise ValueError(f"{path} is no ledger ({error.errors()[0]['msg']}): delete it, or export again") from None


def as_dict(ledger: Ledger) -> dict[str, Any]:
    """For JSON; energy that nothing reports is left out rather than null."""
    return _without_unknown(asdict(ledger))


def _without_unknown(found: dict[str, Any]) -> dict[str, Any]:
    found["trained"] = [_without_unknown(ledger) for ledger in found["trained"]]
    return {key: value for key, value in found.items() if key != "joules" or value is not None}
