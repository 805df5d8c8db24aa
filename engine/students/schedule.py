"""Where the learning rate is decided: each student's own rate, times its schedule. There is no state to save."""

import math

from engine.config.settings import OptimizerConfig, StudentConfig


def learning_rate(student: StudentConfig, optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Returns a student's learning rate at `step` of `steps`, counted from 1."""
    return student.learning_rate * schedule_factor(optimizer, step, steps)


def schedule_factor(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Returns what multiplies the highest learning rate at `step` of `steps`, counted from 1.

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
