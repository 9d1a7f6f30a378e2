"""Two processes give the results of one with DDP, FSDP2 and tensor parallelism, also for experts without tokens.

The test process computes the expected values on the combined batch. Other families than Llama, half precision, the
Trainer and the command line are in tests/soak/test_distributed_grid.py.
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
from tests.support.soak import soak

ANCHOR = {"repo": None, "revision": None, "fingerprint": "f" * 64, "model_type": "llama", "dtype": "float32"}

LOW_RANK = {"name": "math", "kind": "low_rank", "rank": [4, 6], "alpha": 8.0}

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, torch.Tensor]


def step(model: nn.Module, inputs: Inputs) -> Tensors:
    """Full gradients of the mean loss."""
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: full_tensor(grad) for name, grad in grads.items() if grad is not None}


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def half_batch(rank: int, inputs: Inputs) -> Inputs:
    return {name: value.chunk(2)[rank] for name, value in inputs.items()}


def assert_close(got: Tensors, expected: Tensors, what: str) -> None:
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, **TOLERANCES[torch.float32], msg=lambda text, name=name: f"{what}, {name}: {text}"
        )


# Data parallel: one trained expert, whichever process has its tokens


def rarely_used(kind: str = "full") -> FlexMoeForCausalLM:
    """A model that trains "math", which few tokens reach: k = 1 and a large negative bias.

    Without renormalization, which would give the selected expert weight 1 whatever its logit.
    """
    math = LOW_RANK if kind == "low_rank" else "math"
    model = tiny_flexmoe("llama", [math, "code"], num_experts_per_tok=1, norm_topk_prob=False)
    for block in model.flexmoe_blocks():
        block.router["math"].bias.data.fill_(-6.0)
    model.freeze_except("math")
    return model


def batches(model: FlexMoeForCausalLM) -> dict[str, Inputs]:
    """Inputs of four sequences, two per process, by the processes whose tokens reach "math": both, the first, neither.

    In "masked", the second process may not use it. "again" repeats the first step, to show that the steps in between
    left no state behind.
    """
    with_math, without_math = [], []
    for sequence in random_tokens(60, 6).split(1):
        with torch.no_grad(), track_usage(model) as usage:
            model(sequence)
        shares = [usage.chosen_share(block.layer_index)["math"] for block in model.flexmoe_blocks()]
        (with_math if all(shares) else [] if any(shares) else without_math).append(sequence)
    sequences = {"both": with_math[:4], "one": with_math[:2] + without_math[:2], "none": without_math[:4]}
    assert all(len(rows) == 4 for rows in sequences.values()), "the random model routes all sequences alike"
    inputs = {name: {"input_ids": torch.cat(rows)} for name, rows in sequences.items()}
    mask = model.expert_mask([model.expert_names] * 2 + [["public", "code"]] * 2)
    return inputs | {"masked": {**inputs["both"], "expert_mask": mask}, "again": inputs["both"]}


def steps_of_one_process(checkpointing: bool, kind: str = "full") -> tuple[dict[str, Inputs], dict[str, Tensors]]:
    model = rarely_used(kind)
    inputs = batches(model)
    if checkpointing:
        enable_checkpointing(model)
    return inputs, {name: step(model, values) for name, values in inputs.items()}


def steps_with_ddp(rank: int, inputs: dict[str, Inputs], checkpointing: bool, kind: str) -> dict[str, Tensors]:
    model = rarely_used(kind)
    if checkpointing:
        enable_checkpointing(model)
    parallel = DistributedDataParallel(model)
    return {name: step(parallel, half_batch(rank, values)) for name, values in inputs.items()}


def steps_with_fsdp2(rank: int, inputs: dict[str, Inputs], unit: str, kind: str) -> dict[str, Tensors]:
    model = rarely_used(kind)
    for layer, block in zip(model.anchor.model.layers, model.flexmoe_blocks(), strict=True):
        if unit == "expert":
            for module in (*block.experts.values(), *block.router.values()):
                fully_shard(module)
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        for values in inputs.values():
            model(**half_batch(rank, values))
    return {name: step(model, half_batch(rank, values)) for name, values in inputs.items()}


@pytest.mark.parametrize(("checkpointing", "kind"), [(False, "full"), soak(True, "full"), (True, "low_rank")])
def test_ddp_gives_the_gradients_of_one_process(processes, checkpointing, kind):
    inputs, expected = steps_of_one_process(checkpointing, kind)
    start = "anchor.model.layers.0.mlp.experts.math.up_proj."
    unused = [gradient for name, gradient in expected["none"].items() if name.startswith(start)]
    assert unused
    assert not any(gradient.any() for gradient in unused), "no token reaches this expert"
    assert expected["none"]["anchor.model.layers.0.mlp.router.math.weight"].any(), "every token has a logit of its row"
    for got in processes.run(steps_with_ddp, inputs, checkpointing, kind):
        for name in inputs:
            assert_close(got[name], expected[name], name)


@pytest.mark.parametrize(("unit", "kind"), [("layer", "full"), ("expert", "full"), ("layer", "low_rank")])
def test_fsdp2_gives_the_gradients_of_one_process(processes, unit, kind):
    inputs, expected = steps_of_one_process(checkpointing=False, kind=kind)
    for got in processes.run(steps_with_fsdp2, inputs, unit, kind):
        for name in inputs:
            assert_close(got[name], expected[name], name)


def refused(rank: int, inputs: dict[str, Inputs]) -> bool:
    with pytest.raises(ValueError, match="apply fully_shard to the decoder layers"):
        steps_with_fsdp2(rank, inputs, "expert", "low_rank")
    return True


def test_fsdp2_unit_per_expert_is_refused_with_low_rank_experts(processes):
    assert all(processes.run(refused, steps_of_one_process(checkpointing=False, kind="low_rank")[0]))


# Sharded by transformers while loading, then changed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def make_checkpoint(folder: Path, family: str = "llama") -> Path:
    """Writes a model, and packages of two experts that are not in it."""
    low_rank = [{**LOW_RANK, "name": name} for name in ("legal", "code")]
    model = tiny_flexmoe(
        family, ["math", *low_rank, "poems", "newer"], num_experts_per_tok=2, anchor={**ANCHOR, "model_type": family}
    )
    perturb_expert(model, "newer", seed=5)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)  # older transformers shard even sizes only
    model.save_pretrained(folder / "model")  # stores the fingerprint
    for name in ("code", "newer"):
        model.save_expert(name, folder / name)
        model.remove_expert(name)
    model.save_pretrained(folder / "model")
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_tokens(2, 9)).logits


def outputs_of(model: FlexMoeForCausalLM, inputs: Inputs) -> Tensors:
    """What the tests compare: gradients, logits of a prompt, its continuation."""
    model.freeze_except("math", model.expert_names[2])  # one full and one low-rank expert
    prompt = random_tokens(2, 6)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    return {"logits": logits(model), "text": text, **step(model, inputs)}


def add_low_rank(model: FlexMoeForCausalLM) -> None:
    """Adds a low-rank expert, with another seed in each process: all must end up with the same weights."""
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
"""Applied in this order, each to the result of those before."""

SHARDED = {
    "full": ("gate_proj", "up_proj", "down_proj"),
    "low_rank": ("gate_proj.B", "up_proj.B", "down_proj.A"),
}
"""The parts of an expert that tensor parallelism shards."""

NOT_SHARDED = ("gate_proj.A.weight", "up_proj.A.weight", "down_proj.B.weight")

ADDING = ("add", "copy", "new", "replace")
"""The changes that add modules."""


def after_changes(model: FlexMoeForCausalLM, folder: Path, inputs: Inputs, without: tuple = ()) -> dict[str, Tensors]:
    results = {}
    for name, change in CHANGES.items():
        if name not in without:
            change(model, folder)
            results[name] = outputs_of(model, inputs)
    return results


def load(folder: Path, **sizes: object) -> FlexMoeForCausalLM:
    return FlexMoeForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(**sizes))


def save(model: FlexMoeForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    model.save_expert("law-2", folder / "law-2")


def run_tensor_parallel(rank: int, folder: Path, out: Path) -> tuple[dict[str, Tensors], dict, dict, Tensors]:
    model = load(folder, tp_plan="auto")
    results = after_changes(model, folder, {"input_ids": random_tokens(4, 6)})
    save(model, out)
    shards = {name: value.placements for name, value in model.named_parameters() if isinstance(value, DTensor)}
    return results, shards, model.tp_plan, new_expert_weights(model)


def new_expert_weights(model: FlexMoeForCausalLM) -> Tensors:
    """The initial weights of the low-rank expert "new"."""
    return {name: full_tensor(value).detach() for name, value in model.named_parameters() if ".experts.new." in name}


def run_fsdp2(rank: int, folder: Path, out: Path) -> dict[str, Tensors]:
    model = load(folder, fsdp_size=2)
    assert isinstance(model.anchor.model.layers[0], FSDPModule)
    before = {name: full_tensor(value) for name, value in model.state_dict().items()}
    for name in ADDING:
        with pytest.raises(RuntimeError, match=r"FSDP2 has sharded.*save_pretrained, then load"):
            CHANGES[name](model, folder)
    assert all(torch.equal(full_tensor(model.state_dict()[name]), value) for name, value in before.items())
    results = after_changes(model, folder, half_batch(rank, {"input_ids": random_tokens(4, 6)}), without=ADDING)
    save(model, out)
    return results


def test_tensor_parallel_equals_one_process_after_every_change(processes, checkpoint, tmp_path):
    reference = realigned(FlexMoeForCausalLM.from_pretrained(checkpoint / "model"))
    expected = after_changes(reference, checkpoint, {"input_ids": random_tokens(4, 6)})
    answers = processes.run(run_tensor_parallel, checkpoint, tmp_path)
    (_, _, _, first), (_, _, _, second) = answers
    assert any(value.any() for value in first.values())
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for results, shards, plan, _ in answers:
        for name in CHANGES:
            assert_close(results[name], expected[name], name)
        # experts are sharded like public, rows are not; of a low-rank pair, the factor on the sharded side is
        for name in [name for name, _ in reference.named_parameters() if ".mlp." in name]:
            matrix = re.sub(r"experts\.[a-z0-9-]+", "experts.public", name)
            matrix, is_sharded = re.sub(r"\.[AB]\.", ".", matrix), not name.endswith(NOT_SHARDED)
            assert shards.get(name) == (shards.get(matrix) if is_sharded else None), name
            assert (name in shards) == (".experts." in name and is_sharded), name
        rules = {rule.partition(".experts.")[2] for rule in plan} - {""}
        assert rules == {
            f"{record['name']}.{part}"
            for record in reference.config.expert_records
            for part in SHARDED[record["kind"]]
        }
    assert_same_files(reference, tmp_path)


def test_fsdp2_equals_one_process_after_every_change(processes, checkpoint, tmp_path):
    reference = realigned(FlexMoeForCausalLM.from_pretrained(checkpoint / "model"))
    expected = after_changes(reference, checkpoint, {"input_ids": random_tokens(4, 6)}, without=ADDING)
    for results in processes.run(run_fsdp2, checkpoint, tmp_path):
        for name in expected:
            assert_close(results[name], expected[name], name)
    assert_same_files(reference, tmp_path)


def assert_same_files(reference: FlexMoeForCausalLM, folder: Path) -> None:
    """`folder` holds the files that `save` writes for `reference`."""
    save(reference, folder / "reference")
    names = [sorted(file.name for file in (path / "model").iterdir()) for path in (folder, folder / "reference")]
    assert names[0] == names[1], "including the remote code"
    got, expected = (load_file(path / "model/model.safetensors") for path in (folder, folder / "reference"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    configs = [(path / "model/config.json").read_text() for path in (folder, folder / "reference")]
    assert configs[0] == configs[1], "including the fingerprint, which saving computes from full tensors"
    for name in ("expert.safetensors", "expert_config.json"):
        assert (folder / "law-2" / name).read_bytes() == (folder / "reference/law-2" / name).read_bytes(), name
