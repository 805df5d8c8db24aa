"""Where the learning rate is decided. There is no state to save."""

import math

from engine.config.settings import OptimizerConfig, StudentConfig


def learning_rate(student: StudentConfig, optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Returns a student's learning rate at `step` of `steps`, counted from 1.

    The warmup rises linearly and reaches the student's own rate at its last step. Then cosine and linear fall to the
    share `min_lr_ratio` of it at the last step; trapezoid stays, and falls linearly over the last `decay_fraction` of
    all steps; constant stays.
    """
    if step <= optimizer.warmup:
        return student.learning_rate * (step / optimizer.warmup)
    if optimizer.schedule == "constant":
        return student.learning_rate
    start = optimizer.warmup
    if optimizer.schedule == "trapezoid":
        start = max(start, round(steps * (1 - optimizer.decay_fraction)))
    progress = max(0.0, (step - start) / max(1, steps - start))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if optimizer.schedule == "cosine" else 1 - progress
    return student.learning_rate * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * remaining)
