import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from engine.reporting.charts import BOTTOM, BUCKETS, LEFT, NAME_HEIGHT, NAME_LETTERS, RIGHT, TOP, Chart, curve
from engine.reporting.metrics_log import MetricsLog
from engine.reporting.records import Record, StepRecord, StudentStep, Summary
from engine.reporting.report import compute, read_history, write_report
from engine.system.errors import UserError

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
        "usage": {
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
            "inherited": [],
            "unknown": ["runs/<unknown>"],
        },
        "inherited_flops": {"model": 5 * 10**14, "hardware": 6 * 10**14},
        "report": str(run_dir / "report.html"),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))


class Page(HTMLParser):
    """Collects a page's text, figures and attributes; checks that its tags are balanced and that it stands alone."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.text: list[str] = []
        self.figures: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

        assert not {"script", "link", "img", "iframe", "object"} & set(self.tags)
        assert "http" not in source
        assert "@import" not in source
        defined = [value for name, value in self.attributes if name == "id"]
        assert len(defined) == len(set(defined))
        used = [value for name, value in self.attributes if name.split(":")[-1] in ("src", "srcset", "href")]
        assert {f"#{name}" for name in defined} >= {*used, *re.findall(r"url\((.*?)\)", source)}
        for name, value in self.attributes:
            assert name == "class" or not re.search(r"\b(nan|inf)\b", value), (name, value)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.figures += [""] if tag == "figure" else []

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "figure" in self._open and "svg" not in self._open:
            self.figures[-1] += f" {data}"

    def says(self, text: str) -> bool:
        return text in " ".join(" ".join(self.text).split())

    def figure(self, title: str) -> str:
        """What the figure of that title says around its drawing."""
        (text,) = (text for text in (" ".join(figure.split()) for figure in self.figures) if text.startswith(title))
        return text


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text())


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
    assert [path.name for path in run_dir.glob("report*")] == ["report.html"]
    assert len(source) < 400_000
    assert write_report(run_dir).read_text() == source

    for text in (
        "mutual & <friends>",
        "<b>&",
        TEACHER,
        "1 March 2026, 14:05 UTC",
        "0123456789ab",
        "5.7M",
        "2.5658 3.2072 +0.5572 94.1% 15,000 5,000",  # the first student's row
        "2.1200 2.6500",  # the entropy, in nats per token and per word
        "subject verb agreement 100.0% 89.4% 82.1%",
        "learner baby-4x128 baby-6x192 <b>& gpt2 <i>705M</i>",
        "baby-4x128 0.101 0.151 0.598 baby-6x192 0.102 0.0998 0.595 <b>& 0.149 0.103 0.618",  # the KL matrix
        "mean over the last 50 recorded steps",
        "step 3,210",
        "baby-6x192: the loss is nan",
        "resumed from checkpoints/step-2500 <ok>",
        "The dog that sees the cats is not <happy>.",
        "path: <grammar> & co",
        "1P 2P 1:01",  # a student's FLOPs and seconds
        "teachers’ own training 500T",
        "The devices report 2 kWh. What",
        "not known: runs/<unknown>.",
        "KL divergence",
    ):
        assert page.says(text), text
    assert "b" in page.tags, "the test below would hold on an empty page"
    assert re.findall('class="best">([^<]*)', source) == ["2.3158", "2.8947", "+0.2447", "95.9%"]
    assert not re.search("<b>&(?!amp;)|<friends>|<i>705M|<happy>|<grammar>", source)

    assert "2.57 baby-4x128 2.42 baby-6x192 2.32 <b>& 2.12 best possible" in page.figure("Cross-entropy")
    assert "Cut at the top: the first losses reached 9.07." in page.figure("Cross-entropy")
    assert "96.5 <b>& 94.6 baby-6x192 93.7 baby-4x128 50 chance" in page.figure("Accuracy")
    assert re.search(r"0.6\d* gpt2 <i>705M</i> 0.1\d* baby-4x128 0.1\d* baby-6x192$", page.figure("<b>& learns from"))
    assert "Moved by 99.5% the ensemble itself, 0.4% their own cross-entropy, 0.1% what" in page.figure("Weights of")
    assert "is negligible here: outer.terms=direct would do" in page.figure("Weights of")
    assert "baby-4x128 3%, baby-6x192 3%, <b>& 3%." in page.figure("Gradient norm")
    assert "1.5e-4 <b>& 1.25e-4 baby-6x192 1e-4 baby-4x128" in page.figure("Learning rate")
    assert page.figure("Tokens per second").endswith("5.22k all")
    assert re.search("20.G baby-6x192 20.G <b>& 1..G baby-4x128", page.figure("Model FLOP/s"))
    assert re.search("4[45].* HFU (40|39).* MFU", page.figure("Utilisation"))
    assert page.figure("Loss nats per token All of the run’s").endswith("2.57 baby-4x128 2.42 baby-6x192 2.32 <b>&")
    assert len(page.figures) == 12


def test_drawings_take_their_colours_from_the_page_and_mark_events(run_dir: Path):
    source = write_report(run_dir).read_text()
    drawings = re.findall("<svg.*?</svg>", source, re.DOTALL)
    assert len(drawings) == 13  # that of the loss twice: for wide screens and for narrow
    assert drawings[0].count("fill-opacity: 0.11") == 3  # the bands
    for drawing in drawings:
        assert not re.search("(?:stroke|fill|color): *(?:#|rgb|black)", drawing)
        over_steps = ">step</text>" in drawing
        for colour in ("alarm", "quiet"):
            assert len(re.findall(rf"<use [^>]*stroke: var\(--{colour}\)", drawing)) == over_steps
    variables = set(re.findall(r"var\((--[\w-]+)\)", "".join(drawings)))
    assert variables == {"--ink", "--quiet", "--grid", "--alarm", "--c0", "--c1", "--c2", "--c3"}
    light, dark = source.split("prefers-color-scheme: dark")
    for variable in variables:
        assert f"{variable}: #" in light
        assert f"{variable}: #" in dark


def test_loss_is_drawn_over_the_teachers_training_too(run_dir: Path):
    history, summary = read_history(run_dir / "metrics.jsonl"), json.loads((run_dir / "summary.json").read_text())
    (chart,) = compute(history, summary)
    assert (chart.first, chart.last) == (501e12, 5.5e15)
    assert [curve.x[0] for curve in chart.curves] == [750e12] * 3  # the first evaluation, after 250 steps
    (without,) = compute(history, None)
    assert without.last == 5e15


def test_scores_below_chance_have_another_colour(run_dir: Path, tmp_path: Path):
    summary = json.loads((run_dir / "summary.json").read_text())
    for student, score in zip(summary["students"], (0.25, 0.5, 1.0), strict=True):
        student["pairs_by_phenomenon"] = {"questions": score}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    synthetic = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(synthetic[:300]))
    cells = re.findall(r'--colour: var\(--(c.)\); --share: (\d+)%">([\d.]+)%', page_of(tmp_path).source)
    assert cells == [("c1", "24", "25.0"), ("c0", "4", "50.0"), ("c0", "44", "100.0")]


def test_size_does_not_grow_with_the_run(run_dir: Path, tmp_path: Path):
    synthetic_run(tmp_path, 1500, every=75, skipped=None)
    assert len(page_of(run_dir).source) < 1.1 * len(page_of(tmp_path).source)

    with MetricsLog(tmp_path, position=(tmp_path / "metrics.jsonl").stat().st_size) as log:
        for step in range(1500):
            log.write({"kind": "event", "step": 1 + step, "text": "resumed"})
    page = page_of(tmp_path)
    assert page.says("and 1,301 more in metrics.jsonl")
    assert page.tags.count("li") == 201
    assert len(page.source) < 1_000_000


def test_report_of_a_killed_run(run_dir: Path, tmp_path: Path):
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(metrics[: len(metrics) // 3])
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = page_of(tmp_path)
    assert page.says("not finished")
    assert page.says("0123456789ab")
    assert "Strong: the held-out text." in page.figure("Cross-entropy")
    assert not page.says("best possible")


@pytest.mark.parametrize("records", [0, 1, 2])
@pytest.mark.filterwarnings("error")
def test_report_of_a_run_that_has_hardly_begun(run_dir: Path, tmp_path: Path, records: int):
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:records]))
    page = page_of(tmp_path)
    assert page.says("No step has been recorded yet.") == (records < 2)
    assert bool(page.figures) == (records == 2)


@pytest.mark.parametrize(("students", "value"), [(1, math.nan), (1, 0.0), (8, 0.25), (8, math.nan)])
@pytest.mark.filterwarnings("error")
def test_report_of_one_student_or_eight_whatever_they_measure(tmp_path: Path, students: int, value: float):
    names = [f"$x_{i}$ of a long name" for i in range(students)]
    student: StudentStep = {
        "loss": value,
        "ce": value,
        "grad_norm": value,
        "lr": 0.0,
        "tokens_per_second": 10.0,
        "model_flops_per_second": 0.0,
        "clipped": False,
    }
    with MetricsLog(tmp_path, None) as log:
        log.write({"kind": "streams", "step": 0, "students": names, "teachers": []})
        for step in (1, 2):
            log.write(
                {
                    "kind": "step",
                    "step": step,
                    "epoch": 0.0,
                    "tokens": 10,
                    "seconds": 1.0,
                    "tokens_per_second": 10.0,
                    "students": dict.fromkeys(names, student),
                    "kl": [[value] * students] * students if students > 1 else [],
                }
            )
        evaluation = {"validation_loss": value, "pairs_accuracy": None}
        log.write({"kind": "evaluation", "step": 2, "students": dict.fromkeys(names, evaluation)})  # pyright: ignore[reportArgumentType]
    page = page_of(tmp_path)
    for name in names:
        assert f"10 {name}" in page.figure("Tokens per second")
        assert f">10 {name[:NAME_LETTERS]}</text>" in page.source
        assert (name in page.figure("Cross-entropy")) == math.isfinite(value)
    assert page.says("KL divergence") == (students == 8)
    assert page.says("– – –") == (students == 8 and math.isnan(value))
    assert not page.says("Minimal pairs")
    assert not page.says("Utilisation")


def test_report_needs_a_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_downsampling_keeps_extremes_and_gaps():
    values = [1.0, 3.0, math.nan, None, 5.0, math.inf, 2.0, 100.0]
    short = curve("", range(8), values, "ink", 4)
    assert short.x.tolist() == [0.5, 2.5, 4.5, 6.5]
    assert short.y.tolist() == pytest.approx([2.0, math.nan, 5.0, 51.0], nan_ok=True)
    assert (short.low[3], short.high[3]) == (2.0, 100.0)
    assert len(curve("", range(10_000), range(10_000), "ink").x) == BUCKETS


def points(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The stretches of the line drawn in that colour."""
    (path,) = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--{colour}\)', svg)
    pairs = [re.findall(r"([-\d.]+) ([-\d.]+)", stretch) for stretch in path.split("M")[1:]]
    return [[(float(x), float(y)) for x, y in stretch] for stretch in pairs]


