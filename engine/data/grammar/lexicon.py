"""The words of the generated corpus: who and what there is, what they do, and how the forms are spelled.

Every list is in order of frequency: its word r = 0, 1, ... is drawn with weight 1 / (r + 3) (Zipf-Mandelbrot).
Only irregular forms are written out: `mouse/mice`, `run/ran`. No verb here has a past tense that looks like its
base (put, cut, read): the grammar would then derive "they put it down" twice.
"""

import re
from dataclasses import dataclass

NOUNS = {
    "animal": "dog cat duck cow bunny horse bird pig mouse/mice frog kitten puppy hen lamb goose/geese bear monkey "
    "owl lion elephant turtle wolf/wolves tiger bee",
    "m": "boy man/men farmer king friend",  # he, himself
    "f": "girl baby lady woman/women child/children queen doctor",  # she, herself
    "food": "cookie apple egg banana carrot cracker pea strawberry sandwich potato cherry orange",
    "thing": "ball book block car doll truck cup spoon train balloon bike boat puzzle drum bottle blanket "
    "kite box towel bucket leaf/leaves pillow toothbrush umbrella tractor",
    "wear": "hat shoe sock coat scarf/scarves boot dress apron",
    "body": "nose hand foot/feet tooth/teeth ear toe tummy",
}
MASS = {"solid": "bread cheese soup toast rice yogurt jam", "drink": "milk juice water tea"}
PLACES = {
    "in": "house garden kitchen box car bed park bath barn basket field",
    "on": "floor table chair bed sofa grass rug hill roof",
}
NAMES = {"m": "daddy tom grandpa ben sam max", "f": "mommy anna grandma lucy emma molly"}

VERBS = {
    "alone": "sleep/slept play run/ran cry jump dance laugh sing/sang swim/swam hide/hid smile sit/sat hop climb "
    "wave yawn",
    "inert": "fall/fell roll stop spin/spun bounce sink/sank",  # only things do these
    "food": "eat/ate taste cook bite/bit smell",
    "drink": "drink/drank pour spill",
    "thing": "hold/held throw/threw push find/found pull carry build/built drop take/took make/made fix",
    "wear": "wear/wore button",
    "body": "wash touch dry wiggle",
    "anim": "hug chase kiss tickle feed/fed follow catch/caught help",
    "any": "see/saw like want have/had love need hear/heard know/knew",  # states: no progressive
    "self": "wash see/saw love dry hug scratch help hear/heard",
    "give": "give/gave show bring/brought",
    "with": "play dance sing/sang",  # play with, ...
    "to": "talk wave run/ran",  # talk to, ...
    "at": "look laugh smile",  # look at, ...
    "want": "want like try love need",  # want to, ...
    "think": "think/thought hope say/said",  # think that, ...
}
ADJECTIVES = {
    "size": "big little tiny",
    "color": "red blue yellow green brown white black pink",
    "animal": "soft funny sleepy hungry fluffy old quick angry",
    "m": "funny good silly happy kind old brave",
    "f": "good happy silly funny kind old",
    "thing": "new old shiny broken clean round empty",
    "drink": "cold warm fresh",
    "wear": "warm new wet old",
    "food": "yummy sweet warm cold round icky",
}
PREDICATES = {
    "anim": "hungry tired happy sleepy sad silly thirsty funny cold busy wet good angry",
    "thing": "broken red big new wet gone dirty blue little clean heavy yellow empty",
    "food": "yummy hot ready gone cold good sweet warm sticky",
}
WORDS = {
    "Numeral": "two three four five six ten",
    "Poss": "your my the_baby's his her our mommy's their daddy's",
    "Prep": "near behind next_to beside",
    "Manner": "again too fast slowly all_day",
    "Time.now": "now today every_day in_the_morning",
    "Time.then": "yesterday last_night this_morning",
    "Modal.now": "can will must should",
    "Modal.then": "could",
    "Vocative": "baby sweetie honey darling buddy pumpkin",
    "Pron": "him her me them you us",
}
SOUNDS = {
    "cow": "moo",
    "dog": "woof",
    "cat": "meow",
    "duck": "quack",
    "pig": "oink",
    "bird": "tweet",
    "lamb": "baa",
    "owl": "hoo",
    "lion": "roar",
    "bee": "buzz",
}
FRAGMENTS = (
    "uh oh !",
    "good job Bang",
    "oh no !",
    "all done !",
    "look !",
    "yay !",
    "wow !",
    "that's right !",
    "here we go !",
    "very good !",
    "thank you Bang",
    "come here Bang",
    "good girl !",
    "good boy !",
    "bye bye Bang",
    "what happened ?",
    "are you okay Ask",
    "there you go Bang",
    "hello Bang",
    "careful Bang",
    "you did it !",
    "peekaboo !",
    "one more time !",
    "it is raining .",
    "up you go !",
    "night night Bang",
    "time to go Bang",
)


