"""Checks of PEFT adapters on a live model: which owners' modules they change, and whether all of them is loaded.

PEFT does not report what matters in a model of several owners: one target may match modules of all owners, and an
adapter for two experts loads where only one of them exists. The model's methods of these names call this module
(`flexmoe.modeling.adapters_flexmoe`). PEFT's layers are recognised by their attributes.

Does not cover making a config (`flexmoe.peft`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import chain
from typing import Any

from torch import Tensor, nn

from flexmoe.modeling.adapters_flexmoe import (
    adapters_around,
    adapters_of,
    beneath_adapter,
    is_wrapper,
    parts_of_expert,
)
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX

_PATTERN = re.compile(r"\.\*.*\\\.experts\\\.\(\?:(?P<names>[^()]+)\)\\\.\(\?:[^()]+\)")
_ROW = re.compile(r"(?:.*\.)?router\.(?P<name>[a-z][a-z0-9_-]*)")
_WORD = re.compile(r"[a-z][a-z0-9_-]*")


def target_pattern(names: Iterable[str], modules: Iterable[str], blocks: Iterable[str] | None = None) -> str:
    """The pattern for PEFT's `target_modules` that matches `modules` of the experts `names` and nothing else.

    PEFT matches whole module names, so "math" does not match "math-2". Other experts are not part of it, nor layers
    unless `blocks` are given ("3.mlp"): a saved adapter fits any composition that has `names`.
    """
    of_experts, of_modules, of_blocks = ("|".join(map(re.escape, part)) for part in (names, modules, blocks or ()))
    layers = rf"\.(?:{of_blocks})" if blocks else ""
    return rf".*{layers}\.experts\.(?:{of_experts})\.(?:{of_modules})"


def check_adapters(model: Any) -> None:
    """Checks the adapters of `model.peft_config` that were not checked yet.

    Raises:
        ValueError: as `check_adapter`.

    Warns:
        UserWarning: an adapter changes several owners' modules without naming them.
    """
    configs = model.__dict__.get("_adapter_configs", {})
    checked = model.__dict__.get("_adapters_checked", {})
    new = {adapter: config for adapter, config in configs.items() if checked.get(adapter) is not config}
    for adapter, config in new.items():
        check_adapter(model, adapter, config)
    model.__dict__["_adapters_checked"] = dict(configs)
    for adapter, config in new.items():
        _warn_of_many_owners(model, adapter, config)


def check_adapter(model: Any, adapter: str, config: Any) -> None:
    """Raises ValueError if an adapter has the name of an expert, was made for one that the model does not have, or
    confuses PEFT: it would take an expert for other modules, or copy modules that experts are taken from."""
    names = model.config.expert_names
    _check_names_of_modules(model, adapter, config)
    if adapter in names:
        raise ValueError(
            f"The adapter {adapter!r} has the name of an expert, and PEFT confuses the two when it loads what it "
            f"saved. Load the model again and choose another adapter name, for example {adapter + '-lora'!r}: "
            "get_peft_model and add_adapter take adapter_name."
        )
    if absent := [name for name in _made_for(config) if name not in names]:
        raise ValueError(
            f"The adapter {adapter!r} was made for the expert(s) {absent}, which this model does not have; it has "
            f"{names}. Add them first (add_expert), under these names, to a model without this adapter."
        )


def check_state_dict(model: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Raises ValueError if `state_dict` holds tensors of an adapter that no module here has; PEFT ignores them."""
    marks = _marks(getattr(model, "peft_config", {}))
    names = [key for key in state_dict if key.startswith(prefix) and any(mark in key for mark in marks)]
    known = {prefix + name for name, _ in chain(model.named_parameters(), model.named_buffers())} if names else set()
    if lost := [name for name in names if name not in known]:
        raise ValueError(
            f"{len(lost)} tensors of the adapter have no place in this model, for example {lost[0]!r}. One of the "
            "dense anchor is loaded by PeftModel.from_pretrained, or by load_adapter of a PeftModel with "
            "key_mapping=model.anchor_names.replacements() (model: the FlexMoE); its target_modules must not "
            "hold parts of paths to the FFN: up_proj or public.up_proj, not mlp.up_proj."
        )


def load_adapter(model: Any, load: Callable[..., Any], adapter: str, *args: Any, **kwargs: Any) -> Any:
    """Loads with `load` (transformers' `load_adapter`); an adapter that is incomplete is removed again.

    Raises:
        ValueError: as `check_adapter`; the file lacks tensors of the adapter under the names that transformers looks
            for (it does not find DoRA's magnitudes, for example), or holds others.
    """
    # an adapter may contain biases of the layers themselves, which would remain after its removal
    biases = {name: bias.clone() for name, bias in _biases(model)}
    info = load(*args, **kwargs)
    missing = [key for key in getattr(info, "missing_keys", ()) if adapter in key.split(".")]
    lost = list(getattr(info, "unexpected_keys", ()))
    if missing or lost:
        model.delete_adapter(adapter)
        for name, bias in _biases(model):
            bias.copy_(biases[name])
        raise ValueError(
            f"load_adapter found {len(missing)} tensors of the adapter {adapter!r} missing, and {len(lost)} that "
            f"have no place here, for example {min(missing or lost)!r}: it is not loaded. "
            "peft.PeftModel.from_pretrained reads all that PEFT saved."
        )
    return info


