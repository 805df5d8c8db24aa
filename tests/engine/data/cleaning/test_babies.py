import pytest

from engine.data.cleaning.babies import NORMALIZERS, repaired, tidied
from engine.data.cleaning.baby_llama import CLEANERS


@pytest.mark.parametrize(
    ("name", "text", "normalized"),
    [
        ("aochildes", "look at  that .\nlook at that .\n\nlook at that .", '"Look at that."\n\n"Look at that."'),
        ("aochildes", "*MOT:\tlook: one\n*CHI:\t0", '"Look: one"\n"0"'),
        ("bnc_spoken", "yes\n.\ndo n't , please", '"Yes"\n"Don\'t, please"'),
        ("cbt", "`` I 'm here , '' said she -LRB- soft -RRB- .", '"I\'m here," said she (soft).'),
        (
            "open_subtitles",
            '- Who?\n-Who?\n(LAUGHS)\nJOHN:\n[door]\nHe said "no"\nNo',
            '"Who?"\n(LAUGHS)\nJOHN:\n[door]\nHe said "no"\n"No"',
        ),
        ("qed", "So\n00:01 --&gt; 00:02\nThen", '"So"\n"Then"'),
        ("switchboard", "A:\t- uh-huh\nB:\tuh-huh\nright", '"uh-huh"\n"right"'),
        ("gutenberg", "ONE\n\n\nIt was\n a night.\n\nIt\nended.\n\n\nTWO", "ONE\nIt was a night.\nIt ended.\n\nTWO"),
        ("gutenberg", f"{'It was' * 30}.\nIt ended.", f"{'It was' * 30}.\nIt ended.\n"),
        (
            "simple_wikipedia",
            "= = = Apt = = =\nApt is a commune. It is old.\n\n= = = Cat = = =\nA cat[12] is &lt;small&gt;.\n\n\nDog",
            "Cat\nA cat is <small>.\n\nDog",
        ),
        (
            "wikipedia",
            "= = = Cat = = =\nA [[cat|cats]] eats[3].\n\n[[Category:Cats]]\n= = = Dog = = =\nIt barks.",
            "\nCat\nA cat eats.\n\nDog\nIt barks.",
        ),
        ("children_stories", "    Once  upon\n\na time", "Once upon\n\na time"),
    ],
)
def test_each_corpus_is_normalised_in_its_own_way(name: str, text: str, normalized: str) -> None:
    assert "\n".join(NORMALIZERS[name](text)) == normalized


def test_every_corpus_that_has_a_cleaner_has_a_normaliser() -> None:
    assert NORMALIZERS.keys() == CLEANERS.keys()


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("cafÃ© isnâ€™t", "café isn't"),
        ("â€œyesâ€\x9d", '"yes"'),
        ("naïve coöperation, ÄÖÜ", "naïve coöperation, ÄÖÜ"),
        ("日本語", "日本語"),
        ("a &amp; b, x &lt; y", "a & b, x < y"),
        ("<b>&amp;</b>", "<b>&amp;</b>"),
        ("e\u0301\x00\u00a0 \tx", "é x"),
    ],
)
def test_characters_are_repaired(broken: str, whole: str) -> None:
    assert repaired(broken) == whole


@pytest.mark.parametrize(
    ("loose", "tidy"),
    [
        ("Yes.And the U.S.A.", "Yes. And the U.S.A."),
        ("why?no ( a ) at 10:30", "why? no (a) at 10:30"),
        ("$ 5 , 20 % :one", "$5, 20%: one"),
        ('he said" no "and left', 'he said "no" and left'),
        ('"One", he said. 5" wide', '"One," he said. 5" wide'),  # quotes that are no pairs stay
        ("we 'll see—they 've won…", "we'll see - they've won..."),
    ],
)
def test_spaces_stand_where_they_should(loose: str, tidy: str) -> None:
    assert tidied(loose) == tidy
