"""The records of a run: the lines of `metrics.jsonl`, and `summary.json`.

`metrics.jsonl` has one JSON object per line, in the order in which things happened. Every record has a `kind` and a
`step`, the number of steps that were finished when it was written; so the first step's record says 1. The kinds are the
TypedDicts below: `streams` (once, first), `step`, `outer`, `evaluation`, `skipped`, `event`. All losses and divergences
are in nats per token. A number that is not finite is written as `null`, because JSON has no NaN; a `skipped` record
says what was wrong. `summary.json`, written when a run ends, is one `Summary`.

S students, K teachers, R = S + K streams, students first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from engine.system.errors import UserError


class StreamsRecord(TypedDict):
    """The names of the rows and columns of every `kl` that follows."""

    kind: Literal["streams"]
    step: int
    students: list[str]  # S
    teachers: list[str]  # K


class StudentStep(TypedDict):
    loss: float  # what was minimised: a·CE + Σ w·T²·KL
    ce: float  # nats per token, temperature 1
    grad_norm: float  # before clipping
    lr: float  # learning rate
    tokens_per_second: float  # over the time of its forward and backward pass and its update, without the joint loss
    model_flops_per_second: float  # over the wall time since the last record; recomputation does not count
    clipped: bool


class StepRecord(TypedDict):
    kind: Literal["step"]
    step: int
    epoch: float
    tokens: int  # seen since the run began, over all ranks
    words: NotRequired[int]  # that begin in these tokens (engine.data.batches.WordStarts)
    seconds: float  # per step, the mean since the last record
    tokens_per_second: float  # over all ranks, all students trained
    model_flops: NotRequired[int]  # since the run began: students, teachers and outer loop (engine.compute.flops)
    hardware_flops: NotRequired[int]
    mfu: NotRequired[float]  # model FLOPs since the record before, divided by what all devices could have done (0 to 1)
    hfu: NotRequired[float]  # the same of hardware FLOPs; both are absent where the devices' peak is unknown
    joules: NotRequired[float]  # since the run began, of all devices; absent where they do not report it
    students: dict[str, StudentStep]  # S, in the order of the streams
    kl: list[list[float]]  # S × R, row i the learner, column j the stream it learns from; [] where there is no KL


class OuterRecord(TypedDict):
    """An update of the students' weights ω (engine.students.outer_loop)."""

    kind: Literal["outer"]
    step: int
    omega: dict[str, float]  # S, after the update
    held_out_loss: float  # of the weighted ensemble, before the update; nats per token
    shares: dict[str, float]  # the shares of the hypergradient's terms direct, own and peers in what moved ω
    step_size: float
    seconds: float


class StudentEvaluation(TypedDict):
    validation_loss: float  # nats per token
    pairs_accuracy: float | None  # 0 to 1; None where the data has no minimal pairs
    scores: NotRequired[dict[str, float]]  # on evaluation.tasks, by name


class EvaluationRecord(TypedDict):
    kind: Literal["evaluation"]
    step: int
    students: dict[str, StudentEvaluation]
    ensemble: NotRequired[StudentEvaluation]  # the students' logits, weighted by ω, where there are several


class SkippedRecord(TypedDict):
    """A step that changed no parameter of any student."""

    kind: Literal["skipped"]
    step: int
    students: list[str]  # whose loss or gradient was not finite
    reason: str


class EventRecord(TypedDict):
    kind: Literal["event"]
    step: int
    text: str


Record = StreamsRecord | StepRecord | OuterRecord | EvaluationRecord | SkippedRecord | EventRecord


class DataSummary(TypedDict):
    name: str
    train_tokens: int
    train_words: int
    tokens_per_word: float  # of the validation text: nats per word = nats per token × this
    entropy_per_word: float | None  # nats; the best any model can reach, where the data's source knows it


class StudentSummary(TypedDict):
    name: str
    parameters: int
    validation_loss: float  # nats per token
    validation_loss_per_word: float  # nats per word
    pairs_accuracy: float | None  # 0 to 1
    pairs_by_phenomenon: dict[str, float]  # 0 to 1
    tokens_per_second: float  # as in StudentStep
    folder: str
    best_step: int
    samples: list[str]


class Summary(TypedDict):
    run: str
    finished: str  # ISO 8601
    git_commit: str | None
    steps: int
    tokens: int
    seconds: float
    world_size: int
    zero_stage: int
    device: str
    data: DataSummary
    students: list[StudentSummary]
    usage: NotRequired[dict[str, Any]]  # engine.compute.usage
    inherited_flops: NotRequired[dict[str, int]]  # model and hardware FLOPs of the teachers' training
    peak_flops_per_second: NotRequired[float]  # of all ranks' devices
    omega: NotRequired[list[float]]  # S, of the best checkpoint, where they are weighted
    report: NotRequired[str]


def read_metrics(path: Path) -> Iterator[Record]:
    """Yields the records of a `metrics.jsonl`.

    The last line may be incomplete, as a killed run leaves it, and is then left out. Raises UserError for any other
    line that is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                if next(file, None) is None:
                    return
                raise UserError(f"{path}, line {number}: expected one JSON object per line; restore the file") from None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}, line {number}: expected a JSON object, found {type(record).__name__}; restore the file"
                )
            yield record  # pyright: ignore[reportReturnType]
