"""Learning-rate schedules, as factors of each student's own rate. A function of the step: there is no state to save."""

import math

from engine.config import OptimizerConfig


def factor(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The factor at `step` of `steps`, counted from 1.

    Warmup rises linearly and reaches 1 at its last step. Then: cosine or linear down to `floor` at the last step;
    trapezoid stays at 1 and falls linearly over the last `decay` share of all steps; constant stays.
    """
    if step <= optimizer.warmup:
        return step / optimizer.warmup
    if optimizer.schedule == "constant":
        return 1.0
    start = optimizer.warmup
    if optimizer.schedule == "trapezoid":
        start = max(start, round(steps * (1 - optimizer.decay)))
    progress = max(0.0, (step - start) / max(1, steps - start))
    fall = (1 + math.cos(math.pi * progress)) / 2 if optimizer.schedule == "cosine" else 1 - progress
    return optimizer.floor + (1 - optimizer.floor) * fall
