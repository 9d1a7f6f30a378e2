"""Compositions: a model by reference, kilobytes that name a dense anchor and the packages of its experts.

    config.json         the model's configuration, and under `composition` where the anchor and each expert come from
    router.safetensors  router rows and biases that are not what the sources say (of public: zero); absent if all are
    README.md           the card

A source is a repository of the Hub at a commit, or a folder. An anchor is known by its fingerprint and an expert by
the SHA-256 of its files, so what is loaded is what was saved, or an error. `docs/composition.md` is for readers.

Not here: withdrawal of an expert by its owner, signatures, uploads.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from .configuration_flexmoe import PUBLIC, FlexMoeConfig
from .folders_flexmoe import atomic_folder, check_apart, check_new_folder, file_inside, read_regular_file
from .hub_flexmoe import ResolvedFolder, resolve_folder
from .packages_flexmoe import CARD_FILE
from .sources_flexmoe import Sources
from .tensor_writer_flexmoe import source_from_tensor, write_checkpoint

FORMAT_VERSION = 1
ROUTER_FILE = "router.safetensors"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_ROUTER_BYTES = 1 << 30
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_KEYS = {"format_version", "anchor", "experts", "router_sha256"}


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is asked: as `resolve_folder` takes it."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def resolve(self, source: str | Path, revision: str | None = None, **options: Any) -> ResolvedFolder:
        """The folder that `source` names, fetched if need be."""
        return resolve_folder(
            source,
            revision=revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            force_download=self.force_download,
            **options,
        )


@dataclass(frozen=True)
class Reference:
    """Where the anchor or an expert comes from: `repo` at the commit `revision`, or else `folder`.

    A folder that lies beside the composition is named relative to it, so that both can be moved together.
    """

    repo: str | None = None
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def of(cls, found: ResolvedFolder, composition: Path) -> Reference:
        """The reference by which a composition in the folder `composition` names what was found."""
        if found.repo is not None:
            return cls(found.repo, found.revision)
        real = Path(os.path.realpath(found.path))
        beside = real.is_relative_to(composition.parent)
        return cls(folder=Path(os.path.relpath(real, composition)).as_posix() if beside else str(real))

    @classmethod
    def from_dict(cls, values: Any, what: str) -> Reference:
        """The reference that a config holds; `what` names it in errors.

        Raises:
            ValueError: it is not one.
        """
        texts = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
        if not texts or set(values) not in ({"repo", "revision"}, {"folder"}):
            raise ValueError(
                f"{what}: {values!r} is no reference; one is {{'repo': ..., 'revision': ...}} or {{'folder': ...}}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        """As a config holds it."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def resolve(self, composition: ResolvedFolder, hub: HubAccess) -> ResolvedFolder:
        """The folder that it names, fetched if need be.

        Raises:
            ValueError: a composition from the Hub names a folder, which would be one of this machine.
            FileNotFoundError, PermissionError, ConnectionError: as `resolve_folder`.
        """
        if self.folder is None:
            return hub.resolve(str(self.repo), self.revision)
        if composition.repo is not None:
            raise ValueError(
                f"The composition {composition.repo} names the folder {self.folder!r}: on the Hub it may only name "
                "repositories. Its author should push the anchor and the experts, and save it again with their ids."
            )
        return hub.resolve(composition.path / self.folder)


