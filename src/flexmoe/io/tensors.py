"""safetensors files as streams: tensors are read chunk by chunk, never a complete file into memory.

Files are untrusted: the header is validated completely before any data is read. Bytes are copied with `pread` rather
than mapped, because a mapped file can change after its check. Little-endian machines only, as the format itself.

Does not cover writing (`flexmoe.io.writer`), the meaning of tensors in a model, or sub-byte dtypes (F4, F6).

Source: https://github.com/huggingface/safetensors#format
"""

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexmoe.io.folders import open_regular_file
from flexmoe.io.lfs import MAX_POINTER_BYTES, refuse_pointer
from flexmoe.io.strict_json import MAX_JSON_BYTES, parse_json_object, read_json_object
from flexmoe.modeling.fingerprint_flexmoe import DTYPE_CODES, TORCH_DTYPES, tensor_bytes

Chunk = bytes | bytearray | memoryview

FILL_BYTES = 1 << 20
HUGE_PAGE_BYTES = 2 << 20
CHUNK_BYTES = 256 << 10  # stays in the processor's cache between reading, hashing and writing
MAX_DIMENSIONS = 64  # torch's own limit

NOT_RANDOM = "Stop if it reports tensors as MISSING: it fills these with random values."
"""What to heed when transformers loads a checkpoint whose names are not known to be right."""


@dataclass(frozen=True)
class TensorInfo:
    """The entry of one tensor in a safetensors header; `dtype` is the format's code, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class TensorFile:
    """An open safetensors file with a validated header; closed by `close()`, by `with`, or when it is collected.

    Attributes:
        infos: tensors by name, in the order of their bytes in the file.
        metadata: the `__metadata__` of the header.
        header: the bytes before the first tensor with the length prefix; they are part of the file's hash.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header is invalid or does not match the file; names the file and the fault.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._descriptor = -1  # for __del__, if opening fails
        self._descriptor = open_regular_file(path)
        try:
            self.header = self._read_header(os.fstat(self._descriptor).st_size)
            entries = parse_json_object(self.header[8:], f"{path}: header")
            self.metadata = _check_metadata(entries.pop("__metadata__", {}), path)
            data_bytes = os.fstat(self._descriptor).st_size - len(self.header)
            self.infos, self._begins = _check_entries(entries, data_bytes, path)
        except BaseException:
            self.close()
            raise

    def chunks(
        self, name: str, size: int = CHUNK_BYTES, *, start: int = 0, stop: int | None = None
    ) -> Iterator[memoryview]:
        """Yields copies of the tensor's bytes from `start` to `stop` (by default all), at most `size` at a time.

        Raises:
            KeyError: no such tensor.
            ValueError: the range exceeds the tensor, or the file has become shorter.
        """
        info = self.info(name)
        stop = info.nbytes if stop is None else stop
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"{self.path}: {name!r} has {info.nbytes:,} bytes, not bytes {start:,} to {stop:,}.")
        position, end = self._begins[name] + start, self._begins[name] + stop
        while position < end:
            chunk = os.pread(self._descriptor, min(size, end - position), len(self.header) + position)
            if not chunk:
                raise ValueError(f"{self.path}: the file became shorter while {name!r} was read.")
            position += len(chunk)
            yield memoryview(chunk)

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor `name` on the CPU. KeyError: no such tensor."""
        tensor = empty_tensor(self.info(name))
        for _ in self.fill(name, tensor):
            pass
        return tensor

    def fill(self, name: str, tensor: torch.Tensor, size: int = FILL_BYTES) -> Iterator[memoryview]:
        """Reads the tensor's bytes directly into `tensor`; yields each part of `size` bytes once it is read.

        Args:
            tensor: of the dtype and shape of `info`, contiguous, on the CPU.

        Raises:
            KeyError: no such tensor.
            ValueError: the file has become shorter.
        """
        buffer, start = tensor_bytes(tensor), len(self.header) + self._begins[self.info(name).name]
        for begin in range(0, len(buffer), size):
            part = buffer[begin : begin + size]
            filled = 0
            while filled < len(part):
                count = os.preadv(self._descriptor, [part[filled:]], start + begin + filled)
                if not count:
                    raise ValueError(f"{self.path}: the file became shorter while {name!r} was read.")
                filled += count
            yield part

    def close(self) -> None:
        """Closes the file; reading it afterwards raises an OSError."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def info(self, name: str) -> TensorInfo:
        """The header entry of the tensor. KeyError: no such tensor."""
        if name not in self.infos:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {listed(self.infos)}.")
        return self.infos[name]

    def _read_header(self, file_bytes: int) -> bytes:
        refuse_pointer(os.pread(self._descriptor, MAX_POINTER_BYTES, 0), self.path)
        prefix = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > file_bytes - 8:
            raise ValueError(f"{self.path}: not a safetensors file, or cut off: it ends before its header does.")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"{self.path}: a header of {length:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
        text = os.pread(self._descriptor, length, 8)
        if not text.startswith(b"{"):
            raise ValueError(f"{self.path}: not a safetensors file: its header does not start with '{{'.")
        return prefix + text


