"""Folders and files are written atomically, and nothing outside of them is read or deleted."""

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from flexmoe.io import folders
from flexmoe.io.folders import (
    TEMPORARY_MARK,
    atomic_folder,
    check_apart,
    check_new_folder,
    file_inside,
    write_file,
)


def write(out: Path, text: str, overwrite: bool = False) -> None:
    with atomic_folder(out, overwrite) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def text_in(out: Path) -> str:
    return (out / "inner" / "file").read_text()


class TestAtomicFolder:
    def test_it_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        out = tmp_path / "new" / "out"
        with atomic_folder(out) as folder:
            assert folder.parent == out.parent
            assert not out.exists()
        assert out.is_dir()
        assert os.listdir(out.parent) == ["out"]

    def test_it_is_deleted_on_an_error(self, tmp_path: Path) -> None:
        def interrupted() -> None:
            with atomic_folder(tmp_path / "out") as folder:
                (folder / "half").touch()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert os.listdir(tmp_path) == []

    def test_an_existing_folder_needs_overwrite_and_survives_an_error(self, tmp_path: Path) -> None:
        write(tmp_path / "out", "old")
        with pytest.raises(FileExistsError, match="--overwrite"):
            write(tmp_path / "out", "new")
        with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out", overwrite=True):
            raise OSError("full")
        assert text_in(tmp_path / "out") == "old"
        write(tmp_path / "out", "new", overwrite=True)
        assert text_in(tmp_path / "out") == "new"
        assert os.listdir(tmp_path) == ["out"]

    def test_a_full_disk_is_reported_with_what_to_do(self, tmp_path: Path) -> None:
        message = r"No space left .* for .*/out, of which nothing is left\. Make room"
        with pytest.raises(OSError, match=message), atomic_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert os.listdir(tmp_path) == []

    def test_without_the_exchange_of_linux(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
        write(tmp_path / "out", "old")
        write(tmp_path / "out", "new", overwrite=True)
        assert text_in(tmp_path / "out") == "new"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
    def test_exchanging_two_folders_is_one_step(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        if not folders._exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this file system cannot exchange two names")
        assert os.listdir(tmp_path / "a") == ["b"]

    def test_a_folder_that_appears_meanwhile_is_kept(self, tmp_path: Path) -> None:
        def overtaken() -> None:
            with atomic_folder(tmp_path / "out"):
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "theirs").touch()

        with pytest.raises(FileExistsError, match="appeared"):
            overtaken()
        assert os.listdir(tmp_path / "out") == ["theirs"]

    def test_a_killed_run_leaves_the_old_folder_and_the_next_run_warns(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write(out, "old")
        script = (  # the file alone: importing the package would take seconds
            "import runpy, sys, time\natomic_folder = runpy.run_path(sys.argv[1])['atomic_folder']\n"
            "with atomic_folder(sys.argv[2], overwrite=True) as folder:\n"
            "    (folder / 'half').touch(); print('ready', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", script, folders.__file__, str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGKILL)
        assert text_in(out) == "old"
        (leftover,) = [name for name in os.listdir(tmp_path) if TEMPORARY_MARK in name]
        with pytest.warns(UserWarning, match=leftover):
            write(out, "new", overwrite=True)
        assert text_in(out) == "new"

    def test_no_warning_about_the_leftovers_of_another_folder(self, tmp_path: Path) -> None:
        (tmp_path / f".other{TEMPORARY_MARK}12345678").mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write(tmp_path / "out", "new")

    def test_a_link_to_a_folder_is_kept(self, tmp_path: Path) -> None:
        write(tmp_path / "real", "old")
        (tmp_path / "link").symlink_to("real")
        write(tmp_path / "link", "new", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert text_in(tmp_path / "real") == "new"


class TestWriteFile:
    def test_it_replaces_a_file_only_if_asked(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "file", b"old")
        with pytest.raises(FileExistsError, match="--overwrite"):
            write_file(path, b"new")
        assert path.read_bytes() == b"old"
        assert write_file(path, b"new", mode=0o600, overwrite=True).read_bytes() == b"new"
        assert path.stat().st_mode & 0o777 == 0o600
        assert os.listdir(tmp_path) == ["file"]

    def test_a_file_that_appears_meanwhile_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def overtaken(descriptor: int) -> None:
            (tmp_path / "file").write_bytes(b"theirs")

        monkeypatch.setattr(os, "fsync", overtaken)
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "file", b"ours")
        assert (tmp_path / "file").read_bytes() == b"theirs"
        assert os.listdir(tmp_path) == ["file"]

    def test_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(errno.EPERM, "not supported")

        monkeypatch.setattr(os, "link", unsupported)
        assert write_file(tmp_path / "file", b"ours").read_bytes() == b"ours"
        assert os.listdir(tmp_path) == ["file"]


class TestCheckNewFolder:
    def test_files_and_folders_with_the_working_directory_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="is a file"):
            check_new_folder(tmp_path / "file", overwrite=True)
        (tmp_path / "work" / "here").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "work" / "here")
        for out in (".", "..", "/"):
            with pytest.raises(ValueError, match="would delete"):
                check_new_folder(out, overwrite=True)
        monkeypatch.setenv("HOME", str(tmp_path / "work"))
        with pytest.raises(ValueError, match="would delete"):
            check_new_folder("~", overwrite=True)


