"""Trains and reads tokenizers: sentencepiece BPE with byte fallback, or byte-level BPE as in Baby Llama.

Both kinds are trained into one file, `tokenizer.json`, and read back by one library (Hugging Face's `tokenizers`), so
the engine and an exported folder give the same ids by construction.

`normalize` applies Unicode's NFKC to a text before it is cut into tokens, and more for
  sentencepiece  It makes several spaces one, removes spaces at the ends of a line or field, and replaces U+2581, which
                 stands for a space inside tokens, by a space.
  byte-bpe       It removes one leading space.
With `lowercase`, each character becomes small by itself after NFKC: there is no final sigma.

With sentencepiece, a newline and a tab are tokens of their own, and what follows them is cut as a whole text is. A
line, or what a speaker says after `*MOT:\\t`, therefore begins with the same tokens as a sentence that is scored alone.
byte-bpe, as in the paper, cuts a whole text at once: only its first word gets the leading space.
"""

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.config.settings import TokenizerConfig
from engine.system.errors import UserError

PAD, BOUNDARY, UNKNOWN, END, MASK = "<pad>", "<s>", "<unk>", "</s>", "<mask>"
SPACE = "\u2581"  # sentencepiece's mark for a space, in front of every word.
FIELD_ENDS = ("\n", "\t")
FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer:
    """A trained tokenizer.

    `boundary`, `end` and `mask` are the ids of the tokens that stand between texts, at the end of one and for a hidden
    token, or None where it has no such token. `special` holds the ids of all special tokens, `hash` is the SHA-256 of
    the definition. Special tokens are never read out of text: "<s>" in a text is three ordinary characters.
    """

    def __init__(self, definition: str, settings: str) -> None:
        """Takes the contents of `tokenizer.json` and `tokenizer_config.json`."""
        self._files = dict(zip(FILES, (definition, settings), strict=True))
        self._backend = tokenizers.Tokenizer.from_str(definition)
        self._backend.encode_special_tokens = True
        self.vocab_size = self._backend.get_vocab_size()
        self.hash = hashlib.sha256(definition.encode()).hexdigest()
        self.special = frozenset(i for i, t in self._backend.get_added_tokens_decoder().items() if t.special)
        self.boundary, self.end, self.mask = (self._id_of(json.loads(settings), x) for x in ("bos", "eos", "mask"))

    def _id_of(self, settings: dict[str, Any], role: str) -> int | None:
        token = settings.get(f"{role}_token")
        content = token["content"] if isinstance(token, dict) else token  # transformers 4 writes a dictionary.
        return None if content is None else self._backend.token_to_id(content)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without a boundary token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without boundary tokens; uses all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without special tokens: `decode(encode(text)) == normalize(text, config)`."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def surfaces(self) -> list[str]:
        """Returns what each token adds to a text that it follows: "" for special tokens, spaces as spaces."""
        anchor = next(i for i in map(self._backend.token_to_id, ("a", "<0x61>")) if i is not None)
        texts = self._backend.decode_batch([[anchor, i] for i in range(self.vocab_size)], skip_special_tokens=True)
        return [text[1:] for text in texts]

    def export(self, folder: Path) -> None:
        """Writes the files from which `transformers.AutoTokenizer` makes a fast tokenizer with the same ids.

        The fast tokenizer puts the boundary token, where there is one, in front of a sentence and between those of a
        pair. The boundary is both its `bos_token` and its `eos_token`, since it is trained to stand at either end.
        """
        for name, content in self._files.items():
            (folder / name).write_text(content, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `train` or `Tokenizer.export` wrote; UserError where it is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; name a folder that recipes/prepare.py or an export wrote")
    return Tokenizer(*((folder / name).read_text(encoding="utf-8") for name in FILES))


def train(texts: Iterable[str], config: TokenizerConfig, vocab_size: int, folder: Path, *, boundary: bool) -> Tokenizer:
    """Returns a tokenizer of exactly `vocab_size` tokens, trained on `texts`, whose files it writes into `folder`.

    A text is a document, with its lines separated by newlines. The same texts give the same tokenizer. For
    sentencepiece, `sentencepiece.model` is kept beside the files of `Tokenizer.export`: it cuts each normalized line or
    field into the same ids, and knows nothing of newlines. Raises UserError where the text does not allow so many
    tokens, or so few, and names the bound.
    """
    if config.kind == "sentencepiece":
        fields = (field for text in texts for field in re.split(r"[\n\t]", normalize(text, config)) if field)
        model = _train_sentencepiece(fields, vocab_size, boundary, mask=config.mask)
        backend = _from_sentencepiece(model, config)
        (folder / "sentencepiece.model").write_bytes(model)
    else:
        backend = _train_byte_bpe(texts, config, vocab_size)
    specials = [t for t in (PAD, BOUNDARY, UNKNOWN, END, MASK) if backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if boundary:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOUNDARY} $A",
            pair=f"{BOUNDARY} $A {BOUNDARY} $B:0",
            special_tokens=[(BOUNDARY, backend.token_to_id(BOUNDARY))],
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOUNDARY if boundary else None,
        "eos_token": BOUNDARY if boundary else None,
        "pad_token": PAD,
        **({"mask_token": MASK} if config.mask else {}),
        "split_special_tokens": True,  # As in Tokenizer, "<s>" in a text is not the boundary.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    tokenizer = Tokenizer(backend.to_str(), json.dumps(settings, indent=2) + "\n")
    tokenizer.export(folder)
    return tokenizer


def normalize(text: str, config: TokenizerConfig) -> str:
    """Returns the text that the tokenizer cuts and that decoding gives back; the top of this file explains it."""
    text = unicodedata.normalize("NFKC", text)
    if config.lowercase:
        text = "".join(map(str.lower, text))
    if config.kind == "byte-bpe":
        return text.removeprefix(" ")
    return re.sub(r" *([\n\t]) *", r"\1", re.sub(r" {2,}", " ", text.replace(SPACE, " "))).strip(" ")


def _train_sentencepiece(fields: Iterator[str], vocab_size: int, boundary: bool, *, mask: bool) -> bytes:
    """Returns the trained model's file. With a mask, the padding token has id 1, as in RoBERTa."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=fields,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,  # Share of the text whose characters become tokens; rarer ones become bytes.
            normalization_rule_name="identity",  # `normalize` has done it.
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # In bytes: longer lines would be left out silently.
            user_defined_symbols=list(FIELD_ENDS),
            control_symbols=[MASK] if mask else [],
            pad_id=int(mask),
            bos_id=1 - mask if boundary else -1,
            unk_id=2 if boundary else 1 - mask,  # sentencepiece requires one; with byte fallback it never occurs.
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if bound := re.search(r"too high .*<= (\d+)", str(error)):
            raise _too_many(vocab_size, int(bound[1])) from None
        if bound := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise _too_few(vocab_size, int(bound[1])) from None
        raise
    return model.getvalue()


def _from_sentencepiece(model: bytes, config: TokenizerConfig) -> tokenizers.Tokenizer:
    """Returns a `tokenizers` pipeline that cuts text as the sentencepiece model does.

    sentencepiece joins the neighbours whose concatenation is the best-ranked token. A BPE with a list of merges does
    the same if the list has every split of every token into two tokens, those of better-ranked tokens first.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.IdToPiece(i): i for i in range(processor.GetPieceSize())}
    merges = []
    for token in sorted(vocabulary, key=lambda t: -processor.GetScore(vocabulary[t])):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [split for split in splits if all(part in vocabulary for part in split)]
        merges += sorted(known, key=lambda split: [vocabulary[part] for part in split])
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=UNKNOWN, fuse_unk=False)
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            *([normalizers.Lowercase()] if config.lowercase else []),
            normalizers.Replace(SPACE, " "),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A | \z"), ""),
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            *(decoders.Replace(f"{end} ", end) for end in FIELD_ENDS),
        ]
    )
    # Added tokens are cut out before anything else, so the pipeline above runs on one line or field at a time.
    backend.add_tokens([AddedToken(end, normalized=False) for end in FIELD_ENDS])
    return backend


