"""Registration with the Auto classes without importing the model.

The modeling code takes seconds to import, so `import flexmoe` defers it, as `import transformers` does. Does not cover
which classes are registered (`flexmoe/__init__.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig


class LazyModelClass:
    """A proxy of the model class called `name` in the mapping of an Auto class; imports the class on first use."""

    config_class = FlexMoeConfig

    def __init__(self, name: str, module: str = "flexmoe.modeling") -> None:
        self.__name__ = name
        self._from = module

    def __reduce__(self) -> tuple:
        return LazyModelClass, (self.__name__, self._from)  # the mappings must be picklable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model_class()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._model_class(), attribute)

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        return (self._model_class(),)  # subclasses of the proxy derive from the class

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._model_class())

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self._model_class())

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._model_class()

    def __hash__(self) -> int:
        return hash(self._model_class())

    def _model_class(self) -> type:
        return getattr(import_module(self._from), self.__name__)


__all__ = ["LazyModelClass"]
