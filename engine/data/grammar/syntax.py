"""Child-directed English as a probabilistic context-free grammar: the rules and their weights.

A scene begins with a line that says what it is about. Turns follow (statements, questions with or without their
answers, orders, exclamations), one sentence a line; after each turn the scene ends with a fixed probability. Words of
the scene's topic are likelier until its end, so distant context helps to predict.

The grammar is unambiguous: no text has two derivations. These restrictions keep it so. A noun takes one modifier at
most. `in`, `on` and `under` modify clauses, the other prepositions nouns. `it` as a subject is never alive. Objects are
not coordinated. No verb's past looks like its base. Words that can stand in one place are of one class. The lines of
an answered question are not also two turns. The expected size of a scene is finite: recursion, such as a noun phrase
in a relative clause in a noun phrase, dies out.

rules.yaml holds the rules that are plain tables; this file makes those that vary with a feature. Symbols are
`Name.feature.feature` and begin with a capital (`I` is a word); `/` ends a line. The features, and the letters that
stand for them in the code:
  c  noun class       animal (it), m (he), f (she), anim: any of the three; thing, wear, food
  n  number           sg, pl
  a  agreement        with a verb's subject: 1 (I), 3 (he, the dog), pl (we, you, they, the dogs)
  t  tense            now, then
A verb's form is base, s, past or ing.
"""

from functools import cache
from itertools import product
from typing import Any, TypeAlias

from engine.data.grammar import lexicon
from engine.data.grammar.lexicon import TOPICS, noun, read_table, verb

Weights: TypeAlias = dict[str, float]  # Relative weights of words, or of a symbol's expansions.
Rules: TypeAlias = dict[str, Weights]  # Symbol -> expansion (symbols and words separated by spaces) -> weight.

RULES: dict[str, Any] = read_table("rules.yaml")
START = "Scene"
TOPIC_BOOST = 12.0  # A word is so many times likelier in scenes of its topic.
MORE_TURNS = 0.9  # The probability of another turn: a scene has 10 on average.
AGREEMENTS = ("1", "3", "pl")
NOUN_CLASSES = ("animal", "m", "f", "thing", "wear", "food")
NUMBERS = {"sg": "3", "pl": "pl"}  # The agreement of a noun phrase of each number.
# Verb forms by tense and agreement.
FORM = {"now": {"1": "base", "3": "s", "pl": "base"}, "then": {"1": "past", "3": "past", "pl": "past"}}
BE = {"now": {"1": "am", "3": "is", "pl": "are"}, "then": {"1": "was", "3": "was", "pl": "were"}}
DO = {"now": {"1": "do", "3": "does", "pl": "do"}, "then": {"1": "did", "3": "did", "pl": "did"}}
CAN = {"now": {"1": "can", "3": "can", "pl": "can"}, "then": {"1": "could", "3": "could", "pl": "could"}}
# A subject and its agreement; the pronoun that a reply uses for it and the pronoun's agreement; its reflexive pronoun;
# its weight in questions.
SUBJECTS = (
    ("I", "1", "you", "pl", "myself", 3),
    ("you", "pl", "I", "1", "yourself", 50),
    ("we", "pl", "we", "pl", "ourselves", 6),
    ("Nom.he", "3", "he", "3", "himself", 18),
    ("Nom.she", "3", "she", "3", "herself", 18),
    ("NP.animal.sg", "3", "it", "3", "itself", 20),
    ("Nom.they", "pl", "they", "pl", "themselves", 18),
)


@cache
def rules(topic: str) -> Rules:
    """Returns the grammar of one topic's scenes.

    All topics have the same rules but for the first line; the weights of their words differ.
    """
    return _words(topic) | _noun_phrases() | _verb_phrases() | _clauses() | _questions() | _turns(topic)


