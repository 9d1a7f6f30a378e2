"""PEFT adapters on a live model: which of its modules they are around, and where they are checked.

PEFT sets `model.peft_config` once its modules are in place; the property here has `flexmoe.adapters` check them then,
and a forward pass checks adapters that were added later. PEFT's layers are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from .anchors_flexmoe import NameMap
from .configuration_flexmoe import FlexMoeConfig, require_flexmoe
from .experts_flexmoe import FlexMoeBlock

# For type checkers only: at run time the model classes bring PreTrainedModel in themselves.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


def adapters_around(model: nn.Module, parts: Iterable[nn.Module], inside: bool = True) -> set[str]:
    """Names of the adapters around some of these modules, or `inside` of them."""
    found: list[Any] = [model]
    for module in found:  # at each change, where modules() would take long
        found += module._modules.values() if module is not None and module._modules else ()
    kinds = {kind for kind in {module.__class__ for module in found} if hasattr(kind, "adapter_layer_names")}
    if not kinds:
        return set()
    parts = set(parts)
    within = {module for part in parts for module in part.modules()} if inside else set()
    wrappers = {module for module in found if module.__class__ in kinds}
    around = [w for w in wrappers if w in within or not parts.isdisjoint(w.modules())]
    return {adapter for wrapper in around for adapter in adapters_of(wrapper)}


def parts_of_expert(blocks: Iterable[FlexMoeBlock], name: str) -> list[nn.Module]:
    """The modules of the expert `name`: its FFN and router row of each layer."""
    return [part for block in blocks for part in (block.experts[name], block.router[name])]


def beneath_adapter(module: nn.Module) -> nn.Module:
    """The module inside PEFT's layer, or `module` itself if it is none."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


def is_wrapper(module: Any) -> bool:
    """Whether a module is one of PEFT's layers."""
    return hasattr(type(module), "adapter_layer_names")


def adapters_of(wrapper: Any) -> set[str]:
    """The names of the adapters in one of PEFT's layers."""
    found = [getattr(wrapper, attribute, None) for attribute in wrapper.adapter_layer_names]
    return {adapter for each in found if isinstance(each, nn.ModuleDict | nn.ParameterDict) for adapter in each}


def refuse_wrapped(model: nn.Module, state_dict: dict[str, Any] | None) -> None:
    """Raises ValueError if PEFT has wrapped layers, whose tensors would be saved under names that nothing loads."""
    if state_dict is None and any(map(is_wrapper, model.modules())):
        raise ValueError(
            f"PEFT has wrapped layers of this model (adapters: {sorted(getattr(model, 'peft_config', ()))}). Save the "
            "adapters alone with the PeftModel's own save_pretrained, or merge them in first (merge_and_unload, or "
            "unload without them) and save what that returns."
        )


class AdapterWatch(_Model):
    """The part of a FlexMoE model that checks adapters as they are added."""

    config: FlexMoeConfig
    anchor_names: NameMap
    _blocks: dict[str, FlexMoeBlock]

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
        self._find_blocks()

    def _find_blocks(self) -> None:
        """Finds the blocks again: a merged copy of one (modules_to_save) has taken its place."""
        found: dict[str, Any] = {name: beneath_adapter(self.get_submodule(name)) for name in self._blocks}
        self._blocks = found

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """What PEFT replaces in the names of an adapter's tensors: an adapter of the dense anchor fits its FlexMoE."""
        return self.anchor_names.replacements()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in torch. ValueError: it holds tensors of an adapter that no module here has; PEFT ignores them."""
        if "_adapter_configs" in self.__dict__:
            _checks().check_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_adapters(self) -> None:
        """Checks each adapter once, see `flexmoe.adapters.check_adapters`; without new adapters it costs nothing."""
        configs = self.__dict__.get("_adapter_configs", {})
        checked = self.__dict__.get("_adapters_checked", {})
        if any(checked.get(adapter) is not config for adapter, config in configs.items()):
            _checks().check_adapters(self)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As in transformers, but refuses before any module is changed; see `flexmoe.adapters.check_adapter`."""
        _checks().check_adapter(self, adapter_name or "default", adapter_config)
        super().add_adapter(adapter_config, adapter_name)

    def load_adapter(
        self, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but an adapter that is incomplete is removed again; see `flexmoe.adapters`."""
        given = (peft_model_id, adapter_name, *args)
        return _checks().load_adapter(self, super().load_adapter, adapter_name or "default", *given, **kwargs)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """As in transformers, also where adapters train router rows of different experts."""
        _checks().set_adapter(self, adapter_name)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As in transformers; the last one also removes PEFT's layers, so tensors have their names again."""
        super().delete_adapter(adapter_names)
        if not hasattr(self, "peft_config"):
            _checks().unwrap(self)
            self._find_blocks()


def _checks() -> Any:
    return require_flexmoe("adapters", "a PEFT adapter on a FlexMoE")
