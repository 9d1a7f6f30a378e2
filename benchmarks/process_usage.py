"""Time and peak memory of a command, measured from another process. Linux only.

Private memory is RssAnon: resident pages except the page cache and mapped files. It is sampled, so peaks of a few
milliseconds may be missed; ru_maxrss misses none, but includes mapped files.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class ProcessUsage:
    """Wall seconds, user and system seconds, peak bytes, and the standard output of a command."""

    seconds: float
    cpu_seconds: float
    private_bytes: int
    resident_bytes: int
    output: str


def run_command(command: Sequence[str | Path], **environment: str) -> ProcessUsage:
    """Runs a command and measures it.

    Raises:
        RuntimeError: the command failed; the message contains the end of its standard error.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **environment}, stdout=output, stderr=errors
        )
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, private_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # subprocess must not wait for it again
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(
                f"{' '.join(map(str, command))} failed ({process.returncode}):\n{errors.read()[-3000:]}"
            )
        return ProcessUsage(seconds, usage.ru_utime + usage.ru_stime, peak, usage.ru_maxrss * 1024, output.read())


def private_bytes(pid: int) -> int:
    """RssAnon of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


__all__ = ["ProcessUsage", "private_bytes", "run_command"]
