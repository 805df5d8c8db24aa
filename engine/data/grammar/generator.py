"""Samples text from the grammar in engine.data.grammar.syntax, and gives its entropy and minimal pairs.

The grammar is unambiguous, so the probability of a text is that of its one derivation.
"""

import math
import random
from bisect import bisect
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from typing import Any, TypeAlias

import numpy as np

from engine.data.grammar.lexicon import NOUNS, TOPICS, VERBS, noun, read_table, verb
from engine.data.grammar.syntax import START, rules
from engine.system.errors import UserError

PUNCTUATION = ",.?!"


# The choice among a symbol's expansions: their cumulative probabilities (without the last, which is 1), the expansions
# themselves, reversed for a stack, and the nats of each. A word carries the space before it; punctuation carries none.
Choice: TypeAlias = tuple[list[float], list[list["Choice | str"]], list[float]]


@cache
def _choices(topic: str) -> dict[str, Choice]:
    choices: dict[str, Choice] = {symbol: ([], [], []) for symbol in rules(topic)}
    spelled = {"/": "\n"} | {mark: mark for mark in PUNCTUATION}
    for symbol, weights in rules(topic).items():
        cumulative, expansions, nats = choices[symbol]
        total = sum(weights.values())
        cumulative += list(accumulate(weight / total for weight in weights.values()))[:-1]
        for expansion, weight in weights.items():
            expansions.append([choices.get(s) or spelled.get(s, f" {s}") for s in reversed(expansion.split())])
            nats.append(-math.log(weight / total))
    return choices


def _sample(rng: random.Random, start: Choice) -> tuple[str, float]:
    """Returns a string derived from a symbol, with −log of its probability in nats."""
    uniform, strings, total = rng.random, [], 0.0
    stack: list[Choice | str] = [start]
    while stack:
        symbol = stack.pop()
        if isinstance(symbol, str):
            strings.append(symbol)
        else:
            cumulative, expansions, nats = symbol
            drawn = bisect(cumulative, uniform())
            total += nats[drawn]
            stack += expansions[drawn]
    return "".join(strings).replace("\n ", "\n").lstrip(), total


def _rng(seed: int) -> random.Random:
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more: Python's generator would take it for {-seed}")
    return random.Random(seed)


def documents(seed: int) -> Iterator[tuple[str, float]]:
    """Yields scenes without end, one sentence a line, independent of one another, each with −log of its probability.

    No model of documents can average fewer nats. A seed gives the same scenes on every platform. Raises ValueError for
    a negative seed.
    """
    rng = _rng(seed)
    share = 1 / len(TOPICS)
    scenes: list[list[Choice | str]] = [[_choices(topic)[START]] for topic in TOPICS]
    any_topic = [share * i for i in range(1, len(TOPICS))], scenes, [-math.log(share)] * len(TOPICS)
    while True:
        yield _sample(rng, any_topic)


def generate(seed: int, words: int) -> Iterator[str]:
    """Yields documents until they hold `words` words; the last one is whole, so there may be slightly more.

    A larger number of words extends the same text. Raises ValueError for a negative seed or less than one word.
    """
    if words < 1:
        raise ValueError(f"words is {words}; expected at least 1")
    for text, _ in documents(seed):
        yield text
        words -= len(text.split())
        if words <= 0:
            return


@dataclass(frozen=True)
class Entropy:
    """Expectations over the grammar's documents, exact up to rounding."""

    nats_per_document: float
    words_per_document: float
    lines_per_document: float

    @property
    def nats_per_word(self) -> float:
        """The least mean loss that any model can reach, in nats per white-space word; it predicts line ends as well."""
        return self.nats_per_document / self.words_per_document


@cache
def entropy() -> Entropy:
    """Returns the entropy of the generated text (Grenander 1967; Soule 1974).

    With M[A, B] the expected number of symbols B in one expansion of A, a scene holds n = (I − Mᵀ)⁻¹ e_Scene of each
    symbol, and its derivation has entropy Σ n_A H(expansion | A). Its text has the same entropy, as it has one
    derivation only. The first line reveals the topic, so the entropy of the topics is added.
    """
    totals = np.zeros(3)
    for topic in TOPICS:
        grammar = rules(topic)
        index = {symbol: i for i, symbol in enumerate(grammar)}
        children = np.zeros((len(index), len(index)))
        local = np.zeros((len(index), 3))  # Per expansion of a symbol: nats, words, ends of lines.
        for symbol, weights in grammar.items():
            i, total = index[symbol], sum(weights.values())
            for expansion, weight in weights.items():
                p = weight / total
                local[i, 0] -= p * math.log(p)
                for s in expansion.split():
                    if s in index:
                        children[i, index[s]] += p
                    elif s == "/":
                        local[i, 2] += p
                    elif s not in PUNCTUATION:
                        local[i, 1] += p
        start = np.eye(len(index))[index[START]]
        totals += np.linalg.solve(np.eye(len(index)) - children.T, start) @ local / len(TOPICS)
    nats, words, line_ends = totals
    return Entropy(float(nats) + math.log(len(TOPICS)), float(words), float(line_ends) + 1)


