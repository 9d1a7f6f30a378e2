"""Adapters for one expert: a `peft.LoraConfig` that takes the expert's own matrices and nobody else's.

PEFT does the rest: `get_peft_model`, training, saving, `merge_and_unload`. Does not cover what is said when an adapter
takes more than one owner (`flexmoe.modeling`), or training a whole expert (`flexmoe.training`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from flexmoe.modeling import PUBLIC, FlexMoePreTrainedModel
from flexmoe.modeling.adapters_flexmoe import beneath_adapter, row_suffix, target_pattern
from flexmoe.modeling.low_rank_flexmoe import LowRankExpert
from flexmoe.modeling.selection_flexmoe import check_names

if TYPE_CHECKING:
    from peft import LoraConfig


def expert_lora_config(
    model: FlexMoePreTrainedModel,
    expert: str | Sequence[str],
    *,
    router_row: bool = False,
    bias: Literal["none", "lora_only"] = "none",
    **lora: Any,
) -> LoraConfig:
    """A LoRA adapter on every matrix of one expert, or of several.

    It names the expert and no layer, so a saved adapter fits any composition that has the expert under this name. Give
    the adapter another name than the expert's (PEFT's own "default" will do).

    Args:
        model: the FlexMoE, or a PeftModel around it.
        expert: an expert's name, or a list of names for one adapter on several experts.
        router_row: train the expert's router rows and biases along, whole (PEFT's `modules_to_save`).
        bias: "lora_only" trains the biases of the expert's matrices along, where the family has them.
        lora: anything else that `peft.LoraConfig` takes: `r`, `lora_alpha`, `lora_dropout`, `use_dora` ...

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an unknown name, a low-rank expert, router rows of "public" (they are part of the anchor),
            `bias="all"`, which in PEFT is the biases of all experts, or `target_modules`, which is what this function
            finds.

    Source: LoRA, arXiv 2106.09685.
    """
    names = check_names([expert] if isinstance(expert, str) else expert, model.expert_names, "expert_lora_config")
    if bias == "all":
        raise ValueError(
            'bias="all" is the biases of all experts and of the anchor; "lora_only" is those of this one.'
        )
    if router_row and PUBLIC in names:
        raise ValueError(f"The router rows of {PUBLIC!r} are zero in every model of this anchor, and stay so.")
    if "target_modules" in lora:
        raise ValueError("target_modules is what expert_lora_config finds: leave it out, or use peft.LoraConfig.")
    rows = [row_suffix(name) for name in names] if router_row else []
    to_save = [*rows, *(lora.pop("modules_to_save", None) or ())]
    _refuse_low_rank(model, names)
    matrices = _matrices(model, names)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return _lora_config_class()(
        **{
            "task_type": "CAUSAL_LM" if head is not None else None,
            "fan_in_fan_out": all(isinstance(module, Conv1D) for module in matrices.values()),
            **lora,
        },
        target_modules=target_pattern(names, matrices),
        modules_to_save=to_save or None,
        bias=bias,
    )


def _lora_config_class() -> type[LoraConfig]:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("Adapters need PEFT: pip install 'flexmoe[peft]'.") from error
    return LoraConfig


def _refuse_low_rank(model: FlexMoePreTrainedModel, names: Sequence[str]) -> None:
    blocks = model.flexmoe_blocks()
    if low_rank := [name for name in names if any(isinstance(block.experts[name], LowRankExpert) for block in blocks)]:
        raise ValueError(
            f"{', '.join(low_rank)}: low-rank experts, which are adapters of the public network already. Train their "
            f"own factors, model.freeze_except({low_rank[0]!r}), or make full experts of them (flexmoe densify)."
        )


def _matrices(model: FlexMoePreTrainedModel, names: Sequence[str]) -> dict[str, nn.Module]:
    """The Linear-like modules of these experts, by their name within the network."""
    networks = [block.experts[name] for block in model.flexmoe_blocks() for name in names]
    found = {path: module for network in networks for path, module in _linears(network)}
    if not found:
        kinds = sorted({type(module).__name__ for module in model.flexmoe_blocks()[0].experts[names[0]].modules()})
        raise ValueError(f"No matrix of {list(names)} is a Linear or Conv1D, which LoRA needs: they hold {kinds}.")
    return found


def _linears(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    module = beneath_adapter(module)
    if isinstance(module, nn.Linear | Conv1D):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _linears(child, f"{path}.{name}" if path else name)


__all__ = ["expert_lora_config"]
