"""The text cleaners of Baby Llama (Timiryasov & Tastet 2023, the notebook and `mrclean.py` of its repository).

There is one cleaner per corpus of BabyLM, chosen by the name of the file. Each has two forms. As intended, blank lines
stay, and separate documents. With `quirks=True` it does exactly what the published code does, mistakes included.
"""

import re
from collections.abc import Callable

_BLANK = r"[ \t\u00a0]"
_UNCOUNTED = re.compile(r"\(.*?\)|[.!?]")  # What does not count when qed looks for upper-case lines.


def cleaner_for(stem: str) -> str | None:
    """Returns the cleaner's name for a file's stem (`bnc_spoken` of `bnc_spoken.train`), or None if there is none."""
    name = _ALIASES.get(stem.lower(), stem.lower())
    return name if name in CLEANERS else None


def _unchanged(text: str, quirks: bool) -> str:
    return text


def _glued(text: str, quirks: bool) -> str:
    """The text stays as it is. Quirk: blank lines vanish together with the line end before them, so the last word of a
    paragraph and the first word of the next one become one word."""
    return text.replace("\n\n", "") if quirks else text


def _spaces(text: str, quirks: bool) -> str:
    """Several spaces, tabs or no-break spaces become one space, and none stands before . , ; ! or ?."""
    return re.sub(rf"{_BLANK}([.,;!?])", r"\1", re.sub(rf"{_BLANK}+", " ", text))


def _cbt(text: str, quirks: bool) -> str:
    """Spaces are corrected as in `_spaces`, and `word 's` becomes `word's`."""
    return re.sub(rf"(\w){_BLANK}(['’]\w)", r"\1\2", _spaces(text, quirks))


def _open_subtitles(text: str, quirks: bool) -> str:
    """Lines with the word "subtitle" go, since they are credits."""
    return re.sub(r"^.*subtitle.*$\n", "", text, flags=re.MULTILINE | re.IGNORECASE)


def _qed(text: str, quirks: bool) -> str:
    """Lines of which at least half the letters are upper case are recased: an l becomes I, which was misread as l, and
    every sentence begins with a capital. White space at the ends of all lines goes. Quirk: the half is that of all
    characters, not of the letters."""
    lines = []
    for line in text.splitlines():
        body = _UNCOUNTED.sub("", line)
        counted = len(body) if quirks else sum(map(str.isalpha, body))
        # The notebook divides by zero where nothing is counted.
        if counted and sum(map(str.isupper, body)) >= counted / 2:
            line = "".join(sentence.capitalize() for sentence in re.split(r"([.!?]\s*)", line.replace("l", "I")))
        lines.append(line.strip())
    return "\n".join(lines)


def _wikipedia(text: str, quirks: bool) -> str:
    """A heading `= = = X = = =` becomes X, and white space at the ends of all lines goes. Quirks: X is glued to the
    line that follows, the file's first character goes, and paragraphs are glued as in `_glued`."""
    text = re.sub(r"= = = (.+?) = = =\n", r"\1" if quirks else r"\1\n", text)
    text = "\n".join(line.strip() for line in text.splitlines())
    return _glued(text[1:], quirks) if quirks else text


# Each takes the text of a whole file and whether it has the quirks, and returns the cleaned text.
CLEANERS: dict[str, Callable[[str, bool], str]] = {
    "aochildes": _spaces,
    "bnc_spoken": lambda text, quirks: _glued(_spaces(text, quirks), quirks),
    "cbt": _cbt,
    "children_stories": _unchanged,
    "gutenberg": _unchanged,
    "open_subtitles": _open_subtitles,
    "qed": _qed,
    "simple_wikipedia": _glued,
    "switchboard": _unchanged,
    "wikipedia": _wikipedia,
}
_ALIASES = {  # File names of BabyLM 2024 and of mixtures made after it.
    "childes": "aochildes",
    "childes_aochildes": "aochildes",
    "childes_parsed": "aochildes",
    "gutenberg_children": "gutenberg",
    "simple_wiki": "simple_wikipedia",
}
