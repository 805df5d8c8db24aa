"""The teachers' hidden states, computed once and read from the disk from then on.

A frozen teacher is its last hidden states and its head. Each teacher has a folder of its own in `cache.path`, named as
the teacher is (engine.teachers.store). Where it reads fixed chunks, its states are kept as the first epoch computes
them. Where it reads windows of its own, all of them are computed before the first step. A teacher whose states are all
there is loaded without its body.

A cached run equals a live one bit for bit where a row's states do not depend on the other rows of its pass. On a CPU
they do not for passes of equal shape whose activations fill whole vector registers: a micro-batch times train.length
times the teacher's inner width is a multiple of 32. States computed with another micro-batch are equal up to rounding.

N tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config.settings import Config
from engine.data.batches import Batch, Step, TokenFile, to_device
from engine.data.prepare import Prepared
from engine.models.huggingface import shape_of_folder
from engine.system.distributed import Runtime
from engine.system.errors import UserError
from engine.teachers.store import FORMAT, StateStore, Stored, stored
from engine.teachers.teachers import (
    STORAGE,
    Teacher,
    Teachers,
    folder_of,
    load_teacher,
    teacher_names,
    teacher_shares,
    teacher_streams,
    windows_of,
)
from engine.teachers.windows import Piece

PART_BYTES = 128 * 2**20  # of a teacher's states that are in memory before they are written


class CachedTeachers(Teachers):
    """Teachers whose hidden states are read one step ahead, and kept where they have to be computed."""

    cached = True

    def __init__(
        self,
        names: list[str],
        weights: list[float],
        teachers: Sequence[Teacher],
        shares: Sequence[float],
        stores: Sequence[StateStore],
    ) -> None:
        super().__init__(names, weights, teachers, shares)
        self._stores = stores
        self._writers = [_Writer(store) for store in stores]

    def states(self, number: int, batch: Batch) -> Tensor:
        """See `Teachers.states`. What is computed is kept."""
        if batch.teacher_states[number] is not None:
            return super().states(number, batch)
        store = self._stores[number]
        if self.teachers[number].model is None:
            raise UserError(f"{store.folder}: a part has gone while the run read it; run again, and it is computed")
        computed = stored(super().states(number, batch), store.int8)
        self._writers[number].add(store.windows.pieces(batch.begins), computed)
        return computed.values(store.dtype)  # The kept ones, so that a run that goes on sees what this one has seen.

    def read_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yields the steps with the hidden states that are there. A thread reads them during the step before.

        What was computed is written at the end of an epoch at the latest, so that other ranks find it. A body is freed
        when it is not needed any more.
        """
        with_states, epoch = map(self._with_states, steps), 0
        with ThreadPoolExecutor(1) as reader:
            future = reader.submit(next, with_states, None)
            while (step := future.result()) is not None:
                complete = [store.complete for store in self._stores]
                future = reader.submit(next, with_states, None)
                yield step
                if int(step.epoch) > epoch:
                    epoch = int(step.epoch)
                    self.flush()
                for teacher, is_complete in zip(self.teachers, complete, strict=True):
                    if is_complete:  # It was so before the next step was read.
                        teacher.model = None

    def flush(self) -> None:
        """Begins to write what has been computed; raises UserError where something could not be written."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Writes what has been computed."""
        for writer in self._writers:
            writer.close()

    def _with_states(self, step: Step) -> Step:
        return replace(step, micro_batches=[self._batch_with_states(batch) for batch in step.micro_batches])

    def _batch_with_states(self, batch: Batch) -> Batch:
        states = [store.find(store.windows.pieces(batch.begins)) for store in self._stores]
        device = batch.tokens_BL.device
        return replace(batch, teacher_states=tuple(None if x is None else to_device(x, device) for x in states))


