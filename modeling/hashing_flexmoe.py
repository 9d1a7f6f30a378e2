"""SHA-256 of a stream, computed by a thread beside the one that moves the bytes.

Does not cover what the hash is compared with, and hashes of several files at once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .tensors_flexmoe import Chunk


class BackgroundHasher:
    """SHA-256 of tensors and of the file they are in, in a thread beside the one that reads or writes (hashlib lets go
    of the GIL). At most `_AHEAD` chunks wait, which bounds memory and keeps a fast disk from running away.

    Args:
        tensors: names of those whose bytes are hashed.
        file: whether to hash all bytes together.
    """

    _AHEAD = 8

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
        if kind is None:  # else there is an error already
            for job in self._pending:
                job.result()

    def add(self, chunk: Chunk, tensor: str | None = None) -> None:
        """Takes the file's next bytes; `tensor` is the one they belong to, None for the header."""
        targets = [] if self._file is None else [self._file]
        if tensor in self._by_tensor:
            targets.append(self._by_tensor[tensor])
        if not targets or not len(chunk):
            return
        while len(self._pending) >= self._AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(_update_all, targets, chunk))

    def begin(self, tensor: str) -> None:
        """Announces a tensor, so that one without bytes has a hash too."""
        if tensor in self._wanted:
            self._by_tensor[tensor] = hashlib.sha256()

    def file_sha256(self) -> str:
        """The whole file's hash, once the `with` has ended."""
        assert self._file is not None
        return str(self._file.hexdigest())

    def tensor_sha256(self) -> dict[str, str]:
        """Each tensor's hash, once the `with` has ended; empty if not asked for."""
        return {name: digest.hexdigest() for name, digest in self._by_tensor.items()}


def _update_all(targets: Sequence[Any], chunk: Chunk) -> None:
    for target in targets:
        target.update(chunk)


__all__ = ["BackgroundHasher"]
