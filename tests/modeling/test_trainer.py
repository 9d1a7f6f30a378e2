"""transformers' Trainer on a FlexMoE: one expert is trained, nothing else changes, and resumed runs are bit-equal.

Does not cover `flexmoe.train_expert` (`tests/training/test_experts.py`) and several processes.
"""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe

TEXTS = [{"input_ids": row, "labels": row} for row in random_tokens(8, 12)]


def trainer_of(family: str, folder: Path, **arguments: object) -> Trainer:
    model = tiny_flexmoe(family, ["math", "code"], num_experts_per_tok=3)
    model.freeze_except("math")
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 3}
    return Trainer(model, TrainingArguments(str(folder), **{**settings, **arguments}), train_dataset=TEXTS)


def weights(model: FlexMoeForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_only_the_expert_is_trained_and_resuming_gives_the_same_weights(family, tmp_path):
    uninterrupted = trainer_of(family, tmp_path / "uninterrupted")
    before = weights(uninterrupted.model)
    uninterrupted.train()
    after = weights(uninterrupted.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, parameter in uninterrupted.model.named_parameters() if parameter.requires_grad}
    assert changed == trained == {name for name in before if ".math." in name}
    assert len(uninterrupted.optimizer.state_dict()["state"]) == len(trained)

    resumed = trainer_of(family, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-2"))
    assert all(torch.equal(value, after[name]) for name, value in weights(resumed.model).items())
    losses = [trainer.state.log_history[-2]["loss"] for trainer in (uninterrupted, resumed)]
    assert losses[0] == losses[1]


# The new name of the option if this version has it, because it deprecates the old one.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@pytest.mark.parametrize("option", ["bf16", CHECKPOINTING])
def test_options_of_the_trainer(option, tmp_path):
    default = trainer_of("llama", tmp_path / "default", max_steps=2, save_strategy="no")
    other = trainer_of("llama", tmp_path / "other", max_steps=2, save_strategy="no", **{option: True})
    before = weights(default.model)
    for trainer in (default, other):
        trainer.train()
    rtol = 0.1 if option == "bf16" else 1e-4
    for name, value in weights(other.model).items():
        assert (".math." in name) == (not torch.equal(value, before[name])), name
    losses = [trainer.state.log_history[1]["loss"] for trainer in (default, other)]
    assert losses[1] == pytest.approx(losses[0], rel=rtol)
