"""Text to token files: read, clean, cut into documents, hold some out, train a tokenizer, encode, check.

A prepared folder holds
  train.bin, validation.bin   token ids, little-endian uint16 (uint32 for more than 65,536 pieces), one document after
                              another, each after the boundary token (without one: each before a blank line)
  minimal_pairs.jsonl         sentence_good, sentence_bad, phenomenon: generated, none a line of the training text
  tokenizer/                  what engine.data.tokenizer.load reads
  manifest.json               where it all comes from, counts, hashes
It is made aside and renamed into place, so it is whole or not there. Its name is the source's and the first digits of
a hash over the settings and the text; the same input finds it there.

Words are white-space tokens, after cleaning but for `words_in_source`; boundaries count as tokens.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress

from engine.config.loading import as_dict, build, flatten
from engine.config.settings import DataConfig
from engine.data import sources
from engine.data import tokenizer as tokenization
from engine.data.cleaning.babies import normalize
from engine.data.cleaning.baby_llama import CLEANERS, clean, cleaner_for
from engine.data.grammar import generator as grammar
from engine.data.split import Document, split
from engine.data.tokenizer import Tokenizer
from engine.system.errors import UserError

FORMAT = 1  # of the folder; raised when the same settings and text would give other files
MANIFEST = "manifest.json"
SIXTEEN_BITS = 1 << 16  # the most pieces whose ids fit
BATCH_CHARACTERS = 1_000_000  # encoded at once
PAIRS_PER_PHENOMENON = 100
LATER = ("tokenizer.lowercase", "tokenizer.mask")  # settings that older folders do not know, and are without
COUNTS = ("documents", "lines", "words", "characters", "tokens")  # of a source file and of a split

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Token files ready to train on."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def identity(self) -> str:
        """A hash over the settings and the text it was made from."""
        return self.manifest["identity"]

    @property
    def train(self) -> Path:
        return self.folder / "train.bin"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.bin"

    @property
    def pairs(self) -> Path:
        return self.folder / "minimal_pairs.jsonl"


def prepare(config: DataConfig, *, say: Say = print) -> Prepared:
    """The prepared folder for `config`, made if it is not there yet; says what it does and how long it takes.

    Raises ValueError, with nothing written, for text that is missing, empty, not UTF-8 or too short to hold any out,
    for a vocabulary the text does not allow, and where a prepared folder is not what was once written.
    """
    if (Path(config.path) / MANIFEST).is_file() and (Path(config.path) / "tokenizer").is_dir():
        return _open_given(config)
    if config.quirks and config.cleaner != "baby-llama":
        raise UserError(f"data.quirks=true: cleaner={config.cleaner} has none; drop it, or add data.cleaner=baby-llama")
    source = sources.find(config)
    vocab_size = config.tokenizer.vocab_size or source.vocab_size
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, vocab_size=vocab_size))
    if config.path == "grammar":
        config = dataclasses.replace(config, words=config.words or sources.GRAMMAR_WORDS)
    meaning = _meaning(config, {file.name: file.sha256 for file in source.files})
    identity = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
    folder = Path(config.folder) / f"{source.name}-{identity[:8]}"
    if folder.exists():
        prepared = _open(folder)
        say(f"{folder}: prepared already, from the same text with the same settings")
        return prepared
    _say_what_differs(meaning, source.name, folder, say)

    with _stage(f"reading {len(source.files)} file(s)", len(source.files), say) as advance:
        texts, files = _read(source, config, advance, say)
        limit = None if config.path == "grammar" else config.words
        splits = split(texts, validation=config.validation, seed=config.seed, words=limit)
    with _aside(folder) as aside:
        tokenizer = _train_tokenizer(splits.train, config, vocab_size, aside / "tokenizer", say)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= SIXTEEN_BITS else "<u4")
        counts = {
            name: _encode(documents, tokenizer, dtype, aside / f"{name}.bin", files, say)
            for name, documents in splits._asdict().items()
        }
        _write_pairs(splits.train, config.seed, aside / "minimal_pairs.jsonl")
        manifest = {
            "format": FORMAT,
            "name": source.name,
            "identity": identity,
            "attribution": source.attribution,
            "licence": source.licence,
            "dtype": dtype.name,
            "vocabulary": tokenizer.vocab_size,
            "boundary": tokenizer.boundary,
            "tokenizer": tokenizer.hash,
            "entropy_per_word": source.entropy_per_word,  # nats
            "splits": counts,
            "files": files,
            "sha256": {p.relative_to(aside).as_posix(): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()},
            "config": as_dict(config),
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _open(folder)


def _open(folder: Path) -> Prepared:
    """A prepared folder, every file checked against its hash; ValueError where one differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, hashes = manifest["format"], manifest["sha256"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / MANIFEST}: missing or damaged; delete {folder} and prepare again") from None
    if version != FORMAT:
        raise UserError(f"{folder}: format {version}, this version reads {FORMAT}; delete it and prepare again")
    for name, digest in hashes.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: missing or changed since; delete {folder} and prepare again")
    return Prepared(folder, manifest, tokenization.load(folder / "tokenizer"))


def _open_given(config: DataConfig) -> Prepared:
    """The prepared folder that data.path names; ValueError where a setting asks for something else."""
    prepared = _open(Path(config.path))
    before = build(DataConfig, prepared.manifest["config"])
    default, asked, made = (flatten(c) for c in (DataConfig(), config, before))
    for key in asked.keys() - {"path", "folder"}:
        if asked[key] not in (default[key], made[key]):
            raise UserError(
                f"data.{key}={asked[key]}: {config.path} was prepared with {made[key]}; drop the setting, or prepare "
                "again from the text"
            )
    return prepared


