import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest

from engine.charts import downsample
from engine.metrics import MetricsLog, Record, StepRecord, StudentStep, Summary
from engine.report import write_report

STUDENTS = {"baby-4x128": 2.45, "baby-6x192": 2.3, "<b>&": 2.2}  # name: the loss it tends to
TEACHER = "gpt2 <i>705M</i>"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = f"# git_commit: {COMMIT}\ntrain:\n  steps: 5000\ndata:\n  path: <grammar> & co\n"
SAMPLES = ["The dog that sees the cats is not <happy>.", "Does she want the ball?\nNo, she wants milk."]


def synthetic_run(run_dir: Path, steps: int = 5000, *, every: int = 250, skipped: int | None = 3210) -> None:
    """A run's folder as the training loop leaves it: three students, one teacher, one skipped step, no model."""
    random = Random(0)
    names = list(STUDENTS)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(CONFIG)

    def student_step(name: str, step: int) -> StudentStep:
        ce = STUDENTS[name] + 7 * (1 + step / 12) ** -0.75 + random.gauss(0, 0.07)
        norm = math.exp(random.gauss(-0.9, 0.25)) + 3 / (1 + step / 30) + (4 if random.random() < 0.002 else 0)
        speed = (15_000 if step > 3 else 2_000) * random.gauss(1, 0.03) * (STUDENTS[name] - 1.5)
        return {
            "loss": ce + 0.2,
            "ce": math.nan if step == skipped and name == names[1] else ce,
            "grad_norm": math.inf if step == skipped and name == names[1] else norm,
            "lr": 1e-3 * min(step / 200, 0.55 + 0.45 * math.cos(math.pi * step / steps)) * (1 + names.index(name) / 4),
            "tokens_per_second": speed,
            "model_flops_per_second": speed * 6 * 4e6 * (3 - STUDENTS[name]),
            "clipped": norm > 1,
        }

    def step_record(step: int) -> StepRecord:
        def kl(i: int, j: int) -> float:
            if i == j:
                return 0.0
            level = 0.6 if j == len(names) else 0.05 * (1 + abs(i - j))
            return level * (0.1 + 8 * step / 40 * math.exp(-step / 150) + 0.9) * math.exp(random.gauss(0, 0.15))

        return {
            "kind": "step",
            "step": step,
            "epoch": step / 1300,
            "tokens": step * 2048,
            "seconds": 0.2,
            "tokens_per_second": (5_200 if step > 3 else 900) * random.gauss(1, 0.04),
            "model_flops": step * 10**12,
            "hardware_flops": step * 12 * 10**11,
            "mfu": random.gauss(0.4, 0.01),
            "hfu": random.gauss(0.45, 0.01),
            "students": {name: student_step(name, step) for name in names},
            "kl": [[kl(i, j) for j in range(len(names) + 1)] for i in range(len(names))],
        }

    def scores(name: str, step: int) -> tuple[float, float]:
        share = step / steps
        loss = STUDENTS[name] + 7 * (1 + step / 12) ** -0.75 + 0.04
        return loss, 0.5 + (0.47 - 0.1 * (STUDENTS[name] - 2.2)) * (1 - math.exp(-4 * share)) + random.gauss(0, 0.005)

    with MetricsLog(run_dir, None) as log:
        log.write({"kind": "streams", "step": 0, "students": names, "teachers": [TEACHER]})
        for step in range(1, steps + 1):
            log.write(step_record(step))
            if step == skipped:
                log.write({"kind": "skipped", "step": step, "students": [names[1]], "reason": "the loss is nan"})
            if step == steps // 2:
                log.write({"kind": "event", "step": step, "text": "resumed from checkpoints/step-2500 <ok>"})
            if step % 20 == 0:
                share = 0.3 * 0.999**step
                omega = dict(zip(names, (share, 0.5 - share / 2, 0.5 - share / 2), strict=True))
                terms = {"direct": 0.995, "own": 0.004, "peers": 0.001}
                log.write(
                    {
                        "kind": "outer",
                        "step": step,
                        "omega": omega,
                        "held_out_loss": 2.5,
                        "shares": terms,
                        "step_size": 0.1,
                        "seconds": 0.2,
                    }
                )
            if step % every == 0:
                evaluated = {name: scores(name, step) for name in names}
                evaluation: Record = {
                    "kind": "evaluation",
                    "step": step,
                    "students": {
                        name: {"validation_loss": loss, "pairs_accuracy": accuracy}
                        for name, (loss, accuracy) in evaluated.items()
                    },
                }
                log.write(evaluation)

    phenomena = ("subject_verb_agreement", "questions", "negation", "relative_clauses", "determiner_noun", "anaphora")
    summary: Summary = {
        "run": "mutual & <friends>",
        "finished": "2026-03-01T14:05:00+00:00",
        "git_commit": COMMIT,
        "steps": steps,
        "tokens": steps * 2048,
        "seconds": steps * 0.2,
        "world_size": 2,
        "zero_stage": 1,
        "device": "cpu",
        "data": {
            "name": "grammar",
            "train_tokens": 1_250_000,
            "train_words": 1_000_000,
            "tokens_per_word": 1.25,
            "entropy_per_word": 2.65,
        },
        "students": [
            {
                "name": name,
                "parameters": 4_000_000 + 1_700_000 * index,
                "validation_loss": scores(name, steps)[0],
                "validation_loss_per_word": scores(name, steps)[0] * 1.25,
                "pairs_accuracy": scores(name, steps)[1],
                "pairs_by_phenomenon": {key: min(1.0, random.uniform(0.45, 1.05)) for key in phenomena},
                "tokens_per_second": 15_000.0 - 2_500 * index,
                "folder": str(run_dir / "students" / name),
                "best_step": steps - every * index,
                "samples": SAMPLES,
            }
            for index, name in enumerate(names)
        ],
        "ledger": {
            "students": {
                name: {
                    "tokens": 2048,
                    "words": 1638,
                    "model_flops": 10**15,
                    "hardware_flops": 2 * 10**15,
                    "seconds": 61.0,
                }
                for name in names
            },
            "teachers": {"tokens": 0, "words": 0, "model_flops": 0, "hardware_flops": 0, "seconds": 0.0},
            "outer": {"tokens": 512, "words": 0, "model_flops": 10**13, "hardware_flops": 10**13, "seconds": 1.0},
            "seconds": 130.0,
            "joules": 7.2e6,
            "trained": [],
            "untold": ["runs/<unknown>"],
        },
        "before": {"model": 5 * 10**14, "hardware": 6 * 10**14},
        "report": str(run_dir / "report.html"),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))


