import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.loading import build, read_yaml
from engine.config.settings import DataConfig, PrepareConfig, TokenizerConfig
from engine.data import prepare as preparation
from engine.data.grammar.generator import generate
from engine.data.prepare import Prepared, prepare
from engine.data.tokenizer import normalize
from engine.system.errors import UserError

SMALL = TokenizerConfig(vocab_size=400)


def texts(folder: Path) -> Path:
    """Writes two files of generated text; the second has no blank line."""
    folder.mkdir()
    (folder / "simple_wiki.txt").write_text("\n\n".join(generate(1, 6000)), encoding="utf-8")
    (folder / "notes.txt").write_text("\n".join(generate(2, 4000)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Prepared]:
    folder = tmp_path_factory.mktemp("prepared")
    config = DataConfig(path=str(texts(folder / "texts")), folder=str(folder / "prepared"), tokenizer=SMALL)
    return config, prepare(config, log=lambda _: None)


@pytest.fixture
def config(prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path) -> DataConfig:
    """Returns settings for a copy of the texts and of what was prepared, which a test may change."""
    source = Path(prepared_texts[0].path).parent
    shutil.copytree(source, tmp_path / "copy")
    return dataclasses.replace(
        prepared_texts[0], path=str(tmp_path / "copy" / "texts"), folder=str(tmp_path / "copy" / "prepared")
    )


def ids(prepared: Prepared, path: Path) -> np.ndarray:
    return np.fromfile(path, np.dtype(prepared.manifest["dtype"]))


def inside(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} if Path(folder).exists() else set()


def test_token_files_hold_every_line_after_boundaries(prepared_texts: tuple[DataConfig, Prepared]):
    config, prepared = prepared_texts
    tokenizer, lines = prepared.tokenizer, []
    for path in (prepared.train, prepared.validation):
        tokens = ids(prepared, path)
        assert tokens.dtype == np.uint16
        assert tokens[0] == tokenizer.boundary
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.boundary))[1:]
        counts = prepared.manifest["splits"][path.stem]
        assert (len(documents), len(tokens)) == (counts["documents"], counts["tokens"])
        decoded = [tokenizer.decode(document.tolist()) for document in documents]
        assert sum(len(text.split()) for text in decoded) == counts["words"]
        lines += [line for text in decoded for line in text.split("\n")]
    source = [line for file in Path(config.path).iterdir() for line in file.read_text().split("\n") if line]
    assert sorted(lines) == sorted(normalize(line, config.tokenizer) for line in source)


def test_the_manifest_accounts_for_the_text(prepared_texts: tuple[DataConfig, Prepared]):
    config, prepared = prepared_texts
    manifest = prepared.manifest
    assert prepared.folder.name == f"texts-{prepared.identity[:8]}"
    assert (manifest["vocab_size"], manifest["boundary"], manifest["tokenizer"]) == (400, 1, prepared.tokenizer.hash)
    assert manifest["entropy_per_word"] is None
    assert [file["name"] for file in manifest["files"]] == ["notes.txt", "simple_wiki.txt"]
    for file in manifest["files"]:
        text = (Path(config.path) / file["name"]).read_text()
        assert file["words"] == file["words_in_source"] == len(text.split())
        assert file["lines"] == sum(1 for line in text.split("\n") if line)
    for count in ("documents", "words", "tokens", "characters"):
        assert sum(f[count] for f in manifest["files"]) == sum(s[count] for s in manifest["splits"].values())
    share = manifest["splits"]["validation"]["words"] / sum(s["words"] for s in manifest["splits"].values())
    assert share == pytest.approx(0.05, abs=0.005)


def test_minimal_pairs_are_not_in_the_training_text(prepared_texts: tuple[DataConfig, Prepared]):
    _, prepared = prepared_texts
    pairs = [json.loads(line) for line in prepared.pairs.read_text().splitlines()]
    assert len(pairs) >= 500
    assert {key for pair in pairs for key in pair} == {"sentence_good", "sentence_bad", "phenomenon"}
    tokens = ids(prepared, prepared.train)
    documents = np.split(tokens, np.flatnonzero(tokens == prepared.tokenizer.boundary))
    seen = {line for document in documents for line in prepared.tokenizer.decode(document.tolist()).split("\n")}
    assert len(seen) > 500
    assert seen.isdisjoint(pair[key] for pair in pairs for key in ("sentence_good", "sentence_bad"))


