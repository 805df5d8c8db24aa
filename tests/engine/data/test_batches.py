from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config.settings import TokenizerConfig
from engine.data import tokenizer as tokenization
from engine.data.batches import IGNORED, HeldOutData, Step, TokenFile, TrainingData, WordStarts
from engine.data.grammar.generator import generate
from engine.data.tokenizer import Tokenizer
from engine.system.errors import UserError

LENGTH = 8
CHUNKS = 21  # It is odd, so that epochs end inside a step. The last chunk predicts LEFT tokens only.
LEFT = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Returns a file in which every token is its own position."""
    path = tmp_path_factory.mktemp("data") / "train.bin"
    np.arange((CHUNKS - 1) * LENGTH + LEFT + 1, dtype="<u2").tofile(path)
    return TokenFile(path, "<u2", LENGTH)


def training(file: TokenFile, rank: int = 0, world_size: int = 1, **changed: Any) -> TrainingData:
    chosen: dict[str, Any] = dict(batch=8, micro_batch=None, seed=3, random_offsets=False)
    return TrainingData(file, rank=rank, world_size=world_size, device=CPU, **chosen | changed)


def tokens(step: Step) -> torch.Tensor:
    return torch.cat([batch.tokens_BL for batch in step.micro_batches])


def starts(data: TrainingData, first: int, last: int) -> list[int]:
    """Returns the positions at which the sequences of these steps begin to predict."""
    return [
        int(row[row != IGNORED][0]) - 1
        for step in data.steps(first, last)
        for batch in step.micro_batches
        for row in batch.targets_N.unflatten(0, (-1, LENGTH))
    ]


@pytest.mark.parametrize("random_offsets", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_micro_batches_only_divide_what_the_step_reads(
    file: TokenFile, world_size: int, accumulation: int, random_offsets: bool
) -> None:
    batch, micro_batch = 16, 16 // world_size // accumulation
    whole = list(training(file, batch=batch, random_offsets=random_offsets).steps(1, 7))
    chosen = dict(batch=batch, micro_batch=micro_batch, random_offsets=random_offsets)
    ranks = [list(training(file, rank, world_size, **chosen).steps(1, 7)) for rank in range(world_size)]
    for number, (step, *share_of_batch) in enumerate(zip(whole, *ranks, strict=True), 1):
        assert torch.equal(torch.cat([tokens(share) for share in share_of_batch]), tokens(step))
        targets = torch.cat([part.targets_N for share in share_of_batch for part in share.micro_batches])
        assert torch.equal(targets, step.micro_batches[0].targets_N)
        for share in share_of_batch:
            assert [len(part.tokens_BL) for part in share.micro_batches] == [micro_batch] * accumulation
            assert share.number == step.number == number
            assert share.valid_tokens == step.valid_tokens == (targets != IGNORED).sum()
            assert share.epoch == step.epoch == number * batch / CHUNKS


def test_targets_are_the_next_tokens(file: TokenFile) -> None:
    for step in training(file, micro_batch=1).steps(1, 3):
        for batch in step.micro_batches:
            assert batch.tokens_BL.shape == (1, LENGTH)
            assert batch.tokens_BL.dtype == batch.targets_N.dtype == torch.int64
            counted = batch.targets_N != IGNORED
            assert torch.equal(batch.targets_N[counted], batch.tokens_BL.flatten()[counted] + 1)


def test_an_epoch_predicts_every_token_once_but_the_first(file: TokenFile) -> None:
    (step,) = training(file, batch=CHUNKS).steps(1, 1)
    targets = step.micro_batches[0].targets_N
    assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, len(file.tokens)))


def test_every_epoch_visits_every_chunk_once_in_an_order_of_its_own(file: TokenFile) -> None:
    begun = starts(training(file), 1, CHUNKS)  # These are 8 epochs of 21 chunks in steps of 8: epochs end inside steps.
    epochs = [begun[i : i + CHUNKS] for i in range(0, len(begun), CHUNKS)]
    assert len(epochs) == 8
    for epoch in epochs:
        assert sorted(epoch) == [chunk * LENGTH for chunk in range(CHUNKS)]
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert len({tuple(starts(training(file, seed=seed), 1, 3)) for seed in range(5)}) == 5
    assert begun == starts(training(file), 1, CHUNKS)


def test_random_offsets_move_the_cuts_in_every_epoch_and_stay_inside(file: TokenFile) -> None:
    begun = starts(training(file, random_offsets=True), 1, 10 * CHUNKS)
    epochs = [begun[i : i + CHUNKS] for i in range(0, len(begun), CHUNKS)]
    assert len(epochs) == 80
    for epoch in epochs:
        assert sorted(position // LENGTH for position in epoch) == list(range(CHUNKS))
    offsets = [[position % LENGTH for position in sorted(epoch)] for epoch in epochs]
    assert {offset for epoch in offsets for offset in epoch[:-1]} == set(range(LENGTH))
    assert {epoch[-1] for epoch in offsets} == set(range(LEFT))
    assert len({tuple(epoch) for epoch in offsets}) == 80
    assert begun == starts(training(file, random_offsets=True), 1, 10 * CHUNKS)


def test_a_resumed_run_reads_what_it_would_have_read(file: TokenFile) -> None:
    whole = list(training(file, random_offsets=True).steps(1, 9))
    for first in (1, 2, 5, 9):
        tail = list(training(file, random_offsets=True).steps(first, 9))
        assert [step.number for step in tail] == list(range(first, 10))
        assert all(torch.equal(tokens(a), tokens(b)) for a, b in zip(tail, whole[first - 1 :], strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(world_size=3), r"train\.batch=8 does not divide among 3 ranks: choose a multiple of 3"),
        (dict(world_size=2, micro_batch=3), r"train\.micro_batch=3 does not divide a rank's 4 .* a divisor of 4"),
        (dict(micro_batch=16), r"train\.micro_batch=16 .* choose a divisor of 8"),
        (dict(batch=22), r"holds 21 sequences of 8 tokens, .* train\.batch=22: give more text, or a smaller"),
    ],
)
def test_what_cannot_be_divided_or_filled_is_refused(file: TokenFile, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training(file, **changed)


def test_a_batch_may_be_the_whole_text(file: TokenFile) -> None:
    assert sorted(starts(training(file, batch=CHUNKS), 4, 4)) == [chunk * LENGTH for chunk in range(CHUNKS)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    chunks=st.integers(2, CHUNKS),
    limit=st.integers(1, CHUNKS + 3),
    batch=st.integers(1, 5),
    world_size=st.integers(1, 5),
)
def test_held_out_ranks_cover_every_token_once_in_equally_many_rounds(
    file: TokenFile, chunks: int, limit: int, batch: int, world_size: int
) -> None:
    shorter = copy(file)
    shorter.chunks, shorter.tokens = chunks, file.tokens[: (chunks - 1) * LENGTH + LEFT + 1]  # pyright: ignore[reportAttributeAccessIssue]
    used = min(chunks, limit)
    seen, rounds = [], set()
    for rank in range(world_size):
        data = HeldOutData(shorter, tokens=limit * LENGTH, batch=batch, rank=rank, world_size=world_size, device=CPU)
        batches = list(data.batches())
        rounds.add(len(batches))
        for read in batches:
            assert 1 <= len(read.tokens_BL) <= batch
            assert read.tokens_BL.min() >= 0, "padding stays embeddable"
            seen += read.targets_N[read.targets_N != IGNORED].tolist()
    spread = [position * chunks // used for position in range(used)]
    ends = {chunk: min((chunk + 1) * LENGTH, len(shorter.tokens) - 1) for chunk in spread}
    assert sorted(seen) == [t for chunk, end in ends.items() for t in range(chunk * LENGTH + 1, end + 1)]
    assert rounds == {-(-used // (batch * world_size))}


def test_text_shorter_than_a_sequence_is_refused_and_one_just_long_enough_is_not(tmp_path: Path) -> None:
    np.arange(LENGTH + 1, dtype="<u2").tofile(tmp_path / "t")
    file = TokenFile(tmp_path / "t", "<u2", LENGTH)
    (batch,) = HeldOutData(file, tokens=1, batch=4, rank=0, world_size=1, device=CPU).batches()
    assert batch.tokens_BL.tolist() == [list(range(LENGTH))]
    np.arange(LENGTH, dtype="<u2").tofile(tmp_path / "t")
    with pytest.raises(UserError, match=r"holds 8 tokens, too few for one sequence of train\.length=8: give more"):
        TokenFile(tmp_path / "t", "<u2", LENGTH)


@pytest.fixture(scope="module", params=["sentencepiece", "byte-bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = TokenizerConfig(kind=request.param)
    texts = [*generate(0, 3000), "two  spaces\tand a tab\nend \n"]
    return tokenization.train(texts, config, 400, tmp_path_factory.mktemp("tokenizer"), boundary=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab dog.\t\n 猫é½\u2581"), max_size=40), cut=st.integers(0, 40))
@example(text="the dog\n\n  sleeps .\t*MOT:\tlook !", cut=5)
def test_words_are_counted_as_python_splits_what_the_tokenizer_gives_back(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    counter = WordStarts(tokenizer.surfaces())
    assert tokenizer.boundary is not None
    ids = np.array([tokenizer.boundary, *tokenizer.encode(text)])
    assert counter.count(ids) == len(tokenizer.decode(ids.tolist()).split())
    cut = min(cut, len(ids) - 1)
    assert counter.count(ids[: cut + 1]) + counter.count(ids[cut:]) == counter.count(ids), "sequences add up"


def test_a_step_counts_the_words_of_all_ranks(file: TokenFile) -> None:
    counter = WordStarts([" a" if i % 3 == 0 else "b" for i in range(1000)])  # Every third token begins a word.
    whole = list(training(file, word_starts=counter).steps(1, 6))
    rank = list(training(file, 1, 2, word_starts=counter).steps(1, 6))
    for step, part in zip(whole, rank, strict=True):
        targets = [t for b in step.micro_batches for t in b.targets_N.tolist() if t != IGNORED]
        assert step.words == part.words == sum(t % 3 == 0 for t in targets)


def test_a_dropped_last_target_leaves_the_positions_divergence(tmp_path: Path) -> None:
    for tokens in (33, 34, 35):  # These are four whole sequences, one target more, and two.
        path = tmp_path / f"{tokens}.bin"
        np.arange(tokens, dtype="<u2").tofile(path)
        file, plain = TokenFile(path, "<u2", 8, kl_everywhere=True), TokenFile(path, "<u2", 8)
        assert file.chunks == {33: 4, 34: 4, 35: 5}[tokens]
        for start in range(0, 8 * file.chunks, 8):
            batch, whole = file.batch([start], CPU), plain.batch([start], CPU)
            assert torch.equal(batch.tokens_BL, whole.tokens_BL)
            assert torch.equal(batch.targets_N[:-1], whole.targets_N[:-1])
            assert batch.targets_N[-1] == IGNORED
            assert batch.kl_mask_N is not None
            assert torch.equal(batch.kl_mask_N, whole.targets_N != IGNORED)
            assert file.token_count(start) == (batch.targets_N != IGNORED).sum() >= 1
