"""Reads the words of the generated corpus from lexicon.yaml, and spells the forms of its nouns and verbs."""

import re
from pathlib import Path
from typing import Any

import yaml


def read_table(name: str) -> dict[str, Any]:
    """Returns the contents of a YAML file of this folder. The order of the keys is that of the file."""
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_LEXICON = read_table("lexicon.yaml")
NOUNS: dict[str, str] = _LEXICON["nouns"]
VERBS: dict[str, str] = _LEXICON["verbs"]
WORDS: dict[str, str] = _LEXICON["words"]
SOUNDS: dict[str, str] = _LEXICON["sounds"]
FRAGMENTS: list[str] = _LEXICON["fragments"]
# By topic: its `openings` are the first lines of its scenes, and its `words` come up more often in the rest of them.
TOPICS: dict[str, dict[str, Any]] = _LEXICON["topics"]


def noun(entry: str) -> dict[str, str]:
    """Returns the singular, `sg`, and the plural, `pl`, of a noun given as `dog` or `mouse/mice`."""
    sg, _, irregular = entry.partition("/")
    return {"sg": sg, "pl": irregular or _with_s(sg)}


def verb(entry: str) -> dict[str, str]:
    """Returns the forms of a verb given as `jump` or `run/ran`; `s` is the third person singular."""
    base, _, irregular = entry.partition("/")
    stem = base + base[-1] if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", base) else base  # hop, hopping
    past = re.sub("eed$", "ed", re.sub("([^aeiou])yed$", r"\1ied", stem + "ed"))
    s = "has" if base == "have" else _with_s(base)
    return {"base": base, "s": s, "past": irregular or past, "ing": re.sub("(?<!e)e$", "", stem) + "ing"}


def _with_s(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh|to)$", word) else "s")
