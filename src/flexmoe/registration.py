"""How the Auto classes know FlexMoE before its code is imported, and cards their templates.

The library's modelling code takes seconds to import, and `from transformers import AutoModelForCausalLM` leaves it for
later; so does `import flexmoe`. Does not cover which classes there are (`flexmoe/__init__.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig


class LazyModelClass:
    """Stands in an Auto class's mapping for the model class called `name`, which is imported when it is used."""

    config_class = FlexMoeConfig

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __reduce__(self) -> tuple:
        return LazyModelClass, (self.__name__,)  # the mappings can be pickled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model_class()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._model_class(), attribute)

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        return (self._model_class(),)  # what derives from this derives from the class

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._model_class())

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self._model_class())

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._model_class()

    def __hash__(self) -> int:
        return hash(self._model_class())

    def _model_class(self) -> type:
        return getattr(import_module("flexmoe.modeling"), self.__name__)


def full_card(kind: str, facts: Mapping[str, Any]) -> str:
    """The card by its template; jinja2 is imported when the first one is written."""
    return import_module("flexmoe.model_cards.rendering").render(kind, facts)


__all__ = ["LazyModelClass", "full_card"]
