"""Loading a composition: resolve its parts, verify them, and assemble one state dict.

    resolve   the anchor and all packages are looked up and downloaded at the same time; online, the Hub is asked once
              per expert whether it is still available, even if the cache holds it: an owner withdraws an expert by
              deleting or gating its repository
    verify    the anchor by its fingerprint, packages by their SHA-256, shapes and the trust policy
    load      the tensors of all sources under the names of the model; hashes are computed from the bytes handed out

Does not cover the files of a composition (`format`), or building the model, which transformers does.
"""

from __future__ import annotations

import copy
import hashlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from flexmoe.companions import GENERATION_FILE
from flexmoe.composition.format import (
    CONFIG_FILE,
    ROUTER_FILE,
    Composition,
    Pin,
    Rows,
    read_router,
    rows_of,
)
from flexmoe.hub.client import DOWNLOADED, HubAccess, ResolvedFolder
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, drop_experts
from flexmoe.modeling.experts_flexmoe import make_expert
from flexmoe.modeling.fingerprint_flexmoe import fingerprint, tensor_bytes
from flexmoe.packages.checks import check_anchor, check_shapes, expected_shapes
from flexmoe.packages.names import unpacked_name
from flexmoe.packages.package import PACKAGE_FILES, ExpertPackage
from flexmoe.packages.trust import TrustPolicy, resolve_policy

_PACKAGE_TENSOR = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>ffn|router)\.(?P<rest>.+)")


