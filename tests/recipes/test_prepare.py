import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "recipes" / "prepare.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_prepares_the_grammar_and_shows_what_came_of_it(tmp_path: Path):
    done = run(tmp_path, "data.words=20000", "data.tokenizer.vocab_size=400")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens per word" in done.stdout
    folders = list((tmp_path / "prepared").iterdir())
    assert len(folders) == 1
    assert folders[0].name in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.path=/missing", "data.path=/missing: no such folder; expected grammar"),
        ("data.wrods=5", "unknown key 'data.wrods': did you mean 'words'?"),
        ("data.words=0", "data.words=0: input should be greater than or equal to 1"),
        ("data.tokenizer.vocab_size=90000", "data.tokenizer.vocab_size=90000: the training text allows"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(argument: str, message: str, tmp_path: Path):
    done = run(tmp_path, "data.words=2000", argument)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_says_how_to_use_it(tmp_path: Path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "python recipes/prepare.py data.path=wikipedia-leads" in done.stdout