def set_adapter(model: Any, adapter_name: list[str] | str) -> None:
    """As in transformers, also where adapters train router rows of different experts.

    Raises:
        ValueError: an unknown adapter.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    known = getattr(model, "peft_config", {})
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Adapter(s) {unknown} not found: this model has {list(known)}.")
    for layer in filter(is_wrapper, model.modules()):
        here = adapters_of(layer)
        is_saved = hasattr(layer, "original_module")  # modules_to_save, which refuses adapters that it does not have
        layer.set_adapter([name for name in names if name in here] if is_saved else names)


def unwrap(model: nn.Module) -> None:
    """Removes PEFT's layers from a model whose last adapter was deleted, so tensors have their names again."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_wrapper(child):
                setattr(parent, name, beneath_adapter(child))


def _check_names_of_modules(model: Any, adapter: str, config: Any) -> None:
    """ValueError: PEFT would take an expert for other modules, or copy a module that experts are taken from."""
    blocks, saved = list(model._blocks), list(getattr(config, "modules_to_save", None) or ())
    targets = getattr(config, "target_modules", None)
    entries = {*saved, *(() if isinstance(targets, str) else targets or ())}
    inside = tuple(f"{block}.{part}." for block in blocks for part in ("experts", "router"))
    others = {path.rpartition(".")[2] for path, _ in model.named_modules() if not f"{path}.".startswith(inside)}
    marked = [name for name in model.config.expert_names if any(mark in name for mark in _marks({adapter: config}))]
    marked = [name for name in marked if _touches(model, adapter, config, name)]
    if alike := [name for name in model.config.expert_names if name in entries & others] or marked:
        raise ValueError(
            f"PEFT cannot tell the expert {alike[0]!r} from other modules or from parameters of the adapter "
            f"{adapter!r}, whose names are alike: rename it first (rename_expert), in a model without adapters."
        )
    containers = [part.removesuffix(".") for part in (ANCHOR_PREFIX, *inside)]
    if path := next((path for path in containers for entry in saved if path.endswith(entry)), None):
        raise ValueError(
            f"The adapter {adapter!r} would train a copy of {path} (modules_to_save), of which FlexMoE needs the "
            f"parts: name experts (flexmoe.expert_lora_config), or whole blocks ({blocks[0].split('.')[-1]!r})."
        )


def _warn_of_many_owners(model: Any, adapter: str, config: Any) -> None:
    touched = [name for name in model.config.expert_names if _touches(model, adapter, config, name)]
    if len(touched) > 1 and not set(touched) <= _named(config):
        warnings.warn(
            f"The adapter {adapter!r} changes modules of {len(touched)} owners at once: {touched}, networks or "
            "router rows. What it learns is then in all of them, and none can be removed while it exists. For "
            f"one expert use flexmoe.expert_lora_config(model, {touched[-1]!r}); for several on purpose pass a "
            "list of their names.",
            stacklevel=2,
        )


def _touches(model: Any, adapter: str, config: Any, name: str) -> bool:
    parts = parts_of_expert(model.flexmoe_blocks(), name)
    biases = (key for part in parts for key, _ in part.named_parameters() if key.endswith("bias"))
    return adapter in adapters_around(model, parts) or (getattr(config, "bias", None) == "all" and any(biases))


def _made_for(config: Any) -> list[str]:
    """The experts that a config of `flexmoe.expert_lora_config` was made for; empty for other configs."""
    target = getattr(config, "target_modules", None)
    matches = [_PATTERN.fullmatch(target)] if isinstance(target, str) else []
    names = [name.replace("\\", "") for match in matches if match for name in match["names"].split("|")]
    rows = [_ROW.fullmatch(entry) for entry in getattr(config, "modules_to_save", None) or ()]
    return list(dict.fromkeys([*names, *(match["name"] for match in rows if match)]))


def _named(config: Any) -> set[str]:
    """The words of a target pattern, which names experts on purpose; a list may result from "all-linear"."""
    target = getattr(config, "target_modules", None)
    return set(_WORD.findall(target.replace("\\", ""))) if isinstance(target, str) else set()


def _biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The biases of a model's layers by their names without adapters; offloaded ones are left out."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not parameter.is_meta:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter.detach()


def _marks(configs: dict[str, Any]) -> set[str]:
    """What the names of these adapters' parameters contain, by PEFT's method: "lora_"."""
    prefixes = import_module("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING if configs else {}
    return {prefixes[kind] for config in configs.values() if (kind := getattr(config, "peft_type", None)) in prefixes}


__all__ = [
    "check_adapter",
    "check_adapters",
    "check_state_dict",
    "load_adapter",
    "set_adapter",
    "target_pattern",
    "unwrap",
]
