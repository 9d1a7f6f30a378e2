"""The `config.json` of an expert package, which tells the Auto classes and the Hub that it is not a model.

Does not cover the manifest, which describes the expert (`flexmoe.packages.manifest`).
"""

from typing import Any, NoReturn

from transformers import PreTrainedConfig


class ExpertPackageConfig(PreTrainedConfig):
    """The `config.json` of an expert package: tells the Auto classes and the Hub that this is not a model."""

    model_type = "flexmoe_expert"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NoReturn:
        """Always raises ValueError."""
        raise cls.error(kwargs.get("name_or_path", "PACKAGE"))

    @classmethod
    def error(cls, source: Any) -> ValueError:
        """The error for loading the package `source` as a model."""
        return ValueError(
            f"{source} is an expert package, not a model. Load the model that it is for, and add it: "
            f'model.add_expert("{source}"); or write both as one checkpoint with `flexmoe compose`.'
        )


__all__ = ["ExpertPackageConfig"]
