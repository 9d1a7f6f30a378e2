"""Folders and Hub repositories, the latter through the real client against a fake Hub on the loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexmoe.hub.client import resolve_folder
from tests.support.hub import HubServer, point_client_at

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "modeling_other.py": b"code",
    "consolidated.safetensors": b"weights again",
    "original/params.json": b"{}",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        point_client_at(server.url, monkeypatch)
        yield server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, body in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_itself(tmp_path: Path) -> None:
    resolved = resolve_folder(tmp_path)
    assert (resolved.path, resolved.repo, resolved.revision) == (tmp_path, None, None)
    assert resolve_folder(str(tmp_path)).path == tmp_path


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only Hub repositories have revisions"):
        resolve_folder(tmp_path, revision="main")


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "~/no-such-folder", "a/b/c", "no folder", "-x"])
def test_invalid_hub_ids_are_not_requested(
    source: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        resolve_folder(source)
    with pytest.raises(FileNotFoundError, match="no folder"):
        resolve_folder(Path("owner/name"))
    assert hub.requests == []


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is a file"):
        resolve_folder(tmp_path / "model.safetensors")


def test_weights_and_tokenizer_are_downloaded_but_no_pickle_code_or_second_copy(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    commit = hub.push_folder("lab/anchor", source)
    resolved = resolve_folder("lab/anchor", cache_dir=tmp_path / "cache")
    assert (resolved.repo, resolved.revision) == ("lab/anchor", commit)
    assert names(resolved.path) == WANTED
    assert (resolved.path / "model.safetensors").read_bytes() == b"weights"
    assert not [r for r in hub.requests if r.endswith((".bin", ".py"))]


def test_patterns_cannot_include_pickles_or_code(hub: HubServer, source: Path, tmp_path: Path) -> None:
    hub.push_folder("lab/anchor", source)
    resolved = resolve_folder("lab/anchor", cache_dir=tmp_path / "cache", allow_patterns=["*"])
    assert names(resolved.path) == WANTED | {"consolidated.safetensors"}


def test_revisions(hub: HubServer, source: Path, tmp_path: Path) -> None:
    first = hub.push_folder("lab/anchor", source)
    (source / "model.safetensors").write_bytes(b"newer")
    second = hub.push_folder("lab/anchor", source)
    cache = tmp_path / "cache"
    assert resolve_folder("lab/anchor", cache_dir=cache).revision == second != first
    old = resolve_folder("lab/anchor", revision=first, cache_dir=cache)
    assert old.revision == first
    assert (old.path / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
        resolve_folder("lab/anchor", revision="v9", cache_dir=cache)


def test_an_unknown_repository(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a Hub repository"):
        resolve_folder("lab/nothing", cache_dir=tmp_path)


def test_a_gated_repository_needs_a_token_with_access(hub: HubServer, source: Path, tmp_path: Path) -> None:
    hub.push_folder("lab/closed", source, gated=True)
    hub.repositories["lab/closed"].tokens.add("let-me-in")
    with pytest.raises(PermissionError, match="gated: ask for access"):
        resolve_folder("lab/closed", cache_dir=tmp_path / "cache")
    resolved = resolve_folder("lab/closed", cache_dir=tmp_path / "cache", token="let-me-in")
    assert names(resolved.path) == WANTED


def test_offline_mode_uses_the_cache(hub: HubServer, source: Path, tmp_path: Path) -> None:
    commit = hub.push_folder("lab/anchor", source)
    with pytest.raises(FileNotFoundError, match="local cache"):
        resolve_folder("lab/anchor", cache_dir=tmp_path / "cache", local_files_only=True)
    resolve_folder("lab/anchor", cache_dir=tmp_path / "cache")
    requests = len(hub.requests)
    resolved = resolve_folder("lab/anchor", cache_dir=tmp_path / "cache", local_files_only=True)
    assert resolved.revision == commit
    assert len(hub.requests) == requests


def test_a_folder_of_the_same_name_is_not_the_repository(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push_folder("lab/anchor", source)
    (tmp_path / "lab" / "anchor").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("lab/anchor").repo is None
    assert resolve_folder("lab/anchor", is_repo=True, cache_dir=tmp_path / "cache").repo == "lab/anchor"
    with pytest.raises(FileNotFoundError, match="is not the id of a Hub repository"):
        resolve_folder(str(tmp_path), is_repo=True)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at("http://127.0.0.1:9", monkeypatch)  # the discard port: nothing listens
    with pytest.raises(ConnectionError, match="cannot be reached"):  # not a withdrawal
        resolve_folder("lab/anchor", cache_dir=tmp_path)


@pytest.mark.soak  # the process of `tests/flexmoe/test_story.py` finds the Hub in the same way
def test_hf_endpoint_is_honoured_in_a_fresh_process(hub: HubServer, source: Path, tmp_path: Path) -> None:
    commit = hub.push_folder("lab/anchor", source)
    code = "import flexmoe.hub.client as hub; print(hub.resolve_folder('lab/anchor').revision)"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == commit
