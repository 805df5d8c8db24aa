import math
import random
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import islice

import pytest

from engine.data.grammar import generator
from engine.data.grammar.generator import MinimalPair, documents, entropy, generate, minimal_pairs
from engine.data.grammar.lexicon import TOPICS
from engine.data.grammar.syntax import START, Rules, rules
from engine.system.errors import UserError

TOPIC = "farm"  # Topics share their rules, as a test below makes sure.


def tokens(text: str) -> list[str]:
    """Returns the text in the grammar's alphabet: words, punctuation marks, and `/` for the end of a line."""
    return re.sub(r"([,.?!])", r" \1", text.replace("\n", " / ")).split()


class Parser:
    """Gives −log of the probability of a text, over all derivations; only the rules are shared with the sampler."""

    def __init__(self, topic: str) -> None:
        grammar_rules = rules(topic)
        self.rules = {
            symbol: [(tuple(e.split()), w / sum(weights.values())) for e, w in weights.items()]
            for symbol, weights in grammar_rules.items()
        }
        self.first = cache(self._first)

    def _first(self, symbol: str) -> frozenset[str]:
        if symbol not in self.rules:
            return frozenset([symbol])
        return frozenset().union(*(self.first(expansion[0]) for expansion, _ in self.rules[symbol]))

    def nats(self, text: str, start: str) -> float:
        words, scale = tokens(text), 10.0  # A factor per word keeps long texts from underflow.

        @cache
        def inside(symbol: str, begin: int) -> dict[int, float]:
            """Returns the ends of the strings of `symbol` that begin at `begin`, and the probability of each."""
            if begin == len(words) or words[begin] not in self.first(symbol):
                return {}
            if symbol not in self.rules:
                return {begin + 1: scale}
            ends = defaultdict[int, float](float)
            for expansion, p in self.rules[symbol]:
                reached = {begin: p}
                for child in expansion:
                    onward = defaultdict[int, float](float)
                    for at, q in reached.items():
                        for end, inner in inside(child, at).items():
                            onward[end] += q * inner
                    reached = onward
                    if not reached:
                        break
                for end, q in reached.items():
                    ends[end] += q
            return dict(ends)

        total = inside(start, 0).get(len(words))
        return len(words) * math.log(scale) - math.log(total) if total else math.inf


@pytest.fixture(scope="module")
def parser() -> Parser:
    return Parser(TOPIC)


def derive(rng: random.Random, weights: Rules, symbol: str, path: list[tuple[str, str]]) -> tuple[list[str], float]:
    """Returns words and nats of a random derivation of `symbol` whose first steps down are `path`."""
    if symbol not in weights:
        return [symbol], 0.0
    if path:
        (_, expansion), *path = path
    else:
        expansion = rng.choices(list(weights[symbol]), list(weights[symbol].values()))[0]
    words, nats = [], -math.log(weights[symbol][expansion] / sum(weights[symbol].values()))
    for child in expansion.split():
        onward, path = (path, []) if path and path[0][0] == child else ([], path)
        below, more = derive(rng, weights, child, onward)
        words += below
        nats += more
    return words, nats


def paths(weights: Rules, start: str) -> dict[str, list[tuple[str, str]]]:
    """Returns the shortest way down from `start` to each symbol, as (symbol, expansion) steps."""
    shortest: dict[str, list[tuple[str, str]]] = {start: []}
    queue = [start]
    for symbol in queue:
        for expansion in weights[symbol]:
            for child in expansion.split():
                if child in weights and child not in shortest:
                    shortest[child] = [*shortest[symbol], (symbol, expansion)]
                    queue.append(child)
    return shortest


def test_every_rule_is_used_and_no_text_has_two_derivations(parser: Parser) -> None:
    weights, rng = rules(TOPIC), random.Random(0)
    used = paths(weights, START)
    assert all(s.startswith(("V.", "Gap.", "Inert.")) for s in set(weights) - set(used))  # No rule needs these forms.
    assert all(s in weights for x in weights.values() for e in x for s in e.split() if s[0].isupper() and s != "I")
    for symbol, path in used.items():
        for expansion in weights[symbol]:
            words, nats = derive(rng, weights, START, [*path, (symbol, expansion)])
            assert parser.nats(" ".join(words), START) == pytest.approx(nats, abs=1e-9), " ".join(words)


def test_sampled_documents_carry_their_own_nats() -> None:
    topic_of = {line: topic for topic in TOPICS for line in openings(topic)}
    parsers = {topic: Parser(topic) for topic in TOPICS}
    for text, nats in islice(documents(1), 200):
        topic = topic_of[text.partition("\n")[0]]
        parsed = parsers[topic].nats(text, START) + math.log(len(TOPICS))
        assert parsed == pytest.approx(nats, abs=1e-9), text


def openings(topic: str) -> set[str]:
    """Returns all first lines of a topic."""
    names = list(rules(topic)["Vocative"])
    lines = set()
    for line in TOPICS[topic]["openings"]:
        for end in ["!", *(f", {name} !" for name in names)]:
            lines.add(re.sub(r" ([,.?!])", r"\1", line.replace("Bang", end).replace(" ,", ",")))
    return lines


