"""An expert's modules from a package or from the public network, and a package's tensors from an expert's modules.

New modules are plain ones of the anchor's class, built anew, because the live ones may carry hooks, adapters or
quantised weights; a copy of a quantised public network alone is quantised, too. Nothing here changes a model. Does not
cover making them part of one (`lifecycle_flexmoe`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters_flexmoe import beneath_adapter
from .anchors_flexmoe import build_on_meta
from .configuration_flexmoe import PUBLIC, FlexMoeConfig
from .experts_flexmoe import FlexMoeBlock, floating_dtype, make_expert, router_row
from .finite_flexmoe import all_finite
from .hub_flexmoe import HubAccess
from .low_rank_flexmoe import LowRankDelta, LowRankExpert, packed_name
from .manifest_flexmoe import ExpertManifest
from .packages_flexmoe import PACKAGE_FILES, ExpertPackage
from .parallel_flexmoe import whole
from .quantization_flexmoe import copied_quantized, has_quantized_weights
from .trust_flexmoe import TrustPolicy, resolve_policy
from .widths_flexmoe import intermediate_size

ExpertPart = tuple[nn.Module, nn.Linear]
"""An expert in one layer: its network and its router row."""


def fresh_networks(config: FlexMoeConfig) -> list[nn.Module]:
    """The anchor's networks without weights, one per layer."""
    dense, sites = build_on_meta(config.anchor_config)
    return [site.ffn(dense) for site in sites]


def fresh_experts(
    config: FlexMoeConfig, record: Mapping[str, Any], networks: Sequence[nn.Module] | None = None
) -> list[nn.Module]:
    """An expert's networks without weights, one per layer, beside `networks` (by default `fresh_networks`)."""
    hidden_size = config.get_text_config().hidden_size
    networks = fresh_networks(config) if networks is None else networks
    return [make_expert(ffn, record, layer=layer, hidden_size=hidden_size) for layer, ffn in enumerate(networks)]


def parts_from_public(blocks: Sequence[FlexMoeBlock], networks: Sequence[nn.Module]) -> list[ExpertPart]:
    """What computes as the public networks do, with rows of zeros.

    Args:
        networks: a fresh expert's (`fresh_experts`): of kind "full", they become copies of the public ones.
    """
    parts = []
    for block, network in zip(blocks, networks, strict=True):
        public = block.experts[PUBLIC]
        if isinstance(network, LowRankExpert):
            _start(network, _home(block), floating_dtype(public))
        elif has_quantized_weights(public):
            network = copied_quantized(public, network)
        else:
            state = {key: _plain(public, key).clone() for key in network.state_dict()}
            network.load_state_dict(state, assign=True)
        parts.append((network, _fresh_row(block)))
    return parts


def parts_from_package(
    blocks: Sequence[FlexMoeBlock], networks: Sequence[nn.Module], package: ExpertPackage
) -> list[ExpertPart]:
    """The package's networks and rows, on the devices and in the dtypes of the public ones.

    Args:
        networks: a fresh expert's, as the package's record describes it; the tensors go there.

    Raises:
        ValueError: a tensor is missing, has no place in these networks, has another shape, or holds numbers that are
            too large for the dtype.
    """
    parts = [(network, _fresh_row(block)) for block, network in zip(blocks, networks, strict=True)]
    places: dict[str, tuple[FlexMoeBlock, nn.ModuleDict, nn.Module, str]] = {}
    for block, (network, row) in zip(blocks, parts, strict=True):
        at = f"layers.{block.layer_index}"
        for key in network.state_dict():
            places[f"{at}.ffn.{name_in_package(network, key)}"] = (block, block.experts, network, key)
        places |= {f"{at}.router.{key}": (block, block.router, row, key) for key in row.state_dict()}
    _check_shapes(package, {name: module.state_dict()[key].shape for name, (_, _, module, key) in places.items()})
    for name, tensor in package.tensors():
        block, beside, module, key = places[name]
        _assign(module, key, _moved(tensor, block, beside[PUBLIC], f"{package.folder}: {name!r}"))
    return parts


def _check_shapes(package: ExpertPackage, wanted: Mapping[str, torch.Size]) -> None:
    """By the headers alone: a stranger's tensor may be too large to be read."""
    for name, info in package.infos.items():
        if name not in wanted:
            raise ValueError(f"{package.folder}: {name!r} has no place in this model's networks.")
        if info.shape != tuple(wanted[name]):
            raise ValueError(
                f"{package.folder}: {name} has shape {list(info.shape)}; this model's networks have "
                f"{list(wanted[name])}."
            )
    if missing := sorted(wanted.keys() - package.infos.keys()):
        raise ValueError(f"{package.folder} lacks {len(missing)} tensors, for example {missing[0]!r}.")


def name_in_package(network: nn.Module, key: str) -> str:
    """What a package calls the tensor `key` of an expert's network, after `layers.<i>.ffn.`."""
    return packed_name(key) if isinstance(network, LowRankExpert) else key


