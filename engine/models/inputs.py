"""What the models' forward passes ask of their inputs.

B sequences, L positions.
"""

from torch import Tensor


def length_of(tokens_BL: Tensor, positions: int) -> int:
    """L; ValueError where a model has fewer positions."""
    length = tokens_BL.shape[1]
    if length > positions:
        raise ValueError(f"a sequence of {length} tokens is longer than the model's {positions} positions")
    return length


def draws_in_use(draws_B: Tensor | None, dropout: float, *, training: bool) -> Tensor | None:
    """What dropout is drawn from, None where nothing is dropped; ValueError where it is missing."""
    if not training or dropout == 0:
        return None
    if draws_B is None:
        raise ValueError(f"dropout={dropout} in training needs draws_B, a number for every sequence")
    return draws_B
