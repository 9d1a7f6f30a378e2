"""The fingerprint of an anchor: SHA-256 over its tensors' names, dtypes, shapes and bytes.

Experts are accepted only for the anchor that they were trained on. The fingerprint is computed from stored tensors
while grafting, and again for a live model that is about to be saved. A model that was cast or quantised at load, or
that lacks an untied head, cannot be compared and keeps its fingerprint.

Does not cover reading or writing files (`flexmoe.io`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .anchors_flexmoe import NameMap
from .configuration_flexmoe import PUBLIC
from .distributed_flexmoe import full_tensor
from .experts_flexmoe import has_quantized_weights

logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes: where torch puts tensors of its own, and where those of a checkpoint should lie."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}
"""Dtypes by their codes in safetensors headers."""

DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()  # Any: numpy's stubs know no buffer protocol before Python 3.12
    return memoryview(array)


@torch.no_grad()
def align_tensors(model: nn.Module) -> None:
    """Copies tensors at odd addresses of a mapped file, which change the bits of products: equal models must agree."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def fingerprint(lines: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """SHA-256 (hex) over sorted lines `name dtype shape sha256`, one per tensor of a dense checkpoint.

    Args:
        lines: name, safetensors dtype code, shape, SHA-256 (hex) of the bytes; in any order. A line of the hashed
            text reads `model.norm.weight BF16 [128] 9f86d0...`; lines are joined by a newline.
    """
    text = sorted(f"{name} {dtype} [{','.join(map(str, shape))}] {digest}" for name, dtype, shape, digest in lines)
    return hashlib.sha256("\n".join(text).encode("utf-8")).hexdigest()


def live_fingerprint(state_dict: Mapping[str, Tensor], names: NameMap, tied: set[str]) -> tuple[str, str] | None:
    """Fingerprint and dtype ("mixed" if there are several) of the anchor inside a FlexMoE's state dict.

    Args:
        state_dict: the model's tensors. None is returned if one has no data (meta device, offload).
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
        tensor = full_tensor(tensor.detach()).cpu().contiguous()
        if is_row and not tensor.any():
            continue
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{name}: safetensors cannot hold {tensor.dtype}; it holds {', '.join(TORCH_DTYPES)}.")
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        lines.append((dense_name or name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), digest))
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
