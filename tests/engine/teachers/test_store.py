"""The folder of one teacher's states: what comes back, what is damaged or foreign, and a disk that refuses.

n blocks, L states of a block, D hidden.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import SafetensorError
from torch import Tensor

from engine.data.batches import TokenFile
from engine.system.errors import UserError
from engine.teachers import store as store_module
from engine.teachers.store import StateStore, Stored, stored
from engine.teachers.windows import Piece, Windows

BLOCKS, L, D = 7, 4, 3
MANIFEST = {"format": 3, "data": "text", "teacher": "bigrams", "context": "chunk", "window": L, "dtype": "exact"}
STATES_nLD = torch.randn(BLOCKS, L, D, generator=torch.Generator().manual_seed(0))
KINDS = [("exact", torch.float32), ("exact", torch.bfloat16), ("int8", torch.float32), ("int8", torch.bfloat16)]


@pytest.fixture(autouse=True)
def _tokens(tmp_path: Path) -> None:
    np.arange(BLOCKS * L + 1, dtype=np.uint16).tofile(tmp_path / "tokens.bin")


def opened(folder: Path, storage: torch.dtype = torch.float32, **manifest: Any) -> StateStore:
    windows = Windows(TokenFile(folder.parent / "tokens.bin", "uint16", L), L, stream=False)
    return StateStore(folder, {**MANIFEST, **manifest}, windows, D, storage)


def contents(store: StateStore, blocks: list[int]) -> list[Stored]:
    return [stored(STATES_nLD[block].to(store.dtype), store.int8) for block in blocks]


def filled(folder: Path, storage: torch.dtype = torch.float32, **manifest: Any) -> StateStore:
    """Returns a store with all blocks, in three parts whose blocks are in no order."""
    store = opened(folder, storage, **manifest)
    for blocks in ([4, 0], [2, 6, 1], [5, 3]):
        store.write(blocks, contents(store, blocks))
    return store


def everything(store: StateStore) -> Tensor | None:
    return store.find([Piece(block, 0, L) for block in range(BLOCKS)])


def part_of(store: StateStore, block: int) -> Path:
    return store._index[block][0].path


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_what_was_written_comes_back(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    first = filled(tmp_path / "cache", dtype, dtype=kind)
    kept = torch.cat([content.values(dtype) for content in contents(first, list(range(BLOCKS)))])
    if kind == "exact":
        assert torch.equal(kept, STATES_nLD.to(dtype).view(-1, D))
    for store in (first, opened(tmp_path / "cache", dtype, dtype=kind)):
        assert store.complete
        assert store.missing(range(BLOCKS)) == []
        states = everything(store)
        assert states is not None
        assert states.dtype == dtype
        assert torch.equal(states, kept)
        pieces = [Piece(3, 2, 4), Piece(0, 0, 1), Piece(3, 0, 4)]
        found = store.find(pieces)
        assert found is not None
        assert torch.equal(found, torch.cat([kept[p.block * L + p.start : p.block * L + p.stop] for p in pieces]))


def test_what_another_writer_adds_is_found_and_a_missing_block_is_none(tmp_path: Path) -> None:
    reader, writer = opened(tmp_path / "cache"), opened(tmp_path / "cache")
    writer.write([1, 2], contents(writer, [1, 2]))
    assert reader.find([Piece(1, 0, L), Piece(3, 0, L)]) is None
    found = reader.find([Piece(2, 1, 3)])
    assert found is not None
    assert torch.equal(found, STATES_nLD[2, 1:3])
    assert reader.missing(range(4)) == [0, 3]
    assert not reader.complete


ROWS = arrays.arrays(np.float32, (5, 6), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(rows=ROWS)
@settings(deadline=None)
def test_int8_is_wrong_by_half_a_scale_at_most(rows: np.ndarray) -> None:
    rows[0] = 0
    states_ND = torch.from_numpy(rows)
    content = stored(states_ND, int8=True)
    assert content.scales is not None
    assert content.states.dtype == torch.int8
    values, scales = content.values(torch.float32).double(), content.scales.double()
    torch.testing.assert_close(scales, states_ND.double().abs().amax(-1) / 127, rtol=1e-6, atol=1e-37)
    error = (values - states_ND.double()).abs().amax(-1)
    # The division and the product are rounded too: by 127 ulps of a scale at most. Below 1e-37 numbers have few digits.
    assert (error <= (0.5 + 127 * 2.0**-23) * scales + 1e-37).all()
    assert torch.equal(values[0], torch.zeros(6, dtype=torch.float64))
    again = stored(content.values(torch.float32), int8=True)
    assert torch.equal(again.states[scales > 1e-37], content.states[scales > 1e-37]), "what was kept is kept as it is"


def spoiled(whole: bytes, at: int, mask: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]


@pytest.mark.parametrize(("kind", "dtype"), KINDS[1:3])
def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    store = filled(tmp_path / "cache", dtype, dtype=kind)
    before, part = everything(store), part_of(store, 2)
    assert before is not None
    whole = part.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    unchanged = []
    for at in range(len(whole)):
        for mask in (0x01, 0x20, 0x80):
            # A new file, as a part that is open is mapped.
            part.unlink()
            part.write_bytes(spoiled(whole, at, mask))
            states, message = None, None
            try:
                states = everything(opened(tmp_path / "cache", dtype, dtype=kind))
            except UserError as error:
                message = str(error)
            if message is None:
                assert states is not None
                assert torch.equal(states, before), at
                unchanged.append(at)
            else:
                assert message.startswith(f"{part} ")
                assert "delete it" in message
                assert "\n" not in message
    assert all(at < header for at in unchanged), "every byte behind the header counts"
    assert len(unchanged) <= 8, "of the header only spaces at its end count for nothing"
    part.unlink()
    assert opened(tmp_path / "cache", dtype, dtype=kind).missing(range(BLOCKS)) == [1, 2, 6]


def test_a_part_that_is_cut_or_too_long_is_refused(tmp_path: Path) -> None:
    part = part_of(filled(tmp_path / "cache"), 2)
    whole = part.read_bytes()
    for content in (*(whole[:size] for size in range(len(whole))), whole + b"x", whole + whole):
        part.unlink()
        part.write_bytes(content)
        assert f"{part} is damaged: delete it" in refusal(lambda: opened(tmp_path / "cache"))


def test_a_part_in_another_ones_place_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "cache")
    one, other = part_of(store, 0), part_of(store, 3)  # Both have two blocks.
    contents_of = {path: path.read_bytes() for path in (one, other)}
    assert len(contents_of[one]) == len(contents_of[other])
    for overwritten in ({one: contents_of[other]}, {one: contents_of[other], other: contents_of[one]}):
        for path, content in overwritten.items():
            path.unlink()
            path.write_bytes(content)
        assert "is damaged: delete it" in refusal(lambda: opened(tmp_path / "cache"))
        for path, content in contents_of.items():
            path.write_bytes(content)


def test_a_part_of_another_cache_is_refused(tmp_path: Path) -> None:
    part = part_of(filled(tmp_path / "other", teacher="trigrams"), 0)
    store = opened(tmp_path / "cache")
    shutil.copy(part, tmp_path / "cache")
    expected = f"{tmp_path / 'cache' / part.name} belongs to another cache than the manifest.json beside it: delete it"
    assert refusal(lambda: opened(tmp_path / "cache")) == expected
    assert refusal(store.refresh) == expected


def test_every_value_of_the_manifest_counts(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    for key, value in MANIFEST.items():
        other: Any = "int8" if key == "dtype" else f"not {value}"
        message = refusal(lambda key=key, other=other: opened(tmp_path / "cache", **{key: other}))
        assert f"{tmp_path / 'cache'} holds other states: its {key} is {value!r}, this run's {other!r}" in message
    path = tmp_path / "cache" / "manifest.json"
    whole = path.read_text()
    for key in MANIFEST:
        path.write_text(json.dumps({**MANIFEST, key: "changed"}))
        assert f"its {key} is 'changed', this run's" in refusal(lambda: opened(tmp_path / "cache"))
        path.write_text(json.dumps({k: v for k, v in MANIFEST.items() if k != key}))
        assert f"its {key} is None, this run's" in refusal(lambda: opened(tmp_path / "cache"))
    for content in (b"", b"{", b"[1]", b"\xff\xfe", whole.encode()[:-3]):
        path.write_bytes(content)
        assert f"{path} is damaged: delete {tmp_path / 'cache'}" in refusal(lambda: opened(tmp_path / "cache"))
    path.unlink()  # Whose parts they are, nobody knows.
    assert "holds something else, without a manifest.json" in refusal(lambda: opened(tmp_path / "cache"))


def test_a_folder_with_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("years of work")
    assert "holds something else, without a manifest.json" in refusal(lambda: opened(tmp_path / "cache"))
    assert names(tmp_path / "cache") == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}/manifest.json could not be written" in refusal(lambda: opened(tmp_path / "file"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_states_that_are_not_finite_are_refused(tmp_path: Path, kind: str, dtype: torch.dtype, value: float) -> None:
    store = opened(tmp_path / "cache", dtype, dtype=kind)
    states = STATES_nLD[:2].to(dtype, copy=True)
    states[1, 3, 2] = value
    both = [stored(block, store.int8) for block in states]
    message = refusal(lambda: store.write([0, 1], both))
    assert "the teacher's hidden states are not finite (NaN or infinite)" in message
    assert names(tmp_path / "cache") == ["manifest.json"]
    assert store.missing([0, 1]) == [0, 1]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
@pytest.mark.parametrize("where", ["while it is written", "when it is moved"])
def test_a_full_disk_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    store = opened(tmp_path / "cache")
    store.write([0, 1], contents(store, [0, 1]))
    before = names(tmp_path / "cache")

    def half(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise error

    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if where == "while it is written":
            patch.setattr(store_module, "save_file", half)
        else:
            patch.setattr(os, "replace", refuse)
        message = refusal(lambda: store.write([2], contents(store, [2])))
    assert message.startswith(f"{tmp_path / 'cache'}/part-")
    assert "could not be written" in message
    assert "No space left" in message
    assert message.endswith("make room and run again")
    assert names(tmp_path / "cache") == before
    assert store.missing(range(4)) == [2, 3]
    store.write([2], contents(store, [2]))
    assert opened(tmp_path / "cache").missing(range(4)) == [3]


def test_a_full_disk_before_the_manifest_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        message = refusal(lambda: opened(tmp_path / "cache"))
    assert f"{tmp_path}/cache/manifest.json could not be written" in message
    assert not (tmp_path / "cache").exists()


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("manifest.json", "part-0123.safetensors"):  # The second time the cache is whole.
        (tmp_path / "cache" / f".{name}.{socket.gethostname()}.{ended.pid}.partial").write_bytes(b"half")
        if name == "manifest.json":
            filled(tmp_path / "cache")
        assert everything(opened(tmp_path / "cache")) is not None
        assert len(names(tmp_path / "cache")) == 4


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("question", ["is_file", "is_dir", "iterdir"])
def test_another_run_may_begin_a_cache_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str, after: bool
) -> None:
    """It begins before or after the store first asks what is there."""
    original, folder = getattr(Path, question), tmp_path / "cache"

    def be_overtaken(self: Path) -> Any:
        if folder not in (self, self.parent):
            return original(self)
        monkeypatch.setattr(Path, question, original)
        answer = list(original(self)) if question == "iterdir" and after else original(self)
        filled(folder)
        return answer if after else original(self)

    folder.mkdir()
    monkeypatch.setattr(Path, question, be_overtaken)
    assert everything(opened(folder)) is not None


@pytest.mark.parametrize("dies", [False, True])
def test_two_runs_may_write_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    first, second = opened(tmp_path / "cache"), opened(tmp_path / "cache")
    replace = os.replace

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    def be_overtaken(aside: Path, target: Path) -> None:
        """Has another process write the same part, or die before it has its name, before the first names its own."""
        with monkeypatch.context() as other:
            other.setattr(os, "replace", die if dies else replace)
            other.setattr(os, "getpid", lambda: 1)
            if dies:
                with pytest.raises(KeyboardInterrupt):
                    second.write([0, 1], contents(second, [0, 1]))
            else:
                second.write([0, 1], contents(second, [0, 1]))
        replace(aside, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", be_overtaken)
        first.write([0, 1], contents(first, [0, 1]))
    assert len(names(tmp_path / "cache")) == 2
    for store in (first, second, opened(tmp_path / "cache")):
        found = store.find([Piece(0, 0, L), Piece(1, 0, L)])
        assert found is not None
        assert torch.equal(found, STATES_nLD[:2].view(-1, D))