def test_first_line_names_the_topic_and_topics_share_all_other_rules() -> None:
    lines = [line for topic in TOPICS for line in openings(topic)]
    assert len(lines) == len(set(lines))
    words = {w for weights in rules(TOPIC).values() for expansion in weights for w in expansion.split()}
    assert set(" ".join(topic["words"] for topic in TOPICS.values()).split()) <= words
    for topic in TOPICS:
        assert [(s, set(w)) for s, w in rules(topic).items() if s != "Opening"] == [
            (s, set(w)) for s, w in rules(TOPIC).items() if s != "Opening"
        ]


def test_entropy_agrees_with_sampled_text() -> None:
    sample = list(islice(documents(2), 4000))  # They have 50,000 lines.
    exact = entropy()
    words = [len(text.split()) for text, _ in sample]
    excess = [nats - exact.nats_per_word * n for (_, nats), n in zip(sample, words, strict=True)]  # Its mean is 0.
    for values, mean, resolution in (
        ([nats for _, nats in sample], exact.nats_per_document, 3.0),
        (words, exact.words_per_document, 1.0),
        ([text.count("\n") + 1 for text, _ in sample], exact.lines_per_document, 0.2),
        (excess, 0.0, 0.4),
    ):
        average = sum(values) / len(values)
        error = math.sqrt(sum((v - average) ** 2 for v in values)) / len(values)
        assert abs(average - mean) < 3 * error
        assert error < resolution


def test_entropy_of_grammars_that_can_be_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar writes lines of one word, one of two, until a coin says stop: 2 lines on average, each with ln 2 nats
    for the word and ln 2 for the coin. The words reveal the topic."""
    words = dict(zip(TOPICS, "abcdefghijklm", strict=False))
    monkeypatch.setattr(
        generator,
        "rules",
        lambda topic: {START: {"W ?": 1, f"W / {START}": 1}, "W": {words[topic]: 1, words[topic] * 2: 1}},
    )
    exact = entropy.__wrapped__()
    assert exact.nats_per_document == pytest.approx(4 * math.log(2) + math.log(len(TOPICS)))
    assert exact.words_per_document == pytest.approx(2)
    assert exact.lines_per_document == pytest.approx(2)


def test_text_depends_on_the_seed_alone_and_more_words_extend_it() -> None:
    short, long = list(generate(5, 500)), list(generate(5, 5000))
    assert long[: len(short)] == short
    assert sum(len(d.split()) for d in short) >= 500 > sum(len(d.split()) for d in short[:-1])
    assert list(generate(6, 500)) != short
    assert next(generate(0, 1)).splitlines()[:3] == [
        "today we are at the zoo!",
        "where is she?",
        "she is on the bed, honey.",
    ]
    for seed, words in ((-1, 10), (0, 0)):
        with pytest.raises(ValueError, match="expected"):
            next(generate(seed, words))


@pytest.fixture(scope="module")
def pairs() -> list[MinimalPair]:
    return minimal_pairs(seed=0, per_phenomenon=60)


def test_good_lines_are_in_the_grammar_and_bad_lines_are_not(parser: Parser, pairs: list[MinimalPair]) -> None:
    for pair in pairs:
        assert parser.nats(pair.good, "Turn") < math.inf, pair
        assert parser.nats(pair.bad, "Turn") == math.inf, pair


def test_pairs_differ_in_a_word_and_word_frequency_tells_nothing(pairs: list[MinimalPair]) -> None:
    frequency = Counter(w for document in generate(0, 200_000) for w in tokens(document))
    score: dict[str, list[float]] = {}
    for pair in pairs:
        good, bad = Counter(tokens(pair.good)), Counter(tokens(pair.bad))
        assert 1 <= len(good - bad) + len(bad - good) <= 2
        margin = sum((good[w] - bad[w]) * math.log((frequency[w] + 1) / frequency.total()) for w in good | bad)
        score.setdefault(pair.phenomenon, []).append(0.5 * (1 + (margin > 0) - (margin < 0)))
    assert len(score) >= 8
    for phenomenon, values in score.items():
        assert len(values) == 60
        assert 0.45 <= sum(values) / 60 <= 0.55, phenomenon


def test_pairs_are_distinct_and_keep_out_of_the_training_text(pairs: list[MinimalPair]) -> None:
    assert len(set(pairs)) == len(pairs)
    assert minimal_pairs(0, 60) == pairs
    assert minimal_pairs(1, 60) != pairs
    taken = {pair.good for pair in pairs[::2]} | {pair.bad for pair in pairs[1::2]}
    assert not any(p.good in taken or p.bad in taken for p in minimal_pairs(0, 60, exclude=taken))

    class Everything:
        def __contains__(self, line: object) -> bool:
            return True

    with pytest.raises(UserError, match=r"found 0 minimal pairs for subject_verb_agreement .*, expected 1: .*words"):
        minimal_pairs(0, 1, exclude=Everything())
    for seed, count in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="expected"):
            minimal_pairs(seed, count)
