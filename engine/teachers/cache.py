"""The teachers' predictions for every fixed chunk of the training text, computed once, kept on disk, read from there.

    <path>/
        manifest.json     everything that decides the predictions, by name: hashes of the data, the tokenizer and the
                          teachers, their mix, the temperature, k, the length of a chunk
        part-00000.bin    the number of its chunks, 256 except in the last part; where the record of each ends; the
                          records; the CRC-32 of all that (numbers are uint64, ends count bytes)

A record holds the K streams of one chunk of L positions: −log p of the k most probable tokens and of all others
together, in steps of 2⁻⁹ nats, and the tokens. The most probable token comes first, so the costs ascend and are stored
as differences. Every number has two bytes; all first bytes come before all second ones, and the whole is deflated.
Parts are whole or missing, so a run that was killed goes on from there, and two runs may fill one cache.

B sequences, L positions, N = B·L tokens, K teacher streams, V vocabulary, k tokens kept.
"""

import json
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
from engine.system.files import remove_abandoned, written_aside
from engine.teachers.teachers import Teachers, load_teachers, teacher_streams
from kernels import Projected, TopK

FORMAT = 2
STEPS_PER_NAT = 512  # Half a step is 0.1% of a probability.
MAX_STEPS = 2**16 - 1  # of −log p, 128 nats
CHUNKS_PER_PART = 256
TOKENS_PER_BATCH = 1024  # whose logits are in memory at once while the cache is written


