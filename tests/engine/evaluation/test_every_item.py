"""One trained student on the whole of the evaluation data, item by item: half an hour, so only where CRECHE_STUDENT
names its Hugging Face folder. With CRECHE_LM_EVAL (see test_lm_eval.py) against lm-eval too. `-k` takes one task.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.evaluation.log_probabilities import model_log_probabilities
from engine.evaluation.tasks import Task, read_tasks
from engine.evaluation.zero_shot import ZeroShot
from engine.models.huggingface import load_model
from engine.system.distributed import Runtime

if "CRECHE_STUDENT" not in os.environ:
    pytest.skip("a long comparison: name a student's Hugging Face folder in CRECHE_STUDENT", allow_module_level=True)
pytestmark = pytest.mark.timeout(0)
STUDENT = Path(os.environ["CRECHE_STUDENT"])
CLOSE = 1e-3  # nats: answers that lie closer may be decided either way by rounding
FILES = {  # of each task: their folder, and lm-eval's template for them
    "blimp": ("blimp_filtered", "pairs"),
    "blimp_supplement": ("supplement_filtered", "pairs"),
    "wug_adj_nominalization": ("wug_adj_nominalization", "wug"),
    "entity_tracking": ("entity_tracking", "entity_tracking"),
}


def sibling(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FILES)
def scored(request: pytest.FixtureRequest, runtime: Runtime, evaluation_data: Path) -> tuple[Task, list[list[float]]]:
    """A task, and every answer's log-probability by ours."""
    [task] = read_tasks([request.param], evaluation_data)
    model, tokenizer = load_model(STUDENT)
    with torch.inference_mode():
        zero_shot = ZeroShot([task], tokenizer, runtime, max_length=model.shape.max_length, share=True)
        [answers] = zero_shot.answers(model_log_probabilities([model]))
    return task, answers


def test_every_decision_is_that_of_plain_transformers(scored: tuple[Task, list[list[float]]]) -> None:
    task, ours = scored
    theirs = sibling("test_zero_shot").plain(STUDENT, task.questions)
    assert_same_decisions(f"{task.name}, transformers", ours, theirs)


def test_every_decision_and_accuracy_is_that_of_lm_eval(
    scored: tuple[Task, list[list[float]]], evaluation_data: Path, tmp_path: Path
) -> None:
    if "CRECHE_LM_EVAL" not in os.environ:
        pytest.skip("name an interpreter that has lm-eval in CRECHE_LM_EVAL")
    task, ours = scored
    folder, template = FILES[task.name]
    files = sorted((evaluation_data / folder).glob("*.jsonl"))
    accuracies = sibling("test_lm_eval").lm_eval(STUDENT, [(template, file) for file in files], tmp_path)
    theirs: list[list[float]] = []
    for file in files:
        begin = len(theirs)
        [path] = (tmp_path / "out").rglob(f"samples_{file.stem}_20*.jsonl")  # the year
        samples = sorted(map(json.loads, path.read_text().split("\n")[:-1]), key=lambda sample: sample["doc_id"])
        theirs += [[float(answer) for answer, _ in sample["filtered_resps"]] for sample in samples]
        right = sum(item[0] == max(item) for item in ours[begin : len(theirs)])
        close = sum(margin(item) < CLOSE for item in theirs[begin:])
        off = abs(right - round(accuracies[file.stem] * len(samples)))
        print(f"\n{file.stem}: {right} of {len(samples)} right, lm-eval {accuracies[file.stem]:.6f}", end="")
        assert off <= close, file.stem
    assert_same_decisions(f"{task.name}, lm-eval", ours, theirs)


def assert_same_decisions(name: str, ours: Sequence[list[float]], theirs: Sequence[list[float]]) -> None:
    """And margins; a decision may differ only where two answers are as good as equal, and is printed then."""
    assert [len(item) for item in ours] == [len(item) for item in theirs]
    lead, lead_theirs = (
        torch.tensor([max(item[1:]) - item[0] for item in answers], dtype=torch.float64) for answers in (ours, theirs)
    )
    apart = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.index(max(a)) != b.index(max(b))]
    print(
        f"\n{name}: {len(ours)} items, margins within {(lead - lead_theirs).abs().max():.1e} nats, {len(apart)} "
        f"decisions differ, {sum(margin(item) < CLOSE for item in theirs)} items with answers within {CLOSE} nats"
    )
    for i in apart:
        print(f"  item {i}: ours {ours[i]}, theirs {theirs[i]}")
    torch.testing.assert_close(lead, lead_theirs, rtol=1e-4, atol=CLOSE)
    assert all(margin(theirs[i]) < CLOSE for i in apart)


def margin(item: list[float]) -> float:
    second, first = sorted(item)[-2:]
    return first - second
