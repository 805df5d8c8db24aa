"""The processes that take steps, and the tables that are made of their reports."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import throughput
from benchmarks.cases import Case
from benchmarks.gate import PHASES, REST, Report

Make = Callable[..., Case]
Answers = Callable[[str, Case, list[str]], list[Any]]


def test_what_a_process_reports(make_case: Make, answers: Answers):
    step, split, table = answers("ours", make_case("distil", 2, 1), ["step", "split", "profile"])
    assert step.losses == pytest.approx([2.05, 2.05], abs=0.05), "half of log 61, at first"
    assert step.seconds > 0
    assert step.peak > step.imported > 0
    assert step.split == {}
    assert set(split.split) == {*PHASES, REST}
    assert sum(split.split.values()) == pytest.approx(split.seconds)
    spent = [phase for phase in PHASES if split.split[phase] > 0]
    assert spent == ["data", "teachers", "bodies", "loss", "backward", "optimizer", "outer", "record"], "one rank"
    assert "aten::mm" in table


def test_the_outer_loop_and_micro_batches_are_the_engines_own(make_case: Make, answers: Answers):
    settings = ("objective.weighted=true", "outer.every=2", "outer.sequences=4", "train.micro_batch=2")
    first, second = answers("ours", make_case("mutual", 2, 0, *settings), ["split", "split"])
    assert first.split["outer"] < 0.05 * first.seconds
    assert second.split["outer"] > 0.3 * second.seconds, "it was its turn"


def test_a_problem_is_told(make_case: Make, answers: Answers):
    (problem,) = answers("ours", make_case("plain", 1, 0, "outer.every=2"), ["step"])
    assert "UserError: outer says how the students" in problem


def test_who_can_do_what(make_case: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def able(case: Case) -> list[str]:
        return [name for name in throughput.VARIANTS if throughput.why_not(name, case) is None]

    assert able(make_case("distil", 1, 2)) == list(throughput.VARIANTS)
    assert set(throughput.VARIANTS) - set(able(make_case("mutual", 2))) == {"trainer"}
    assert able(make_case("mutual", 2, 0, "objective.divergence=jsd")) == ["ours", "products"]
    assert able(make_case("plain", 1, 0, "train.micro_batch=2")) == ["ours"]
    case = make_case("plain", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert able(case) == ["ours", "products"]


def test_a_command_with_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.csv"
    small = ["--vocab-size", "61", "--shape", "1x32x2x40", "--set", "train.length=16", "train.batch=4"]
    assert (
        throughput.main([*small, "--task", "plain", "--variants", "products", "--rounds", "2", "--csv", str(path)]) == 0
    )
    assert "products" in capsys.readouterr().out
    (row,) = csv.DictReader(path.open())
    assert (row["task"], row["students"], row["student_shapes"]) == ("plain", "1", "llama-1x32x2x40")
    layer = 2 * 64 * (4 * 32**2 + 3 * 32 * 40)
    attention = 2 * 2 * 4 * (16 * 17 // 2) * 32
    head = 2 * 64 * 32 * 61
    assert float(row["model_gigaflops"]) == pytest.approx(3 * (layer + attention + head) / 1e9)
    assert float(row["peak_mebibytes"]) > 50
    assert float(row["tokens_per_second"]) == pytest.approx(64 / float(row["milliseconds"]) * 1000)
    assert throughput.main(["--shape", "1x32x2", "--variants", "products"]) == 2
    assert "1x32x2" in capsys.readouterr().err


class Fake:
    """A process whose second student has this loss; with None it fails."""

    def __init__(self, loss: float | None) -> None:
        self.loss = loss

    def step(self) -> Report:
        if self.loss is None:
            raise RuntimeError("Traceback:\n  in a line\nOutOfMemoryError: 80 GiB")
        return Report(1.0, [1.0, self.loss], 0)


def refused(**losses: float | None) -> dict[str, str]:
    return throughput.refusals({name: Fake(loss) for name, loss in losses.items()}, 1e-5)  # pyright: ignore[reportArgumentType]


def test_variants_that_fail_or_differ_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert refused(ours=2.0, peer=2.00001) == {}
    reasons = refused(ours=2.0, differs=2.0001, agrees=2.0, fails=None, diverges=math.nan)
    assert list(reasons) == ["differs", "fails", "diverges"]
    assert "differ from those of ours" in reasons["differs"]
    assert reasons["fails"] == "OutOfMemoryError: 80 GiB"
    with pytest.raises(RuntimeError, match="80 GiB"):
        refused(ours=None, peer=2.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="80 GiB"):
        refused(ours=2.0, peer=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Liger's kernels run on this machine")
def test_what_is_refused_is_said_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(throughput, "why_not", lambda name, case: None)
    path = tmp_path / "rows.csv"
    small = ["--vocab-size", "61", "--shape", "1x32x2x40", "--set", "train.length=16", "train.batch=2"]
    small += ["--task", "plain"]
    assert throughput.main([*small, "--variants", "products", "liger", "--rounds", "2", "--csv", str(path)]) == 1
    assert "not timed: liger: " in capsys.readouterr().out
    with path.open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["products"]


def test_what_must_be_held_between_steps(make_case: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    case = make_case("plain", 1, 0, "train.zero_stage=3")
    alone = throughput.state_bytes(case)
    assert alone == 12 * sum(throughput.parameter_count(shape) for shape in case.student_shapes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert throughput.state_bytes(case) == alone / 2


@pytest.mark.slow
def test_two_ranks(tmp_path: Path, spawn_ranks: Callable[..., None]):
    path = tmp_path / "rows.csv"
    small = ("--vocab-size", "61", "--shape", "1x32x2x40", "--set", "train.length=16", "train.batch=4")
    stage = ("train.zero_stage=1", "--task", "plain", "--rounds", "1", "--variants", "ours", "--csv", path)
    spawn_ranks(Path(throughput.__file__), 2, *small, *stage)
    (row,) = csv.DictReader(path.open())
    assert (row["ranks"], row["zero_stage"]) == ("2", "1")
    parameters = 61 * 32 + 4 * 32**2 + 3 * 32 * 40 + 3 * 32
    moved = float(row["communicated_mebibytes"]) * 2**20 / parameters / 4
    assert moved == pytest.approx(2, abs=0.05), "all gradients once, all weights once, and a few numbers"
    assert float(row["communication"]) > 0
    assert float(row["waiting"]) > 0
