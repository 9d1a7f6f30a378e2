"""Killed at any moment: a folder that is written again and again always loads as a whole one, the old or the new.

Not here: power cuts, which a process cannot make, and two runs that write one folder at once.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flexmoe.conversion.compose import compose
from flexmoe.conversion.graft import graft
from flexmoe.modeling import ExpertPackage, FlexMoeForCausalLM
from flexmoe.modeling.folders_flexmoe import TEMPORARY_MARK
from flexmoe.testing import perturb_expert, tiny_anchor

KILLS = 30  # over the three commands
SEEDS = (1, 2)  # what the two versions of everything are made from

WRITER = """
import itertools, sys, warnings
from pathlib import Path
from flexmoe.conversion.compose import compose
from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
warnings.simplefilter("ignore")  # folders that earlier kills left behind
command, world, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
models = {v: FlexMoeForCausalLM.from_pretrained(world / f"composed-{v}") for v in "12"}
print("ready", flush=True)
for version in itertools.cycle("21"):
    if command == "graft":
        graft(world / f"anchor-{version}", out, overwrite=True)
    elif command == "compose":
        compose(world / f"grafted-{version}", [world / f"math-{version}"], out, public_prior=0.0, overwrite=True)
    else:
        models[version].save_expert("math", out, overwrite=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of an anchor, its graft, an expert and their composition."""
    folder = tmp_path_factory.mktemp("world")
    for version in map(str, SEEDS):
        tiny_anchor("llama", seed=int(version)).save_pretrained(folder / f"anchor-{version}")
        graft(folder / f"anchor-{version}", folder / f"grafted-{version}")
        model = FlexMoeForCausalLM.from_pretrained(folder / f"grafted-{version}")
        model.add_expert_copy("math")
        perturb_expert(model, "math", seed=int(version))
        package = model.save_expert("math", folder / f"math-{version}")
        compose(folder / f"grafted-{version}", [package], folder / f"composed-{version}", public_prior=0.0)
    return folder


def tensors(command: str, folder: Path) -> dict[str, torch.Tensor]:
    """Loads the folder as its users do, with every check that this includes."""
    if command == "save_expert":
        return dict(ExpertPackage.open(folder).tensors())
    return FlexMoeForCausalLM.from_pretrained(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("command", "made"), [("graft", "grafted"), ("compose", "composed"), ("save_expert", "math")])
def test_a_kill_leaves_the_old_folder_or_the_new_one(command: str, made: str, world: Path, tmp_path: Path) -> None:
    versions = {version: tensors(command, world / f"{made}-{version}") for version in map(str, SEEDS)}
    out, chance = tmp_path / "out", random.Random(command)
    shutil.copytree(world / f"{made}-1", out)
    found, interrupted = [], 0
    for kill in range(KILLS // 3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, command, str(world), str(out)], stdout=subprocess.PIPE, text=True
        )
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.4))
            writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL, "it ended by itself"
        now = tensors(command, out)
        matching = [version for version, state in versions.items() if same(now, state)]
        assert len(matching) == 1, f"kill {kill}: neither the old nor the new one"
        found += matching
        strays = [path for path in tmp_path.iterdir() if TEMPORARY_MARK in path.name]
        interrupted += bool(strays)
        for stray in strays:
            shutil.rmtree(stray)
    assert interrupted, "no kill came while a folder was being written: nothing was tested"
    print(f"{command}: found versions {''.join(found)}, {interrupted} of {len(found)} kills while writing")  # noqa: T201
