"""safetensors checkpoints written as streams: header first, then chunks, hashed in other threads.

Does not cover reading and validating (`flexmoe.io.tensors`), or atomic folders (`flexmoe.io.folders`).

Source: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch

from flexmoe.io.finite import bytes_are_finite
from flexmoe.io.hashing import BackgroundHasher
from flexmoe.io.strict_json import json_text
from flexmoe.io.tensors import (
    CHUNK_BYTES,
    CheckpointFolder,
    Chunk,
    TensorFile,
    TensorInfo,
    expected_bytes,
    tensor_info,
)
from flexmoe.modeling.fingerprint_flexmoe import ALIGNMENT, TORCH_DTYPES, tensor_bytes

FLUSH_BYTES = 128 << 20
MAX_SHARD_SIZE = 5_000_000_000  # bytes; above it a checkpoint is split, as the Hub recommends


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written. `chunks()` starts a stream of its bytes, `info.nbytes` in total.

    A chunk may be hashed after the next one is drawn, so it must not be overwritten.
    """

    info: TensorInfo
    chunks: Callable[[], Iterator[Chunk]]


@dataclass(frozen=True)
class WrittenCheckpoint:
    """The result of `write_checkpoint`: SHA-256 (hex) per weight file and per tensor, where requested."""

    files: dict[str, str | None]
    tensor_sha256: dict[str, str]


def source_from_tensor(name: str, tensor: torch.Tensor) -> TensorSource:
    """A source for a tensor in memory, on any device."""

    def chunks() -> Iterator[Chunk]:
        data = tensor_bytes(tensor)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    return TensorSource(tensor_info(name, tensor), chunks)


def source_from_file(
    checkpoint: TensorFile | CheckpointFolder, name: str, new_name: str | None = None
) -> TensorSource:
    """A source for a stored tensor, byte for byte, under `new_name` if given. KeyError: no such tensor."""
    file = checkpoint.file_of(name) if isinstance(checkpoint, CheckpointFolder) else checkpoint
    stored = file.info(name)
    info = TensorInfo(new_name or name, stored.dtype, stored.shape, stored.nbytes)
    return TensorSource(info, lambda: file.chunks(name))


def source_from_part(
    checkpoint: CheckpointFolder, name: str, new_name: str, shape: Sequence[int], index: int
) -> TensorSource:
    """A source for part `index` of a stored tensor that is a concatenation of parts of this shape.

    Raises:
        KeyError: no such tensor.
        ValueError: the tensor has no such part.
    """
    file = checkpoint.file_of(name)
    stored = file.info(name)
    info = TensorInfo(new_name, stored.dtype, tuple(shape), expected_bytes(stored.dtype, shape))
    start, stop = index * info.nbytes, (index + 1) * info.nbytes
    if not 0 <= start < stop <= stored.nbytes:
        raise ValueError(f"{file.path}: {name!r} of shape {list(stored.shape)} has no part {index} of {list(shape)}.")
    return TensorSource(info, lambda: file.chunks(name, start=start, stop=stop))


def finite_source(source: TensorSource, error: Exception) -> TensorSource:
    """The same floating-point tensor; its stream raises `error` at a number that is NaN or infinite."""

    def chunks() -> Iterator[Chunk]:
        for chunk in source.chunks():
            if not bytes_are_finite(chunk, source.info.dtype):
                raise error
            yield chunk

    return TensorSource(source.info, chunks)


