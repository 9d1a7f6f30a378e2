"""Folders and files: written atomically, and read without following links out of a folder.

Does not cover what is in them (`flexmoe.io.tensors`, `flexmoe.packages`), or locks between two runs that write to one
folder.
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
    """The absolute path to write to, with links resolved; nothing is created.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        NotADirectoryError: `out` is a file.
        ValueError: replacing `out` would delete the working directory, the home folder or a parent of them.
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
    for precious in (Path.cwd(), *_home()):
        if precious.resolve().is_relative_to(target):
            raise ValueError(f"Overwriting {target} would delete {precious}. Choose another output folder.")
    return target


def check_apart(target: Path, *read: str | Path) -> None:
    """Checks that replacing the folder `target` deletes none of the files and folders `read`.

    Raises:
        ValueError: it would.
    """
    for path in read:
        real = Path(os.path.realpath(Path(path).expanduser()))
        if real.is_relative_to(target):
            raise ValueError(f"The output {target} is, or holds, {real}, which is read. Choose another output folder.")


@contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False, *, durable: bool = True) -> Iterator[Path]:
    """Yields an empty temporary folder that is renamed to `out` if the block succeeds and deleted if it fails.

    The files are flushed to disk before the rename, and an existing folder is exchanged for the new one in a single
    step where the system supports it (Linux). A kill at any moment leaves the old folder or the new one, and perhaps a
    temporary folder, which the next run names in a warning.

    Args:
        durable: wait until the files are on the disk. Without it, a power failure (not a kill) soon afterwards may
            leave truncated files, which do not load: suitable for output that can be produced again.

    Raises:
        FileExistsError, NotADirectoryError, ValueError: see `check_new_folder`, before the block runs.
        OSError: the disk is full or a quota is exceeded; names the folder.
    """
    target = check_new_folder(out, overwrite)
    temporary = _new_temporary_folder(target)
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


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yields an empty folder next to `beside`, on the same disk, that is deleted at the end.

    A kill leaves it; the next run for `beside` names it in a warning.

    Raises:
        OSError: the disk is full or a quota is exceeded; names the folder.
    """
    folder = _new_temporary_folder(beside.with_name(f"{beside.name}.scratch"))
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise _disk_is_full(beside, error.errno) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def file_inside(folder: str | Path, name: str) -> Path:
    """The path of the regular file `name` in `folder`.

    Links are followed only if they end in the same folder or, where `folder` is a snapshot in the Hugging Face cache,
    among the blobs of the same repository.

    Raises:
        ValueError: `name` is not a plain file name, a link leads out of the folder, or it is not a regular file.
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
    """The bytes of a regular file.

    Raises:
        ValueError: it has more than `max_bytes`, or is a pipe or a device (which would block).
    """
    descriptor = open_regular_file(path)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: larger than the {max_bytes:,} bytes allowed for this file.")
    return data


def open_regular_file(path: str | Path) -> int:
    """A read-only file descriptor of a regular file; the caller closes it."""
    # O_NONBLOCK: opening a pipe would otherwise wait for a writer forever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file.")
    return descriptor


def write_file(path: Path, data: bytes, *, mode: int = 0o666, overwrite: bool = False) -> Path:
    """Writes a file beside `path` and renames it, so that a kill leaves the old file or the new one. Returns `path`.

    Args:
        mode: permissions of the new file, less the umask; never wider while it is written.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    check_new_file(path, overwrite)
    temporary = _temporary_path(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite or not _link_new(temporary, path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_new_file(path: Path, overwrite: bool = False) -> None:
    """Checks that a file may be written.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another place, or pass --overwrite (overwrite=True).")


def _link_new(temporary: Path, path: Path) -> bool:
    """Names the file without replacing another; False if the file system has no hard links (USB sticks)."""
    check_new_file(path)
    try:
        os.link(temporary, path)  # unlike a rename, it fails if a file has appeared there
    except OSError:
        check_new_file(path)
        return False
    return True


def _home() -> list[Path]:
    """The home folder; none in a container whose user has no entry in the system and no HOME."""
    try:
        return [Path.home()]
    except RuntimeError:
        return []


def _allowed_roots(folder: Path) -> list[Path]:
    real = Path(os.path.realpath(folder))
    roots = [real]
    for ancestor in (real, *real.parents):
        # <cache>/models--owner--name/{snapshots/<revision>/..., blobs/...}: the layout of huggingface_hub
        if ancestor.parent.name == "snapshots" and ancestor.parent.parent.name.startswith("models--"):
            roots.append(ancestor.parent.parent / "blobs")
    return roots


def _disk_is_full(target: Path, code: int) -> OSError:
    """The system's error, with the folder and what to do, which it lacks when a write fails."""
    return OSError(
        code,
        f"{os.strerror(code)} for {target}, of which nothing is left. Make room (a folder that is overwritten stays "
        "until the new one is complete), or choose another output folder.",
    )


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")


def _new_temporary_folder(target: Path) -> Path:
    """Makes an empty folder next to `target`; warns of those that killed runs have left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _warn_about_leftovers(target)
    folder = _temporary_path(target)
    folder.mkdir()
    return folder


def _warn_about_leftovers(target: Path) -> None:
    start = f".{target.name}{TEMPORARY_MARK}"
    leftovers = sorted(entry.name for entry in os.scandir(target.parent) if entry.name.startswith(start))
    if leftovers:
        paths = ", ".join(str(target.parent / name) for name in leftovers)
        warnings.warn(
            f"Left by a run that was interrupted or is still running: {paths}. Delete if not needed.", stacklevel=5
        )


def _put_in_place(temporary: Path, target: Path, overwrite: bool) -> None:
    """Renames `temporary` to `target`; a folder there is exchanged for it, then deleted."""
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
    """Swaps two names in one step by renameat2(2); False if the system or the file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or the C library lacks it
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
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
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
    "check_new_file",
    "check_new_folder",
    "file_inside",
    "open_regular_file",
    "read_regular_file",
    "scratch_folder",
    "write_file",
]
