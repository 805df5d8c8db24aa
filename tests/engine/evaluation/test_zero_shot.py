import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from engine.config.settings import TokenizerConfig
from engine.data import tokenizer as tokenization
from engine.data.grammar.generator import generate, minimal_pairs
from engine.data.tokenizer import Tokenizer
from engine.evaluation.log_probabilities import model_log_probabilities
from engine.evaluation.tasks import Question, Task, accuracies, read_tasks
from engine.evaluation.zero_shot import ZeroShot
from engine.models.huggingface import export_model, load_model
from engine.models.roberta import Roberta, RobertaShape
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime
from engine.system.errors import UserError

MAX_LENGTH = 48


def task(*questions: Question) -> Task:
    return Task("test", list(questions), accuracies)


@torch.no_grad()
def plain(folder: Path, questions: list[Question]) -> list[list[float]]:
    """Every answer's summed log-probability by transformers alone, a text at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def log_probability(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        log_prob = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return log_prob.gather(-1, ids[0, 1:, None]).double().sum().item()

    return [[log_probability(answer) for answer in question.answers] for question in questions]


def margins(answers: list[list[float]]) -> torch.Tensor:
    """Each answer's lead over the first."""
    return torch.tensor([other - item[0] for item in answers for other in item[1:]])


def assert_equal_decisions(answers: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(margins(answers), margins(expected), rtol=1e-4, atol=1e-4)
    decisions = [[item.index(max(item)) for item in items] for items in (answers, expected)]
    assert decisions[0] == decisions[1]
    assert len(set(decisions[0])) > 1


def test_an_exported_student_decides_item_by_item_as_transformers_does(exported: Path, runtime: Runtime) -> None:
    questions = [Question(p.phenomenon, (p.good, p.bad)) for p in minimal_pairs(5, 3)]
    texts = ["the dog sees a cat.\nthe cat sleeps.", "the dog sees a cat.\nthe dog sleeps.", "the dog sees.\n"]
    questions += [Question("three", tuple(texts)), Question("same", (texts[0], texts[0]))]
    model, tokenizer = load_model(exported)
    zero_shot = ZeroShot([task(*questions)], tokenizer, runtime, max_length=MAX_LENGTH, share=True)
    with torch.inference_mode():
        [answers] = zero_shot.answers(model_log_probabilities([model]))
    assert answers[-1] == [0.0, 0.0]
    assert_equal_decisions(answers, plain(exported, questions))


def test_and_so_it_does_on_every_set_of_the_evaluation_data(
    cohort: Cohort, exported: Path, runtime: Runtime, evaluation_data: Path
) -> None:
    """A sample; the tiny tokenizer makes long texts, so positions are taken from a copy of the student with more."""
    tasks = read_tasks(("blimp", "blimp_supplement", "wug_adj_nominalization"), evaluation_data)
    picked = [question for t in tasks for question in t.questions[:: max(1, len(t.questions) // 90)]]
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    try:
        model, tokenizer = load_model(exported)
        zero_shot = ZeroShot([task(*picked)], tokenizer, runtime, max_length=300, share=True)
        with torch.inference_mode():
            [answers] = zero_shot.answers(model_log_probabilities([model]))
        assert_equal_decisions(answers, plain(exported, picked))
    finally:
        (exported / "config.json").write_text(json.dumps(config))


def test_every_student_and_the_ensemble_get_a_score_of_each_task(
    cohort: Cohort, runtime: Runtime, tokenizer: Tokenizer
) -> None:
    one = task(Question("a", ("look!", "look look!")), Question("b", ("the dog.", "dog the.", "the the.")))
    two = task(Question("c", ("where is she?", "where is she?")))
    zero_shot = ZeroShot([one, two], tokenizer, runtime, max_length=MAX_LENGTH, share=True)
    with torch.no_grad():
        scores = zero_shot.scores(model_log_probabilities([student.model for student in cohort]))
    assert len(scores) == 3
    for first, second in scores:
        assert [s.name for s in first.sets] == ["a", "b"]
        assert [s.chance for s in first.sets] == [1 / 2, 1 / 3]
        assert (second.mean.score, second.mean.strict_score) == (1.0, 0.0), "the tie policies differ where all is a tie"


def test_a_context_is_not_scored(cohort: Cohort, runtime: Runtime, tokenizer: Tokenizer) -> None:
    context, word = "the dog", "sleeps."
    questions = ZeroShot([task(Question("", (word,), context))], tokenizer, runtime, max_length=MAX_LENGTH, share=True)
    model = cohort[0].model
    with torch.no_grad():
        [[[log_probability]]] = questions.answers(model_log_probabilities([model]))
        before, tokens = [tokenizer.boundary, *tokenizer.encode(context)], tokenizer.encode(word)
        log_prob = (model(torch.tensor([before + tokens])) @ model.head.T).double().log_softmax(-1)
    expected = sum(log_prob[len(before) + i - 1, token].item() for i, token in enumerate(tokens))
    assert log_probability == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("boundary", [True, False])
def test_a_text_may_fill_the_positions_and_no_more(
    cohort: Cohort, runtime: Runtime, train_tokenizer: Callable[..., Tokenizer], boundary: bool
) -> None:
    tokenizer = train_tokenizer(boundary=boundary)
    inputs = len(tokenizer.encode("the dog sleeps.")) - (not boundary)  # all but the last token
    question = task(Question("x", ("the dog sleeps.", "the dog.")))
    zero_shot = ZeroShot([question], tokenizer, runtime, max_length=inputs, share=True)
    with torch.no_grad():
        zero_shot.answers(model_log_probabilities([cohort[0].model]))
    with pytest.raises(UserError, match=rf"^test: 'the dog sleeps\.': .* max_length={inputs - 1}:"):
        ZeroShot([question], tokenizer, runtime, max_length=inputs - 1, share=True)


@torch.no_grad()
def test_masked_models_are_scored_by_pseudo_log_likelihood(tmp_path: Path, runtime: Runtime) -> None:
    """Against one forward pass by transformers for every token, with it alone masked (Salazar et al. 2020)."""
    tokenizer = tokenization.train(generate(0, 3000), TokenizerConfig(mask=True), 360, tmp_path, boundary=True)
    boundary, mask = tokenizer.boundary, tokenizer.mask
    assert boundary is not None
    assert mask is not None
    shape = RobertaShape(layers=2, hidden=32, heads=4, ffn=48, vocab_size=360, max_length=MAX_LENGTH)
    model = Roberta(shape)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2, generator=generator)
    export_model(tmp_path / "student", shape, dict(model.named_parameters()), tokenizer)
    theirs: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "student").eval()
    pairs = [Question(p.phenomenon, (p.good, p.bad)) for p in minimal_pairs(5, 1)][:4]
    after = Question("after", (" a cat", " the dogs sleep"), context="the dog sees")

    def expected(text: str, context: str = "") -> float:
        before = [boundary, *(tokenizer.encode(context) if context else [])]
        ids = torch.tensor([*before, *tokenizer.encode(text), boundary])
        total = 0.0
        for at in range(len(before), len(ids) - 1):
            masked = ids.clone()
            masked[at] = mask
            total += theirs(masked[None]).logits[0, at].log_softmax(-1)[ids[at]].item()
        return total

    loaded, loaded_tokenizer = load_model(tmp_path / "student")
    options = {"max_length": MAX_LENGTH, "share": False, "masked": True}
    zero_shot = ZeroShot([task(*pairs, after)], loaded_tokenizer, runtime, **options)
    [answers] = zero_shot.answers(model_log_probabilities([loaded]))
    expected_scores = [[expected(answer) for answer in pair.answers] for pair in pairs]
    expected_scores.append([expected(answer, after.context) for answer in after.answers])
    for ours, naive in zip(answers, expected_scores, strict=True):
        assert ours == pytest.approx(naive, rel=1e-5)
    with pytest.raises(UserError, match="max_length=5"):
        ZeroShot([task(*pairs)], loaded_tokenizer, runtime, **{**options, "max_length": 5})


def test_masked_models_need_a_mask_token(tokenizer: Tokenizer, runtime: Runtime) -> None:
    with pytest.raises(UserError, match="no mask token"):
        ZeroShot([task(Question("a", ("a", "b")))], tokenizer, runtime, max_length=9, share=False, masked=True)