class Page(HTMLParser):
    """Collects a page's text and attributes and checks that its tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def says(self, text: str) -> bool:
        return text in " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "mutual"
    synthetic_run(run_dir)
    return run_dir


def test_report_of_a_finished_run(run_dir: Path):
    report = write_report(run_dir)
    source = report.read_text()
    page = Page(source)

    assert report == run_dir / "report.html"
    assert len(source) < 400_000
    assert "http" not in source
    assert "nan" not in " ".join(value or "" for name, value in page.attributes if name in ("d", "style"))
    assert not any(name in ("src", "href", "srcset") for name, _ in page.attributes)
    assert "url(" not in source
    assert "@import" not in source

    for text in (
        "mutual & <friends>",
        "<b>&",
        TEACHER,
        "1 March 2026, 14:05 UTC",
        "0123456789ab",
        "5.7M",
        "step 3,210",
        "baby-6x192: the loss is nan",
        "resumed from checkpoints/step-2500 <ok>",
        "The dog that sees the cats is not <happy>.",
        "path: <grammar> & co",
        "2.1200",  # the entropy, in nats per token
        "1P 2P 1:01",  # a student's FLOPs and seconds
        "teachers’ own training 500T",
        "The devices report 2 kWh.",
        "not known: runs/<unknown>.",
        "Loss nats per token All of the run’s",
        "MFU",
        "Whom the ensemble trusts Weights of the students",
        "Moved by 99.5% the ensemble itself, 0.4% their own cross-entropy, 0.1% what they teach the others",
        "is negligible here: outer.terms=first would do",
        "KL divergence",
    ):
        assert page.says(text), text
    assert "b" in page.tags, "the test below would hold on an empty page"
    assert not re.search("<b>&(?!amp;)|<friends>|<i>705M|<happy>|<grammar>", source)


def test_report_of_a_killed_run(run_dir: Path, tmp_path: Path):
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(metrics[: len(metrics) // 3])
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = Page(write_report(tmp_path).read_text())
    assert page.says("not finished")
    assert page.says("0123456789ab")
    assert page.says("Cross-entropy")
    assert not page.says("best possible")


@pytest.mark.parametrize("records", [0, 1, 2])
def test_report_of_a_run_that_has_hardly_begun(run_dir: Path, tmp_path: Path, records: int):
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:records]))
    page = Page(write_report(tmp_path).read_text())
    assert page.says("No step has been recorded yet.") == (records < 2)


def test_report_of_one_student_alone(tmp_path: Path):
    student: StudentStep = {
        "loss": math.nan,
        "ce": math.nan,
        "grad_norm": math.nan,
        "lr": 0.0,
        "tokens_per_second": 10.0,
        "model_flops_per_second": 0.0,
        "clipped": False,
    }
    with MetricsLog(tmp_path, None) as log:
        for step in (1, 2):
            log.write(
                {
                    "kind": "step",
                    "step": step,
                    "epoch": 0.0,
                    "tokens": 10,
                    "seconds": 1.0,
                    "tokens_per_second": 10.0,
                    "students": {"solo": student},
                    "kl": [],
                }
            )
    page = Page(write_report(tmp_path).read_text())
    assert page.says("solo")
    assert not page.says("KL divergence")


def test_report_needs_a_run(tmp_path: Path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_downsampling_keeps_extremes_and_gaps():
    values = [1.0, 3.0, math.nan, math.nan, 5.0, math.inf, 2.0, 100.0]
    steps, mean, low, high = downsample(range(8), values, buckets=4)
    assert steps.tolist() == [0.5, 2.5, 4.5, 6.5]
    assert mean.tolist() == pytest.approx([2.0, math.nan, 5.0, 51.0], nan_ok=True)
    assert (low[3], high[3]) == (2.0, 100.0)
