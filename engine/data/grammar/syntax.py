"""Child-directed English as a probabilistic context-free grammar: the rules and their weights.

A scene is a first line that says what it is about, then turns (statements, questions with or without their answers,
orders, exclamations), one sentence a line, until a coin says stop. The topic of the scene makes its words likelier
until the end, so far context helps to predict.

The grammar is unambiguous: no text has two derivations. What keeps it so: a noun takes one modifier at most; `in`,
`on` and `under` modify clauses and the other prepositions nouns; `it` as a subject is never alive; objects are not
coordinated; no verb's past looks like its base; words that can stand in one place are of one class; the lines of an
answered question are not also two turns. Recursion (a noun phrase in a relative clause in a noun phrase) dies out.

Symbols are `Name.feature.feature` and begin with a capital (`I` is a word); `/` ends a line. Their features:
  noun classes   animal (it), m (he), f (she), anim: any of the three; thing, wear, food
  numbers        sg, pl; of a verb's subject: 1 (I), 3 (he, the dog), pl (we, you, they, the dogs)
  verb forms     base, s, past, ing; a clause's tense: now, then
"""

from functools import cache
from itertools import product
from typing import TypeAlias

from engine.data.grammar import lexicon
from engine.data.grammar.lexicon import TOPICS, noun, verb

Weights: TypeAlias = dict[str, float]  # relative weights of words, or of a symbol's expansions
Rules: TypeAlias = dict[str, Weights]  # symbol -> expansion (symbols and words separated by spaces) -> weight

START = "Scene"
TOPIC_BOOST = 12.0  # how much likelier a word is in scenes of its topic
MORE_TURNS = 0.9  # so a scene has 10 turns on average
NOUN_CLASSES = ("animal", "m", "f", "thing", "wear", "food")
NUMBERS = {"sg": "3", "pl": "pl"}  # and the agreement of a noun phrase of that number
TENSES = ("now", "then")
PRESENT = {"1": "base", "3": "s", "pl": "base"}  # verb form by agreement
BE = {"now": {"1": "am", "3": "is", "pl": "are"}, "then": {"1": "was", "3": "was", "pl": "were"}}
DO = {"now": {"1": "do", "3": "does", "pl": "do"}, "then": {"1": "did", "3": "did", "pl": "did"}}
CAN = {"now": {"1": "can", "3": "can", "pl": "can"}, "then": {"1": "could", "3": "could", "pl": "could"}}
# A subject and its agreement; how a reply speaks of it and with what agreement; its reflexive; its weight in questions.
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
    """The grammar of one topic's scenes. Topics share all rules but the first line; their words' weights differ."""
    return _words(topic) | _noun_phrases() | _verb_phrases() | _clauses() | _questions() | _turns(topic)


