"""Which anchor a live model stands on: its fingerprint, computed anew from its tensors.

An anchor's fingerprint is a function of files, made while grafting; this one says whether a model that is about to be
saved still holds those bytes. A model that was cast or quantised at load, or that lacks an untied head, cannot be told
from one that was not changed, so it is left alone: its anchor, and its experts', is the one that it was made from.
Does not cover the streaming computation (`flexmoe.conversion.graft`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .anchors_flexmoe import NameMap
from .configuration_flexmoe import PUBLIC
from .parallel_flexmoe import whole
from .quantization_flexmoe import has_quantized_weights
from .tensors_flexmoe import fingerprint, tensor_bytes, tensor_info

logger = logging.getLogger(__name__)


def live_fingerprint(state_dict: Mapping[str, Tensor], names: NameMap, tied: set[str]) -> tuple[str, str] | None:
    """Fingerprint and dtype ("mixed" if there are several) of the anchor inside a FlexMoE's state dict.

    Args:
        state_dict: the model's tensors; None is returned if one has no data (meta device, offload).
        names: the tensor names of this anchor.
        tied: names of tied duplicates, which count once.
    """
    lines, dtypes = [], set()
    for name, tensor in state_dict.items():
        dense_name = names.to_dense(name)
        is_row = name.endswith(f".router.{PUBLIC}.weight")
        if name in tied or (dense_name is None and not is_row):
            continue
        if tensor.device.type == "meta":
            return None
        tensor = whole(tensor.detach()).cpu().contiguous()
        if is_row and not tensor.any():
            continue
        info = tensor_info(dense_name or name, tensor)
        lines.append((info.name, info.dtype, info.shape, hashlib.sha256(tensor_bytes(tensor)).hexdigest()))
        if not is_row:
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return fingerprint(lines), dtypes.pop() if len(dtypes) == 1 else "mixed"


@torch.no_grad()
def refresh_fingerprint(model: Any, state_dict: Mapping[str, Tensor] | None) -> None:
    """Gives `model.config.anchor` a new fingerprint, with a warning, if the anchor's tensors were changed."""
    anchor = model.config.anchor
    headless = model.get_output_embeddings() is None and not model.config.get_text_config().tie_word_embeddings
    if not anchor or not anchor.get("fingerprint") or headless or has_quantized_weights(model):
        return
    state = model.state_dict() if state_dict is None else state_dict
    live = live_fingerprint(state, model.anchor_names, set(model.all_tied_weights_keys))
    if live is None or live[1] != anchor.get("dtype") or live[0] == anchor["fingerprint"]:
        return
    logger.warning(
        "The anchor of this model was modified: its fingerprint was %s and is now %s. Experts made for the original "
        "anchor will not be accepted by what is saved here.",
        anchor["fingerprint"],
        live[0],
    )
    model.config.anchor = {**anchor, "repo": None, "revision": None, "fingerprint": live[0]}


__all__ = ["live_fingerprint", "refresh_fingerprint"]
