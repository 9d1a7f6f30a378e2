"""The proof that an opt-out is exact: the model without an owner *is* the model that never met that owner.

Two models are measured, each in a fresh process: the one that removing the owner left behind, and one composed there
and then in a folder that holds the grafted anchor and the other owners' packages, nothing else. Equal means equal
bytes: of every file, of every tensor by name and order, and of the logits on the same tokens.

Does not cover: influence through other channels, such as a router tuned on everyone's data (FlexMoE's default is not).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .owners import owner_environment
from .stages import folder_digest


def prove_opt_out(
    owner: str,
    opted_out: Path,
    grafted: Path,
    packages: Mapping[str, Path],
    input_ids: torch.Tensor,
    folder: Path,
    *,
    num_experts_per_tok: int,
) -> dict[str, Any]:
    """Compares the model in `opted_out` with one composed from `packages` without `owner`; the verdict as a dict.

    `input_ids`: int64 [B, L], on which logits are compared; `num_experts_per_tok`: what the model was composed with.
    Works in `folder`, which keeps all evidence.
    """
    never_met = folder / "never-met"
    shutil.copytree(grafted, never_met / "grafted")
    others = [name for name in packages if name != owner]
    for name in others:
        shutil.copytree(packages[name], never_met / "packages" / name)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(input_ids.tolist()))
    recipe = {
        "grafted": "grafted",
        "packages": [f"packages/{name}" for name in others],
        "num_experts_per_tok": num_experts_per_tok,
    }
    jobs: dict[str, dict[str, Any]] = {
        "opted-out": {"model": str(opted_out.resolve())},
        "never-met": {"model": "model", "compose": recipe},
    }
    with ThreadPoolExecutor() as pool:
        left, right = pool.map(lambda name: _measure(name, jobs[name], folder, tokens), jobs)
    return {
        "owner": owner,
        "state_dict_equal": left["state_dict_sha256"] == right["state_dict_sha256"],
        "logits_equal": bool(torch.equal(left["logits"], right["logits"])),
        "config_equal": left["config"] == right["config"],
        "files_equal": folder_digest(opted_out) == folder_digest(never_met / "model"),
        "state_dict_sha256": left["state_dict_sha256"],
        "never_met_sha256": right["state_dict_sha256"],
        "logits_compared": list(left["logits"].shape),
        "composed_from": others,
    }


def _measure(name: str, job: Mapping[str, Any], folder: Path, tokens: Path) -> dict[str, Any]:
    """Runs the job in a fresh process inside `<folder>/<name>`; what it found, logits [B, L, V] included."""
    home = (folder / name).resolve()
    home.mkdir(exist_ok=True)
    out = folder.resolve() / name
    job = {**job, "tokens": str(tokens.resolve()), "out": str(out)}
    command = [sys.executable, "-m", "flexmoe.demo.fresh_process", json.dumps(job)]
    done = subprocess.run(
        command, cwd=home, env=owner_environment(home, 1), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring the {name} model failed (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    return {**json.loads(Path(f"{out}.json").read_text()), "logits": load_file(f"{out}.safetensors")["logits"]}
