"""safetensors as streams: files are read back by FlexMoE and by the safetensors library; invalid files are refused."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flexmoe.io.strict_json import MAX_JSON_BYTES
from flexmoe.io.tensors import CHUNK_BYTES, CheckpointFolder, TensorFile, TensorInfo
from flexmoe.io.writer import TensorSource, source_from_file, source_from_part, source_from_tensor, write_checkpoint
from flexmoe.modeling.fingerprint_flexmoe import ALIGNMENT, TORCH_DTYPES, fingerprint

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)


def sources_of(tensors: dict[str, torch.Tensor]) -> list[TensorSource]:
    return [source_from_tensor(name, tensor) for name, tensor in tensors.items()]


def file_with(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


class TestRoundTrip:
    @pytest.mark.parametrize("code", TORCH_DTYPES)
    def test_every_dtype(self, code: str, tmp_path: Path) -> None:
        tensor = numbers(TORCH_DTYPES[code], 3, 5)
        write_checkpoint(tmp_path, sources_of({"x": tensor}))
        with CheckpointFolder(tmp_path) as read:
            assert read.infos == {"x": TensorInfo("x", code, (3, 5), 15 * tensor.element_size())}
            assert read.read("x").dtype == tensor.dtype
            assert raw_bytes(read.read("x")) == raw_bytes(tensor)
        with safe_open(tmp_path / "model.safetensors", "pt") as reference:
            assert raw_bytes(reference.get_tensor("x")) == raw_bytes(tensor)
            assert reference.metadata() == {"format": "pt"}

    def test_scalars_empty_and_strided_tensors(self, tmp_path: Path) -> None:
        tensors = {
            "scalar": torch.tensor(3.0),
            "empty": torch.zeros(0, 4),
            "strided": torch.arange(6.0).reshape(2, 3).T,
            "é/[x]": torch.ones(2),
        }
        written = write_checkpoint(tmp_path, sources_of(tensors), hash_tensors=tensors)
        loaded = load_file(tmp_path / "model.safetensors")
        with TensorFile(tmp_path / "model.safetensors") as read:
            for name, tensor in tensors.items():
                assert torch.equal(loaded[name], tensor)
                assert torch.equal(read.read(name), tensor)
                assert written.tensor_sha256[name] == hashlib.sha256(raw_bytes(tensor)).hexdigest()

    def test_files_of_the_safetensors_library_are_read(self, tmp_path: Path) -> None:
        tensors = {"b": numbers(torch.bfloat16, 3), "a": numbers(torch.float32, 2, 2), "c": numbers(torch.int64, 1)}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"key": "value"})
        with TensorFile(tmp_path / "model.safetensors") as read:
            assert read.metadata == {"key": "value"}
            assert {name: raw_bytes(read.read(name)) for name in read.infos} == {
                name: raw_bytes(tensor) for name, tensor in tensors.items()
            }

    def test_chunks_are_bounded_copies(self, tmp_path: Path) -> None:
        tensor = torch.arange(100, dtype=torch.uint8)
        write_checkpoint(tmp_path, sources_of({"x": tensor}))
        with TensorFile(tmp_path / "model.safetensors") as read:
            chunks = list(read.chunks("x", 30))
        assert [len(chunk) for chunk in chunks] == [30, 30, 30, 10]
        assert b"".join(chunks) == bytes(range(100))

    def test_a_part_of_a_tensor_has_its_bytes(self, tmp_path: Path) -> None:
        save_file({"x": torch.arange(100, dtype=torch.uint8)}, tmp_path / "model.safetensors")
        with CheckpointFolder(tmp_path) as folder:
            file = folder.file_of("x")
            assert b"".join(file.chunks("x", 30, start=15, stop=90)) == bytes(range(15, 90))
            for start, stop in ((-1, 5), (7, 6), (0, 101)):
                with pytest.raises(ValueError, match="has 100 bytes, not bytes"):
                    list(file.chunks("x", start=start, stop=stop))
            part = source_from_part(folder, "x", "third", (2, 10), 3)
            assert b"".join(part.chunks()) == bytes(range(60, 80))
            assert part.info == TensorInfo("third", "U8", (2, 10), 20)
            for index in (-1, 5):
                with pytest.raises(ValueError, match=rf"no part {index} of \[2, 10\]"):
                    source_from_part(folder, "x", "third", (2, 10), index)

    def test_a_tensor_copied_under_another_name(self, tmp_path: Path) -> None:
        tensor = torch.randn(CHUNK_BYTES // 4 + 7)
        write_checkpoint(tmp_path, sources_of({"old": tensor}))
        with CheckpointFolder(tmp_path) as read:
            (tmp_path / "out").mkdir()
            write_checkpoint(tmp_path / "out", [source_from_file(read, "old", "new")])
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["new"], tensor)


class TestWriting:
    TENSORS = {name: torch.full((4,), float(i)) for i, name in enumerate("dcba")}  # noqa: RUF012 - read only

    def test_order_is_kept_and_data_aligned(self, tmp_path: Path) -> None:
        tensors = {
            "odd": numbers(torch.uint8, 3),
            "wide": torch.ones(2),
            "half": torch.ones(5).half(),
            "last": torch.ones(1),
        }
        write_checkpoint(tmp_path, sources_of(tensors))
        with TensorFile(tmp_path / "model.safetensors") as read:
            assert list(read.infos) == ["wide", "last", "half", "odd"]
            position = len(read.header)
            for name, info in read.infos.items():
                assert position % tensors[name].element_size() == 0
                position += info.nbytes

    def test_shards_and_index(self, tmp_path: Path) -> None:
        written = write_checkpoint(tmp_path, sources_of(self.TENSORS), max_shard_size=32, hash_files=True)
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert list(written.files) == names
        for name in names:
            assert written.files[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 64}
        assert index["weight_map"] == {"a": names[1], "b": names[1], "c": names[0], "d": names[0]}
        with CheckpointFolder(tmp_path) as read:
            assert list(read.infos) == list("dcba")
            assert read.file_of("a").path.name == names[1]
            assert torch.equal(read.read("a"), self.TENSORS["a"])

    def test_a_tensor_larger_than_a_shard_gets_a_shard_of_its_own(self, tmp_path: Path) -> None:
        written = write_checkpoint(tmp_path, sources_of(self.TENSORS), stem="expert", max_shard_size=1)
        assert list(written.files) == [f"expert-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
        with CheckpointFolder(tmp_path, stem="expert") as read:
            assert set(read.infos) == set("abcd")

    @pytest.mark.parametrize("concurrent", [False, True])
    def test_tensors_are_aligned_in_a_mapped_file(self, tmp_path: Path, concurrent: bool) -> None:
        tensors = {"bias": torch.ones(1), "half": torch.ones(4, 32).bfloat16(), "wide": torch.ones(4, 32)}
        write_checkpoint(tmp_path, sources_of(tensors), concurrent=concurrent)
        read = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
        assert [read[name].data_ptr() % ALIGNMENT for name in ("half", "wide")] == [0, 0]

    def test_hashes_are_correct_and_only_computed_if_requested(self, tmp_path: Path) -> None:
        tensors = {"big": torch.randn(CHUNK_BYTES), "small": torch.ones(1)}
        for folder, hashed, files_too, concurrent in (
            ("a", ["big", "small"], False, False),
            ("b", [], True, False),
            ("c", ["big", "small"], True, False),
            ("d", ["small"], False, False),
            ("e", ["big", "small"], False, True),
            ("f", ["big"], False, True),
        ):
            (tmp_path / folder).mkdir()
            written = write_checkpoint(
                tmp_path / folder,
                sources_of(tensors),
                aligned=False,
                hash_tensors=hashed,
                hash_files=files_too,
                concurrent=concurrent,
            )
            assert (tmp_path / folder / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})
            digest = hashlib.sha256((tmp_path / folder / "model.safetensors").read_bytes()).hexdigest()
            assert written.files == {"model.safetensors": digest if files_too else None}
            digests = {name: hashlib.sha256(raw_bytes(tensors[name])).hexdigest() for name in hashed}
            assert written.tensor_sha256 == digests

    def test_progress_counts_bytes(self, tmp_path: Path) -> None:
        counted: list[int] = []
        write_checkpoint(tmp_path, sources_of({"x": torch.zeros(CHUNK_BYTES)}), progress=counted.append)
        assert sum(counted) == 4 * CHUNK_BYTES
        assert max(counted) == CHUNK_BYTES

    @pytest.mark.parametrize("concurrent", [False, True])
    @pytest.mark.parametrize("given", [b"1234567", b"123456789"])
    def test_a_source_with_another_number_of_bytes_is_refused(
        self, given: bytes, concurrent: bool, tmp_path: Path
    ) -> None:
        source = TensorSource(TensorInfo("x", "F32", (2,), 8), lambda: iter([given]))
        with pytest.raises(ValueError, match=r"x: its source yielded"):
            write_checkpoint(tmp_path, [source], concurrent=concurrent)

    @pytest.mark.parametrize("concurrent", [False, True])
    def test_an_error_of_a_source_is_raised(self, concurrent: bool, tmp_path: Path) -> None:
        def broken() -> Iterator[bytes]:
            yield bytes(4)
            raise OSError("disk gone")

        with pytest.raises(OSError, match="disk gone"):
            write_checkpoint(tmp_path, [TensorSource(TensorInfo("x", "F32", (2,), 8), broken)], concurrent=concurrent)

    def test_concurrent_writing_excludes_hashing_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be combined with hash_files=True"):
            write_checkpoint(tmp_path, sources_of({"x": torch.ones(1)}), hash_files=True, concurrent=True)

    def test_invalid_arguments_are_refused(self, tmp_path: Path) -> None:
        one = source_from_tensor("x", torch.ones(1))
        with pytest.raises(ValueError, match="no tensors"):
            write_checkpoint(tmp_path, [])
        with pytest.raises(ValueError, match="'x' is given twice"):
            write_checkpoint(tmp_path, [one, one])
        with pytest.raises(ValueError, match="does not match"):
            write_checkpoint(tmp_path, [TensorSource(TensorInfo("x", "F32", (2,), 9), one.chunks)])
        with pytest.raises(TypeError, match=r"cannot hold torch\.complex128"):
            source_from_tensor("x", torch.ones(1, dtype=torch.complex128))
        write_checkpoint(tmp_path, [one])
        with pytest.raises(FileExistsError):
            write_checkpoint(tmp_path, [one])


class TestInvalidHeaders:
    @pytest.mark.parametrize(
        ("header", "fault"),
        [
            ({"x": {**ENTRY, "data_offsets": [0, 16]}}, "outside the 8 bytes"),
            ({"x": {**ENTRY, "data_offsets": [8, 0]}}, "outside"),
            ({"x": {**ENTRY, "data_offsets": [-8, 0]}}, "two byte positions"),
            ({"x": {**ENTRY, "data_offsets": [0, 8.0]}}, "two byte positions"),
            ({"x": {**ENTRY, "data_offsets": [False, 8]}}, "two byte positions"),
            ({"x": {**ENTRY, "shape": [3]}}, "does not take 8 bytes"),
            ({"x": {**ENTRY, "shape": [-2]}}, "from 0 up"),
            ({"x": {**ENTRY, "shape": [1] * 65}}, "at most 64"),
            ({"x": {**ENTRY, "shape": [1 << 64, 0]}}, "from 0 up"),
            ({"x": {**ENTRY, "shape": [1 << 62] * 64}}, "does not take"),
            ({"x": {**ENTRY, "dtype": "F31"}}, "unknown dtype 'F31'"),
            ({"x": {**ENTRY, "dtype": ["F32"]}}, "unknown dtype"),
            ({"x": {**ENTRY, "extra": 1}}, "exactly dtype, shape and data_offsets"),
            ({"x": [1]}, "exactly dtype, shape and data_offsets"),
            ({"x": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, "overlap or leave a gap"),
            ({"x": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, "the file holds 8"),
            ({"x": ENTRY, "y": ENTRY}, "overlap or leave a gap"),
            ({"__metadata__": {"format": 1}, "x": ENTRY}, "map text to text"),
            ({"__metadata__": [], "x": ENTRY}, "map text to text"),
            (b'{"x": NaN}', "NaN is not a JSON number"),
            (b'{"x": 1e999}', "not valid JSON"),
            (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deep"),
            (b'{"x": 1, "x": 2}', "'x' is given twice"),
            (b'{"\\ud800": 1}', "not valid JSON"),
            (b'{"x": 1', "not valid JSON"),
            (b'{"\xff": 1}', "not valid JSON"),
            (b"[]", "does not start with"),
            (b"", "does not start with"),
        ],
    )
    def test_they_are_refused_with_the_error(self, header: Any, fault: str, tmp_path: Path) -> None:
        path = file_with(tmp_path / "model.safetensors", header)
        with pytest.raises(ValueError, match=fault) as caught:
            TensorFile(path)
        assert str(path) in str(caught.value)

    def test_wrong_sizes_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        for length in (1 << 63, 1000, (1 << 64) - 1):
            with pytest.raises(ValueError, match="ends before its header"):
                TensorFile(file_with(path, {"x": ENTRY}, length=length))
        path.write_bytes(b"1234567")
        with pytest.raises(ValueError, match="cut off"):
            TensorFile(path)
        with path.open("wb") as file:  # sparse: takes no space on the disk
            file.write(struct.pack("<Q", MAX_JSON_BYTES + 1))
            file.truncate(MAX_JSON_BYTES + 100)
        with pytest.raises(ValueError, match="at most"):
            TensorFile(path)

    def test_a_file_truncated_after_opening_is_refused(self, tmp_path: Path) -> None:
        path = file_with(tmp_path / "model.safetensors", {"x": ENTRY})
        with TensorFile(path) as read:
            os.truncate(path, path.stat().st_size - 4)
            with pytest.raises(ValueError, match="became shorter"):
                read.read("x")

    def test_a_pipe_is_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="not a regular file"):
            TensorFile(tmp_path / "model.safetensors")

    def test_unknown_tensor(self, tmp_path: Path) -> None:
        with (
            TensorFile(file_with(tmp_path / "model.safetensors", {"x": ENTRY})) as read,
            pytest.raises(KeyError, match="it has x"),
        ):
            read.read("y")


class TestFolders:
    def shards(self, folder: Path) -> dict[str, Any]:
        write_checkpoint(folder, sources_of({"a": torch.ones(2), "b": torch.ones(2)}), max_shard_size=8)
        return json.loads((folder / "model.safetensors.index.json").read_text())

    @pytest.mark.parametrize(
        ("change", "error", "fault"),
        [
            (lambda m: m.update(b=m["a"]), ValueError, "'b' in model-00001"),
            (lambda m: m.update(c=m["a"]), ValueError, "puts 'c' in model-00001.* but no file has it"),
            (lambda m: m.update(b="model-00003-of-00003.safetensors"), FileNotFoundError, "not there"),
            (lambda m: m.update(b="../model.safetensors"), ValueError, "same folder"),
            (lambda m: m.update(b="/etc/x.safetensors"), ValueError, "same folder"),
            (lambda m: m.update(b="pytorch_model.bin"), ValueError, "same folder"),
            (lambda m: m.update(b=3), ValueError, "same folder"),
            (lambda m: m.clear(), ValueError, "no weight_map"),
        ],
    )
    def test_an_index_that_does_not_match_is_refused(
        self, change: Callable[[dict[str, Any]], None], error: type[Exception], fault: str, tmp_path: Path
    ) -> None:
        index = self.shards(tmp_path)
        change(index["weight_map"])
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(error, match=fault):
            CheckpointFolder(tmp_path)

    def test_a_tensor_in_two_shards(self, tmp_path: Path) -> None:
        self.shards(tmp_path)
        data = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="'a' is in two files"):
            CheckpointFolder(tmp_path)

    def test_folders_without_safetensors_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no folder"):
            CheckpointFolder(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
            CheckpointFolder(tmp_path)
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(FileNotFoundError, match="save_pretrained"):
            CheckpointFolder(tmp_path)


def test_fingerprint_is_the_hash_of_sorted_lines() -> None:
    lines = [("b", "BF16", (128, 512), "01"), ("a", "F32", (), "02")]
    expected = hashlib.sha256(b"a F32 [] 02\nb BF16 [128,512] 01").hexdigest()
    assert fingerprint(lines) == fingerprint(reversed(lines)) == expected
