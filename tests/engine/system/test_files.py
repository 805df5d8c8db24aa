"""Files and folders that are written aside are whole or as they were, whatever happens meanwhile."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.system.files import remove, sha256, write_text, written_aside

ROOT = Path(__file__).parents[3]


def write_folder(aside: Path, content: str) -> None:
    aside.mkdir()
    (aside / "inner").mkdir()
    (aside / "inner" / "file").write_text(content)


def write_file(aside: Path, content: str) -> None:
    aside.write_text(content)


def content_of(path: Path) -> str:
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


KINDS = pytest.mark.parametrize("write", [write_file, write_folder])


@KINDS
def test_a_file_or_folder_appears_whole_and_replaces_what_was_there(
    write: Callable[[Path, str], None], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "er" / "target"
    for content in ("one", "two"):
        with written_aside(path) as aside:
            write(aside, content)
            assert not path.exists() or content_of(path) == "one"
        assert content_of(path) == content
        assert list(path.parent.iterdir()) == [path]


@KINDS
def test_where_the_disk_is_full_all_stays_as_it_was(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "target"
    for before in (None, "old"):
        if before is not None:
            with written_aside(path) as aside:
                write(aside, before)
        with pytest.raises(OSError, match="No space left"), written_aside(path) as aside:  # noqa: PT012
            write(aside, "new")
            raise OSError(errno.ENOSPC, "No space left on device")
        if before is None:
            assert list(tmp_path.iterdir()) == [], "the folders that were made for it are gone again"
        else:
            assert content_of(path) == before
            assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_others_write_to_stays_where_a_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "target"
    with pytest.raises(ZeroDivisionError), written_aside(path):  # noqa: PT012
        (tmp_path / "deep" / "other").touch()
        _ = 1 / 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", tmp_path / "deep" / "other"]


KILLED = """
import sys, time
from pathlib import Path
from engine.system.files import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    if sys.argv[2] == "write_folder":
        aside.mkdir()
        aside /= "file"
    aside.write_text("half")
    print(aside, flush=True)
    time.sleep(600)
"""


@KINDS
def test_what_a_killed_process_has_left_goes_with_the_next_write(
    write: Callable[[Path, str], None], tmp_path: Path
) -> None:
    path = tmp_path / "target"
    write(path, "old")
    command = [sys.executable, "-c", KILLED, path, write.__name__]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        (left,) = set(tmp_path.iterdir()) - {path}
        with written_aside(tmp_path / "other") as aside:
            write(aside, "other")
        assert left.exists(), "the process that writes it is alive"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert content_of(path) == "old"
    assert left.exists()
    elsewhere = tmp_path / f".target.another-host.{process.pid}.partial"
    elsewhere.touch()
    with written_aside(path) as aside:
        write(aside, "new")
    assert not left.exists()
    assert elsewhere.exists(), "the processes of another machine may live"
    assert content_of(path) == "new"


@KINDS
def test_of_two_writers_one_wins_whole(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes begins and ends while the first one writes."""
    path, this_process = tmp_path / "target", os.getpid()
    for keep_existing, winner in ((False, "first"), (True, "second")):
        remove(path)
        with written_aside(path, keep_existing=keep_existing) as aside:
            write(aside, "first")
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: os.getppid())
                with written_aside(path, keep_existing=keep_existing) as second:
                    assert second != aside
                    write(second, "second")
            assert os.getpid() == this_process
            assert content_of(path) == "second"
        assert content_of(path) == winner
        assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_appears_in_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "target", os.replace

    def late(source: Path, target: Path) -> None:
        write_folder(path, "second")
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    with written_aside(path, keep_existing=True) as aside:
        write_folder(aside, "first")
    assert content_of(path) == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"), written_aside(tmp_path / "target", keep_existing=True) as aside:
        aside.touch()
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_in_utf_8_and_hashed_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    assert sha256(path) == "ac6f010e65c9ea739dbdaa21427edd5ef60c6d461ef4d619c003e3ab62453a56"


def test_remove_takes_files_folders_links_and_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    write_folder(kept, "kept")
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.touch()
    write_folder(folder, "x")
    link.symlink_to(kept)
    for path in (file, folder, link, tmp_path / "none"):
        remove(path)
    assert list(tmp_path.iterdir()) == [kept]
    assert content_of(kept) == "kept"
