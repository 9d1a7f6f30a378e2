"""Configuration of a FlexMoE model: the configuration of a dense anchor, and an ordered list of named experts.

Does not cover where an anchor has its feed-forward networks (`anchors_flexmoe`), or how experts are stored
(`flexmoe.packages`).
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

PUBLIC = "public"
"""Name of the anchor's own feed-forward network. It can be masked, never removed."""

AUTO_MAP = {
    "AutoConfig": "configuration_flexmoe.FlexMoeConfig",
    "AutoModel": "modeling_flexmoe.FlexMoeModel",
    "AutoModelForCausalLM": "modeling_flexmoe.FlexMoeForCausalLM",
}
"""The classes that the Auto classes load from the files in a checkpoint, with `trust_remote_code=True`."""


class ExpertsForwards(dict[str, Callable[..., Tensor]]):
    """Ways to run a block, by the names that `experts_implementation` takes; cf. `ALL_EXPERTS_FUNCTIONS`.

    They are called as `eager_experts_forward` is. The package `flexmoe` adds others and sets `default`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.default = "eager"
        self._modules: dict[str, str] = {"eager": "eager"}

    def register(self, name: str, function: str) -> None:
        """Adds an implementation, imported on first use: "package.module:function"."""
        self._modules[name] = function

    def __missing__(self, name: str) -> Callable[..., Tensor]:
        module, _, function = self._modules[name].partition(":")
        self[name] = getattr(import_module(module), function)
        return self[name]

    def check(self, requested: str | None) -> str:
        """The name of the requested implementation, or of the default; ValueError lists those that are available."""
        name = self.default if requested is None else requested
        if name not in self._modules:
            known = list(self._modules)
            hint = "" if len(known) > 1 else ". The package flexmoe adds others: pip install flexmoe, import flexmoe"
            raise ValueError(
                f"experts_implementation={name!r} is not available for FlexMoE: use one of {known}{hint}."
            )
        return name


EXPERTS_FORWARDS = ExpertsForwards()


def require_flexmoe(module: str, what: str) -> Any:
    """The module `flexmoe.<module>`. ImportError: the package, which the call `what` needs, is not installed."""
    try:
        return import_module(f"flexmoe.{module}")
    except ModuleNotFoundError as error:
        if error.name != "flexmoe":
            raise
        raise ImportError(
            f"{what} needs the package flexmoe, not only the code beside the model: pip install flexmoe"
        ) from error


def optional_flexmoe(module: str) -> Any | None:
    """The module `flexmoe.<module>`; None if the package is not installed."""
    try:
        return require_flexmoe(module, "")
    except ImportError:
        return None


RECORD_KEYS = (
    "name",
    "kind",
    "rank",
    "alpha",
    "intermediate",
    "evidence",
    "version",
    "license",
    "data_statement",
    "training",
    "sha256",
    "source",
)
"""Keys of an expert's record in `FlexMoeConfig.experts`; absent means unknown."""

MOST_DECAYS = 16  # of an expert's evidence
_CHOSEN_BY_CALLER = frozenset({"attn_implementation", "experts_implementation"})
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_NAME_LENGTH = 64
# A ModuleDict refuses names of its attributes, and PEFT's terms have a meaning inside parameter names.
_RESERVED = frozenset(dir(nn.ModuleDict())) | {"default", "base_layer"}


def check_expert_name(name: str) -> str:
    """Returns `name` if it is a valid expert name.

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
    """Returns `k` if it is a valid number of experts per token; values above the number of experts are clamped later.

    Raises:
        TypeError: it is not an int (True and 2.0 are not).
        ValueError: it is below 1.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"num_experts_per_tok must be an integer, at least 1; got {k!r} ({type(k).__name__}).")
    if k < 1:
        raise ValueError(f"num_experts_per_tok must be at least 1; got {k}.")
    return k


