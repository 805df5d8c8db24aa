"""Learning-rate schedules, as factors of each student's own rate. They are functions of the step and hold no state."""

import math

from engine.config.settings import OptimizerConfig


def factor(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Returns what multiplies a student's learning rate at `step` of `steps`, counted from 1.

    The warmup rises linearly and reaches 1 at its last step. Then cosine and linear fall to `min_lr_ratio` at the last
    step; trapezoid stays at 1 and falls linearly over the last `decay_fraction` of all steps; constant stays.
    """
    if step <= optimizer.warmup:
        return step / optimizer.warmup
    if optimizer.schedule == "constant":
        return 1.0
    start = optimizer.warmup
    if optimizer.schedule == "trapezoid":
        start = max(start, round(steps * (1 - optimizer.decay_fraction)))
    progress = max(0.0, (step - start) / max(1, steps - start))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if optimizer.schedule == "cosine" else 1 - progress
    return optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * remaining