def test_preparing_again_does_nothing(config: DataConfig):
    before = {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*")}
    lines: list[str] = []
    again = prepare(config, log=lines.append)
    assert len(lines) == 1
    assert "prepared already" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*")} == before
    by_path = prepare(DataConfig(path=str(again.folder)), log=lines.append)
    assert (by_path.identity, by_path.tokenizer.hash) == (again.identity, again.tokenizer.hash)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(terminal: bool, config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setenv("TERM", "xterm")
    prepare(dataclasses.replace(config, seed=7), log=lambda _: None)
    shown = output.getvalue()
    for stage in ("training a tokenizer", "encoding train", "encoding validation"):
        assert (stage in shown) == terminal
    assert terminal or not shown


def test_other_settings_or_text_are_prepared_beside(config: DataConfig):
    other = prepare(dataclasses.replace(config, validation=0.1), log=lambda _: None)
    (Path(config.path) / "notes.txt").write_text("\n".join(generate(3, 4000)))
    (Path(config.path) / "more.txt").write_text("\n".join(generate(4, 400)))
    third = prepare(dataclasses.replace(config, validation=0.1), log=lambda _: None)
    assert len({config.folder, other.folder, third.folder}) == 3
    assert len(inside(config.folder)) == 3


def test_a_flipped_byte_is_an_error(config: DataConfig, prepared_texts: tuple[DataConfig, Prepared]):
    folder = Path(config.folder) / prepared_texts[1].folder.name
    for file in ("validation.bin", "tokenizer/tokenizer.json", "minimal_pairs.jsonl"):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(bytes([original[0] ^ 1]) + original[1:])
        for asked in (config, DataConfig(path=str(folder))):
            with pytest.raises(UserError, match=rf"{file}: missing or changed since; delete .* and prepare again"):
                prepare(asked)
        (folder / file).write_bytes(original)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="missing or damaged"):
        prepare(config)


def test_settings_that_a_prepared_folder_does_not_have_are_an_error(prepared_texts: tuple[DataConfig, Prepared]):
    path = str(prepared_texts[1].folder)
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size=500: .* was prepared with 400; drop the setting"):
        prepare(DataConfig(path=path, tokenizer=TokenizerConfig(vocab_size=500)))
    assert prepare(DataConfig(path=path, tokenizer=SMALL)).tokenizer.vocab_size == 400


def test_the_same_text_gives_the_same_bytes(prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path):
    again = prepare(dataclasses.replace(prepared_texts[0], folder=str(tmp_path)), log=lambda _: None)
    assert again.folder.name == prepared_texts[1].folder.name
    assert again.manifest["sha256"] == prepared_texts[1].manifest["sha256"]


def test_without_a_boundary_a_blank_line_ends_a_document(prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path):
    config = dataclasses.replace(prepared_texts[0], boundary=False, folder=str(tmp_path))
    prepared = prepare(config, log=lambda _: None)
    assert prepared.tokenizer.boundary is prepared.manifest["boundary"] is None
    documents = prepared.tokenizer.decode(ids(prepared, prepared.train).tolist()).split("\n\n")
    assert documents.pop() == ""
    assert len(documents) == prepared.manifest["splits"]["train"]["documents"]
    assert prepared.identity != prepared_texts[1].identity


def test_the_grammar_knows_its_entropy_and_words_limit_real_text(
    prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path
):
    generated = DataConfig(words=20_000, folder=str(tmp_path), tokenizer=SMALL)
    manifest = prepare(generated, log=lambda _: None).manifest
    assert manifest["entropy_per_word"] > 1
    assert 20_000 <= manifest["files"][0]["words"] <= 20_400
    limited = dataclasses.replace(prepared_texts[0], words=5000, folder=str(tmp_path))
    manifest = prepare(limited, log=lambda _: None).manifest
    assert 4800 <= sum(file["words"] for file in manifest["files"]) <= 5000
    assert [file["words_in_source"] for file in manifest["files"]] == pytest.approx([4000, 6000], abs=200)


def test_files_without_a_cleaner_stay_and_are_named(prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path):
    lines: list[str] = []
    config = dataclasses.replace(prepared_texts[0], cleaner="baby-llama", quirks=True, folder=str(tmp_path))
    manifest = prepare(config, log=lines.append).manifest
    assert lines[0].endswith("reading 2 file(s)")
    assert lines[-1] == f"encoding {manifest['splits']['validation']['documents']} documents for validation"
    assert [file["cleaner"] for file in manifest["files"]] == [None, "simple_wikipedia"]
    assert any("there is no cleaner for notes.txt (" in line for line in lines)
    assert manifest["files"][1]["words"] < manifest["files"][1]["words_in_source"]  # Paragraphs are glued.


def test_what_babies_are_taught_from_is_normalised_and_lowercase(tmp_path: Path):
    recipes = Path(__file__).parents[3] / "recipes" / "babies"
    settings = build(PrepareConfig, read_yaml(recipes / "prepare.yaml")).data
    for name in ("published", "effective", "guided", "teacher"):
        assert build(DataConfig, read_yaml(recipes / f"{name}.yaml")["data"]) == settings, name
    assert (settings.tokenizer.vocab_size, settings.tokenizer.lowercase) == (50265, True)
    (tmp_path / "texts").mkdir()
    talk = "".join(f"*MOT:\tlook , {line}\n" for document in generate(0, 3000) for line in document.split("\n"))
    (tmp_path / "texts" / "childes.txt").write_text(talk)
    small = dataclasses.replace(settings.tokenizer, vocab_size=400)
    config = dataclasses.replace(settings, path=str(tmp_path / "texts"), folder=str(tmp_path / "p"), tokenizer=small)
    prepared = prepare(config, log=lambda _: None)
    text = prepared.tokenizer.decode(ids(prepared, prepared.train).tolist())
    assert prepared.manifest["files"][0]["cleaner"] == "aochildes"
    assert text.startswith('"look, ')
    assert text == text.lower()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenizer": TokenizerConfig(vocab_size=50_000)},
            r"data\.tokenizer\.vocab_size=50000: the training text allows \d+ at most",
        ),
        ({"tokenizer": TokenizerConfig(vocab_size=100)}, r"data\.tokenizer\.vocab_size=100: .* need \d+"),
        (
            {"tokenizer": TokenizerConfig("byte-bpe", 50_000)},
            r"data\.tokenizer\.vocab_size=50000: the training text allows \d+ at most",
        ),
        (
            {"quirks": True, "cleaner": "babies"},
            r"data\.quirks=true: data\.cleaner=babies has no quirks; drop the setting",
        ),
        ({"quirks": True}, r"data\.quirks=true: .* or set data\.cleaner=baby-llama"),
        (
            {"path": "grammar", "words": 500, "cleaner": "baby-llama"},
            r"there is no cleaner for grammar .*rename the files or drop",
        ),
        ({"path": "/missing"}, "no such folder"),
    ],
)
def test_bad_input_writes_nothing(
    settings: dict[str, Any], message: str, prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path
):
    config = dataclasses.replace(prepared_texts[0], folder=str(tmp_path / "prepared"), **settings)
    with pytest.raises(UserError, match=message) as error:
        prepare(config, log=lambda _: None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"a\.txt: empty"), (b"caf\xe9 noir\n", r"a\.txt: not UTF-8 at byte 3"), (b"one line\n", "too few lines")],
)
def test_bad_text_writes_nothing(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(path=str(tmp_path / "texts"), folder=str(tmp_path / "prepared")), log=lambda _: None)
    assert inside(str(tmp_path)) == {"texts"}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_preparation_that_fails_leaves_nothing(
    failure: BaseException, config: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise failure

    before = inside(config.folder)
    monkeypatch.setattr(preparation, "_write_pairs", fail)
    with pytest.raises(type(failure)):
        prepare(dataclasses.replace(config, seed=5), log=lambda _: None)
    assert inside(config.folder) == before


KILLED = """
import os, signal, sys
from engine.config.settings import DataConfig, TokenizerConfig
from engine.data import prepare
prepare._write_pairs = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
path, folder = sys.argv[1:]
prepare.prepare(DataConfig(path=path, folder=folder, tokenizer=TokenizerConfig(vocab_size=400), seed=5))
"""


def test_what_a_killed_preparation_leaves_goes_with_the_next(config: DataConfig):
    """What one that is still at work has written stays, and so does that of another machine."""
    subprocess.run([sys.executable, "-c", KILLED, config.path, config.folder], check=False)
    (left,) = (name for name in inside(config.folder) if name.startswith("."))
    process = left.split(".")[-2]
    at_work = {left.replace(f".{process}.", f".{os.getppid()}."), left.replace(socket.gethostname(), "elsewhere")}
    assert len({left, *at_work}) == 3
    for name in at_work:
        (Path(config.folder) / name).mkdir()
    prepare(dataclasses.replace(config, seed=6), log=lambda _: None)
    assert {name for name in inside(config.folder) if name.startswith(".")} == at_work


def test_another_preparation_may_be_faster(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    """The folder appears between this one's last look and its rename."""
    replace = os.replace

    def be_overtaken(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", be_overtaken)
    prepared = prepare(dataclasses.replace(config, seed=5), log=lambda _: None)
    assert inside(config.folder) > {prepared.folder.name}
    assert not any(name.startswith(".") for name in inside(config.folder))


def test_large_vocabularies_are_32_bit(prepared_texts: tuple[DataConfig, Prepared], tmp_path: Path, monkeypatch):
    """A test cannot train 65,537 tokens, so it lowers the bound."""
    monkeypatch.setattr(preparation, "SIXTEEN_BITS", 399)
    prepared = prepare(dataclasses.replace(prepared_texts[0], folder=str(tmp_path)), log=lambda _: None)
    assert prepared.manifest["dtype"] == "uint32"
    assert np.array_equal(ids(prepared, prepared.train), ids(prepared_texts[1], prepared_texts[1].train))
