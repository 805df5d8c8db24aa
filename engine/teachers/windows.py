"""How a teacher reads the training text: in the student's own fixed chunks, or in windows of its own.

The states of a window that are used form a block, and a teacher's blocks have consecutive numbers.

    chunk     Window i is the i-th fixed chunk of L tokens. Its block holds all L states.
    stream    Windows have W tokens and begin every W/2 tokens. Block i holds the states of the tokens i·W/2 to
              (i+1)·W/2 − 1. They come from the second half of the window that begins W/2 tokens earlier, so that each
              token has W/2 to W − 1 tokens before it. Only block 0 comes from a first half.

With `stream` every token of the text has one state, wherever a student cuts its sequences.

L positions, W tokens of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.batches import TokenFile

TOKENS_AT_ONCE = 2048  # of the windows that a model reads at once, where it reads windows of its own


@dataclass(frozen=True)
class Piece:
    """A part of a block: the states from `start` to `stop` − 1 of block number `block`."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Windows:
    """The windows in which one teacher reads a token file."""

    file: TokenFile
    length: int  # W, or L with `chunk`
    stream: bool

    @property
    def block_length(self) -> int:
        """The states in a block."""
        return self.length // 2 if self.stream else self.length

    @property
    def blocks(self) -> int:
        """The number of blocks that hold a state for every token that a student reads."""
        return -(-(len(self.file.tokens) - 1) // self.block_length) if self.stream else self.file.chunks

    @property
    def at_once(self) -> int:
        """The windows that a model always reads at once, so that no state depends on what else is read with it.

        Matrix products may round differently with another number of rows. The number is a power of two, because the
        last few numbers of a tensor, which fill no vector register, may be rounded differently than those before.
        """
        return 2 ** (max(1, TOKENS_AT_ONCE // self.length).bit_length() - 1)

    def first_kept(self, block: int) -> int:
        """Returns where in its window a block begins."""
        return self.block_length if self.stream and block > 0 else 0

    def read(self, blocks: Sequence[int]) -> np.ndarray:
        """Returns the windows of these blocks, int64 [blocks, W]. A window beyond the file's end is filled with 0,
        which no state before it sees."""
        windows = np.zeros((len(blocks), self.length), np.int64)
        for window, block in zip(windows, blocks, strict=True):
            begin = block * self.block_length - self.first_kept(block)
            tokens = self.file.tokens[begin : begin + self.length]
            window[: len(tokens)] = tokens
        return windows

    def pieces(self, begins: Sequence[int]) -> list[Piece]:
        """Returns where the states of sequences lie that begin at these positions of the file, in order.

        With `chunk` the sequences must be fixed chunks. The last one begins earlier than its number says, so that it is
        whole.
        """
        if not self.stream:
            return [Piece(-(-begin // self.length), 0, self.length) for begin in begins]
        found = []
        for begin in begins:
            end, size = begin + self.file.length, self.block_length
            for block in range(begin // size, -(-end // size)):
                first = block * size
                found.append(Piece(block, max(begin, first) - first, min(end, first + size) - first))
        return found
