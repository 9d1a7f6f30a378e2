"""Processes that run a test's functions together over gloo, on the CPU, with a limit on the time they may take.

They are forked from a server that has imported the libraries once. They meet through a file of their own, so tests
that run at the same time do not share a port. Does not cover programs of their own, such as torchrun's.
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
START_SECONDS = 120  # imports on a busy machine
CALL_SECONDS = 120


class ProcessError(AssertionError):
    """A process failed, or did not answer in time; the message holds its traceback."""


class Processes:
    """`count` processes of one gloo group; `run(function, ...)` calls the function in each of them.

    A function that fails or hangs in one process leaves the others in a collective: all are then ended, and the next
    call starts new ones.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """What `function(rank, *args)` returned in each process, by rank. The function stands at a module's top level.

        Raises:
            ProcessError: it failed in a process, or took longer than `seconds`.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(_packed((function, args)))
        return self._answers(seconds)

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._workers:
            pipe.close()  # one that waits for a call ends by itself
            process.join(2)
            process.kill()
            process.join()
        self._workers = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        meeting = os.path.join(tempfile.mkdtemp(prefix="flexmoe-tests-", dir=os.environ["HF_HOME"]), "store")
        for rank in range(self.count):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there, rank, self.count, meeting), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        self._answers(START_SECONDS)

    def _answers(self, seconds: float) -> list[Any]:
        end = time.monotonic() + seconds
        answers: dict[int, Any] = {}
        try:
            while len(answers) < self.count:
                waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers) if rank not in answers}
                ready = multiprocessing.connection.wait(list(waiting), max(0.0, end - time.monotonic()))
                if not ready:
                    raise ProcessError(f"Process(es) {sorted(waiting.values())} did not answer in {seconds:g} s.")
                for pipe in ready:
                    answers[waiting[pipe]] = _answer(pipe, waiting[pipe])
        except ProcessError:
            self.close()
            raise
        return [answers[rank] for rank in range(self.count)]


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        failed, value = _unpacked(pipe.recv_bytes())
    except EOFError:
        raise ProcessError(f"Process {rank} died.") from None
    if failed:
        raise ProcessError(f"Process {rank} failed:\n{value}")
    return value


def _serve(pipe: Connection, rank: int, count: int, meeting: str) -> None:
    """Joins the group, says so, and then answers calls until the other end is closed."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(meeting, count)
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
                answer = (False, function(rank, *args))
        except Exception:  # told to the test, which fails
            answer = (True, traceback.format_exc())
        try:
            pipe.send_bytes(_packed(answer))
        except BrokenPipeError:  # another process has failed before, so nobody listens
            return


def _packed(value: Any) -> bytes:
    """Bytes that hold tensors by value: a pipe's own way would share memory that ends with the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
