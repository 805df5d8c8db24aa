"""Token files to steps. What a step reads depends on the seed and the step's number alone.

The stream of tokens is cut into chunks of L tokens, the last one what is left; an epoch visits every chunk once, in an
order drawn from the seed and the epoch's number, so that (with fixed chunks) every token but the very first is
predicted once. Step t takes the sequences (t−1)·G to t·G of the endless row of epochs, G the global batch. Ranks and
micro-batches only divide a step among themselves, so neither changes what is learnt, and a resumed run needs the step's
number and nothing else.

B sequences, L positions, N = B·L tokens.
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
from kernels import TopK

IGNORED = -100  # a target that is not to be predicted

# Every kind of draw has a stream of its own, so that adding one changes no other.
_ORDER, _OFFSET = 0, 1


@dataclass(frozen=True)
class Batch:
    """What one rank takes at once."""

    tokens_BL: Tensor  # int64
    targets_N: Tensor  # int64, the token after each row; IGNORED where there is none to predict
    rows_N: Tensor | None = None  # int64, which positions of the flattened tokens are rows; None: all
    kl_mask_N: Tensor | None = None  # bool, the rows whose divergences count; None: those with a target
    samples_B: Tensor | None = None  # int64, the sequences' numbers in the endless row of epochs; None: not of it
    chunks: tuple[int, ...] = ()  # the sequences' chunks of the file
    predicted: tuple[TopK, ...] = ()  # by teachers, where a cache has kept it (engine.teachers.cache)


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads on this rank."""

    number: int  # from 1
    epoch: float  # epochs begun and finished before this step ends
    valid_tokens: int  # predicted in this step, over all ranks and micro-batches
    tokens: int  # of the text that it reads: as many, but where only those that are masked are predicted
    words: int  # begun by them (`WordStarts`); 0 where nobody counts
    micro_batches: list[Batch]


class WordStarts:
    """Which tokens begin a word: a run of text without white space, as BabyLM counts, in the text that the tokenizer
    gives back. A word is counted with the token that holds its first character. White space that the tokenizer cuts
    into bytes (U+00A0 and its like, with `normalization: none` alone) separates nothing."""

    def __init__(self, surfaces: Sequence[str]) -> None:
        """From what each piece adds to a text (`Tokenizer.surfaces`); special tokens stand between words."""
        after_space = [sum(a.isspace() and not b.isspace() for a, b in pairwise(text)) for text in surfaces]
        self._inside = np.array(after_space)  # words that begin in the piece behind white space of its own
        self._solid = np.array([text != "" and not text[0].isspace() for text in surfaces])
        self._open = np.array([text == "" or text[-1].isspace() for text in surfaces])

    def count(self, tokens: np.ndarray) -> int:
        """How many words begin in tokens[1:]."""
        return int(self._inside[tokens[1:]].sum() + (self._open[tokens[:-1]] & self._solid[tokens[1:]]).sum())


