"""Which state of which window every position of a sequence gets, for any file, length and window.

L positions, W tokens of a window, n tokens of a file.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.config.settings import StudentConfig
from engine.data.batches import TokenFile
from engine.models.base import initial_weights
from engine.models.families import new_model, shape_of
from engine.teachers import windows as teacher_windows
from engine.teachers.teachers import Teacher
from engine.teachers.windows import Windows

CPU = torch.device("cpu")
ANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Positions(nn.Module):
    """A model whose hidden state is a token and the number of tokens before it in its window."""

    shape = SimpleNamespace(hidden=2)
    head, head_bias = torch.zeros(1, 2), None

    def __init__(self) -> None:
        super().__init__()
        self.batches: set[tuple[int, ...]] = set()

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None) -> Tensor:
        self.batches.add(tuple(tokens_BL.shape))
        before_BL = torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)
        return torch.stack([tokens_BL, before_BL], dim=-1).view(-1, 2).float()


def token_file(folder: Path, n: int, length: int, kl_everywhere: bool = False) -> TokenFile:
    """Returns a file in which each token is its own position."""
    np.arange(n, dtype=np.uint16).tofile(folder / "tokens.bin")
    return TokenFile(folder / "tokens.bin", "uint16", length, kl_everywhere=kl_everywhere)


def teacher(windows: Windows) -> Teacher:
    model: Any = Positions()
    return Teacher(model, windows)


@given(data=st.data(), n=st.integers(3, 400), half=st.integers(1, 40), at_once=st.integers(1, 200))
@ANY
def test_a_windows_second_half_is_used_wherever_a_sequence_begins(
    tmp_path: Path, data: st.DataObject, n: int, half: int, at_once: int
) -> None:
    length = data.draw(st.integers(2, min(n - 1, 70)))
    file, window = token_file(tmp_path, n, length), 2 * half
    windows = Windows(file, window, stream=True)
    starts = data.draw(st.lists(st.integers(0, n - 2), min_size=1, max_size=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_windows, "TOKENS_AT_ONCE", at_once)
        reader, batch = teacher(windows), file.batch(starts, CPU)
        positions = [
            piece.block * half + i for piece in windows.pieces(batch.begins) for i in range(piece.start, piece.stop)
        ]
        tokens, before = reader.states(batch).long().T
        expected: Any = reader.model
        ((count, width),) = expected.batches
        assert width == window
        assert count == windows.at_once, "a model always reads as many windows"
        assert count == 1 or count * window <= at_once < 2 * count * window + window
    assert positions == [begin + i for begin in batch.begins for i in range(length)]
    assert tokens.tolist() == batch.tokens_BL.flatten().tolist()
    for token, count in zip(tokens.tolist(), before.tolist(), strict=True):
        if token < half:
            assert count == token, "the first block comes from the file's first window"
        else:
            assert half <= count < window
            assert count - half == token % half


@given(data=st.data(), n=st.integers(3, 400), half=st.integers(1, 40))
@ANY
def test_the_blocks_hold_every_token_that_is_read_once(tmp_path: Path, data: st.DataObject, n: int, half: int) -> None:
    file = token_file(tmp_path, n, data.draw(st.integers(2, min(n - 1, 70))))
    windows = Windows(file, 2 * half, stream=True)
    states = teacher(windows).states_of_blocks(range(windows.blocks))
    assert all(len(block) == half for block in states)
    tokens = torch.cat(states)[:, 0].tolist()
    assert tokens[: n - 1] == list(range(n - 1))
    assert len(tokens) < n - 1 + half, "no block more than that"


@given(data=st.data(), n=st.integers(4, 400), kl_everywhere=st.booleans())
@ANY
def test_a_fixed_chunk_has_the_block_of_its_number(
    tmp_path: Path, data: st.DataObject, n: int, kl_everywhere: bool
) -> None:
    length = data.draw(st.integers(2, min(n - 2, 70)))
    file = token_file(tmp_path, n, length, kl_everywhere)
    windows = Windows(file, length, stream=False)
    batch = file.batch([chunk * length for chunk in range(file.chunks)], CPU)
    pieces = windows.pieces(batch.begins)
    assert [piece.block for piece in pieces] == list(range(windows.blocks))
    assert {(piece.start, piece.stop) for piece in pieces} == {(0, length)}
    tokens, before = teacher(windows).states(batch).long().T
    assert torch.equal(tokens, batch.tokens_BL.flatten())
    assert torch.equal(before, torch.arange(length).repeat(file.chunks)), "it reads what the students read"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [6, 22, 24])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_state_does_not_depend_on_what_is_read_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, window: int, precision: torch.dtype
) -> None:
    """Bit for bit, wherever its window stands among those that are read at once; an odd width leaves rests of vectors
    at the end of a tensor."""
    monkeypatch.setattr(teacher_windows, "TOKENS_AT_ONCE", 250)
    config = StudentConfig("teacher", 2, 20, 2, 42, family=family, max_length=24)  # pyright: ignore[reportArgumentType]
    model = new_model(shape_of(config, 500))
    initial_weights(model, 2, seed=0)
    windows = Windows(token_file(tmp_path, 300, 12), window, stream=True)
    reader = Teacher(model.to(precision), windows)
    blocks = range(windows.blocks)
    assert len(blocks) > 2 * windows.at_once
    with torch.no_grad():
        together = reader.states_of_blocks(blocks)
        assert all(torch.equal(reader.states_of_blocks([block])[0], together[block]) for block in blocks)
        backwards = reader.states_of_blocks(blocks[::-1])
    assert all(torch.equal(a, b) for a, b in zip(together, backwards[::-1], strict=True))
