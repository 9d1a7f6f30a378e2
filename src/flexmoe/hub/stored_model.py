"""A stored FlexMoE checkpoint, from a folder or the Hub, opened without building the model.

Does not cover compositions (they hold no weights), quantised checkpoints, or live models.
"""

from pathlib import Path

from flexmoe.hub.client import resolve_folder
from flexmoe.io.folders import file_inside
from flexmoe.io.package_config import ExpertPackageConfig
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.packages.package import CONFIG_FILE
from flexmoe.packages.quantization import check_unquantized


class StoredModel:
    """A FlexMoE checkpoint: its folder, config and tensors.

    Args:
        source: a folder or a Hub id.
        task: the operation, for error messages that end in "cannot be `task`".

    Attributes:
        folder: the local folder.
        config: the model's config.
        tensors: its weight files.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is an expert package, not a FlexMoE model, a composition, or quantised; or a file is a link out
            of the folder.
    """

    def __init__(self, source: str | Path, task: str = "changed on disk"):
        self.folder = resolve_folder(source).path
        if not (self.folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{source} is not a model folder: it has no {CONFIG_FILE}.")
        model_type = read_json_object(self.folder / CONFIG_FILE).get("model_type")
        if model_type == ExpertPackageConfig.model_type:
            raise ExpertPackageConfig.error(source)
        if model_type != FlexMoeConfig.model_type:
            raise ValueError(
                f"{source} is a {model_type!r} model, not a FlexMoE model. Convert it with `flexmoe graft`."
            )
        self.config = FlexMoeConfig.from_pretrained(self.folder)
        if self.config.composition is not None:
            raise ValueError(
                f"{source} is a composition, which refers to its parts and holds no weights. "
                "`flexmoe compose --by-reference` accepts it; for everything else merge it first, with "
                "AutoModelForCausalLM.from_pretrained(composition).save_pretrained(folder)."
            )
        check_unquantized(self.config, source, task)
        self.tensors = CheckpointFolder(self.folder)
        for name in (CONFIG_FILE, *self.tensors.files):  # what a link leads to would be written elsewhere
            file_inside(self.folder, name)


__all__ = ["CONFIG_FILE", "StoredModel"]
