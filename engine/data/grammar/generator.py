"""Text from the grammar in `engine.data.grammar.syntax`: sampled, measured, and tested by minimal pairs.

The grammar is unambiguous, so the probability of a text is that of its one derivation: a sampled document comes with
its exact nats, and the entropy of documents is that of derivations, which is linear algebra.
"""

import math
import random
from bisect import bisect
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from typing import TypeAlias

import numpy as np

from engine.data.grammar import lexicon
from engine.data.grammar.lexicon import TOPICS, noun, verb
from engine.data.grammar.syntax import START, rules


@dataclass(frozen=True)
class Document:
    """A scene. `nats` is −log of its probability: no model of documents can average less."""

    text: str  # one sentence a line
    words: int  # white-space tokens
    nats: float


# What sampling walks: per symbol the cumulative probabilities (all but the last, which is 1), the expansions, reversed
# for a stack, and the nats of each. A word carries the space before it; punctuation carries none.
Table: TypeAlias = tuple[list[float], list[list["Table | str"]], list[float]]


@cache
def _tables(topic: str) -> dict[str, Table]:
    tables: dict[str, Table] = {symbol: ([], [], []) for symbol in rules(topic)}
    spelled = {"/": "\n"} | {mark: mark for mark in ",.?!"}
    for symbol, weights in rules(topic).items():
        cumulative, expansions, nats = tables[symbol]
        total = sum(weights.values())
        cumulative += list(accumulate(weight / total for weight in weights.values()))[:-1]
        for expansion, weight in weights.items():
            expansions.append([tables.get(s) or spelled.get(s, f" {s}") for s in reversed(expansion.split())])
            nats.append(-math.log(weight / total))
    return tables


@cache
def _any_topic() -> Table:
    share = 1 / len(TOPICS)
    scenes: list[list[Table | str]] = [[_tables(topic)[START]] for topic in TOPICS]
    return [share * i for i in range(1, len(TOPICS))], scenes, [-math.log(share)] * len(TOPICS)


def _sample(rng: random.Random, start: Table) -> tuple[str, float]:
    """A string derived from a symbol, with −log of its probability in nats."""
    uniform, written, total = rng.random, [], 0.0
    stack: list[Table | str] = [start]
    while stack:
        symbol = stack.pop()
        if isinstance(symbol, str):
            written.append(symbol)
        else:
            cumulative, expansions, nats = symbol
            choice = bisect(cumulative, uniform())
            total += nats[choice]
            stack += expansions[choice]
    return "".join(written).replace("\n ", "\n").lstrip(), total


def _rng(seed: int) -> random.Random:
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more: Python's generator would take it for {-seed}")
    return random.Random(seed)


def documents(seed: int) -> Iterator[Document]:
    """Scenes without end, independent of one another; the same on every platform for the same seed.

    Raises `ValueError` for a negative seed.
    """
    rng = _rng(seed)
    while True:
        text, nats = _sample(rng, _any_topic())
        yield Document(text, len(text.split()), nats)


def generate(seed: int, words: int) -> Iterator[str]:
    """Documents with `words` words in total or, to end the last one, slightly more; more words extend the same text.

    Raises `ValueError` for a negative seed or less than one word.
    """
    if words < 1:
        raise ValueError(f"words is {words}; expected at least 1")
    for document in documents(seed):
        yield document.text
        words -= document.words
        if words <= 0:
            return


@dataclass(frozen=True)
class Entropy:
    """What the grammar knows of itself: expectations over documents, exact up to rounding."""

    nats_per_document: float
    words_per_document: float
    lines_per_document: float

    @property
    def nats_per_word(self) -> float:
        """The least loss, in nats per white-space word, that any model of this text can reach on average.

        The ends of lines and documents are included: they are to be predicted too.
        """
        return self.nats_per_document / self.words_per_document


@cache
def entropy() -> Entropy:
    """The entropy of the generated text.

    With M[A, B] the expected number of symbols B in one expansion of A, a scene holds n = (I − Mᵀ)⁻¹ e_Scene of each
    symbol and its derivation has entropy Σ n_A H(expansion | A) (Grenander 1967; Soule 1974); so has its text, as the
    derivation is the only one. The first line gives the topic away, so topics add their own entropy.
    """
    totals = np.zeros(3)
    for topic in TOPICS:
        grammar = rules(topic)
        index = {symbol: i for i, symbol in enumerate(grammar)}
        children = np.zeros((len(index), len(index)))
        local = np.zeros((len(index), 3))  # per expansion of a symbol: nats, words, ends of lines
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
                    elif s not in ",.?!":
                        local[i, 1] += p
        start = np.eye(len(index))[index[START]]
        totals += np.linalg.solve(np.eye(len(index)) - children.T, start) @ local / len(TOPICS)
    nats, words, line_ends = totals
    return Entropy(float(nats) + math.log(len(TOPICS)), float(words), float(line_ends) + 1)


