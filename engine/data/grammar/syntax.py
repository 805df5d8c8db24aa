"""Child-directed English as a probabilistic context-free grammar: the rules and their weights.

A scene begins with a line that says what it is about. Turns follow (statements, questions with or without their
answers, orders, exclamations), one sentence a line; after each turn the scene ends with a fixed probability. Words of
the scene's topic are likelier until its end, so distant context helps to predict.

The grammar is unambiguous: no text has two derivations. These restrictions keep it so. A noun takes one modifier at
most. `in`, `on` and `under` modify clauses, the other prepositions nouns. `it` as a subject is never alive. Objects are
not coordinated. No verb's past looks like its base. Words that can stand in one place are of one class. The lines of
an answered question are not also two turns. The expected size of a scene is finite: recursion, such as a noun phrase
in a relative clause in a noun phrase, dies out.

rules.yaml holds the rules as templates, and this file fills in the features that they vary with. Symbols are
`Name.feature.feature` and begin with a capital (`I` is a word); `/` ends a line. The features, and the letters that
stand for them:
  c  noun class       animal (it), m (he), f (she), anim: any of the three; thing, wear, food
  n  number           sg, pl
  a  agreement        with a verb's subject: 1 (I), 3 (he, the dog), pl (we, you, they, the dogs)
  t  tense            now, then
A verb's form is base, s, past or ing.
"""

from functools import cache
from itertools import product
from typing import Any, TypeAlias

from engine.data.grammar.lexicon import FRAGMENTS, NOUNS, SOUNDS, TOPICS, VERBS, WORDS, noun, read_table, verb

Weights: TypeAlias = dict[str, float]  # Relative weights of words, or of a symbol's expansions.
Rules: TypeAlias = dict[str, Weights]  # Symbol -> expansion (symbols and words separated by spaces) -> weight.

TEMPLATES: dict[str, Any] = read_table("rules.yaml")
START = "Scene"
TOPIC_BOOST = 12.0  # A word is so many times likelier in scenes of its topic.
MORE_TURNS = 0.9  # The probability of another turn: a scene has 10 on average.
NOUN_CLASSES = ("animal", "m", "f", "thing", "wear", "food")
NUMBERS = {"sg": "3", "pl": "pl"}  # The agreement of a noun phrase of each number.
FORMS = ("base", "s", "past", "ing")
AGREEMENT: dict[str, dict[str, dict[str, str]]] = TEMPLATES["agreement"]  # [t][a]: a verb's form and the auxiliaries.


@cache
def rules(topic: str) -> Rules:
    """Returns the grammar of one topic's scenes.

    All topics have the same rules but for the first line; the weights of their words differ.
    """
    table = _words(topic)
    _add_noun_phrases(table)
    _add_verb_phrases(table)
    _add_clauses(table)
    _add_questions(table)
    return table | {
        START: {"Opening / Turns": 1},
        "Turns": {"Turn": 1 - MORE_TURNS, "Turn / Turns": MORE_TURNS},
        **TEMPLATES["turns"],
        "Fragment": {line: 1 / (rank + 3) for rank, line in enumerate(FRAGMENTS)},
        "Opening": dict.fromkeys(TOPICS[topic]["openings"], 1.0),
    }


def _add(table: Rules, section: str, factor: float = 1, /, **features: str) -> None:
    """Adds a section of rules.yaml to the rules, with its features filled in and its weights multiplied by `factor`."""
    for symbol, expansions in TEMPLATES[section].items():
        weights = table.setdefault(symbol.format_map(features), {})
        weights |= {expansion.format_map(features): factor * weight for expansion, weight in expansions.items()}


