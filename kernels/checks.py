"""Checks of the arguments that `ensemble_kl` and `linear_ensemble_kl` share.

Shapes: N tokens, V vocabulary, S students, R streams.
"""

import math

import torch
from torch import Tensor

MAX_STREAMS = 8
DIVERGENCES = ("forward", "reverse", "jsd")


def check_options(students: int, streams: int, temperature: float, divergence: str) -> None:
    """Raises ValueError unless 1 ≤ S ≤ R ≤ 8, the temperature is positive and the divergence is known."""
    if not 1 <= students <= streams:
        raise ValueError(f"students is {students} of {streams} streams: expected a number from 1 to {streams}")
    if streams > MAX_STREAMS:
        raise ValueError(
            f"there are {streams} streams: expected at most {MAX_STREAMS}; average teachers into one head, or drop some"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}: expected a finite number above 0, such as 1.0")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}: expected one of {', '.join(DIVERGENCES)}")


def check_targets(targets: Tensor, tokens: int, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError unless the targets are int64 [N] and, on the CPU, in [0, V) or equal to `ignore_index`.

    On other devices the values are not checked, because reading them would wait for the device.
    """
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}: expected int64 [N] = [{tokens}]; flatten or cast it"
        )
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if outside.any():
        raise ValueError(
            f"targets holds {int(targets[outside][0])}: expected 0 to {vocab_size - 1}, or ignore_index {ignore_index};"
            " use a tokenizer that agrees with the model's vocabulary"
        )
