"""The mixture-of-experts architectures of transformers that a FlexMoE model can be exported to, as a table.

An entry lists the dense families that differ from the architecture only in the FFN block, how its config is filled,
and the names of its tensors on disk: one matrix per expert, which transformers stacks at load time
(`transformers.conversion_mapping`) and engines such as vLLM read unstacked. Does not cover the streaming (`export`,
`import_flex_olmo`) or the dense format, which every family has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from flexmoe.modeling.anchors_flexmoe import FfnSite
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig

ALTERNATIVES = "Write one expert with --to dense --expert NAME (to='dense', expert=NAME), or serve the FlexMoE itself."

# Fields that describe the config's own file and class.
_FILE_FIELDS = frozenset({"_name_or_path", "architectures", "auto_map", "dtype", "model_type", "transformers_version"})


@dataclass(frozen=True)
class DenseFamily:
    """A dense family that equals the architecture but for the FFN block.

    Attributes:
        fills: fields of the architecture that this family lacks, with their neutral values.
        drops: fields that only this family has, with a predicate: whether a value can be left out. Other fields must
            have the default of the family's class.
    """

    fills: Mapping[str, Any] = field(default_factory=dict)
    drops: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class NativeFormat:
    """A mixture-of-experts architecture of transformers.

    Attributes:
        model_type: of its config.
        families: dense families, by model_type, that can be exported to it.
        matrices: an expert's tensors: the dense family's name -> the name on disk.
        block: the block's name on disk, inside its layer; "mlp" in the model.
        count_fields: config fields for the number of experts; more than one if versions differ.
        width_field: config field for an expert's intermediate size.
        norm_field: config field for whether the k weights are normalised; None: they always are.
        sets: further fields with fixed values.
        takes: fields that its class reads without declaring them.
    """

    model_type: str
    families: Mapping[str, DenseFamily]
    matrices: Mapping[str, str]
    block: str = "mlp"
    count_fields: tuple[str, ...] = ("num_experts",)
    width_field: str = "intermediate_size"
    norm_field: str | None = "norm_topk_prob"
    sets: Mapping[str, Any] = field(default_factory=dict)
    takes: frozenset[str] = frozenset()

    def block_name(self, site: FfnSite) -> str:
        """The name of a layer's block on disk."""
        return f"{site.layer}.{self.block}"

    def gate_name(self, site: FfnSite) -> str:
        """The name of the stacked router rows [E, H] on disk."""
        return f"{self.block_name(site)}.gate.weight"

    def matrix_name(self, site: FfnSite, expert: int, name: str) -> str:
        """The name on disk of the dense network's tensor `name`, in the expert of this number."""
        return f"{self.block_name(site)}.experts.{expert}.{self.matrices[name]}"


def _always(_: Any) -> bool:
    return True


def _all_full_attention(layer_types: list[str] | None) -> bool:
    return set(layer_types or ()) <= {"full_attention"}