class _Writer:
    """Collects a teacher's states as they are computed, and writes them in a thread, a part at a time."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._blocks: dict[int, Stored] = {}
        self._bytes = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, pieces: Sequence[Piece], computed: Stored) -> None:
        """Takes the states of whole blocks, one after another."""
        for i, piece in enumerate(pieces):
            self._blocks[piece.block] = computed.rows(i * piece.stop, (i + 1) * piece.stop)
        self._bytes += computed.states.nbytes
        if self._bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Begins to write what is there; raises UserError where the part before could not be written."""
        if self._writing is not None:
            self._writing.result()
        blocks, self._blocks, self._bytes = self._blocks, {}, 0
        self._writing = self._thread.submit(self._write, blocks)

    def close(self) -> None:
        self.flush()
        self._thread.shutdown()
        if self._writing is not None:
            self._writing.result()

    def _write(self, blocks: dict[int, Stored]) -> None:
        self._store.refresh()  # Another run may have written some of them.
        missing = self._store.missing(blocks)
        if missing:
            self._store.write(missing, [blocks[block] for block in missing])


def cached_teachers(
    config: Config,
    prepared: Prepared,
    file: TokenFile,
    runtime: Runtime,
    teacher_hashes: Sequence[str],
    stack: ExitStack,
) -> CachedTeachers:
    """Returns the teachers of `config` with their states at `config.cache.path`; a collective call.

    Teachers that read windows of their own compute what is missing first. `stack` writes at its end what the run has
    computed. Raises UserError where a folder holds other states, where a part is damaged or cannot be written, and as
    `load_teacher` does.
    """
    teachers, stores = [], []
    for number, folder in enumerate(_folders(config)):
        with runtime.raise_on_all_ranks():
            store = _open_store(config, prepared, file, number, folder, teacher_hashes[number])
        # A rank of another node may not see yet what the others see.
        missing = sorted(set[int]().union(*runtime.all_gather(store.missing(range(store.windows.blocks)))))
        teacher = load_teacher(
            config, config.teachers[number], prepared.tokenizer, file, runtime.device, with_body=bool(missing)
        )
        if missing and store.windows.stream:
            with runtime.raise_on_all_ranks():
                _compute(teacher, store, missing, runtime)
            store.refresh()
            teacher.model = None
        elif missing and runtime.is_main_process:
            print(f"{store.folder}: {len(missing):,} of {store.windows.blocks:,} chunks are computed as they are met")
        teachers.append(teacher)
        stores.append(store)
    cached = CachedTeachers(*teacher_streams(config), teachers, teacher_shares(config), stores)
    stack.callback(cached.close)
    return cached


def _folders(config: Config) -> list[Path]:
    """Returns a folder for each teacher: it has the teacher's name, and its number where names are equal."""
    assert config.cache is not None
    names = [name.strip("/").replace("/", "-") for name in teacher_names(config)]
    numbered = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    return [Path(config.cache.path) / name for name in numbered]


def _open_store(
    config: Config, prepared: Prepared, file: TokenFile, number: int, folder: Path, teacher_hash: str
) -> StateStore:
    assert config.cache is not None
    teacher = config.teachers[number]
    shape = shape_of_folder(folder_of(teacher), f"teachers: {teacher.path}")
    windows = windows_of(config, teacher, shape, file)
    manifest = {
        "format": FORMAT,
        "data": prepared.identity,
        "tokenizer": prepared.tokenizer.hash,
        "teacher": teacher_hash,
        "context": teacher.context,
        "window" if windows.stream else "train.length": windows.length,
        "blocks": windows.blocks,
        "precision": config.train.precision,
        "dtype": config.cache.dtype,
    }
    return StateStore(folder, manifest, windows, shape.hidden, STORAGE[config.train.precision])


@torch.no_grad()
def _compute(teacher: Teacher, store: StateStore, missing: Sequence[int], runtime: Runtime) -> None:
    """Computes and writes this rank's parts of the blocks that are missing."""
    size = max(1, PART_BYTES // (store.windows.block_length * teacher.shape.hidden * store.dtype.itemsize))
    size = min(size, -(-len(missing) // runtime.world_size))
    parts = [missing[first : first + size] for first in range(0, len(missing), size)]
    for number in range(runtime.rank, len(parts), runtime.world_size):
        store.refresh()  # Another run may have written some of them.
        blocks = store.missing(parts[number])
        if blocks:
            store.write(blocks, [stored(states, store.int8) for states in teacher.states_of_blocks(blocks)])
        if runtime.is_main_process:
            print(f"{store.folder}: computed part {number + 1} of {len(parts)} of what was missing", flush=True)
