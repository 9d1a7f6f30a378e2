"""A Git LFS pointer where a file is expected is named as one, with the way to get the file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flexmoe.io.dense import DenseCheckpoint, load_causal_lm
from flexmoe.io.lfs import GitLfsPointerError, is_pointer, refuse_pointers
from flexmoe.io.strict_json import parse_json_object, read_json_object
from flexmoe.io.tensors import CheckpointFolder, TensorFile
from flexmoe.testing import tiny_anchor
from flexmoe.tokenization import read_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0f" * 32 + b"\nsize 123456\n"
NAMED = r"{} is a Git LFS pointer.*git lfs pull.*hf download"

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tensors": ("a.safetensors", lambda folder: TensorFile(folder / "a.safetensors")),
    "weights": ("model.safetensors", CheckpointFolder),
    "index": ("model.safetensors.index.json", CheckpointFolder),
    "json": ("manifest.json", lambda folder: read_json_object(folder / "manifest.json")),
    "config": ("config.json", DenseCheckpoint),
    "model": ("model-00001-of-00002.safetensors", load_causal_lm),
    "tokenizer": ("tokenizer.json", read_tokenizer),
    "vocabulary": ("tokenizer.model", read_tokenizer),
}


@pytest.mark.promise(
    "any reader of weights, JSON or a tokenizer",
    "a Git LFS pointer in place of the file",
    "refused with the file's name and how to get it",
)
@pytest.mark.parametrize("reader", READERS)
def test_a_pointer_is_named(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(GitLfsPointerError, match=NAMED.format(f".*{name}")):
        read(tmp_path)


def test_the_weights_of_an_anchor(tmp_path: Path) -> None:
    tiny_anchor("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(GitLfsPointerError, match=NAMED.format("model.safetensors")):
        DenseCheckpoint(tmp_path)


def test_other_files_are_not_pointers(tmp_path: Path) -> None:
    assert is_pointer(POINTER)
    assert not is_pointer(b"version 2 of the text")
    (tmp_path / "long.txt").write_bytes(POINTER + bytes(1024))
    (tmp_path / "short.txt").write_bytes(b"version")
    refuse_pointers([tmp_path / "long.txt", tmp_path / "short.txt", tmp_path / "absent.txt", tmp_path])
    with pytest.raises(ValueError, match=r"header: not valid JSON"):
        parse_json_object(b"version", "header")
