"""PEFT adapters on a live model: which owners' modules they change.

PEFT does not report what matters in a model of several owners: one target may match modules of all owners, and an
adapter for two experts loads where only one of them exists. PEFT sets `model.peft_config` once its modules are in
place; the property here checks them then, and a forward pass checks adapters that were added later. Does not cover
making a config (`flexmoe.peft`), and does not import PEFT: its layers are recognised by their attributes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .configuration_flexmoe import FlexMoeConfig
from .experts_flexmoe import FlexMoeBlock

# For type checkers only: at run time the model classes bring PreTrainedModel in themselves.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

_PATTERN = re.compile(r"\.\*\\\.experts\\\.\(\?:(?P<names>[^()]+)\)\\\.\(\?:[^()]+\)")
_ROW = re.compile(r"router\.(?P<name>[a-z][a-z0-9_-]*)")
_WORD = re.compile(r"[a-z][a-z0-9_-]*")


def target_pattern(names: Iterable[str], modules: Iterable[str]) -> str:
    """The pattern for PEFT's `target_modules` that matches `modules` of the experts `names` and nothing else.

    PEFT matches whole module names, so "math" does not match "math-2". Layers and other experts are not part of it: a
    saved adapter fits any composition that has `names`.
    """
    of_experts, of_modules = ("|".join(map(re.escape, part)) for part in (names, modules))
    return rf".*\.experts\.(?:{of_experts})\.(?:{of_modules})"


def row_suffix(name: str) -> str:
    """The entry for PEFT's `modules_to_save` that matches the router row of the expert `name` in each layer."""
    return f"router.{name}"


def adapters_around(blocks: Sequence[FlexMoeBlock], name: str) -> set[str]:
    """Names of the adapters around the modules of the expert `name`, its router rows included."""
    return {adapter for part in _parts(blocks, name) for adapter in _adapters_within(part)}


