"""The text cleaners of Baby Llama (Timiryasov & Tastet 2023, the notebook and `mrclean.py` of its repository), by name.

What each does, and with `quirks=True` also as published:
  aochildes         runs of spaces, tabs and no-break spaces are one space; none stands before . , ; ! ?
  bnc_spoken        the same                            quirk: blank lines vanish, their paragraphs glued together
  cbt               the same, and `word 's` is `word's`
  open_subtitles    lines with the word "subtitle" go (credits)
  qed               lines at least half upper case: l is I (misread), each sentence capitalised; all lines stripped
                                                        quirk: the half counts all characters, not letters alone
  simple_wikipedia  unchanged                           quirk: blank lines vanish, as above
  wikipedia         `= = = X = = =` is X; all lines stripped
                                                        quirks: X is glued to what follows; the file's first character
                                                        goes; blank lines vanish, as above
  children_stories, gutenberg, switchboard              unchanged
A glued paragraph joins two words; without quirks a blank line stays and separates documents.
"""

import re
from collections.abc import Callable

_BLANK = r"[ \t\u00a0]"
_UNCOUNTED = re.compile(r"\(.*?\)|[.!?]")  # of an upper-case line in qed


def cleaner_for(stem: str) -> str | None:
    """The name of the cleaner for a file's stem (`bnc_spoken` of `bnc_spoken.train`), None where there is none."""
    name = _ALIASES.get(stem.lower(), stem.lower())
    return name if name in CLEANERS else None


def clean(text: str, name: str, *, quirks: bool = False) -> str:
    """`text`, a whole file, cleaned by the cleaner called `name`."""
    return CLEANERS[name](text, quirks)


def _unchanged(text: str, quirks: bool) -> str:
    return text


def _glued(text: str, quirks: bool) -> str:
    return text.replace("\n\n", "") if quirks else text


def _spaces(text: str, quirks: bool) -> str:
    return re.sub(rf"{_BLANK}([.,;!?])", r"\1", re.sub(rf"{_BLANK}+", " ", text))


def _bnc_spoken(text: str, quirks: bool) -> str:
    return _glued(_spaces(text, quirks), quirks)


def _cbt(text: str, quirks: bool) -> str:
    return re.sub(rf"(\w){_BLANK}(['’]\w)", r"\1\2", _spaces(text, quirks))


def _open_subtitles(text: str, quirks: bool) -> str:
    return re.sub(r"^.*subtitle.*$\n", "", text, flags=re.MULTILINE | re.IGNORECASE)


def _qed(text: str, quirks: bool) -> str:
    lines = []
    for line in text.splitlines():
        body = _UNCOUNTED.sub("", line)
        counted = len(body) if quirks else sum(map(str.isalpha, body))  # nothing to count: the notebook divides by zero
        if counted and sum(map(str.isupper, body)) >= counted / 2:
            line = "".join(sentence.capitalize() for sentence in re.split(r"([.!?]\s*)", line.replace("l", "I")))
        lines.append(line.strip())
    return "\n".join(lines)


def _wikipedia(text: str, quirks: bool) -> str:
    text = re.sub(r"= = = (.+?) = = =\n", r"\1" if quirks else r"\1\n", text)
    text = "\n".join(line.strip() for line in text.splitlines())
    return _glued(text[1:], quirks) if quirks else text


CLEANERS: dict[str, Callable[[str, bool], str]] = {
    "aochildes": _spaces,
    "bnc_spoken": _bnc_spoken,
    "cbt": _cbt,
    "children_stories": _unchanged,
    "gutenberg": _unchanged,
    "open_subtitles": _open_subtitles,
    "qed": _qed,
    "simple_wikipedia": _glued,
    "switchboard": _unchanged,
    "wikipedia": _wikipedia,
}
_ALIASES = {  # file names of BabyLM 2024 and of mixtures made after it
    "childes": "aochildes",
    "childes_aochildes": "aochildes",
    "childes_parsed": "aochildes",
    "gutenberg_children": "gutenberg",
    "simple_wiki": "simple_wikipedia",
}