def _train_byte_bpe(texts: Iterable[str], config: TokenizerConfig, vocab_size: int) -> tokenizers.Tokenizer:
    """Returns the tokenizer of Baby Llama's notebook, but with all 256 bytes in its alphabet.

    The notebook's alphabet holds only the bytes of its training text, and other bytes are lost.
    """
    specials = [BOUNDARY, PAD, END, MASK] if config.mask else [PAD, BOUNDARY, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(specials) + len(alphabet):
        raise _too_few(vocab_size, len(specials) + len(alphabet))
    backend = tokenizers.Tokenizer(models.BPE())
    nfkc = normalizers.NFKC()
    backend.normalizer = normalizers.Sequence([nfkc, normalizers.Lowercase()]) if config.lowercase else nfkc
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    if backend.get_vocab_size() < vocab_size:
        raise _too_many(vocab_size, backend.get_vocab_size())
    return backend


def _too_many(vocab_size: int, bound: int) -> UserError:
    return UserError(f"data.tokenizer.vocab_size={vocab_size}: the training text allows {bound} at most; ask for fewer")


def _too_few(vocab_size: int, bound: int) -> UserError:
    return UserError(
        f"data.tokenizer.vocab_size={vocab_size}: bytes, characters and special tokens need {bound}; ask for more"
    )
