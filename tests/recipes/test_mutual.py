"""The main recipe as users meet it: what it leaves behind, and one line for each mistake, with nothing written."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.config.loading import as_dict
from engine.config.settings import Config
from engine.run import checkpoint
from engine.run.run import Run
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.train import train
from tests.tiny_run import tiny

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "mutual.py")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train(tiny(tmp_path))
    return tmp_path


def refusal(config: Config) -> str:
    """The one line with which a run is refused."""
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_leaves_all_it_promises(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert [s["name"] for s in summary["students"]] == ["one", "two"]
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 4 * 32
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        assert record["kl"][0][0] == record["kl"][1][1] == 0
        for i, student in enumerate(record["students"].values()):
            expected = student["ce"] + record["kl"][i][1 - i]
            assert student["loss"] == pytest.approx(expected, rel=1e-5), "what is minimised is CE + KL to the peer"
    assert (run / "report.html").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())
    for student in summary["students"]:
        folder = run / "students" / student["name"]
        assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert student["best_step"] in (3, 6)


def test_a_finished_run_asked_again_ends_with_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, metrics = [], []
    for _ in range(2):
        train(tiny(tmp_path))
        tables.append(capsys.readouterr().out.split("student  ")[-1])
        metrics.append((tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes())
    assert tables[0] == tables[1]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.path=nowhere"], ["data.path=nowhere", "no such folder", "grammar"]),
        (["students.1.hidden=15"], ["students.two", "hidden=15", "heads=2", "multiple"]),
        (["students.1.name=one"], ["'one'", "2 times", "name of its own"]),
        (["train.length=100"], ["max_length=64", "train.length=100", "raise"]),
        (["optimizer.warmup=6"], ["warmup=6", "train.steps=6", "lower"]),
        (["train.batch=4000"], ["train.batch=4000", "sequences", "smaller"]),
        (["train.micro_batch=3"], ["micro_batch=3", "divisor of 4"]),
        (["data.tokenizer.vocab_size=30000"], ["data.tokenizer.vocab_size=30000", "at most", "fewer"]),
        (["train.zero_stage=0", "train.precision=bf16"], ["zero_stage=0", "bf16", "zero_stage=1"]),
        (["train.zero_stage=3", "train.compile=true"], ["train.compile", "zero_stage=3", "zero_stage=2"]),
        (
            ["objective.peer_weight=0", "objective.temperature=2"],
            ["objective.temperature", "raise objective.peer_weight"],
        ),
        (["students.0.init=nowhere"], ["students.one.init=nowhere", "no config.json"]),
        (["run.resume=always"], ["no checkpoint", "run.resume=auto"]),
        (["students.1.name=ensemble"], ["'ensemble'", "another name"]),
        (["evaluation.data=."], ["evaluation.data=.", "evaluation.tasks", "no tasks"]),
        (["objective.teacher_weight=0.5"], ["objective.teacher_weight=0.5", "without teachers"]),
        (["optimizer.decay_fraction=0.5"], ["optimizer.decay", "trapezoid", "schedule=cosine"]),
        (["optimizer.schedule=constant", "optimizer.min_lr_ratio=0.1"], ["optimizer.min_lr_ratio=0.1", "constant"]),
        (["objective.weighted=true", "outer.sequences=4"], ["outer.sequences=4", "no effect without outer.every"]),
        (
            ["objective.weighted=true", "outer.every=2", "objective.kl_everywhere=true"],
            ["objective.kl_everywhere", "outer.every", "drop one"],
        ),
        (["evaluation.pairs=nowhere.jsonl"], ["evaluation.pairs=nowhere.jsonl", "expected a file or folder"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_settings_that_cannot_be(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    message = refusal(tiny(tmp_path, *overrides))
    for part in expected:
        assert part.lower() in message.replace(",", "").lower()
    assert not (tmp_path / "runs").exists()


def test_text_that_cannot_be(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    config = tiny(tmp_path, f"data.path={folder}", "data.words=null")
    assert "no *.txt or *.train" in refusal(config)
    (folder / "a.txt").write_bytes(b"good text\nand then \xff\xfe not\n")
    message = refusal(config)
    assert "a.txt" in message
    assert "not UTF-8 at byte 19" in message
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "prepared").exists()


def test_students_with_different_tokenizers(trained: Path) -> None:
    start = trained / "runs" / "tiny" / "students" / "one"
    moved = start.rename(trained / "moved")
    train(tiny(trained, "run.name=warm", f"students.0.init={moved}"))  # the same tokenizer: welcome
    moved.rename(start)
    train(tiny(trained, "run.name=warm", f"students.0.init={moved}"))  # whoever goes on has no more need of it
    other = tiny(trained, "run.name=other", f"students.0.init={start}", "data.tokenizer.vocab_size=420")
    message = refusal(other)
    assert "students.one.init" in message
    assert "tokenizer" in message
    assert not (trained / "runs" / "other").exists()


def test_a_checkpoint_with_a_flipped_byte(trained: Path) -> None:
    newest = checkpoint.latest(trained / "runs" / "tiny" / "checkpoints")
    assert newest is not None
    damaged = newest / "two.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    message = refusal(tiny(trained))
    assert str(damaged) in message
    assert "delete" in message


def test_the_directory_of_another_run(trained: Path) -> None:
    message = refusal(tiny(trained, "students.0.layers=2"))
    assert "students.0.layers was 1 and is now 2" in message
    message = refusal(tiny(trained, "run.resume=never"))
    assert "run.resume=never" in message
    message = refusal(tiny(trained, "data.seed=9"))
    assert "data.seed" in message


def test_a_full_disk_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file, saves = checkpoint.save_file, []

    def full_at_third_checkpoint(tensors: dict[str, torch.Tensor], path: Path) -> None:
        saves.append(path)
        if len(saves) == 6:  # the second student's file of the third checkpoint: half of it is written
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_at_third_checkpoint)
    message = refusal(tiny(tmp_path))
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    good = checkpoint.latest(folder)
    assert good is not None
    assert "No space left on device" in message
    assert str(good) in message
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    checkpoint.read_state(good)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    train(tiny(tmp_path))  # with room again, it goes on, and ends where it would have
    train(tiny(tmp_path, "run.name=whole"))
    ends = [
        checkpoint.read_student(checkpoint.at_step(tmp_path / "runs" / n / "checkpoints", 6), "two")
        for n in ("tiny", "whole")
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "learning_rates", lambda self, step: [1e30] * 2)  # the first step ruins all weights
    message = refusal(tiny(tmp_path, "train.skip_limit=2", "checkpoint.every=100", "evaluation.every=100"))
    assert "2 steps in a row" in message
    assert "lower the learning rate" in message
    records = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "skipped"] == [2, 3]
    assert records[-1]["students"] == ["one", "two"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Run.learning_rates
    ruinous = float("inf")
    monkeypatch.setattr(
        Run, "learning_rates", lambda self, step: [ruinous, 1e-3] if step.number == 4 else rates(self, step)
    )
    message = refusal(tiny(tmp_path, "evaluation.every=100"))
    good = checkpoint.latest(tmp_path / "runs" / "tiny" / "checkpoints")
    assert good is not None
    assert good.name == "step-00000002"
    assert message.startswith("one: ")
    assert str(good) in message


def test_a_run_that_is_being_trained_is_left_alone(trained: Path) -> None:
    with (trained / "runs" / "tiny" / "ranks.pid").open("w") as held:
        held.write("4711\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        message = refusal(tiny(trained))
    assert "is being trained right now, by processes 4711" in message


def test_processes_to_signal_are_those_of_this_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another one their numbers are other processes'."""
    all_gather, seen, record = Runtime.all_gather, [], Run.after_step

    def with_another_node(self: Runtime, value: object) -> list[object]:
        elsewhere = [("elsewhere", 1)] if isinstance(value, tuple) else []
        return [*all_gather(self, value), *elsewhere]

    def recording(self: Run, *arguments: Any) -> None:
        seen.append((self.folder / "ranks.pid").read_text())
        record(self, *arguments)

    monkeypatch.setattr(Runtime, "all_gather", with_another_node)
    monkeypatch.setattr(Run, "after_step", recording)
    train(tiny(tmp_path, "train.steps=2"))
    assert seen == [f"{os.getpid()}\n"] * 2


