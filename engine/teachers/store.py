"""One teacher's hidden states on disk: a folder of parts, each a safetensors file with some of the blocks.

    manifest.json               everything that decides the states, by name
    part-<hash>.safetensors     blocks [n] int64, their numbers; states [n, block length, D]; checksums [n] int64, the
                                CRC-32 of each block; with int8 also scales [n, block length] fp32. The hash is over
                                the numbers, and the file's metadata name the manifest that it belongs to.

A part is whole or missing. So a writer that is killed leaves nothing behind that is wrong, the next one computes what
is missing, and several ranks and several runs may fill one folder. A part's form is checked when it is opened, and each
block's checksum when it is read for the first time.

D hidden, n blocks of a part, N rows.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.system.errors import UserError
from engine.system.files import remove_abandoned, written_aside
from engine.teachers.windows import Piece, Windows

FORMAT = 3
MANIFEST = "manifest.json"
INT8_LARGEST = 127


@dataclass(frozen=True)
class Stored:
    """Hidden states [..., D] as they are kept: in their own dtype, or in int8 with a scale [...] for each row."""

    states: Tensor
    scales: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """Returns the hidden states [..., D] in `dtype`."""
        return self.states if self.scales is None else (self.states * self.scales[..., None]).to(dtype)

    def rows(self, start: int, stop: int) -> "Stored":
        """Returns the rows from `start` to `stop` − 1, of states [N, D]."""
        return Stored(self.states[start:stop], None if self.scales is None else self.scales[start:stop])


def stored(states: Tensor, int8: bool) -> Stored:
    """Returns hidden states [..., D] as they are to be kept. A scale is a row's largest magnitude divided by 127."""
    if not int8:
        return Stored(states)
    states = states.float()
    scales = states.abs().amax(-1) / INT8_LARGEST
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny)  # A row of zeros has the scale 0.
    return Stored((states / divisors[..., None]).round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scales)


@dataclass
class _Part:
    """An open part. Its tensors are mapped, not read."""

    path: Path
    states: Tensor
    scales: Tensor | None
    checksums: list[int]
    checked: set[int] = field(default_factory=set)  # rows whose checksum is known to be right

    def block(self, row: int) -> Stored:
        """Returns one of the part's blocks; raises UserError where its bytes have changed."""
        block = Stored(self.states[row], None if self.scales is None else self.scales[row])
        if row not in self.checked:
            if checksum(block) != self.checksums[row]:
                raise _damaged(self.path)
            self.checked.add(row)
        return block