def write_checkpoint(
    folder: str | Path,
    sources: Sequence[TensorSource],
    *,
    stem: str = "model",
    max_shard_size: int = MAX_SHARD_SIZE,
    aligned: bool = True,
    hash_tensors: Collection[str] = (),
    hash_files: bool = False,
    concurrent: bool = False,
    flush: bool = True,
    progress: Callable[[int], None] | None = None,
) -> WrittenCheckpoint:
    """Streams `sources` into `<stem>.safetensors`, or into shards of at most `max_shard_size` bytes and an index.

    Tensors are assigned to shards in the order given; one that is larger than a shard gets a shard of its own. Within
    a file, wider dtypes come first, as in safetensors' own writer; otherwise the order is kept. Files and shards are
    named as by transformers. A few chunks are in memory at a time. The folder must exist and hold none of these files;
    after an error it holds a partial checkpoint, so write into an `atomic_folder`.

    Args:
        aligned: put tensors at multiples of `ALIGNMENT` bytes, and those whose size is none at the end, so that a
            mapped file is used without copies. Packages do without: their bytes are part of their identity.
        hash_files: also compute the SHA-256 of each file, in a background thread.
        hash_tensors: names of the tensors to compute the SHA-256 of.
        concurrent: stream several tensors at the same time, each in its own thread; sources must not share mutable
            state. Not with `hash_files`, which needs the bytes in order.
        flush: flush to disk while writing, for a `durable` folder.
        progress: called with the number of bytes just written.

    Raises:
        ValueError: no sources, a duplicate name, an unknown dtype, a source whose stream has more or fewer bytes than
            its `info`, or `concurrent` with `hash_files`.
        FileExistsError: a file of that name exists.
    """
    _check_sources(sources, max_shard_size)
    if concurrent and hash_files:
        raise ValueError("concurrent=True writes a file out of order, so it cannot be combined with hash_files=True.")
    shards = _assign_to_shards(sources, max_shard_size, aligned)
    multiple = ALIGNMENT if aligned else 8
    files: dict[str, str | None] = {}
    tensor_sha256: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        header = _header_bytes([source.info for source in shard], multiple)
        with (
            open(Path(folder, name), "xb") as file,
            _Flusher(file) as flusher,
            BackgroundHasher(hash_tensors, file=hash_files) as hasher,
        ):
            listeners = [*([flusher.written] if flush else []), *([progress] if progress else [])]
            if concurrent:
                tensor_sha256.update(_write_file_in_threads(file, shard, header, listeners, hash_tensors))
            else:
                _write_file(file, shard, header, listeners, hasher)
        files[name] = hasher.file_sha256() if hash_files else None
        tensor_sha256.update(hasher.tensor_sha256())
    if len(shards) > 1:
        weight_map = {s.info.name: name for shard, name in zip(shards, files, strict=True) for s in shard}
        index = {
            "metadata": {"total_size": sum(s.info.nbytes for s in sources)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        Path(folder, f"{stem}.safetensors.index.json").write_text(json_text(index), encoding="utf-8")
    return WrittenCheckpoint(files, tensor_sha256)


class _Flusher:
    """Flushes a growing file to disk from a thread, so that the final fsync has little left to do. No guarantee."""

    def __init__(self, file: BinaryIO):
        self._descriptor = file.fileno()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flexmoe-fsync")
        self._pending: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> "_Flusher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def written(self, count: int) -> None:
        """Counts `count` more bytes and starts a flush every `FLUSH_BYTES`, never two at a time."""
        self._unflushed += count
        if self._unflushed >= FLUSH_BYTES and (self._pending is None or self._pending.done()):
            self._unflushed = 0
            self._pending = self._pool.submit(os.fsync, self._descriptor)


def _write_file(
    file: BinaryIO,
    shard: Sequence[TensorSource],
    header: bytes,
    listeners: Sequence[Callable[[int], None]],
    hasher: BackgroundHasher,
) -> None:
    file.write(header)
    hasher.add(header)
    for source in shard:
        info, written = source.info, 0
        hasher.begin(info.name)
        for chunk in source.chunks():
            written += len(chunk)
            if written > info.nbytes:
                break
            file.write(chunk)
            hasher.add(chunk, info.name)
            for listener in listeners:
                listener(len(chunk))
        if written != info.nbytes:
            raise _wrong_size(info, written)


def _write_file_in_threads(
    file: BinaryIO,
    shard: Sequence[TensorSource],
    header: bytes,
    listeners: Sequence[Callable[[int], None]],
    hash_tensors: Collection[str],
) -> dict[str, str]:
    """Writes a file and returns the SHA-256 of the tensors in `hash_tensors`.

    One thread is slower than the page cache, and a hash is sequential: so each thread streams one tensor at a time, to
    its position in the file.
    """
    descriptor, lock = file.fileno(), Lock()
    os.pwrite(descriptor, header, 0)

    def stream(source: TensorSource, position: int) -> str | None:
        digest = hashlib.sha256() if source.info.name in hash_tensors else None
        end = position + source.info.nbytes
        for chunk in source.chunks():
            if position + len(chunk) > end:
                raise _wrong_size(source.info, position + len(chunk) - end + source.info.nbytes)
            _write_at(descriptor, chunk, position)
            if digest:
                digest.update(chunk)
            position += len(chunk)
            with lock:
                for listener in listeners:
                    listener(len(chunk))
        if position != end:
            raise _wrong_size(source.info, position - end + source.info.nbytes)
        return digest.hexdigest() if digest else None

    positions = accumulate((source.info.nbytes for source in shard), initial=len(header))
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="flexmoe-stream")
    try:
        jobs = [pool.submit(stream, source, position) for source, position in zip(shard, positions, strict=False)]
        digests = {source.info.name: job.result() for source, job in zip(shard, jobs, strict=True)}
        return {name: digest for name, digest in digests.items() if digest}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_at(descriptor: int, chunk: Chunk, position: int) -> None:
    """Writes all of `chunk`; a single `pwrite` may write less."""
    view = memoryview(chunk)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _wrong_size(info: TensorInfo, given: int) -> ValueError:
    return ValueError(f"{info.name}: its source yielded {given:,} bytes or more, not {info.nbytes:,}.")


def _header_bytes(infos: Sequence[TensorInfo], multiple: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in infos:
        offsets = [position, position + info.nbytes]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def _assign_to_shards(sources: Sequence[TensorSource], max_shard_size: int, aligned: bool) -> list[list[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    room = max_shard_size
    for source in sources:
        if shards[-1] and source.info.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(source)
        room -= source.info.nbytes

    def order(source: TensorSource) -> tuple[bool, int]:
        shifts_others = aligned and source.info.nbytes % ALIGNMENT != 0
        return shifts_others, -TORCH_DTYPES[source.info.dtype].itemsize

    return [sorted(shard, key=order) for shard in shards]


def _check_sources(sources: Sequence[TensorSource], max_shard_size: int) -> None:
    if not sources:
        raise ValueError("There are no tensors to write.")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}; it must be at least 1 byte.")
    seen: set[str] = set()
    for source in sources:
        info = source.info
        if info.name in seen or info.name == "__metadata__":
            raise ValueError(f"Tensor name {info.name!r} is given twice, or is reserved by the format.")
        seen.add(info.name)
        if info.dtype not in TORCH_DTYPES or info.nbytes != expected_bytes(info.dtype, info.shape):
            raise ValueError(f"{info}: unknown dtype, or a size that does not match dtype and shape.")


__all__ = [
    "MAX_SHARD_SIZE",
    "TensorSource",
    "WrittenCheckpoint",
    "finite_source",
    "source_from_file",
    "source_from_part",
    "source_from_tensor",
    "write_checkpoint",
]
