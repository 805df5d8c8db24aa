"""Turns text into token files: reads, cleans, splits into documents, holds some out, trains a tokenizer and encodes.

A prepared folder holds
  train.bin, validation.bin   token ids, little-endian uint16 (uint32 where the vocabulary has more than 65,536), one
                              document after another, each behind a boundary token, or before a blank line without one
  minimal_pairs.jsonl         generated sentence_good, sentence_bad, phenomenon; none is a line of the training text
  tokenizer/                  what engine.data.tokenizer.load reads
  manifest.json               the source, the settings, counts, and a hash of every file
Its name is the source's name and the first digits of a hash over the settings and the text, so the same settings and
text find the same folder.

Words are white-space tokens of the cleaned text (`words_in_source`: of the text before). Boundaries count as tokens.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from engine.config.loading import as_dict, build, flatten
from engine.config.settings import DataConfig
from engine.data import sources
from engine.data import tokenizer as tokenization
from engine.data.cleaning.babies import NORMALIZERS
from engine.data.cleaning.baby_llama import CLEANERS, cleaner_for
from engine.data.grammar import generator as grammar
from engine.data.split import Document, Splits, split
from engine.data.tokenizer import Tokenizer
from engine.system.errors import UserError
from engine.system.files import sha256, written_aside

FORMAT = 3  # Of the folder. It is raised when the same settings and text would give other files.
MANIFEST = "manifest.json"
SIXTEEN_BITS = 1 << 16  # The largest vocabulary whose ids fit into uint16.
BATCH_CHARACTERS = 1_000_000  # About so many characters are encoded at once.
PAIRS_PER_PHENOMENON = 100
COUNTS = ("documents", "lines", "words", "characters", "tokens")  # What is counted in a source file and in a split.

Log = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Token files ready to train on."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    identity: str  # A hash over the settings and the text that the folder was made from.
    train: Path  # The splits' token files.
    validation: Path
    pairs: Path  # The minimal pairs.


def prepare(config: DataConfig, *, log: Log = print) -> Prepared:
    """Returns the prepared folder for `config`, and makes it first where there is none.

    `log` is called with a line about each stage as it begins, and the slow ones show their progress where stderr is a
    terminal. Raises UserError, with nothing written, for text that is missing, empty, not UTF-8 or too short to hold
    any out, for a vocabulary size that the text does not allow, and for a prepared folder whose files have changed.
    """
    if (Path(config.path) / MANIFEST).is_file() and (Path(config.path) / "tokenizer").is_dir():
        return _open_named(config)
    if config.quirks and config.cleaner != "baby-llama":
        raise UserError(
            f"data.quirks=true: data.cleaner={config.cleaner} has no quirks; drop the setting, or set "
            "data.cleaner=baby-llama"
        )
    source = sources.find(config)
    tokenizer = replace(config.tokenizer, vocab_size=config.tokenizer.vocab_size or source.vocab_size)
    words = config.words or (sources.GRAMMAR_WORDS if config.path == "grammar" else None)
    config = replace(config, tokenizer=tokenizer, words=words)
    identity = _identity(config, source)
    folder = Path(config.folder) / f"{source.name}-{identity[:8]}"
    if folder.exists():
        prepared = _open(folder)
        log(f"{folder}: prepared already, from the same text with the same settings")
        return prepared

    log(f"{folder}: reading {len(source.files)} file(s)")
    texts, files = _read(source, config, log)
    limit = None if config.path == "grammar" else config.words
    splits = split(texts, validation=config.validation, seed=config.seed, words=limit)
    with written_aside(folder, keep_existing=True) as aside:
        manifest = {
            "format": FORMAT,
            "name": source.name,
            "identity": identity,
            "attribution": source.attribution,
            "licence": source.licence,
            "entropy_per_word": source.entropy_per_word,  # In nats.
            **_write(aside, splits, files, config, log),
            "sha256": {p.relative_to(aside).as_posix(): sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()},
            "config": as_dict(config),
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _open(folder)


def _open(folder: Path) -> Prepared:
    """Returns a prepared folder after checking every file against its hash; UserError where one differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, hashes = manifest["format"], manifest["sha256"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / MANIFEST}: missing or damaged; delete {folder} and prepare again") from None
    if version != FORMAT:
        raise UserError(f"{folder}: format {version}, this version reads {FORMAT}; delete it and prepare again")
    for name, digest in hashes.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: missing or changed since; delete {folder} and prepare again")
    return Prepared(
        folder,
        manifest,
        tokenization.load(folder / "tokenizer"),
        identity=manifest["identity"],
        train=folder / "train.bin",
        validation=folder / "validation.bin",
        pairs=folder / "minimal_pairs.jsonl",
    )


