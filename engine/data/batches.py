"""Cuts token files into sequences and gives them out as batches and steps.

What a step reads depends on the seed and the step's number alone. The stream of tokens is cut into chunks of L tokens;
the last one is shorter. An epoch visits every chunk once, in an order drawn from the seed and the epoch's number, so
with fixed chunks every token but the very first is predicted once. Let G be the number of sequences in a step, over all
ranks: step t reads the samples (t−1)·G to t·G − 1 of the endless sequence of epochs. Ranks and micro-batches only
divide a step among themselves, so neither changes what is learnt, and a resumed run needs only its step's number.

Shapes: B sequences, L positions, N = B·L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.system.errors import UserError

IGNORED = -100  # The target of a position where nothing is to be predicted.

# Every kind of draw has a random stream of its own, so that a further kind changes no other.
_ORDER, _OFFSET = 0, 1


@dataclass(frozen=True)
class Batch:
    """The sequences that one rank reads at once."""

    tokens_BL: Tensor  # int64.
    targets_N: Tensor  # int64, one per row: the next token, or IGNORED where there is none to predict.
    rows_N: Tensor | None = None  # int64: which positions of the flattened tokens are rows. None means all.
    kl_mask_N: Tensor | None = None  # bool: the rows whose divergences count. None means those with a target.
    samples_B: Tensor | None = None  # int64: the sequences' numbers in the endless sequence of epochs, if any.
    begins: tuple[int, ...] = ()  # Where each sequence's first token stands in the file; not given for masked tokens.
    # [N, D] per teacher whose hidden states were read from the cache, None for one who predicts now (engine.teachers).
    teacher_states: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads on this rank."""

    number: int  # From 1.
    epoch: float  # Epochs read when this step ends.
    valid_tokens: int  # Targets of this step, over all ranks and micro-batches.
    tokens: int  # Tokens of the text that it reads: valid_tokens, or more where only masked tokens are predicted.
    words: int  # Words that begin among them; 0 where no WordStarts is given.
    micro_batches: list[Batch]


class WordStarts:
    """Counts the words in a stream of tokens.

    A word is a run of characters without white space, as BabyLM counts, in the text that the tokenizer gives back. It
    is counted with the token that holds its first character. White space that the tokenizer cuts into bytes, such as
    U+2028, separates nothing.
    """

    def __init__(self, surfaces: Sequence[str]) -> None:
        """Takes what each token adds to a text (`Tokenizer.surfaces`); special tokens stand between words."""
        after_space = [sum(a.isspace() and not b.isspace() for a, b in pairwise(text)) for text in surfaces]
        self._words_inside = np.array(after_space)  # Words that start after white space inside the token.
        self._starts_with_text = np.array([text != "" and not text[0].isspace() for text in surfaces])
        self._ends_with_space = np.array([text == "" or text[-1].isspace() for text in surfaces])

    def count(self, tokens: np.ndarray) -> int:
        """Returns how many words begin in tokens[1:]."""
        begins = self._ends_with_space[tokens[:-1]] & self._starts_with_text[tokens[1:]]
        return int(self._words_inside[tokens[1:]].sum() + begins.sum())


