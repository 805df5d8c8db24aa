"""`make gpu` on a machine without one, and what it makes of jobs that fail or do not end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Job


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_refusal_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 1
    refusal = capsys.readouterr()
    assert refusal.err.count("\n") == 1
    assert "needs a GPU" in refusal.err
    assert refusal.out == ""
    assert list(tmp_path.iterdir()) == []


def job(code: str, results=gpu.last_line) -> Job:
    return Job("job", [sys.executable, "-c", code], 10, results)


def test_outcomes():
    passed = gpu.run(job("print('some'); print('[1]')", lambda text: json.loads(gpu.last_line(text))), 10)
    assert (passed["outcome"], passed["results"], "output" in passed) == ("passed", [1], False)
    failed = gpu.run(job("print('why'); raise SystemExit(3)"), 10)
    assert (failed["outcome"], failed["output"]) == ("failed with status 3", "why\n")
    silent = gpu.run(job(""), 10)
    assert silent["outcome"].startswith("no results")
    cut = gpu.run(job("import sys; sys.stdout.buffer.write(b'2 \\xc3')"), 10)  # within a character
    assert (cut["outcome"], cut["results"]) == ("passed", "2 \ufffd")
    missing = gpu.run(Job("job", ["no-such-launcher"], 10, gpu.last_line), 10)
    assert missing["outcome"].startswith("could not begin")


def test_a_table_without_rows_is_no_result(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("variant,milliseconds\n")
    record = gpu.run(job("print()", lambda _: gpu.rows(tmp_path / "rows.csv")), 10)
    assert record["outcome"] == "no results: rows.csv has no rows"


def test_a_job_that_does_not_end_is_ended_with_its_children(tmp_path: Path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    parent = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    record = gpu.run(job(parent), 1.5)
    assert record["outcome"] == "ended after its 2 s"
    assert record["results"] == "began", "what was done until then counts"
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


def test_what_a_job_leaves_running_is_ended(tmp_path: Path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); raise SystemExit(1)"
    assert gpu.run(job(parent), 10)["outcome"] == "failed with status 1; no results: list index out of range"
    time.sleep(0.2)
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists()


def test_what_a_job_leaves_of_its_limit_the_next_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limits = {}

    def run(job: Job, limit: float) -> dict[str, object]:
        limits[job.name] = limit
        return {"name": job.name, "outcome": "passed", "seconds": 0.0}

    jobs = [Job("first", [], 180, gpu.last_line), Job("second", [], 140, gpu.last_line)]
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "none"})
    monkeypatch.setattr(gpu, "untimed", lambda _: [Job("beside", [], 150, gpu.last_line)])
    monkeypatch.setattr(gpu, "timed", lambda _: jobs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    age = time.time() - psutil.Process().create_time()  # of all that this process has tested before
    monkeypatch.setattr(gpu, "SECONDS", age + 500)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert limits["beside"] == 150
    assert limits["first"] == pytest.approx(500 - 140, abs=5)
    assert limits["second"] == pytest.approx(500, abs=5)


def test_the_jobs_end_within_ten_minutes_and_name_what_exists(tmp_path: Path):
    side_by_side, one_by_one = gpu.untimed(tmp_path), gpu.timed(tmp_path)
    assert max(j.seconds for j in side_by_side) + sum(j.seconds for j in one_by_one) <= gpu.SECONDS < 600
    listed = [*side_by_side, *one_by_one]
    assert len({j.name for j in listed}) == len(listed)
    for script in [part for j in listed for part in j.command if part.endswith(".py")]:
        subprocess.run([sys.executable, "-m", "py_compile", gpu.ROOT / script], check=True)
