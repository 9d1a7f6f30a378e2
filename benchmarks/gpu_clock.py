"""Timing of calls on a GPU, and measured limits of the GPU: copies, matrix products, launches.

The time of a call is the median over replays of a CUDA graph that holds one call for each of several input sets, so it
does not include launches by the host. What synchronises with the host cannot be captured and is timed with events,
host included. Without CUDA the host's clock is used, only to test the code.
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
        spread: interquartile range of the repetitions, relative to the median: smaller differences are noise.
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
    """Measured limits of a device: bytes (read and written) and bf16 operations per second, and one launch.

    Attributes:
        launch_us: of a trivial kernel, in a graph, one after the other.
        l2_bytes: size of the last-level cache.
    """

    bytes_per_second: float
    flops_per_second: float
    launch_us: float
    l2_bytes: int

    def floor_us(self, n_bytes: float, flops: float = 0.0) -> float:
        """The least possible time: moving the bytes, computing, or one launch, whichever takes longest."""
        return max(1e6 * n_bytes / self.bytes_per_second, 1e6 * flops / self.flops_per_second, self.launch_us)

    def as_json(self) -> dict[str, float]:
        return {
            "copy_gb_per_second": round(self.bytes_per_second / 1e9, 1),
            "bf16_matmul_tflops": round(self.flops_per_second / 1e12, 1),
            "launch_us": round(self.launch_us, 3),
            "l2_bytes": self.l2_bytes,
        }


def on_gpu() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def by_replay(calls: Sequence[Call], seconds: float = 0.4) -> Timed:
    """The time of one call in a graph that holds all of `calls` in sequence, replayed for about `seconds`."""
    if not on_gpu():
        return by_host(calls, seconds)
    graph = captured(calls)
    once = _between_events([graph.replay] * 2)[-1]
    repeats = max(FEWEST, min(MOST, int(seconds * 1e6 / max(once, 1.0))))
    times = _between_events([graph.replay] * repeats)
    graph.reset()
    return _timed([microseconds / len(calls) for microseconds in times], "graph")


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of these calls, after a warm-up on a side stream, as capturing requires."""
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
    """The time of one call including the host; the calls alternate."""
    if not on_gpu():
        return by_host(calls, seconds)
    warm = _between_events([*calls[:2], *calls[:2]])
    repeats = max(FEWEST, min(MOST, int(seconds * 1e6 / max(warm[-1], 1.0))))
    return _timed(_between_events([calls[i % len(calls)] for i in range(repeats)]), "events")


def by_host(calls: Sequence[Call], seconds: float = 0.0) -> Timed:
    """By the host's clock, without a GPU."""
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
    """Measures the limits of `device`, on random data, because zeros are multiplied faster."""
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
