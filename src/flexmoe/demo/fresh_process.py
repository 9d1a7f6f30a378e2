"""Run as `python -m flexmoe.demo.fresh_process MODEL TOKENS OUT`: what the opt-out proof compares, of one model.

A module of its own, which nothing imports: the process that runs it knows a folder and some tokens, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import flexmoe  # noqa: F401 - registers the model


def state_dict_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(model_folder: Path, tokens: Path, out: Path) -> None:
    """What the proof compares, of one model: writes `<out>.json` (hash, config) and `<out>.safetensors` (logits)."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    with torch.no_grad():
        logits_BLV = model(input_ids=torch.tensor(json.loads(tokens.read_text())), use_cache=False).logits
    record = {"state_dict_sha256": state_dict_sha256(model.state_dict()), "config": model.config.to_dict()}
    out.with_suffix(".json").write_text(json.dumps(record, default=str, sort_keys=True))
    save_file({"logits": logits_BLV.contiguous()}, out.with_suffix(".safetensors"))


if __name__ == "__main__":
    measure(*(Path(argument) for argument in sys.argv[1:4]))
