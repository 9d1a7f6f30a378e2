"""Expert packages, format version 1: the expert of one owner, as a folder of safetensors, a manifest and a card.

    expert_config.json   the manifest: name, kind, anchor, training, and the SHA-256 of each weight file
    expert.safetensors   `layers.<i>.ffn.<parameter of the anchor's network>`, `layers.<i>.router.weight` [1, H] and
                         `layers.<i>.router.bias` [1]; with evidence also `layers.<i>.router.calibration`
                         [D + 3] and the table `layers.0.router.table` [V]; shards and an index above 5 GB
    README.md            the card
    config.json          lets the Auto classes report that this is not a model

Packages are untrusted: every name, shape, dtype, number and hash is checked, and no code in them is run. The hashes
prove that the weights belong to the manifest, not who wrote both. The format is specified in `docs/expert-package.md`.

Does not cover whether an expert fits a model (`flexmoe.packages.checks`), the Hub (`flexmoe.hub`), or signatures
(`flexmoe.packages.trust`).
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexmoe.cards.facts import expert_facts
from flexmoe.cards.rendering import render
from flexmoe.io.finite import bytes_are_finite
from flexmoe.io.folders import atomic_folder, file_inside, read_regular_file
from flexmoe.io.hashing import BackgroundHasher
from flexmoe.io.package_config import ExpertPackageConfig
from flexmoe.io.strict_json import json_text, parse_json_object
from flexmoe.io.tensors import FILL_BYTES, Chunk, TensorFile, TensorInfo, empty_tensor
from flexmoe.io.writer import TensorSource, finite_source, source_from_tensor, write_checkpoint
from flexmoe.modeling.evidence_flexmoe import row_shapes
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.packages.manifest import MANIFEST_FILE, MAX_DEPTH, WEIGHT_FILE, ExpertManifest, PackageError

MAX_MANIFEST_BYTES = 1 << 20  # its contents become part of a model's config
MAX_ROW_BYTES = 256 << 20
"""Of all router rows in a package, which are read before its model is known: 500 layers of 100,000 take 200 MB."""
CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
PACKAGE_FILES = (
    "expert*.safetensors",
    "expert.safetensors.index.json",
    MANIFEST_FILE,
    CONFIG_FILE,
    CARD_FILE,
    "LICENSE*",
    "model.sig",
)
"""Patterns of the files of a package: these are pushed, fetched, signed and copied."""

_TENSOR_NAME = re.compile(
    r"layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<part>ffn\.[\w.]{1,200}|router\.(weight|bias|calibration|table))", re.ASCII
)


@dataclass(frozen=True)
class ExpertPackage:
    """An expert package on disk: manifest, file names and headers are validated, weights are not read yet.

    Attributes:
        folder: its folder.
        manifest: its parsed `expert_config.json`.
        infos: header entries of its weight files, by tensor name.
        manifest_sha256: hex digest of the bytes that `manifest` was parsed from.

    Example:
        ```pycon
        >>> import flexmoe
        >>> package = flexmoe.ExpertPackage.open("math-expert")
        >>> package.manifest.name, package.manifest.kind
        ('math', 'full')
        >>> tensors = dict(package.tensors())  # hashed and checked while they are read
        >>> tensors["layers.0.router.weight"].shape
        torch.Size([1, 32])
        ```
    """

    folder: Path
    manifest: ExpertManifest
    infos: Mapping[str, TensorInfo]
    manifest_sha256: str

    @classmethod
    def open(cls, folder: str | Path) -> "ExpertPackage":
        """Opens a package and validates its manifest, file names and headers.

        Raises:
            FileNotFoundError: no such folder, no manifest in it, or a weight file is missing.
            PackageError: the package is invalid; names the file and the error.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
        if not os.path.lexists(folder / MANIFEST_FILE):
            raise FileNotFoundError(f"{folder} is not an expert package: it has no {MANIFEST_FILE}.")
        with _as_package_errors():
            path = file_inside(folder, MANIFEST_FILE)
            data = read_regular_file(path, max_bytes=MAX_MANIFEST_BYTES)
            values = parse_json_object(data, str(path), max_depth=MAX_DEPTH)
            manifest = ExpertManifest.from_dict(values, where=str(path))
            _check_files(folder, manifest)
            infos: dict[str, TensorInfo] = {}
            for name in sorted(manifest.sha256):
                with TensorFile(file_inside(folder, name)) as file:
                    if duplicates := infos.keys() & file.infos.keys():
                        raise PackageError(f"{file.path}: tensor {min(duplicates)!r} is in another file too.")
                    infos.update(file.infos)
            _check_infos(str(folder), manifest, infos)
        return cls(folder, manifest, infos, hashlib.sha256(data).hexdigest())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every (name, CPU tensor), reading and hashing each weight file once.

        The last tensor of a file is yielded only after the file's hash is verified: until the iteration has ended, the
        tensors are unverified, and must not be changed, because they are still being hashed.

        Raises:
            PackageError: a number is not finite, a hash is not that of the manifest, or a file changed after `open`.
        """
        with _as_package_errors():
            for name in sorted(self.manifest.sha256):
                with TensorFile(file_inside(self.folder, name)) as file:
                    yield from self._verified(file, self.manifest.sha256[name])

    def read_rows(self) -> dict[str, torch.Tensor]:
        """The router rows and biases only, by tensor name; unverified, unlike those of `tensors`."""
        rows = {}
        with _as_package_errors():
            for name in sorted(self.manifest.sha256):
                with TensorFile(file_inside(self.folder, name)) as file:
                    rows.update({key: file.read(key) for key in file.infos if ".router." in key})
        return rows

    def verify(self) -> None:
        """Reads every weight file once, a few chunks in memory at a time, and checks what `tensors` checks.

        Raises:
            PackageError: as `tensors`.
        """
        with _as_package_errors():
            for name, sha256 in sorted(self.manifest.sha256.items()):
                with TensorFile(file_inside(self.folder, name)) as file, BackgroundHasher(file=True) as hasher:
                    hasher.add(file.header)
                    for chunk in _finite_chunks(file):
                        hasher.add(chunk)
                _check_hash(file.path, hasher.file_sha256(), sha256)

    def copy_weights(self, folder: Path, progress: Callable[[int], None] | None = None) -> None:
        """Copies the weight files into `folder` and verifies the copied bytes.

        Args:
            progress: called with the number of bytes just copied.

        Raises:
            PackageError: as `tensors`; the copy must not be used then.
        """
        with _as_package_errors():
            for name, sha256 in sorted(self.manifest.sha256.items()):
                with (
                    TensorFile(file_inside(self.folder, name)) as file,
                    open(folder / name, "xb") as copy,
                    BackgroundHasher(file=True) as hasher,
                ):
                    hasher.add(file.header)
                    copy.write(file.header)
                    for chunk in _finite_chunks(file):
                        hasher.add(chunk)
                        copy.write(chunk)
                        if progress:
                            progress(len(chunk))
                _check_hash(file.path, hasher.file_sha256(), sha256)

    def _verified(self, file: TensorFile, sha256: str) -> Iterator[tuple[str, torch.Tensor]]:
        held: tuple[str, torch.Tensor] | None = None  # yielded one tensor late, so that the last waits for the hash
        with BackgroundHasher(file=True) as hasher:
            hasher.add(file.header)
            for info in file.infos.values():
                if self.infos.get(info.name) != info:
                    raise PackageError(f"{file.path}: tensor {info.name!r} changed since the package was opened.")
                if held is not None:
                    yield held
                tensor = empty_tensor(info)
                for part in file.fill(info.name, tensor):
                    hasher.add(part)
                    if not bytes_are_finite(part, info.dtype):
                        raise _not_finite(file.path, info.name)
                held = info.name, tensor
        _check_hash(file.path, hasher.file_sha256(), sha256)
        if held is not None:
            yield held


def write_package(
    out: str | Path,
    manifest: ExpertManifest,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an expert package atomically and returns its folder.

    Args:
        out: the new folder; must not exist, unless `overwrite`.
        manifest: its `sha256` is computed here.
        tensors: with names as in the module's docstring; floating-point and finite.
        card: text of the README.md; by default `default_card`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        PackageError: manifest and tensors disagree, or a number is not finite.
    """
    sources = [source_from_tensor(name, tensor) for name, tensor in tensors]
    return stream_package(out, manifest, sources, card=card, overwrite=overwrite)