def _meaning(config: DataConfig, hashes: dict[str, str]) -> dict[str, Any]:
    """All that decides what is in the folder: where the text lies does not."""
    decides = {k: v for k, v in flatten(config).items() if k not in ("path", "folder") and (v or k not in LATER)}
    settings = {f"data.{k}": v for k, v in decides.items()}
    return {"format": FORMAT, **settings, **{f"file {name}": digest for name, digest in hashes.items()}}


def _say_what_differs(meaning: dict[str, Any], name: str, folder: Path, say: Say) -> None:
    """One line about the latest folder prepared from a source of this name, if any."""
    others = sorted(folder.parent.glob(f"{name}-????????/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    try:
        other = json.loads(others[-1].read_text(encoding="utf-8"))
        before = _meaning(build(DataConfig, other["config"]), {file["name"]: file["sha256"] for file in other["files"]})
        before["format"] = other["format"]
    except (IndexError, KeyError, ValueError):  # there is none, or not one that this version understands
        return
    changes = []
    for key in {**before, **meaning}:
        old, new = before.get(key), meaning.get(key)
        if old != new and key.startswith("file "):
            changes.append(f"{key} ({'new' if key not in before else 'gone' if key not in meaning else 'changed'})")
        elif old != new:
            changes.append(f"{key} ({old} → {new})")
    say(f"{folder}: new, beside {others[-1].parent.name}, which differs in {', '.join(changes)}")


def _read(
    source: sources.Source, config: DataConfig, advance: Callable[[int], None], say: Say
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The cleaned text of each file, by name, and its entry in the manifest, with counts still to be made."""
    texts, files, unmatched = {}, [], []
    for file in source.files:
        text = file.read()
        entry = {"name": file.name, "sha256": file.sha256, "cleaner": None, "words_in_source": len(text.split())}
        if config.cleaner != "none":
            entry["cleaner"] = cleaner = cleaner_for(Path(file.name).stem)
            if cleaner is None:
                unmatched.append(file.name)
            elif config.cleaner == "babies":
                text = normalize(text, cleaner)
            else:
                text = clean(text, cleaner, quirks=config.quirks)
        texts[file.name] = text
        files.append(entry | dict.fromkeys(COUNTS, 0))
        advance(1)
    if unmatched:
        message = f"no cleaner is called like {', '.join(unmatched)} (known: {', '.join(CLEANERS)})"
        if len(unmatched) == len(files):
            raise UserError(f"data.cleaner={config.cleaner}: {message}; rename the files or drop the setting")
        say(f"left as they are: {message}")
    return texts, files


def _train_tokenizer(
    documents: list[Document], config: DataConfig, vocab_size: int, folder: Path, say: Say
) -> Tokenizer:
    folder.mkdir()
    words = sum(document.words for document in documents)
    with _stage(f"training a tokenizer of {vocab_size:,} pieces on {words:,} words", words, say) as advance:

        def texts() -> Iterator[str]:
            for document in documents:
                yield document.text
                advance(document.words)

        return tokenization.train(texts(), config.tokenizer, vocab_size, folder, boundary=config.boundary)


def _encode(
    documents: list[Document],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    path: Path,
    files: list[dict[str, Any]],
    say: Say,
) -> dict[str, int]:
    """Write a split's token file, add to the counts of each source file, and return the split's own."""
    before, after = ([], "\n\n") if tokenizer.boundary is None else ([tokenizer.boundary], "")
    totals: dict[str, int] = dict.fromkeys(COUNTS, 0)
    characters = sum(len(document.text) for document in documents)
    title = f"encoding {len(documents):,} documents for {path.stem}"
    with _stage(title, characters, say) as advance, path.open("wb") as stream:
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text + after for d in batch]), strict=True):
                tokens = np.array(before + ids, dtype)
                stream.write(tokens.tobytes())
                lines = document.text.count("\n") + 1
                counts = zip(COUNTS, (1, lines, document.words, len(document.text), len(tokens)), strict=True)
                for count, n in counts:
                    totals[count] += n
                    files[document.file][count] += n
            advance(sum(len(document.text) for document in batch))
    return totals


def _batches(documents: list[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_pairs(documents: list[Document], seed: int, path: Path) -> None:
    seen = {line.strip() for document in documents for line in document.text.split("\n")}
    with path.open("w", encoding="utf-8") as f:
        for pair in grammar.minimal_pairs(seed, PAIRS_PER_PHENOMENON, seen):
            record = {"sentence_good": pair.good, "sentence_bad": pair.bad, "phenomenon": pair.phenomenon}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that becomes it if all goes well and vanishes otherwise: where this process is killed,
    when another on its machine prepares something there."""
    made, here = not folder.parent.exists(), socket.gethostname()
    for left in folder.parent.glob(f".*-{here}-*"):
        process = left.name.rpartition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}-{here}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with suppress(OSError):  # not empty
                folder.parent.rmdir()


@contextmanager
def _stage(title: str, total: int, say: Say) -> Iterator[Callable[[int], None]]:
    """A progress bar where stderr is a terminal, and one line, with the seconds it took, in any case."""
    console = Console(stderr=True)
    started = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)
    say(f"{title}: {time.perf_counter() - started:.1f} s")
