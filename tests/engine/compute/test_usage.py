"""What a run has used is counted, kept over a resume, and carried by what it exports."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.compute.flops import Flops, Workload, inference, outer_update, training
from engine.compute.usage import ModelUsage, Usage, read_usage
from engine.config.loading import build
from engine.config.settings import Config, OuterConfig
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape
from engine.run.checkpoint import latest, read_state
from engine.run.run import Run
from engine.system.errors import UserError
from engine.train import train

TINY = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 32}
SMALL, LARGE = (LlamaShape(1, hidden, 2, 32, 400, 32, kv_heads=2) for hidden in (16, 24))
WORKLOAD = Workload.whole(4, 32)


def config(folder: Path, name: str, *overrides: str, students: int = 1, **settings: Any) -> Config:
    cohort = [{"name": "one", **TINY}, {"name": "two", **TINY, "hidden": 24}][:students]
    return build(
        Config,
        {
            "students": cohort,
            "run": {"name": name, "folder": str(folder / "runs")},
            "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": 400}},
            "optimizer": {"warmup": 1},
            "train": {"steps": 6, "batch": 4, "length": 32},
            "evaluation": {"every": 100, "tokens": 100, "samples": 0, "pairs": "none"},
            "checkpoint": {"every": 2},
            **settings,
        },
        overrides,
    )


def usage_of(run: Path) -> Usage:
    checkpoint = latest(run / "checkpoints")
    assert checkpoint is not None
    return read_state(checkpoint).usage


def counts(usage: Usage) -> list[tuple[int, ...]]:
    return [(part.tokens, part.words, part.model_flops, part.hardware_flops) for _, part in usage.parts()]


def test_teacher_students_and_outer_loop_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path, "teacher"))
    learnt: dict[str, Any] = {
        "students": 2,
        "teachers": [{"path": str(tmp_path / "runs" / "teacher")}],
        "objective": {"weighted": True, "ce_weight": 0.5, "peer_weight": 0.25, "teacher_weight": 0.25},
        "outer": {"every": 3, "sequences": 2},
    }
    train(config(tmp_path, "whole", **learnt))
    usage = usage_of(tmp_path / "runs" / "whole")
    six = lambda flops: (6 * flops.model, 6 * flops.hardware)  # noqa: E731
    tokens = usage.students["one"].tokens
    assert 0 <= 6 * 128 - tokens < 32, "all but what a short last sequence lacks"
    assert usage.students["two"].words > 0
    for name, shape in (("one", SMALL), ("two", LARGE)):
        part = usage.students[name]
        assert (part.model_flops, part.hardware_flops) == six(training(shape, WORKLOAD))
        assert part.seconds > 0
    assert (usage.teachers.model_flops, usage.teachers.hardware_flops) == six(inference(SMALL, WORKLOAD))
    assert usage.teachers.tokens == tokens
    update = outer_update([SMALL, LARGE], WORKLOAD, Workload.whole(2, 32), OuterConfig())
    assert usage.outer.hardware_flops == pytest.approx(2 * update.hardware, rel=0.02), "rows without a target"
    assert usage.outer.seconds > 0
    assert usage.joules is None

    teacher = read_usage(tmp_path / "runs" / "teacher" / "students" / "one")
    assert teacher is not None
    assert teacher == usage_of(tmp_path / "runs" / "teacher"), "exported from the only checkpoint that was evaluated"
    assert usage.inherited_flops == teacher.flops
    assert usage.inherited == (teacher,)
    assert read_usage(tmp_path / "runs" / "whole" / "students" / "two") == usage
    summary = json.loads((tmp_path / "runs" / "whole" / "summary.json").read_text())
    assert "joules" not in summary["usage"]

    finished, record = [], Run.after_step
    with monkeypatch.context() as patch:

        def killed_after_3(run: Run, step: Any, *rest: Any) -> None:
            record(run, step, *rest)
            finished.append(step.number)
            if step.number == 3:
                raise KeyboardInterrupt

        patch.setattr(Run, "after_step", killed_after_3)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, "broken", **learnt))
    train(config(tmp_path, "broken", **learnt))
    assert counts(usage_of(tmp_path / "runs" / "broken")) == counts(usage)

    lines = (tmp_path / "runs" / "broken" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert steps[-1]["model_flops"] == usage.flops.model
    assert all(0 < step["mfu"] < step["hfu"] for step in steps)


@pytest.mark.parametrize(("context", "window"), [("chunk", 32), ("stream", 64)])
def test_filling_a_cache_is_counted_in_every_run_that_reads_it(tmp_path: Path, context: str, window: int) -> None:
    train(config(tmp_path, "teacher", "students.max_length=64"))
    teacher = {"path": str(tmp_path / "runs" / "teacher"), "context": context}
    teachers: dict[str, Any] = {"teachers": [teacher | ({"window": window} if context == "stream" else {})]}
    train(config(tmp_path, "live", **teachers))
    head = inference(SMALL, replace(WORKLOAD, sequences=0))
    for name in ("first", "second"):
        train(config(tmp_path, name, **teachers, cache={"path": str(tmp_path / "cache")}))
        usage = usage_of(tmp_path / "runs" / name).teachers
        windows = usage.tokens // 32
        assert windows > 50
        filling = inference(SMALL, Workload(windows, window, 0, 0, 0))
        assert usage.model_flops == filling.model + 6 * head.model
    live = usage_of(tmp_path / "runs" / "live").teachers
    # Of windows of its own a live teacher reads a fixed number at once.
    windows_a_step = 4 if context == "chunk" else 2048 // 64
    assert live.model_flops == 6 * inference(SMALL, replace(WORKLOAD, sequences=windows_a_step, length=window)).model


def test_of_masked_text_what_is_predicted_reaches_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, record = [], Run.after_step

    def recorded(run: Run, step: Any, *rest: Any) -> None:
        steps.append(step)
        record(run, step, *rest)

    monkeypatch.setattr(Run, "after_step", recorded)
    train(config(tmp_path, "masked", "data.tokenizer.mask=true", "students.0.family=roberta"))
    usage = usage_of(tmp_path / "runs" / "masked").students["one"]
    shape = RobertaShape(1, 16, 2, 32, 400, 32)
    workloads = [Workload(4, 32, step.valid_tokens, step.valid_tokens, step.tokens) for step in steps]
    assert usage.model_flops == sum(training(shape, workload).model for workload in workloads)
    assert (
        usage.tokens
        == sum(workload.tokens for workload in workloads)
        > 5 * sum(workload.valid for workload in workloads)
    )


def test_a_run_that_taught_twice_counts_once() -> None:
    grandmother = Usage("grandmother", {"a": ModelUsage(model_flops=100, hardware_flops=110, seconds=1.0)})
    mother = Usage("mother", {"a": ModelUsage(model_flops=10, hardware_flops=11)}, inherited=(grandmother,))
    later = replace(grandmother, students={"a": ModelUsage(model_flops=200, hardware_flops=220)}, seconds=2.0)
    assert Usage("child", inherited=(mother, later, later)).inherited_flops == Flops(210, 231)


def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_text('{"run": 3')
    with pytest.raises(
        UserError, match=r"usage.json is damaged \(Invalid JSON.*\): delete it, or export the model again"
    ):
        read_usage(tmp_path)
