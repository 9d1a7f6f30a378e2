"""LoRA adapters for single experts: a `peft.LoraConfig` that targets an expert's own matrices only.

PEFT does the rest: `get_peft_model`, training, saving, `merge_and_unload`. Does not cover warnings about adapters that
span several owners (`flexmoe.adapters`), or training an expert's own weights
(`flexmoe.training.experts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from flexmoe.adapters import target_pattern
from flexmoe.modeling import PUBLIC, FlexMoePreTrainedModel
from flexmoe.modeling.adapters_flexmoe import beneath_adapter
from flexmoe.modeling.low_rank_flexmoe import is_low_rank
from flexmoe.modeling.masking_flexmoe import check_names

if TYPE_CHECKING:
    from peft import LoraConfig


def expert_lora_config(
    model: FlexMoePreTrainedModel,
    expert: str | Sequence[str],
    *,
    router_row: bool = False,
    bias: Literal["none", "lora_only"] = "none",
    layers_to_transform: int | Sequence[int] | None = None,
    **lora: Any,
) -> LoraConfig:
    """The config of a LoRA adapter on every matrix of one expert, or of several.

    It names the expert and no other, so a saved adapter fits every composition that has an expert of this name. The
    adapter's name must differ from the expert's (PEFT's "default" does).

    Args:
        model: the FlexMoE model, or a PeftModel around it.
        expert: an expert's name, or a list of names for one adapter on several experts.
        router_row: also train the expert's router rows and biases in full (PEFT's `modules_to_save`).
        bias: "lora_only" also trains the biases of the expert's matrices, if the family has them.
        layers_to_transform: the numbers of the layers that have the adapter; None means all.
        lora: further arguments of `peft.LoraConfig`: `r`, `lora_alpha`, `lora_dropout`, `use_dora` ...

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an unknown name, a low-rank expert, router rows of "public" (they are part of the anchor),
            a layer that the model does not have, `bias="all"` (in PEFT, the biases of all experts), or
            `target_modules` or `layers_pattern`, which this function determines.

    Source: LoRA, arXiv 2106.09685.

    Example:
        ```pycon
        >>> import flexmoe, peft
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")
        >>> adapted = peft.get_peft_model(model, flexmoe.expert_lora_config(model, "math", r=4))
        >>> all(".math." in name for name, p in adapted.named_parameters() if p.requires_grad)
        True
        ```
    """
    names = check_names([expert] if isinstance(expert, str) else expert, model.expert_names, "expert_lora_config")
    if bias == "all":
        raise ValueError(
            'bias="all" trains the biases of all experts and of the anchor; "lora_only" trains those of this expert.'
        )
    if router_row and PUBLIC in names:
        raise ValueError(f"The router rows of {PUBLIC!r} are part of the anchor and cannot be trained.")
    for determined in ("target_modules", "layers_pattern"):
        if determined in lora:
            raise ValueError(f"expert_lora_config determines {determined}: leave it out, or use peft.LoraConfig.")
    blocks = _ends_of_blocks(model, layers_to_transform)
    rows = [f".{block}.router.{name}" for block in blocks for name in names] if router_row else []
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
        target_modules=target_pattern(names, matrices, None if layers_to_transform is None else blocks),
        modules_to_save=to_save or None,
        bias=bias,
    )


def _ends_of_blocks(model: FlexMoePreTrainedModel, layers: int | Sequence[int] | None) -> list[str]:
    """How the names of the blocks end: in all layers ("mlp"), or with the number of each of `layers` ("3.mlp")."""
    ends = [name.split(".")[-2:] for name in model.named_blocks()]
    if layers is None:
        return sorted({attribute for _, attribute in ends})
    numbers = [layers] if isinstance(layers, int) else list(layers)
    known = {int(number): f"{number}.{attribute}" for number, attribute in ends}
    if not numbers or not known.keys() >= set(numbers):
        raise ValueError(f"layers_to_transform is {layers!r}: name layers among {sorted(known)}, or None for all.")
    return [known[number] for number in numbers]


def _lora_config_class() -> type[LoraConfig]:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("Adapters need PEFT: pip install 'flexmoe[peft]'.") from error
    return LoraConfig


def _refuse_low_rank(model: FlexMoePreTrainedModel, names: Sequence[str]) -> None:
    blocks = model.flexmoe_blocks()
    if low_rank := [name for name in names if any(is_low_rank(block.experts[name]) for block in blocks)]:
        raise ValueError(
            f"{', '.join(low_rank)}: low-rank experts are adapters of the public network already. Train their own "
            f"factors, model.freeze_except({low_rank[0]!r}), or convert them to full experts (flexmoe densify)."
        )


def _matrices(model: FlexMoePreTrainedModel, names: Sequence[str]) -> dict[str, nn.Module]:
    """The Linear and Conv1D modules of these experts, by their names within the FFN."""
    networks = [block.experts[name] for block in model.flexmoe_blocks() for name in names]
    found = {path: module for network in networks for path, module in _linears(network)}
    if not found:
        kinds = sorted({type(module).__name__ for module in model.flexmoe_blocks()[0].experts[names[0]].modules()})
        raise ValueError(f"No matrix of {list(names)} is a Linear or Conv1D, as LoRA needs; modules are {kinds}.")
    return found


def _linears(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    module = beneath_adapter(module)
    if isinstance(module, nn.Linear | Conv1D):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _linears(child, f"{path}.{name}" if path else name)


__all__ = ["expert_lora_config"]
