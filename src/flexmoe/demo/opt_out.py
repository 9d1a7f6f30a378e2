"""The proof that an opt-out is exact: the model without an owner *is* the model that never met that owner.

Two models are measured, each in a process of its own: the one that `flexmoe remove` left behind, and one composed in a
folder that holds the grafted anchor and the other owners' packages, nothing else. Equal means equal bytes: of every
file, of every tensor by name and order, and of the logits on the same tokens.

Does not cover: influence through other channels, such as a router tuned on everyone's data (FlexMoE's default is not).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    compose = [sys.executable, "-m", "flexmoe.cli", "compose", "grafted", *(f"packages/{name}" for name in others)]
    _run([*compose, "--num-experts-per-tok", str(num_experts_per_tok), "--out", "model"], never_met, folder / ".cache")
    (folder / "tokens.json").write_text(json.dumps(input_ids.tolist()))
    left = _measure(opted_out, folder, "opted-out")
    right = _measure(never_met / "model", folder, "never-met")
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


def _measure(model_folder: Path, folder: Path, name: str) -> dict[str, Any]:
    arguments = [str(path.resolve()) for path in (model_folder, folder / "tokens.json", folder / name)]
    _run([sys.executable, "-m", "flexmoe.demo.fresh_process", *arguments], folder, folder / ".cache")
    record = json.loads((folder / f"{name}.json").read_text())
    record["config"].pop("_name_or_path", None)  # where it was loaded from
    return {**record, "logits": load_file(folder / f"{name}.safetensors")["logits"]}


def _run(command: Sequence[str], cwd: Path, cache: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=owner_environment(cache, 1), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed (exit code {done.returncode}):\n{done.stderr[-2000:]}")
