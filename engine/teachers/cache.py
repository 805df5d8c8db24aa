"""The teachers' predictions for every fixed chunk of the training text, computed once, kept on disk, read from there.

    <path>/
        manifest.json     all that decides the predictions, by name: hashes of the data, the tokenizer and the teachers,
                          their mix, the temperature, k, the length of a chunk
        part-00000.bin    how many chunks, 256 but for the last part's; where the record of each ends; the records; the
                      CRC-32 of all that (numbers uint64, ends in bytes)

A record holds, for L positions of each of K streams, −log p of the k most probable tokens and of the tail in steps of
2⁻⁹ nats, the tokens' as differences (they ascend), and the tokens themselves; two bytes each, first bytes before second
ones, deflated. A part is written aside and comes into place by a rename, so that a killed run goes on from there, and
two may fill one cache.

B sequences, L positions, N = B·L tokens, K teacher streams, V vocabulary, k tokens kept.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.settings import Config
from engine.data.batches import Batch, Step, TrainingData, to_device
from engine.data.prepare import Prepared
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.teachers.frozen import Teachers, load_teachers, teacher_streams
from kernels import Projected, TopK

FORMAT = 2
STEPS_A_NAT = 512  # half a step is 0.1% of a probability
LARGEST = 2**16 - 1  # −log p in steps: 128 nats
CHUNKS_A_PART = 256
TOKENS_AT_ONCE = 1024  # whose logits are there while the cache is written


class CachedTeachers(Teachers):
    """K streams as they were computed once; no model is in memory."""

    def __init__(self, names: list[str], weights: list[float], parts: Sequence[Path], manifest: dict[str, Any]) -> None:
        super().__init__(names, weights, [], [])
        self._parts = [np.memmap(part, dtype=np.uint8, mode="r") for part in parts]
        self._ends = [ends_of(part) for part in parts]
        self._k, self._length = manifest["k"], manifest["length"]

    def __call__(self, batch: Batch) -> Sequence[Projected | TopK]:
        return batch.predicted

    def read_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps with their predictions, read and unpacked in a thread while the step before is being taken."""
        read = map(self._with_predictions, steps)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(next, read, None)
            while (step := coming.result()) is not None:
                coming = reader.submit(next, read, None)
                yield step

    def _with_predictions(self, step: Step) -> Step:
        return replace(step, micro_batches=[replace(b, predicted=self.read(b)) for b in step.micro_batches])

    def read(self, batch: Batch) -> tuple[TopK, ...]:
        """K predictions of the batch's N tokens, on its device."""
        found = [self._record(chunk) for chunk in batch.chunks]
        return tuple(
            TopK(
                *(to_device(torch.cat([chunk[stream][i] for chunk in found]), batch.tokens_BL.device) for i in range(3))
            )
            for stream in range(len(self.names))
        )

    def _record(self, chunk: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        part, place = divmod(chunk, CHUNKS_A_PART)
        ends = self._ends[part]
        begin = 8 * (1 + len(ends)) if place == 0 else int(ends[place - 1])
        return unpack(self._parts[part][begin : int(ends[place])].tobytes(), len(self.names), self._length, self._k)


def cached_teachers(
    config: Config, prepared: Prepared, data: TrainingData, runtime: Runtime, teacher_hashes: Sequence[str]
) -> CachedTeachers:
    """The cache at `config.cache.path`, made or completed first where that is needed; a collective call.

    `teacher_hashes`: as engine.teachers.frozen.hash_teachers gives them.

    Raises ValueError where the folder holds predictions of anything else, naming it, or a part is damaged or cannot be
    written.
    """
    assert config.cache is not None
    folder, chunks = Path(config.cache.path), data.file.chunks
    manifest = manifest_of(config, prepared, chunks, teacher_hashes)
    if not config.cache.k < prepared.tokenizer.vocab_size <= 2**16:
        raise UserError(
            f"cache.k={config.cache.k} of {prepared.tokenizer.vocab_size} pieces: expected fewer than there are, of at most "
            f"{2**16}; lower it"
        )
    parts = [folder / f"part-{number:05d}.bin" for number in range(-(-chunks // CHUNKS_A_PART))]
    missing = runtime.broadcast([part for part in parts if not part.is_file()])
    with runtime.raise_on_all_ranks():
        _require_same(folder, manifest)
        for part in [part for part in parts if part not in missing][runtime.rank :: runtime.world_size]:
            _require_whole(part)
    if missing:
        live = load_teachers(config, prepared.tokenizer, runtime.device)
        with runtime.main_process_first():
            if runtime.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                _place(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        with runtime.raise_on_all_ranks():
            for number in range(runtime.rank, len(missing), runtime.world_size):
                part = missing[number]
                if part.is_file():
                    continue  # another run has been faster
                first = parts.index(part) * CHUNKS_A_PART
                wanted = range(first, min(first + CHUNKS_A_PART, chunks))
                kept = _write(part, data, wanted, live, config.cache.k, config.objective.temperature)
                if runtime.is_main_process:
                    which = f"part {number + 1} of {len(missing)}"
                    print(f"teachers' predictions: {which}, {kept:.0%} of their mass", flush=True)
    if runtime.is_main_process:
        for aside in folder.glob("*.partial"):  # a killed run's; one that lives finds the part in its place
            aside.unlink(missing_ok=True)
    return CachedTeachers(*teacher_streams(config), parts, manifest)


def manifest_of(config: Config, prepared: Prepared, chunks: int, teacher_hashes: Sequence[str]) -> dict[str, Any]:
    assert config.cache is not None
    return {
        "format": FORMAT,
        "data": prepared.identity,
        "tokenizer": prepared.tokenizer.hash,
        "teachers": list(teacher_hashes),
        "weights": [teacher.weight for teacher in config.teachers],
        "mix": config.objective.mix,
        "temperature": config.objective.temperature,
        "k": config.cache.k,
        "length": config.train.length,
        "chunks": chunks,
        "precision": config.train.precision,
    }


def _require_same(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    if not path.is_file():
        if folder.is_dir() and any(file.suffix != ".partial" for file in folder.iterdir()):
            raise UserError(f"cache.path={folder}: a folder of something else, without manifest.json; name another")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete {folder}, and it is made again") from None
    for key, value in manifest.items():
        if found.get(key) != value:
            raise UserError(
                f"cache.path={folder} holds other predictions: its {key} is {found.get(key)!r}, this run's {value!r}; "
                "name another folder, or set it back"
            )


def _require_whole(part: Path) -> None:
    size, ends = part.stat().st_size, ends_of(part)
    if len(ends) == 0 or size != ends[-1] + 8:
        expected = f"{ends[-1] + 8:,}" if len(ends) else "more"
        raise UserError(f"{part} has {size:,} bytes, expected {expected}: delete it, and it is made again")
    content = np.memmap(part, np.uint8, "r").data
    if zlib.crc32(content[:-8]) != int.from_bytes(content[-8:], "little"):
        raise UserError(f"{part} is damaged: delete it, and it is made again")


def ends_of(part: Path) -> np.ndarray:
    """Where each of a part's records ends; empty for a file that is too short to say."""
    with part.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        if 8 * (1 + count) > part.stat().st_size:
            return np.empty(0, np.uint64)
        return np.frombuffer(file.read(8 * count), "<u8")


def _write(part: Path, data: TrainingData, chunks: range, live: Teachers, k: int, temperature: float) -> float:
    """The share of the teachers' probability that was kept: where it is small, the cache teaches little."""
    file = data.file
    records: list[bytes] = []
    tails: list[Tensor] = []
    batch = max(1, TOKENS_AT_ONCE // file.length)
    for first in range(chunks.start, chunks.stop, batch):
        some = range(first, min(first + batch, chunks.stop))
        streams = [top_of(s, k, temperature) for s in live(file.batch([c * file.length for c in some], data.device))]
        tails += [stream.tail for stream in streams]
        records += [
            pack([[x[i * file.length : (i + 1) * file.length] for x in stream] for stream in streams])
            for i in range(len(some))
        ]
    ends = 8 * (1 + len(records)) + np.cumsum([len(record) for record in records])
    content = np.array([len(records), *ends], "<u8").tobytes() + b"".join(records)
    _place(part, content + zlib.crc32(content).to_bytes(8, "little"))
    return 1 - torch.cat(tails).mean().item()


def _place(path: Path, content: bytes) -> None:
    """Whole or not at all; where another run does the same, the later one wins."""
    aside = path.with_suffix(f".{os.getpid()}.partial")
    try:
        aside.write_bytes(content)
        aside.rename(path)
    except OSError as error:
        if not path.is_file():  # else the other has it all in place, and has cleared this away
            raise UserError(f"{path} could not be written ({error}): make room and run again") from error
    finally:
        aside.unlink(missing_ok=True)


@torch.no_grad()
def top_of(stream: Projected | TopK, k: int, temperature: float) -> TopK:
    """The k most probable tokens at `temperature`, and what is left."""
    assert isinstance(stream, Projected)
    log_prob_NV = (stream.hidden.float() @ stream.weight.float().T / temperature).log_softmax(-1)
    log_prob_Nk, index_Nk = log_prob_NV.topk(k)
    tail_N = log_prob_NV.scatter_(1, index_Nk, -torch.inf).exp_().sum(-1)
    return TopK(log_prob_Nk, index_Nk, tail_N)


def pack(streams: Sequence[Sequence[Tensor]]) -> bytes:
    """One chunk's record, of K streams (log_prob [L, k], index [L, k], tail [L])."""
    planes = []
    for log_prob_Lk, index_Lk, tail_L in streams:
        costs = torch.cat([-log_prob_Lk, -tail_L.log()[:, None]], 1).cpu().double().numpy()
        steps = np.minimum(np.rint(costs * STEPS_A_NAT), LARGEST).astype("<u2")
        steps[:, 1:-1] = np.diff(steps[:, :-1], axis=1)  # the tail stays by itself
        planes += [steps, index_Lk.cpu().numpy().astype("<u2")]
    return zlib.compress(b"".join(plane.view(np.uint8).reshape(-1, 2).T.tobytes() for plane in planes))


def unpack(record: bytes, streams: int, length: int, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What `pack` was given but for rounding: each position's probabilities sum to 1 again."""
    content = np.frombuffer(zlib.decompress(record), np.uint8)
    found = []
    for stream in np.split(content, streams):
        steps, index = (
            np.ascontiguousarray(half.reshape(2, -1).T).view("<u2").reshape(length, -1)
            for half in np.split(stream, [2 * length * (k + 1)])
        )
        costs = np.concatenate([np.cumsum(steps[:, :-1], axis=1, dtype=np.uint32), steps[:, -1:]], axis=1)
        log_prob = torch.from_numpy(costs.astype(np.float32) / -STEPS_A_NAT).log_softmax(-1)
        found.append((log_prob[:, :-1], torch.from_numpy(index.astype(np.int32)), log_prob[:, -1].exp()))
    return found
