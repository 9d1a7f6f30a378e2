"""Two processes compute what one computes: data parallel, fully sharded, tensor parallel; also where no token goes.

Every expected value is computed by this process, alone, on the joined batch. Families beyond Llama, half precision,
the Trainer and the command line are in tests/soak/test_distributed_grid.py.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from flexmoe import track_usage
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import (
    TOLERANCES,
    VOCABULARY,
    enable_checkpointing,
    perturb_expert,
    random_tokens,
    realigned,
    tiny_flexmoe,
)

ANCHOR = {"repo": None, "revision": None, "fingerprint": "f" * 64, "model_type": "llama", "dtype": "float32"}

LOW_RANK = {"name": "math", "kind": "low_rank", "rank": [4, 6], "alpha": 8.0}

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, torch.Tensor]


def step(model: nn.Module, inputs: Inputs) -> Tensors:
    """Gradients of the mean loss, whole."""
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: whole(grad) for name, grad in grads.items() if grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def half(rank: int, inputs: Inputs) -> Inputs:
    return {name: value.chunk(2)[rank] for name, value in inputs.items()}


def assert_close(got: Tensors, expected: Tensors, what: str) -> None:
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, **TOLERANCES[torch.float32], msg=lambda text, name=name: f"{what}, {name}: {text}"
        )


# Data parallel: one trained expert, wherever its tokens are


def little_used(kind: str = "full") -> FlexMoeForCausalLM:
    """A model that trains "math", which sees few tokens: k = 1, and a row that says "mine" seldom.

    Without renormalisation, which gives the one expert that is kept the weight 1 whatever the rows say.
    """
    math = LOW_RANK if kind == "low_rank" else "math"
    model = tiny_flexmoe("llama", [math, "code"], num_experts_per_tok=1, norm_topk_prob=False)
    for block in model.flexmoe_blocks():
        block.router["math"].bias.data.fill_(-6.0)
    model.freeze_except("math")
    return model


def batches(model: FlexMoeForCausalLM) -> dict[str, Inputs]:
    """Inputs of four sequences, two for each process, by who reaches "math": both, the first, neither.

    In "masked" the second may not use it. "again" shows that the steps before left nothing unfinished.
    """
    reaching, silent = [], []
    for sequence in random_tokens(60, 6).split(1):
        with torch.no_grad(), track_usage(model) as usage:
            model(sequence)
        shares = [usage.chosen_share(block.layer_index)["math"] for block in model.flexmoe_blocks()]
        (reaching if all(shares) else [] if any(shares) else silent).append(sequence)
    sequences = {"both": reaching[:4], "one": reaching[:2] + silent[:2], "none": silent[:4]}
    assert all(len(rows) == 4 for rows in sequences.values()), "the random model does not tell the sequences apart"
    inputs = {name: {"input_ids": torch.cat(rows)} for name, rows in sequences.items()}
    mask = model.expert_mask([model.expert_names] * 2 + [["public", "code"]] * 2)
    return inputs | {"masked": {**inputs["both"], "expert_mask": mask}, "again": inputs["both"]}


def steps_alone(checkpointing: bool, kind: str = "full") -> tuple[dict[str, Inputs], dict[str, Tensors]]:
    model = little_used(kind)
    inputs = batches(model)
    if checkpointing:
        enable_checkpointing(model)
    return inputs, {name: step(model, values) for name, values in inputs.items()}


def steps_with_ddp(rank: int, inputs: dict[str, Inputs], checkpointing: bool, kind: str) -> dict[str, Tensors]:
    model = little_used(kind)
    if checkpointing:
        enable_checkpointing(model)
    parallel = DistributedDataParallel(model)
    return {name: step(parallel, half(rank, values)) for name, values in inputs.items()}


def steps_with_fsdp2(rank: int, inputs: dict[str, Inputs], unit: str, kind: str) -> dict[str, Tensors]:
    model = little_used(kind)
    for layer, block in zip(model.anchor.model.layers, model.flexmoe_blocks(), strict=True):
        if unit == "expert":
            for module in (*block.experts.values(), *block.router.values()):
                fully_shard(module)
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        for values in inputs.values():
            model(**half(rank, values))
    return {name: step(model, half(rank, values)) for name, values in inputs.items()}


@pytest.mark.parametrize(("checkpointing", "kind"), [(False, "full"), (True, "full"), (True, "low_rank")])
def test_ddp_has_the_gradients_of_one_process(processes, checkpointing, kind):
    inputs, expected = steps_alone(checkpointing, kind)
    start = "anchor.model.layers.0.mlp.experts.math.up_proj."
    untouched = [gradient for name, gradient in expected["none"].items() if name.startswith(start)]
    assert untouched
    assert not any(gradient.any() for gradient in untouched), "no token went there"
    assert expected["none"]["anchor.model.layers.0.mlp.router.math.weight"].any(), "its row is seen by every token"
    for got in processes.run(steps_with_ddp, inputs, checkpointing, kind):
        for name in inputs:
            assert_close(got[name], expected[name], name)


@pytest.mark.parametrize(("unit", "kind"), [("layer", "full"), ("expert", "full"), ("layer", "low_rank")])
def test_fsdp2_has_the_gradients_of_one_process(processes, unit, kind):
    inputs, expected = steps_alone(checkpointing=False, kind=kind)
    for got in processes.run(steps_with_fsdp2, inputs, unit, kind):
        for name in inputs:
            assert_close(got[name], expected[name], name)


def refused(rank: int, inputs: dict[str, Inputs]) -> bool:
    with pytest.raises(ValueError, match="give fully_shard the decoder layers"):
        steps_with_fsdp2(rank, inputs, "expert", "low_rank")
    return True


def test_a_public_network_that_is_a_unit_of_its_own_cannot_be_read(processes):
    assert all(processes.run(refused, steps_alone(checkpointing=False, kind="low_rank")[0]))


# Sharded by the library, and changed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def make_checkpoint(folder: Path, family: str = "llama") -> Path:
    """Writes a model, and packages of two experts that it has not."""
    low_rank = [{**LOW_RANK, "name": name} for name in ("legal", "code")]
    model = tiny_flexmoe(
        family, ["math", *low_rank, "poems", "newer"], num_experts_per_tok=2, anchor={**ANCHOR, "model_type": family}
    )
    perturb_expert(model, "newer", seed=5)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)  # older transformers halve only what is even
    model.save_pretrained(folder / "model")  # now it knows its fingerprint
    for name in ("code", "newer"):
        model.save_expert(name, folder / name)
        model.remove_expert(name)
    model.save_pretrained(folder / "model")
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_tokens(2, 9)).logits


def seen(model: FlexMoeForCausalLM, inputs: Inputs) -> Tensors:
    """What is compared: gradients, logits of a prompt, its continuation."""
    model.freeze_except("math", model.expert_names[2])  # a full one, and a low-rank one
    prompt = random_tokens(2, 6)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    return {"logits": logits(model), "text": text, **step(model, inputs)}


def add_low_rank(model: FlexMoeForCausalLM) -> None:
    """Adds an expert that begins with random numbers; the processes have drawn different ones."""
    in_group = torch.distributed.is_initialized()
    torch.manual_seed(torch.distributed.get_rank() if in_group else 0)
    model.add_expert_copy("new", rank=3)


CHANGES = {
    "load": lambda model, folder: None,
    "add": lambda model, folder: model.add_expert(folder / "code"),
    "copy": lambda model, folder: model.add_expert_copy("twin"),
    "new": lambda model, folder: add_low_rank(model),
    "replace": lambda model, folder: model.replace_expert("code", folder / "newer"),
    "rename": lambda model, folder: model.rename_expert("legal", "law-2"),
    "remove": lambda model, folder: model.remove_expert("poems"),
}
"""In this order, each on top of those before."""

CUT = {
    "full": ("gate_proj", "up_proj", "down_proj"),
    "low_rank": ("gate_proj.B", "up_proj.B", "down_proj.A"),
}
"""What of an expert tensor parallelism cuts."""

WHOLE = ("gate_proj.A.weight", "up_proj.A.weight", "down_proj.B.weight")

PLACES = ("add", "copy", "new", "replace")
"""Those that bring new modules."""


def after_changes(model: FlexMoeForCausalLM, folder: Path, inputs: Inputs, without: tuple = ()) -> dict[str, Tensors]:
    found = {}
    for name, change in CHANGES.items():
        if name not in without:
            change(model, folder)
            found[name] = seen(model, inputs)
    return found


def load(folder: Path, **sizes: object) -> FlexMoeForCausalLM:
    return FlexMoeForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(**sizes))


def save(model: FlexMoeForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    model.save_expert("law-2", folder / "law-2")


def under_tensor_parallel(rank: int, folder: Path, out: Path) -> tuple[dict[str, Tensors], dict, dict, Tensors]:
    model = load(folder, tp_plan="auto")
    found = after_changes(model, folder, {"input_ids": random_tokens(4, 6)})
    save(model, out)
    shards = {name: value.placements for name, value in model.named_parameters() if isinstance(value, DTensor)}
    return found, shards, model.tp_plan, drawn(model)


def drawn(model: FlexMoeForCausalLM) -> Tensors:
    """What a new low-rank expert begins with."""
    return {name: whole(value).detach() for name, value in model.named_parameters() if ".experts.new." in name}


def under_fsdp2(rank: int, folder: Path, out: Path) -> dict[str, Tensors]:
    model = load(folder, fsdp_size=2)
    assert isinstance(model.anchor.model.layers[0], FSDPModule)
    before = {name: whole(value) for name, value in model.state_dict().items()}
    for name in PLACES:
        with pytest.raises(RuntimeError, match=r"FSDP2 has sharded.*save_pretrained, then load"):
            CHANGES[name](model, folder)
    assert all(torch.equal(whole(model.state_dict()[name]), value) for name, value in before.items())
    found = after_changes(model, folder, half(rank, {"input_ids": random_tokens(4, 6)}), without=PLACES)
    save(model, out)
    return found


def test_tensor_parallel_is_one_process_after_every_change(processes, checkpoint, tmp_path):
    alone = realigned(FlexMoeForCausalLM.from_pretrained(checkpoint / "model"))
    expected = after_changes(alone, checkpoint, {"input_ids": random_tokens(4, 6)})
    answers = processes.run(under_tensor_parallel, checkpoint, tmp_path)
    (_, _, _, one), (_, _, _, other) = answers
    assert any(value.any() for value in one.values())
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for found, shards, plan, _ in answers:
        for name in CHANGES:
            assert_close(found[name], expected[name], name)
        inside = [name for name, _ in alone.named_parameters() if ".mlp." in name]
        for (
            name
        ) in inside:  # experts lie as public does, rows whole; of a low-rank one, the side that public's cut meets
            matrix = re.sub(r"experts\.[a-z0-9-]+", "experts.public", name)
            matrix, is_cut = re.sub(r"\.[AB]\.", ".", matrix), not name.endswith(WHOLE)
            assert shards.get(name) == (shards.get(matrix) if is_cut else None), name
            assert (name in shards) == (".experts." in name and is_cut), name
        rules = {rule.partition(".experts.")[2] for rule in plan} - {""}
        assert rules == {
            f"{record['name']}.{part}" for record in alone.config.expert_records for part in CUT[record["kind"]]
        }
    assert_same_files(alone, tmp_path)


def test_fsdp2_is_one_process_after_every_change(processes, checkpoint, tmp_path):
    alone = realigned(FlexMoeForCausalLM.from_pretrained(checkpoint / "model"))
    expected = after_changes(alone, checkpoint, {"input_ids": random_tokens(4, 6)}, without=PLACES)
    for found in processes.run(under_fsdp2, checkpoint, tmp_path):
        for name in expected:
            assert_close(found[name], expected[name], name)
    assert_same_files(alone, tmp_path)


def assert_same_files(alone: FlexMoeForCausalLM, folder: Path) -> None:
    """`folder` holds what `save` writes of `alone`."""
    save(alone, folder / "alone")
    names = [sorted(file.name for file in (path / "model").iterdir()) for path in (folder, folder / "alone")]
    assert names[0] == names[1], "with the model's code"
    got, expected = (load_file(path / "model/model.safetensors") for path in (folder, folder / "alone"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    configs = [(path / "model/config.json").read_text() for path in (folder, folder / "alone")]
    assert configs[0] == configs[1], "with the fingerprint, which saving computes from whole tensors"
    for name in ("expert.safetensors", "expert_config.json"):
        assert (folder / "law-2" / name).read_bytes() == (folder / "alone/law-2" / name).read_bytes(), name
