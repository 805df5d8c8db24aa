"""The products of a step, counted, and the processes that take steps."""

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks import throughput
from benchmarks.throughput import Work, step_products
from engine.config import StudentConfig
from engine.models.llama import LlamaShape

STUDENTS = (
    StudentConfig("a", layers=2, hidden=32, heads=4, ffn=48, kv_heads=2, seed=1),
    StudentConfig("b", layers=1, hidden=16, heads=2, ffn=40, seed=2, tied=False),
)
THREE_HEADS = dataclasses.replace(STUDENTS[0], heads=3)
CPU = torch.device("cpu")


@pytest.fixture
def work(tmp_path: Path) -> Work:
    work = Work(tmp_path / "tokens.bin", STUDENTS, vocabulary=61, length=16, batch=4)
    throughput.random_tokens(work.tokens, 2000, work.vocabulary)
    return work


def flops(work: Work) -> int:
    """Of the products as they are listed."""
    shapes = [LlamaShape.of(config, work.vocabulary) for config in work.students]
    listed = [product for shape in shapes for product in step_products(shape, work.batch, work.length, CPU)]
    return sum(2 * out.numel() * left.shape[-1] for left, _, out in listed)


def test_products_are_those_of_the_step(work: Work):
    take_step = throughput.ours(work)
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: 2 * left[0] * left[1] * right[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)  # of its own it knows `addmm` alone
    with kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH), counter:
        take_step()
    assert flops(work) == counter.get_total_flops()


def test_products_alone_run_as_listed(work: Work):
    take_step = throughput.products(work)
    with FlopCounterMode(display=False) as counter:
        take_step()
    assert flops(work) == counter.get_total_flops()


def answers(name: str, work: Work, commands: list[str]) -> list[Any]:
    """What a variant's process says, without the process."""
    ours, theirs = multiprocessing.Pipe()
    for command in [*commands, ""]:
        ours.send(command)
    throughput.serve(theirs, name, work)
    return [ours.recv() for _ in commands]


def test_what_a_process_says(work: Work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(throughput, "PLACE", ())  # this process's own environment stays
    report, table = answers("ours", work, ["step", "profile"])
    assert [round(loss, 1) for loss in report.losses] == [4.1, 4.1], "log 61, at first"
    assert report.seconds > 0
    assert report.peak > report.imported > 0
    assert "aten::mm" in table
    (problem,) = answers("products", dataclasses.replace(work, students=(THREE_HEADS,)), ["step"])
    assert "hidden=32 is not divisible by heads=3" in problem


def test_a_measurement_with_processes(work: Work):
    (row,) = throughput.measure(["products"], work, rounds=2)
    assert row.gigaflops == flops(work) / 1e9
    assert row.peak_mebibytes > 50
    assert row.student_tokens_per_second == pytest.approx(2 * 64 / row.milliseconds * 1000)
    assert "products" in throughput.table([row])


def test_losses_that_differ_are_refused():
    class Fake:
        def __init__(self, loss: float) -> None:
            self.loss = loss

        def step(self) -> throughput.Report:
            return throughput.Report(1.0, [1.0, self.loss], 0, 0)

    throughput.check_losses({"ours": Fake(2.0), "peer": Fake(2.00001)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"peer's losses .* differ from those of ours"):
        throughput.check_losses({"ours": Fake(2.0), "peer": Fake(2.0001)})  # pyright: ignore[reportArgumentType]
