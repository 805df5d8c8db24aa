"""Decides by chance which text is trained on and which is held out, a document or a part of a long one at a time."""

import hashlib
import math
import re
from typing import NamedTuple

from engine.system.errors import UserError

BLOCK_WORDS = 2000  # Longer documents are held out, or left out, in parts of about this size.


class Block(NamedTuple):
    """A document, or consecutive lines of a long one."""

    document: int  # The document's number in the file.
    text: str
    words: int


class Document(NamedTuple):
    """Text that goes into one split in one piece."""

    file: int  # The file's number in the source.
    text: str
    words: int


class Splits(NamedTuple):
    """What is trained on, and what is held out."""

    train: list[Document]
    validation: list[Document]


def split(texts: dict[str, str], *, validation: float, seed: int, words: int | None) -> Splits:
    """Cuts files, given by name, into documents at blank lines, and draws which of them each split gets.

    `words` words are used in all (None means all there are), and the share `validation` of them is held out. Every file
    contributes to both in proportion, and a file of two lines or more is in both splits. The draw depends on the seed,
    the file's name and the position in it. Where a part of a document is left out, what follows it is a document of its
    own. Raises UserError where a split would be empty.
    """
    total = sum(len(text.split()) for text in texts.values())
    splits = Splits([], [])
    for file, (name, text) in enumerate(texts.items()):
        budget = len(text.split())
        if words is not None and words < total:
            budget = budget * words // total
        blocks = cut(text, limit=min(BLOCK_WORDS, max(1, math.floor(budget * validation))))
        used = _draw(blocks, set(range(len(blocks))), f"{seed}/words/{name}", budget)
        target = validation * sum(blocks[b].words for b in used)
        held_out = _draw(blocks, used, f"{seed}/validation/{name}", target, overshoot=0.5)
        if not held_out and len(used) > 1:
            held_out = {min(used, key=lambda b: blocks[b].words)}
        splits.train.extend(_joined(file, blocks, used - held_out))
        splits.validation.extend(_joined(file, blocks, held_out))
    if not all(splits):
        limited = "" if words is None else f" and data.words={words:,}"
        raise UserError(
            f"the text ({total:,} words{limited}) has too few lines to hold data.validation={validation} out; give more"
        )
    return splits


def cut(text: str, limit: int) -> list[Block]:
    """Returns a file's documents; those of more than `limit` words in even parts, cut at the ends of lines."""
    blocks: list[Block] = []
    documents = (document.strip("\n") for document in re.split(r"\n[^\S\n]*\n", text) if document.strip())
    for number, document in enumerate(documents):
        total = len(document.split())
        size = math.ceil(total / math.ceil(total / limit))
        part: list[str] = []
        words = 0
        for line in document.split("\n"):
            n = len(line.split())
            if part and words + n > size:
                blocks.append(Block(number, "\n".join(part), words))
                part, words = [], 0
            part.append(line)
            words += n
        blocks.append(Block(number, "\n".join(part), words))
    return blocks


def _draw(blocks: list[Block], among: set[int], key: str, budget: float, overshoot: float = 0.0) -> set[int]:
    """Returns as many of the blocks numbered in `among` as fit into `budget` words, in an order that `key` decides.

    A block fits where it exceeds the budget by at most the share `overshoot` of its own words: with a half, the sum
    comes closest to the budget.
    """
    drawn: set[int] = set()
    for b in sorted(among, key=lambda b: hashlib.sha256(f"{key}/{b}".encode()).digest()):
        if (1 - overshoot) * blocks[b].words <= budget:
            drawn.add(b)
            budget -= blocks[b].words
    return drawn


def _joined(file: int, blocks: list[Block], chosen: set[int]) -> list[Document]:
    """Returns the chosen blocks as documents, in their order; neighbours of one document are joined again."""
    runs: list[list[Block]] = []
    for b in sorted(chosen):
        if b - 1 in chosen and blocks[b - 1].document == blocks[b].document:
            runs[-1].append(blocks[b])
        else:
            runs.append([blocks[b]])
    return [Document(file, "\n".join(b.text for b in run), sum(b.words for b in run)) for run in runs]