@dataclass(frozen=True)
class Topic:
    """What a scene is about: its first line says so, and its words come up more often for the rest of it."""

    openings: tuple[str, ...]
    words: str


TOPICS = {
    "farm": Topic(
        ("here we are at the farm .", "let's go and see the animals !", "the farm is waking up ."),
        "cow horse pig hen lamb goose duck farmer barn field tractor egg milk feed chase grass bucket",
    ),
    "lunch": Topic(
        ("it is time for lunch Bang", "lunch is ready !", "who is hungry ?"),
        "cookie apple banana egg carrot pea cracker potato sandwich bread cheese soup rice milk juice "
        "water cup spoon kitchen table chair eat drink cook taste bite pour spill give hungry thirsty yummy hot apron",
    ),
    "bath": Topic(
        ("it is bath time Bang", "let's get you into the bath ."),
        "bath duck boat towel bucket water foot toe tummy hand ear frog turtle wash dry wet pour clean",
    ),
    "playroom": Topic(
        ("let's play with the toys !", "look at all these toys !", "what shall we play ?"),
        "ball block car doll truck train puzzle drum bear balloon box floor rug build throw roll push bounce "
        "drop fix play broken spin",
    ),
    "park": Topic(
        ("let's go to the park !", "the sun is out today .", "we are going outside Bang"),
        "park grass hill bird dog bee bike kite ball leaf puppy run climb jump catch hop chase wave "
        "friend boy girl hat coat boot follow",
    ),
    "zoo": Topic(
        ("today we are at the zoo !", "look , we are at the zoo !"),
        "lion elephant monkey bear tiger turtle wolf owl goose bird banana balloon feed climb laugh see hear look",
    ),
    "bedtime": Topic(
        ("it is bedtime Bang", "time for bed Bang", "let's get ready for bed ."),
        "bed blanket pillow book tooth toothbrush bear doll mommy daddy milk sleep yawn hug kiss sing tired sleepy "
        "love bunny owl",
    ),
}


@dataclass(frozen=True)
class Noun:
    sg: str
    pl: str


@dataclass(frozen=True)
class Verb:
    base: str
    s: str  # third person singular
    past: str
    ing: str


def noun(entry: str) -> Noun:
    """Both forms of a noun given as `dog` or `mouse/mice`."""
    sg, _, irregular = entry.partition("/")
    return Noun(sg, irregular or _with_s(sg))


def verb(entry: str) -> Verb:
    """All forms of a verb given as `jump` or `run/ran`."""
    base, _, irregular = entry.partition("/")
    stem = base + base[-1] if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", base) else base  # hop, hopping
    past = re.sub("eed$", "ed", re.sub("([^aeiou])yed$", r"\1ied", stem + "ed"))
    s = "has" if base == "have" else _with_s(base)
    return Verb(base, s, irregular or past, re.sub("(?<!e)e$", "", stem) + "ing")


def _with_s(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh|to)$", word) else "s")
