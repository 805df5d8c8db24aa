"""The text normalisation of When Babies Teach Babies (Iyer 2024), one normaliser per corpus of BabyLM.

The paper describes it as that of ELC-BERT (Charpentier & Samuel 2023, `preprocess/` of its repository): characters are
repaired as ftfy does, punctuation is spaced as Moses does, what people say stands in quotes, and a line that repeats
the one before goes. The code here is our own. It differs on purpose in three points: initials (U.S.) stay together, a
file's last paragraph is kept, and lines do not begin with [TAB].
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import groupby

WRAPPED = 100  # In characters: a paragraph without a longer line is taken for wrapped.
_STRAIGHT = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")
_CONTROL = {code: None for code in (*range(9), 11, *range(14, 32), 127, 0xFEFF)}
_MOSES = str.maketrans({"–": "-", "—": " - ", "…": "...", "´": "'", "`": "'", "«": '"', "»": '"', "\u00a0": " "})
_OPENING = r"(\[{"
_SPACES = [  # Patterns and their replacements, applied in this order.
    (rf"(?<=[a-z0-9])\.(?=[A-Z{_OPENING}])", ". "),
    (rf"([?!])(?=[^\W_]|[{_OPENING}])", r"\1 "),
    (r"\.\.\.(?=[^\s.?!,;:)\]}\"'])", "... "),
    (rf",(?=[^\W\d_]|[{_OPENING}])", ", "),
    (rf"([;)\]}}%])(?=[^\W_]|[{_OPENING}])", r"\1 "),
    (rf":(?=[^\W\d_]|[{_OPENING}])|(?<!\d):(?=\d)", ": "),
    (rf"([{_OPENING}]) ", r"\1"),
    (r" (?=[.;:?!,)\]}])", ""),
    (r"(?<=[$£€]) (?=\d)|(?<=\d) (?=%)", ""),
    (r"(?i) (n't|'(?:ll|re|ve|m|s|d))(?=[ ,.])", r"\1"),
]
_LABEL = re.compile(r"^\*?[A-Z0-9]{1,4}:\t", re.MULTILINE)
_NO_UTTERANCE = re.compile(r'|\(.*\)|\[.*\]|\{.*\}|.*[:"]|".*')  # Empty, in brackets, a speaker's name, quoted.
_PLACES = re.compile(r"is a (?:commune\. It is|commune found|city in|village in|municipality in|town in)")
_PENN = {"-LRB-": "(", "-LCB-": "{", "-LSB-": "[", "-RRB-": ")", "-RCB-": "}", "-RSB-": "]"}
_PENN |= {"`` ": '"', "``": '"', " ''": '"', "''": '"'}


def repaired(line: str) -> str:
    """Returns a line with its characters repaired.

    UTF-8 that was read in another encoding is read again, HTML entities become characters, quotes become straight,
    control characters go, and white space becomes single spaces.
    """
    line = line if "<" in line else html.unescape(line)
    line = re.sub(r"[^\x00-\x7f]{2,}", _read_again, line)
    return " ".join(unicodedata.normalize("NFC", line.translate(_STRAIGHT).translate(_CONTROL)).split())


def tidied(line: str) -> str:
    """Returns a repaired line with the right spaces around punctuation, in contractions and around quotes."""
    line = " ".join(repaired(line).translate(_MOSES).split())
    for pattern, replacement in _SPACES:
        line = re.sub(pattern, replacement, line)
    return re.sub(r'"([,.]+)', r'\1"', _quotes(line)).strip()


def _read_again(match: re.Match[str]) -> str:
    """Returns the characters of UTF-8 that was read as Windows-1252, or as Latin-1 where that has no character; others
    stay as they are."""
    try:
        return b"".join(c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in match[0]).decode()
    except UnicodeError:
        return match[0]


def _quotes(line: str) -> str:
    """Returns a line with a space before each opening quote and behind each closing one, and none inside the quotes.

    The line stays as it is where its quotes do not come in pairs.
    """
    parts = line.split('"')
    if len(parts) % 2 == 0 or '""' in line:
        return line
    for i in range(0, len(parts) - 1, 2):
        if parts[i] and parts[i][-1] not in " ([{":
            parts[i] += " "
        parts[i + 1] = parts[i + 1].strip()
        if parts[i + 2][:1].isalnum():
            parts[i + 2] = " " + parts[i + 2]
    return '"'.join(parts)


def _talk(text: str) -> Iterator[str]:
    """Conversations: speakers' labels (*MOT:, A:) go, as in ELC-BERT's code, lines are tidied, and each line becomes an
    utterance with a capital, in quotes."""
    lines = (tidied(line) for line in _LABEL.sub("", text).split("\n"))
    utterances = (f'"{line[0].upper()}{line[1:]}"' if line else "" for line in lines if line not in (".", "!", "?"))
    return (line for line, _ in groupby(utterances))  # A line that repeats the one before goes.


def _subtitles(text: str) -> Iterator[str]:
    """Subtitles and telephone calls: labels and leading dashes go, lines are repaired, and each line becomes an
    utterance in quotes, except speakers' names and what stands in brackets or quotes already."""
    lines = (repaired(re.sub(r"^\s*- ?", "", line)) for line in _LABEL.sub("", text).split("\n"))
    utterances = (line if _NO_UTTERANCE.fullmatch(line) else f'"{line}"' for line in lines)
    return (line for line, _ in groupby(utterances))


