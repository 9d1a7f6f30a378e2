"""Another checkout of this repository to compare with: its package for PYTHONPATH, and its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path


def link_checkout(checkout: Path, site: Path) -> Path:
    """Makes `site`, a folder for PYTHONPATH with the package as it is in `checkout`, and returns it."""
    packages = {path.name: path for path in (checkout / "src" / "flexmoe").iterdir()}
    packages |= {name: checkout / name for name in ("modeling", "conversion", "model_cards")}
    (site / "flexmoe").mkdir(parents=True)
    for name, path in packages.items():
        (site / "flexmoe" / name).symlink_to(path)
    return site


def commit_of(checkout: Path) -> str:
    """The commit that is checked out."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()


__all__ = ["commit_of", "link_checkout"]