def expert_record(expert: str | dict[str, Any]) -> dict[str, Any]:
    """An expert's record: `expert` itself, or a record with just that name. Keys without a value are dropped.

    Raises:
        ValueError: an unknown key, an invalid name, or a size that does not fit the kind.
    """
    record = {"name": expert} if isinstance(expert, str) else dict(expert)
    if unknown := sorted(set(record) - set(RECORD_KEYS)):
        raise ValueError(f"Unknown key(s) {unknown} in the expert record {record!r}; known: {list(RECORD_KEYS)}.")
    check_expert_name(record.get("name", ""))
    record.setdefault("kind", "full")
    record = {key: record[key] for key in RECORD_KEYS if record.get(key) is not None}
    _check_size(record)
    _check_evidence(record)
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


def _check_evidence(record: dict[str, Any]) -> None:
    if (evidence := record.get("evidence")) is None:
        return
    decays = evidence.get("decays") if isinstance(evidence, dict) else None
    are_decays = isinstance(decays, list) and 0 < len(decays) <= MOST_DECAYS and all(map(_is_decay, decays))
    if not are_decays or not is_counts([evidence.get("tokens"), evidence.get("window")]):
        raise ValueError(
            f"Expert {record['name']!r} has the evidence {str(evidence)[:200]}: it needs 'tokens' and 'window', "
            f"positive integers, and 'decays', a list of 1 to {MOST_DECAYS} numbers between 0 and 1."
        )
    if record["name"] == PUBLIC:
        raise ValueError(f"{PUBLIC!r} has no evidence: that of others is relative to public text.")


def _is_decay(value: Any) -> bool:
    return is_finite_number(value) and 0 < value < 1


def is_count(value: Any) -> bool:
    """Whether a value from a file is a size: a positive integer below 2^31."""
    return type(value) is int and 0 < value < 1 << 31


def is_counts(value: Any) -> bool:
    """Whether a value from a file is a list of sizes."""
    return isinstance(value, list) and all(map(is_count, value))


