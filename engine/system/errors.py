"""UserError, a mistake that a user can mend, and how errors end a command."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # It is full or not ours.
_WRONG_PATH = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)  # A file is where a folder should be, or the other way round.


class UserError(Exception):
    """A mistake that a user can mend: its message is one line that names the value, what was expected and the fix."""


class OtherRankError(Exception):
    """Another rank has failed with an error that is not the user's, and it reports that error itself."""


def disk_refuses(error: BaseException) -> bool:
    """Returns whether `error` says that a disk is full, read-only or not ours to write to, or a path cannot be."""
    return isinstance(error, OSError) and error.errno in (*_DISK_REFUSES, *_WRONG_PATH)


@contextmanager
def report_errors() -> Iterator[None]:
    """Ends the command where the block fails. Every recipe runs inside it.

    A UserError, or a disk that refuses, is printed as one line by the rank that met it first, and the exit code is 2.
    Any other exception is a bug of ours: it keeps its traceback, and the exit code is 1. Ranks that fail only because
    another one has failed print nothing.
    """
    try:
        yield
    except OtherRankError:
        _exit(1)
    except Exception as error:
        is_first = _is_first_to_fail()
        if isinstance(error, UserError) or disk_refuses(error):
            if is_first:
                print(f"error: {error}", file=sys.stderr, flush=True)
            _exit(2)
        if isinstance(error, RuntimeError) and "gloo" in str(error) and not is_first:
            _exit(2)  # The connection was lost because another rank has ended, and that rank has said why.
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        traceback.print_exception(error)
        _exit(1)  # Raised further, gloo's threads could abort the process while the interpreter goes down.


def _is_first_to_fail() -> bool:
    # Importing engine.system.distributed for this alone would take seconds: it brings torch and deepspeed.
    distributed = sys.modules.get("engine.system.distributed")
    return os.environ.get("RANK", "0") == "0" if distributed is None else distributed.is_first_to_fail()


def _exit(code: int) -> None:
    distributed = sys.modules.get("engine.system.distributed")
    sys.exit(code) if distributed is None else distributed.exit_process(code)
