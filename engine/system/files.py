"""Files that are whole or not there at all, and hashes of files."""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def written_aside(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` for the block to write a file or a folder to; at its end a rename puts it in place.

    So `path` is never half written, also where the process is killed or the disk is full. It replaces a file or a
    folder that is there; with `keep_existing`, what another process has put there meanwhile stays instead. A folder
    that is replaced is removed just before the rename. What killed processes of this machine have left beside `path`
    goes first, and where the block fails, the parent folders go that were made for `path`.
    """
    remove_abandoned(path.parent)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    missing_parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        for file in sorted(aside.rglob("*")) if aside.is_dir() else ():
            _sync(file)
        _sync(aside)
        if not keep_existing:
            if aside.is_dir():
                remove(path)
            os.replace(aside, path)
        elif not path.exists():
            try:
                os.replace(aside, path)
            except OSError:
                if not path.exists():  # Otherwise another process has put its folder there in this moment.
                    raise
        _sync(path.parent)
    finally:
        remove(aside)
        with suppress(OSError):  # A folder that is not empty stays.
            for parent in missing_parents:
                parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 as `written_aside` does."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it; nothing happens where it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Removes what processes of this machine that no longer live have written aside in `folder`."""
    for aside in folder.glob(f".*.{socket.gethostname()}.*.partial"):
        process = aside.suffixes[-2].removeprefix(".")
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            remove(aside)


def _sync(path: Path) -> None:
    """Waits until what was written is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
