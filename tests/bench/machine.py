"""What every benchmark writes beside its figures: when, on what, with which versions, and how busy it was."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch
import transformers

import flexmoe


def machine() -> dict[str, object]:
    """Date, device, versions, and the load average before the run: call it first."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"cpu ({model or platform.processor()}, {os.cpu_count()} cores)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "flexmoe": flexmoe.__version__,
            "kernel": platform.release(),
        },
        "load_before": round(os.getloadavg()[0], 2),
    }


__all__ = ["machine"]