def public_widths(config: FlexMoeConfig, networks: Sequence[nn.Module]) -> list[int]:
    """The intermediate sizes of the anchor's networks."""
    hidden_size = config.get_text_config().hidden_size
    return [intermediate_size(network, hidden_size) for network in networks]


def package_record(manifest: ExpertManifest, widths: Sequence[int]) -> dict[str, Any]:
    """The record of a package in the config of a model whose public networks have these widths.

    The expert's own widths are in it if they are others.
    """
    record, own = manifest.record(), manifest.ffn["intermediate"]
    own = own if isinstance(own, list) else [own] * len(widths)
    return record if manifest.kind != "full" or own == list(widths) else {**record, "intermediate": own}


def open_package(
    source: str | Path | ExpertPackage,
    revision: str | None = None,
    *,
    hub: HubAccess | None = None,
    policy: TrustPolicy | str | Path | None = None,
    is_repo: bool = False,
) -> tuple[ExpertPackage, dict[str, str | None] | None]:
    """Opens a folder or a Hub id; also says where on the Hub it came from (`repo`, `revision`), if it did.

    Args:
        policy: whose packages are let in, as `resolve_policy` takes it.
        is_repo: `source` is a Hub id, also where a folder here is called so.

    Raises:
        FileNotFoundError: no such folder or repository, or it is no expert package.
        PackageError: the package is not what its manifest says, or the policy does not let it in
            (`UntrustedPackageError`).
        PermissionError, ConnectionError: as `resolve_folder`.
    """
    if not isinstance(source, str | Path):  # an ExpertPackage, perhaps of another copy of this code (remote code)
        _check_trust(source, None, policy)
        return source, None
    # owned: who took a repository away has withdrawn the expert, whatever is in the cache
    found = (hub or HubAccess()).resolve(source, revision, owned=True, allow_patterns=PACKAGE_FILES, is_repo=is_repo)
    if found.repo is None:
        package = ExpertPackage.open(found.path)
        _check_trust(package, None, policy)
        return package, None
    try:
        package = ExpertPackage.open(found.path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub repository {found.repo!r} is not an expert package, or not all of one ({error})"
        ) from error
    _check_trust(package, found.repo, policy)
    return package, {"repo": found.repo, "revision": found.revision}


def check_anchor(config: FlexMoeConfig, manifest: ExpertManifest) -> None:
    """Checks that an expert was made for the anchor of this model.

    Raises:
        ValueError: its fingerprint is another one; both are in the message.
    """
    check_fingerprint((config.anchor or {}).get("fingerprint"), manifest)


def check_fingerprint(ours: str | None, manifest: ExpertManifest) -> None:
    """As `check_anchor`, of an anchor with the fingerprint `ours`."""
    theirs = manifest.anchor.get("fingerprint")
    if ours != theirs:
        raise ValueError(
            f"Expert {manifest.name!r} was made for another anchor: its fingerprint is {theirs}, this model's is "
            f"{ours}. Use it with the anchor that it names ({manifest.anchor.get('repo') or 'no repository given'})."
        )


def check_layers(layers: Sequence[int], manifest: ExpertManifest) -> None:
    """Checks that an expert has a network for each of these layers, and no other.

    Raises:
        ValueError: its layers are others.
    """
    if manifest.layers != list(layers):
        theirs, ours = (str(list(numbers))[:200] for numbers in (manifest.layers, layers))
        raise ValueError(f"Expert {manifest.name!r} has the layers {theirs}; this model has {ours}.")


