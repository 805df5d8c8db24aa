import random

import pytest

from engine.data.split import BLOCK_WORDS, Document, cut, split
from engine.system.errors import UserError


def text(documents: int, lines: int, seed: int = 0) -> str:
    """Returns documents of lines of 2 to 21 words, no line twice."""
    rng = random.Random(seed)
    return "\n\n".join(
        "\n".join(f"w{seed}.{d}.{n} " + "word " * rng.randrange(20) + "end" for n in range(lines))
        for d in range(documents)
    )


TEXTS = {"dialogues": text(40, 30), "book": text(1, 3000, 1), "tiny": "one\ntwo", "notes": "a b c\n\nd e f\n\ng h i"}


def lines(documents: list[Document]) -> list[str]:
    return [line for document in documents for line in document.text.split("\n")]


def test_every_line_is_in_one_split_and_every_file_in_both():
    splits = split(TEXTS, validation=0.05, seed=0, words=None)
    source = [line for t in TEXTS.values() for line in t.split("\n") if line]
    assert sorted(lines(splits.train) + lines(splits.validation)) == sorted(source)
    for documents in splits:
        assert {document.file for document in documents} == set(range(len(TEXTS)))
        assert all(document.words == len(document.text.split()) for document in documents)
    for file in (0, 1):
        held_out, rest = (sum(d.words for d in documents if d.file == file) for documents in reversed(splits))
        assert held_out / (held_out + rest) == pytest.approx(0.05, abs=0.005)


def test_held_out_text_comes_from_all_over_a_long_document():
    held_out = split({"book": TEXTS["book"]}, validation=0.2, seed=0, words=None).validation
    assert len(held_out) >= 2
    assert max(document.words for document in held_out) <= 3 * BLOCK_WORDS  # Neighbours may both be drawn.


def test_the_draw_depends_on_the_seed_and_nothing_else():
    first, again, other = (split(TEXTS, validation=0.1, seed=seed, words=None) for seed in (1, 1, 2))
    assert first == again
    assert first.validation != other.validation
    alone = split({"dialogues": TEXTS["dialogues"]}, validation=0.1, seed=1, words=None)
    assert alone.validation == [document for document in first.validation if document.file == 0]


def test_a_limit_takes_from_every_file_in_proportion():
    total = {name: len(t.split()) for name, t in TEXTS.items()}
    words = sum(total.values()) // 3
    splits = split(TEXTS, validation=0.05, seed=0, words=words)
    used = [sum(d.words for documents in splits for d in documents if d.file == file) for file in range(len(TEXTS))]
    assert 0.97 * words <= sum(used) <= words
    assert used[0] / used[1] == pytest.approx(total["dialogues"] / total["book"], rel=0.05)
    assert set(lines(splits.train)).isdisjoint(lines(splits.validation))


def test_the_held_out_share_is_the_nearest_that_whole_documents_allow():
    documents = "\n\n".join([" ".join("abcdefghij")] * 4)
    for share, held_out in ((0.3, 10), (0.4, 20), (0.6, 20), (0.65, 30)):
        splits = split({"even": documents}, validation=share, seed=0, words=None)
        assert sum(document.words for document in splits.validation) == held_out


def test_documents_are_cut_at_blank_lines_and_long_ones_at_line_ends():
    blocks = cut("a b\nc\n\n\n \nd e f\ng h\ni\nj k l m n o p q r\n", limit=6)
    assert [(b.document, b.text, b.words) for b in blocks] == [
        (0, "a b\nc", 3),
        (1, "d e f\ng h", 5),
        (1, "i", 1),
        (1, "j k l m n o p q r", 9),
    ]


def test_text_too_short_to_hold_any_out_is_an_error():
    with pytest.raises(UserError, match=r"too few lines to hold data\.validation=0\.5 out"):
        split({"line": "only one line"}, validation=0.5, seed=0, words=None)
