import math
from typing import Any

import pytest

from engine.config.settings import OptimizerConfig, StudentConfig
from engine.students.schedule import learning_rate

STEPS, WARMUP = 100, 10
SCHEDULES = ("cosine", "linear", "trapezoid", "constant")


def factors(schedule: Any, **changed: Any) -> dict[int, float]:
    settings: dict[str, Any] = dict(warmup=WARMUP, decay_fraction=0.2, min_lr_ratio=0.1, schedule=schedule)
    optimizer = OptimizerConfig(**settings | changed)
    student = StudentConfig("one", 1, 32, 4, 48, learning_rate=1.0)
    return {step: learning_rate(student, optimizer, step, STEPS) for step in range(1, STEPS + 1)}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {55: 0.1 + 0.9 / 2, 40: 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, 100: 0.1}),
        ("linear", {55: 0.1 + 0.9 / 2, 40: 0.1 + 0.9 * 2 / 3, 100: 0.1}),
        ("trapezoid", {11: 1, 80: 1, 85: 0.1 + 0.9 * 3 / 4, 90: 0.1 + 0.9 / 2, 100: 0.1}),
        ("constant", {11: 1, 55: 1, 100: 1}),
    ],
)
def test_values_at_key_steps(schedule: str, expected: dict[int, float]) -> None:
    warmup = {1: 0.1, 5: 0.5, 10: 1.0}
    values = factors(schedule)
    assert {step: values[step] for step in warmup | expected} == pytest.approx(warmup | expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, WARMUP, STEPS - 1])
def test_rises_to_one_then_never_rises_nor_falls_below_the_lowest(schedule: str, warmup: int) -> None:
    values = list(factors(schedule, warmup=warmup).values())
    rise, fall = values[:warmup], values[warmup:]
    assert rise == sorted(set(rise))
    assert rise[-1:] in ([], [1.0])
    assert fall == sorted(fall, reverse=True)
    assert 0 < fall[0] <= 1
    assert fall[-1] == (1.0 if schedule == "constant" else pytest.approx(0.1))


def test_without_warmup_the_first_step_is_already_on_the_slope() -> None:
    assert factors("linear", warmup=0, min_lr_ratio=0.0)[1] == pytest.approx(0.99)
    assert factors("linear", warmup=0, min_lr_ratio=0.0)[STEPS] == 0.0


def test_a_trapezoids_decay_of_all_or_nothing() -> None:
    assert factors("trapezoid", decay_fraction=1.0) == pytest.approx(
        factors("linear")
    )  # it begins where the warmup ends
    assert factors("trapezoid", decay_fraction=0.0)[STEPS] == 1.0