@dataclass(frozen=True)
class Composition:
    """The entry `composition` of a config: what a model is made of.

    Attributes:
        anchor: where the dense checkpoint is.
        experts: where the packages are, by the experts' names in the model.
        sha256: of each package's weight files, by the experts' names.
        router_sha256: of `router.safetensors`; None if there is none.
    """

    anchor: Reference
    experts: Mapping[str, Reference]
    sha256: Mapping[str, Mapping[str, str]]
    router_sha256: str | None

    @classmethod
    def from_config(cls, config: FlexMoeConfig) -> Composition:
        """What the config of a composition says, checked.

        Raises:
            ValueError: it is of another format version, or not of this format, or lacks an expert of the config.
        """
        values = dict(config.composition or {})
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"composition: format_version is {values.get('format_version')!r}; this FlexMoE reads "
                f"{FORMAT_VERSION}. Update flexmoe if the number is higher."
            )
        experts = values.get("experts")
        if set(values) != _KEYS or not isinstance(experts, dict):
            raise ValueError(f"composition: its keys must be {sorted(_KEYS)}; they are {sorted(values)}.")
        owners = config.expert_names[1:]
        if lacking := [name for name in owners if name not in experts]:
            raise ValueError(f"composition: nothing says where the expert(s) {lacking} of this config come from.")
        references, hashes = {}, {}
        for name in owners:
            entry = experts[name] if isinstance(experts[name], dict) else {}
            hashes[name] = entry.get("sha256") or {}
            place = {key: value for key, value in entry.items() if key != "sha256"}
            references[name] = Reference.from_dict(place, f"composition, expert {name!r}")
        anchor = Reference.from_dict(values["anchor"], "composition, anchor")
        return cls(anchor, references, hashes, values["router_sha256"])

    def to_dict(self) -> dict[str, Any]:
        """As a config holds it."""
        experts = {name: {**entry.to_dict(), "sha256": self.sha256[name]} for name, entry in self.experts.items()}
        return {
            "format_version": FORMAT_VERSION,
            "anchor": self.anchor.to_dict(),
            "experts": experts,
            "router_sha256": self.router_sha256,
        }


