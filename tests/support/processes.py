"""Worker processes that run functions of a test together in a gloo group on the CPU, with a time limit.

They are forked from a server that imports the libraries once. They meet through a file, so tests that run in parallel
do not share a port. Does not cover launchers such as torchrun.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

PRELOADED = ["flexmoe.testing", "pytest", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]
START_SECONDS = 120  # for imports on a busy machine
CALL_SECONDS = 120


class ProcessError(AssertionError):
    """A process failed or did not respond in time; the message contains its traceback."""


class Processes:
    """`count` processes of one gloo group; `run(function, ...)` calls the function in each of them.

    If the function fails or hangs in one process, the others wait in a collective operation; all are then stopped, and
    the next call starts new ones.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """The results of `function(rank, *args)` in each process, by rank. It must be a function at module level.

        Raises:
            ProcessError: the function failed in a process, or took longer than `seconds`.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(_packed((function, args)))
        return self._results(seconds)

    def close(self) -> None:
        """Stops the processes."""
        for process, pipe in self._workers:
            pipe.close()  # a process that waits for a call exits by itself
            process.join(2)
            process.kill()
            process.join()
        self._workers = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        rendezvous = os.path.join(tempfile.mkdtemp(prefix="flexmoe-tests-", dir=os.environ["HF_HOME"]), "store")
        for rank in range(self.count):
            pipe, worker_end = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(worker_end, rank, self.count, rendezvous), daemon=True
            )
            process.start()
            worker_end.close()
            self._workers.append((process, pipe))
        self._results(START_SECONDS)

    def _results(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        results: dict[int, Any] = {}
        try:
            while len(results) < self.count:
                waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers) if rank not in results}
                ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise ProcessError(f"Process(es) {sorted(waiting.values())} did not respond in {seconds:g} s.")
                for pipe in ready:
                    results[waiting[pipe]] = _receive(pipe, waiting[pipe])
        except ProcessError:
            self.close()
            raise
        return [results[rank] for rank in range(self.count)]


def _receive(pipe: Connection, rank: int) -> Any:
    try:
        failed, value = _unpacked(pipe.recv_bytes())
    except EOFError:
        raise ProcessError(f"Process {rank} died.") from None
    if failed:
        raise ProcessError(f"Process {rank} failed:\n{value}")
    return value


def _serve(pipe: Connection, rank: int, count: int, rendezvous: str) -> None:
    """Joins the group, reports that, and runs functions until the other end of the pipe is closed."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(rendezvous, count)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=CALL_SECONDS)
    )
    pipe.send_bytes(_packed((False, None)))
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            torch.distributed.destroy_process_group()
            return
        try:
            function, args = _unpacked(call)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", module=r"flexmoe(\.|$)")
                result = (False, function(rank, *args))
        except Exception:  # reported to the test, which fails
            result = (True, traceback.format_exc())
        try:
            pipe.send_bytes(_packed(result))
        except BrokenPipeError:  # another process failed first and the test closed the pipes
            return


def _packed(value: Any) -> bytes:
    """Serializes tensors by value; a pipe would share memory that is freed when the process ends."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