def expert_tensors(
    blocks: Sequence[FlexMoeBlock], name: str, networks: Sequence[nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the expert `name`, called as in a package, whole and on the CPU; rows in float32.

    Args:
        networks: a fresh expert's, of the same record: what its tensors must be.

    Raises:
        ValueError: the expert holds other tensors than its plain network and row (an adapter or a parametrisation is
            in it), or quantised ones.
    """
    for block, network in zip(blocks, networks, strict=True):
        at = f"layers.{block.layer_index}"
        if has_quantized_weights(block.experts[name]):
            raise ValueError(
                f"Expert {name!r} is quantised: what it holds is no longer what its owner made, and a package would "
                "pass it off as that. Load the model without quantization_config, and save the expert from there."
            )
        for part, plain in ((block.experts[name], network), (block.router[name], _fresh_row(block))):
            if strange := sorted(set(part.state_dict()) ^ set(plain.state_dict())):
                raise ValueError(
                    f"Expert {name!r} differs from its plain modules in {strange[:3]} ...: an adapter or a "
                    "parametrisation is in it. Merge it in or take it off before saving (PEFT: merge_and_unload)."
                )
        for key in network.state_dict():
            inside = name_in_package(network, key)
            yield f"{at}.ffn.{inside}", _plain(block.experts[name], key).cpu().contiguous()
        for key in block.router[name].state_dict():
            yield f"{at}.router.{key}", _plain(block.router[name], key).float().cpu()


def expert_manifest(
    config: FlexMoeConfig, networks: Sequence[nn.Module], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ExpertManifest:
    """The manifest of an expert with this record and these tensors.

    Args:
        networks: the anchor's, one per layer; an expert of another width has it in its record.
    """
    anchor_config: Any = config.anchor_config
    anchor = {**(config.anchor or {}), "model_type": anchor_config.model_type}
    dtypes = {str(value.dtype).removeprefix("torch.") for name, value in tensors.items() if ".ffn." in name}
    return ExpertManifest(
        **{key: value for key, value in record.items() if key not in ("sha256", "source", "intermediate")},
        layers=list(range(len(networks))),
        ffn={
            "class": type(networks[0]).__name__,
            "hidden": config.get_text_config().hidden_size,
            "intermediate": record.get("intermediate") or public_widths(config, networks),
        },
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        anchor={key: anchor.get(key) for key in ("repo", "revision", "fingerprint", "model_type")},
    )


def _check_trust(package: ExpertPackage, origin: str | None, policy: TrustPolicy | str | Path | None) -> None:
    if (followed := resolve_policy(policy)) is not None:
        followed.check(package, origin)


def _plain(module: nn.Module, key: str) -> Tensor:
    """The tensor `key` of a live module, whole, without the adapter around it; computed, if it is parametrised.

    Raises:
        ValueError: the module has no such tensor, or it lies nowhere that can be read.
    """
    owner_name, _, leaf = key.rpartition(".")
    owner = module
    try:
        for name in owner_name.split(".") if owner_name else ():
            owner = beneath_adapter(getattr(owner, name))
        owner = beneath_adapter(owner)
        value = getattr(owner, leaf).detach()
    except AttributeError as error:
        raise ValueError(
            f"{type(module).__name__} has no tensor {key!r} any more: take off what is around it."
        ) from error
    if not value.is_meta:
        return whole(value)
    for hook in _offload_hooks(owner):  # it knows where the tensor lies
        if leaf in (hook.weights_map or ()):
            return hook.weights_map[leaf].to(hook.execution_device)
    raise ValueError(f"{type(module).__name__}: {key!r} is on the meta device and cannot be read.")


def _start(network: LowRankExpert, device: torch.device, dtype: torch.dtype | None) -> None:
    """Gives a low-rank expert without weights those with which training begins."""
    network.to_empty(device=device)
    if dtype is not None:
        network.to(dtype)
    for delta in network.modules():
        if isinstance(delta, LowRankDelta):
            delta.reset_parameters()


def _fresh_row(block: FlexMoeBlock) -> nn.Linear:
    return router_row(block.hidden_size, device=_home(block), dtype=floating_dtype(block.router[PUBLIC]))


def _home(block: FlexMoeBlock) -> torch.device:
    """Where the block computes; under offload its parameters lie on the meta device in between."""
    device = next(block.parameters()).device
    if device.type != "meta":
        return device
    homes = (hook.execution_device for module in block.modules() for hook in _offload_hooks(module))
    return torch.device(next((home for home in homes if home is not None), device))


def _offload_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that move its tensors for the time of a call."""
    hook = getattr(module, "_hf_hook", None)
    return [part for part in getattr(hook, "hooks", (hook,)) if hasattr(part, "weights_map")]


def _moved(tensor: Tensor, block: FlexMoeBlock, public: nn.Module, what: str) -> Tensor:
    """`tensor` where the public module is, in its dtype; in the tensor's own beside a quantised one."""
    return cast_finite(tensor, floating_dtype(public) or tensor.dtype, what).to(_home(block))


def cast_finite(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A tensor of finite numbers in another floating-point dtype.

    Raises:
        ValueError: one of them is too large for it; `what` names the tensor.
    """
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not all_finite(cast):
        raise ValueError(f"{what} holds numbers too large for {dtype}, the dtype of this anchor.")
    return cast


def _assign(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Puts `tensor` where the module has `key`."""
    owner_name, _, leaf = key.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(tensor) if is_parameter else tensor)


@contextmanager
def naming(*packages: ExpertPackage) -> Iterator[None]:
    """What keeps packages out of a model names their folders, whoever noticed it."""
    folders = [str(package.folder) for package in packages]
    try:
        yield
    except ValueError as error:
        if not folders or any(folder in str(error) for folder in folders):
            raise
        raise ValueError(f"{', '.join(folders)}: {error}") from error


__all__ = [
    "ExpertPart",
    "cast_finite",
    "check_anchor",
    "check_fingerprint",
    "check_layers",
    "expert_manifest",
    "expert_tensors",
    "fresh_experts",
    "fresh_networks",
    "name_in_package",
    "naming",
    "open_package",
    "package_record",
    "parts_from_package",
    "parts_from_public",
    "public_widths",
]
