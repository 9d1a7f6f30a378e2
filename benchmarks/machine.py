"""Metadata of a benchmark run (date, device, versions, load), and writing of its results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import flexmoe


def machine() -> dict[str, object]:
    """Date, device, versions, and load average; to be called before the measurements."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
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


def keep(result: Mapping[str, Any], out: Path) -> None:
    """Prints a result and writes it to `out`; to be called before thresholds are asserted."""
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")


__all__ = ["keep", "machine"]
