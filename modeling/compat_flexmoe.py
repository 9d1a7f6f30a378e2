"""What differs between supported versions of torch and transformers, in one place, each with its version.

Code elsewhere is the same for all versions. `docs/compatibility.md` says which were run. Does not cover optional
libraries (PEFT, torchao, bitsandbytes), whose ranges are lower bounds in pyproject.toml.
"""

from typing import Any

from transformers import PreTrainedModel


def enable_activation_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Recomputes layers in the backward pass; `kwargs` go to torch's `checkpoint`.

    transformers 5.23 calls it `activation_checkpointing_enable`, and warns of the older name, the only one before.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None)


__all__ = ["enable_activation_checkpointing"]