@dataclass(frozen=True)
class MinimalPair:
    """A line the grammar can write and one that it cannot, a word apart."""

    phenomenon: str
    good: str
    bad: str


# Two words (or a word and none) and two frames: the first word fits the first frame only, the second the second only.
# Each contrast is used both ways equally often, so how common or long the words are tells nothing.
Contrast: TypeAlias = tuple[dict[tuple[str, str], float], str, str]


@cache
def _contrasts() -> dict[str, list[Contrast]]:
    def forms(words: dict[str, str], c: str, a: str, b: str, irregular: bool = False) -> dict[tuple[str, str], float]:
        inflect = noun if words is lexicon.NOUNS else verb
        entries = [entry for entry in words[c].split() if "/" in entry or not irregular]
        return {(getattr(inflect(e), a), getattr(inflect(e), b)): 1 / (rank + 3) for rank, e in enumerate(entries)}

    def verbs(a: str, b: str, first: str, second: str, irregular: bool = False) -> list[Contrast]:
        """Contrasts of forms of verbs with an object; `Obj` in a frame is of the verb's own class."""
        return [
            (
                forms(lexicon.VERBS, c, a, b, irregular),
                first.replace("Obj", f"Obj.{c}"),
                second.replace("Obj", f"Obj.{c}"),
            )
            for c in ("thing", "anim", "food")
        ]

    def nouns(c: str, first: str, second: str, irregular: bool = False) -> Contrast:
        return forms(lexicon.NOUNS, c, "sg", "pl", irregular), first, second

    def words(a: str, b: str, first: str, second: str) -> Contrast:
        return {(a, b): 1.0}, first, second

    def agreement(one: str, many: str) -> list[Contrast]:
        is_are = words("is", "are", f"{one} _ Act.ing .", f"{many} _ Act.ing .")
        return [*verbs("s", "base", f"{one} _ Obj .", f"{many} _ Obj ."), is_are]

    def gap(c: str, first: str) -> Contrast:
        """A verb that needs an object against one that takes none: what did he throw, did he sleep."""
        pairs = product(
            forms(lexicon.VERBS, c, "base", "base").items(), forms(lexicon.VERBS, "alone", "base", "base").items()
        )
        return {(a, b): v * w for ((a, _), v), ((b, _), w) in pairs}, first, "did Plain.3 _ Place ?"

    return {
        "subject_verb_agreement": agreement("Plain.3", "Plain.pl"),
        "agreement_across_preposition": agreement("SNP.anim.sg Prep SNP.anim.pl", "SNP.anim.pl Prep SNP.anim.sg"),
        "agreement_across_subject_relative": agreement(
            "SNP.anim.sg that V.anim.s SNP.anim.pl", "SNP.anim.pl that V.anim.base SNP.anim.sg"
        ),
        "agreement_across_object_relative": agreement(
            "SNP.anim.sg that Plain.pl Gap.anim.base", "SNP.anim.pl that Plain.3 Gap.anim.s"
        ),
        "determiner_noun_agreement": [
            nouns("thing", "Plain.3 V.thing.past this _ Place .", "Plain.3 V.thing.past these _ Place ."),
            nouns(
                "thing", "Plain.3 V.thing.past that Adj.size _ Place .", "Plain.3 V.thing.past those Adj.size _ Place ."
            ),
            words("this", "these", "_ NB.animal.sg VP.past Place .", "_ NB.animal.pl VP.past Place ."),
            words("that", "those", "_ NB.animal.sg VP.past Place .", "_ NB.animal.pl VP.past Place ."),
        ],
        "quantifier_number": [
            nouns("animal", "every _ VP.past Place .", "many _ VP.past Place ."),
            nouns("animal", "one _ VP.past Place .", "Numeral _ VP.past Place ."),
            nouns("thing", "Plain.3 V.any.past another _ Place .", "Plain.3 V.any.past Numeral _ Place ."),
        ],
        "there_agreement": [
            words("is", "are", "there _ A.animal Place .", "there _ Numeral NB.animal.pl Place ."),
            words("is", "are", "_ there A.thing Place ?", "_ there some NB.thing.pl Place ?"),
        ],
        "reflexive_agreement": [
            words("himself", "themselves", "NP.m.sg V.self.past _ Adv.then .", "NP.m.pl V.self.past _ Adv.then ."),
            words(
                "itself", "themselves", "NP.animal.sg V.self.past _ Adv.then .", "NP.animal.pl V.self.past _ Adv.then ."
            ),
            words("himself", "herself", "NP.m.sg V.self.past _ Adv.then .", "NP.f.sg V.self.past _ Adv.then ."),
        ],
        "pronoun_case": [
            words(a, b, "_ V.thing.past Obj.thing Place .", "Plain.3 V.anim.past _ Place .")
            for a, b in (("I", "me"), ("he", "him"), ("she", "her"), ("we", "us"), ("they", "them"))
        ],
        "question_auxiliary": [
            words("does", "do", "_ Plain.3 VP.base ?", "_ Plain.pl VP.base ?"),
            words("is", "are", "_ Plain.3 Act.ing ?", "_ Plain.pl Act.ing ?"),
            words("does", "do", "what _ Plain.3 Gap.what.base ?", "what _ Plain.pl Gap.what.base ?"),
        ],
        "question_verb_form": [
            *verbs("base", "s", "does Plain.3 _ Obj ?", "who _ Obj ?"),
            *verbs("base", "past", "did Plain.3 _ Obj ?", "who _ Obj ?"),
        ],
        "negation": [
            *verbs("base", "ing", "Plain.3 Not.does _ Obj .", "Plain.3 Not.is _ Obj ."),
            words("doesn't", "don't", "Plain.3 _ VP.base .", "Plain.pl _ VP.base ."),
        ],
        "wh_gap": [
            gap("thing", "what did Plain.3 _ Place ?"),
            gap("food", "what did Plain.3 _ Place ?"),
            gap("anim", "who did Plain.3 _ ?"),
        ],
        "filled_gap": [
            words("", "it", "what did Plain.3 V.thing.base _ Place ?", "did Plain.3 V.thing.base _ Place ?"),
            words("", "them", "who did Plain.3 V.anim.base _ ?", "did Plain.3 V.anim.base _ ?"),
        ],
        "tense": verbs("s", "past", "every day Plain.3 _ Obj .", "yesterday Plain.3 _ Obj ."),
        "irregular_forms": [
            *verbs("past", "base", "Plain.3 _ Obj Time.then .", "did Plain.3 _ Obj ?", irregular=True),
            nouns("animal", "one _ VP.past Place .", "Numeral _ VP.past Place .", irregular=True),
            nouns("f", "this _ VP.past Place .", "these _ VP.past Place .", irregular=True),
        ],
    }


