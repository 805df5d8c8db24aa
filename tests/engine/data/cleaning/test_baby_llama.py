import pytest

from engine.data.cleaning.baby_llama import CLEANERS, cleaner_for


@pytest.mark.parametrize(
    ("name", "text", "cleaned", "with_quirks"),
    [
        ("aochildes", "a  b\t c\xa0 .\n\nyes !\n", "a b c.\n\nyes!\n", "a b c.\n\nyes!\n"),
        ("bnc_spoken", "a  b .\n\nc ?\n", "a b.\n\nc?\n", "a b.c?\n"),
        ("cbt", "the dog 's  bone , I 'm\n", "the dog's bone, I'm\n", "the dog's bone, I'm\n"),
        ("open_subtitles", "hi\nSubTitles by Ann\nbye\n", "hi\nbye\n", "hi\nbye\n"),
        ("qed", "WHAT lS IT? l KNOW. \nIt is", "What is it? I know.\nIt is", "What is it? I know.\nIt is"),
        # 6 capitals: 6 of 10 letters, 6 of 13 characters
        ("qed", "IT IS ON yes i", "It is on yes i", "IT IS ON yes i"),
        ("qed", "(LAUGHS)\n...\nok", "(LAUGHS)\n...\nok", "(LAUGHS)\n...\nok"),
        ("simple_wikipedia", "A\nb\n\nC\n", "A\nb\n\nC\n", "A\nbC\n"),
        (
            "wikipedia",
            "= = = Cat = = =\n A cat. \n\nIt eats.\n\n\n= = = Dog = = =\nA dog.\n",
            "Cat\nA cat.\n\nIt eats.\n\n\nDog\nA dog.",
            "at A cat.It eats.\nDogA dog.",
        ),
        *((name, *[" a  b .\n\nc\n"] * 3) for name in ("children_stories", "gutenberg", "switchboard")),
    ],
)
def test_each_cleaner_does_what_is_published(name: str, text: str, cleaned: str, with_quirks: str):
    assert CLEANERS[name](text, False) == cleaned
    assert CLEANERS[name](text, True) == with_quirks


def test_the_cleaner_is_chosen_by_file_name():
    assert all(cleaner_for(name) == name for name in CLEANERS)
    assert cleaner_for("childes_aochildes") == cleaner_for("childes") == "aochildes"
    assert cleaner_for("Simple_Wiki") == "simple_wikipedia"
    assert cleaner_for("podcasts") is None