class TokenFile:
    """Memory-mapped token ids, read in sequences of `length` tokens and the one that follows."""

    def __init__(self, path: Path, dtype: str, length: int, *, drop_last_target: bool = False) -> None:
        """`open_end`: a sequence's last position has no target, but its divergences count, as in Baby Llama's code.

        Raises ValueError where the text is shorter than one sequence.
        """
        self.tokens = np.memmap(path, dtype=dtype, mode="r")
        self.length, self.drop_last_target = length, drop_last_target
        if len(self.tokens) <= length:
            raise UserError(
                f"{path} holds {len(self.tokens):,} tokens, too few for one sequence of train.length={length}: "
                "give more text (or raise data.validation, for a held-out split), or a smaller train.length"
            )
        self.chunks = -(-(len(self.tokens) - 1 - drop_last_target) // length)

    def predicted(self, start: int) -> int:
        """How many targets a sequence from `start` has: one a position, and fewer near the end."""
        return min(self.length, len(self.tokens) - 1 - start) - self.drop_last_target

    def targets(self, start: int, sample: int) -> int:
        """The same; where tokens are masked, how many of the `sample`-th sequence (engine.data.masking)."""
        return self.predicted(start)

    def batch(self, starts: Sequence[int], device: torch.device, samples: Sequence[int] = ()) -> Batch:
        """Inputs [B, L] and targets [B·L] of the sequences at `starts`, whatever their `samples`' numbers.

        A sequence near the end is read from so much earlier that it is whole; what stands before its start is context,
        and not predicted again.
        """
        latest = len(self.tokens) - 1 - self.length
        read = np.stack([self.tokens[min(s, latest) : min(s, latest) + self.length + 1] for s in starts])
        tokens = torch.from_numpy(read.astype(np.int64))
        targets_BL = tokens[:, 1:].clone()
        for row, start in enumerate(starts):
            targets_BL[row, : max(0, start - latest)] = IGNORED
        kl_mask_N = (targets_BL != IGNORED).flatten() if self.drop_last_target else None
        if self.drop_last_target:
            targets_BL[:, -1] = IGNORED
        return Batch(
            to_device(tokens[:, :-1].contiguous(), device),
            to_device(targets_BL.flatten(), device),
            kl_mask_N=None if kl_mask_N is None else to_device(kl_mask_N, device),
        )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, whose copy waits for nothing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def share_of_batch(batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """A rank's sequences of a step, and how many of them it takes at once; ValueError where they do not divide."""
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
        """Raises ValueError where the batch does not divide among ranks, or the text is smaller than one batch."""
        self.share, self.micro_batch = share_of_batch(batch, micro_batch, world_size)
        if file.chunks < batch:
            raise UserError(
                f"the training split holds {file.chunks} sequences of {file.length} tokens, fewer than one batch of "
                f"train.batch={batch}: give more text, or a smaller train.batch or train.length"
            )
        self.file, self.batch, self.seed, self.random_offsets = file, batch, seed, random_offsets
        self.word_starts, self.rank, self.device = word_starts, rank, device

    def chunk_of(self, sample: int) -> int:
        """Which chunk of the file the `sample`-th sequence of the endless row of epochs is."""
        epoch, place = divmod(sample, self.file.chunks)
        return int(_permutation(self.seed, epoch, self.file.chunks)[place])

    def start_of(self, sample: int) -> int:
        """Where, in tokens, that sequence begins."""
        chunk = self.chunk_of(sample)
        start = chunk * self.file.length
        if self.random_offsets:
            offsets = np.random.default_rng([self.seed, _OFFSET, sample // self.file.chunks, chunk])
            start += int(offsets.integers(self.file.predicted(start)))
        return start

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """The steps numbered `first` to `last`, both included, from 1."""
        for number in range(first, last + 1):
            first_sample = (number - 1) * self.batch
            samples = range(first_sample, first_sample + self.batch)
            starts = list(map(self.start_of, samples))
            mine = range(first_sample + self.rank * self.share, first_sample + (self.rank + 1) * self.share)
            yield Step(
                number=number,
                epoch=number * self.batch / self.file.chunks,
                valid_tokens=max(1, sum(map(self.file.targets, starts, samples))),  # losses are divided by it
                tokens=sum(map(self.file.predicted, starts)),
                words=0 if self.word_starts is None else sum(map(self._words, starts)),
                micro_batches=[
                    self._batch(mine[i : i + self.micro_batch], starts, first_sample)
                    for i in range(0, self.share, self.micro_batch)
                ],
            )

    def _batch(self, samples: range, starts: Sequence[int], first_sample: int) -> Batch:
        batch = self.file.batch([starts[sample - first_sample] for sample in samples], self.device, samples)
        return replace(
            batch,
            samples_B=to_device(torch.tensor(samples), self.device),
            chunks=tuple(self.chunk_of(sample) for sample in samples),
        )

    def _words(self, start: int) -> int:
        assert self.word_starts is not None
        return self.word_starts.count(self.file.tokens[start : start + self.file.predicted(start) + 1])


class HeldOutData:
    """Chunks of the held-out split, evenly spread over it, in batches that divide evenly among the ranks."""

    def __init__(
        self, file: TokenFile, *, tokens: int, batch: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        """About `tokens` tokens, or all there are."""
        self.file, self.batch, self.device = file, batch, device
        used = min(file.chunks, max(1, tokens // file.length))
        self.rounds = -(-used // (batch * world_size))
        self.mine = [place * file.chunks // used for place in range(rank, used, world_size)]

    def batches(self) -> Iterator[Batch]:
        """As many batches on every rank: where one has no sequences left it gets some that count for nothing."""
        for turn in range(self.rounds):
            chunks = self.mine[turn * self.batch : (turn + 1) * self.batch]
            read = chunks or [0]
            batch = self.file.batch([chunk * self.file.length for chunk in read], self.device, read)
            if not chunks:
                batch.targets_N.fill_(IGNORED)
            yield batch


@lru_cache(maxsize=2)  # a step may touch two epochs
def _permutation(seed: int, epoch: int, chunks: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(chunks)
