"""`python -m flexmoe.demo.fresh_process JOB`: hashes a model and computes its logits, after composing it if requested.

Nothing imports this module: it runs in a separate process that reads only the files its job names. Keys of the JSON
job:

    model     folder of the model
    tokens    JSON file with token ids [B, L]
    out       path without suffix: <out>.json (hash, config) and <out>.safetensors (logits) are written
    compose   optional: {"grafted": folder, "packages": [folders], "num_experts_per_tok": k}, from which to compose
              `model`

Does not cover comparing two models (`opt_out`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flexmoe.conversion.compose import compose
from flexmoe.cpu.linear import has_instructions
from flexmoe.io.dense import load_causal_lm


def state_dict_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(job: Mapping[str, Any]) -> None:
    """Runs the job."""
    if recipe := job.get("compose"):
        compose(recipe["grafted"], recipe["packages"], job["model"], num_experts_per_tok=recipe["num_experts_per_tok"])
    model = load_causal_lm(job["model"], dtype="auto").eval()
    digest = state_dict_sha256(model.state_dict())
    if not has_instructions(model.dtype):
        model.float()
    with torch.no_grad():
        logits_BLV = model(
            input_ids=torch.tensor(json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))), use_cache=False
        ).logits
    record = {"state_dict_sha256": digest, "config": model.config.to_dict()}
    record["config"].pop("_name_or_path", None)  # the folder it was loaded from
    Path(f"{job['out']}.json").write_text(json.dumps(record, default=str, sort_keys=True), encoding="utf-8")
    save_file({"logits": logits_BLV.contiguous()}, f"{job['out']}.safetensors")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
