"""Git LFS pointers: small texts that stand where a clone without Git LFS should have the file itself.

Does not cover fetching the files, or pointers among training texts (`flexmoe.data`).

Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from collections.abc import Iterable
from pathlib import Path

POINTER_START = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # of the specification


class GitLfsPointerError(ValueError):
    """A file is a Git LFS pointer; the message names it and says how to get the file."""


def is_pointer(data: bytes) -> bool:
    """Whether `data`, a file or its beginning, is a Git LFS pointer."""
    return data.startswith(POINTER_START)


def refuse_pointer(data: bytes, where: object) -> None:
    """Raises GitLfsPointerError if `data`, the file `where` or its beginning, is a pointer."""
    if is_pointer(data):
        raise GitLfsPointerError(
            f"{where} is a Git LFS pointer, a text of three lines in place of the file: the repository was cloned or "
            "copied without its large files. Fetch them with `git lfs pull` in the clone, or download the repository "
            "with `hf download`."
        )


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raises GitLfsPointerError for the first of these files that is a pointer; what is not a file is skipped."""
    for path in files:
        if path.is_file() and path.stat().st_size <= MAX_POINTER_BYTES:
            refuse_pointer(path.read_bytes(), path)


__all__ = ["GitLfsPointerError", "is_pointer", "refuse_pointer", "refuse_pointers"]
