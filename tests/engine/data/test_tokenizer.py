import json
import re
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from engine.config.settings import TokenizerConfig
from engine.data import tokenizer as tokenization
from engine.data.grammar import generator as grammar
from engine.data.tokenizer import Tokenizer, load, normalize, train
from engine.system.errors import UserError

LINES, VOCAB_SIZE = 10_200, 700
ODD = [
    "", " ", "a", " a", "a ", "  two  spaces  ", "a\nb", "\na", "a\n", "\n\n", "\t", "a\tb", "a \n b", "a\n\n b",
    "A: How are you?\nB: I'm fine.", "*MOT:\tyou  see\n*CHI:\txxx .", "ﬁne ﬀ ½ ① ﷺ", "Å e\u0301 e\u0301\u0323 각",
    "🙂 hi🙂", "\x00a\x01\x02\x7f", "<s> hi <pad></s><unk>", "<0x0A>", "a\u2581b", "\u00a0a\u00a0 b\u3000c",
    "\u2028x\u0085y\u200bz", "\r\nx", "שלום عربي 中文", "aaaaaaaaa", "don't I'll", "\uffff", "x" * 500,
]  # fmt: skip
KINDS = [TokenizerConfig("sentencepiece"), TokenizerConfig("byte-bpe")]


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest) -> list[str]:
    """Returns lines of every file of the corpus, spread evenly over it; of the grammar where there is no corpus."""
    try:
        files = [f.read_text(encoding="utf-8").split("\n") for f in request.getfixturevalue("corpus").glob("*.txt")]
    except pytest.skip.Exception:
        files = ["\n".join(grammar.generate(0, 80_000)).split("\n")]
    share = -(-LINES // len(files))
    return [line for file in files for line in islice((x for x in file if x), 0, None, max(1, len(file) // share))]


@pytest.fixture(scope="module", params=KINDS, ids=lambda c: c.kind)
def trained(request: pytest.FixtureRequest, lines: list[str], tmp_path_factory) -> tuple[TokenizerConfig, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(["\n".join(lines[::5])], request.param, VOCAB_SIZE, folder, boundary=True)
    return request.param, folder


def small(folder: Path, boundary: bool = True, **settings) -> Tokenizer:
    return train(["the dog sees the cat\nit is fine"] * 9, TokenizerConfig(**settings), 275, folder, boundary=boundary)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
@pytest.mark.parametrize("boundary", [True, False])
def test_a_mask_token_and_roberta_s_padding(kind, boundary: bool, tmp_path: Path):
    tokenizer = small(tmp_path, boundary, kind=kind, mask=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == 1, "Hugging Face counts RoBERTa's positions from it"
    assert theirs.mask_token_id == tokenizer.mask
    assert tokenizer.vocab_size == len(theirs) == 275
    assert {tokenizer.mask, 1} <= tokenizer.special
    assert {theirs.convert_ids_to_tokens(i) for i in tokenizer.special} <= {"<s>", "<pad>", "</s>", "<unk>", "<mask>"}
    assert tokenizer.mask not in tokenizer.encode("a <mask> is ordinary text")
    assert tokenizer.decode(tokenizer.encode("a <mask>")) == "a <mask>"
    assert [tokenizer.surfaces()[i] for i in sorted(tokenizer.special)] == [""] * len(tokenizer.special)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
def test_lowercase(kind, tmp_path: Path):
    config = TokenizerConfig(kind=kind, lowercase=True)
    tokenizer = small(tmp_path, **vars(config))
    for text in [*ODD, "The DOG", "İstanbul", "ΟΔΟΣ", "Ⅷ", "ẞ"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normalize(text, config), text
    assert tokenizer.encode("The DOG") == tokenizer.encode("the dog")


def test_the_exported_tokenizer_gives_the_same_ids(trained, lines: list[str], tmp_path: Path):
    _, folder = trained
    tokenizer = load(folder)
    tokenizer.export(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.is_fast
    assert len(exported) == tokenizer.vocab_size == VOCAB_SIZE
    assert exported.bos_token_id == exported.eos_token_id == tokenizer.boundary == 1
    assert len(lines) >= 10_000
    texts = lines + ODD + ["\n".join(lines[i : i + 3]) for i in range(0, 300, 3)]
    ids = tokenizer.encode_batch(texts)
    assert exported(texts, add_special_tokens=False)["input_ids"] == ids
    assert exported(texts[-200:])["input_ids"] == [[1, *sentence] for sentence in ids[-200:]]
    assert [tokenizer.encode(text) for text in texts[-200:]] == ids[-200:]
    assert exported("a", "b")["input_ids"] == [1, *tokenizer.encode("a"), 1, *tokenizer.encode("b")]
    assert "token_type_ids" not in exported("a", "b")


def test_decoding_gives_the_normalized_text(trained, lines: list[str]):
    config, folder = trained
    tokenizer = load(folder)
    for text in [*ODD, *lines[::10], "\n".join(lines[:50])]:
        assert tokenizer.decode(tokenizer.encode(text)) == normalize(text, config)


def test_offsets_point_at_the_text_of_each_token(trained, lines: list[str]):
    _, folder = trained
    exported = AutoTokenizer.from_pretrained(folder)
    for text in [x for x in lines[::50] if x.isascii()] + ["A: How are you?\nB:\tI am fine."]:
        encoded = exported(text, return_offsets_mapping=True, add_special_tokens=False)
        spans = [text[start:end].strip(" ") for start, end in encoded["offset_mapping"]]
        surfaces = [exported.decode([i]).strip(" ") for i in encoded["input_ids"]]
        # The space put in front has no place in the text; where it is a token, its offsets are its neighbour's.
        pairs = [(span, surface) for span, surface in zip(spans, surfaces, strict=True) if surface]
        assert [span for span, _ in pairs] == [surface for _, surface in pairs]


def test_lines_are_cut_as_sentencepiece_cuts_them(lines: list[str], tmp_path: Path):
    config = TokenizerConfig()
    tokenizer = train(["\n".join(lines[::5])], config, VOCAB_SIZE, tmp_path, boundary=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.model"))
    texts = lines + ODD
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        fields = [field for field in re.split(r"([\n\t])", normalize(text, config)) if field]
        assert ids == [i for f in fields for i in ([processor.PieceToId(f)] if f in "\n\t" else processor.Encode(f))]


def test_a_line_begins_as_a_text_does(tmp_path: Path):
    tokenizer = small(tmp_path)
    newline, tab = tokenizer.encode("\n"), tokenizer.encode("\t")
    assert len(newline) == len(tab) == 1
    assert tokenizer.encode("the dog\nit:\tthe cat") == [
        *tokenizer.encode("the dog"), *newline, *tokenizer.encode("it:"), *tab, *tokenizer.encode("the cat")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
def test_special_tokens_are_not_read_out_of_text(kind: str, tmp_path: Path):
    tokenizer = small(tmp_path, kind=kind)
    assert tokenizer.boundary == 1
    assert 1 not in tokenizer.encode("<s>a<s>")
    assert tokenizer.decode([1, *tokenizer.encode("<s>a"), 1]) == "<s>a"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
def test_without_a_boundary_none_is_put_in_front(kind: str, tmp_path: Path):
    tokenizer = small(tmp_path, boundary=False, kind=kind)
    assert tokenizer.boundary is None
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.bos_token is None
    assert exported("the dog\n🙂")["input_ids"] == tokenizer.encode("the dog\n🙂")


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
def test_the_same_text_gives_the_same_tokenizer(kind: str, tmp_path: Path):
    hashes = set()
    for name in "abc":
        (tmp_path / name).mkdir()
        text = list(grammar.generate(5 if name == "c" else 4, 5000))
        hashes.add(train(text, TokenizerConfig(kind), 400, tmp_path / name, boundary=True).hash)  # pyright: ignore[reportArgumentType]
        assert load(tmp_path / name).hash in hashes
    assert len(hashes) == 2


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
def test_a_vocabulary_the_text_does_not_allow_names_the_bound(kind: str, tmp_path: Path):
    config, text = TokenizerConfig(kind), ["the dog sees the cat", "the cat sees it"]  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        UserError, match=r"data\.tokenizer\.vocab_size=5000: the training text allows \d+ at most"
    ) as error:
        train(text, config, 5000, tmp_path, boundary=True)
    most = int(re.findall(r"\d+", str(error.value))[1])
    assert train(text, config, most, tmp_path, boundary=True).vocab_size == most
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size=100: .* need \d+") as error:
        train(text, config, 100, tmp_path, boundary=True)
    least = int(re.findall(r"\d+", str(error.value))[1])
    assert train(text, config, least, tmp_path, boundary=True).vocab_size == least


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"no tokenizer\.json; name a folder"):
        tokenization.load(tmp_path)