def _words(topic: str) -> Rules:
    topical = set(TOPICS[topic].words.split())

    def weigh(entries: str) -> Weights:
        """Zipf-Mandelbrot by rank; the topic's words boosted."""
        return {
            entry.replace("_", " "): (TOPIC_BOOST if entry.partition("/")[0] in topical else 1.0) / (rank + 3)
            for rank, entry in enumerate(entries.split())
        }

    r: Rules = {symbol: weigh(entries) for symbol, entries in lexicon.WORDS.items()}
    r |= {f"Adj.{c}": weigh(entries) for c, entries in lexicon.ADJECTIVES.items()}
    r |= {f"Pred.{c}": weigh(entries) for c, entries in lexicon.PREDICATES.items()}
    r |= {f"Name.{c}": weigh(entries) for c, entries in lexicon.NAMES.items()}
    r |= {f"N.{c}": weigh(entries) for c, entries in (lexicon.MASS | lexicon.PLACES).items()}
    for c, entries in lexicon.VERBS.items():
        for form in ("base", "s", "past", "ing"):
            r[f"V.{c}.{form}"] = {getattr(verb(entry), form): w for entry, w in weigh(entries).items()}
    nouns = {c: weigh(entries) for c, entries in lexicon.NOUNS.items()}
    nouns["thing"] = _blend((80, nouns["thing"]), (20, nouns["wear"]))
    for c, n in product(nouns, NUMBERS):
        r[f"N.{c}.{n}"] = {getattr(noun(entry), n): w for entry, w in nouns[c].items()}
    for c in NOUN_CLASSES:
        described = _blend((60, r[f"Adj.{c}"]), (40, r["Adj.size"]))
        r[f"A.{c}"] = _blend(
            (70, {_article(word): w for word, w in r[f"N.{c}.sg"].items()}),
            (30, {_article(f"{word} N.{c}.sg"): w for word, w in described.items()}),
        )
    r["Pred.it"] = _blend((60, r["Pred.thing"]), (40, r["Pred.food"]))
    for auxiliary in ("is", "are", "was", "were", "do", "does", "did", "could"):
        r[f"Not.{auxiliary}"] = {f"{auxiliary} not": 1, f"{auxiliary}n't": 3}
    r["Not.am"], r["Not.can"] = {"am not": 1}, {"cannot": 1, "can't": 3}
    r["Sound"] = {}
    for animal, sound in lexicon.SOUNDS.items():
        weight, one, many = nouns["animal"][animal], noun(animal).sg, noun(animal).pl
        r["Sound"][f"what does the {one} say Ask / the {one} says {sound} !"] = 3 * weight
        r["Sound"][f"what do the {many} say Ask / the {many} say {sound} !"] = weight
    counted = [(noun(entry), w) for entry, w in nouns["animal"].items()]
    r["Count"] = {f"one {x.sg} , two {x.pl} , three {x.pl} !": w for x, w in counted}
    return r


