"""Peak figures of GPUs from their vendors' data sheets: arithmetic, memory, bandwidth.

Times computed from them are lower bounds, or need a utilisation. Does not cover measured performance, or links between
GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as given to `find_gpu`.
        tflops: peak of dense bfloat16 products with float32 accumulation, 10^12 operations per second.
        memory_gb: memory, 10^9 bytes.
        bandwidth_tb: peak memory bandwidth, 10^12 bytes per second.
    """

    name: str
    tflops: float
    memory_gb: float
    bandwidth_tb: float


# If a data sheet gives the figure with sparsity, this is half of it.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 2250, 180, 8.0),  # NVIDIA, HGX B200 in the Blackwell datasheet: 1.44 TB and 64 TB/s for eight
        Gpu("h200", 989.5, 141, 4.8),  # NVIDIA H200 datasheet, SXM: 1,979 TFLOPS with sparsity
        Gpu("h100", 989.5, 80, 3.35),  # NVIDIA H100 datasheet, SXM: 1,979 TFLOPS with sparsity
        Gpu("a100", 312, 80, 2.039),  # NVIDIA A100 80GB datasheet, SXM
        Gpu("a100-40gb", 312, 40, 1.555),  # NVIDIA A100 40GB datasheet, SXM
        Gpu("l40s", 362.05, 48, 0.864),  # NVIDIA L40S datasheet: 733 TFLOPS with sparsity
        Gpu("rtx4090", 165.2, 24, 1.008),  # NVIDIA Ada GPU architecture whitepaper, appendix A
        Gpu("rtx3090", 71, 24, 0.936),  # NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A
        Gpu("mi300x", 1307.4, 192, 5.3),  # AMD Instinct MI300X data sheet
    )
}
"""The known GPUs by name."""


def find_gpu(
    name: str, *, tflops: float | None = None, memory_gb: float | None = None, bandwidth_tb: float | None = None
) -> Gpu:
    """The GPU `name`; given figures replace those of the table. Units as in `Gpu`.

    Raises:
        ValueError: the name is not in the table and a figure is missing, or a figure is not above zero.
    """
    figures: dict[str, Any] = {"tflops": tflops, "memory_gb": memory_gb, "bandwidth_tb": bandwidth_tb}
    own = {key: value for key, value in figures.items() if value is not None}
    for key, value in own.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"gpu_{key}={value!r}: must be a number above zero.")
    known = GPUS.get(name.lower())
    if known is not None:
        return replace(known, **own)
    if len(own) < len(figures):
        raise ValueError(
            f"GPU {name!r} is unknown; known: {', '.join(GPUS)}. For another GPU give all figures: gpu_tflops=... "
            "(dense bfloat16), gpu_memory_gb=... and gpu_bandwidth_tb=...."
        )
    return Gpu(name, **own)


__all__ = ["GPUS", "Gpu", "find_gpu"]
