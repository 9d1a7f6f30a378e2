"""Thousands of folders with stray files: what is pushed, pulled and composed is the same as without them."""

import shutil
import warnings
from pathlib import Path
from random import Random

import pytest

from flexmoe.conversion.compose import add, compose, remove
from flexmoe.hub.publish import plan_upload
from flexmoe.hub.pull import pull
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from tests.support.stray_files import MARK, add_stray_files
from tests.support.two_owners import write_two_owners

CASES = 2000
WAYS = ("push", "pull", "compose", "add", "remove")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_two_owners(folder)
    compose(folder / "grafted", [folder / "math"], folder / "model")
    sources = {"public": folder / "anchor", "math": folder / "math"}
    FlexMoeForCausalLM.from_pretrained(folder / "model").save_composition(folder / "composition", sources=sources)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(way: str, kind: str, folder: Path, world: Path, out: Path) -> object:
    """What leaves the folder."""
    if way == "push":
        return [(file.name, file.sha256) for file in plan_upload(folder).files]
    if way == "pull":
        return content(pull(str(folder), out))
    if way == "compose":
        return content(compose(folder, [world / "math"], out, public_prior=0.0))
    if way == "add":
        return content(add(folder, world / "code", out))
    return content(remove(folder, "math", out))


def test_stray_files_stay(world: Path, tmp_path: Path) -> None:
    kinds = {"push": ("model", "math", "grafted"), "pull": ("model", "math", "composition"), "compose": ("grafted",)}
    expected: dict[tuple[str, str], object] = {}
    for number in range(CASES):
        chance = Random(number)
        way = "push" if chance.random() < 0.8 else chance.choice(WAYS)  # the others write weights
        kind = chance.choice(kinds.get(way, ("model",)))
        if (way, kind) not in expected:
            expected[way, kind] = run(way, kind, world / kind, world, tmp_path / f"{way}-{kind}")
        case = tmp_path / f"case-{number}"
        folder = shutil.copytree(world / kind, case / "folder")
        names = add_stray_files(folder, chance, case)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not copied from")
            found = run(way, kind, folder, world, case / "out")
        assert found == expected[way, kind], (number, way, kind, names)
        assert MARK not in str(found).encode()
        shutil.rmtree(case)
