"""Invalid input of graft, export, import and compose: exit code 1, a message of one paragraph, and no output folder.

Does not cover the errors of the library functions (`tests/conversion`), or damaged packages (`tests/packages`).
"""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, FlexOlmoConfig, MixtralConfig

from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, tiny_anchor
from flexmoe_cli import main
from tests.support.soak import soak

SHARDS = "30KB"
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of all commands, in several shards each."""
    folder = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate(("anchor", "tuned")):
        tiny_anchor("llama", seed).save_pretrained(folder / name, max_shard_size=SHARDS)
    torch.manual_seed(0)
    flex_olmo = AutoModelForCausalLM.from_config(FlexOlmoConfig(**SIZES, num_experts=2, num_experts_per_tok=2))
    flex_olmo.save_pretrained(folder / "flex-olmo", max_shard_size=SHARDS)
    graft(folder / "anchor", folder / "grafted", max_shard_size=30_000)
    model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
    model.add_expert_copy("math")
    perturb_expert(model, "math")
    for block in model.flexmoe_blocks():
        torch.nn.init.zeros_(block.router["math"].bias)
    model.save_expert("math", folder / "math")
    model.save_pretrained(folder / "merged", max_shard_size=SHARDS)
    BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).save_pretrained(folder / "bert")
    mixtral = MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=2)
    AutoModelForCausalLM.from_config(mixtral).save_pretrained(folder / "mixtral")
    tiny_anchor("qwen3").save_pretrained(folder / "qwen3")
    graft(folder / "qwen3", folder / "grafted-qwen3")
    return folder


@pytest.fixture
def world(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the inputs, to be damaged; also the working directory."""
    shutil.copytree(originals, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


# The commands, and the folder that is damaged for each.
READS = {
    "graft": ("graft anchor", "anchor"),
    "graft --expert": ("graft anchor --expert math=tuned --shared anchor", "tuned"),
    "compose": ("compose grafted math", "grafted"),
    "export dense": ("export merged --to dense --expert math", "merged"),
    "export mixtral": ("export merged --to mixtral", "merged"),
    "import": ("import flex-olmo --names public,math", "flex-olmo"),
}


def refusal(line: str, capsys: pytest.CaptureFixture[str], out: str = "out") -> str:
    """The error message of a command that must fail without leaving or changing files."""
    before = listing(Path())
    capsys.readouterr()
    assert main([*line.split(), "--out", out]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = [text for text in printed.err.splitlines() if "Loading" not in text and "Writing" not in text]
    assert error.startswith("Error: ")
    assert "Unexpected error" not in error
    assert error.endswith("."), "a complete sentence"
    assert listing(Path()) == before
    return error


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) >= 2
    return found


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def lose_a_shard(folder: Path) -> None:
    shards(folder)[-1].unlink()


def cut_a_shard(folder: Path) -> None:
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])


def swap_two_in_the_index(folder: Path) -> None:
    def swap(weight_map: dict[str, str]) -> None:
        first = min(weight_map)
        weight_map[first] = next(name for name in weight_map.values() if name != weight_map[first])

    rewrite_index(folder, swap)


def index_a_missing_tensor(folder: Path) -> None:
    rewrite_index(folder, lambda weight_map: weight_map.update(phantom=max(weight_map.values())))


def leave_out_of_the_index(folder: Path) -> None:
    rewrite_index(folder, lambda weight_map: weight_map.pop(min(weight_map)))


def store_one_twice(folder: Path) -> None:
    first, second = shards(folder)[:2]
    stolen = load_file(first).popitem()
    save_file({**load_file(second), stolen[0]: stolen[1]}, second, metadata={"format": "pt"})


def claim_other_sizes(folder: Path) -> None:
    path = folder / "config.json"
    text, count = re.subn(r'"intermediate_size": \d+', '"intermediate_size": 80', path.read_text())
    assert count == 1
    path.write_text(text)


def garble_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


DAMAGES: dict[Callable[[Path], None], str] = {
    lose_a_shard: r"the index names model-\S+\.safetensors, which is not there\. Fetch it again",
    cut_a_shard: r"model-00001-of-\S+: .* lie outside the [\d,]+ bytes of data\. If the file was cut off, fetch it",
    swap_two_in_the_index: r"index\.json puts '\S+' in model-\S+, but it is in model-\S+ .*Fetch the checkpoint again",
    index_a_missing_tensor: r"index\.json puts 'phantom' in model-\S+, but no file has it",
    leave_out_of_the_index: r"index\.json does not list '\S+', but it is in model-\S+",
    store_one_twice: r"'\S+' is in two files, \S+ and \S+",
    claim_other_sizes: r"whose shape is not that of the config|intermediate_size|has shape|its shape is",
    garble_the_config: r"config\.json",
}