_BY_NAME = {name: name for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight")}

FORMATS = {
    entry.model_type: entry
    for entry in (
        NativeFormat(
            model_type="flex_olmo",
            families={"olmo2": DenseFamily()},
            matrices=_BY_NAME,
        ),
        NativeFormat(
            model_type="mixtral",
            families={
                # pretraining_tp: transformers 5 reads it nowhere
                "llama": DenseFamily(fills={"sliding_window": None}, drops={"pretraining_tp": _always}),
                "mistral": DenseFamily(),
            },
            matrices={"gate_proj.weight": "w1.weight", "up_proj.weight": "w3.weight", "down_proj.weight": "w2.weight"},
            block="block_sparse_moe",
            count_fields=("num_local_experts",),
            norm_field=None,
            sets={"router_jitter_noise": 0.0},
        ),
        NativeFormat(
            model_type="qwen3_moe",
            families={
                # if all layers use full attention, the window and the layer at which it begins have no effect
                "qwen3": DenseFamily(
                    fills={"use_sliding_window": False, "sliding_window": None},
                    drops={"layer_types": _all_full_attention, "max_window_layers": _always},
                )
            },
            matrices=_BY_NAME,
            # transformers 5 writes only the second name, earlier versions read only the first
            count_fields=("num_experts", "num_local_experts"),
            width_field="moe_intermediate_size",
            sets={"decoder_sparse_step": 1, "mlp_only_layers": []},
            takes=frozenset({"head_dim"}),
        ),
    )
}
"""The architectures, by model_type."""


def native_config(native: NativeFormat, config: FlexMoeConfig) -> PreTrainedConfig:
    """The config of a FlexMoE model in that architecture.

    Raises:
        ValueError: the architecture cannot represent this model; gives the reason and the alternatives.
    """
    anchor: Any = config.anchor_config
    names = config.expert_names
    _check_family(native, anchor)
    _check_experts(native, config)
    _check_normalized(native, config)
    family = native.families[anchor.model_type]
    kind = CONFIG_MAPPING[native.model_type]
    _check_dropped(native, family, anchor, kind)
    values = {
        **carried_fields(anchor, kind, native.takes),
        **family.fills,
        **native.sets,
        native.width_field: anchor.intermediate_size,
        "num_experts_per_tok": min(config.num_experts_per_tok, len(names)),
        "output_router_logits": config.output_router_logits,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        native.count_fields[0]: len(names),
    }
    if native.norm_field:
        values[native.norm_field] = bool(config.norm_topk_prob)
    return kind(**values)


def carried_fields(
    config: PreTrainedConfig, kind: type[PreTrainedConfig], takes: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The fields with the same meaning in `config` and in a config of class `kind`: declared by both or by neither.

    Fields that neither declares may still be read: OLMo-2 and FlexOlmo both read `head_dim`.

    Args:
        takes: fields that the models of `kind` read although their config does not declare them.
    """
    own, theirs = _declared(type(config)), _declared(kind)
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in _FILE_FIELDS and ((name in own) == (name in theirs) or name in takes)
    }


def _declared(kind: type[PreTrainedConfig]) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def _check_family(native: NativeFormat, anchor: PreTrainedConfig) -> None:
    if anchor.model_type in native.families:
        return
    fitting = [name for name, entry in FORMATS.items() if anchor.model_type in entry.families]
    raise ValueError(
        f"{native.model_type} is for anchors of type {' or '.join(native.families)}; this one is "
        f"{anchor.model_type!r}, for which there is {' and '.join(fitting) or 'no such architecture'}. "
        + (f"Write it with to={fitting[0]!r}." if fitting else ALTERNATIVES)
    )


def _check_experts(native: NativeFormat, config: FlexMoeConfig) -> None:
    if masked := [name for name in config.expert_names if name not in (config.active_experts or config.expert_names)]:
        raise ValueError(
            f"{native.model_type} has no expert masks, and this model masks {', '.join(masked)} (active_experts is "
            f"{config.active_experts}). Remove them first (flexmoe remove), or activate all experts: load the model, "
            "call set_active_experts(None), save it."
        )


def _check_normalized(native: NativeFormat, config: FlexMoeConfig) -> None:
    experts, k = len(config.expert_names), config.num_experts_per_tok
    if native.norm_field or config.norm_topk_prob or k >= experts:
        return
    raise ValueError(
        f"{native.model_type} always divides the k weights by their sum; this model does not (norm_topk_prob is "
        f"False), which makes a difference with k = {k} of {experts} experts. It makes none with k = {experts}: set "
        f"num_experts_per_tok to that if quality allows (flexmoe compose --num-experts-per-tok {experts}). "
        f"{ALTERNATIVES}"
    )


def _check_dropped(
    native: NativeFormat, family: DenseFamily, anchor: PreTrainedConfig, kind: type[PreTrainedConfig]
) -> None:
    default = type(anchor)()
    for name in sorted(_declared(type(anchor)) - _declared(kind) - native.takes):
        value = getattr(anchor, name)
        may_go = family.drops.get(name, lambda value, name=name: value == getattr(default, name))
        if not may_go(value):
            raise ValueError(
                f"{native.model_type} has no {name!r}, and this anchor has {name}={value!r}. {ALTERNATIVES}"
            )


__all__ = ["ALTERNATIVES", "FORMATS", "DenseFamily", "NativeFormat", "carried_fields", "native_config"]
