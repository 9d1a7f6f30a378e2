"""Folders: written whole or not at all, and read without being led outside.

Not here: what is in them (`tensors_flexmoe`, `packages_flexmoe`), nor locks between two runs that write one folder.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_MARK = ".flexmoe-"  # a folder NAME is written as .NAME.flexmoe-<8 hex digits> beside it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_new_folder(out: str | Path, overwrite: bool = False) -> Path:
    """The absolute path to write to, or an error; links in it are followed, nothing is created.

    Raises:
        FileExistsError: `out` is there and `overwrite` is False.
        NotADirectoryError: `out` is a file.
        ValueError: replacing `out` would delete the working directory, the home folder or one that holds them.
    """
    target = Path(os.path.realpath(Path(out).expanduser()))
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a folder. Choose another output folder.")
    if not overwrite:
        raise FileExistsError(
            f"{target} exists already. Choose another output folder, or pass --overwrite (overwrite=True)."
        )
    for precious in (Path.cwd(), Path.home()):
        if precious.resolve().is_relative_to(target):
            raise ValueError(f"Overwriting {target} would delete {precious}. Choose another output folder.")
    return target


def check_apart(target: Path, *read: str | Path) -> None:
    """Raises ValueError if replacing the folder `target` would delete one of the files and folders that are `read`."""
    for path in read:
        real = Path(os.path.realpath(Path(path).expanduser()))
        if real.is_relative_to(target):
            raise ValueError(f"The output {target} is, or holds, {real}, which is read. Choose another output folder.")


@contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False, *, durable: bool = True) -> Iterator[Path]:
    """Yields an empty folder beside `out` that becomes `out` when the block ends well and vanishes when it fails.

    The files are on disk before the name changes, and an old folder is exchanged for the new one in a single step
    where the system has one (Linux), so a kill at any moment leaves the old folder, the new one, or the old one and
    a stray temporary folder, which the next run names in a warning.

    Args:
        durable: wait until the disk has the files. Without it a power cut (not a kill) soon afterwards may leave files
            cut short, which do not load: right for what can be made again from inputs that are still there.

    Raises:
        FileExistsError, NotADirectoryError, ValueError: see `check_new_folder`, before the block runs.
        OSError: the disk is full, or a quota is used up; says where.
    """
    target = check_new_folder(out, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _warn_of_strays(target)
    temporary = _temporary_path(target)
    temporary.mkdir()
    try:
        yield temporary
        if durable:
            _flush_to_disk(temporary)
        _put_in_place(temporary, target, overwrite)
        if durable:
            _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_is_full(target, error.errno) from error
        raise


def file_inside(folder: str | Path, name: str) -> Path:
    """The path of the regular file `name` in `folder`, if it truly lies there.

    Links are followed only where they end in the same folder, or where `folder` is a snapshot in the Hugging Face
    cache and they end among the blobs of the same repository.

    Raises:
        ValueError: `name` is not a plain file name, or a link leads out of the folder, or it is no regular file.
        FileNotFoundError: there is no such file.
    """
    folder = Path(folder)
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{folder}: {name!r} is not a plain file name; files must lie in the folder itself.")
    path = folder / name
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} has no file {name}.")
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in _allowed_roots(folder)):
        raise ValueError(f"{path} is a link that leads out of the folder, to {real}. Copy the file into the folder.")
    if not real.is_file():
        raise ValueError(f"{path} is not a regular file.")
    return path


def read_regular_file(path: str | Path, *, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `max_bytes`; a pipe or device is a ValueError, never a hang."""
    descriptor = open_regular_file(path)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: larger than the {max_bytes:,} bytes allowed for this file.")
    return data


def open_regular_file(path: str | Path) -> int:
    """A read-only file descriptor of a regular file, which the caller closes."""
    # O_NONBLOCK: opening a pipe that stands in for a file would otherwise wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file.")
    return descriptor


def _allowed_roots(folder: Path) -> list[Path]:
    real = Path(os.path.realpath(folder))
    roots = [real]
    for ancestor in (real, *real.parents):
        # <cache>/models--owner--name/{snapshots/<revision>/..., blobs/...}: the layout of huggingface_hub
        if ancestor.parent.name == "snapshots" and ancestor.parent.parent.name.startswith("models--"):
            roots.append(ancestor.parent.parent / "blobs")
    return roots


def _disk_is_full(target: Path, code: int) -> OSError:
    """What the system says when a write fails names neither the file nor the way out."""
    return OSError(
        code,
        f"{os.strerror(code)} for {target}, of which nothing is left. Make room (a folder that is overwritten stays "
        "until the new one is whole), or choose another output folder.",
    )


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")


def _warn_of_strays(target: Path) -> None:
    start = f".{target.name}{TEMPORARY_MARK}"
    strays = sorted(entry.name for entry in os.scandir(target.parent) if entry.name.startswith(start))
    if strays:
        paths = ", ".join(str(target.parent / name) for name in strays)
        warnings.warn(
            f"Left by a run that was interrupted, or still runs: {paths}. Delete if not needed.", stacklevel=4
        )


def _put_in_place(temporary: Path, target: Path, overwrite: bool) -> None:
    """Renames `temporary` to `target`, exchanging it for the folder that is there; the old one is then deleted."""
    if not os.path.lexists(target):
        os.rename(temporary, target)
    elif not overwrite:
        raise FileExistsError(f"{target} appeared while it was being written. Nothing was replaced.")
    elif _exchange(temporary, target):
        shutil.rmtree(temporary)
    else:
        old = _temporary_path(target)
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step by renameat2(2); False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _flush_to_disk(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "TEMPORARY_MARK",
    "atomic_folder",
    "check_apart",
    "check_new_folder",
    "file_inside",
    "open_regular_file",
    "read_regular_file",
]