class StateStore:
    """The hidden states of one teacher, by the number of their block."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], windows: Windows, hidden: int, dtype: torch.dtype
    ) -> None:
        """Opens the folder, or makes it.

        Args:
            manifest: everything that decides the states; a folder with another one is refused. With the "dtype" int8
                they are kept in int8, otherwise in `dtype`.
            windows: the windows that the teacher reads, which say what a block is.
            hidden: D.
            dtype: of the states that are handed to the loss.

        Raises UserError where the folder holds something else, or a part is damaged or cannot be written.
        """
        self.folder, self.windows, self.dtype, self.int8 = folder, windows, dtype, manifest["dtype"] == "int8"
        self._hidden = hidden
        self._identity = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        self._index: dict[int, tuple[_Part, int]] = {}
        self._opened: set[str] = set()
        self._check_manifest(manifest)
        remove_abandoned(folder)
        self.refresh()

    @property
    def complete(self) -> bool:
        """Whether all blocks are there."""
        return len(self._index) == self.windows.blocks

    def missing(self, blocks: Iterable[int]) -> list[int]:
        """Returns which of the blocks are not there."""
        return [block for block in blocks if block not in self._index]

    def refresh(self) -> None:
        """Opens the parts that have come since the last look."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name not in self._opened:
                self._open(path)

    def find(self, pieces: Sequence[Piece]) -> Tensor | None:
        """Returns the hidden states [N, D] of the pieces, one after another; None where one of them is missing."""
        if self.missing(piece.block for piece in pieces):
            self.refresh()  # Another rank or another run may have written it.
            if self.missing(piece.block for piece in pieces):
                return None
        found = []
        for piece in pieces:
            part, row = self._index[piece.block]
            found.append(part.block(row).rows(piece.start, piece.stop))
        scales = [rows.scales for rows in found if rows.scales is not None]
        return Stored(torch.cat([rows.states for rows in found]), torch.cat(scales) if scales else None).values(
            self.dtype
        )

    def write(self, blocks: Sequence[int], contents: Sequence[Stored]) -> None:
        """Writes a part with these blocks, each [block length, D], on whatever device they are.

        Raises UserError for states that are not finite, and where the disk refuses.
        """
        states = torch.stack([content.states for content in contents]).cpu()
        scales = [content.scales for content in contents if content.scales is not None]
        tensors = {"blocks": torch.tensor(blocks), "states": states}
        if scales:
            tensors["scales"] = torch.stack(scales).cpu()
        if not all(x.isfinite().all() for x in (states, tensors.get("scales", states))):
            raise UserError(
                f"{self.folder}: the teacher's hidden states are not finite (NaN or infinite): it has diverged, or "
                "overflows in this precision; take another, or train.precision=fp32"
            )
        rows = [Stored(states[i], tensors["scales"][i] if scales else None) for i in range(len(blocks))]
        tensors["checksums"] = torch.tensor([checksum(row) for row in rows])
        path = self.folder / _name(tensors["blocks"])
        try:
            with written_aside(path) as aside:
                save_file(tensors, aside, metadata={"manifest": self._identity})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} could not be written ({error}): make room and run again") from error
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping.
        except (OSError, SafetensorError):
            raise _damaged(path) from None
        if metadata.get("manifest") != self._identity:
            raise UserError(f"{path} belongs to another cache than the {MANIFEST} beside it: delete it")
        blocks = tensors.get("blocks", torch.empty(0))
        n, length = blocks.numel(), self.windows.block_length
        expected = {
            "blocks": ((n,), torch.int64),
            "states": ((n, length, self._hidden), torch.int8 if self.int8 else self.dtype),
            "checksums": ((n,), torch.int64),
        }
        if self.int8:
            expected["scales"] = ((n, length), torch.float32)
        forms = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if forms != expected or path.name != _name(blocks):
            raise _damaged(path)
        part = _Part(path, tensors["states"], tensors.get("scales"), tensors["checksums"].tolist())
        self._index.update({block: (part, row) for row, block in enumerate(blocks.tolist())})
        self._opened.add(path.name)

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        # Another rank or another run writes its manifest before its parts: so the manifest is looked for after them.
        others = list(self.folder.iterdir()) if self.folder.is_dir() else []
        if not path.is_file():
            if any(file.suffix != ".partial" for file in others):
                raise UserError(
                    f"{self.folder} holds something else, without a {MANIFEST}: expected a teacher's states or a new "
                    "folder; name another cache.path"
                )
            try:
                with written_aside(path, keep_existing=True) as aside:
                    aside.write_text(json.dumps(manifest, indent=1) + "\n")
            except OSError as error:
                raise UserError(f"{path} could not be written ({error}): make room and run again") from error
        try:
            kept = json.loads(path.read_text())
        except ValueError:
            kept = None
        if not isinstance(kept, dict):
            raise UserError(f"{path} is damaged: delete {self.folder}, and its states are computed again")
        for key, value in manifest.items():
            if kept.get(key) != value:
                raise UserError(
                    f"{self.folder} holds other states: its {key} is {kept.get(key)!r}, this run's {value!r}; name "
                    "another cache.path, or set it back"
                )


def checksum(block: Stored) -> int:
    """Returns the CRC-32 of a block's bytes."""
    crc = 0
    for tensor in (block.states, block.scales):
        if tensor is not None:
            crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: delete it, and its states are computed again")


def _name(blocks: Tensor) -> str:
    return f"part-{hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16]}.safetensors"