def _blend(*parts: tuple[float, Weights]) -> Weights:
    """A mixture as one distribution: what two parts share becomes one expansion, not two derivations."""
    blend: Weights = {}
    for share, weights in parts:
        total = sum(weights.values())
        for expansion, weight in weights.items():
            blend[expansion] = blend.get(expansion, 0.0) + share * weight / total
    return blend


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _noun_phrases() -> Rules:
    r: Rules = {}
    for c, n in product(NOUN_CLASSES, NUMBERS):
        r[f"NB.{c}.{n}"] = {f"N.{c}.{n}": 74, f"Adj.{c} N.{c}.{n}": 15, f"Adj.size N.{c}.{n}": 9}
        if c not in ("m", "f"):
            r[f"NB.{c}.{n}"] |= {f"Adj.color N.{c}.{n}": 5, f"Adj.size Adj.color N.{c}.{n}": 1}
    # SNP is a noun phrase without a modifier, NP one with or without.
    singular: Weights = {"the": 50, "Poss": 18, "this": 7, "that": 7, "every": 2, "one": 2, "another": 2}
    plural: Weights = {"the": 45, "Poss": 18, "Numeral": 12, "these": 9, "those": 9, "some": 8, "all the": 4, "many": 3}
    for c in NOUN_CLASSES:
        r[f"SNP.{c}.sg"] = {f"A.{c}": 20} | {f"{determiner} NB.{c}.sg": w for determiner, w in singular.items()}
        r[f"SNP.{c}.pl"] = {f"{determiner} NB.{c}.pl": w for determiner, w in plural.items()}
    for c, n in product(("animal", "m", "f", "thing", "food"), NUMBERS):
        modifier = f"Mod.{c if c in ('thing', 'food') else 'anim'}.{n}"
        r[f"NP.{c}.{n}"] = {f"SNP.{c}.{n}": 88, f"SNP.{c}.{n} {modifier}": 12}
    for phrase, n in product(("SNP", "NP"), NUMBERS):
        r[f"{phrase}.anim.{n}"] = {f"{phrase}.animal.{n}": 60, f"{phrase}.m.{n}": 18, f"{phrase}.f.{n}": 22}
    r["Beside"] = {"Prep SNP.anim.sg": 40, "Prep SNP.anim.pl": 15, "Prep SNP.thing.sg": 35, "Prep SNP.thing.pl": 10}
    for n, a in NUMBERS.items():
        r[f"Mod.anim.{n}"] = {
            "Beside": 25,
            "with SNP.wear.sg": 12,
            f"that Finite.{a}.now": 25,
            f"that Finite.{a}.then": 10,
            "that Gapped.anim": 28,
        }
        r[f"Mod.thing.{n}"] = {"Beside": 30, f"that Inert.thing.{n}.now": 25, "that Gapped.thing": 45}
        r[f"Mod.food.{n}"] = {f"that Inert.food.{n}.now": 40, "that Gapped.food": 60}

    r["Name"] = {"Name.m": 45, "Name.f": 55}
    r["Nom.he"] = {"he": 45, "Name.m": 35, "NP.m.sg": 20}
    r["Nom.she"] = {"she": 45, "Name.f": 35, "NP.f.sg": 20}
    r["Nom.they"] = {"they": 40, "NP.anim.pl": 45, "Pair": 15}
    r["Pair"] = {"Name.m and Name.f": 25, "Name.f and Name.m": 35, "Name and I": 20, "SNP.anim.sg and SNP.anim.sg": 20}
    r["Subj.1"] = {"I": 1}
    r["Subj.3"] = {"Nom.he": 32, "Nom.she": 33, "NP.animal.sg": 35}
    r["Subj.pl"] = {"you": 40, "we": 20, "Nom.they": 40}
    r["Plain.1"] = {"I": 1}  # subjects without a modifier
    r["Plain.3"] = {"he": 15, "she": 15, "Name": 25, "SNP.anim.sg": 45}
    r["Plain.pl"] = {"you": 35, "we": 15, "they": 15, "SNP.anim.pl": 35}

    r["Obj.anim"] = {"Pron": 30, "Name": 14, "NP.anim.sg": 39, "NP.anim.pl": 17}
    r["Obj.thing"] = {"it": 26, "them": 6, "NP.thing.sg": 50, "NP.thing.pl": 18}
    r["Obj.food"] = {"it": 18, "them": 4, "NP.food.sg": 34, "NP.food.pl": 14, "NB.food.pl": 8, "Mass.solid": 22}
    r["Obj.any"] = {"it": 26, "Pron": 26, "Name": 12, "Mass.solid": 4, "Mass.drink": 3}
    r["Obj.any"] |= {"NP.anim.sg": 34, "NP.anim.pl": 15, "NB.animal.pl": 4}
    r["Obj.any"] |= {"NP.thing.sg": 40, "NP.thing.pl": 12, "NP.food.sg": 8, "NP.food.pl": 4, "NB.food.pl": 4}
    r["Obj.wear"] = {"it": 15, "SNP.wear.sg": 60, "SNP.wear.pl": 25}
    r["Obj.drink"] = {"it": 20, "Mass.drink": 60, "N.drink": 20}
    r["Obj.body"] = {"Poss N.body.sg": 50, "Poss N.body.pl": 35, "this N.body.sg": 7, "these N.body.pl": 8}
    r["Recipient"] = {"Pron": 50, "Name": 20, "SNP.anim.sg": 22, "SNP.anim.pl": 8}
    r["Gift"] = {"SNP.thing.sg": 50, "SNP.thing.pl": 15, "SNP.food.sg": 20, "Mass.solid": 8, "Mass.drink": 7}
    for c, adjective in (("solid", "Adj.food"), ("drink", "Adj.drink")):
        some = {"the": 35, "some": 30, "Poss": 25, "this": 5, "more": 5}
        r[f"Mass.{c}"] = {f"{determiner} N.{c}": 4 * w for determiner, w in some.items()}
        r[f"Mass.{c}"] |= {f"{determiner} {adjective} N.{c}": w for determiner, w in some.items()}
    return r


