"""The writer of metrics.jsonl and of its mirror for TensorBoard."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from torch.utils.tensorboard import FileWriter

from engine.reporting.records import Record, read_metrics
from engine.system.errors import UserError


class MetricsLog:
    """Appends records to `<run_dir>/metrics.jsonl` and copies their numbers to `<run_dir>/tensorboard`, on rank 0."""

    def __init__(self, run_dir: Path, position: int | None) -> None:
        """
        Args:
            position: the length of the file, in bytes, up to which its records stay. None is a new run, which may not
                have any yet; 0 begins again and drops what an earlier attempt has left. Otherwise it is what
                `position()` returned when the checkpoint was saved: what is behind it belongs to steps that are about
                to be taken again, and is cut off, so that a resumed run's file equals an uninterrupted run's.

        Raises UserError, and changes nothing, where a new run finds records, or where no record ends at `position`.
        """
        path = run_dir / "metrics.jsonl"
        _check_position(path, position)
        self._teachers: list[str] = []
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # In a buffer, what a full disk refuses would fail again later.
        records: list[Record] = []
        if position is not None:
            self._file.truncate(position)
            records = list(read_metrics(path))
        for record in records:
            if record["kind"] == "streams":
                self._teachers = record["teachers"]
        # SummaryWriter would write an event per number. FileWriter writes all numbers of a record as one event, which
        # takes a tenth of the time (0.4 ms for 48 numbers).
        self._board = FileWriter(str(run_dir / "tensorboard"))
        if position is not None:
            # As SummaryWriter's purge_step does, earlier files lose this step and all after it.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore[reportAttributeAccessIssue]
            event = event_pb2.Event(session_log=start)  # pyright: ignore[reportAttributeAccessIssue]
            self._board.add_event(event, records[-1]["step"] + 1 if records else 0)

    def write(self, record: Record) -> None:
        """Appends one record as one line, in one write, which the operating system has when this returns.

        Raises UserError where the disk refuses.
        """
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)  # JSON has no NaN and no infinity.
        try:
            line = json.dumps(record).encode() + b"\n"
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
        """Returns the file's length in bytes, once all of it is on the disk. Call it after a step's last record.

        Raises UserError where the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from None
        return self._file.tell()

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self._file.name} could not be written ({error}): make room and run again")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()


def _check_position(path: Path, position: int | None) -> None:
    length = path.stat().st_size if path.exists() else 0
    if position is None:
        if length:
            raise UserError(
                f"{path} already holds {length} bytes of another run's records; resume that run, or change run.name"
            )
    elif position > length:
        raise UserError(
            f"{path} has {length} bytes, but the checkpoint was saved when it had {position};"
            " restore the file or resume from an older checkpoint"
        )
    elif position:
        with path.open("rb") as file:
            file.seek(position - 1)
            if file.read(1) != b"\n":
                raise UserError(
                    f"{path} has no record ending at byte {position}, where the checkpoint says one ends;"
                    " the file was edited or belongs to another run: restore it"
                )


def _scalars(record: Record, teachers: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yields the tag and the value, for TensorBoard, of every number in a record."""
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
        streams = [*record["students"], *teachers]
        for i, row in enumerate(record["kl"]):
            values |= {f"kl/{streams[i]} from {streams[j]}": value for j, value in enumerate(row) if j != i}
    for tag, value in values.items():
        if value is not None:
            yield tag, float(value)