def stream_package(
    out: str | Path,
    manifest: ExpertManifest,
    sources: Sequence[TensorSource],
    *,
    card: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes an expert package from streams of tensors: a few chunks are in memory at a time.

    Args:
        out, manifest, card, overwrite: as in `write_package`.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError, PackageError: as `write_package`.
    """
    infos = {source.info.name: source.info for source in sources}
    if len(infos) != len(sources):
        raise PackageError(f"{out}: a tensor name is given twice.")
    _check_infos(str(out), manifest, infos)
    checked = [finite_source(source, _not_finite(out, source.info.name)) for source in sources]
    with atomic_folder(out, overwrite) as folder:
        written = write_checkpoint(folder, checked, stem="expert", aligned=False, hash_files=True, progress=progress)
        manifest = replace(manifest, sha256={name: digest or "" for name, digest in written.files.items()})
        (folder / MANIFEST_FILE).write_text(json_text(manifest.to_dict()), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json_text({"model_type": ExpertPackageConfig.model_type}), encoding="utf-8")
        (folder / CARD_FILE).write_text(default_card(manifest) if card is None else card, encoding="utf-8")
    return Path(out)


def default_card(manifest: ExpertManifest) -> str:
    """The README.md of a package: the Hub's front matter, usage, training data."""
    return render("expert", expert_facts(manifest))


def _check_files(folder: Path, manifest: ExpertManifest) -> None:
    present = {entry.name for entry in os.scandir(folder) if WEIGHT_FILE.fullmatch(entry.name)}
    if unknown := sorted(present - manifest.sha256.keys()):
        raise PackageError(f"{folder}: {MANIFEST_FILE} does not name the weight file {unknown[0]!r}.")


def router_shapes(layers: Iterable[int], record: Mapping[str, Any], hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the router's tensors in the package of an expert with this record, by name."""
    return {
        f"layers.{layer}.router.{part}": shape
        for layer in layers
        for part, shape in row_shapes(record, hidden_size, layer).items()
    }


def _described(manifest: ExpertManifest) -> str:
    row, *others = row_shapes(manifest.record(), manifest.ffn["hidden"], 0).items()
    return ", ".join([f"a row is {list(row[1])}", *(f"a {part} {list(shape)}" for part, shape in others)])


def _check_infos(where: str, manifest: ExpertManifest, infos: Mapping[str, TensorInfo]) -> None:
    """Checks names, layers, row shapes and dtypes against the manifest. Network shapes are checked against a model."""
    router = router_shapes(manifest.layers, manifest.record(), manifest.ffn["hidden"])
    rows = dict(router)
    expected, layers, dtypes = set(manifest.layers), set(), set()
    for name, info in infos.items():
        match = _TENSOR_NAME.fullmatch(name)
        if (
            match is None
            or int(match["layer"]) not in expected
            or (match["part"].startswith("router.") and name not in router)
        ):
            raise PackageError(
                f"{where}: tensor {name[:200]!r} has no place in an expert with layers {_span(manifest.layers)}; "
                "names are layers.<i>.ffn.<parameter>, layers.<i>.router.weight and layers.<i>.router.bias, with "
                "evidence also layers.<i>.router.calibration and layers.0.router.table."
            )
        dtype = TORCH_DTYPES[info.dtype]
        if not dtype.is_floating_point:
            raise PackageError(f"{where}: tensor {name!r} is {info.dtype}; tensors of experts are floating-point.")
        if name in rows and info.shape != rows.pop(name):
            raise PackageError(f"{where}: tensor {name!r} has shape {list(info.shape)}; {_described(manifest)}.")
        if match["part"].startswith("ffn."):
            layers.add(int(match["layer"]))
            dtypes.add(str(dtype).removeprefix("torch."))
    row_bytes = sum(info.nbytes for name, info in infos.items() if ".router." in name)
    if row_bytes > MAX_ROW_BYTES:
        raise PackageError(
            f"{where}: its router rows take {row_bytes:,} bytes; at most {MAX_ROW_BYTES:,} are read. A row is as wide "
            f"as the hidden size, which is {manifest.ffn['hidden']:,} in the manifest."
        )
    if rows or (missing := expected - layers):
        lacking = next(iter(rows), None) or f"layers.{min(missing)}.ffn.*"
        raise PackageError(f"{where}: there is no tensor {lacking}.")
    dtype_name = dtypes.pop() if len(dtypes) == 1 else "mixed"
    if dtype_name != manifest.dtype:
        raise PackageError(f"{where}: the manifest's dtype is {manifest.dtype[:40]!r}, the weights are {dtype_name}.")


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}"


def _finite_chunks(file: TensorFile) -> Iterator[Chunk]:
    """The bytes of a weight file's tensors. PackageError: a number is not finite; its chunk is not yielded."""
    for info in file.infos.values():
        for chunk in file.chunks(info.name, FILL_BYTES):
            if not bytes_are_finite(chunk, info.dtype):
                raise _not_finite(file.path, info.name)
            yield chunk


def _check_hash(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise PackageError(
            f"{path}: its SHA-256 is {found}; the manifest has {wanted}. The file was damaged or changed: get the "
            "package again from its owner."
        )


def _not_finite(where: str | Path, name: str) -> PackageError:
    return PackageError(f"{where}: tensor {name!r} holds NaN or an infinity.")


@contextmanager
def _as_package_errors() -> Iterator[None]:
    """Turns a ValueError about a file of a package into a PackageError."""
    try:
        yield
    except PackageError:
        raise
    except ValueError as error:
        raise PackageError(str(error)) from error


__all__ = [
    "CARD_FILE",
    "PACKAGE_FILES",
    "ExpertManifest",
    "ExpertPackage",
    "PackageError",
    "default_card",
    "router_shapes",
    "stream_package",
    "write_package",
]