def _qed(text: str) -> Iterator[str]:
    """Subtitles of lectures: lines with -> go, since they hold times; the rest is treated as subtitles are."""
    return _subtitles("\n".join(line for line in text.split("\n") if "->" not in html.unescape(line)))


def _cbt(text: str) -> Iterator[str]:
    """Children's books: the Penn Treebank's brackets and quotes become ordinary ones, and lines are tidied."""
    for penn, character in _PENN.items():
        text = text.replace(penn, character)
    return (tidied(line) for line in text.split("\n"))


def _gutenberg(text: str) -> Iterator[str]:
    """Books: lines are repaired, a wrapped paragraph becomes one line, and the two or more blank lines between chapters
    become one."""
    for chapter in re.split(r"\n(?:[ \t]*\n){2,}", text.strip("\n")):
        lines: list[str] = []
        for paragraph in re.split(r"\n[ \t]*\n", chapter):
            lines = paragraph.split("\n")
            wrapped = max(map(len, lines)) <= WRAPPED
            yield from map(repaired, [paragraph] if wrapped else lines)
        if len(lines) > 1:  # A heading stays with what follows it.
            yield ""


def _simple_wikipedia(text: str) -> Iterator[str]:
    """Simple Wikipedia: lines are repaired, references such as [12] go, headings become their text, and articles about
    places that consist of one line go with their titles."""
    kept: list[str] = []
    for line in text.split("\n"):
        line = _heading(repaired(re.sub(r"\[\d+\]", "", line)))
        if len(line) < 128 and _PLACES.search(line):
            if kept and kept[-1]:
                kept.pop()  # The article's title goes.
        elif line or (kept and kept[-1]):
            kept.append(line)
    return iter(kept)


def _wikipedia(text: str) -> Iterator[str]:
    """Wikipedia: lines are repaired, references, categories and file links go, other links and headings become their
    text, and a blank line stands before each article."""
    for line in text.split("\n"):
        line = repaired(line)
        if not line or line.startswith(("[[Category:", "[[File:")):
            continue
        if line.startswith("= = = "):
            yield ""
        yield _heading(re.sub(r"\[\[([^|\]]*)\|*[^\]]*\]\]", r"\1", re.sub(r"\[\d+\]", "", line)))


def _heading(line: str) -> str:
    return re.sub(r"= = = ([^=]*) = = =", r"\1", line)


# Each takes the text of a whole file and yields the lines of the normalised text.
NORMALIZERS: dict[str, Callable[[str], Iterator[str]]] = {
    "aochildes": _talk,
    "bnc_spoken": _talk,
    "cbt": _cbt,
    "children_stories": lambda text: map(repaired, text.split("\n")),
    "gutenberg": _gutenberg,
    "open_subtitles": _subtitles,
    "qed": _qed,
    "simple_wikipedia": _simple_wikipedia,
    "switchboard": _subtitles,
    "wikipedia": _wikipedia,
}
