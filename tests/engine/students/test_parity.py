"""Crèche's loop against a plain one: same losses and parameters for any ranks, ZeRO stage, accumulation and head.

Each world size is spawned once and runs every case (parity_worker.py); the tests here look at its findings.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

WORLDS = (1, 2)
TOLERANCE = 1e-5
PARITY = [
    f"parity-zero{stage}-accumulation{accumulation}-{head}"
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 4)
    for head in ("tied", "untied")
]
ALTERED = [
    "parity-zero1-recompute",
    "parity-zero3-recompute",
    "parity-zero1-compile",
    "parity-zero2-compile-recompute",
]


@pytest.fixture(scope="module")
def folder(spawn_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder to which both world sizes, side by side, write their findings."""
    folder = tmp_path_factory.mktemp("parity")
    worker = Path(__file__).with_name("parity_worker.py")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda world_size: spawn_ranks(worker, world_size, folder), WORLDS))
    return folder


@pytest.fixture(scope="module", params=WORLDS, ids=["1 rank", "2 ranks"])
def findings(request: pytest.FixtureRequest, folder: Path) -> Any:
    return json.loads((folder / f"findings-{request.param}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PARITY, *ALTERED])
def test_twenty_steps_equal_a_plain_loop(findings: dict[str, Any], case: str) -> None:
    case_findings = findings[case]
    assert case_findings["fell"] > 0.1, "the plain loop learnt nothing, so agreement would mean nothing"
    assert 0 < case_findings["clipped"] < 1, "clipping was to act in some steps"
    assert case_findings["losses"] <= TOLERANCE
    assert case_findings["norms"] <= TOLERANCE
    assert case_findings["weights"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_the_plain_loop_within_its_rounding(findings: dict[str, Any], stage: int) -> None:
    case_findings = findings[f"parity-zero{stage}-bf16"]
    assert 1e-6 < case_findings["losses"] < 5e-3, "rounded to 8 bits, and no worse"
    assert case_findings["weights"] < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [f"poison-zero{stage}-{what}-fp32" for stage in (0, 1, 2, 3) for what in ("loss", "gradient", "forward")]
    + [f"poison-zero{stage}-gradient-bf16" for stage in (1, 2, 3)],
)
def test_one_student_that_is_not_finite_stops_the_step_of_all(findings: dict[str, Any], case: str) -> None:
    case_findings = findings[case]
    assert case_findings["not_finite"] == [1]
    assert case_findings["moved"] == 0, "weights and moments stay bit for bit"
    assert case_findings["later_not_finite"] == []
    assert case_findings["later_moved"] == case_findings["tensors"], "the next good step moves every tensor"
    assert case_findings["later_finite"]
    assert case_findings["stop"], "a wish to stop on one rank reaches all, also in a skipped step"
    if "zero3" not in case:  # DeepSpeed's stage 3 computes a norm itself.
        assert case_findings["waits"] == 0, "beside what the students decide together, no step waits for the device"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_backward_of_one_student_leaves_the_others_without_gradient(findings: dict[str, Any], stage: int) -> None:
    assert findings[f"separate-zero{stage}"] == {"a": ["a"], "b": ["b"], "c": ["c"]}