def _words(topic: str) -> Rules:
    """Returns the rules whose expansions are words."""
    topical = set(TOPICS[topic].words.split())

    def weigh(entries: str) -> Weights:
        """Returns weights by rank (Zipf-Mandelbrot), those of the topic's words multiplied by TOPIC_BOOST."""
        return {
            entry.replace("_", " "): (TOPIC_BOOST if entry.partition("/")[0] in topical else 1.0) / (rank + 3)
            for rank, entry in enumerate(entries.split())
        }

    table: Rules = {symbol: weigh(entries) for symbol, entries in lexicon.WORDS.items()}
    for c, entries in lexicon.VERBS.items():
        for form in ("base", "s", "past", "ing"):
            table[f"V.{c}.{form}"] = {getattr(verb(entry), form): w for entry, w in weigh(entries).items()}
    nouns = {c: weigh(entries) for c, entries in lexicon.NOUNS.items()}
    nouns["thing"] = _blend((80, nouns["thing"]), (20, nouns["wear"]))
    for c, n in product(nouns, NUMBERS):
        table[f"N.{c}.{n}"] = {getattr(noun(entry), n): w for entry, w in nouns[c].items()}
    for c in NOUN_CLASSES:
        described = _blend((60, table[f"Adj.{c}"]), (40, table["Adj.size"]))
        table[f"A.{c}"] = _blend(
            (70, {_article(word): w for word, w in table[f"N.{c}.sg"].items()}),
            (30, {_article(f"{word} N.{c}.sg"): w for word, w in described.items()}),
        )
    table["Pred.it"] = _blend((60, table["Pred.thing"]), (40, table["Pred.food"]))
    for auxiliary in ("is", "are", "was", "were", "do", "does", "did", "could"):
        table[f"Not.{auxiliary}"] = {f"{auxiliary} not": 1, f"{auxiliary}n't": 3}
    table["Not.am"], table["Not.can"] = {"am not": 1}, {"cannot": 1, "can't": 3}
    table["Sound"] = {}
    for animal, sound in lexicon.SOUNDS.items():
        weight, singular, plural = nouns["animal"][animal], noun(animal).sg, noun(animal).pl
        table["Sound"][f"what does the {singular} say Ask / the {singular} says {sound} !"] = 3 * weight
        table["Sound"][f"what do the {plural} say Ask / the {plural} say {sound} !"] = weight
    counted = [(noun(entry), w) for entry, w in nouns["animal"].items()]
    table["Count"] = {f"one {x.sg} , two {x.pl} , three {x.pl} !": w for x, w in counted}
    return table


def _blend(*parts: tuple[float, Weights]) -> Weights:
    """Returns a mixture of distributions, each with its share. An expansion of several parts is there once, with the
    sum of its weights, so that no text has two derivations."""
    blend: Weights = {}
    for share, weights in parts:
        total = sum(weights.values())
        for expansion, weight in weights.items():
            blend[expansion] = blend.get(expansion, 0.0) + share * weight / total
    return blend


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _noun_phrases() -> Rules:
    table: Rules = {}
    for c, n in product(NOUN_CLASSES, NUMBERS):
        table[f"NB.{c}.{n}"] = {f"N.{c}.{n}": 74, f"Adj.{c} N.{c}.{n}": 15, f"Adj.size N.{c}.{n}": 9}
        if c not in ("m", "f"):
            table[f"NB.{c}.{n}"] |= {f"Adj.color N.{c}.{n}": 5, f"Adj.size Adj.color N.{c}.{n}": 1}
    # SNP is a noun phrase without a modifier; NP may have one.
    singular: Weights = {"the": 50, "Poss": 18, "this": 7, "that": 7, "every": 2, "one": 2, "another": 2}
    plural: Weights = {"the": 45, "Poss": 18, "Numeral": 12, "these": 9, "those": 9, "some": 8, "all the": 4, "many": 3}
    for c in NOUN_CLASSES:
        table[f"SNP.{c}.sg"] = {f"A.{c}": 20} | {f"{determiner} NB.{c}.sg": w for determiner, w in singular.items()}
        table[f"SNP.{c}.pl"] = {f"{determiner} NB.{c}.pl": w for determiner, w in plural.items()}
    for c, n in product(("animal", "m", "f", "thing", "food"), NUMBERS):
        modifier = f"Mod.{c if c in ('thing', 'food') else 'anim'}.{n}"
        table[f"NP.{c}.{n}"] = {f"SNP.{c}.{n}": 88, f"SNP.{c}.{n} {modifier}": 12}
    for phrase, n in product(("SNP", "NP"), NUMBERS):
        table[f"{phrase}.anim.{n}"] = {f"{phrase}.animal.{n}": 60, f"{phrase}.m.{n}": 18, f"{phrase}.f.{n}": 22}
    table["Beside"] = {"Prep SNP.anim.sg": 40, "Prep SNP.anim.pl": 15, "Prep SNP.thing.sg": 35, "Prep SNP.thing.pl": 10}
    for n, a in NUMBERS.items():
        table[f"Mod.anim.{n}"] = {
            "Beside": 25,
            "with SNP.wear.sg": 12,
            f"that Finite.{a}.now": 25,
            f"that Finite.{a}.then": 10,
            "that Gapped.anim": 28,
        }
        table[f"Mod.thing.{n}"] = {"Beside": 30, f"that Inert.thing.{n}.now": 25, "that Gapped.thing": 45}
        table[f"Mod.food.{n}"] = {f"that Inert.food.{n}.now": 40, "that Gapped.food": 60}

    table |= RULES["noun_phrases"]
    for c, adjective in (("solid", "Adj.food"), ("drink", "Adj.drink")):
        determiners = {"the": 35, "some": 30, "Poss": 25, "this": 5, "more": 5}
        table[f"Mass.{c}"] = {f"{determiner} N.{c}": 4 * w for determiner, w in determiners.items()}
        table[f"Mass.{c}"] |= {f"{determiner} {adjective} N.{c}": w for determiner, w in determiners.items()}
    return table