def beneath_adapter(module: nn.Module) -> nn.Module:
    """The module inside PEFT's layer, or `module` itself if it is none."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


def _is_wrapper(module: Any) -> bool:
    return hasattr(module, "adapter_layer_names")  # every layer of PEFT has it


def _parts(blocks: Sequence[FlexMoeBlock], name: str) -> list[nn.Module]:
    return [part for block in blocks for part in (block.experts[name], block.router[name])]


def _adapters_within(module: nn.Module) -> set[str]:
    found: set[str] = set()
    for part in filter(_is_wrapper, module.modules()):
        for attribute in getattr(part, "adapter_layer_names", ()):
            by_adapter = getattr(part, attribute, None)
            if isinstance(by_adapter, nn.ModuleDict | nn.ParameterDict):
                found |= set(by_adapter.keys())
    return found


def _biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The biases of a model's layers by their names without adapters; offloaded ones are left out."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not parameter.is_meta:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter.detach()


def refuse_wrapped(model: nn.Module, state_dict: dict[str, Any] | None) -> None:
    """Raises ValueError if PEFT has wrapped layers, whose tensors would be saved under names that nothing loads."""
    if state_dict is None and any(map(_is_wrapper, model.modules())):
        raise ValueError(
            f"PEFT has wrapped layers of this model (adapters: {sorted(getattr(model, 'peft_config', ()))}). Save the "
            "adapters alone with the PeftModel's own save_pretrained, or merge them in first (merge_and_unload, or "
            "unload without them) and save what that returns."
        )


class AdapterWatch(_Model):
    """The part of a FlexMoE model that checks adapters as they are added."""

    config: FlexMoeConfig

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the adapters around this model, by name; PEFT sets and deletes it.

        Raises:
            AttributeError: there is none.
        """
        if "_adapter_configs" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no adapters, hence no peft_config.")
        return self.__dict__["_adapter_configs"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        self.__dict__["_adapter_configs"] = configs
        self.check_adapters()

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_adapter_configs"]
        self.__dict__.pop("_adapters_checked", None)

    def check_adapters(self) -> None:
        """Checks each adapter once; without new adapters it costs nothing.

        Raises:
            ValueError: an adapter has the name of an expert, or was made for an expert that this model does not have.

        Warns:
            UserWarning: an adapter changes several owners' modules without naming them.
        """
        configs = self.__dict__.get("_adapter_configs", {})
        checked = self.__dict__.get("_adapters_checked", {})
        if all(checked.get(adapter) is config for adapter, config in configs.items()):
            return
        new = {adapter: config for adapter, config in configs.items() if checked.get(adapter) is not config}
        for adapter, config in new.items():
            self._check_adapter(adapter, config)
        self.__dict__["_adapters_checked"] = dict(configs)
        for adapter, config in new.items():
            self._warn_of_many_owners(adapter, config)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As in transformers, but refuses before any module is changed.

        Raises: as `check_adapters`.
        """
        self._check_adapter(adapter_name or "default", adapter_config)
        super().add_adapter(adapter_config, adapter_name)

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but an adapter that is incomplete is removed again.

        Raises:
            ValueError: as `check_adapters`, or the file lacks tensors of the adapter under the names that transformers
                looks for (it does not find DoRA's magnitudes, for example).
        """
        adapter = adapter_name or "default"
        # an adapter may contain biases of the layers themselves, which would remain after its removal
        biases = {name: bias.clone() for name, bias in _biases(self)}
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        missing = [key for key in getattr(info, "missing_keys", ()) if adapter in key.split(".")]
        if missing:
            self.delete_adapter(adapter)
            for name, bias in _biases(self):
                bias.copy_(biases[name])
            raise ValueError(
                f"load_adapter found {len(missing)} tensors of the adapter {adapter!r} missing, for example "
                f"{min(missing)!r}: it is not loaded. peft.PeftModel.from_pretrained reads all that PEFT saved."
            )
        return info

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """As in transformers, also where adapters train router rows of different experts.

        Raises:
            ValueError: an unknown adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        known = getattr(self, "peft_config", {})
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"Adapter(s) {unknown} not found: this model has {list(known)}.")
        for layer in filter(_is_wrapper, self.modules()):
            here = _adapters_within(layer)
            is_saved = hasattr(
                layer, "original_module"
            )  # modules_to_save, which refuses adapters that it does not have
            layer.set_adapter([name for name in names if name in here] if is_saved else names)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As in transformers; the last one also removes PEFT's layers, so tensors have their names again."""
        super().delete_adapter(adapter_names)
        if not hasattr(self, "peft_config"):
            for parent in list(self.modules()):
                for name, child in list(parent.named_children()):
                    if _is_wrapper(child):
                        setattr(parent, name, beneath_adapter(child))

    def _check_adapter(self, adapter: str, config: Any) -> None:
        names = self.config.expert_names
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

    def _warn_of_many_owners(self, adapter: str, config: Any) -> None:
        blocks = self.flexmoe_blocks()
        touched = [name for name in self.config.expert_names if _touches(adapter, config, blocks, name)]
        if len(touched) > 1 and not set(touched) <= _named(config):
            warnings.warn(
                f"The adapter {adapter!r} changes modules of {len(touched)} owners at once: {touched}, networks or "
                "router rows. What it learns is then in all of them, and none can be removed while it exists. For "
                f"one expert use flexmoe.expert_lora_config(model, {touched[-1]!r}); for several on purpose pass a "
                "list of their names.",
                stacklevel=2,
            )


def _touches(adapter: str, config: Any, blocks: Sequence[FlexMoeBlock], name: str) -> bool:
    if adapter in adapters_around(blocks, name):
        return True
    biases = (key for part in _parts(blocks, name) for key, _ in part.named_parameters() if key.endswith("bias"))
    return getattr(config, "bias", None) == "all" and any(biases)


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