class CachedTeachers(Teachers):
    """K streams of predictions, read from the disk; no model is in memory."""

    def __init__(self, names: list[str], weights: list[float], parts: Sequence[Path], manifest: dict[str, Any]) -> None:
        super().__init__(names, weights, [], [])
        self._parts = [np.memmap(part, dtype=np.uint8, mode="r") for part in parts]
        self._ends = [record_ends(part) for part in parts]
        self._k, self._length = manifest["k"], manifest["length"]

    def __call__(self, batch: Batch) -> Sequence[Projected | TopK]:
        return batch.predicted

    def read_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yields the steps with their predictions, which a thread reads and unpacks during the step before."""
        with_predictions = map(self._with_predictions, steps)
        with ThreadPoolExecutor(1) as reader:
            future = reader.submit(next, with_predictions, None)
            while (step := future.result()) is not None:
                future = reader.submit(next, with_predictions, None)
                yield step

    def _with_predictions(self, step: Step) -> Step:
        return replace(step, micro_batches=[replace(b, predicted=self.read(b)) for b in step.micro_batches])

    def read(self, batch: Batch) -> tuple[TopK, ...]:
        """Returns the K predictions of the batch's N tokens, on its device."""
        records = [self._record(chunk) for chunk in batch.chunks]
        streams = []
        for stream in range(len(self.names)):
            fields = (torch.cat([record[stream][field] for record in records]) for field in range(3))
            streams.append(TopK(*(to_device(field, batch.tokens_BL.device) for field in fields)))
        return tuple(streams)

    def _record(self, chunk: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        part, index = divmod(chunk, CHUNKS_PER_PART)
        ends = self._ends[part]
        begin = 8 * (1 + len(ends)) if index == 0 else int(ends[index - 1])
        return unpack(self._parts[part][begin : int(ends[index])].tobytes(), len(self.names), self._length, self._k)


def cached_teachers(
    config: Config, prepared: Prepared, data: TrainingData, runtime: Runtime, teacher_hashes: Sequence[str]
) -> CachedTeachers:
    """Returns the teachers of the cache at `config.cache.path`, after it was filled where something was missing.

    It is a collective call. Raises UserError where the folder holds other predictions, or where a part is damaged or
    cannot be written.
    """
    assert config.cache is not None
    folder, chunks, vocab_size = Path(config.cache.path), data.file.chunks, prepared.tokenizer.vocab_size
    if not config.cache.k < vocab_size <= 2**16:
        raise UserError(
            f"cache.k={config.cache.k} with a vocabulary of {vocab_size:,} tokens: expected fewer than the vocabulary "
            "has, and a vocabulary of at most 65,536; lower cache.k, or drop the cache"
        )
    manifest = manifest_of(config, prepared, chunks, teacher_hashes)
    parts = [folder / f"part-{number:05d}.bin" for number in range(-(-chunks // CHUNKS_PER_PART))]
    missing = runtime.broadcast([part for part in parts if not part.is_file()])
    with runtime.raise_on_all_ranks():
        _check_manifest(folder, manifest)
        for part in [part for part in parts if part not in missing][runtime.rank :: runtime.world_size]:
            _check_part(part)
    if missing:
        teachers = load_teachers(config, prepared.tokenizer, runtime.device)
        with runtime.main_process_first():
            if runtime.is_main_process:
                _put(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        with runtime.raise_on_all_ranks():
            for number in range(runtime.rank, len(missing), runtime.world_size):
                part = missing[number]
                if part.is_file():  # Another run has been faster.
                    continue
                first = parts.index(part) * CHUNKS_PER_PART
                part_chunks = range(first, min(first + CHUNKS_PER_PART, chunks))
                mass = _write_part(part, data, part_chunks, teachers, config.cache.k, config.objective.temperature)
                if runtime.is_main_process:
                    progress = f"part {number + 1} of {len(missing)}"
                    print(f"teachers' predictions: {progress}, {mass:.0%} of their mass", flush=True)
    if runtime.is_main_process:
        remove_abandoned(folder)
    return CachedTeachers(*teacher_streams(config), parts, manifest)


def manifest_of(config: Config, prepared: Prepared, chunks: int, teacher_hashes: Sequence[str]) -> dict[str, Any]:
    """Returns everything that decides the predictions: a cache with any other value is refused."""
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


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    if not path.is_file():
        if folder.is_dir() and any(file.suffix != ".partial" for file in folder.iterdir()):
            raise UserError(
                f"cache.path={folder} holds something else, without a manifest.json: expected a cache or a new folder; "
                "name another"
            )
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete {folder}, and it is made again") from None
    for key, value in manifest.items():
        if stored.get(key) != value:
            raise UserError(
                f"cache.path={folder} holds other predictions: its {key} is {stored.get(key)!r}, this run's {value!r}; "
                "name another folder, or set it back"
            )


def _check_part(part: Path) -> None:
    size, ends = part.stat().st_size, record_ends(part)
    if len(ends) == 0 or size != ends[-1] + 8:
        expected = f"{ends[-1] + 8:,}" if len(ends) else "more"
        raise UserError(f"{part} has {size:,} bytes, expected {expected}: delete it, and it is made again")
    content = np.memmap(part, np.uint8, "r").data
    if zlib.crc32(content[:-8]) != int.from_bytes(content[-8:], "little"):
        raise UserError(f"{part} is damaged: delete it, and it is made again")


def record_ends(part: Path) -> np.ndarray:
    """Returns where each record of a part ends, in bytes; it is empty for a file that is too short to say."""
    with part.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        if 8 * (1 + count) > part.stat().st_size:
            return np.empty(0, np.uint64)
        return np.frombuffer(file.read(8 * count), "<u8")


def _write_part(part: Path, data: TrainingData, chunks: range, teachers: Teachers, k: int, temperature: float) -> float:
    """Writes the chunks' predictions, and returns the share of the probability that is kept."""
    file = data.file
    records: list[bytes] = []
    tails: list[Tensor] = []
    batch_size = max(1, TOKENS_PER_BATCH // file.length)
    for first in range(chunks.start, chunks.stop, batch_size):
        batch_chunks = range(first, min(first + batch_size, chunks.stop))
        batch = file.batch([chunk * file.length for chunk in batch_chunks], data.device)
        streams = [top_k(stream, k, temperature) for stream in teachers(batch)]
        tails += [stream.tail for stream in streams]
        for i in range(len(batch_chunks)):
            rows = slice(i * file.length, (i + 1) * file.length)
            records.append(pack([[field[rows] for field in stream] for stream in streams]))
    ends = 8 * (1 + len(records)) + np.cumsum([len(record) for record in records])
    content = np.array([len(records), *ends], "<u8").tobytes() + b"".join(records)
    _put(part, content + zlib.crc32(content).to_bytes(8, "little"))
    return 1 - torch.cat(tails).mean().item()


def _put(path: Path, content: bytes) -> None:
    try:
        with written_aside(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}): make room and run again") from error


@torch.no_grad()
def top_k(stream: Projected | TopK, k: int, temperature: float) -> TopK:
    """Returns the k most probable tokens at `temperature`, and the probability of all others."""
    assert isinstance(stream, Projected)
    log_prob_NV = (stream.hidden.float() @ stream.weight.float().T / temperature).log_softmax(-1)
    log_prob_Nk, index_Nk = log_prob_NV.topk(k)
    tail_N = log_prob_NV.scatter_(1, index_Nk, -torch.inf).exp_().sum(-1)
    return TopK(log_prob_Nk, index_Nk, tail_N)


def pack(streams: Sequence[Sequence[Tensor]]) -> bytes:
    """Returns one chunk's record, of K streams (log_prob [L, k], index [L, k], tail [L])."""
    planes = []
    for log_prob_Lk, index_Lk, tail_L in streams:
        costs = torch.cat([-log_prob_Lk, -tail_L.log()[:, None]], 1).cpu().double().numpy()
        steps = np.minimum(np.rint(costs * STEPS_PER_NAT), MAX_STEPS).astype("<u2")
        steps[:, 1:-1] = np.diff(steps[:, :-1], axis=1)  # The tail stays by itself.
        planes += [steps, index_Lk.cpu().numpy().astype("<u2")]
    return zlib.compress(b"".join(plane.view(np.uint8).reshape(-1, 2).T.tobytes() for plane in planes))


def unpack(record: bytes, streams: int, length: int, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns what `pack` was given, up to rounding; each position's probabilities sum to 1 again."""
    content = np.frombuffer(zlib.decompress(record), np.uint8)
    unpacked = []
    for stream in np.split(content, streams):
        steps, index = (
            np.ascontiguousarray(plane.reshape(2, -1).T).view("<u2").reshape(length, -1)
            for plane in np.split(stream, [2 * length * (k + 1)])
        )
        costs = np.concatenate([np.cumsum(steps[:, :-1], axis=1, dtype=np.uint32), steps[:, -1:]], axis=1)
        log_prob = torch.from_numpy(costs.astype(np.float32) / -STEPS_PER_NAT).log_softmax(-1)
        unpacked.append((log_prob[:, :-1], torch.from_numpy(index.astype(np.int32)), log_prob[:, -1].exp()))
    return unpacked
