"""Configuration of a FlexMoE model: the configuration of a dense anchor, and an ordered list of named experts.

Does not cover where an anchor keeps its feed-forward networks (`anchors_flexmoe`) or how experts are stored
(`packages_flexmoe`).
"""

import copy
import math
import re
from collections.abc import Collection
from typing import Any, NoReturn

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

PUBLIC = "public"
"""Name of the anchor's own feed-forward network. It can be masked, never removed."""

AUTO_MAP = {
    "AutoConfig": "configuration_flexmoe.FlexMoeConfig",
    "AutoModel": "modeling_flexmoe.FlexMoeModel",
    "AutoModelForCausalLM": "modeling_flexmoe.FlexMoeForCausalLM",
}
"""What each Auto class loads from the files beside a checkpoint, with `trust_remote_code=True`."""

IMPLEMENTATIONS = ("auto", "torch", "triton")
"""What may run the layers of a model (`implementations_flexmoe`)."""

RECORD_KEYS = (
    "name",
    "kind",
    "rank",
    "alpha",
    "intermediate",
    "version",
    "license",
    "data_statement",
    "training",
    "sha256",
    "source",
)
"""What an expert's record in `FlexMoeConfig.experts` may hold; absent means unknown."""

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_NAME_LENGTH = 64
# A ModuleDict refuses names of its own attributes, and PEFT gives its own words a meaning inside parameter names.
_RESERVED = frozenset(dir(nn.ModuleDict())) | {"default", "base_layer"}


def check_expert_name(name: str) -> str:
    """Returns `name` if an expert may be called so.

    Raises:
        ValueError: the name is not `[a-z][a-z0-9]*([_-][a-z0-9]+)*`, is longer than 64 characters, or is reserved.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _NAME_LENGTH:
        raise ValueError(
            f"{str(name)[:_NAME_LENGTH]!r} is not an expert name: lower-case letters and digits, in parts joined by "
            f"'-' or '_', beginning with a letter, at most {_NAME_LENGTH} characters, for example 'math' or 'code-2'."
        )
    if name in _RESERVED:
        raise ValueError(f"The expert name {name!r} is reserved (PyTorch or PEFT uses it): choose another one.")
    return name


def check_top_k(k: int) -> int:
    """Returns `k` if a token can go to so many experts; more than there are is clamped where they are counted.

    Raises:
        TypeError: it is no whole number; True and 2.0 are none either.
        ValueError: it is below 1.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"num_experts_per_tok must be a whole number, at least 1; got {k!r} ({type(k).__name__}).")
    if k < 1:
        raise ValueError(f"num_experts_per_tok must be at least 1; got {k}.")
    return k


def expert_record(expert: str | dict[str, Any]) -> dict[str, Any]:
    """An expert's record: `expert` itself, or one that holds just that name. Keys without a value are left out.

    Raises:
        ValueError: an unknown key, a name that is none, or a rank where there must be none, or none where it must be.
    """
    record = {"name": expert} if isinstance(expert, str) else dict(expert)
    if unknown := sorted(set(record) - set(RECORD_KEYS)):
        raise ValueError(f"Unknown key(s) {unknown} in the expert record {record!r}; known: {list(RECORD_KEYS)}.")
    check_expert_name(record.get("name", ""))
    record.setdefault("kind", "full")
    record = {key: record[key] for key in RECORD_KEYS if record.get(key) is not None}
    _check_size(record)
    return record


def _check_size(record: dict[str, Any]) -> None:
    what = f"Expert {record['name']!r} is of kind {record['kind']!r} with"
    ranks, alpha, widths = (record.get(key) for key in ("rank", "alpha", "intermediate"))
    is_low_rank = record["kind"] == "low_rank"
    if is_low_rank != (ranks is not None) or not is_counts([1] if ranks is None else ranks):
        raise ValueError(
            f"{what} rank {ranks!r}: a low-rank expert has a list of positive integers, one per layer; an expert of "
            "another kind has none."
        )
    if alpha is not None and not (is_low_rank and is_finite_number(alpha)):
        raise ValueError(f"{what} alpha {alpha!r}: a low-rank expert may have a finite number; no other has one.")
    if widths is not None and (record["kind"] != "full" or not is_counts(widths)):
        raise ValueError(
            f"{what} intermediate {widths!r}: a full expert may have a list of positive integers, one per layer; no "
            "other has one."
        )
    if record["name"] == PUBLIC and (is_low_rank or widths is not None):
        raise ValueError(f"{what} a size of its own; {PUBLIC!r} is the anchor's own network.")


