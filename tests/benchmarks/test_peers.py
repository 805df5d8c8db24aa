"""The plain `transformers` loop does what the engine's loop does: the same losses, step after step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import throughput
from benchmarks.throughput import Work
from engine.config import StudentConfig

STUDENTS = (
    StudentConfig("a", layers=2, hidden=32, heads=4, ffn=48, kv_heads=2, seed=1),
    StudentConfig("b", layers=1, hidden=16, heads=2, ffn=40, seed=2, tied=False),
    StudentConfig("c", layers=1, hidden=24, heads=2, ffn=24, seed=3),
)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    work = Work(tmp_path / "tokens.bin", STUDENTS, vocabulary=61, length=16, batch=4, zero_stage=0)
    throughput.random_tokens(work.tokens, work.batch * work.length + 1, work.vocabulary)  # every step reads the same
    return work


def test_the_same_losses(work: Work):
    """Five updates: gradients, clipping and AdamW agree too."""
    ours, theirs = throughput.ours(work), throughput.transformers(work, fused=True)
    losses = np.array([[ours(), theirs()] for _ in range(5)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-6)
    assert (losses[-1] < losses[0] - 0.01).all(), "they were updated"


def test_what_torch_compile_is_given_is_what_runs_eagerly(work: Work, monkeypatch: pytest.MonkeyPatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda what, **options: compiled.append((what, options)) or what)
    take_step = throughput.transformers(work, compiled=True)
    assert take_step() == pytest.approx(throughput.transformers(work)())
    assert [type(what).__name__ for what, _ in compiled] == ["LlamaForCausalLM"] * 3 + ["function"]
    assert all(options == {} for _, options in compiled)
