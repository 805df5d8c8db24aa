import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.settings import FinetuneConfig
from engine.data.batches import IGNORED
from engine.data.tokenizer import Tokenizer
from engine.evaluation import finetune as module
from engine.evaluation.finetune import Dataset, Examples, finetune, read_datasets
from engine.evaluation.log_probabilities import TokenTree, TreeBatch
from engine.evaluation.metrics import TaskScore
from engine.models.base import LanguageModel
from engine.models.families import new_model
from engine.models.llama import Llama
from engine.models.roberta import RobertaShape
from engine.students.cohort import Cohort
from engine.system.distributed import Runtime
from engine.system.errors import UserError

QUICK = FinetuneConfig(seeds=(1,), learning_rate=3e-3, batch=8, epochs=3)


@pytest.fixture
def model(cohort: Cohort) -> Llama:
    assert isinstance(cohort[0].model, Llama)
    return cohort[0].model


def questions(count: int, begin: int) -> Examples:
    """Class 1 where both texts name the same animal; lengths vary."""
    animals = ("dog", "cat", "bird")
    chosen = [(animals[i % 3], animals[(i if i % 2 else i + 1) % 3], i % 2) for i in range(begin, begin + count)]
    texts = [(f"look at the {a} " + "now " * (i % 4), f"the {b}") for i, (a, b, _) in enumerate(chosen)]
    return Examples(list(texts), [label for *_, label in chosen])


SET = Dataset("rte", "rte", questions(40, 0), questions(18, 40))


def run(
    model: LanguageModel, tokenizer: Tokenizer, runtime: Runtime, folder: Path, config: FinetuneConfig = QUICK
) -> TaskScore:
    return finetune([SET], model, tokenizer, config, folder, runtime, say=lambda _: None)


def test_a_model_learns_and_stays_as_it_was(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path
) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    config = replace(QUICK, epochs=8, seeds=(1, 2))
    state = torch.get_rng_state()
    score = run(model, tokenizer, runtime, tmp_path, config)
    assert [s.name for s in score.sets] == ["rte, seed 1", "rte, seed 2"]
    assert all(s.score >= 0.9 for s in score.sets)
    assert (score.mean.chance, score.mean.baseline) == (0.5, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state), "training draws what it would have drawn without"