def _verb_phrases() -> Rules:
    table: Rules = {}
    for form in ("base", "s", "past", "ing"):
        table[f"Act.{form}"] = {
            f"V.alone.{form}": 24,
            f"V.food.{form} Obj.food": 12,
            f"V.drink.{form} Obj.drink": 5,
            f"V.thing.{form} Obj.thing": 16,
            f"V.wear.{form} Obj.wear": 4,
            f"V.body.{form} Obj.body": 5,
            f"V.anim.{form} Obj.anim": 11,
            f"V.give.{form} Recipient Gift": 7,
            f"V.with.{form} with Obj.any": 5,
            f"V.to.{form} to Obj.anim": 4,
            f"V.at.{form} at Obj.any": 7,
        }
        # Gap.c is a verb phrase whose object, of class c, stands elsewhere: what did you eat, the ball that we threw.
        gaps = {"anim": ["anim"], "thing": ["thing"], "food": ["food"], "what": ["food", "drink", "thing", "wear"]}
        for c, verbs in gaps.items():
            table[f"Gap.{c}.{form}"] = {f"V.{v}.{form}": 40 / len(verbs) for v in verbs} | {f"V.with.{form} with": 6}
            if form != "ing":
                table[f"Gap.{c}.{form}"] |= {f"V.want.{form} to V.{v}.base": 15 / len(verbs) for v in verbs}
                table[f"Gap.{c}.{form}"] |= {f"V.any.{form}": 30}
        if form != "ing":
            table[f"VP.{form}"] = {f"Act.{form}": 64, f"V.any.{form} Obj.any": 24, f"V.want.{form} to Act.base": 12}

    for t, a in product(FORM, AGREEMENTS):
        be, do, can, form = BE[t][a], DO[t][a], CAN[t][a], FORM[t][a]
        table[f"Finite.{a}.{t}"] = {
            f"VP.{form}": 38,
            f"{be} Act.ing": 17,
            f"{be} Pred.anim": 11,
            f"Modal.{t} Act.base": 9,
            f"Not.{do} VP.base": 8,
            f"Not.{be} Act.ing": 4,
            f"Not.{be} Pred.anim": 3,
            f"Not.{can} Act.base": 3,
        }
    for t, (n, a), c in product(FORM, NUMBERS.items(), ("thing", "food", "it")):
        be, do, form = BE[t][a], DO[t][a], FORM[t][a]
        table[f"Inert.{c}.{n}.{t}"] = {f"{be} Pred.{c}": 60, f"Not.{be} Pred.{c}": 12}
        if c != "food":
            move = {f"V.inert.{form}": 15, f"{be} V.inert.ing": 10, f"Not.{do} V.inert.base": 4}
            table[f"Inert.{c}.{n}.{t}"] |= move
    for c in ("anim", "thing", "food"):
        table[f"Gapped.{c}"] = {}
        for a, weight in (("1", 20), ("3", 45), ("pl", 35)):
            table[f"Gapped.{c}"] |= {
                f"Plain.{a} Gap.{c}.{FORM['now'][a]}": 0.5 * weight,
                f"Plain.{a} Gap.{c}.past": 0.3 * weight,
                f"Plain.{a} {BE['now'][a]} Gap.{c}.ing": 0.2 * weight,
            }
    return table