def _verb_phrases() -> Rules:
    r: Rules = {}
    for form in ("base", "s", "past", "ing"):
        r[f"Act.{form}"] = {
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
            r[f"Gap.{c}.{form}"] = {f"V.{v}.{form}": 40 / len(verbs) for v in verbs} | {f"V.with.{form} with": 6}
            if form != "ing":
                r[f"Gap.{c}.{form}"] |= {f"V.want.{form} to V.{v}.base": 15 / len(verbs) for v in verbs}
                r[f"Gap.{c}.{form}"] |= {f"V.any.{form}": 30}
        if form != "ing":
            r[f"VP.{form}"] = {f"Act.{form}": 64, f"V.any.{form} Obj.any": 24, f"V.want.{form} to Act.base": 12}

    for t, a in product(TENSES, PRESENT):
        be, do, can, form = BE[t][a], DO[t][a], CAN[t][a], PRESENT[a] if t == "now" else "past"
        r[f"Finite.{a}.{t}"] = {
            f"VP.{form}": 38,
            f"{be} Act.ing": 17,
            f"{be} Pred.anim": 11,
            f"Modal.{t} Act.base": 9,
            f"Not.{do} VP.base": 8,
            f"Not.{be} Act.ing": 4,
            f"Not.{be} Pred.anim": 3,
            f"Not.{can} Act.base": 3,
        }
    for t, (n, a), c in product(TENSES, NUMBERS.items(), ("thing", "food", "it")):
        be, do, form = BE[t][a], DO[t][a], PRESENT[a] if t == "now" else "past"
        r[f"Inert.{c}.{n}.{t}"] = {f"{be} Pred.{c}": 60, f"Not.{be} Pred.{c}": 12}
        if c != "food":
            move = {f"V.inert.{form}": 15, f"{be} V.inert.ing": 10, f"Not.{do} V.inert.base": 4}
            r[f"Inert.{c}.{n}.{t}"] |= move
    for c in ("anim", "thing", "food"):
        r[f"Gapped.{c}"] = {}
        for a, weight in (("1", 20), ("3", 45), ("pl", 35)):
            r[f"Gapped.{c}"] |= {
                f"Plain.{a} Gap.{c}.{PRESENT[a]}": 0.5 * weight,
                f"Plain.{a} Gap.{c}.past": 0.3 * weight,
                f"Plain.{a} {BE['now'][a]} Gap.{c}.ing": 0.2 * weight,
            }
    return r


def _clauses() -> Rules:
    r: Rules = {"Clause": {}}
    for t, likely in (("now", 60), ("then", 40)):
        r[f"Core.{t}"] = {
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
            form = PRESENT[a] if t == "now" else "past"
            r[f"Core.{t}"][f"{subject} V.self.{form} {reflexive}"] = 0.03 * weight
        r[f"Adv.{t}"] = {"Place": 45, f"Time.{t}": 25, "Manner": 20, f"Place Time.{t}": 10}
        r["Clause"] |= {
            f"Core.{t}": 0.64 * likely,
            f"Core.{t} Adv.{t}": 0.28 * likely,
            f"Time.{t} Core.{t}": 0.04 * likely,
        }
        r["Clause"] |= {f"Plain.{a} V.think.{form} Core.{t}": 0.04 / 3 * likely for a, form in PRESENT.items()}
    r["Place"] = {
        "in the N.in": 36,
        "in Poss N.in": 6,
        "on the N.on": 25,
        "under the N.on": 12,
        "outside": 5,
        "here": 5,
    }
    return r


def _questions() -> Rules:
    r: Rules = {"YesNo": {}, "Wh": {}}
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
            r[f"Is.{kind}"] = {f"{asked} {subject} {verb_phrase}": 8, f"{asked} {subject} {verb_phrase} Adv.{t}": 2}
            if auxiliary is BE:
                r[f"Is.{kind}"] |= {f"{asked} {subject} Pred.anim": 4}
            r[f"Reply.{kind}"] = {f"yes , {who} {answered}": 65, f"no , {who} Not.{answered}": 35}
            r["YesNo"] |= dict.fromkeys((f"Is.{kind} Ask", f"Is.{kind} ? / Reply.{kind} Dot"), share * weight)
        for t, share in (("now", 0.7), ("then", 0.3)):
            do, be, being = DO[t][a], BE[t][a], BE[t][b]
            r["Wh"][f"Wh.{who}.{t}"] = share * weight
            r[f"Wh.{who}.{t}"] = {
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
    r["Wh"] |= {
        "who Finite.3.now Ask": 8,
        "who Finite.3.then Ask": 4,
        "what Inert.it.sg.now Ask": 2,
        "where is Poss N.body.sg Ask": 2,
        "where are Poss N.body.pl Ask": 2,
        "where is SNP.thing.sg Ask": 4,
        "where is SNP.thing.sg ? / it is Place Dot": 8,
        "where are SNP.thing.pl ? / they are Place Dot": 4,
        "how many N.animal.pl are there Place ? / Numeral !": 2,
        "what is this Ask": 2,
        "what is this ? / it is Label.sg Bang": 8,
        "what are these ? / they are Label.pl Bang": 4,
    }
    r["Wh"] |= {f"who VP.s ? / Plain.{a} {do} Bang": 2 for a, do in DO["now"].items()}
    r["Wh"] |= {f"who is Act.ing ? / Plain.{a} {be} Bang": 2 for a, be in BE["now"].items()}
    return r


def _turns(topic: str) -> Rules:
    labels = {"animal": 45, "thing": 33, "food": 10, "m": 5, "f": 7}
    return {
        "Scene": {"Opening / Turns": 1},
        "Turns": {"Turn": 1 - MORE_TURNS, "Turn / Turns": MORE_TURNS},
        "Turn": {
            "Clause Dot": 28,
            "Clause Link Clause Dot": 4,
            "YesNo": 14,
            "Wh": 15,
            "Order": 12,
            "Show": 12,
            "Fragment": 9,
            "Sound": 2,
            "Count": 1,
        },
        "Link": {"and": 50, "because": 25, "but": 15, "when": 10},
        "Order": {
            "Act.base Bang": 30,
            "Act.base Place Bang": 5,
            "please Act.base Dot": 12,
            "don't Act.base Bang": 10,
            "let's Act.base Bang": 20,
            "put Obj.thing Place Dot": 8,
            "don't put Obj.thing Place Bang": 3,
        },
        "Show": {
            "this is Label.sg Dot": 12,
            "that is Label.sg Dot": 14,
            "these are Label.pl Dot": 6,
            "those are Label.pl Dot": 6,
            "is this Label.sg ? / yes , it is Bang": 6,
            "are these Label.pl ? / yes , they are Bang": 3,
            "here is SNP.thing.sg Dot": 10,
            "here are SNP.thing.pl Dot": 5,
            "there is Label.sg Place Dot": 12,
            "there are Some.pl Place Dot": 10,
            "is there Label.sg Place Ask": 5,
            "are there Some.pl Place Ask": 4,
        },
        "Label.sg": {f"A.{c}": w for c, w in labels.items()},
        "Label.pl": {f"NB.{c}.pl": w for c, w in labels.items()},
        "Some.pl": {"some Label.pl": 45, "Numeral Label.pl": 40, "many Label.pl": 15},
        "Dot": {".": 88, ", Vocative .": 12},
        "Bang": {"!": 85, ", Vocative !": 15},
        "Ask": {"?": 85, ", Vocative ?": 15},
        "Fragment": {line: 1 / (rank + 3) for rank, line in enumerate(lexicon.FRAGMENTS)},
        "Opening": dict.fromkeys(TOPICS[topic].openings, 1.0),
    }
