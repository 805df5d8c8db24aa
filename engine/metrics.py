"""What a run records while it trains.

`metrics.jsonl` holds one JSON object a line, in the order in which things happened. Every record has a `kind` and the
`step` it belongs to: the number of steps finished when it was written, so the first step's record says 1. The kinds
are the TypedDicts below: `streams` (once, first), `step`, `outer`, `evaluation`, `skipped`, `event`. All losses and
divergences are in nats per token. A number that is not finite is written as `null`, because JSON has no NaN; a
`skipped` record tells what was wrong. `summary.json`, written when a run ends, is one `Summary`.

Legend: S students, K teachers, R = S + K streams, students first.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from tensorboard.compat.proto import event_pb2, summary_pb2
from torch.utils.tensorboard import FileWriter


class StreamsRecord(TypedDict):
    """The names behind the rows and columns of every `kl` that follows."""

    kind: Literal["streams"]
    step: int
    students: list[str]  # S
    teachers: list[str]  # K


class StudentStep(TypedDict):
    loss: float  # what was minimised: a·CE + Σ w·T²·KL
    ce: float  # nats per token, temperature 1
    grad_norm: float  # before clipping
    lr: float
    tokens_per_second: float  # over the time of its own forward, backward and update; the joint loss is not its own
    model_flops_per_second: float  # the model's own arithmetic, recomputation not counted
    clipped: bool


class StepRecord(TypedDict):
    kind: Literal["step"]
    step: int
    epoch: float
    tokens: int  # seen since the run began, over all ranks
    words: NotRequired[int]  # begun by them (engine.data.WordStarts)
    seconds: float  # of this step
    tokens_per_second: float  # over all ranks, all students trained
    model_flops: NotRequired[int]  # since the run began: students, teachers and outer loop (engine.flops)
    hardware_flops: NotRequired[int]
    mfu: NotRequired[float]  # model FLOPs since the record before, over what all devices could have done (0 to 1)
    hfu: NotRequired[float]  # hardware FLOPs, likewise; neither where the peak is unknown
    joules: NotRequired[float]  # since the run began, of all devices; absent where they do not report it
    students: dict[str, StudentStep]  # S, in the order of the streams
    kl: list[list[float]]  # S × R, row i the learner, column j the stream it learns from; [] where there is no KL


class OuterRecord(TypedDict):
    """An update of the students' weights ω (engine.outer_loop)."""

    kind: Literal["outer"]
    step: int
    omega: dict[str, float]  # S, after it
    held_out_loss: float  # of the weighted ensemble, before it; nats per token
    shares: dict[str, float]  # of the hypergradient's terms direct, own and peers in what moved ω
    step_size: float
    seconds: float


class StudentEvaluation(TypedDict):
    validation_loss: float  # nats per token
    pairs_accuracy: float | None  # 0 to 1; None where the data has no minimal pairs
    scores: NotRequired[dict[str, float]]  # of evaluation.tasks, by name


class EvaluationRecord(TypedDict):
    kind: Literal["evaluation"]
    step: int
    students: dict[str, StudentEvaluation]
    ensemble: NotRequired[StudentEvaluation]  # the students' logits, weighted by ω, where there are several


