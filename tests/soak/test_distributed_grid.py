"""Two processes against one, over families, dtypes and launchers; slower than the tests of one family.

Uses the functions of tests/modeling/test_distributed.py. Expected values come from one process, as there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, random_tokens, realigned, tiny_flexmoe
from tests.modeling.test_distributed import (
    after_changes,
    assert_close,
    assert_same_files,
    checkpoint,
    half_batch,
    load,
    logits,
    make_checkpoint,
    save,
    step,
)
from tests.training.test_experts import FAST, train, workshop

__all__ = ["checkpoint", "workshop"]  # fixtures

# Families without a tensor parallel plan, and the error of transformers.
NO_PLAN = {"gpt2": "has no `tp_plan`"}

INPUTS = {"input_ids": random_tokens(4, 6)}


def tensor_parallel(rank: int, folder: Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    model = load(folder, tp_plan="auto")
    results = after_changes(model, folder, INPUTS)
    save(model, out)
    return results


@pytest.mark.parametrize("family", [family for family in ANCHOR_CONFIGS if family not in NO_PLAN])
def test_tensor_parallel_equals_one_process(processes, tmp_path, family):
    make_checkpoint(tmp_path, family)
    reference = realigned(FlexMoeForCausalLM.from_pretrained(tmp_path / "model"))
    expected = after_changes(reference, tmp_path, INPUTS)
    for results in processes.run(tensor_parallel, tmp_path, tmp_path / "out"):
        for name in expected:
            assert_close(results[name], expected[name], name)
    assert_same_files(reference, tmp_path / "out")


def refused(rank: int, folder: Path, sizes: dict[str, int]) -> str:
    with pytest.raises(ValueError) as error:
        load(folder, **sizes)
    return str(error.value)


@pytest.mark.parametrize("family", NO_PLAN)
def test_family_without_a_plan_is_refused(processes, tmp_path, family):
    make_checkpoint(tmp_path, family)
    for message in processes.run(refused, tmp_path, {"tp_size": 2}):
        assert NO_PLAN[family] in message


def test_pipeline_parallelism_is_refused(processes, checkpoint):
    for message in processes.run(refused, checkpoint, {"pp_size": 2}):
        assert message.startswith("pp_size=2: FlexMoE does not run as a pipeline")


def load_by_other_classes(rank: int, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.warns(FutureWarning, match="tp_plan"):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto")
    decoder = FlexMoeModel.from_pretrained(folder / "model", distributed_config=DistributedConfig(tp_size=2))
    return logits(model), decoder(**INPUTS).last_hidden_state.detach()


def test_tensor_parallel_with_auto_classes_and_without_a_head(processes, checkpoint):
    reference = realigned(FlexMoeForCausalLM.from_pretrained(checkpoint / "model"))
    expected = {"logits": logits(reference), "states": reference.base_model(**INPUTS).last_hidden_state.detach()}
    for results in processes.run(load_by_other_classes, checkpoint):
        assert_close(dict(zip(expected, results, strict=True)), expected, "other classes")


def bfloat16_steps(rank: int, folder: Path, inputs: list) -> list[dict[str, torch.Tensor]]:
    config = DistributedConfig(fsdp_size=2)
    model = FlexMoeForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, distributed_config=config)
    model.freeze_except("math")
    return [step(model, half_batch(rank, values)) for values in inputs]


def test_fsdp2_in_bfloat16_keeps_rows_in_float32(processes, checkpoint):
    """Float32 rows are sharded one by one, so every process must call each of them, also one that is masked there."""
    reference = realigned(FlexMoeForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.bfloat16))
    reference.freeze_except("math")
    mask = reference.expert_mask([reference.expert_names] * 2 + [["public", "legal"]] * 2)
    inputs = [{**INPUTS, "expert_mask": mask}, INPUTS, {**INPUTS, "expert_mask": mask}]
    expected = [step(reference, values) for values in inputs]
    for results in processes.run(bfloat16_steps, checkpoint, inputs):
        for got, known in zip(results, expected, strict=True):
            assert got.keys() == known.keys()
            for name, value in known.items():
                assert got[name].dtype == value.dtype == (torch.float32 if "router" in name else torch.bfloat16)
                close = TOLERANCES[torch.bfloat16]
                torch.testing.assert_close(got[name].float(), value.float(), **close, msg=name)


# Trainer and launchers


SEQUENCES = [{"input_ids": row, "labels": row} for row in random_tokens(24, 8)]


def trained(folder: Path, out: Path, batch: int, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """The trained tensors after three steps of transformers' own Trainer."""
    model = load(folder, **sizes) if sizes else FlexMoeForCausalLM.from_pretrained(folder / "model")
    realigned(model) if not sizes else None
    model.freeze_except("math")
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    Trainer(model=model, args=arguments, train_dataset=SEQUENCES).train()
    state = {name: value.detach() for name, value in model.named_parameters()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def train_half(rank: int, folder: Path, out: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    return trained(folder, out, 2, sizes)


@pytest.mark.parametrize("sizes", [{}, {"fsdp_size": 2}], ids=["ddp", "fsdp2"])
def test_trainer_gives_the_weights_of_one_process(processes, checkpoint, tmp_path, sizes):
    start = dict(FlexMoeForCausalLM.from_pretrained(checkpoint / "model").named_parameters())
    expected = trained(checkpoint, tmp_path / "one", 4, {})
    changed = {name for name in expected if not torch.equal(expected[name], start[name])}
    assert changed
    assert all(".math." in name for name in changed)
    for results in processes.run(train_half, checkpoint, tmp_path / "two", sizes):
        assert_close(results, expected, "trained")
        assert all(torch.equal(results[name], start[name]) for name in start if name not in changed)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        *(
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
        ),
        *("--dynamo_backend=no", "--main_process_port=0"),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_train_command_on_two_processes_gives_the_expert_of_one(workshop, tmp_path, launcher):
    settings = {**FAST, "batch_size": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [
        *(sys.executable, "-m", *LAUNCHERS[launcher], "-m", "flexmoe.cli"),
        *("train", str(workshop / "grafted"), "--name", "math", "--data", str(workshop / "own.jsonl")),
        *("--out", str(tmp_path / "two"), *options),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reference = train(workshop, tmp_path / "one", batch_size=4)
    got, expected = (load_file(folder / "expert.safetensors") for folder in (tmp_path / "two", reference))
    assert_close(got, expected, launcher)
    public = dict(tiny_flexmoe("olmo2").named_parameters())["anchor.model.layers.0.mlp.experts.public.up_proj.weight"]
    assert not torch.equal(got["layers.0.ffn.up_proj.weight"], public), "the expert was trained"
