"""A run's folder: what lies where, and that only one run trains in it at a time.

runs/<name>/
    config.yaml       the settings, resolved, with the commit of the code
    metrics.jsonl     records (engine.reporting.records)
    tensorboard/      the same numbers for TensorBoard
    checkpoints/      engine.run.checkpoint
    students/<name>/  Hugging Face folders of the best checkpoint
    milestones/<name>/chck_<n>M/   the same after n million words
    summary.json      the final table
    profile/          engine.compute.profiling, where asked for
    report.html
    ranks.pid         process ids of the ranks on rank 0's node while it trains: where to send SIGTERM or SIGUSR1
"""

import fcntl
from contextlib import ExitStack
from pathlib import Path

from engine.config.settings import Config
from engine.run import checkpoint
from engine.run.check_settings import check_same
from engine.system.errors import UserError


def checkpoint_to_resume(folder: Path, config: Config) -> Path | None:
    """Returns the checkpoint to go on from, None for a new run.

    Raises UserError where the folder is another run's, or is not as `run.resume` wants it.
    """
    resume, checkpoints = config.run.resume, folder / "checkpoints"
    if (folder / "config.yaml").is_file():
        if resume == "never":
            raise UserError(f"{folder} exists and run.resume=never: choose another run.name, or run.resume=auto")
        check_same(config, folder / "config.yaml")
    newest = checkpoint.latest(checkpoints)
    if newest is None and resume == "always":
        raise UserError(f"{checkpoints} holds no checkpoint and run.resume=always: take run.resume=auto")
    return newest


def lock(folder: Path, process_ids: list[int], stack: ExitStack) -> None:
    """Writes the process ids to ranks.pid and holds the folder until `stack` closes; UserError where another run
    holds it."""
    path = folder / "ranks.pid"
    file = stack.enter_context(path.open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is being trained right now, by processes {file.read().strip()}: wait for them, stop "
            "them, or choose another run.name"
        ) from None
    file.truncate(0)
    file.write(" ".join(map(str, process_ids)) + "\n")
    file.flush()
    stack.callback(path.unlink, missing_ok=True)
