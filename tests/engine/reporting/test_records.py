import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.reporting.metrics_log import MetricsLog
from engine.reporting.records import Record, read_metrics
from engine.system.errors import UserError
from tests.engine.reporting.example_records import RUN, step_record


def write(run_dir: Path, records: list[Record], position: int | None) -> int:
    with MetricsLog(run_dir, position) as log:
        for record in records:
            log.write(record)
        return log.position()


def tensorboard_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_resumed_run_records_what_an_uninterrupted_one_does(tmp_path: Path):
    write(tmp_path / "whole", RUN, None)

    position = write(tmp_path / "killed", RUN[:4], None)
    write(tmp_path / "killed", [step_record(step, ce=99.0) for step in (4, 5)], position)
    with (tmp_path / "killed/metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')
    write(tmp_path / "killed", RUN[4:], position)

    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    scalars = tensorboard_scalars(tmp_path / "killed")
    assert scalars == tensorboard_scalars(tmp_path / "whole")
    assert scalars["ce/small"] == [(step, 4 - step / 4) for step in range(1, 9)]
    assert scalars["kl/large from gpt2"][0] == (1, 1.5)
    assert scalars["validation_loss/large"] == [(4, 3.25)]


def test_position_zero_begins_again(tmp_path: Path):
    write(tmp_path, RUN[:3], None)
    write(tmp_path, RUN[:2], 0)
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == RUN[:2]


@pytest.mark.parametrize(
    ("position", "message"), [(None, "another run's records"), (10_000, "10000"), (7, "no record ending at byte 7")]
)
def test_records_that_do_not_fit_the_checkpoint_are_left_alone(tmp_path: Path, position: int | None, message: str):
    write(tmp_path, RUN[:3], None)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        MetricsLog(tmp_path, position)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    record = step_record(1, ce=math.nan)
    record["students"]["large"]["grad_norm"] = math.inf
    record["kl"][0][1] = -math.inf
    write(tmp_path, [RUN[0], record], None)

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    [_, line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=refuse)
    assert read["students"]["small"]["ce"] is None
    assert read["students"]["large"]["grad_norm"] is None
    assert read["kl"] == [[0.0, None, 0.75], [0.5, 0.0, 1.5]]
    assert "ce/small" not in tensorboard_scalars(tmp_path)


def test_only_the_last_line_may_be_cut_short(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, RUN[:3], None)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert list(read_metrics(path)) == RUN[:2]
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(UserError, match="line 2"):
        list(read_metrics(path))


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        log._file.close()
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  (the log closes it)
        with pytest.raises(UserError, match=r"/dev/full could not be written .*No space left on device.*: make room"):
            log.write({"kind": "event", "step": 1, "text": "x"})
