"""How long calls take on a GPU, and what the GPU can do at most: copies, matrix products, launches.

A call's time is the median over replays of a CUDA graph that holds one call for each of several input sets, so nothing
of a launch on the host is in it. What needs an answer on the host cannot be captured and is timed with events, host
included. Without CUDA everything runs by the host's clock, which tells nothing and keeps the code checked.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

FEWEST, MOST = 5, 200  # replays of one measurement
COPIED = 4 << 30  # bytes: far more than any cache
SIDE = 8192  # of the matrix product
LAUNCHES = 512


@dataclass(frozen=True)
class Timed:
    """Microseconds of one call.

    Attributes:
        spread: of the middle half of the repetitions, as a share of the median: smaller differences are noise.
        how: "graph", "events" or "host clock".
    """

    microseconds: float
    spread: float
    how: str

    def as_json(self) -> dict[str, object]:
        return {
            "microseconds": round(self.microseconds, 3),
            "spread": round(self.spread, 4),
            "timed_by": self.how,
        }


@dataclass(frozen=True)
class Ceilings:
    """What this device does at most, measured: bytes (read and written) and bf16 operations a second, and one launch.

    Attributes:
        launch_us: of a kernel that does nothing, in a graph, one after the other.
        l2_bytes: of its last cache.
    """

    bytes_per_second: float
    flops_per_second: float
    launch_us: float
    l2_bytes: int

    def floor_us(self, n_bytes: float, flops: float = 0.0) -> float:
        """No version is much faster: moving the bytes, computing, or one launch, whichever takes longest."""
        return max(1e6 * n_bytes / self.bytes_per_second, 1e6 * flops / self.flops_per_second, self.launch_us)

    def as_json(self) -> dict[str, float]:
        return {
            "copy_gb_per_second": round(self.bytes_per_second / 1e9, 1),
            "bf16_matmul_tflops": round(self.flops_per_second / 1e12, 1),
            "launch_us": round(self.launch_us, 3),
            "l2_bytes": self.l2_bytes,
        }


def on_gpu() -> bool:
    """Whether there is one to measure on."""
    return torch.cuda.is_available()


def by_replay(calls: Sequence[Call], seconds: float = 0.4) -> Timed:
    """One call's time in a graph that holds all of `calls` one after the other, replayed for about `seconds`."""
    if not on_gpu():
        return by_host(calls, seconds)
    graph = captured(calls)
    once = _between_events([graph.replay] * 2)[-1]
    repeats = max(FEWEST, min(MOST, int(seconds * 1e6 / max(once, 1.0))))
    times = _between_events([graph.replay] * repeats)
    graph.reset()
    return _timed([microseconds / len(calls) for microseconds in times], "graph")


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of these calls, which have run before on a stream of their own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls[:1]]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def by_events(calls: Sequence[Call], seconds: float = 0.4) -> Timed:
    """One call's time as its caller sees it, what the host does included; the calls take turns."""
    if not on_gpu():
        return by_host(calls, seconds)
    warm = _between_events([*calls[:2], *calls[:2]])
    repeats = max(FEWEST, min(MOST, int(seconds * 1e6 / max(warm[-1], 1.0))))
    return _timed(_between_events([calls[i % len(calls)] for i in range(repeats)]), "events")


def by_host(calls: Sequence[Call], seconds: float = 0.0) -> Timed:
    """By the host's clock, where there is no GPU."""
    times = []
    for i in range(FEWEST):
        start = time.perf_counter()
        calls[i % len(calls)]()
        times.append((time.perf_counter() - start) * 1e6)
    return _timed(times, "host clock")


def _between_events(calls: Sequence[Call]) -> list[float]:
    pairs = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _timed(times: Sequence[float], how: str) -> Timed:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return Timed(median, (high - low) / median if median else 0.0, how)


def ceilings(device: torch.device, copied: int = COPIED, side: int = SIDE) -> Ceilings:
    """Measures what `device` does at most, on random data: zeros are multiplied faster."""
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = by_events([functools.partial(target.copy_, source)]).microseconds
    del source, target
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_us = by_events([lambda: torch.mm(a, b)]).microseconds
    one = torch.ones(1, device=device)
    launch_us = by_replay([lambda: one.add_(1)] * LAUNCHES, 0.05).microseconds
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return Ceilings(2e6 * copied / copy_us, 2e6 * side**3 / product_us, launch_us, l2_bytes)


__all__ = ["Call", "Ceilings", "Timed", "by_events", "by_host", "by_replay", "captured", "ceilings", "on_gpu"]
