"""What a run shows in the terminal while it trains: its last step and each student's last evaluation."""

import math
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.reporting.records import Record, StepRecord, StudentEvaluation
from engine.system.formatting import format_seconds


class Progress:
    """Shows a run's records as they come, on rank 0; it is a context manager.

    On a terminal the display is live. Elsewhere it prints a line when at least `interval` seconds have passed, and at
    once for skipped steps and events.
    """

    def __init__(
        self, total: int, *, start: int = 0, rank: int = 0, console: Console | None = None, interval: float = 10.0
    ) -> None:
        """`total` counts the run's steps, `start` those that were finished when it was resumed."""
        self._total, self._start, self._interval = total, start, interval
        self._rank = rank
        self._console = console or Console()
        self._live: Live | None = None
        self._step: StepRecord | None = None
        self._evaluation: dict[str, StudentEvaluation] = {}
        self._began = time.monotonic()
        self._printed_at = -math.inf
        self._printed_step = start

    def __enter__(self) -> "Progress":
        # `console.is_terminal` is true under FORCE_COLOR, which CI services set: it would animate a log file.
        if self._rank == 0 and self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._display, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._step is not None and self._step["step"] != self._printed_step:
            self._print_step(self._step)

    def show(self, record: Record) -> None:
        """Takes one record, and prints what is due."""
        if self._rank != 0:
            return
        match record["kind"]:
            case "step":
                self._step = record
                if self._live is None and time.monotonic() - self._printed_at >= self._interval:
                    self._print_step(record)
            case "evaluation":
                self._evaluation = record["students"]
            case "skipped":
                self._print(f"step {record['step']:,} skipped: {', '.join(record['students'])}: {record['reason']}")
            case "event":
                self._print(f"step {record['step']:,}: {record['text']}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _print_step(self, record: StepRecord) -> None:
        self._printed_at, self._printed_step = time.monotonic(), record["step"]
        students = (
            f"{name}: " + " ".join(f"{title} {cell}" for title, cell in self._cells(record, name).items())
            for name in record["students"]
        )
        self._print(" | ".join([self._heading(record), *students]))

    def _heading(self, record: StepRecord | None) -> str:
        elapsed = time.monotonic() - self._began
        done = record["step"] if record else self._start
        parts = [f"step {done:,}/{self._total:,}", f"{format_seconds(elapsed)} elapsed"]
        if done > self._start:
            left = elapsed / (done - self._start) * (self._total - done)
            parts.append(f"{format_seconds(left)} left")
        if record:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
            parts += [f"MFU {record['mfu']:.0%}"] if "mfu" in record else []
        return ", ".join(parts)

    def _cells(self, record: StepRecord, name: str) -> dict[str, str]:
        """Returns what is shown of a student, by title."""
        student = record["students"][name]
        cells = {"CE": f"{student['ce']:.3f}"}
        row = list(record["students"]).index(name)
        divergences = [kl for column, kl in enumerate(record["kl"][row]) if column != row] if record["kl"] else []
        if divergences:
            cells["KL"] = f"{sum(divergences) / len(divergences):.3f}"
        cells["lr"] = f"{student['lr']:.1e}"
        if name in self._evaluation:
            evaluation = self._evaluation[name]
            cells["val"] = f"{evaluation['validation_loss']:.3f}"
            if evaluation["pairs_accuracy"] is not None:
                cells["pairs"] = f"{evaluation['pairs_accuracy']:.1%}"
        return cells

    def _display(self) -> RenderableType:
        record = self._step
        done = record["step"] if record else self._start
        head = Table.grid(expand=True)
        head.add_row(ProgressBar(total=self._total, completed=done))
        head.add_row(Text(self._heading(record)))
        if record is None:
            return head
        cells = {name: self._cells(record, name) for name in record["students"]}
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("student", overflow="ellipsis", no_wrap=True)
        for title in next(iter(cells.values())):
            table.add_column(title, justify="right", no_wrap=True)
        for name, row in cells.items():
            table.add_row(Text(name), *row.values())
        return Group(head, table)
