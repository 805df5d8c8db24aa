"""What `ensemble_kl` and `linear_ensemble_kl` ask of the arguments they share.

Shapes: N tokens, V vocabulary, S students, R streams.
"""

import math

import torch
from torch import Tensor

MAX_STREAMS = 8
DIVERGENCES = ("forward", "reverse", "jsd")


def check_options(students: int, streams: int, temperature: float, divergence: str) -> None:
    """1 ≤ S ≤ R ≤ 8, a positive temperature, a known divergence; else ValueError."""
    if not 1 <= students <= streams:
        raise ValueError(f"students is {students} of {streams} streams: expected at least 1, at most all of them")
    if streams > MAX_STREAMS:
        raise ValueError(
            f"{streams} streams: expected at most {MAX_STREAMS}; average teachers into one head, or drop some"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}: expected a finite number above 0, such as 1.0")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}: expected one of {', '.join(DIVERGENCES)}")


def check_targets(targets: Tensor, tokens: int, vocabulary: int, ignore_index: int) -> None:
    """int64 [N]; on the CPU, where looking costs no wait, also the range [0, V) or `ignore_index`; else ValueError."""
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}: expected int64 [N] = [{tokens}]; flatten it"
        )
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if outside.any():
        raise ValueError(
            f"targets holds {int(targets[outside][0])}: expected 0 to {vocabulary - 1}, or ignore_index {ignore_index};"
            " the tokenizer and the model's vocabulary must agree"
        )
