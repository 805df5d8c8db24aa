"""A command ends with one line and code 2 where the user is wrong, with a traceback and code 1 where we are."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.system.errors import OtherRankError, UserError, report_errors

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("mend it"), "error: mend it\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "error: [Errno 28] No space left on device: 'runs/a'\n",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "error: [Errno 122] Disk quota exceeded\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "error: [Errno 13] Permission denied: 'x'\n"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "error: [Errno 30] Read-only file system: 'x'\n"),
        (FileExistsError(errno.EEXIST, "File exists", "x"), "error: [Errno 17] File exists: 'x'\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), "error: [Errno 20] Not a directory: 'x'\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, printed in (("0", line), ("1", "")):  # Before the ranks have met, rank 0 speaks for all.
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, report_errors():
            raise error
        assert ended.value.code == 2
        assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize(
    "error", [KeyError("a"), ValueError("a"), FileNotFoundError(errno.ENOENT, "none", "x"), RuntimeError("a")]
)
def test_any_other_error_is_raised_further(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught, report_errors():
        raise error
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_a_rank_that_fails_for_another_one_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, report_errors():
        raise OtherRankError("rank 0: boom")
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("statement", "code", "last_line"),
    [
        ("raise ValueError('planted')", 1, "ValueError: planted"),
        ("list(zip([1], [1, 2], strict=True))", 1, "ValueError: zip() argument 2 is longer than argument 1"),
        ("math.sqrt(-1.0)", 1, "ValueError: math domain error"),
        ("open('/dev/full', 'w', buffering=1).write('a\\n')", 2, "error: [Errno 28] No space left on device"),
        ("raise UserError('mend it')", 2, "error: mend it"),
    ],
)
def test_a_command_ends_with_the_code_that_says_whose_mistake_it_is(statement: str, code: int, last_line: str) -> None:
    script = f"""
import math
from engine.system.errors import UserError, report_errors
with report_errors():
    {statement}
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == code
    assert finished.stdout == ""
    lines = finished.stderr.splitlines()
    assert lines[-1] == last_line
    if code == 1:
        assert lines[0] == "Traceback (most recent call last):"
    else:
        assert len(lines) == 1


FAILING = """
import os, sys
from engine.system.distributed import init_distributed
from engine.system.errors import report_errors
folder, failing, block = sys.argv[1:]
end = os._exit
def end_with_1(code):  # A rank that has only lost the other one cannot know that one's exit code, and takes 2.
    open(f"{folder}/code-{runtime.rank}", "w").write(str(code))
    end(1)
os._exit = end_with_1
with report_errors():
    runtime = init_distributed()
    sys.stderr = open(f"{folder}/{runtime.rank}", "w")
    if block == "first":
        with runtime.main_process_first():
            assert runtime.is_main_process, "another rank began"
            raise ValueError("planted")
    if runtime.rank == int(failing):
        raise ValueError("planted")
    runtime.barrier()
"""


@pytest.mark.parametrize(("block", "failing"), [("first", 0), ("step", 0), ("step", 1)])
def test_a_bug_on_one_rank_is_one_traceback(
    block: str, failing: int, spawn_ranks: Callable[..., None], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    spawn_ranks(script, 2, tmp_path, failing, block, code=1)
    printed = (tmp_path / str(failing)).read_text()
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("ValueError: planted\n")
    assert printed.count("Traceback") == 1
    assert (tmp_path / str(1 - failing)).read_text() == ""
    assert (tmp_path / f"code-{failing}").read_text() == "1"
    assert (tmp_path / f"code-{1 - failing}").read_text() == ("1" if block == "first" else "2")
