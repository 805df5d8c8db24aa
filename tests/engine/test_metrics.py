import json
import math
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.metrics import (
    EvaluationRecord,
    MetricsLog,
    Record,
    StepRecord,
    Summary,
    read_metrics,
)
from engine.progress import Progress
from engine.summary import final_table


def step_record(step: int, ce: float = 3.0) -> StepRecord:
    student = {"loss": ce, "ce": ce, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 9e3}
    return {
        "kind": "step",
        "step": step,
        "epoch": step / 100,
        "tokens": 512 * step,
        "seconds": 0.1,
        "tokens_per_second": 5120.0,
        "students": {name: {**student, "model_flops_per_second": 1e9, "clipped": False} for name in ("small", "large")},  # pyright: ignore[reportReturnType]
        "kl": [[0.0, 0.25, 0.75], [0.5, 0.0, 1.5]],
    }


EVALUATION: EvaluationRecord = {
    "kind": "evaluation",
    "step": 4,
    "students": {
        "small": {"validation_loss": 3.5, "pairs_accuracy": 0.625},
        "large": {"validation_loss": 3.25, "pairs_accuracy": 0.75},
    },
}

RUN: list[Record] = [
    {"kind": "streams", "step": 0, "students": ["small", "large"], "teachers": ["gpt2"]},
    *(step_record(step, ce=4 - step / 4) for step in range(1, 5)),
    EVALUATION,
    *(step_record(step, ce=4 - step / 4) for step in range(5, 9)),
]


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
    with pytest.raises(ValueError, match=message):
        MetricsLog(tmp_path, position)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    record = step_record(1, ce=math.nan)
    record["students"]["large"]["grad_norm"] = math.inf
    record["kl"][0][1] = -math.inf
    write(tmp_path, [record], None)

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
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
    with pytest.raises(ValueError, match="line 2"):
        list(read_metrics(path))


def progress_output(*, terminal: bool, **options: float) -> str:
    output = StringIO()
    output.isatty = lambda: terminal
    console = Console(file=output, force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
    with suppress(KeyboardInterrupt), Progress(8, console=console, **options) as progress:  # pyright: ignore[reportArgumentType]
        for record in RUN:
            progress.show(record)
        progress.show({"kind": "skipped", "step": 9, "students": ["[red]"], "reason": "loss is nan"})
        raise KeyboardInterrupt
    return output.getvalue()


def test_plain_progress():
    lines = progress_output(terminal=False, interval=0.0).splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("step 1/8, ")
    assert "5,120 tokens/s | small: CE 3.750 KL 0.500 lr 1.0e-03 | large: CE 3.750 KL 1.000" in lines[0]
    assert lines[7].endswith("large: CE 2.000 KL 1.000 lr 1.0e-03 val 3.250 pairs 75.0%")
    assert lines[8] == "step 9 skipped: [red]: loss is nan"


def test_plain_progress_prints_no_more_than_asked_and_always_the_last_step():
    lines = progress_output(terminal=False, interval=3600.0).splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 1/8", "step 9 skipped: [red]: loss is nan", "step 8/8"]


def test_live_progress_gives_the_terminal_back():
    output = progress_output(terminal=True)
    for text in ("step 8/8", "5,120 tokens/s", "KL", "75.0%", "step 9 skipped: [red]"):
        assert text in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor stayed hidden"


def test_other_ranks_show_nothing():
    assert progress_output(terminal=True, rank=1) == ""


def test_final_table_keeps_paths_whole():
    folder = "/data/" + "deep/" * 60 + "students/"
    summary: Summary = {
        "run": "mutual",
        "finished": "2026-01-02T03:04:05+00:00",
        "git_commit": None,
        "steps": 8,
        "tokens": 4096,
        "seconds": 60.0,
        "world_size": 1,
        "zero_stage": 1,
        "device": "cpu",
        "data": {
            "name": "grammar",
            "train_tokens": 10_000,
            "train_words": 8_000,
            "tokens_per_word": 1.25,
            "entropy_per_word": 2.5,
        },
        "students": [
            {
                "name": name,
                "parameters": 58_340_000,
                "validation_loss": 2.5,
                "validation_loss_per_word": 3.125,
                "pairs_accuracy": pairs,
                "pairs_by_phenomenon": {},
                "tokens_per_second": 12_345.6,
                "folder": folder + name,
                "best_step": 8,
                "samples": [],
            }
            for name, pairs in (("small", None), ("large", 0.875))
        ],
        "report": "/data/report.html",
    }
    lines = final_table(summary).splitlines()
    assert lines[2].split() == ["small", "58.34M", "2.5000", "3.1250", "-", "12,346"]
    assert lines[3].split() == ["large", "58.34M", "2.5000", "3.1250", "87.5%", "12,346"]
    assert lines[4].split() == ["best", "possible", "2.0000", "2.5000"]
    assert [line.split()[1] for line in lines[-3:]] == [folder + "small", folder + "large", "/data/report.html"]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        log._file.close()
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  (the log closes it)
        with pytest.raises(ValueError, match=r"/dev/full could not be written .*No space left on device.*: make room"):
            log.write({"kind": "event", "step": 1, "text": "x"})