class SkippedRecord(TypedDict):
    """A step that changed no parameter of any student."""

    kind: Literal["skipped"]
    step: int
    students: list[str]  # those whose loss or gradient was not finite
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
    tokens_per_second: float  # over the time of its own work, as in StudentStep
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
    ledger: NotRequired[dict[str, Any]]  # engine.ledger
    before: NotRequired[dict[str, int]]  # model and hardware FLOPs of the teachers' own training
    peak_flops_per_second: NotRequired[float]  # of all ranks' devices
    omega: NotRequired[list[float]]  # S, of the best checkpoint, where they are weighted
    report: NotRequired[str]


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a `metrics.jsonl`, one by one.

    The last line may be cut short, as a killed run leaves it; it is then left out. Raises ValueError for any other line
    that is not a JSON object.
    """
    broken = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken:
                raise ValueError(f"{path}, line {broken}: expected one JSON object a line; restore the file")
            try:
                record = json.loads(line)
            except ValueError:
                broken = number
                continue
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
            yield record  # pyright: ignore[reportReturnType]


class MetricsLog:
    """Appends records to `<run_dir>/metrics.jsonl` and mirrors their numbers to `<run_dir>/tensorboard`. Rank 0 only.

    `position` says where the file has to end before this run goes on: `None`, a new run, which may find no records;
    `0`, begin again and drop what an earlier attempt left; otherwise the byte length that `position()` gave when the
    checkpoint was saved. Whatever was written after it belongs to steps that are about to be taken again and is cut
    off, so that a resumed run's file equals an uninterrupted run's.

    Raises ValueError, and changes nothing, if a new run finds records, or if the file is shorter than `position` or
    has no record ending there.
    """

    def __init__(self, run_dir: Path, position: int | None) -> None:
        path = run_dir / "metrics.jsonl"
        _check_position(path, position)
        self._teachers: list[str] = []
        first_step = 0
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # what a full disk refuses must not wait in a buffer to fail again
        if position is not None:
            self._file.truncate(position)
            for record in read_metrics(path):
                first_step = record["step"] + 1
                if record["kind"] == "streams":
                    self._teachers = record["teachers"]
        # FileWriter, not SummaryWriter: one event holds all of a record's scalars, a tenth of the time (0.4 ms for 48).
        self._board = FileWriter(str(run_dir / "tensorboard"))
        if position is not None:  # what SummaryWriter's purge_step does: earlier files lose this step and all after it
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore[reportAttributeAccessIssue]
            event = event_pb2.Event(session_log=start)  # pyright: ignore[reportAttributeAccessIssue]
            self._board.add_event(event, first_step)

    def write(self, record: Record) -> None:
        """Appends one record: one line, one write, handed to the operating system before this returns.

        Raises ValueError where the disk refuses.
        """
        try:
            line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._refused(error) from None
        if record["kind"] == "streams":
            self._teachers = record["teachers"]
        summary = summary_pb2.Summary()  # pyright: ignore[reportAttributeAccessIssue]
        for tag, value in _scalars(record, self._teachers):
            summary.value.add(tag=tag, simple_value=value)
        if summary.value:
            self._board.add_summary(summary, record["step"])

    def position(self) -> int:
        """The file's length in bytes, once all of it is on disk. Take it after a step's last record.

        Raises ValueError where the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from None
        return self._file.tell()

    def _refused(self, error: OSError) -> ValueError:
        return ValueError(f"{self._file.name} could not be written ({error}): make room and run again")

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_position(path: Path, position: int | None) -> None:
    length = path.stat().st_size if path.exists() else 0
    if position is None:
        if length:
            raise ValueError(
                f"{path} already holds {length} bytes of another run's records; resume that run or name a new one"
            )
    elif position > length:
        raise ValueError(
            f"{path} has {length} bytes, but the checkpoint was saved when it had {position};"
            " restore the file or resume from an older checkpoint"
        )
    elif position:
        with path.open("rb") as file:
            file.seek(position - 1)
            if file.read(1) != b"\n":
                raise ValueError(
                    f"{path} has no record ending at byte {position}, where the checkpoint says one ends;"
                    " the file was edited or belongs to another run: restore it"
                )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _scalars(record: Record, teachers: Sequence[str]) -> Iterator[tuple[str, float]]:
    """TensorBoard's view of a record: (tag, value) of every number in it that is finite."""
    values: dict[str, Any] = {}
    if record["kind"] == "step" or record["kind"] == "evaluation":
        ensemble = {"ensemble": record["ensemble"]} if "ensemble" in record else {}
        for name, numbers in (record["students"] | ensemble).items():
            flat = dict(numbers) | numbers.get("scores", {})
            values |= {f"{measure}/{name}": value for measure, value in flat.items() if measure != "scores"}
    if record["kind"] == "outer":
        values |= {f"omega/{name}": value for name, value in record["omega"].items()}
        values |= {f"outer/{key}": record[key] for key in ("held_out_loss", "step_size", "seconds")}
        values |= {f"outer/{term}": value for term, value in record["shares"].items()}
    if record["kind"] == "step":
        values |= {f"run/{key}": record[key] for key in ("epoch", "tokens", "seconds", "tokens_per_second")}
        values |= {f"run/{key}": record.get(key) for key in ("model_flops", "hardware_flops", "mfu", "hfu", "joules")}
        learners = list(record["students"])
        for i, row in enumerate(record["kl"]):
            streams = stream_names(learners, teachers, len(row))
            values |= {f"kl/{learners[i]} from {streams[j]}": value for j, value in enumerate(row) if j != i}
    for tag, value in values.items():
        if value is not None and math.isfinite(value):
            yield tag, float(value)


def stream_names(students: Sequence[str], teachers: Sequence[str], streams: int) -> list[str]:
    """Names of R = `streams` streams, students first; teachers whose names were not recorded are numbered."""
    unnamed = [f"teacher {k + 1}" for k in range(len(teachers), streams - len(students))]
    return [*students, *teachers, *unnamed][:streams]


def format_count(value: float) -> str:
    """Four figures and a unit: 58.34M, 1.2k, up to E (10¹⁸); below 1,000 the number itself."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
