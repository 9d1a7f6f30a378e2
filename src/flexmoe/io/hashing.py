"""SHA-256 of a file, or of a stream in a background thread while the caller reads or writes.

Does not cover comparing a digest with an expected one, or hashing several files at once.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexmoe.io.folders import open_regular_file
from flexmoe.io.tensors import Chunk


def sha256_of(path: Path) -> tuple[int, str]:
    """The size of a file in bytes, and its SHA-256 (hex)."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular_file(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return file.tell(), digest.hexdigest()


class BackgroundHasher:
    """SHA-256 of tensors and of the file they are in, computed in one background thread (hashlib releases the GIL).

    At most `_MAX_PENDING` chunks are queued, which bounds memory when the disk is faster than hashing.

    Args:
        tensors: names of the tensors to hash.
        file: whether to hash all bytes together.
    """

    _MAX_PENDING = 8

    def __init__(self, tensors: Collection[str] = (), *, file: bool):
        self._wanted = tensors
        self._by_tensor: dict[str, Any] = {}
        self._file = hashlib.sha256() if file else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flexmoe-sha256")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> BackgroundHasher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:  # otherwise an error is already being raised
            for job in self._pending:
                job.result()

    def add(self, chunk: Chunk, tensor: str | None = None) -> None:
        """Hashes the file's next bytes; `tensor` is the tensor they belong to, None for the header."""
        targets = [] if self._file is None else [self._file]
        if tensor in self._by_tensor:
            targets.append(self._by_tensor[tensor])
        if not targets or not len(chunk):
            return
        while len(self._pending) >= self._MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(_update_all, targets, chunk))

    def begin(self, tensor: str) -> None:
        """Announces a tensor, so that an empty one gets a digest too."""
        if tensor in self._wanted:
            self._by_tensor[tensor] = hashlib.sha256()

    def file_sha256(self) -> str:
        """The digest (hex) of the complete file; call it after the `with` block."""
        assert self._file is not None
        return str(self._file.hexdigest())

    def tensor_sha256(self) -> dict[str, str]:
        """The digest (hex) of each requested tensor; call it after the `with` block."""
        return {name: digest.hexdigest() for name, digest in self._by_tensor.items()}


def _update_all(targets: Sequence[Any], chunk: Chunk) -> None:
    for target in targets:
        target.update(chunk)


__all__ = ["BackgroundHasher", "sha256_of"]
