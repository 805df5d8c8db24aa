"""A run that is killed or stopped and taken up again ends where it would have ended, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def findings(spawn_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    for world_size in (1, 2):  # in this order: the second takes up a run of the first
        spawn_ranks(Path(__file__).with_name("resume_worker.py"), world_size, folder)
    return {world_size: json.loads((folder / f"findings-{world_size}.json").read_text()) for world_size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_twice_inside_and_across_an_epoch(findings: dict[int, dict[str, Any]], world_size: int) -> None:
    found = findings[world_size]
    assert found["epochs"][6] < 1 < found["epochs"][17], "the deaths were to lie in different epochs"
    assert found["broken"], "weights and moments, bit for bit"
    assert found["broken_history"], "the same records, none twice"
    assert not found["pid_file"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_to_one_rank_stops_all_cleanly(findings: dict[int, dict[str, Any]], world_size: int) -> None:
    found = findings[world_size]
    assert found["stopped_at"] == 6, "the signal came during step 6 and was heard at its end"
    assert found["stopped"]
    assert found["stopped_history"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_weights_that_were_so_resumed_are_learnt_and_used(
    findings: dict[int, dict[str, Any]], world_size: int
) -> None:
    found = findings[world_size]["weights"]
    assert found["updates"] == 8, "every third of 24 steps"
    assert found["moved"] > 1e-4
    assert found["error"] < 1e-5


def test_another_world_size_and_zero_stage_go_on_alike(findings: dict[int, dict[str, Any]]) -> None:
    """1 rank at stage 0, then 2 ranks at 1, 2 and 3, against one rank at stage 1 throughout."""
    assert findings[2]["moved_losses"] <= 1e-5
    assert findings[2]["moved_weights"] <= 1e-5


def test_bf16_keeps_its_fp32_masters(findings: dict[int, dict[str, Any]]) -> None:
    assert findings[2]["bf16"], "weights and moments, bit for bit"


def test_the_best_checkpoint_is_kept_beside_the_last_two(findings: dict[int, dict[str, Any]]) -> None:
    kept = findings[1]["checkpoints"]
    assert kept[-2:] == ["step-00000020", "step-00000024"]
    assert f"step-{findings[1]['best']:08d}" in kept
    assert len(kept) <= 3
