"""Masked language modelling: which tokens of a sequence are hidden and are to be predicted (Devlin et al. 2019, 3.1).

Every epoch masks anew: what is masked in a sequence depends on the seed and on the sequence's number among all samples.

Shapes: B sequences, L positions, N rows to predict.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.data.batches import Batch, TokenFile, to_device

PREDICTED_SHARE = 0.15  # Share of the tokens that are predicted.
REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.8, 0.1  # Shares of these; the rest stay as they are.
_MASK = 2  # The random stream of masks, beside those of engine.data.batches.


class Masking:
    """Hides tokens of the sequences of one tokenizer."""

    def __init__(self, vocab_size: int, mask: int, special: Collection[int], seed: int) -> None:
        """Takes the mask token's id, and the `special` tokens, which are neither predicted nor drawn.

        Raises ValueError where ids lie outside the vocabulary.
        """
        outside = [token for token in (mask, *special) if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"token {outside[0]} is not among the {vocab_size} of the vocabulary")
        self.mask, self.seed = mask, seed
        self._ordinary = np.setdiff1d(np.arange(vocab_size), [mask, *special])
        self._may_hide = np.isin(np.arange(vocab_size), self._ordinary)

    def hide(self, tokens_L: np.ndarray, sample: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens with some hidden, and which are to be predicted (bool [L]); the first `context` stay."""
        rng = np.random.default_rng([self.seed, _MASK, sample])
        uniform_L, replacement_L = rng.random((2, len(tokens_L)))
        predicted_L = (uniform_L < PREDICTED_SHARE) & self._may_hide[tokens_L]
        predicted_L[:context] = False
        becomes_mask_L = predicted_L & (replacement_L < REPLACED_BY_MASK)
        hidden_L = np.where(becomes_mask_L, self.mask, tokens_L)
        random_L = predicted_L & ~becomes_mask_L & (replacement_L < REPLACED_BY_MASK + REPLACED_AT_RANDOM)
        return np.where(random_L, rng.choice(self._ordinary, len(tokens_L)), hidden_L), predicted_L


class MaskedFile(TokenFile):
    """A file of token ids, read in sequences of which some tokens are hidden, and only those predicted."""

    def __init__(self, path: Path, dtype: str, length: int, masking: Masking) -> None:
        super().__init__(path, dtype, length)
        self.masking = masking
        self.chunks = -(-len(self.tokens) // length)

    def token_count(self, start: int) -> int:
        return min(self.length, len(self.tokens) - start)

    def target_count(self, start: int, sample: int) -> int:
        (tokens_L,), (context,) = self._read([start], self.length)
        return int(self.masking.hide(tokens_L, sample, context)[1].sum())

    def batch(self, starts: Sequence[int], device: torch.device, samples: Sequence[int] = ()) -> Batch:
        """Returns the sequences with tokens hidden; the batch's rows and targets are those to predict."""
        tokens_BL, contexts = self._read(starts, self.length)
        hidden, predicted = zip(*map(self.masking.hide, tokens_BL, samples, contexts), strict=True)
        rows_N = np.stack(predicted).ravel().nonzero()[0]
        return Batch(
            to_device(torch.from_numpy(np.stack(hidden)), device),
            to_device(torch.from_numpy(tokens_BL.ravel()[rows_N]), device),
            rows_N=to_device(torch.from_numpy(rows_N), device),
        )
