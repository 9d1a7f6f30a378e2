"""Quantises a new expert like the model that it is added to.

`from_pretrained(quantization_config=...)` quantises the Linears of experts like any others and keeps router rows in
float32 (`_keep_in_fp32_modules` of the model). A new expert is quantised by the same code: it is loaded with the
model's quantization config, under the names that it gets in the model. So its bits are those that it would have in
the checkpoint, and modules that the config excludes by name stay excluded.

Does not cover training experts on a quantised anchor, or changes to quantised checkpoints on disk: both are refused.
"""

import copy
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmoe.modeling.experts_flexmoe import has_quantized_weights

logger = logging.getLogger(__name__)


def quantize_like(model: PreTrainedModel, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Quantises networks with the quantiser of `model`; returns them unchanged if it has none.

    Args:
        model: as loaded by `from_pretrained`.
        networks: unquantised networks, by the name that each gets in the model.

    Raises:
        ValueError: the model's quantiser needs calibration data.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return dict(networks)
    settings = quantizer.quantization_config
    if quantizer.requires_calibration:
        raise ValueError(
            f"This model was quantised by {settings.quant_method}, which needs calibration data, so an expert cannot "
            "be added to it: add it to the unquantised model, and quantise the result."
        )
    quantized: dict[str, nn.Module] = {}
    for device, names in _by_device(networks).items():
        state = {f"{name}.{key}": value for name in names for key, value in networks[name].state_dict().items()}
        loaded = _Networks.from_pretrained(
            None,
            {name: networks[name].to("meta") for name in names},
            model._keep_in_fp32_modules,
            config=PreTrainedConfig(),
            state_dict=state | {_LAST: torch.zeros(1, device=device, dtype=model.dtype)},
            quantization_config=copy.deepcopy(settings),
            dtype=model.dtype,
            device_map={"": device},
        )
        quantized |= {name: loaded.get_submodule(name) for name in names}
    return quantized


def copy_quantized(network: nn.Module, fresh: nn.Module) -> nn.Module:
    """A bit-identical copy of a quantised network.

    Args:
        fresh: a network of the same class without weights, adapters or hooks.

    Raises:
        ValueError: the network has an adapter or an offload hook, which the copy would share.
    """
    hooked = any(hasattr(module, "_hf_hook") for module in network.modules())
    if hooked or {name for name, _ in network.named_modules()} != {name for name, _ in fresh.named_modules()}:
        raise ValueError(
            "The public network is quantised and has an adapter or an offload hook, which a copy would share: unload "
            "the adapter, and load the model on one device."
        )
    return copy.deepcopy(network)


def check_unquantized(config: PreTrainedConfig, where: object, task: str) -> None:
    """Checks that a checkpoint on disk is not quantised.

    Args:
        config: the checkpoint's.
        where: names it in the error message.
        task: ends the message "cannot be ...".

    Raises:
        ValueError: its config has a `quantization_config`.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    raise ValueError(
        f"{where} is quantised ({method}) and cannot be {task}: use the checkpoint that it was quantised from, and "
        "quantise the result, with from_pretrained(quantization_config=...). A live quantised model can be changed "
        "with add_expert and remove_expert."
    )


class _Networks(PreTrainedModel):
    """A model that consists of the given networks, each under its name, for `from_pretrained` to load."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, networks: Mapping[str, nn.Module], keep: Sequence[str]) -> None:
        super().__init__(config)
        self._keep_in_fp32_modules = keep
        for name, network in networks.items():
            *path, leaf = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, network)
        # quantisers skip the last layer, assuming that it is the head
        self.add_module(_LAST.split(".")[0], nn.LayerNorm(1, bias=False))
        self.post_init()

    def get_input_embeddings(self) -> None:
        """None; transformers would otherwise search for them by name."""

    def get_output_embeddings(self) -> None:
        """None; transformers would otherwise search for them by name."""


_LAST = "flexmoe_last.weight"


def _by_device(networks: Mapping[str, nn.Module]) -> dict[torch.device, list[str]]:
    found: dict[torch.device, list[str]] = {}
    for name, network in networks.items():
        found.setdefault(next(network.parameters()).device, []).append(name)
    return found


def warn_if_nothing_was_quantized(model: PreTrainedModel) -> None:
    """Warns if a quantiser found nothing to quantise, as torchao does in GPT-2's Conv1D."""
    if has_quantized_weights(model):
        return
    kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "weight")})
    logger.warning(
        "quantization_config=%s quantised no weight of this model: it knows Linear layers, and the layers here are of "
        "the classes %s, or are excluded. The model is as large as without it.",
        type(model.hf_quantizer.quantization_config).__name__,
        kinds,
    )


__all__ = [
    "check_unquantized",
    "copy_quantized",
    "quantize_like",
    "warn_if_nothing_was_quantized",
]
