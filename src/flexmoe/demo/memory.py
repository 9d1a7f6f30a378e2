"""How much memory this process and its children take at their peak.

Does not cover: where it goes.
"""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """A context; afterwards `.bytes` is the largest sum over this process and all below it, sampled twice a second.

    Pages that processes share are counted in parts (PSS) where the system tells, and in full (RSS) where it does not.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.is_set():
            family = [me, *me.children(recursive=True)]
            self.bytes = max(self.bytes, sum(_resident(process) for process in family))
            self._stop.wait(self._interval)


def _resident(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.Error:  # it ended between the listing and now
        return 0
