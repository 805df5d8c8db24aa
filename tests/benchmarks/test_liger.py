"""The plain loop on Liger's kernels has the same losses as the engine's loop, in Triton's interpreter."""

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)

from transformers.models.llama import modeling_llama
from triton.runtime.interpreter import GridExecutor

from benchmarks import traffic
from benchmarks.cases import Case

STEPS = ["step"] * 3
MODELS = {
    "_rms_norm_forward_kernel",
    "_rms_norm_backward_kernel",
    "_triton_rope",
    "_swiglu_forward_kernel",
    "_swiglu_backward_kernel",
}
CROSS_ENTROPY = {"liger_cross_entropy_kernel"}
DIVERGENCE = {"_kldiv_kernel_forward", "_kldiv_kernel_backward"}


@pytest.mark.parametrize(
    ("task", "students", "teachers", "losses"),
    [
        ("plain", 1, 0, CROSS_ENTROPY),
        ("distil", 1, 2, CROSS_ENTROPY | DIVERGENCE),
        ("mutual", 2, 0, CROSS_ENTROPY | DIVERGENCE),
    ],
)
def test_the_same_losses(
    task: str,
    students: int,
    teachers: int,
    losses: set[str],
    make_case: Callable[..., Case],
    answers: Callable[[str, Case, list[str]], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
):
    """Compares three updates, so Liger's gradients agree too, and checks that its kernels ran."""
    case = make_case(task, students, teachers, "train.length=8")
    expected = np.array([report.losses for report in answers("ours", case, STEPS)])
    for patched in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger patches them for the whole process.
        monkeypatch.setattr(modeling_llama, patched, getattr(modeling_llama, patched))
    traffic.liger_on_the_interpreter()
    launched: set[str] = set()
    launch = GridExecutor.__call__

    def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(executor.fn.__name__)
        launch(executor, *args, **kwargs)

    with (
        mock.patch.object(GridExecutor, "__call__", noted),
        traffic.counted(),
    ):  # It handles floats that the interpreter takes for tensors.
        liger = np.array([report.losses for report in answers("liger", case, STEPS)])
    np.testing.assert_allclose(liger, expected, rtol=1e-5)
    assert (liger[-1] < liger[0] - 0.01).all(), "they were updated"
    assert launched >= MODELS | losses