class CheckpointFolder:
    """The weights of a checkpoint folder: `<stem>.safetensors`, or shards and `<stem>.safetensors.index.json`.

    Attributes:
        infos: all tensors by name, shard by shard, in the order of their bytes.
        files: weight files by name.

    Raises:
        FileNotFoundError: no such folder, no safetensors in it (says how to convert), or a shard is missing.
        ValueError: a header is invalid, or the index and the shards disagree.
    """

    def __init__(self, folder: str | Path, stem: str = "model"):
        self.folder = Path(folder)
        index = self.folder / f"{stem}.safetensors.index.json"
        single = self.folder / f"{stem}.safetensors"
        weight_map: Mapping[str, str] | None = None
        if single.exists() or not index.exists():
            names = [single.name]
        else:
            weight_map = _read_weight_map(index)
            names = sorted(set(weight_map.values()))
        _check_present(self.folder, names, stem)
        self.files = {name: TensorFile(self.folder / name) for name in names}
        self._file_of = _index_tensors(self.files)
        self.infos = {name: file.infos[name] for name, file in self._file_of.items()}
        if weight_map is not None:
            _check_index(index, weight_map, self._file_of)

    def file_of(self, name: str) -> TensorFile:
        """The file that holds the tensor. KeyError: no such tensor."""
        if name not in self._file_of:
            raise KeyError(f"{self.folder} has no tensor {name!r}; it has {listed(self.infos)}.")
        return self._file_of[name]

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yields the tensor's bytes in order, at most `size` at a time. KeyError: no such tensor."""
        return self.file_of(name).chunks(name, size)

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor on the CPU. KeyError: no such tensor."""
        return self.file_of(name).read(name)

    def close(self) -> None:
        """Closes all files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensor_info(name: str, tensor: torch.Tensor) -> TensorInfo:
    """The header entry for a tensor, which may be on the meta device. TypeError: safetensors has no such dtype."""
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: safetensors files cannot hold {tensor.dtype}; they hold {', '.join(TORCH_DTYPES)}.")
    return TensorInfo(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


def empty_tensor(info: TensorInfo) -> torch.Tensor:
    """An uninitialised CPU tensor of this dtype and shape.

    A large one is a mapping of its own with huge pages, where the system supports them: filling it takes half the
    time, and releasing it a tenth.
    """
    dtype = TORCH_DTYPES[info.dtype]
    if info.nbytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(info.shape, dtype=dtype)
    memory = mmap.mmap(-1, info.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(info.shape)


def expected_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The size in bytes of a tensor of this dtype code and shape."""
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


def _check_entries(
    entries: dict[str, Any], data_bytes: int, path: str | Path
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Tensors and their first bytes, in file order; checks that they cover the data without overlap or gap."""
    found = sorted(
        (_check_entry(name, entry, data_bytes, path) for name, entry in entries.items()),
        key=lambda item: (item[1], item[1] + item[0].nbytes),
    )
    position = 0
    for info, begin in found:
        if begin != position:
            raise ValueError(
                f"{path}: {info.name!r} begins at byte {begin:,} of the data where {position:,} is due: "
                "tensors overlap or leave a gap."
            )
        position += info.nbytes
    if position != data_bytes:
        raise ValueError(f"{path}: the header describes {position:,} bytes of data, the file holds {data_bytes:,}.")
    return {info.name: info for info, _ in found}, {info.name: begin for info, begin in found}


def _check_entry(name: str, entry: Any, data_bytes: int, path: str | Path) -> tuple[TensorInfo, int]:
    def fault(text: str) -> ValueError:
        return ValueError(f"{path}: tensor {name[:200]!r}: {text}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault("its header entry must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise fault(f"unknown dtype {str(dtype)[:40]!r}; known are {', '.join(TORCH_DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise fault(f"its shape must be a list of at most {MAX_DIMENSIONS} sizes from 0 up.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fault("data_offsets must be two byte positions.")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise fault(
            f"data_offsets {begin:,} to {end:,} lie outside the {data_bytes:,} bytes of data. If the file was cut "
            "off, fetch it again."
        )
    if expected_bytes(dtype, shape) != end - begin:
        raise fault(f"{dtype} {shape} does not take {end - begin:,} bytes.")
    return TensorInfo(name, dtype, tuple(shape), end - begin), begin


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_metadata(metadata: Any, path: str | Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map text to text.")
    return metadata


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map from tensor names to file names.")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: {name!r} is not the name of a .safetensors file in the same folder.")
    return weight_map


def _check_present(folder: Path, names: Sequence[str], stem: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return
    if missing != [f"{stem}.safetensors"]:
        raise FileNotFoundError(f"{folder}: the index names {listed(missing)}, which is not there. Fetch it again.")
    text = f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json."
    if any(folder.glob("pytorch_model*.bin")):
        text += (
            " Its weights are pickles, which FlexMoE does not open. Convert a checkpoint that you trust: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors. "
            f"{NOT_RANDOM}"
        )
    raise FileNotFoundError(text)


def _index_tensors(files: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
    file_of: dict[str, TensorFile] = {}
    for file in files.values():
        for name in file.infos:
            if name in file_of:
                raise ValueError(f"Tensor {name!r} is in two files, {file_of[name].path} and {file.path}.")
            file_of[name] = file
    return file_of


def _check_index(index: Path, weight_map: Mapping[str, str], file_of: Mapping[str, TensorFile]) -> None:
    actual = {name: file.path.name for name, file in file_of.items()}
    wrong = sorted(name for name in weight_map.keys() | actual.keys() if weight_map.get(name) != actual.get(name))
    if wrong:
        listed_in, found_in = weight_map.get(wrong[0]), actual.get(wrong[0])
        listing = f"puts {wrong[0]!r} in {listed_in}" if listed_in else f"does not list {wrong[0]!r}"
        finding = f"it is in {found_in}" if found_in else "no file has it"
        raise ValueError(
            f"{index} {listing}, but {finding} ({len(wrong)} tensors differ). Fetch the checkpoint again, or save it "
            "again."
        )


def same_bytes(ours: Iterable[memoryview], theirs: Iterable[memoryview]) -> bool:
    """Whether two streams of chunks of the same sizes hold the same bytes. Stops at the first difference."""
    return all(a == b for a, b in zip(ours, theirs, strict=True))


def listed(names: Iterable[str], count: int = 5) -> str:
    """The first `count` names for a message, and the number of the others."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


__all__ = [
    "CHUNK_BYTES",
    "FILL_BYTES",
    "CheckpointFolder",
    "Chunk",
    "TensorFile",
    "TensorInfo",
    "empty_tensor",
    "expected_bytes",
    "listed",
    "same_bytes",
    "tensor_info",
]
