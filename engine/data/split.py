"""Which text is trained on and which is held out, drawn by block: a document, or a part of a long one."""

import hashlib
import math
import re
from typing import NamedTuple

from engine.system.errors import UserError

BLOCK_WORDS = 2000  # longer documents are held out, or left out, in parts of about this size


class Block(NamedTuple):
    """A document, or consecutive lines of a long one."""

    document: int  # its number in the file
    text: str
    words: int


class Document(NamedTuple):
    """Text that goes into one split in one piece; `file` is its number among the source's."""

    file: int
    text: str
    words: int


class Splits(NamedTuple):
    train: list[Document]
    validation: list[Document]


def split(texts: dict[str, str], *, validation: float, seed: int, words: int | None) -> Splits:
    """Cut files, by name, into documents at blank lines; draw `words` in all (None: all), hold out a share of those.

    Each file gives its share of both. The draw depends on the seed, the file's name and the place in it. Where a part
    of a document is not there, what follows it is a document of its own. A file of two lines or more is in both splits.
    Raises ValueError where a split would be empty.
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
    """A file's documents; those of more than `limit` words in even parts, cut at the ends of lines."""
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
    """Blocks in an order that `key` decides, as many as fit into `budget` words.

    A block fits when it goes over by `overshoot` of its own words at most: with a half, the sum comes closest.
    """
    drawn: set[int] = set()
    for b in sorted(among, key=lambda b: hashlib.sha256(f"{key}/{b}".encode()).digest()):
        if (1 - overshoot) * blocks[b].words <= budget:
            drawn.add(b)
            budget -= blocks[b].words
    return drawn


def _joined(file: int, blocks: list[Block], chosen: set[int]) -> list[Document]:
    """The chosen blocks in their order, neighbours of one document joined again."""
    runs: list[list[Block]] = []
    for b in sorted(chosen):
        if b - 1 in chosen and blocks[b - 1].document == blocks[b].document:
            runs[-1].append(blocks[b])
        else:
            runs.append([blocks[b]])
    return [Document(file, "\n".join(b.text for b in run), sum(b.words for b in run)) for run in runs]