def _open_named(config: DataConfig) -> Prepared:
    """Returns the prepared folder that data.path names; UserError where a setting asks for something else."""
    prepared = _open(Path(config.path))
    default, asked, used = map(flatten, (DataConfig(), config, build(DataConfig, prepared.manifest["config"])))
    for key in asked.keys() - {"path", "folder"}:
        if asked[key] not in (default[key], used[key]):
            raise UserError(
                f"data.{key}={asked[key]}: {config.path} was prepared with {used[key]}; drop the setting, or prepare "
                "again from the text"
            )
    return prepared


def _identity(config: DataConfig, source: sources.Source) -> str:
    """Returns a hash over all that decides what is in the folder; where the text lies does not."""
    settings = {key: value for key, value in flatten(config).items() if key not in ("path", "folder")}
    content = {"format": FORMAT, "settings": settings, "files": {file.name: file.sha256 for file in source.files}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(source: sources.Source, config: DataConfig, log: Log) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Returns the cleaned text of each file, by name, and its entry in the manifest, without counts yet."""
    texts, files, unmatched = {}, [], []
    for file in source.files:
        text = file.read()
        entry = {"name": file.name, "sha256": file.sha256, "cleaner": None, "words_in_source": len(text.split())}
        if config.cleaner != "none":
            entry["cleaner"] = cleaner = cleaner_for(Path(file.name).stem)
            if cleaner is None:
                unmatched.append(file.name)
            elif config.cleaner == "babies":
                text = "\n".join(NORMALIZERS[cleaner](text))
            else:
                text = CLEANERS[cleaner](text, config.quirks)
        texts[file.name] = text
        files.append(entry)
    if unmatched:
        message = f"there is no cleaner for {', '.join(unmatched)} (cleaners: {', '.join(CLEANERS)})"
        if len(unmatched) == len(files):
            raise UserError(f"data.cleaner={config.cleaner}: {message}; rename the files or drop the setting")
        log(f"some files stay as they are: {message}")
    return texts, files


def _write(folder: Path, splits: Splits, files: list[dict[str, Any]], config: DataConfig, log: Log) -> dict[str, Any]:
    """Writes tokenizer, token files and minimal pairs; returns the manifest's entries about them."""
    vocab_size, words = config.tokenizer.vocab_size, sum(document.words for document in splits.train)
    assert vocab_size is not None
    log(f"training a tokenizer of {vocab_size:,} tokens on {words:,} words")
    (folder / "tokenizer").mkdir(parents=True)
    texts = (document.text for document in _with_progress(splits.train, "training a tokenizer"))
    tokenizer = tokenization.train(texts, config.tokenizer, vocab_size, folder / "tokenizer", boundary=config.boundary)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= SIXTEEN_BITS else "<u4")
    counts = {}
    for name, documents in splits._asdict().items():
        log(f"encoding {len(documents):,} documents for {name}")
        counts[name] = _encode(documents, len(files), tokenizer, dtype, folder / f"{name}.bin")
    _write_pairs(splits.train, config.seed, folder / "minimal_pairs.jsonl")
    return {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "boundary": tokenizer.boundary,
        "tokenizer": tokenizer.hash,
        "splits": {name: _named(by_file.sum(axis=0)) for name, by_file in counts.items()},
        "files": [file | _named(row) for file, row in zip(files, np.sum(list(counts.values()), axis=0), strict=True)],
    }


def _named(counts: np.ndarray) -> dict[str, int]:
    return dict(zip(COUNTS, counts.tolist(), strict=True))


def _encode(documents: list[Document], files: int, tokenizer: Tokenizer, dtype: np.dtype, path: Path) -> np.ndarray:
    """Writes a split's token file and returns its counts, int64 [files, COUNTS]."""
    before, after = ([], "\n\n") if tokenizer.boundary is None else ([tokenizer.boundary], "")
    counts = np.zeros((files, len(COUNTS)), np.int64)
    ends = accumulate(len(document.text) for document in documents)
    shown = _with_progress(documents, f"encoding {path.stem}")
    with path.open("wb") as stream:
        for _, group in groupby(shown, key=lambda _: next(ends) // BATCH_CHARACTERS):
            batch = list(group)
            for document, ids in zip(batch, tokenizer.encode_batch([d.text + after for d in batch]), strict=True):
                tokens = np.array(before + ids, dtype)
                stream.write(tokens.tobytes())
                lines = document.text.count("\n") + 1
                counts[document.file] += (1, lines, document.words, len(document.text), len(tokens))
    return counts


def _with_progress(documents: list[Document], stage: str) -> Iterable[Document]:
    """Returns the documents; where stderr is a terminal, a bar on it shows how many of them have been read."""
    return track(documents, stage, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _write_pairs(documents: list[Document], seed: int, path: Path) -> None:
    """Writes minimal pairs of which no line is in the documents."""
    training_lines = {line.strip() for document in documents for line in document.text.split("\n")}
    with path.open("w", encoding="utf-8") as file:
        for pair in grammar.minimal_pairs(seed, PAIRS_PER_PHENOMENON, training_lines):
            record = {"sentence_good": pair.good, "sentence_bad": pair.bad, "phenomenon": pair.phenomenon}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
