"""transformers' own mixture-of-experts architectures that a FlexMoE can be written as: one entry of a table for each.

An entry says which dense families differ from the architecture in nothing but the block, how its config is filled, and
what its tensors are called on disk: one matrix per expert, which transformers stacks while it loads
(`transformers.conversion_mapping`) and engines such as vLLM read as they are. Not here: the streaming (`export`,
`import_flex_olmo`), and the dense format, which every family has.
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

WAY_OUT = "Write one expert with --to dense --expert NAME, or serve the FlexMoE model itself."

# What a config says of its own file and class.
_OF_THE_FILE = frozenset({"_name_or_path", "architectures", "auto_map", "dtype", "model_type", "transformers_version"})


@dataclass(frozen=True)
class DenseFamily:
    """A family whose dense model is the architecture's with another block.

    Attributes:
        fills: fields of the architecture that this family has not, with the value that changes nothing.
        drops: fields that only this family has: whether a value of them can be left out. Others must have the value
            that the family's class gives them by default.
    """

    fills: Mapping[str, Any] = field(default_factory=dict)
    drops: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class NativeFormat:
    """A mixture-of-experts architecture of transformers.

    Attributes:
        model_type: what its config calls it.
        families: dense families, by model_type, that can be written so.
        matrices: the network's tensors: the dense family's name -> the name on disk.
        block: what the block is called on disk, inside its layer; "mlp" in the model.
        count_fields: what config.json calls the number of experts; more than one where versions differ.
        width_field: what the config calls an expert's intermediate size.
        norm_field: the field that says whether the k weights are divided by their sum; None: they always are.
        sets: further fields, always with these values.
        takes: fields that its class does not declare and reads nevertheless.
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
        """What the block of a layer is called on disk."""
        return f"{site.layer}.{self.block}"

    def gate_name(self, site: FfnSite) -> str:
        """What the rows of all experts, [E, H], are called on disk."""
        return f"{self.block_name(site)}.gate.weight"

    def matrix_name(self, site: FfnSite, expert: int, name: str) -> str:
        """What the tensor `name` of the dense network is called on disk, in the expert of this number."""
        return f"{self.block_name(site)}.experts.{expert}.{self.matrices[name]}"


def _anything(_: Any) -> bool:
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
                "llama": DenseFamily(fills={"sliding_window": None}, drops={"pretraining_tp": _anything}),
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
                # where every layer sees everything, the window and the layers that it would begin at say nothing
                "qwen3": DenseFamily(
                    fills={"use_sliding_window": False, "sliding_window": None},
                    drops={"layer_types": _all_full_attention, "max_window_layers": _anything},
                )
            },
            matrices=_BY_NAME,
            # transformers 5 writes the second name alone, and versions before it know the first alone
            count_fields=("num_experts", "num_local_experts"),
            width_field="moe_intermediate_size",
            sets={"decoder_sparse_step": 1, "mlp_only_layers": []},
            takes=frozenset({"head_dim"}),
        ),
    )
}
"""The architectures by model_type."""


def native_config(native: NativeFormat, config: FlexMoeConfig) -> PreTrainedConfig:
    """The config of the FlexMoE as that architecture.

    Raises:
        ValueError: the architecture cannot say what this model is; names what, and the way out.
    """
    anchor: Any = config.anchor_config
    names = config.expert_names
    _check_family(native, anchor)
    _check_experts(native, config)
    _check_weights_are_divided(native, config)
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
    """The fields that mean the same in `config` and in a config of class `kind`: both declare them, or neither does.

    What neither declares may be read nevertheless: OLMo-2 and FlexOlmo both look for `head_dim`.

    Args:
        takes: fields that the models of `kind` read, though their config does not declare them.
    """
    own, theirs = _declared(type(config)), _declared(kind)
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in _OF_THE_FILE and ((name in own) == (name in theirs) or name in takes)
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
        + (f"Write it with --to {fitting[0]}." if fitting else WAY_OUT)
    )


def _check_experts(native: NativeFormat, config: FlexMoeConfig) -> None:
    if masked := [name for name in config.expert_names if name not in (config.active_experts or config.expert_names)]:
        raise ValueError(
            f"{native.model_type} has no masks, and this model masks {', '.join(masked)} (active_experts is "
            f"{config.active_experts}). Remove them first (flexmoe remove), or let all take part: load the model, "
            "set_active_experts(None), save it."
        )


def _check_weights_are_divided(native: NativeFormat, config: FlexMoeConfig) -> None:
    experts, k = len(config.expert_names), config.num_experts_per_tok
    if native.norm_field or config.norm_topk_prob or k >= experts:
        return
    raise ValueError(
        f"{native.model_type} always divides the k weights by their sum; this model does not (norm_topk_prob is "
        f"False), and with k = {k} of {experts} experts that differs. It does not with k = {experts}: set "
        f"num_experts_per_tok so if the experts are good for it (compose --num-experts-per-tok {experts}). {WAY_OUT}"
    )


def _check_dropped(
    native: NativeFormat, family: DenseFamily, anchor: PreTrainedConfig, kind: type[PreTrainedConfig]
) -> None:
    default = type(anchor)()
    for name in sorted(_declared(type(anchor)) - _declared(kind) - native.takes):
        value = getattr(anchor, name)
        may_go = family.drops.get(name, lambda value, name=name: value == getattr(default, name))
        if not may_go(value):
            raise ValueError(f"{native.model_type} has no {name!r}, and this anchor has {name}={value!r}. {WAY_OUT}")


__all__ = ["FORMATS", "WAY_OUT", "DenseFamily", "NativeFormat", "carried_fields", "native_config"]