def each_command_and_damage() -> list[Any]:
    """All pairs; `make test` runs every other one: each command with half of the damages, alternately."""
    pairs = itertools.product(enumerate(READS), enumerate(DAMAGES))
    return [
        (pytest.param if (i + j) % 2 == 0 else soak)(command, damage, id=f"{command}-{damage.__name__}")
        for (i, command), (j, damage) in pairs
    ]


@pytest.mark.parametrize(("command", "damage"), each_command_and_damage())
def test_damaged_folders(command: str, damage: Callable[[Path], None], world: Path, capsys) -> None:
    line, folder = READS[command]
    damage(world / folder)
    error = refusal(line, capsys)
    assert re.search(DAMAGES[damage], error), error
    assert folder in error


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("graft bert", "no list of decoder layers with a feed-forward network in each"),
        ("graft mixtral", "mixture of experts already"),
        ("graft grafted", "FlexMoE already"),
        ("graft math", "is an expert package"),
        ("graft anchor --expert math=qwen3", r"not a fine-tune of .*\(model_type 'qwen3'\), the anchor as .*'llama'"),
        ("graft anchor --expert math=math", "is an expert package"),
        ("compose anchor math", "'llama' model, not a FlexMoE model. Convert it with `flexmoe graft`"),
        ("compose grafted-qwen3 math", "fingerprint"),
        ("compose grafted anchor", "not an expert package"),
        ("export anchor --to dense --expert public", "'llama' model, not a FlexMoE"),
        ("export merged --to qwen3_moe", "qwen3_moe is for anchors of type qwen3; .* --to mixtral"),
        ("export merged --to gguf", "no format 'gguf'"),
        ("import anchor --names public,math", "'llama' model; only 'flex_olmo' models can be imported"),
        ("import mixtral --names public,math", "'mixtral' model; only 'flex_olmo' models can be imported"),
    ],
)
def test_the_wrong_architecture(line: str, fault: str, world: Path, capsys) -> None:
    assert re.search(fault, error := refusal(line, capsys)), error


def break_one_number(folder: Path, pattern: str, number: float) -> str:
    """Writes `number` into a tensor that matches the pattern; returns its name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            if re.search(pattern, name):
                tensors[name].view(-1)[7] = number
                save_file(tensors, path, metadata={"format": "pt"})
                return name
    raise AssertionError(f"no tensor {pattern}")


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("command", "pattern", "fault"),
    [
        ("graft --expert", r"mlp\.down_proj", "tensor '{name}' holds NaN or an infinity, so it cannot be an expert"),
        ("export mixtral", r"router\.math\.weight", "a router row is not finite"),
        ("import", r"experts\.1\.up_proj", "expert 1 holds NaN or an infinity, in up_proj.weight of layer"),
        ("import", r"mlp\.gate\.weight", "tensor '{name}' holds NaN or an infinity"),
    ],
)
def test_numbers_that_are_not_finite(
    command: str, pattern: str, fault: str, number: float, world: Path, capsys
) -> None:
    line, folder = READS[command]
    name = break_one_number(world / folder, pattern, number)
    error = refusal(line, capsys)
    assert fault.format(name=name) in error
    assert folder in error or command.startswith("export")


@pytest.mark.parametrize("command", READS)
def test_an_output_that_exists(command: str, world: Path, capsys) -> None:
    line, folder = READS[command]
    Path("out").mkdir()
    Path("out", "mine.txt").write_text("kept")
    assert "exists already. Choose another output folder, or pass --overwrite" in refusal(line, capsys)
    if command != "compose":  # it may replace its input
        assert "which is read. Choose another output folder" in refusal(f"{line} --overwrite", capsys, out=folder)
    Path("file").write_text("kept")
    assert "is a file, not a folder" in refusal(f"{line} --overwrite", capsys, out="file")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; skips the test if none can be mounted (this requires root)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", READS)
def test_a_full_disk(command: str, world: Path, small_disk: Path, capsys) -> None:
    line, _ = READS[command]
    error = refusal(line, capsys, out=str(small_disk / "out"))
    assert f"No space left on device for {small_disk / 'out'}, of which nothing is left. Make room" in error
    assert list(small_disk.iterdir()) == []
