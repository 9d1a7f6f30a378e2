"""The files of an expert package, a composition and a merged model: these are pushed, pulled and copied, no others.

A manifest, an index or a config names the weights; `flexmoe.companions` lists the files beside them. What else lies in
a folder (older weights, notes, the text that an expert was trained on) stays where it is. No file is a link out of the
folder.

Does not cover what is in the files (`flexmoe.packages.package`, `flexmoe.io.tensors`, `flexmoe.hub.privacy`).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import flexmoe.modeling
from flexmoe.companions import check_digest, companions, is_terms
from flexmoe.io.folders import file_inside
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import CheckpointFolder, listed
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.packages.manifest import MANIFEST_FILE
from flexmoe.packages.package import CARD_FILE, CONFIG_FILE, PACKAGE_FILES, ExpertPackage, PackageError
from flexmoe.packages.trust import SIGNATURE_FILE

ROUTER_FILE = "router.safetensors"
INDEX = ".safetensors.index.json"

_OWNER = re.compile(r"\.(?:experts|router)\.([a-z][a-z0-9_-]*)\.")

CODE = "_flexmoe.py"  # suffix of files with code, also of those that an earlier version wrote
CODE_FILES = {path.name: path for path in sorted(Path(flexmoe.modeling.__file__).parent.glob(f"*{CODE}"))}
"""FlexMoE's own code, which travels with a model, by name, as the installed version has it."""


def package_files(package: ExpertPackage) -> dict[str, Path]:
    """The files of an expert package, by name: the manifest and the weights that it names, card, licence, signature.

    Raises:
        PackageError: a link leads out of the folder; or a file may be signed that is not one of these, so that the
            signature would not hold without it.
    """
    folder, weights = package.folder, set(package.manifest.sha256)
    names = {MANIFEST_FILE, CONFIG_FILE, CARD_FILE, SIGNATURE_FILE, *weights}
    present = [name for name in _names(folder) if not (folder / name).is_dir()]
    names |= {name for name in present if name.startswith("LICENSE") and is_terms(name)}
    try:
        index = f"expert{INDEX}"
        if index in present and len(weights) > 1 and _index_names(file_inside(folder, index), weights):
            names.add(index)
        files = {name: file_inside(folder, name) for name in present if name in names}
    except ValueError as error:
        raise PackageError(str(error)) from error
    others = [name for name in present if name not in files and any(fnmatchcase(name, p) for p in PACKAGE_FILES)]
    if others and SIGNATURE_FILE in files:
        raise PackageError(
            f"{folder}: it is signed, and {others[0]!r} is not a file of the package, but may be signed with it. Move "
            "it out of the folder, and sign again (flexmoe sign --overwrite)."
        )
    return files


def model_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """The files of a merged model, without its code: the weights that transformers loads, config, card, companions.

    Raises:
        FileNotFoundError: there are no weights, or a file that the index names is missing.
        ValueError: as `companions`; the weights are damaged, or hold an expert that the config does not list.
    """
    with CheckpointFolder(folder) as weights:
        _check_owners(folder, config, list(weights.infos))
        names = list(weights.files)
    if names != ["model.safetensors"]:
        names.append(f"model{INDEX}")
    return _complete(folder, names) | companions(folder, config.get("public_sample"))


def composition_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """The files of a composition, without its code: the router rows that its config names, config, card, companions.

    Raises:
        ValueError: as `companions`; or the router rows are not those that the composition names.
    """
    composition = config.get("composition")
    digest = composition.get("router_sha256") if isinstance(composition, dict) else None
    names = [ROUTER_FILE] if digest is not None else []
    for name in names:
        check_digest(file_inside(folder, name), digest, "the router file")
    return _complete(folder, names) | companions(folder, config.get("public_sample"))


def check_others(source: Path, target: Path, files: Mapping[str, Path]) -> None:
    """Warns of files in `source` that are not copied to `target`, because they are not of the model.

    Args:
        files: those of the model.

    Raises:
        ValueError: `target` is `source`, so that they would be deleted.
    """
    others = [name for name in left_out(source, files) if not name.startswith(".") and not name.endswith(CODE)]
    if others and source.resolve() == target:
        raise ValueError(
            f"Overwriting {target} would delete {listed(others)}, which the model does not consist of. Move them out "
            "of the folder, or choose another output folder."
        )
    if others:
        warnings.warn(f"Not copied from {source}, as the model does not name them: {listed(others)}.", stacklevel=4)


def left_out(folder: Path, files: Mapping[str, Path]) -> tuple[str, ...]:
    """The files and folders in a folder that are not among `files`, by their paths in it."""
    return tuple(
        name
        for name in sorted(_names(folder))
        if name not in files and not any(path.startswith(f"{name}/") for path in files)
    )


def _complete(folder: Path, weights: list[str]) -> dict[str, Path]:
    names = [CONFIG_FILE, *([CARD_FILE] if (folder / CARD_FILE).is_file() else []), *weights]
    return {name: file_inside(folder, name) for name in names}


def _check_owners(folder: Path, config: Mapping[str, Any], tensors: list[str]) -> None:
    records = config.get("experts") or [PUBLIC]
    known = {record.get("name") if isinstance(record, dict) else record for record in records} | {PUBLIC}
    for name in tensors:
        if (match := _OWNER.search(name)) and match[1] not in known:
            raise ValueError(
                f"{folder}: its weights hold {name!r}, a tensor of the expert {match[1]!r}, which {CONFIG_FILE} does "
                "not list. Load the model and save it again, which leaves such tensors out."
            )


def _index_names(index: Path, weights: set[str]) -> bool:
    """Whether an index is that of these weight files."""
    weight_map = read_json_object(index).get("weight_map")
    return isinstance(weight_map, dict) and set(map(str, weight_map.values())) == weights


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder))


__all__ = [
    "CODE_FILES",
    "check_others",
    "composition_files",
    "left_out",
    "model_files",
    "package_files",
]
