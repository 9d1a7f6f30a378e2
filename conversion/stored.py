"""A FlexMoE checkpoint on disk, opened for a conversion.

Not here: compositions (they hold no weights), quantised checkpoints, live models.
"""

from pathlib import Path

from flexmoe.modeling.configuration_flexmoe import ExpertPackageConfig, FlexMoeConfig
from flexmoe.modeling.hub_flexmoe import resolve_folder
from flexmoe.modeling.json_flexmoe import read_json_object
from flexmoe.modeling.quantization_flexmoe import check_unquantized
from flexmoe.modeling.tensors_flexmoe import CheckpointFolder

CONFIG_FILE = "config.json"


class StoredModel:
    """A FlexMoE checkpoint: its folder, config and tensors.

    Args:
        source: a folder or a Hub id.
        task: what is to be done with it, as errors say it: "cannot be `task`".

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is an expert package, no FlexMoE, a composition or quantised.
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
                f"{source} is a {model_type!r} model, not a FlexMoE. Make one of it with `flexmoe graft`."
            )
        self.config = FlexMoeConfig.from_pretrained(self.folder)
        if self.config.composition is not None:
            raise ValueError(
                f"{source} is a composition, which names its parts and holds no weights. `flexmoe compose` takes it "
                "with --by-reference; for everything else write them out first, with "
                "AutoModelForCausalLM.from_pretrained(composition).save_pretrained(folder)."
            )
        check_unquantized(self.config, source, task)
        self.tensors = CheckpointFolder(self.folder)


__all__ = ["CONFIG_FILE", "StoredModel"]
