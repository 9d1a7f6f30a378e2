"""Checks that an expert package fits a model, and its record in the model's config.

Works on manifests and tensor headers alone. Does not cover reading weights (`flexmoe.packages.modules`), or whether
the expert would harm the model (`flexmoe.admission`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from flexmoe.io.strict_json import MAX_JSON_BYTES
from flexmoe.io.tensors import TensorInfo
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.modeling.experts_flexmoe import intermediate_size
from flexmoe.modeling.low_rank_flexmoe import is_low_rank
from flexmoe.packages.manifest import ExpertManifest
from flexmoe.packages.names import packed_name
from flexmoe.packages.package import MAX_ROW_BYTES, ExpertPackage, router_shapes


def check_anchor(config: FlexMoeConfig, manifest: ExpertManifest) -> None:
    """Checks that an expert was trained on the anchor of this model.

    Raises:
        ValueError: the fingerprints differ; both are in the message.
    """
    check_fingerprint((config.anchor or {}).get("fingerprint"), manifest)


def check_fingerprint(ours: str | None, manifest: ExpertManifest) -> None:
    """Checks that an expert was trained on the anchor with the fingerprint `ours`.

    Raises:
        ValueError: the fingerprints differ; both are in the message.
    """
    theirs = manifest.anchor.get("fingerprint")
    if ours != theirs:
        raise ValueError(
            f"Expert {manifest.name!r} was made for another anchor: its fingerprint is {theirs}, this model's is "
            f"{ours}. Use it with its own anchor ({manifest.anchor.get('repo') or 'no repository given'})."
        )


def check_layers(layers: Sequence[int], manifest: ExpertManifest) -> None:
    """Checks that an expert has a network for each of these layers, and no other.

    Raises:
        ValueError: the layers differ.
    """
    if manifest.layers != list(layers):
        theirs, ours = (str(list(numbers))[:200] for numbers in (manifest.layers, layers))
        raise ValueError(f"Expert {manifest.name!r} has the layers {theirs}; this model has {ours}.")


def check_hidden_size(config: FlexMoeConfig, manifest: ExpertManifest) -> None:
    """Checks, by the manifest alone, that an expert's router rows have the width of this model's.

    Raises:
        ValueError: the hidden sizes differ.
    """
    theirs, ours = manifest.ffn["hidden"], config.get_text_config().hidden_size
    if theirs != ours:
        raise ValueError(f"Expert {manifest.name!r} has a hidden size of {theirs}; this model has {ours}.")


def check_shapes(package: ExpertPackage, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the tensors of a package by their headers; no weights are read.

    Args:
        expected: shapes by name (`expected_shapes`).

    Raises:
        ValueError: a tensor is unknown, missing, or of another shape.
    """
    for name, info in package.infos.items():
        if name not in expected:
            raise ValueError(f"{package.folder}: this model's networks have no tensor {name!r}.")
        if info.shape != expected[name]:
            raise ValueError(
                f"{package.folder}: {name} has shape {list(info.shape)}; this model's networks have "
                f"{list(expected[name])}."
            )
    if missing := sorted(expected.keys() - package.infos.keys()):
        raise ValueError(f"{package.folder} lacks {len(missing)} tensors, for example {missing[0]!r}.")


def check_row_shape(info: TensorInfo, hidden_size: int, where: object) -> None:
    """Checks, by its header entry, that a stored model's router row or bias has the shape of one, before it is read.

    Args:
        info: of a tensor whose name ends in `.weight` or `.bias`.
        where: names the model in messages.

    Raises:
        ValueError: it has another shape, or is too large.
    """
    expected = (1, hidden_size) if info.name.endswith(".weight") else (1,)
    if info.shape != expected:
        raise ValueError(
            f"{where}: tensor {info.name!r} has shape {list(info.shape)}; its config implies {list(expected)}."
        )
    if info.nbytes > MAX_ROW_BYTES:
        raise ValueError(
            f"{where}: tensor {info.name!r} takes {info.nbytes:,} bytes; a router row is no larger than "
            f"{MAX_ROW_BYTES:,}."
        )


def expected_shapes(
    networks: Mapping[int, nn.Module], record: Mapping[str, Any], hidden_size: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the package of an expert with this record, by name.

    Args:
        networks: the expert's networks by layer, without weights (`flexmoe.packages.modules.fresh_experts`).
    """
    shapes = router_shapes(networks, record, hidden_size)
    for layer, network in networks.items():
        at = f"layers.{layer}"
        for key, tensor in network.state_dict().items():
            shapes[f"{at}.ffn.{name_in_package(network, key)}"] = tuple(tensor.shape)
    return shapes


def name_in_package(network: nn.Module, key: str) -> str:
    """The name, after `layers.<i>.ffn.`, that a package gives to the tensor `key` of an expert's network."""
    return packed_name(key) if is_low_rank(network) else key


def public_widths(config: FlexMoeConfig, networks: Sequence[nn.Module]) -> list[int]:
    """The intermediate sizes of the anchor's networks."""
    hidden_size = config.get_text_config().hidden_size
    return [intermediate_size(network, hidden_size) for network in networks]


def package_record(manifest: ExpertManifest, widths: Sequence[int]) -> dict[str, Any]:
    """The record of an expert in the config of a model whose public networks have these widths.

    It holds the expert's own widths where they differ.
    """
    record, own = manifest.record(), manifest.ffn["intermediate"]
    own = own if isinstance(own, list) else [own] * len(widths)
    return record if manifest.kind != "full" or own == list(widths) else {**record, "intermediate": own}


def check_position(position: int | None, names: Sequence[str]) -> None:
    """Checks where an expert is to be added. ValueError: before public, or beyond the end."""
    if position is not None and (type(position) is not int or not 1 <= position <= len(names)):
        raise ValueError(
            f"position={position!r}: it is the new expert's index among {[*names]}, 1 to {len(names)}; None adds it "
            "last."
        )


def check_config_size(config: FlexMoeConfig, *records: Mapping[str, Any]) -> None:
    """Checks that a model's config.json with additional `records` is small enough to be read again.

    Raises:
        ValueError: it is not.
    """
    size = len(config.to_json_string()) + sum(len(json.dumps({"experts": [record]}, indent=2)) for record in records)
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"The model's config.json would have {size:,} bytes; at most {MAX_JSON_BYTES:,} are read. Most of it are "
            "the records of its experts: remove some, or add packages with less 'training' and 'data_statement'."
        )


@contextmanager
def errors_naming(*packages: ExpertPackage) -> Iterator[None]:
    """Prefixes the message of a ValueError raised in the context with the folders of `packages`, if it names none."""
    folders = [str(package.folder) for package in packages]
    try:
        yield
    except ValueError as error:
        if not folders or any(folder in str(error) for folder in folders):
            raise
        raise ValueError(f"{', '.join(folders)}: {error}") from error


__all__ = [
    "check_anchor",
    "check_config_size",
    "check_fingerprint",
    "check_hidden_size",
    "check_layers",
    "check_position",
    "check_row_shape",
    "check_shapes",
    "errors_naming",
    "expected_shapes",
    "name_in_package",
    "package_record",
    "public_widths",
]