def load_arguments(
    config_class: type[FlexMoeConfig], source: Any, config: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """With what transformers' `from_pretrained` loads the composition that `source` is; empty if it is none.

    Args:
        source, config, options: the arguments of `from_pretrained`: the Hub id or folder, the config if the caller has
            one, and the keyword arguments, among them those that say how the Hub is asked.

    Raises:
        ValueError: as `pull_composition`; or the composition lies in a subfolder, or was reached through an adapter.
    """
    if source is None or options.get("gguf_file") or not _is_composition(config_class, source, config, options):
        return {}
    if options.get("subfolder"):
        raise ValueError(f"{source}: a composition in a subfolder; it must have a folder or repository of its own.")
    if (options.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        raise ValueError(f"{source} is a composition: load it on its own, then the adapter with model.load_adapter.")
    hub = HubAccess(**{field.name: options[field.name] for field in fields(HubAccess) if field.name in options})
    revision = None if Path(source).is_dir() else options.get("revision")
    folder = hub.resolve(source, revision, allow_patterns=(CONFIG_FILE, GENERATION_FILE, ROUTER_FILE))
    if not isinstance(config, PreTrainedConfig):  # remote code has two copies of FlexMoeConfig: either will do
        config = config_class.from_pretrained(folder.path)
    arguments: dict[str, Any] = {"state_dict": pull_composition(config, folder, hub)}
    if (folder.path / GENERATION_FILE).is_file() and options.get("generation_config") is None:
        arguments["generation_config"] = GenerationConfig.from_pretrained(folder.path)
    return arguments


def _is_composition(config_class: type[FlexMoeConfig], source: Any, config: Any, options: Mapping[str, Any]) -> bool:
    if isinstance(config, PreTrainedConfig):
        return getattr(config, "composition", None) is not None
    asked = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
    try:
        values, _ = config_class.get_config_dict(source if config is None else config, **asked)
    except OSError:  # no config there, as beside an adapter: transformers knows what to do, or says what is wrong
        return False
    return values.get("composition") is not None


def check_whole(source: Any, info: Mapping[str, Any]) -> None:
    """Checks that the sources of a composition gave its config's model every tensor, and no other.

    Raises:
        ValueError: one is missing, or has no place: `anchor_config` describes another model.
    """
    for fault in ("missing", "unexpected"):
        if keys := info[f"{fault}_keys"]:
            raise ValueError(
                f"The composition {source} and its sources disagree: {len(keys)} {fault} tensors, such as "
                f"{min(keys)!r}. The anchor_config of its config.json is not that of its anchor."
            )


def pull_composition(config: FlexMoeConfig, folder: ResolvedFolder, hub: HubAccess) -> dict[str, Tensor]:
    """The state dict of the composition in `folder`, in the dtypes of its sources, rows in float32.

    Raises:
        ValueError: a source is not the one that was saved, or a file is not what it says.
        FileNotFoundError, PermissionError, ConnectionError: a source is gone, gated, out of reach (`resolve_folder`).
    """
    composition = Composition.from_config(config)
    changed = _read_router(folder.path, composition.router_sha256)
    anchor = composition.anchor.resolve(folder, hub)
    packages = {name: entry.resolve(folder, hub).path for name, entry in composition.experts.items()}
    sources = Sources(config, anchor.path, packages)
    for name, package in sources.packages.items():
        if package.manifest.sha256 != composition.sha256[name]:
            raise ValueError(
                f"The package of the expert {name!r} in {package.folder} is not the one that this composition was "
                f"saved with: its weights have the SHA-256 {package.manifest.sha256}, the composition says "
                f"{dict(composition.sha256[name])}. Get that version, or compose anew."
            )
    rows = sources.rows()
    public_rows = rows | {name: row for name, row in changed.items() if name in rows}
    state = dict(rows)
    state |= {name: tensor for _, name, tensor in sources.tensors(public_rows)}
    for name, row in changed.items():
        if ".router." not in name or name not in state or state[name].shape != row.shape:
            raise ValueError(f"{folder.path / ROUTER_FILE}: {name!r} {list(row.shape)} is no row of this model.")
    return state | changed


def save_composition(
    model: Any,
    out: str | Path,
    *,
    sources: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    hub: HubAccess | None = None,
) -> Path:
    """Writes `model` by reference; see `FlexMoePreTrainedModel.save_composition`."""
    target = check_new_folder(out, overwrite)
    found = _find_sources(model.config, sources or {}, hub or HubAccess())
    check_apart(target, *(source.path for source in found.values()))
    opened = Sources(
        model.config, found[PUBLIC].path, {name: source.path for name, source in found.items() if name != PUBLIC}
    )
    rows = _changed_rows(model, opened)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    with atomic_folder(target, overwrite) as folder:
        composition = Composition(
            Reference.of(found[PUBLIC], target),
            {name: Reference.of(source, target) for name, source in found.items() if name != PUBLIC},
            {name: package.manifest.sha256 for name, package in opened.packages.items()},
            _write_router(folder, rows),
        )
        config.composition = composition.to_dict()
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        (folder / CARD_FILE).write_text(_card(config, composition), encoding="utf-8")
        model.save_code(folder)
        config.save_pretrained(folder)  # last: a folder without it does not load
    return target


def _find_sources(config: FlexMoeConfig, given: Mapping[str, str | Path], hub: HubAccess) -> dict[str, ResolvedFolder]:
    """Where "public" (the dense anchor) and every expert come from: as given, else as the config records."""
    if strangers := [name for name in given if name not in config.expert_names]:
        raise ValueError(f"sources names {strangers}, which this model has not: it has {config.expert_names}.")
    if not (config.anchor or {}).get("fingerprint"):
        raise ValueError(
            "The anchor of this model has no fingerprint, so nobody could tell whether it is the right one: graft it "
            "with `flexmoe graft`, which makes one, or save the whole model with save_pretrained."
        )
    known = {record["name"]: record.get("source") for record in config.expert_records} | {PUBLIC: config.anchor}
    found, lacking = {}, []
    for name in config.expert_names:
        recorded = known[name] or {}
        if name in given:
            found[name] = hub.resolve(given[name])
        elif recorded.get("repo"):
            found[name] = hub.resolve(recorded["repo"], recorded.get("revision"))
        else:
            lacking.append(name)
    if lacking:
        raise ValueError(
            f"Nothing says where {lacking} come from, and a composition only names its parts. Give folders or Hub "
            f'ids, sources={{"{lacking[-1]}": ...}}: for "{PUBLIC}" the dense checkpoint that was grafted, for an '
            "expert its package (save_expert makes one). Or save the whole model with save_pretrained."
        )
    return found


@torch.no_grad()
def _changed_rows(model: Any, sources: Sources) -> dict[str, Tensor]:
    """The router rows of `model` that are not what its sources say.

    Raises:
        ValueError: another tensor is not what its source says, so a reference to it would be another model.
    """
    live = _plain_tensors(model)
    headless = model.get_output_embeddings() is None
    public_rows = {name: live[name].float().cpu() for name in sources.rows() if name in live}
    changed: dict[str, Tensor] = {}
    modified: dict[str, str] = {}
    zeros = ((PUBLIC, name, row) for name, row in sources.rows().items())
    for stream in (zeros, sources.tensors(public_rows)):
        for owner, name, tensor in stream:
            ours = live.pop(name, None)
            if ours is None and headless and owner == PUBLIC:
                continue
            if f".router.{owner}." in name and ours is not None:
                if not torch.equal(ours.float().cpu(), tensor):
                    changed[name] = ours.float().cpu()
            elif ours is None or not torch.equal(tensor.to(ours.dtype), ours.cpu()):
                modified.setdefault(owner, name)
    computed = {name for name, _ in model.named_buffers()} | set(model.all_tied_weights_keys)
    if strange := sorted(set(live) - computed):
        modified.setdefault("the model", strange[0])
    if modified:
        raise ValueError(
            f"{', '.join(modified)}: not what their sources hold (such as {next(iter(modified.values()))!r}), so a "
            "composition by reference would be another model. If an expert was trained on, make a package of it with "
            "save_expert (and push it) and name that in sources=; merge adapters first. If the anchor was changed, or "
            "all was loaded in a dtype in which the sources lose bits, save the whole model with save_pretrained."
        )
    return changed


def _plain_tensors(model: Any) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if type(tensor) is not Tensor or tensor.device.type == "meta":
            raise ValueError(
                f"{name!r} is a {type(tensor).__name__} on {tensor.device}: a quantised, sharded or offloaded model "
                "can't be compared with its sources. Load it plainly and save the composition of that."
            )
    return state


def _write_router(folder: Path, rows: Mapping[str, Tensor]) -> str | None:
    if not rows:
        return None
    written = write_checkpoint(
        folder, [source_from_tensor(name, row) for name, row in rows.items()], stem="router", hash_files=True
    )
    return written.files[ROUTER_FILE]


def _read_router(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    if sha256 is None:
        return {}
    path = file_inside(folder, ROUTER_FILE)
    data = read_regular_file(path, max_bytes=_ROUTER_BYTES)
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{path}: its SHA-256 is {digest}, config.json says {sha256}. It was damaged or changed.")
    return {name: row.to(torch.float32) for name, row in load_safetensors(data).items()}


def _card(config: FlexMoeConfig, composition: Composition) -> str:
    references = {PUBLIC: composition.anchor, **composition.experts}
    repositories = [entry.repo for entry in references.values() if entry.repo]
    fields: dict[str, Any] = {"library_name": "flexmoe", "tags": ["flexmoe", "flexmoe-composition"]}
    if repositories:
        fields["base_model"] = repositories
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in fields.items())
    parts = "\n".join(
        f"| {name} | {entry.repo or entry.folder} | {entry.revision or ''} |" for name, entry in references.items()
    )
    return f"""---
{front}---

# A composition of {len(composition.experts)} expert(s)

This folder holds no weights. It names a dense anchor and the packages of its experts; loading it fetches them, checks
the anchor by its fingerprint and each expert by the SHA-256 of its files, and gives one model.

| part | from | commit |
|---|---|---|
{parts}

The anchor's fingerprint is `{(config.anchor or {}).get("fingerprint")}`.

```python
import flexmoe  # or trust_remote_code=True below, without the package
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this-folder")
model.save_pretrained("merged")  # the same model with its weights, which needs none of the sources
```

An owner who takes a repository away takes the expert out of every later load of this folder. A merged copy, and a copy
in somebody's cache, cannot be recalled.
"""


__all__ = [
    "Composition",
    "HubAccess",
    "Reference",
    "check_whole",
    "load_arguments",
    "pull_composition",
    "save_composition",
]
