"""Killed at any moment: a folder that is written again and again always loads as a whole one, the old or the new.

Not here: power cuts, which a process cannot make, and two runs that write one folder at once.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmoe.conversion.compose import compose
from flexmoe.conversion.export import export
from flexmoe.conversion.graft import graft
from flexmoe.conversion.import_flex_olmo import import_flex_olmo
from flexmoe.modeling import ExpertPackage, FlexMoeForCausalLM
from flexmoe.modeling.folders_flexmoe import TEMPORARY_MARK, atomic_folder
from flexmoe.testing import perturb_expert, tiny_anchor

KILLS = 10  # of each command, and more until one came while it was writing
MAX_KILLS = 60
SEEDS = (1, 2)  # what the two versions of everything are made from
EXPORTS = {"dense": "llama", "mixtral": "llama", "flex_olmo": "olmo2", "qwen3_moe": "qwen3"}  # and the anchor's family
COMMANDS = ("graft", "compose", "save_expert", "import", *EXPORTS)

WRITER = """
import itertools, sys, warnings
from pathlib import Path
from flexmoe.conversion.compose import compose
from flexmoe.conversion.export import export
from flexmoe.conversion.graft import graft
from flexmoe.conversion.import_flex_olmo import import_flex_olmo
from flexmoe.modeling import FlexMoeForCausalLM
warnings.simplefilter("ignore")  # folders that earlier kills left behind
command, family, world, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
models = {}
if command == "save_expert":
    models = {v: FlexMoeForCausalLM.from_pretrained(world / f"compose-{v}") for v in "12"}
print("ready", flush=True)
for version in itertools.cycle("21"):
    if command == "graft":
        graft(world / f"anchor-{version}", out, overwrite=True)
    elif command == "compose":
        compose(world / f"graft-{version}", [world / f"save_expert-{version}"], out, public_prior=0.0, overwrite=True)
    elif command == "save_expert":
        models[version].save_expert("math", out, overwrite=True)
    elif command == "import":
        import_flex_olmo(world / f"flex_olmo-{version}", out, names=["public", "math"], overwrite=True)
    else:
        expert = "math" if command == "dense" else None
        export(world / f"{family}-{version}", out, to=command, expert=expert, overwrite=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read, and what each of them writes, in two versions: `<command>-<version>`."""
    folder = tmp_path_factory.mktemp("world")
    for version in map(str, SEEDS):
        for family in sorted(set(EXPORTS.values())):
            tiny_anchor(family, seed=int(version)).save_pretrained(folder / "anchor")
            graft(folder / "anchor", folder / "grafted")
            model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
            model.add_expert_copy("math")
            perturb_expert(model, "math", seed=int(version))
            for block in model.flexmoe_blocks():
                torch.nn.init.zeros_(block.router["math"].bias)
            package = model.save_expert("math", folder / "package")
            compose(folder / "grafted", [package], folder / f"{family}-{version}", public_prior=0.0)
            names = {"anchor": "anchor", "grafted": "graft", "package": "save_expert"}
            for made, name in names.items():
                if family == "llama":
                    shutil.move(folder / made, folder / f"{name}-{version}")
                else:
                    shutil.rmtree(folder / made)
        shutil.copytree(folder / f"llama-{version}", folder / f"compose-{version}")
        for to, family in EXPORTS.items():
            expert = "math" if to == "dense" else None
            export(folder / f"{family}-{version}", folder / f"{to}-{version}", to=to, expert=expert)
        import_flex_olmo(folder / f"flex_olmo-{version}", folder / f"import-{version}", names=["public", "math"])
    return folder


def tensors(command: str, folder: Path) -> dict[str, torch.Tensor]:
    """Loads the folder as its users do, with every check that this includes."""
    if command == "save_expert":
        return dict(ExpertPackage.open(folder).tensors())
    if command == "import":
        model = tensors("graft", folder / "model")
        return model | {f"math.{name}": tensor for name, tensor in tensors("save_expert", folder / "math").items()}
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def interrupted(stray: Path, out: Path) -> None:
    """The next run into `out` names what was left; this one stops before it has written anything."""
    named = pytest.warns(UserWarning, match=f"interrupted.*{re.escape(stray.name)}")
    with named, pytest.raises(KeyboardInterrupt), atomic_folder(out, overwrite=True):
        raise KeyboardInterrupt


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_leaves_the_old_folder_or_the_new_one(command: str, world: Path, tmp_path: Path) -> None:
    versions = {version: tensors(command, world / f"{command}-{version}") for version in map(str, SEEDS)}
    assert not same(*versions.values())
    out, chance = tmp_path / "out", random.Random(command)
    shutil.copytree(world / f"{command}-1", out)
    arguments = [command, EXPORTS.get(command, "llama"), str(world), str(out)]
    found, strayed = [], 0
    while len(found) < KILLS or (not strayed and len(found) < MAX_KILLS):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True)
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.4))
            writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL, "it ended by itself"
        now = tensors(command, out)
        matching = [version for version, state in versions.items() if same(now, state)]
        assert len(matching) == 1, f"kill {len(found)}: neither the old nor the new one"
        found += matching
        strays = [path for path in tmp_path.iterdir() if TEMPORARY_MARK in path.name]
        strayed += bool(strays)
        for stray in strays:
            interrupted(stray, out)
            shutil.rmtree(stray)
    assert strayed, "no kill came while a folder was being written: nothing was tested"
    print(f"{command}: found versions {''.join(found)}, {strayed} of {len(found)} kills while writing")  # noqa: T201