def is_finite_number(value: Any) -> bool:
    """Whether a value from a file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


@strict
class FlexMoeConfig(PreTrainedConfig):
    """Configuration of [`FlexMoeModel`] and [`FlexMoeForCausalLM`].

    Fields that it does not define (`vocab_size`, `hidden_size`, `use_cache` ...) are read from and written to
    `anchor_config`, or its text config. They are in `to_dict()`, where libraries look them up, and not in config.json.

    Args:
        anchor_config: configuration of the dense model, any family that has a feed-forward network in each layer.
        experts: ordered names or records (see `RECORD_KEYS`); the first is "public".
        active_experts: names of the experts that take part; None means all of them.
        num_experts_per_tok: k of the top-k. Values above the number of experts are clamped at run time and kept here.
        norm_topk_prob: whether the k weights are divided by their sum. None lets the anchor's block decide when the
            model is built: yes, unless a norm follows the feed-forward network and undoes any scale.
        output_router_logits: return router logits, `aux_loss` and `z_loss` by default.
        router_aux_loss_coef: weight of the load-balancing loss in `loss`.
        router_z_loss_coef: weight of the router z-loss in `loss`.
        anchor: identity of the anchor: `repo`, `revision`, `fingerprint`, `model_type`, `dtype`.
        public_sample: the sample of public text stored with the weights: `file`, `sha256`, `bytes`, `documents`.
        composition: where anchor and experts come from, in the config of a composition (`flexmoe.composition`); None
            for a model with weights.
        auto_map: always `AUTO_MAP`; entries for other code, here or in `anchor_config`, are dropped with a warning.

    Example:
        config = FlexMoeConfig(anchor_config=LlamaConfig(), experts=["public", "math"])
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
    auto_map: dict[str, Any] | None = None  # a field, so that an anchor with code of its own does not provide it

    def __post_init__(self, **kwargs: Any) -> None:
        if self.anchor_config is None:
            self.anchor_config = CONFIG_MAPPING["olmo2"]()
        elif isinstance(self.anchor_config, dict):
            self.anchor_config = _anchor_config_from_dict(self.anchor_config)
            kwargs = self._without_copies(kwargs)
        else:  # a model built from the donor's config object would change the donor
            self.anchor_config = copy.deepcopy(self.anchor_config)
        anchor: Any = self.anchor_config
        anchor._name_or_path = ""  # a local path; `self.anchor` identifies the anchor
        if not isinstance(self.experts, list | None):
            raise TypeError(f"experts must be a list of names or records; got {self.experts!r}.")
        check_top_k(self.num_experts_per_tok)  # here, because an error of a validator below names `@strict`'s classes
        foreign = _drop_code(vars(anchor)) + _drop_code(kwargs) + _drop_code({"auto_map": self.auto_map})
        if foreign:
            warnings.warn(f"The config names code of others, which is dropped: {', '.join(foreign)}.", stacklevel=2)
        self.auto_map = dict(AUTO_MAP)
        self.experts = [expert_record(expert) for expert in (self.experts or [PUBLIC])]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: the values belong to another model; transformers would use default sizes.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the config of a {model_type!r} model, not of a FlexMoE. Make one from a dense model with "
                "flexmoe.graft (on the command line: flexmoe graft), or load it as it is with AutoModelForCausalLM. "
                "('flexmoe_expert' is an expert package, not a model: add it to a model with add_expert.)"
            )
        return super().from_dict(_without_implementations(config_dict), **kwargs)

    @property
    def _experts_implementation(self) -> str | None:
        """A key of `EXPERTS_FORWARDS`, or None for the default; not saved, and not passed on to `anchor_config`."""
        return self.__dict__.get("_experts_implementation_internal")

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict[str, str] | None) -> None:
        name = value.get("", self._experts_implementation) if isinstance(value, dict) else value
        self.__dict__["_experts_implementation_internal"] = None if name is None else EXPERTS_FORWARDS.check(name)

    @property
    def expert_records(self) -> list[dict[str, Any]]:
        """The records of all experts, in order."""
        return list(self.experts or [])

    @property
    def expert_names(self) -> list[str]:
        """Names of all experts, in order."""
        return [record["name"] for record in self.expert_records]

    @property
    def num_experts(self) -> int:
        """The number of experts, "public" included; read by trainers that compute the load-balancing loss."""
        return len(self.expert_records)

    def validate_experts(self) -> None:
        """Part of `@strict`: names are valid and unique, "public" comes first, active experts exist."""
        names = [expert_record(expert)["name"] for expert in self.experts or []]
        if names[:1] != [PUBLIC]:
            raise ValueError(f"The first expert must be {PUBLIC!r}, the anchor's own network; got {names}.")
        if len(set(names)) != len(names):
            raise ValueError(f"Expert names must differ; got {names}.")
        if unknown := [name for name in self.active_experts or [] if name not in names]:
            raise ValueError(f"active_experts names {unknown}, which this model does not have; it has {names}.")
        if self.active_experts is not None and not self.active_experts:
            raise ValueError(f"active_experts is empty: name at least one of {names}, or None for all.")
        if len(set(self.active_experts or ())) != len(self.active_experts or ()):
            raise ValueError(f"active_experts names an expert twice: {self.active_experts}.")

    def validate_num_experts_per_tok(self) -> None:
        """Part of `@strict`. Raises: as `check_top_k`."""
        check_top_k(self.num_experts_per_tok)

    def validate_architecture(self) -> None:
        """Part of `@strict`: the anchor's own class has checked its configuration."""

    validate_rope = validate_layer_type = validate_architecture

    def _get_generation_parameters(self) -> dict[str, Any]:
        # `generate` settings that a family declares as fields (BART's forced_eos_token_id) belong to the anchor
        anchor: Any = self.anchor_config
        return anchor._get_generation_parameters()

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """This configuration: libraries look here for the router's settings as well as for sizes and tokens."""
        return self

    def _text_config(self) -> Any:
        """The anchor's configuration of its decoder: itself, a part of it (composites), or a view of it (BART)."""
        anchor: Any = self.anchor_config
        return anchor.get_text_config(decoder=True)

    # as in transformers, of the anchor: the configuration of each layer, and plans (5.17 also sets the plan itself)
    per_layer_config = property(lambda self: self._text_config().per_layer_config)
    base_model_tp_plan = property(lambda self: self._text_config().base_model_tp_plan, lambda self, plan: None)
    base_model_fsdp_plan = property(lambda self: self._text_config().base_model_fsdp_plan)

    def _anchor_fields(self) -> dict[str, Any]:
        """The anchor's fields that this class does not have, as its text config's `to_dict()` gives them."""
        text = self._text_config()
        fields = text.to_dict()
        for name in list(fields):
            is_own = name.startswith("_") or hasattr(type(self), name) or name in text.sub_configs
            if is_own and name != "per_layer_config":
                del fields[name]
        if "tie_word_embeddings" in fields:
            fields["tie_word_embeddings"] = self.tie_word_embeddings  # of a composite, its own field counts
        return fields

    def _without_copies(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` without the anchor's fields, which `to_dict` repeats. ValueError: one differs."""
        fields = self._anchor_fields()
        if differing := [name for name in values if name in fields and values[name] != fields[name]]:
            name = differing[0]
            raise ValueError(
                f"{name} is {values[name]!r} beside anchor_config and {fields[name]!r} in it: change it in "
                "anchor_config."
            )
        return {name: value for name, value in values.items() if name not in fields}

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, and the fields of the anchor's text config."""
        return {**self._anchor_fields(), **super().to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers; `anchor_config` alone holds the anchor's fields."""
        own = super().to_dict()
        return {key: value for key, value in super().to_diff_dict().items() if key in own}

    def __getattr__(self, name: str) -> Any:
        anchor = self.__dict__.get("anchor_config")
        if name.startswith("_") or anchor is None or isinstance(anchor, dict):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        text = self._text_config()
        is_composite = type(text) is not type(anchor)
        return getattr(anchor if is_composite and hasattr(anchor, name) else text, name)

    def __setattr__(self, name: str, value: Any) -> None:
        anchor = self.__dict__.get("anchor_config")
        is_own = not isinstance(anchor, PreTrainedConfig) or hasattr(type(self), name) or name.startswith("_")
        for config in () if is_own else (anchor, self._text_config()):
            if hasattr(config, name):
                setattr(config, name, value)
                return
        super().__setattr__(name, value)


def drop_experts(config: FlexMoeConfig, names: Collection[str]) -> None:
    """Removes experts from a config in place. ValueError: no active expert would be left."""
    if config.active_experts is not None:
        active = [name for name in config.active_experts if name not in names]
        if not active:
            raise ValueError(
                f"Without {', '.join(sorted(names))} no active expert is left: choose others with set_active_experts "
                "first."
            )
        config.active_experts = active
    config.experts = [record for record in config.expert_records if record["name"] not in names]


def _drop_code(values: dict[str, Any]) -> list[str]:
    """Removes the entries of a config that name code to run; returns what is not FlexMoE's own."""
    named = {**(values.pop("auto_map", None) or {}), **(values.pop("custom_pipelines", None) or {})}
    # transformers adds the repository that a config was loaded from: "org/model--configuration_flexmoe.FlexMoeConfig"
    return [f"{key}: {code}" for key, code in named.items() if str(code).rpartition("--")[2] != AUTO_MAP.get(key)]


def _anchor_config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"anchor_config has model_type {model_type!r}, which the installed transformers does not know: "
            "update transformers, or register the family's configuration with AutoConfig first."
        )
    return CONFIG_MAPPING[model_type](**_without_implementations(values))


def _without_implementations(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without what the caller chooses: transformers would load a kernel of the Hub that a config names."""
    return {key: value for key, value in values.items() if key.removeprefix("_") not in _CHOSEN_BY_CALLER}


FlexMoeConfig.register_for_auto_class()

__all__ = [
    "AUTO_MAP",
    "EXPERTS_FORWARDS",
    "MOST_DECAYS",
    "PUBLIC",
    "RECORD_KEYS",
    "FlexMoeConfig",
    "check_expert_name",
    "check_top_k",
    "drop_experts",
    "expert_record",
    "is_count",
    "is_counts",
    "is_finite_number",
    "optional_flexmoe",
    "require_flexmoe",
]