class TokenFile:
    """A memory-mapped file of token ids, read in sequences of `length` tokens whose targets are the next tokens."""

    def __init__(self, path: Path, dtype: str, length: int, *, kl_everywhere: bool = False) -> None:
        """Opens the file. Raises UserError where it holds less than one sequence.

        `kl_everywhere` is the setting objective.kl_everywhere. In Baby Llama's code a sequence's last position has no
        target, because the targets are shifted inside the sequence, but its divergence from the teachers counts.
        """
        self.tokens = np.memmap(path, dtype=dtype, mode="r")
        self.length, self.kl_everywhere = length, kl_everywhere
        if len(self.tokens) <= length:
            raise UserError(
                f"{path} holds {len(self.tokens):,} tokens, too few for one sequence of train.length={length}: "
                "give more text (or raise data.validation, for a held-out split), or a smaller train.length"
            )
        self.chunks = -(-(len(self.tokens) - 1 - kl_everywhere) // length)

    def token_count(self, start: int) -> int:
        """Returns how many new tokens of text the sequence from `start` covers; fewer at the file's end."""
        return min(self.length, len(self.tokens) - 1 - start) - self.kl_everywhere

    def target_count(self, start: int, sample: int) -> int:
        """Returns how many targets the sequence from `start` has; only masking reads its number, `sample`."""
        return self.token_count(start)

    def batch(self, starts: Sequence[int], device: torch.device, samples: Sequence[int] = ()) -> Batch:
        """Returns the sequences that begin at `starts`; only masking reads their numbers, `samples`."""
        sequences, contexts = self._read(starts, self.length + 1)
        tokens = torch.from_numpy(sequences)
        targets_BL = tokens[:, 1:].clone()
        for targets_L, context in zip(targets_BL, contexts, strict=True):
            targets_L[:context] = IGNORED
        kl_mask_N = None
        if self.kl_everywhere:
            kl_mask_N = to_device((targets_BL != IGNORED).flatten(), device)
            targets_BL[:, -1] = IGNORED
        tokens_BL = to_device(tokens[:, :-1].contiguous(), device)
        begins = tuple(start - context for start, context in zip(starts, contexts, strict=True))
        return Batch(tokens_BL, to_device(targets_BL.flatten(), device), kl_mask_N=kl_mask_N, begins=begins)

    def _read(self, starts: Sequence[int], length: int) -> tuple[np.ndarray, list[int]]:
        """Returns sequences of `length` tokens, int64 [B, length], and how many tokens in front of each are context.

        A sequence near the file's end is read from so much earlier that it is whole. What stands before its start is
        context, and is not predicted again.
        """
        begins = [min(start, len(self.tokens) - length) for start in starts]
        sequences = np.stack([self.tokens[begin : begin + length] for begin in begins])
        return sequences.astype(np.int64), [start - begin for start, begin in zip(starts, begins, strict=True)]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns `x` on the device. On a GPU it is copied from pinned memory, and the host does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def share_of_batch(batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """Returns how many sequences of a step a rank has, and how many of them it reads at once.

    Raises UserError where they do not divide evenly.
    """
    if batch % world_size:
        raise UserError(
            f"train.batch={batch} does not divide among {world_size} ranks: choose a multiple of {world_size}"
        )
    share = batch // world_size
    if micro_batch is not None and share % micro_batch:
        raise UserError(
            f"train.micro_batch={micro_batch} does not divide a rank's {share} sequences a step: "
            f"choose a divisor of {share}"
        )
    return share, micro_batch or share


class TrainingData:
    """The training split as steps."""

    def __init__(
        self,
        file: TokenFile,
        *,
        batch: int,
        micro_batch: int | None,
        seed: int,
        random_offsets: bool,
        word_starts: WordStarts | None = None,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        """Raises UserError where the batch does not divide among ranks, or the text is smaller than one batch."""
        self.share, self.micro_batch = share_of_batch(batch, micro_batch, world_size)
        if file.chunks < batch:
            raise UserError(
                f"the training split holds {file.chunks} sequences of {file.length} tokens, fewer than one batch of "
                f"train.batch={batch}: give more text, or a smaller train.batch or train.length"
            )
        self.file, self.batch, self.seed, self.random_offsets = file, batch, seed, random_offsets
        self.word_starts, self.rank, self.device = word_starts, rank, device

    def chunk_of(self, sample: int) -> int:
        """Returns the chunk of the file that sample number `sample` of the endless sequence of epochs reads."""
        epoch, position = divmod(sample, self.file.chunks)
        return int(_permutation(self.seed, epoch, self.file.chunks)[position])

    def start_of(self, sample: int) -> int:
        """Returns the position in the file, in tokens, at which a sample begins."""
        chunk = self.chunk_of(sample)
        start = chunk * self.file.length
        if self.random_offsets:
            rng = np.random.default_rng([self.seed, _OFFSET, sample // self.file.chunks, chunk])
            start += int(rng.integers(self.file.token_count(start)))
        return start

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yields the steps numbered `first` to `last`, both included, from 1."""
        for number in range(first, last + 1):
            samples = range((number - 1) * self.batch, number * self.batch)
            starts = [self.start_of(sample) for sample in samples]
            first_own = self.rank * self.share  # The first of this rank's samples in the step.
            yield Step(
                number=number,
                epoch=number * self.batch / self.file.chunks,
                # Losses are divided by it: a step in which chance masks nothing must not divide by zero.
                valid_tokens=max(1, sum(map(self.file.target_count, starts, samples))),
                tokens=sum(map(self.file.token_count, starts)),
                words=sum(map(self._words, starts)),
                micro_batches=[
                    self._batch(samples[i : i + self.micro_batch], starts[i : i + self.micro_batch])
                    for i in range(first_own, first_own + self.share, self.micro_batch)
                ],
            )

    def _batch(self, samples: range, starts: Sequence[int]) -> Batch:
        batch = self.file.batch(starts, self.device, samples)
        return replace(batch, samples_B=to_device(torch.tensor(samples), self.device))

    def _words(self, start: int) -> int:
        if self.word_starts is None:
            return 0
        return self.word_starts.count(self.file.tokens[start : start + self.file.token_count(start) + 1])


class HeldOutData:
    """Chunks of the held-out split, evenly spread over it, in as many batches on every rank."""

    def __init__(
        self, file: TokenFile, *, tokens: int, batch: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        """Takes chunks of about `tokens` tokens in all, or the whole split where it is shorter."""
        self.file, self.batch, self.device = file, batch, device
        used = min(file.chunks, max(1, tokens // file.length))
        self._rounds = -(-used // (batch * world_size))
        self._chunks = [position * file.chunks // used for position in range(rank, used, world_size)]

    def batches(self) -> Iterator[Batch]:
        """Yields equally many batches on every rank: a rank without chunks left repeats one that counts for nothing."""
        for number in range(self._rounds):
            chunks = self._chunks[number * self.batch : (number + 1) * self.batch]
            read = chunks or [0]
            batch = self.file.batch([chunk * self.file.length for chunk in read], self.device, read)
            if not chunks:
                batch.targets_N.fill_(IGNORED)
            yield batch


@lru_cache(maxsize=2)  # A step may touch two epochs.
def _permutation(seed: int, epoch: int, chunks: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(chunks)