def _words(topic: str) -> Rules:
    """Returns the rules whose expansions are words."""
    topical = set(TOPICS[topic]["words"].split())

    def weigh(entries: str) -> Weights:
        """Returns weights by rank (Zipf-Mandelbrot), those of the topic's words multiplied by TOPIC_BOOST."""
        return {
            entry.replace("_", " "): (TOPIC_BOOST if entry.partition("/")[0] in topical else 1.0) / (rank + 3)
            for rank, entry in enumerate(entries.split())
        }

    table: Rules = {symbol: weigh(entries) for symbol, entries in WORDS.items()}
    for c, entries in VERBS.items():
        for form in FORMS:
            table[f"V.{c}.{form}"] = {verb(entry)[form]: w for entry, w in weigh(entries).items()}
    nouns = {c: weigh(entries) for c, entries in NOUNS.items()}
    nouns["thing"] = _blend((80, nouns["thing"]), (20, nouns["wear"]))
    for c, n in product(nouns, NUMBERS):
        table[f"N.{c}.{n}"] = {noun(entry)[n]: w for entry, w in nouns[c].items()}
    for c in NOUN_CLASSES:
        described = _blend((60, table[f"Adj.{c}"]), (40, table["Adj.size"]))
        table[f"A.{c}"] = _blend(
            (70, {_article(word): w for word, w in table[f"N.{c}.sg"].items()}),
            (30, {_article(f"{word} N.{c}.sg"): w for word, w in described.items()}),
        )
    table["Pred.it"] = _blend((60, table["Pred.thing"]), (40, table["Pred.food"]))
    _add(table, "negations")
    for animal, sound in SOUNDS.items():
        _add(table, "sounds", nouns["animal"][animal], sound=sound, **noun(animal))
    for animal, weight in nouns["animal"].items():
        _add(table, "counting", weight, **noun(animal))
    return table


def _blend(*parts: tuple[float, Weights]) -> Weights:
    """Returns a mixture of distributions; what several of them have is there once, so no text has two derivations."""
    blend: Weights = {}
    for share, weights in parts:
        total = sum(weights.values())
        for expansion, weight in weights.items():
            blend[expansion] = blend.get(expansion, 0.0) + share * weight / total
    return blend


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _add_noun_phrases(table: Rules) -> None:
    for c, n in product(NOUN_CLASSES, NUMBERS):
        _add(table, "described_noun", c=c, n=n)
        if c not in ("m", "f"):
            _add(table, "coloured_noun", c=c, n=n)
    for c in NOUN_CLASSES:
        _add(table, "simple_noun_phrase", c=c)
    for c, n in product(("animal", "m", "f", "thing", "food"), NUMBERS):
        _add(table, "noun_phrase", c=c, n=n, modified=c if c in ("thing", "food") else "anim")
    _add(table, "any_living")
    for n, a in NUMBERS.items():
        _add(table, "modifiers", n=n, a=a)
    _add(table, "names_and_roles")
    for c, adjective in (("solid", "food"), ("drink", "drink")):
        _add(table, "mass", c=c, adjective=adjective)


def _add_verb_phrases(table: Rules) -> None:
    for form in FORMS:
        _add(table, "verb_phrases", form=form)
        if form != "ing":
            _add(table, "states", form=form)
    for t, agreement in AGREEMENT.items():
        for a, verbs in agreement.items():
            _add(table, "finite", t=t, a=a, **verbs)
    for t, (n, a), c in product(AGREEMENT, NUMBERS.items(), ("thing", "food", "it")):
        features = {"t": t, "n": n, "c": c, **AGREEMENT[t][a]}
        _add(table, "inert", **features)
        if c != "food":
            _add(table, "inert_moves", **features)
    for c, (a, weight) in product(("anim", "thing", "food"), (("1", 20), ("3", 45), ("pl", 35))):
        _add(table, "gapped", weight, c=c, a=a, **AGREEMENT["now"][a])


def _add_clauses(table: Rules) -> None:
    for t, weight in (("now", 60), ("then", 40)):
        _add(table, "clause", weight, t=t)
        _add(table, "clause_parts", t=t)
        for subject in TEMPLATES["subjects"]:
            _add(table, "reflexive", subject["weight"], t=t, **subject, **AGREEMENT[t][subject["a"]])
    _add(table, "place")


def _add_questions(table: Rules) -> None:
    table |= {"YesNo": {}, "Wh": {}}  # These stand first in the order of the symbols.
    for subject in TEMPLATES["subjects"]:
        for question in TEMPLATES["yes_no_questions"]:
            agreement, auxiliary = AGREEMENT[question["t"]], question["auxiliary"]
            features = {
                **subject,
                **question,
                "kind": f"{subject['pronoun']}.{agreement['3'][auxiliary]}",
                "asked": agreement[subject["a"]][auxiliary],
                "answered": agreement[subject["pronoun_a"]][auxiliary],
            }
            _add(table, "yes_no", **features)
            if auxiliary == "be":
                _add(table, "yes_no_with_be", **features)
            _add(table, "yes_no_turn", question["weight"] * subject["weight"], **features)
        _add(table, "wh_turn", subject["weight"], **subject)
        for t, agreement in AGREEMENT.items():
            pronoun_be = agreement[subject["pronoun_a"]]["be"]
            _add(table, "wh", t=t, pronoun_be=pronoun_be, **subject, **agreement[subject["a"]])
    _add(table, "other_wh_turns")