def minimal_pairs(seed: int, per_phenomenon: int, exclude: Container[str] = frozenset()) -> list[MinimalPair]:
    """`per_phenomenon` distinct pairs for each phenomenon, without any line in `exclude`: the training text's lines.

    Pairs come in twos, one for each word of a contrast. Raises `ValueError` for a negative seed, for no pairs, or where
    `exclude` leaves too few lines.
    """
    if per_phenomenon < 1:
        raise ValueError(f"per_phenomenon is {per_phenomenon}; expected at least 1 pair")
    rng = _rng(seed)
    found: list[MinimalPair] = []
    for phenomenon, contrasts in _contrasts().items():
        pairs: dict[MinimalPair, None] = {}
        for attempt in range(100 * per_phenomenon):
            if len(pairs) >= per_phenomenon:
                break
            alternatives, *frames = contrasts[attempt % len(contrasts)]
            words = rng.choices(list(alternatives), list(alternatives.values()))[0]
            tables = _tables(rng.choices(list(TOPICS))[0])
            couple = []
            for frame, good, bad in zip(frames, words, reversed(words), strict=True):
                *symbols, mark = frame.split()
                filled = [_sample(rng, tables[s])[0] if s in tables else s for s in symbols]
                lines = (" ".join(filter(None, (w if s == "_" else s for s in filled))) + mark for w in (good, bad))
                couple.append(MinimalPair(phenomenon, *lines))
            if not any(p in pairs or p.good in exclude or p.bad in exclude for p in couple):
                pairs.update(dict.fromkeys(couple))
        if len(pairs) < per_phenomenon:
            raise ValueError(
                f"found {len(pairs)} pairs for {phenomenon} outside the training text, expected {per_phenomenon}; "
                "ask for fewer pairs or train on less text"
            )
        found += list(pairs)[:per_phenomenon]
    return found
