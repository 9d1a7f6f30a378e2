"""`save_pretrained` over a model: a failure leaves the old one, and nothing of it remains beside the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_flexmoe("llama", ["math"]).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("A card.")
    return tmp_path / "model"


@pytest.mark.promise(
    "`save_pretrained`",
    "saving over a model, and a failure while doing so (full disk)",
    "the old model is unchanged until the new one is complete",
)
@pytest.mark.parametrize("failing", ["the weights", "the config", "the code"])
def test_a_failure_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = files_of(saved)
    model = tiny_flexmoe("llama", ["math", "code"])

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = {
        "the weights": "transformers.modeling_utils.safe_save_file",
        "the config": "transformers.configuration_utils.PreTrainedConfig.to_json_file",
        "the code": "transformers.modeling_utils.custom_object_save",
    }[failing]
    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert files_of(saved) == before
    assert os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize("sizes", [("10MB", "20KB"), ("20KB", "10MB"), ("20KB", "40KB")], ids=str)
def test_another_number_of_shards(tmp_path: Path, sizes: tuple[str, str]) -> None:
    old, new = tiny_flexmoe("llama", ["math"]), tiny_flexmoe("llama", ["math", "code"], seed=1)
    old.save_pretrained(tmp_path / "model", max_shard_size=sizes[0])
    (tmp_path / "model" / "README.md").write_text("A card.")
    new.save_pretrained(tmp_path / "model", max_shard_size=sizes[1])
    new.save_pretrained(tmp_path / "fresh", max_shard_size=sizes[1])
    kept = files_of(tmp_path / "model")
    assert kept.pop("README.md") == b"A card."
    assert kept == files_of(tmp_path / "fresh")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert isinstance(loaded, FlexMoeForCausalLM)
    assert torch.equal(loaded(random_tokens(1, 5)).logits, new(random_tokens(1, 5)).logits)
