"""Folders appear whole or not at all, and nothing outside is read or deleted."""

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from flexmoe.modeling import folders_flexmoe
from flexmoe.modeling.folders_flexmoe import (
    TEMPORARY_MARK,
    atomic_folder,
    check_apart,
    check_new_folder,
    file_inside,
)


def write(out: Path, text: str, overwrite: bool = False) -> None:
    with atomic_folder(out, overwrite) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def text_in(out: Path) -> str:
    return (out / "inner" / "file").read_text()


class TestAtomicFolder:
    def test_appears_at_the_end(self, tmp_path: Path) -> None:
        out = tmp_path / "new" / "out"
        with atomic_folder(out) as folder:
            assert folder.parent == out.parent
            assert not out.exists()
        assert out.is_dir()
        assert os.listdir(out.parent) == ["out"]

    def test_vanishes_on_error(self, tmp_path: Path) -> None:
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

    def test_a_full_disk_is_named_with_the_way_out(self, tmp_path: Path) -> None:
        message = r"No space left .* for .*/out, of which nothing is left\. Make room"
        with pytest.raises(OSError, match=message), atomic_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert os.listdir(tmp_path) == []

    def test_without_the_exchange_of_linux(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folders_flexmoe, "_exchange", lambda one, other: False)
        write(tmp_path / "out", "old")
        write(tmp_path / "out", "new", overwrite=True)
        assert text_in(tmp_path / "out") == "new"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
    def test_the_exchange_is_one_step_here(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        if not folders_flexmoe._exchange(tmp_path / "a", tmp_path / "b"):
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

    def test_a_killed_run_leaves_the_old_folder_and_is_named_by_the_next(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write(out, "old")
        script = (  # the file alone: importing the package would take seconds
            "import runpy, sys, time\natomic_folder = runpy.run_path(sys.argv[1])['atomic_folder']\n"
            "with atomic_folder(sys.argv[2], overwrite=True) as folder:\n"
            "    (folder / 'half').touch(); print('ready', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", script, folders_flexmoe.__file__, str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGKILL)
        assert text_in(out) == "old"
        (stray,) = [name for name in os.listdir(tmp_path) if TEMPORARY_MARK in name]
        with pytest.warns(UserWarning, match=stray):
            write(out, "new", overwrite=True)
        assert text_in(out) == "new"

    def test_no_warning_about_a_neighbour(self, tmp_path: Path) -> None:
        (tmp_path / f".other{TEMPORARY_MARK}12345678").mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write(tmp_path / "out", "new")

    def test_a_link_is_followed_not_replaced(self, tmp_path: Path) -> None:
        write(tmp_path / "real", "old")
        (tmp_path / "link").symlink_to("real")
        write(tmp_path / "link", "new", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert text_in(tmp_path / "real") == "new"


class TestCheckNewFolder:
    def test_refuses_files_and_precious_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    def test_refuses_what_would_be_deleted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "out"
        (target / "inner").mkdir(parents=True)
        (target / "inner" / "file").touch()
        (tmp_path / "link").symlink_to(target / "inner")
        monkeypatch.chdir(target)
        for read in (target, target / "inner" / "file", tmp_path / "link" / "file", "inner", "inner/../inner/file"):
            with pytest.raises(ValueError, match="which is read"):
                check_apart(target, tmp_path / "other", read)

    def test_neighbours_and_folders_around_it_may_be_read(self, tmp_path: Path) -> None:
        check_apart(tmp_path / "out", tmp_path, tmp_path / "out2", tmp_path / "other" / "out")


class TestFileInside:
    @pytest.mark.parametrize("name", ["", ".", "..", "../file", "/etc/hosts", "a/b", "a\\b", "a\0b"])
    def test_only_plain_names(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="plain file name"):
            file_inside(tmp_path, name)

    def test_links(self, tmp_path: Path) -> None:
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

    def test_the_cache_of_the_hub(self, tmp_path: Path) -> None:
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

    def test_missing_and_irregular(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match="no file"):
            file_inside(tmp_path, "nothing")
        started = time.monotonic()
        for name in ("folder", "pipe"):
            with pytest.raises(ValueError, match="not a regular file"):
                file_inside(tmp_path, name)
        assert time.monotonic() - started < 1
