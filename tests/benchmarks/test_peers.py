"""The peers have the same losses as the engine's loop, step after step."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import throughput
from benchmarks.cases import Case

Make = Callable[..., Case]
Answers = Callable[[str, Case, list[str]], list[Any]]
STEPS = ["step"] * 5


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch):
    """Has AdamW fused, as torch's loop over parameters rounds differently."""
    variant = throughput.Variant(partial(throughput.transformers, fused=True))
    monkeypatch.setitem(throughput.VARIANTS, "transformers", variant)


@pytest.mark.parametrize(
    ("task", "students", "teachers"), [("plain", 2, 0), ("distil", 1, 2), ("mutual", 3, 0), ("mutual", 2, 2)]
)
def test_the_same_losses(task: str, students: int, teachers: int, make_case: Make, answers: Answers):
    """Compares five updates, so gradients, clipping and AdamW agree too."""
    case = make_case(task, students, teachers)
    ours, theirs = (np.array([r.losses for r in answers(name, case, STEPS)]) for name in ("ours", "transformers"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert (ours[-1] < ours[0] - 0.01).all(), "they were updated"


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
def test_the_trainer_has_the_same_losses(make_case: Make, answers: Answers):
    case = make_case("distil", 1, 2)
    losses = [[r.losses for r in answers(name, case, STEPS)] for name in ("transformers", "trainer")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_what_torch_compile_is_given_is_what_runs_eagerly(
    make_case: Make, answers: Answers, monkeypatch: pytest.MonkeyPatch
):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda what, **options: compiled.append((what, options)) or what)
    case = make_case("distil", 2, 1)
    (report,), (eager,) = (answers(name, case, ["step"]) for name in ("compile, fused AdamW", "transformers"))
    assert report.losses == pytest.approx(eager.losses)
    assert [type(what).__name__ for what, _ in compiled] == ["LlamaForCausalLM"] * 3 + ["function"]
    assert all(options == {} for _, options in compiled)
