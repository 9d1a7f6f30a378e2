"""Peak memory of this process and its child processes.

Does not cover what the memory is used for.
"""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """A context manager that samples memory every `interval` seconds; `bytes` is the peak, with child processes.

    Shared pages are divided among their processes (PSS) if the system reports that, and counted in full (RSS)
    otherwise.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.is_set():
            processes = [process, *process.children(recursive=True)]
            self.bytes = max(self.bytes, sum(map(_resident_bytes, processes)))
            self._stop.wait(self._interval)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.Error:  # the process has ended
        return 0