def test_a_chart_shows_what_it_is_given():
    ramp = curve("ramp", (0, 25, 50, 75, 100), (0.0, 1.0, math.nan, 3.0, 4.0), "c0")
    svg = Chart("", "", [ramp], 0, 100, span=(0, 4)).svg(500, 200)
    right, bottom = 500 - RIGHT, 200 - BOTTOM
    quarter_x, quarter_y = (right - LEFT) / 4, (bottom - TOP) / 4
    first, second = points(svg, "c0")
    assert first == [(LEFT, bottom), (LEFT + int(10 * quarter_x) / 10, bottom - quarter_y)]
    assert second[-1] == (right, TOP)
    assert [f">{tick}</text>" in svg for tick in (0, 2, 4, 20, 100)] == [True] * 5


def test_a_logarithmic_chart_is_one():
    growth = curve("growth", (0, 1, 2), (1.0, 10.0, 100.0), "c0")
    (stretch,) = points(Chart("", "", [growth], 0, 2, log=True).svg(500, 200), "c0")
    (_, low), (_, middle), (_, high) = stretch
    assert low - middle == pytest.approx(middle - high, abs=0.2)


def test_names_beside_the_axes_do_not_overlap():
    curves = [curve(f"student {i}", (0, 1), (1.0, 1 + i / 100), f"c{i}") for i in range(8)]
    chart = Chart("", "", curves, 0, 1, span=(0, 1.08), rules={"best possible": 0.0})
    labels = re.findall(r'class="end">\s*<text [^>]*y="([\d.]+)"[^>]*>([^<]*)', chart.svg(500, 200))
    assert [text for _, text in labels[:3]] == ["0 best possible", "1 student 0", "1.01 student 1"]
    heights = [float(y) for y, _ in labels]
    assert len(heights) == 9
    assert all(below - above >= NAME_HEIGHT - 0.2 for below, above in pairwise(heights))
    assert 0 < heights[-1] < heights[0] < 200
