"""Masked language modelling: which tokens of a sequence are hidden and are to be predicted (Devlin et al. 2019, 3.1).

Every sequence draws from its seed and its number in the endless row of epochs, and so anew in every epoch, whatever the
number of ranks, the size of a micro-batch, or a resume.

B sequences, L positions, N rows to predict, V vocabulary.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from engine.data import Batch

SHARE = 0.15  # of the tokens are predicted; of those ...
MASKED, RANDOM = 0.8, 0.1  # ... become the mask, or any token; the rest stay as they are
_MASK = 2  # of the kinds of draw in engine.data


class Masking:
    """How sequences of one tokenizer are masked."""

    def __init__(self, vocabulary: int, mask: int, special: Collection[int], seed: int) -> None:
        """`mask` is the mask token's id; `special` tokens are neither predicted nor drawn. Raises ValueError where ids
        lie outside the vocabulary."""
        outside = [token for token in (mask, *special) if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(
                f"token {outside[0]} is not among the {vocabulary} of the vocabulary: take the tokenizer's"
            )
        self.mask, self.seed = mask, seed
        self.ordinary = np.setdiff1d(np.arange(vocabulary), [mask, *special])
        self._may_hide = np.isin(np.arange(vocabulary), self.ordinary)

    def hide(self, tokens_L: np.ndarray, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens with some hidden, and which are to be predicted (bool [L])."""
        draws = np.random.default_rng([self.seed, _MASK, sample])
        chosen_L, fate_L = draws.random((2, len(tokens_L)))
        predicted_L = (chosen_L < SHARE) & self._may_hide[tokens_L]
        hidden_L = np.where(predicted_L & (fate_L < MASKED), self.mask, tokens_L)
        replaced_L = predicted_L & (fate_L >= MASKED) & (fate_L < MASKED + RANDOM)
        return np.where(replaced_L, draws.choice(self.ordinary, len(tokens_L)), hidden_L), predicted_L

    def predicted(self, tokens_L: np.ndarray, sample: int) -> int:
        """How many tokens `hide` would have predicted."""
        return int(self.hide(tokens_L, sample)[1].sum())

    def batch(self, tokens_BL: np.ndarray, samples: Sequence[int]) -> Batch:
        """Hidden tokens, and of the rows to predict alone the targets; on the CPU."""
        hidden, predicted = zip(*map(self.hide, tokens_BL, samples), strict=True)
        rows_N = np.stack(predicted).ravel().nonzero()[0]
        return Batch(
            torch.from_numpy(np.stack(hidden).astype(np.int64)),
            torch.from_numpy(tokens_BL.ravel()[rows_N].astype(np.int64)),
            rows_N=torch.from_numpy(rows_N),
            samples_B=torch.tensor(samples),
        )
