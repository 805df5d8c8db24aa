from contextlib import suppress
from io import StringIO

from rich.console import Console

from engine.reporting.progress import Progress
from tests.engine.reporting.example_records import RUN


def progress_output(*, terminal: bool, **options: float) -> str:
    output = StringIO()
    output.isatty = lambda: terminal
    console = Console(file=output, force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
    with suppress(KeyboardInterrupt), Progress(8, console=console, **options) as progress:  # pyright: ignore[reportArgumentType]
        for record in RUN:
            progress.show(record)
        progress.show({"kind": "skipped", "step": 9, "students": ["[red]"], "reason": "loss is nan"})
        raise KeyboardInterrupt
    return output.getvalue()


def test_plain_progress():
    lines = progress_output(terminal=False, interval=0.0).splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("step 1/8, ")
    assert "5,120 tokens/s | small: CE 3.750 KL 0.500 lr 1.0e-03 | large: CE 3.750 KL 1.000" in lines[0]
    assert lines[7].endswith("large: CE 2.000 KL 1.000 lr 1.0e-03 val 3.250 pairs 75.0%")
    assert lines[8] == "step 9 skipped: [red]: loss is nan"


def test_plain_progress_prints_no_more_than_asked_and_always_the_last_step():
    lines = progress_output(terminal=False, interval=3600.0).splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 1/8", "step 9 skipped: [red]: loss is nan", "step 8/8"]


def test_live_progress_gives_the_terminal_back():
    output = progress_output(terminal=True)
    for text in ("step 8/8", "5,120 tokens/s", "KL", "75.0%", "step 9 skipped: [red]"):
        assert text in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor stayed hidden"


def test_other_ranks_show_nothing():
    assert progress_output(terminal=True, rank=1) == ""