def test_a_masked_model_learns_too_and_sees_no_padding(
    tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = new_model(RobertaShape(1, 32, 4, 64, tokenizer.vocab_size, 48, dropout=0.1))
    with torch.no_grad():
        for parameter in model.get_submodule("encoder").parameters():  # large enough to have opinions
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    lengths: list[set[int]] = []
    collate = module.collate

    def watched(trees: list[TokenTree], device: torch.device) -> TreeBatch:
        lengths.append({len(tree.tokens) for tree in trees})
        assert {row for tree in trees for row in tree.rows} == {0}, "the first token's state, which has seen both texts"
        return collate(trees, device)

    monkeypatch.setattr(module, "collate", watched)
    dogs = [
        Examples(
            [(f"look at the {a} " + "now " * (i % 4), "a bird") for i in range(n) for a in ("dog", "cat")], [1, 0] * n
        )
        for n in (20, 9)
    ]
    config = replace(QUICK, epochs=12)
    score = finetune([Dataset("rte", "rte", *dogs)], model, tokenizer, config, tmp_path, runtime, lambda _: None)
    assert score.mean.score >= 0.9
    assert {len(lengths_of_batch) for lengths_of_batch in lengths} == {1}
    assert len(set.union(*lengths)) > 1


def test_a_stopped_job_ends_where_it_would_have_ended(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tokenizer, runtime, tmp_path / "whole")
    [whole] = (tmp_path / "whole").glob("*.json")

    epochs: list[int] = []
    epoch = module._Job._epoch

    def stop_at_second(self: Any, cohort: Cohort, number: int) -> float:
        epochs.append(number)
        if epochs == [0, 1]:
            raise KeyboardInterrupt
        return epoch(self, cohort, number)

    losses: dict[str, list[str]] = {}

    def say_into(key: str) -> Callable[[str], None]:
        return losses.setdefault(key, []).append

    monkeypatch.setattr(module._Job, "_epoch", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        finetune([SET], model, tokenizer, QUICK, tmp_path / "parts", runtime, say_into("parts"))
    finetune([SET], model, tokenizer, QUICK, tmp_path / "parts", runtime, say_into("parts"))
    assert epochs == [0, 1, 1, 2]
    monkeypatch.undo()
    finetune([SET], model, tokenizer, QUICK, tmp_path / "again", runtime, say_into("again"))
    assert losses["parts"] == losses["again"], "the same losses, epoch by epoch"
    [parts] = (tmp_path / "parts").iterdir()
    assert (parts.name, parts.read_text()) == (whole.name, whole.read_text()), "and nothing else is left behind"


def test_a_job_killed_as_its_result_is_written_is_not_done_again(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, runtime, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(module._Job, "_epoch", lambda *_: pytest.fail("done before"))
    score = run(model, tokenizer, runtime, tmp_path)
    [result] = tmp_path.iterdir()
    result.with_suffix(".pt").touch()  # as a kill after the result leaves it
    assert run(model, tokenizer, runtime, tmp_path) == score
    assert list(tmp_path.iterdir()) == [result]


def test_results_are_kept_for_the_same_job_alone(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, tokenizer, runtime, tmp_path)
    monkeypatch.setattr(module._Job, "run", lambda self, state: pytest.fail("done before"))
    assert run(model, tokenizer, runtime, tmp_path) == first
    with pytest.raises(pytest.fail.Exception):
        run(model, tokenizer, runtime, tmp_path, replace(QUICK, learning_rate=1e-3))


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_share_out_a_batch(world_size: int, tokenizer: Tokenizer, model: Llama, runtime: Runtime) -> None:
    """And one for whom nothing is left takes part with an example that does not count."""
    recipe = module.RECIPES["babylm-2025"]
    counted_samples: list[int] = []
    for rank in range(world_size):
        at = replace(runtime, rank=rank, world_size=world_size)
        job = module._Job(SET, module.Settings(batch=5), recipe, model, tokenizer, at, print)
        batches = job._batches(job.train[:5], epoch=2)
        counted = torch.cat([batch.targets_N for batch in batches]) != IGNORED
        assert counted.all() if rank < 5 else not counted.any()
        samples = torch.cat([batch.samples_B for batch in batches if batch.samples_B is not None])
        counted_samples += samples[counted].tolist()
    assert sorted(counted_samples) == [2 * len(SET.train.labels) + i for i in range(5)]


def test_the_best_epoch_is_reported_beside_the_last() -> None:
    labels = SET.validation.labels
    wrong = [1 - label for label in labels]
    score = module._score(SET, 5, [wrong, labels, wrong])
    assert (score.score, score.strict_score, score.standard_error, score.name) == (1.0, 0.0, 0.0, "rte, seed 5")
    msgs = replace(SET, task="msgs", name="main_verb_control")
    assert module._score(msgs, 5, [wrong]).score == pytest.approx(-1.0), "Matthews' correlation"


def test_a_loss_that_is_not_finite_stops_it(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="loss not finite in epoch"):
        run(model, tokenizer, runtime, tmp_path, replace(QUICK, learning_rate=1e30))


def test_predictions_that_are_not_finite_are_no_result(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_in_nan(self: Any, cohort: Cohort, number: int) -> float:
        model: Any = cohort[0].model
        model.out.bias.data.fill_(torch.nan)
        return 0.0

    monkeypatch.setattr(module._Job, "_epoch", ends_in_nan)
    with pytest.raises(UserError, match="predictions are not finite"):
        run(model, tokenizer, runtime, tmp_path)
    assert not list(tmp_path.iterdir())


def test_long_examples_are_cut_and_it_is_said(
    model: Llama, tokenizer: Tokenizer, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST", 20)
    said: list[str] = []
    part = Examples([("look " * 40, "the dog"), ("look", "the dog")], [0, 1])
    settings, recipe = module.Settings(), module.RECIPES["babylm-2025"]
    dataset = Dataset("rte", "rte", part, Examples(part.texts[1:], part.labels[1:]))
    long, short = module._Job(dataset, settings, recipe, model, tokenizer, runtime, said.append).train
    assert (len(long.tokens), long.tokens.count(tokenizer.boundary or 0)) == (20, 2)
    assert long.tokens[-len(tokenizer.encode("the dog")) :] == tokenizer.encode("the dog"), "the longer text is cut"
    assert short.tokens == [
        tokenizer.boundary,
        *tokenizer.encode("look"),
        tokenizer.boundary,
        *tokenizer.encode("the dog"),
    ]
    assert (short.targets, list(short.rows)) == ([1], [len(short.tokens) - 1])
    assert said == ["rte: 1 of 2 examples are longer than 20 tokens and were cut"]


def test_what_is_missing_or_malformed_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "glue_filtered"
    folder.mkdir()
    good = json.dumps({"sentence1": "a", "sentence2": "b", "label": 1}) + "\n"
    (folder / "rte.valid.jsonl").write_text(good)
    with pytest.raises(UserError, match=r"rte: no .*rte\.train\.jsonl"):
        read_datasets("rte", tmp_path)
    for bad, expected in (
        ('{"sentence1": "a", "label": 1}', "expected sentence2"),
        ('{"sentence1": "a", "sentence2": "b", "label": "1"}', r"expected label \(int\)"),
        ('{"sentence1": "a", "sentence2": "b", "label": -1}', "expected 0 or more"),
    ):
        (folder / "rte.train.jsonl").write_text(good + bad + "\n")
        with pytest.raises(UserError, match=rf"rte\.train\.jsonl:2: .*{expected}"):
            read_datasets("rte", tmp_path)
    msgs = tmp_path / "msgs_filtered"
    msgs.mkdir()
    for name in module.MSGS:
        for part in ("train", "validation"):
            (msgs / f"{name}.{part}.json").write_text(json.dumps({"sentence": "a", "label": 0}) + "\n")
    assert [dataset.name for dataset in read_datasets("msgs", tmp_path)] == list(module.MSGS)
    (msgs / "control_raising_control.validation.json").unlink()
    with pytest.raises(UserError, match=r"msgs: no .*control_raising_control\.validation\.json"):
        read_datasets("msgs", tmp_path)


def test_the_published_sets_are_read_whole(evaluation_data: Path) -> None:
    sizes = {"mnli": (10_000, 4_908, 3), "mrpc": (3_668, 204, 2), "rte": (2_490, 139, 2), "wsc": (554, 52, 2)}
    for task, expected in sizes.items():
        [dataset] = read_datasets(task, evaluation_data)
        assert (len(dataset.train.labels), len(dataset.validation.labels), dataset.classes) == expected
    with pytest.raises(UserError, match=r"boolq: no .*boolq\.train\.jsonl"):
        read_datasets("boolq", evaluation_data)
