"""What stands beside a benchmark's figures (when, on what, which versions, how busy), and where both are kept."""

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


def keep(result: Mapping[str, Any], out: Path) -> None:
    """Prints a result and writes it to `out`, so that it is there also where a bar is missed."""
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")


__all__ = ["keep", "machine"]
