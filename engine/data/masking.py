"""Masked language modelling: which tokens of a sequence are hidden and are to be predicted (Devlin et al. 2019, 3.1).

Every sequence draws from its seed and its number in the endless row of epochs, and so anew in every epoch, whatever the
number of ranks, the size of a micro-batch, or a resume.

B sequences, L positions, N rows to predict, V vocabulary.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.data.batches import Batch, TokenFile, to_device
from engine.system.errors import UserError

MASKED_SHARE = 0.15  # of the tokens are predicted; of those ...
MASKED, RANDOM = 0.8, 0.1  # ... become the mask, or any token; the rest stay as they are
_MASK = 2  # of the kinds of draw in engine.data.batches


class Masking:
    """How sequences of one tokenizer are masked."""

    def __init__(self, vocabulary: int, mask: int, special: Collection[int], seed: int) -> None:
        """`mask` is the mask token's id; `special` tokens are neither predicted nor drawn. Raises ValueError where ids
        lie outside the vocabulary."""
        outside = [token for token in (mask, *special) if not 0 <= token < vocabulary]
        if outside:
            raise UserError(f"token {outside[0]} is not among the {vocabulary} of the vocabulary: take the tokenizer's")
        self.mask, self.seed = mask, seed
        self.ordinary = np.setdiff1d(np.arange(vocabulary), [mask, *special])
        self._may_hide = np.isin(np.arange(vocabulary), self.ordinary)

    def hide(self, tokens_L: np.ndarray, sample: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The tokens with some hidden, and which are to be predicted (bool [L]); those before `first` stay."""
        dropout_seeds = np.random.default_rng([self.seed, _MASK, sample])
        chosen_L, fate_L = dropout_seeds.random((2, len(tokens_L)))
        predicted_L = (chosen_L < MASKED_SHARE) & self._may_hide[tokens_L]
        predicted_L[:first] = False
        hidden_L = np.where(predicted_L & (fate_L < MASKED), self.mask, tokens_L)
        replaced_L = predicted_L & (fate_L >= MASKED) & (fate_L < MASKED + RANDOM)
        return np.where(replaced_L, dropout_seeds.choice(self.ordinary, len(tokens_L)), hidden_L), predicted_L

    def batch(
        self, tokens_BL: np.ndarray, samples: Sequence[int], device: torch.device, firsts: Sequence[int] | None = None
    ) -> Batch:
        """Hidden tokens, and of the rows to predict alone the targets."""
        sequences = zip(tokens_BL, samples, firsts or [0] * len(samples), strict=True)
        hidden, predicted = zip(*(self.hide(*sequence) for sequence in sequences), strict=True)
        rows_N = np.stack(predicted).ravel().nonzero()[0]
        return Batch(
            to_device(torch.from_numpy(np.stack(hidden).astype(np.int64)), device),
            to_device(torch.from_numpy(tokens_BL.ravel()[rows_N].astype(np.int64)), device),
            rows_N=to_device(torch.from_numpy(rows_N), device),
        )


class MaskedFile(TokenFile):
    """Token ids in sequences of which some tokens are hidden, and those alone predicted."""

    def __init__(self, path: Path, dtype: str, length: int, masking: Masking) -> None:
        super().__init__(path, dtype, length)
        self.masking = masking
        self.chunks = -(-len(self.tokens) // length)

    def predicted(self, start: int) -> int:
        """How many tokens of a sequence may be hidden: all, but near the end."""
        return min(self.length, len(self.tokens) - start)

    def targets(self, start: int, sample: int) -> int:
        tokens_L, first = self._read(start)
        return int(self.masking.hide(tokens_L, sample, first)[1].sum())

    def batch(self, starts: Sequence[int], device: torch.device, samples: Sequence[int] = ()) -> Batch:
        """Inputs [B, L] and, of the tokens to predict alone, rows and targets; masked as the samples' numbers say."""
        read, firsts = zip(*map(self._read, starts), strict=True)
        return self.masking.batch(np.stack(read), samples, device, firsts)

    def _read(self, start: int) -> tuple[np.ndarray, int]:
        """A whole sequence, near the end from so much earlier, and where in it the part begins that may be hidden."""
        begin = min(start, len(self.tokens) - self.length)
        return self.tokens[begin : begin + self.length], start - begin
