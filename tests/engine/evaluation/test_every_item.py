"""One trained student on the whole of the evaluation data: half an hour, so only where CRECHE_STUDENT names its Hugging
Face folder. With CRECHE_LM_EVAL (see test_lm_eval.py), lm-eval's accuracies of every set too.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from engine.evaluation.scoring import model_log_probabilities
from engine.evaluation.tasks import minimal_pairs, read_tasks
from engine.evaluation.zero_shot import ZeroShot
from engine.export import load_model
from engine.runtime import Runtime

if "CRECHE_STUDENT" not in os.environ:
    pytest.skip("a long comparison: name a student's Hugging Face folder in CRECHE_STUDENT", allow_module_level=True)
STUDENT = Path(os.environ["CRECHE_STUDENT"])
CLOSE = 1e-3  # nats: answers that lie closer may be decided either way by rounding


def sibling(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["blimp", "blimp_supplement", "wug_adj_nominalization", "entity_tracking"])
def test_every_decision_is_that_of_plain_transformers(name: str, place: Runtime, evaluation_data: Path) -> None:
    [task] = read_tasks([name], evaluation_data)
    model, tokenizer = load_model(STUDENT)
    with torch.inference_mode():
        zero_shot = ZeroShot([task], tokenizer, place, positions=model.shape.positions, share=True)
        [found] = zero_shot.answers(model_log_probabilities([model]))
        expected = sibling("test_zero_shot").plain(STUDENT, task.questions)
    lead = torch.tensor([max(a - item[0] for a in item[1:]) for item in found], dtype=torch.float64)
    lead_expected = torch.tensor([max(a - item[0] for a in item[1:]) for item in expected], dtype=torch.float64)
    apart = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a.index(max(a)) != b.index(max(b))]
    print(
        f"\n{name}: {len(found)} items, margins within {(lead - lead_expected).abs().max():.1e} nats, "
        f"{len(apart)} decisions differ"
    )
    for i in apart:
        print(f"  item {i}: ours {found[i]}, transformers {expected[i]}")
    torch.testing.assert_close(lead, lead_expected, rtol=1e-4, atol=CLOSE)
    assert all(sorted(expected[i])[-1] - sorted(expected[i])[-2] < CLOSE for i in apart)


def test_every_sets_accuracy_is_that_of_lm_eval(place: Runtime, evaluation_data: Path, tmp_path: Path) -> None:
    if "CRECHE_LM_EVAL" not in os.environ:
        pytest.skip("name an interpreter that has lm-eval in CRECHE_LM_EVAL")
    files = sorted(
        [*(evaluation_data / "blimp_filtered").iterdir(), *(evaluation_data / "supplement_filtered").iterdir()]
    )
    theirs = sibling("test_lm_eval").lm_eval(STUDENT, [("pairs", file) for file in files], tmp_path)
    model, tokenizer = load_model(STUDENT)
    different = 0
    for file in files:
        task = minimal_pairs(file.stem, file)
        with torch.inference_mode():
            zero_shot = ZeroShot([task], tokenizer, place, positions=model.shape.positions, share=True)
            [answers] = zero_shot.answers(model_log_probabilities([model]))
        ours = sum(item[0] == max(item) for item in answers)
        close = sum(abs(a - b) < CLOSE and a != b for a, b in answers)
        off = abs(ours - round(theirs[file.stem] * len(answers)))
        different += off
        assert off <= close, f"{file.stem}: {ours} of {len(answers)} right, lm-eval {theirs[file.stem]}"
    print(f"\n{len(files)} sets: {different} decisions differ from lm-eval's, all between answers within {CLOSE} nats")
