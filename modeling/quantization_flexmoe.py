"""Experts of a model that was quantised when it was loaded: telling quantised tensors, making a newcomer alike.

Which networks are quantised, and how, is the library's matter: `from_pretrained(quantization_config=...)` treats the
Linears of experts like any others, and leaves router rows alone (`_keep_in_fp32_modules` of the model). A newcomer
takes the same road: it is loaded with its model's own quantization config, under the names that it will have there, so
that it has the bits it would have had in the checkpoint, and what the config spares by name is spared.

Does not cover training experts on a quantised anchor, nor changes to quantised checkpoints on disk: both are refused.
"""

import copy
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter's numbers stand for others: integers (bitsandbytes), a tensor class that decodes (torchao).

    A DTensor, which holds a part of plain numbers, is not.
    """
    decodes = hasattr(parameter, "__tensor_flatten__") and not hasattr(parameter, "full_tensor")
    return decodes or not (parameter.dtype.is_floating_point or parameter.dtype.is_complex)


def has_quantized_weights(module: nn.Module) -> bool:
    """Whether any parameter of `module` is quantised."""
    return any(is_quantized(parameter) for parameter in module.parameters())


def quantized_alike(model: PreTrainedModel, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks, quantised as `model` was when it was loaded; the very same ones if it was not.

    Args:
        model: what `from_pretrained` returned.
        networks: plain networks with their weights, by the name that each will have in the model.

    Raises:
        ValueError: the model's quantiser needs calibration data, so it cannot quantise weights alone.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return dict(networks)
    settings = quantizer.quantization_config
    if quantizer.requires_calibration:
        raise ValueError(
            f"This model was quantised by {settings.quant_method}, which needs calibration data, so an expert cannot "
            "be added to it: add it to the unquantised model, and quantise that."
        )
    done: dict[str, nn.Module] = {}
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
        done |= {name: loaded.get_submodule(name) for name in names}
    return done


def copied_quantized(network: nn.Module, plain: nn.Module) -> nn.Module:
    """A copy of a quantised network, bit for bit. `plain` is such a network as its class builds it.

    Raises:
        ValueError: an adapter or an offload hook is around the network, and would be copied with it.
    """
    hooked = any(hasattr(module, "_hf_hook") for module in network.modules())
    if hooked or {name for name, _ in network.named_modules()} != {name for name, _ in plain.named_modules()}:
        raise ValueError(
            "The public network is quantised, and an adapter or an offload hook is around it, which a copy would "
            "share: unload the adapter, and load the model on one device."
        )
    return copy.deepcopy(network)


def check_unquantized(config: PreTrainedConfig, where: object, task: str) -> None:
    """Checks that a checkpoint on disk holds plain weights.

    Raises:
        ValueError: its config has a `quantization_config`.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    raise ValueError(
        f"{where} is quantised ({method}), and cannot be {task}: take the checkpoint that it was made from, and "
        "quantise the result, with from_pretrained(quantization_config=...). A live quantised model can be changed "
        "with add_expert and remove_expert."
    )


def warn_if_nothing_was_quantized(model: PreTrainedModel) -> None:
    """Warns if `model` was loaded with a quantiser that found nothing to quantise (torchao in GPT-2's Conv1D)."""
    if getattr(model, "hf_quantizer", None) is None or has_quantized_weights(model):
        return
    kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "weight")})
    logger.warning(
        "quantization_config=%s quantised no weight of this model: it knows Linear layers, and the layers here are of "
        "the classes %s, or are excluded. The model is as large as without it.",
        type(model.hf_quantizer.quantization_config).__name__,
        kinds,
    )


class _Networks(PreTrainedModel):
    """Nothing but networks, each under a name of its own choice, for `from_pretrained` to load."""

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
        # quantisers spare the layer that comes last, taking it for a head
        self.add_module(_LAST.split(".")[0], nn.LayerNorm(1, bias=False))
        self.post_init()

    def get_input_embeddings(self) -> None:
        """None: transformers would look for them by name."""

    def get_output_embeddings(self) -> None:
        """None, likewise."""


_LAST = "flexmoe_last.weight"


def _by_device(networks: Mapping[str, nn.Module]) -> dict[torch.device, list[str]]:
    found: dict[torch.device, list[str]] = {}
    for name, network in networks.items():
        found.setdefault(next(network.parameters()).device, []).append(name)
    return found


__all__ = [
    "check_unquantized",
    "copied_quantized",
    "has_quantized_weights",
    "is_quantized",
    "quantized_alike",
    "warn_if_nothing_was_quantized",
]
