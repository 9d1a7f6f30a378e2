"""Checks that an opt-out is exact: the model after removing an owner equals a model composed without that owner.

Each model is measured in a new process: the one after the removal, and one that is composed there, in a folder that
contains only the grafted anchor and the packages of the other owners. All files, all tensors (by name and order) and
the logits on the same tokens must be bit-equal.

Does not cover other influences of the owner, such as a router tuned on all owners' data (by default there is none).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flexmoe.demo.anchor_source import link_tree
from flexmoe.demo.owners import owner_environment
from flexmoe.demo.stages import folder_digest


def prove_opt_out(
    owner: str,
    opted_out: Path,
    grafted: Path,
    packages: Mapping[str, Path],
    input_ids: torch.Tensor,
    folder: Path,
    *,
    num_experts_per_tok: int,
    at_once: bool = True,
) -> dict[str, Any]:
    """Compares the model in `opted_out` with one composed from `packages` without `owner`.

    `input_ids` (int64 [B, L]) are the tokens whose logits are compared, `num_experts_per_tok` is that of the composed
    model, `at_once` measures both models at the same time. Everything that is compared stays in `folder`. Returns the
    result as JSON values.
    """
    without = folder / "without-owner"
    link_tree(grafted, without / "grafted")
    others = [name for name in packages if name != owner]
    for name in others:
        link_tree(packages[name], without / "packages" / name)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(input_ids.tolist()), encoding="utf-8")
    recipe = {
        "grafted": "grafted",
        "packages": [f"packages/{name}" for name in others],
        "num_experts_per_tok": num_experts_per_tok,
    }
    jobs: dict[str, dict[str, Any]] = {
        "opted-out": {"model": str(opted_out.resolve())},
        "without-owner": {"model": "model", "compose": recipe},
    }
    threads = 1 if at_once else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=len(jobs) if at_once else 1) as pool:
        left, right = pool.map(lambda name: _measure(name, jobs[name], folder, tokens, threads), jobs)
    return {
        "owner": owner,
        "state_dict_equal": left["state_dict_sha256"] == right["state_dict_sha256"],
        "logits_equal": bool(torch.equal(left["logits"], right["logits"])),
        "config_equal": left["config"] == right["config"],
        "files_equal": folder_digest(opted_out) == folder_digest(without / "model"),
        "state_dict_sha256": left["state_dict_sha256"],
        "never_met_sha256": right["state_dict_sha256"],
        "logits_compared": list(left["logits"].shape),
        "composed_from": others,
    }


def _measure(name: str, job: Mapping[str, Any], folder: Path, tokens: Path, threads: int) -> dict[str, Any]:
    """Runs the job in a new process in `<folder>/<name>`; returns its results, including the logits [B, L, V]."""
    cwd = (folder / name).resolve()
    cwd.mkdir(exist_ok=True)
    out = folder.resolve() / name
    job = {**job, "tokens": str(tokens.resolve()), "out": str(out)}
    command = [sys.executable, "-m", "flexmoe.demo.fresh_process", json.dumps(job)]
    environment = owner_environment(cwd, threads)
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"measuring the {name} model failed (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    return {
        **json.loads(Path(f"{out}.json").read_text(encoding="utf-8")),
        "logits": load_file(f"{out}.safetensors")["logits"],
    }