class TestCheckApart:
    def test_inputs_inside_the_output_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "out"
        (target / "inner").mkdir(parents=True)
        (target / "inner" / "file").touch()
        (tmp_path / "link").symlink_to(target / "inner")
        monkeypatch.chdir(target)
        for read in (target, target / "inner" / "file", tmp_path / "link" / "file", "inner", "inner/../inner/file"):
            with pytest.raises(ValueError, match="which is read"):
                check_apart(target, tmp_path / "other", read)

    def test_inputs_beside_or_around_the_output_are_accepted(self, tmp_path: Path) -> None:
        check_apart(tmp_path / "out", tmp_path, tmp_path / "out2", tmp_path / "other" / "out")


class TestFileInside:
    @pytest.mark.parametrize("name", ["", ".", "..", "../file", "/etc/hosts", "a/b", "a\\b", "a\0b"])
    def test_only_plain_file_names_are_accepted(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="plain file name"):
            file_inside(tmp_path, name)

    def test_links_out_of_the_folder_are_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        (tmp_path / "outside").touch()
        (folder / "real").touch()
        (folder / "inside").symlink_to("real")
        (folder / "out").symlink_to("../outside")
        (folder / "chain").symlink_to("out")
        assert file_inside(folder, "inside") == folder / "inside"
        for name in ("out", "chain"):
            with pytest.raises(ValueError, match="leads out of the folder"):
                file_inside(folder, name)

    def test_links_in_the_hub_cache_stay_within_one_repository(self, tmp_path: Path) -> None:
        repo, other = tmp_path / "models--owner--name", tmp_path / "models--owner--other"
        snapshot = repo / "snapshots" / "abc"
        for folder in (snapshot, repo / "blobs", other / "blobs"):
            folder.mkdir(parents=True)
        (repo / "blobs" / "1").touch()
        (other / "blobs" / "2").touch()
        (snapshot / "mine").symlink_to("../../blobs/1")
        (snapshot / "theirs").symlink_to("../../../models--owner--other/blobs/2")
        assert file_inside(snapshot, "mine").is_file()
        with pytest.raises(ValueError, match="leads out"):
            file_inside(snapshot, "theirs")

    def test_missing_files_folders_and_pipes_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match="no file"):
            file_inside(tmp_path, "nothing")
        started = time.monotonic()
        for name in ("folder", "pipe"):
            with pytest.raises(ValueError, match="not a regular file"):
                file_inside(tmp_path, name)
        assert time.monotonic() - started < 1
