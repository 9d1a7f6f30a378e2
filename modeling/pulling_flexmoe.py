"""Loading a composition: its parts are pulled at the same time, checked as they are read, and make one state dict.

Online, each load asks the Hub once per expert whether it may still be had, also where it lies in the cache: who took a
repository away, or closed it, has withdrawn the expert. Not here: the files of a composition (`composition_flexmoe`),
and what their tensors are (`sources_flexmoe`).
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from .composition_flexmoe import CONFIG_FILE, GENERATION_FILE, ROUTER_FILE, Composition, read_router
from .configuration_flexmoe import PUBLIC, FlexMoeConfig, drop_experts
from .hub_flexmoe import DOWNLOADED, HubAccess, ResolvedFolder
from .packages_flexmoe import PACKAGE_FILES
from .sources_flexmoe import Sources
from .trust_flexmoe import TrustPolicy, resolve_policy

MISSING_EXPERTS = ("error", "skip")

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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
    """With what transformers' `from_pretrained` loads the composition that `source` is; empty if it is none.

    Args:
        source, config, options: the arguments of `from_pretrained`: the Hub id or folder, the config if the caller has
            one, and the keyword arguments, among them those that say how the Hub is asked.
        missing_experts: "skip" leaves out experts that can't be had, with a warning; "error" names them in an error.
        policy: whose packages are let in, as `resolve_policy` takes it.

    Raises:
        ValueError: as `pull_composition`; the composition lies in a subfolder, or was reached through an adapter;
            or `missing_experts` is none of these.
    """
    if missing_experts not in MISSING_EXPERTS:
        raise ValueError(f"missing_experts={missing_experts!r}: it must be one of {', '.join(MISSING_EXPERTS)}.")
    if source is None or options.get("gguf_file") or not _is_composition(config_class, source, config, options):
        yield {}
        return
    if options.get("subfolder"):
        raise ValueError(f"{source}: a composition in a subfolder; it must have a folder or repository of its own.")
    if (options.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        raise ValueError(f"{source} is a composition: load it on its own, then the adapter with model.load_adapter.")
    hub = HubAccess(**{field.name: options[field.name] for field in fields(HubAccess) if field.name in options})
    revision = None if Path(source).is_dir() else options.get("revision")
    folder = hub.resolve(source, revision, allow_patterns=(CONFIG_FILE, GENERATION_FILE, ROUTER_FILE))
    given = config if isinstance(config, PreTrainedConfig) else None  # of either copy of FlexMoeConfig in remote code
    whole = copy.deepcopy(given) if given is not None else config_class.from_pretrained(config or folder.path)
    everyone = list(whole.expert_names)
    with tempfile.TemporaryDirectory(prefix="flexmoe-") as reduced:
        arguments: dict[str, Any] = {"state_dict": pull_composition(whole, folder, hub, missing_experts, policy)}
        arguments["config"] = config or source
        if whole.expert_names != everyone:  # what transformers builds must be who is there
            arguments["config"] = whole if given is not None else reduced
            whole.save_pretrained(reduced)
        if (folder.path / GENERATION_FILE).is_file() and options.get("generation_config") is None:
            arguments["generation_config"] = GenerationConfig.from_pretrained(folder.path)
        yield arguments


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


def pull_composition(
    config: FlexMoeConfig,
    folder: ResolvedFolder,
    hub: HubAccess,
    missing_experts: str = "error",
    policy: TrustPolicy | str | Path | None = None,
) -> dict[str, Tensor]:
    """The state dict of the composition in `folder`, in the dtypes of its sources, rows in float32.

    Args:
        config: of the composition; with `missing_experts="skip"`, those that can't be had are taken out of it.

    Raises:
        ValueError: a source is not the one that was saved, a file is not what it says, or the policy does not let a
            package in (`UntrustedPackageError`).
        FileNotFoundError, PermissionError, ConnectionError: a source is gone, gated, out of reach (`resolve_folder`).
    """
    composition = Composition.from_config(config)
    changed = read_router(folder.path, composition.router_sha256, config)
    anchor, packages = _pull_parts(composition, folder, hub)
    if missing := {name: found for name, found in packages.items() if isinstance(found, OSError)}:
        _leave_out(config, folder, missing, missing_experts)
        changed = {name: row for name, row in changed.items() if not _is_row_of(name, missing)}
    present = {name: found.path for name, found in packages.items() if not isinstance(found, OSError)}
    sources, followed = Sources(config, anchor.path, present), resolve_policy(policy)
    for name, package in sources.packages.items():
        if package.manifest.sha256 != composition.sha256[name]:
            raise ValueError(
                f"The package of the expert {name!r} in {package.folder} is not the one that this composition was "
                f"saved with: its weights have the SHA-256 {package.manifest.sha256}, the composition says "
                f"{dict(composition.sha256[name])}. Get that version, or compose anew."
            )
        if followed is not None:
            followed.check(package, composition.experts[name].repo)
    rows = sources.rows()
    public_rows = rows | {name: row for name, row in changed.items() if name in rows}
    state = dict(rows)
    state |= {name: tensor for _, name, tensor in sources.tensors(public_rows)}
    for name, row in changed.items():
        if ".router." not in name or name not in state or state[name].shape != row.shape:
            raise ValueError(f"{folder.path / ROUTER_FILE}: {name!r} {list(row.shape)} is no row of this model.")
    return state | changed


def _pull_parts(
    composition: Composition, folder: ResolvedFolder, hub: HubAccess
) -> tuple[ResolvedFolder, dict[str, ResolvedFolder | OSError]]:
    """The anchor's folder, and for each expert its package's, or why that can't be had."""
    wanted = {PUBLIC: composition.anchor.wanted(folder, DOWNLOADED)}
    wanted |= {name: part.wanted(folder, PACKAGE_FILES, owned=True) for name, part in composition.experts.items()}
    found = hub.resolve_all(wanted)
    anchor = found.pop(PUBLIC)
    if isinstance(anchor, OSError):
        raise anchor
    return anchor, found


def _leave_out(
    config: FlexMoeConfig, folder: ResolvedFolder, missing: Mapping[str, OSError], missing_experts: str
) -> None:
    """Takes experts that can't be had out of the config, if that was asked for."""
    source = folder.repo or folder.path
    reasons = "; ".join(f"{name!r}: {error}" for name, error in missing.items())
    first = next(iter(missing.values()))
    withdrawn = all(isinstance(error, FileNotFoundError | PermissionError) for error in missing.values())
    if not withdrawn:  # a Hub that is down has withdrawn nobody
        raise type(first)(f"The composition {source} lacks {len(missing)} of its experts. {reasons}.") from first
    if missing_experts == "error":
        raise type(first)(
            f"The composition {source} lacks {len(missing)} of its experts. {reasons}. If the owner has withdrawn it, "
            'load the model without: from_pretrained(..., missing_experts="skip").'
        ) from first
    drop_experts(config, set(missing))
    warnings.warn(f"Loaded without {', '.join(map(repr, missing))}. {reasons}.", stacklevel=2)


def _is_row_of(name: str, experts: Mapping[str, Any]) -> bool:
    return any(f".router.{expert}." in name for expert in experts)


__all__ = ["MISSING_EXPERTS", "check_whole", "load_arguments", "pull_composition"]