@contextmanager
def load_arguments(
    config_class: type[FlexMoeConfig],
    source: Any,
    config: Any,
    options: Mapping[str, Any],
    *,
    missing_experts: str = "error",
    policy: TrustPolicy | str | Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the arguments with which transformers' `from_pretrained` loads a composition.

    Args:
        config_class: the class of the model's config, in the package or in remote code.
        source: Hub id or folder, as `from_pretrained` takes it.
        config: the caller's config, as `from_pretrained` takes it: an object, a path, or None.
        options: the other keyword arguments of `from_pretrained`, among them those for the Hub.
        missing_experts: what to do with withdrawn experts: "skip" leaves them out with a warning, "error" raises.
        policy: which packages are trusted, as `resolve_policy` takes it.

    Raises:
        ValueError: as `load_state_dict`; or the composition lies in a subfolder or was reached through an adapter.
    """
    if options.get("subfolder"):
        raise ValueError(f"{source}: a composition in a subfolder; it must have a folder or repository of its own.")
    if (options.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        raise ValueError(f"{source} is a composition: load it on its own, then the adapter with model.load_adapter.")
    hub = HubAccess(**{field.name: options[field.name] for field in fields(HubAccess) if field.name in options})
    revision = None if Path(source).is_dir() else options.get("revision")
    folder = hub.resolve(source, revision, allow_patterns=(CONFIG_FILE, GENERATION_FILE, ROUTER_FILE))
    given = config if isinstance(config, PreTrainedConfig) else None  # of the package or of remote code
    reduced = copy.deepcopy(given) if given is not None else config_class.from_pretrained(config or folder.path)
    names = list(reduced.expert_names)
    with tempfile.TemporaryDirectory(prefix="flexmoe-") as reduced_folder:
        arguments: dict[str, Any] = {"state_dict": load_state_dict(reduced, folder, hub, missing_experts, policy)}
        arguments["config"] = config or source
        if reduced.expert_names != names:  # the model that transformers builds must not have the experts left out
            arguments["config"] = reduced if given is not None else reduced_folder
            reduced.save_pretrained(reduced_folder)
        if (folder.path / GENERATION_FILE).is_file() and options.get("generation_config") is None:
            arguments["generation_config"] = GenerationConfig.from_pretrained(folder.path)
        yield arguments


def check_complete(source: Any, info: Mapping[str, Any]) -> None:
    """Checks that the sources of a composition provided every tensor of the model, and no others.

    Args:
        source: the composition, for the message.
        info: the loading info of `from_pretrained`.

    Raises:
        ValueError: a tensor is missing or unexpected: `anchor_config` describes another model.
    """
    for fault in ("missing", "unexpected"):
        if keys := info[f"{fault}_keys"]:
            raise ValueError(
                f"The composition {source} and its sources disagree: {len(keys)} {fault} tensors, such as "
                f"{min(keys)!r}. The anchor_config of its config.json is not that of its anchor."
            )


def load_state_dict(
    config: FlexMoeConfig,
    folder: ResolvedFolder,
    hub: HubAccess,
    missing_experts: str = "error",
    policy: TrustPolicy | str | Path | None = None,
) -> dict[str, Tensor]:
    """The state dict of the composition in `folder`, in the dtypes of its sources, rows in float32.

    Args:
        config: the composition's; with `missing_experts="skip"`, experts that are not available are removed from it.

    Raises:
        ValueError: a source or a file is not the one that was saved, or the policy does not trust a package
            (`UntrustedPackageError`).
        FileNotFoundError, PermissionError, ConnectionError: a source is gone, gated or unreachable (`resolve_folder`).
    """
    composition = Composition.from_config(config)
    changed = read_router(folder.path, composition.router_sha256, config)
    anchor, found = _resolve_parts(composition, folder, hub)
    if missing := {name: error for name, error in found.items() if isinstance(error, OSError)}:
        _leave_out(config, folder, missing, missing_experts)
        gone = rows_of(changed, missing)
        changed = {name: row for name, row in changed.items() if name not in gone}
    sources = Sources(
        config, anchor.path, {name: part.path for name, part in found.items() if not isinstance(part, OSError)}
    )
    trusted = resolve_policy(policy)
    for name, package in sources.packages.items():
        check_pin(name, package, composition.experts[name])
        if trusted is not None:
            trusted.check(package, composition.experts[name].repo)
    rows = sources.public_rows()
    public_rows = rows | {name: row for name, row in changed.items() if name in rows}
    state = dict(rows)
    state |= {name: tensor for _, name, tensor in sources.tensors(public_rows)}
    for name, row in changed.items():
        if ".router." not in name or name not in state or state[name].shape != row.shape:
            raise ValueError(f"{folder.path / ROUTER_FILE}: {name!r} {list(row.shape)} is not a row of this model.")
    return state | changed


def check_pin(name: str, package: ExpertPackage, pin: Pin) -> None:
    """Raises ValueError if the package of the expert `name` has other weight files than the pin records."""
    if package.manifest.sha256 != pin.sha256:
        raise ValueError(
            f"{package.folder}: this package is not the one that the composition was saved with as {name!r}: its "
            f"weights have the SHA-256 {package.manifest.sha256}, the composition records {dict(pin.sha256)}. Get "
            "that version, or move the pin to this one (flexmoe compose --update)."
        )


def _resolve_parts(
    composition: Composition, folder: ResolvedFolder, hub: HubAccess
) -> tuple[ResolvedFolder, dict[str, ResolvedFolder | OSError]]:
    """The anchor's folder, and for each expert its package's, or the reason why it is not available."""
    wanted = {PUBLIC: composition.anchor.wanted(folder, DOWNLOADED)}
    wanted |= {name: pin.wanted(folder, PACKAGE_FILES, owned=True) for name, pin in composition.experts.items()}
    found = hub.resolve_all(wanted)
    anchor = found.pop(PUBLIC)
    if isinstance(anchor, OSError):
        raise anchor
    return anchor, found


def _leave_out(
    config: FlexMoeConfig, folder: ResolvedFolder, missing: Mapping[str, OSError], missing_experts: str
) -> None:
    """Removes experts that are not available from the config, or raises if that was not asked for."""
    source = folder.repo or folder.path
    reasons = "; ".join(f"{name!r}: {error}" for name, error in missing.items())
    first = next(iter(missing.values()))
    withdrawn = all(isinstance(error, FileNotFoundError | PermissionError) for error in missing.values())
    if not withdrawn:  # an unreachable Hub is not a withdrawal, so "skip" does not apply
        raise type(first)(f"The composition {source} lacks {len(missing)} of its experts. {reasons}.") from first
    if missing_experts == "error":
        raise type(first)(
            f"The composition {source} lacks {len(missing)} of its experts. {reasons}. If the owner has withdrawn it, "
            'load the model without: from_pretrained(..., missing_experts="skip").'
        ) from first
    drop_experts(config, set(missing))
    warnings.warn(f"Loaded without {', '.join(map(repr, missing))}. {reasons}.", stacklevel=2)


class Sources:
    """The opened sources of a model, a dense anchor and expert packages, as one stream of tensors.

    They hold all of the model's tensors but for router rows that differ from the packages'.

    Args:
        config: the model's.
        anchor: folder of the dense checkpoint.
        packages: folders of the expert packages, by the experts' names in the model; without some of them, their
            tensors are left out.

    Raises:
        ValueError: a package was made for another anchor or another network.
    """

    def __init__(self, config: FlexMoeConfig, anchor: Path, packages: Mapping[str, Path]) -> None:
        self.config = config
        self.anchor = DenseCheckpoint(anchor)
        self.packages = {name: ExpertPackage.open(folder) for name, folder in packages.items()}
        self._blocks = {site.index: f"{ANCHOR_PREFIX}{site.block}" for site in self.anchor.sites}
        records = {record["name"]: record for record in config.expert_records}
        for name, package in self.packages.items():
            self._check_package(package, records[name])

    def public_rows(self) -> Rows:
        """The public rows and biases of a graft, which are zero."""
        hidden = self.config.get_text_config().hidden_size
        zeros = {"weight": torch.zeros(1, hidden), "bias": torch.zeros(1)}
        return {
            f"{block}.router.{PUBLIC}.{key}": zero.clone()
            for block in self._blocks.values()
            for key, zero in zeros.items()
        }

    def tensors(self, public_rows: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """Yields (owner, name in the model, CPU tensor); all are verified once the iteration has ended.

        Args:
            public_rows: the model's; if they are not zero, they are part of the anchor's fingerprint.

        Raises:
            ValueError: the anchor has another fingerprint, or a package does not match its manifest (`PackageError`).
        """
        yield from self._anchor_tensors(public_rows)
        for name, package in self.packages.items():
            for inside, tensor in package.tensors():
                is_row = ".router." in inside
                yield name, self._name_in_model(name, inside), tensor.float() if is_row else tensor

    def _anchor_tensors(self, public_rows: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        names, lines = NameMap(self.anchor.sites), []
        for name, info in self.anchor.infos.items():
            tensor = self.anchor.files.read(self.anchor.stored[name])
            lines.append((name, info.dtype, info.shape, _sha256(tensor)))
            yield PUBLIC, names.to_flexmoe(name), tensor
        expected = (self.config.anchor or {}).get("fingerprint")
        weights = [(name, row) for name, row in public_rows.items() if name.endswith(".weight") and row.any()]
        imported = [(name, "F32", tuple(row.shape), _sha256(row)) for name, row in weights]
        if expected not in (fingerprint(lines), fingerprint([*lines, *imported])):
            raise ValueError(
                f"{self.anchor.folder} is not the anchor of this model: its fingerprint is {fingerprint(lines)}, the "
                f"model's is {expected}. Give the dense checkpoint that the model was grafted from."
            )

    def _name_in_model(self, expert: str, inside: str) -> str:
        """The model's name of the tensor that the package of `expert` calls `inside`."""
        match = _PACKAGE_TENSOR.fullmatch(inside)
        assert match, inside  # checked when the package was opened
        block, rest = self._blocks[int(match["layer"])], match["rest"]
        if match["part"] == "router":
            return f"{block}.router.{expert}.{rest}"
        is_low_rank = self.packages[expert].manifest.kind == "low_rank"
        return f"{block}.experts.{expert}.{unpacked_name(rest) if is_low_rank else rest}"

    def _check_package(self, package: ExpertPackage, record: dict[str, Any]) -> None:
        check_anchor(self.config, package.manifest)
        for key in ("kind", "rank", "alpha", "evidence"):  # shapes do not always show these
            if (theirs := getattr(package.manifest, key)) != (ours := record.get(key)):
                raise ValueError(f"{package.folder}: its {key} is {theirs!r}, the model's expert has {ours!r}.")
        hidden_size = self.config.get_text_config().hidden_size
        networks = {
            site.index: make_expert(site.ffn(self.anchor.model), record, layer=site.index, hidden_size=hidden_size)
            for site in self.anchor.sites
        }
        check_shapes(package, expected_shapes(networks, record, hidden_size))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


__all__ = ["Sources", "check_complete", "check_pin", "load_arguments", "load_state_dict"]