@dataclass(frozen=True)
class MinimalPair:
    """A line that the grammar can write and one that it cannot, a word apart."""

    phenomenon: str
    good: str
    bad: str


# Pairs of words with their weights, and two frames: the first word fits the first frame only, the second the second
# only. Each contrast is used both ways equally often, so how common or long the words are reveals nothing.
Contrast: TypeAlias = tuple[dict[tuple[str, str], float], list[str]]


def _contrasts(frames: list[str], irregular: bool = False, **words: Any) -> list[Contrast]:
    """Returns the contrasts that one entry of minimal_pairs.yaml stands for; that file explains its form."""

    def forms(inflect: Callable[[str], dict[str, str]], entries: str, a: str, b: str) -> dict[tuple[str, str], float]:
        inflected = [inflect(entry) for entry in entries.split() if "/" in entry or not irregular]
        return {(word[a], word[b]): 1 / (rank + 3) for rank, word in enumerate(inflected)}

    match words:
        case {"words": [first, second]}:
            return [({(first, second): 1.0}, frames)]
        case {"nouns": noun_class}:
            return [(forms(noun, NOUNS[noun_class], "sg", "pl"), frames)]
        case {"verbs": [first, second]}:
            return [
                (forms(verb, VERBS[c], first, second), [frame.replace("Obj", f"Obj.{c}") for frame in frames])
                for c in ("thing", "anim", "food")
            ]
        case _:
            classes = words["verb_with_object"], "alone"
            with_object, without = (forms(verb, VERBS[c], "base", "base").items() for c in classes)
            return [({(a, b): v * w for ((a, _), v), ((b, _), w) in product(with_object, without)}, frames)]


def minimal_pairs(seed: int, per_phenomenon: int, exclude: Container[str] = frozenset()) -> list[MinimalPair]:
    """Returns `per_phenomenon` distinct pairs for each phenomenon, without any line in `exclude`.

    `exclude` holds the lines of the training text. Pairs come in twos, one for each word of a contrast. Raises
    UserError where `exclude` leaves too few lines, and ValueError for a negative seed or less than one pair.
    """
    if per_phenomenon < 1:
        raise ValueError(f"per_phenomenon is {per_phenomenon}; expected at least 1 pair")
    rng = _rng(seed)
    all_pairs: list[MinimalPair] = []
    for phenomenon, entries in read_table("minimal_pairs.yaml").items():
        contrasts = [contrast for entry in entries for contrast in _contrasts(**entry)]
        pairs: dict[MinimalPair, None] = {}
        for attempt in range(100 * per_phenomenon):
            if len(pairs) >= per_phenomenon:
                break
            couple = _draw_couple(rng, phenomenon, *contrasts[attempt % len(contrasts)])
            if not any(p in pairs or p.good in exclude or p.bad in exclude for p in couple):
                pairs.update(dict.fromkeys(couple))
        if len(pairs) < per_phenomenon:
            raise UserError(
                f"found {len(pairs)} minimal pairs for {phenomenon} that are not lines of the training text, "
                f"expected {per_phenomenon}: train on less text (data.words)"
            )
        all_pairs += list(pairs)[:per_phenomenon]
    return all_pairs


def _draw_couple(
    rng: random.Random, phenomenon: str, alternatives: dict[tuple[str, str], float], frames: list[str]
) -> list[MinimalPair]:
    """Returns two pairs of one contrast: in each, another of its two words is right."""
    words = rng.choices(list(alternatives), list(alternatives.values()))[0]
    choices = _choices(rng.choices(list(TOPICS))[0])
    couple = []
    for frame, good, bad in zip(frames, words, reversed(words), strict=True):
        *symbols, mark = frame.split()
        filled = [_sample(rng, choices[s])[0] if s in choices else s for s in symbols]
        lines = (" ".join(filter(None, (w if s == "_" else s for s in filled))) + mark for w in (good, bad))
        couple.append(MinimalPair(phenomenon, *lines))
    return couple
