"""The text normalisation of When Babies Teach Babies (Iyer 2024), by the name of the corpus.

By its description that of ELC-BERT (Charpentier & Samuel 2023, `preprocess/` of its repository): characters repaired as
by ftfy, punctuation as by Moses, what people say in quotes, a line that repeats the one before gone. In our own lines:

  aochildes, bnc_spoken   spacing, contractions, quotes and punctuation; each line an utterance: "Like this."; speakers'
                          labels (*MOT:, A:) go, here and in switchboard, as in its own preprocess.py
  cbt                     the same, brackets and quotes restored from the Penn Treebank's; no utterances
  open_subtitles, qed, switchboard   repaired; each line an utterance, but for speakers' names and what is in brackets;
                          in qed lines with -> (times) go
  gutenberg               repaired; a wrapped paragraph is one line, two blank lines between chapters are one
  simple_wikipedia        repaired; [12] goes, and so do one-line articles about places; headings are their text
  wikipedia               repaired; so are headings and links here, and [12] goes; articles begin behind a blank line
  children_stories        repaired

Not theirs: initials (U.S.) stay together, a file's last paragraph is kept, and lines do not begin with [TAB].
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

WRAPPED = 100  # characters: paragraphs with no longer line are taken for wrapped
_STRAIGHT = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")
_CONTROL = {code: None for code in (*range(9), 11, *range(14, 32), 127, 0xFEFF)}
_MOSES = str.maketrans({"–": "-", "—": " - ", "…": "...", "´": "'", "`": "'", "«": '"', "»": '"', "\u00a0": " "})
_OPENING = r"(\[{"
_SPACES = [  # what stands for what, in turn
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
_LOOSE = re.compile(r" (?:n't|[^\w\s([{\"])|[^\w\s'\"]\S|[([{$£€] ", re.IGNORECASE)  # where some of them may apply
_PLACES = re.compile(r"is a (?:commune\. It is|commune found|city in|village in|municipality in|town in)")
_PENN = {"-LRB-": "(", "-LCB-": "{", "-LSB-": "[", "-RRB-": ")", "-RCB-": "}", "-RSB-": "]"}
_PENN |= {"`` ": '"', "``": '"', " ''": '"', "''": '"'}


def normalize(text: str, name: str) -> str:
    """`text`, a whole file, as the corpus called `name` (one of engine.data.cleaning.baby_llama.CLEANERS) is normalised."""
    return "\n".join(NORMALIZERS[name](text))


def repaired(line: str) -> str:
    """Text read in the wrong encoding is read again, HTML's entities are characters, quotes straight, spaces single."""
    line = line if "<" in line else html.unescape(line)
    line = re.sub(r"[^\x00-\x7f]{2,}", _read_again, line)
    return " ".join(unicodedata.normalize("NFC", line.translate(_STRAIGHT).translate(_CONTROL)).split())


def tidied(line: str) -> str:
    """`repaired`; spaces stand where they should around punctuation, in contractions and in quotes."""
    line = " ".join(repaired(line).translate(_MOSES).split())
    if _LOOSE.search(line):
        for pattern, replacement in _SPACES:
            line = re.sub(pattern, replacement, line)
    return re.sub(r'"([,.]+)', r'\1"', _quotes(line)).strip() if '"' in line else line.strip()


def _read_again(match: re.Match[str]) -> str:
    """UTF-8 that was read as Windows-1252 (or, where that has no character, Latin-1); anything else stays."""
    try:
        return b"".join(c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in match[0]).decode()
    except UnicodeError:
        return match[0]


def _quotes(line: str) -> str:
    """Where quotes come in pairs: a space before the first and behind the second, none inside."""
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


def _once(lines: Iterable[str]) -> Iterator[str]:
    """Without those that repeat the one before."""
    before = None
    for line in lines:
        if line != before:
            yield line
        before = line


def _talk(text: str) -> Iterator[str]:
    lines = (tidied(line) for line in _LABEL.sub("", text).split("\n"))
    return _once(f'"{line[0].upper()}{line[1:]}"' if line else "" for line in lines if line not in (".", "!", "?"))


def _subtitles(text: str) -> Iterator[str]:
    lines = (repaired(re.sub(r"^\s*- ?", "", line)) for line in _LABEL.sub("", text).split("\n"))
    return _once(line if _no_utterance(line) else f'"{line}"' for line in lines)


def _no_utterance(line: str) -> bool:
    brackets = (line[:1], line[-1:]) in (("(", ")"), ("[", "]"), ("{", "}"))
    return not line or brackets or line.endswith((":", '"')) or line.startswith('"')


def _qed(text: str) -> Iterator[str]:
    return _subtitles("\n".join(line for line in text.split("\n") if "->" not in html.unescape(line)))


def _cbt(text: str) -> Iterator[str]:
    for penn, character in _PENN.items():
        text = text.replace(penn, character)
    return (tidied(line) for line in text.split("\n"))


def _gutenberg(text: str) -> Iterator[str]:
    for chapter in re.split(r"\n(?:[ \t]*\n){2,}", text.strip("\n")):
        lines: list[str] = []
        for paragraph in re.split(r"\n[ \t]*\n", chapter):
            lines = paragraph.split("\n")
            wrapped = max(map(len, lines)) <= WRAPPED
            yield from map(repaired, [paragraph] if wrapped else lines)
        if len(lines) > 1:  # a heading stays with what follows it
            yield ""


def _simple_wikipedia(text: str) -> Iterator[str]:
    kept: list[str] = []
    for line in text.split("\n"):
        line = _heading(repaired(re.sub(r"\[\d+\]", "", line)))
        if len(line) < 128 and _PLACES.search(line):
            if kept and kept[-1]:
                kept.pop()  # the article's title
        elif line or (kept and kept[-1]):
            kept.append(line)
    return iter(kept)


def _wikipedia(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        line = repaired(line)
        if not line or line.startswith(("[[Category:", "[[File:")):
            continue
        if line.startswith("= = = "):
            yield ""
        yield _heading(re.sub(r"\[\[([^|\]]*)\|*[^\]]*\]\]", r"\1", re.sub(r"\[\d+\]", "", line)))


def _heading(line: str) -> str:
    return re.sub(r"= = = ([^=]*) = = =", r"\1", line)


def _lines(text: str) -> Iterator[str]:
    return (repaired(line) for line in text.split("\n"))


NORMALIZERS: dict[str, Callable[[str], Iterator[str]]] = {
    "aochildes": _talk,
    "bnc_spoken": _talk,
    "cbt": _cbt,
    "children_stories": _lines,
    "gutenberg": _gutenberg,
    "open_subtitles": _subtitles,
    "qed": _qed,
    "simple_wikipedia": _simple_wikipedia,
    "switchboard": _subtitles,
    "wikipedia": _wikipedia,
}