def is_count(value: Any) -> bool:
    """Whether a value from a file is a size: a positive integer, and no wild one."""
    return type(value) is int and 0 < value < 1 << 31


def is_counts(value: Any) -> bool:
    """Whether a value from a file is a list of sizes."""
    return isinstance(value, list) and all(map(is_count, value))


def is_finite_number(value: Any) -> bool:
    """Whether a value from a file is a number, and neither NaN nor an infinity."""
    return type(value) in (int, float) and math.isfinite(value)


class ExpertPackageConfig(PreTrainedConfig):
    """The `config.json` of an expert package: it says to the Auto classes, and to the Hub, that this is no model."""

    model_type = "flexmoe_expert"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NoReturn:
        """Raises ValueError, whatever there is."""
        raise cls.error(kwargs.get("name_or_path", "PACKAGE"))

    @classmethod
    def error(cls, source: Any) -> ValueError:
        """What somebody hears who loads the package `source` as a model."""
        return ValueError(
            f"{source} is an expert package, not a model. Load the model that it is for, and add it: "
            f'model.add_expert("{source}"); or write both as one checkpoint with `flexmoe compose`.'
        )


@strict
class FlexMoeConfig(PreTrainedConfig):
    """Configuration of [`FlexMoeModel`] and [`FlexMoeForCausalLM`].

    Whatever it does not define itself (`vocab_size`, `hidden_size`, `use_cache` ...) is read from, and written to,
    `anchor_config`.

    Args:
        anchor_config: configuration of the dense model, any family that has a feed-forward network in each layer.
        experts: ordered names or records (see `RECORD_KEYS`); the first is "public".
        active_experts: names of the experts that take part; None means all of them.
        num_experts_per_tok: k of the top-k. More than there are experts is clamped at run time and kept here.
        norm_topk_prob: whether the k weights are divided by their sum. None lets the anchor's block decide when the
            model is built: yes, unless a norm follows the feed-forward network and undoes any scale.
        output_router_logits: return router logits, `aux_loss` and `z_loss` by default.
        router_aux_loss_coef: weight of the load-balancing loss in `loss`.
        router_z_loss_coef: weight of the router z-loss in `loss`.
        anchor: what the anchor is: `repo`, `revision`, `fingerprint`, `model_type`, `dtype`.
        public_sample: the sample of public text beside the weights: `file`, `sha256`, `bytes`, `documents`.
        composition: where anchor and experts come from, in the config of a composition (`composition_flexmoe`); None
            in that of a model with weights.
        auto_map: as transformers has it; what is not given is filled in from `AUTO_MAP`.
    """

    model_type = "flexmoe"
    sub_configs = {"anchor_config": AutoConfig}  # noqa: RUF012 - transformers' own declaration
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own declaration

    anchor_config: dict[str, Any] | PreTrainedConfig | None = None
    experts: list[Any] | None = None
    active_experts: list[str] | None = None
    num_experts_per_tok: int = 4
    norm_topk_prob: bool | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    anchor: dict[str, Any] | None = None
    public_sample: dict[str, Any] | None = None
    composition: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None  # a field, or an anchor that came with code would lend its own

    def __post_init__(self, **kwargs: Any) -> None:
        if self.anchor_config is None:
            self.anchor_config = CONFIG_MAPPING["olmo2"]()
        elif isinstance(self.anchor_config, dict):
            self.anchor_config = _anchor_config_from_dict(self.anchor_config)
        else:  # a model built from the donor's own object would change the donor
            self.anchor_config = copy.deepcopy(self.anchor_config)
        anchor: Any = self.anchor_config
        anchor._name_or_path = ""  # where it lay on somebody's machine; which one it is stands in `self.anchor`
        if not isinstance(self.experts, list | None):
            raise TypeError(f"experts must be a list of names or records; got {self.experts!r}.")
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.experts = [expert_record(expert) for expert in (self.experts or [PUBLIC])]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            ValueError: the values are those of another model; transformers would build one of default sizes from them.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the config of a {model_type!r} model, not of a FlexMoE. Make one from a dense model with "
                "flexmoe.graft (on the command line: flexmoe graft), or load it as it is with AutoModelForCausalLM."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            ValueError: it is an expert package, which is no model.
        """
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == ExpertPackageConfig.model_type:
            raise ExpertPackageConfig.error(pretrained_model_name_or_path)
        return values, unused

    @property
    def _flexmoe_implementation(self) -> str:
        """What runs the layers, "auto", "torch" or "triton" (`implementations_flexmoe`); not saved.

        Setting it raises ValueError if it is none of these.
        """
        return self.__dict__.get("_flexmoe_implementation_internal", "auto")

    @_flexmoe_implementation.setter
    def _flexmoe_implementation(self, value: str) -> None:
        if value not in IMPLEMENTATIONS:
            raise ValueError(f"The implementation {value!r} is unknown: it must be one of {list(IMPLEMENTATIONS)}.")
        self.__dict__["_flexmoe_implementation_internal"] = value

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own; what runs the layers is this process's affair."""
        values = super().to_dict()
        values.pop("_flexmoe_implementation_internal", None)
        return values

    @property
    def expert_records(self) -> list[dict[str, Any]]:
        """The records of all experts, in order."""
        return list(self.experts or [])

    @property
    def expert_names(self) -> list[str]:
        """Names of all experts, in order."""
        return [record["name"] for record in self.expert_records]

    def validate_experts(self) -> None:
        """Part of `@strict`: names are names, unique, and "public" comes first; active experts exist.

        Raises:
            ValueError: one of these does not hold.
        """
        names = [expert_record(expert)["name"] for expert in self.experts or []]
        if names[:1] != [PUBLIC]:
            raise ValueError(f"The first expert must be {PUBLIC!r}, the anchor's own network; got {names}.")
        if len(set(names)) != len(names):
            raise ValueError(f"Expert names must differ; got {names}.")
        if unknown := [name for name in self.active_experts or [] if name not in names]:
            raise ValueError(f"active_experts names {unknown}, which this model has not: it has {names}.")
        if self.active_experts is not None and not self.active_experts:
            raise ValueError(f"active_experts is empty: name at least one of {names}, or None for all.")
        if len(set(self.active_experts or ())) != len(self.active_experts or ()):
            raise ValueError(f"active_experts names an expert twice: {self.active_experts}.")

    def validate_num_experts_per_tok(self) -> None:
        """Part of `@strict`. Raises: as `check_top_k`."""
        check_top_k(self.num_experts_per_tok)

    def validate_architecture(self) -> None:
        """Part of `@strict`: the anchor's configuration has been checked by its own class."""

    def validate_rope(self) -> None:
        """Part of `@strict`: as `validate_architecture`."""

    def _get_generation_parameters(self) -> dict[str, Any]:
        # settings of `generate` that the anchor's family declares as fields (BART's forced_eos_token_id) are its own
        anchor: Any = self.anchor_config
        return anchor._get_generation_parameters()

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The anchor's configuration: cache, attention and vocabulary are the anchor's affair."""
        anchor: Any = self.anchor_config
        return anchor.get_text_config(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        anchor = self.__dict__.get("anchor_config")
        if name.startswith("_") or anchor is None or isinstance(anchor, dict):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(anchor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        anchor = self.__dict__.get("anchor_config")
        is_the_anchors = (
            isinstance(anchor, PreTrainedConfig)
            and not hasattr(type(self), name)
            and not name.startswith("_")
            and hasattr(anchor, name)
        )
        if is_the_anchors:
            setattr(anchor, name, value)
        else:
            super().__setattr__(name, value)


def drop_experts(config: FlexMoeConfig, names: Collection[str]) -> None:
    """Takes experts out of a config, in place: it is then that of the model which never had them.

    Raises:
        ValueError: nobody would be left in its active set.
    """
    if config.active_experts is not None:
        active = [name for name in config.active_experts if name not in names]
        if not active:
            raise ValueError(
                f"Without {', '.join(sorted(names))} no active expert is left: choose others with set_active_experts "
                "first."
            )
        config.active_experts = active
    config.experts = [record for record in config.expert_records if record["name"] not in names]


def _anchor_config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"anchor_config has model_type {model_type!r}, which the installed transformers does not know: "
            "update transformers, or register the family's configuration with AutoConfig first."
        )
    return CONFIG_MAPPING[model_type](**values)


FlexMoeConfig.register_for_auto_class()

__all__ = [
    "AUTO_MAP",
    "IMPLEMENTATIONS",
    "PUBLIC",
    "RECORD_KEYS",
    "ExpertPackageConfig",
    "FlexMoeConfig",
    "check_expert_name",
    "check_top_k",
    "drop_experts",
    "expert_record",
    "is_count",
    "is_counts",
    "is_finite_number",
]
