"""pretrain.py and distill.py as users meet them: a teacher, then its student, and what each recipe refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
run: {name: teacher}
data: {words: 3000, tokenizer: {vocab_size: 400}}
students: [{name: one, layers: 1, hidden: 16, heads: 2, ffn: 32, max_length: 32}]
optimizer: {warmup: 1}
train: {steps: 3, batch: 4, length: 32}
evaluation: {tokens: 100, pairs: none, samples: 0}
"""


def run(folder: Path, recipe: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in group}
    command = [sys.executable, str(ROOT / "recipes" / recipe), "--config", "tiny.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_teacher_and_its_student(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    dry = run(tmp_path, "pretrain.py", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "steps: 3 of 4 × 32 tokens" in dry.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"], "nothing is written"

    refused = run(tmp_path, "distill.py")
    assert refused.returncode == 2
    assert refused.stderr.endswith("error: no teachers: name at least one, such as teachers.0.path=runs/teacher-gpt2\n")

    taught = run(tmp_path, "pretrain.py")
    assert taught.returncode == 0, taught.stderr
    student = ("run.name=student", "teachers.0.path=runs/teacher", "objective.ce_weight=0.5")
    refused = run(tmp_path, "pretrain.py", *student)
    assert refused.returncode == 2
    assert "this recipe trains one model alone" in refused.stderr
    dry = run(tmp_path, "distill.py", "--dry-run", *student)
    assert "teacher runs/teacher: " in dry.stdout, dry.stderr
    done = run(tmp_path, "distill.py", *student)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "student" / "students" / "one" / "model.safetensors").is_file()