def _clauses() -> Rules:
    table: Rules = {"Clause": {}}
    for t, likely in (("now", 60), ("then", 40)):
        table[f"Core.{t}"] = {
            f"Subj.1 Finite.1.{t}": 15,
            f"Subj.3 Finite.3.{t}": 42,
            f"Subj.pl Finite.pl.{t}": 28,
            f"it Inert.it.sg.{t}": 5,
            f"NP.thing.sg Inert.thing.sg.{t}": 5,
            f"NP.thing.pl Inert.thing.pl.{t}": 2,
            f"NP.food.sg Inert.food.sg.{t}": 2,
            f"NP.food.pl Inert.food.pl.{t}": 1,
        }
        for subject, a, _, _, reflexive, weight in SUBJECTS:
            table[f"Core.{t}"][f"{subject} V.self.{FORM[t][a]} {reflexive}"] = 0.03 * weight
        table[f"Adv.{t}"] = {"Place": 45, f"Time.{t}": 25, "Manner": 20, f"Place Time.{t}": 10}
        table["Clause"] |= {
            f"Core.{t}": 0.64 * likely,
            f"Core.{t} Adv.{t}": 0.28 * likely,
            f"Time.{t} Core.{t}": 0.04 * likely,
        }
        table["Clause"] |= {f"Plain.{a} V.think.{form} Core.{t}": 0.04 / 3 * likely for a, form in FORM["now"].items()}
    table |= RULES["clauses"]
    return table


def _questions() -> Rules:
    table: Rules = {"YesNo": {}, "Wh": {}}
    for subject, a, who, b, _, weight in SUBJECTS:
        for auxiliary, t, verb_phrase, share in (
            (DO, "now", "VP.base", 28),
            (DO, "then", "VP.base", 18),
            (BE, "now", "Act.ing", 26),
            (BE, "then", "Act.ing", 8),
            (CAN, "now", "Act.base", 20),
        ):
            asked, answered = auxiliary[t][a], auxiliary[t][b]
            kind = f"{who}.{auxiliary[t]['3']}"
            table[f"Is.{kind}"] = {f"{asked} {subject} {verb_phrase}": 8, f"{asked} {subject} {verb_phrase} Adv.{t}": 2}
            if auxiliary is BE:
                table[f"Is.{kind}"] |= {f"{asked} {subject} Pred.anim": 4}
            table[f"Reply.{kind}"] = {f"yes , {who} {answered}": 65, f"no , {who} Not.{answered}": 35}
            table["YesNo"] |= dict.fromkeys((f"Is.{kind} Ask", f"Is.{kind} ? / Reply.{kind} Dot"), share * weight)
        for t, share in (("now", 0.7), ("then", 0.3)):
            do, be, being = DO[t][a], BE[t][a], BE[t][b]
            table["Wh"][f"Wh.{who}.{t}"] = share * weight
            table[f"Wh.{who}.{t}"] = {
                f"what {do} {subject} Gap.what.base Ask": 16,
                f"what {do} {subject} Gap.what.base Place Ask": 4,
                f"what {be} {subject} Gap.what.ing Ask": 8,
                f"what {be} {subject} doing ? / {who} {being} Act.ing Dot": 14,
                f"who {do} {subject} Gap.anim.base Ask": 7,
                f"who {be} {subject} Gap.anim.ing Ask": 3,
                f"which N.animal.sg {do} {subject} Gap.anim.base Ask": 2,
                f"which N.thing.sg {do} {subject} Gap.thing.base Ask": 3,
                f"how many N.animal.pl {do} {subject} V.any.base ? / Numeral !": 2,
                f"how many N.food.pl {do} {subject} Gap.food.base Ask": 2,
                f"where {do} {subject} V.alone.base Ask": 3,
                f"where {be} {subject} Ask": 7,
                f"where {be} {subject} ? / {who} {being} Place Dot": 12,
                f"why {be} {subject} Act.ing Ask": 3,
                f"why {be} {subject} Act.ing ? / because {who} {being} Pred.anim Dot": 5,
            }
    table["Wh"] |= RULES["questions"]
    table["Wh"] |= {f"who VP.s ? / Plain.{a} {do} Bang": 2 for a, do in DO["now"].items()}
    table["Wh"] |= {f"who is Act.ing ? / Plain.{a} {be} Bang": 2 for a, be in BE["now"].items()}
    return table


def _turns(topic: str) -> Rules:
    return {
        "Scene": {"Opening / Turns": 1},
        "Turns": {"Turn": 1 - MORE_TURNS, "Turn / Turns": MORE_TURNS},
        **RULES["turns"],
        "Fragment": {line: 1 / (rank + 3) for rank, line in enumerate(lexicon.FRAGMENTS)},
        "Opening": dict.fromkeys(TOPICS[topic].openings, 1.0),
    }