def environment() -> dict[str, str]:
    """This process's own, without the process group that other tests made in it."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in group}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def test_the_command_line_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    done = run(sys.executable, RECIPE, "train.stepz=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown key 'train.stepz': did you mean 'steps'?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_without_warning_and_run_again(tmp_path: Path) -> None:
    """SIGKILL in the middle of a sitting, twice; the end is that of a run nobody touched, bit for bit."""
    settings = tmp_path / "tiny.yaml"
    settings.write_text(
        yaml.safe_dump(
            as_dict(
                tiny(tmp_path, "train.steps=60", "checkpoint.every=7", "evaluation.every=30", "evaluation.pairs=none")
            )
        )
    )
    command = [sys.executable, RECIPE, "--config", str(settings)]
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    for lines in (15, 40):
        with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as process:
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
        assert (tmp_path / "runs" / "tiny" / "ranks.pid").exists(), "it had no time to tidy up"
    for name in ("tiny", "whole"):
        done = run(*command, f"run.name={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for student in ("one", "two"):
        ends = [checkpoint.at_step(tmp_path / "runs" / name / "checkpoints", 60) for name in ("tiny", "whole")]
        broken, whole = (checkpoint.read_student(end, student) for end in ends)
        assert broken.keys() == whole.keys()
        assert all(torch.equal(broken[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_the_launcher_with_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", port]
    done = run(*launcher, RECIPE, "data.path=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: data.path=nowhere") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
