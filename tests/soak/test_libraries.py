"""Libraries that are not installed for `make test`: TRL, lm-eval and sentence-transformers (`pip install trl lm-eval
sentence-transformers`). Each is skipped if it is missing. And adapters of every dense family on its graft.

Does not cover what they read of a model (`tests/test_library_attributes.py`).
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import TOLERANCES, flexmoe_from_anchor, random_tokens, tiny_flexmoe
from tests.support.families import EXCEPTIONS, causal_lm_families, tiny_config

TOKENS = random_tokens(2, 9)
ONE_STEP = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
WORDS = {"<p>": 0, "<s>": 1, "</s>": 2, "<u>": 3, "sea": 4, "sky": 5}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<p>", eos_token="</s>", unk_token="<u>", model_max_length=64
    )


def model_with(**config: Any) -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", ["math", "code"], num_experts_per_tok=2, **config)


class TestTrl:
    """Trainers of TRL run the decoder and the head on their own, and weight the load-balancing loss themselves."""

    @pytest.fixture(autouse=True)
    def trl(self) -> Any:
        return pytest.importorskip("trl")

    def sft(self, trl: Any, model: Any, tokenizer: Any, **options: Any) -> dict[str, float]:
        rows = datasets.Dataset.from_dict({"text": ["sea sky sky sea"] * 8})
        arguments = trl.SFTConfig(tempfile.mkdtemp(), logging_steps=1, **ONE_STEP, **options)
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return trainer.state.log_history[0]

    def test_the_load_balancing_loss_is_part_of_the_loss(self, trl, tokenizer):
        moe = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
        dense = self.sft(trl, model_with(), tokenizer)
        assert "aux_loss" not in dense
        by_config = self.sft(trl, model_with(**moe), tokenizer)
        by_argument = self.sft(trl, model_with(), tokenizer, router_aux_loss_coef=1.0)
        for log in (by_config, by_argument):
            assert log["aux_loss"] > 1
            assert float(log["loss"]) == pytest.approx(float(dense["loss"]) + log["aux_loss"], rel=1e-3)

    def test_the_active_set_applies(self, trl, tokenizer):
        chosen = self.sft(trl, model_with(active_experts=["public", "code"]), tokenizer)
        without = tiny_flexmoe("llama", ["code"], num_experts_per_tok=2)
        assert chosen["loss"] == self.sft(trl, without, tokenizer)["loss"]
        assert chosen["loss"] != self.sft(trl, model_with(), tokenizer)["loss"]

    def test_more_experts_per_token_than_there_are(self, trl, tokenizer):
        model = tiny_flexmoe("llama", ["math"], output_router_logits=True, router_aux_loss_coef=1.0)
        with pytest.raises(ValueError, match=r"set model\.config\.num_experts_per_tok = 2"):
            self.sft(trl, model, tokenizer)

    def test_preferences_and_rewards(self, trl, tokenizer):
        moe = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
        pairs = datasets.Dataset.from_dict(
            {"prompt": ["sea"] * 4, "chosen": ["sky sea"] * 4, "rejected": ["sea sky"] * 4}
        )
        dpo = trl.DPOTrainer(
            model_with(**moe),
            ref_model=model_with(),
            args=trl.DPOConfig(tempfile.mkdtemp(), **ONE_STEP),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        arguments = trl.GRPOConfig(
            tempfile.mkdtemp(),
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=4,
            **ONE_STEP,
        )
        grpo = trl.GRPOTrainer(
            model_with(**moe),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["sea"] * 4}),
            processing_class=tokenizer,
        )
        for trainer in (dpo, grpo):
            assert trainer.train().training_loss == pytest.approx(trainer.state.log_history[-1]["train_loss"])
            assert any("aux_loss" in log for log in trainer.state.log_history)


def test_lm_eval(tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = model_with(active_experts=["public", "code"])
    evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    assert evaluated.max_length == 128
    ((logprob, _),) = evaluated.loglikelihood([Instance("loglikelihood", {}, ("sea", " sky"), 0)])
    with torch.no_grad():
        expected = model(torch.tensor([[4]])).logits[0, -1].log_softmax(-1)[5]
    assert logprob == pytest.approx(float(expected), abs=1e-4)


def test_sentence_transformers(tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.models")
    model = model_with()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = parts.Transformer(str(tmp_path))
    mean = parts.Pooling(32, "mean")
    (embedded,) = sentence_transformers.SentenceTransformer(modules=[words, mean], device="cpu").encode(["sea sky"])
    with torch.no_grad():
        states = model(torch.tensor([[4, 5]]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(torch.from_numpy(embedded), states[0].mean(0), **TOLERANCES[torch.float32])


def attention_of(dense: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """The last parts of the names of the matrices outside of feed-forward networks, embeddings and head."""
    matrices = (name for name, module in dense.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return sorted({name.rpartition(".")[2] for name in matrices if "att" in name and not name.startswith(blocks)})


def with_adapter(model: Any, folder: str, way: str) -> Any:
    """The model with the saved adapter; None if that is refused."""
    try:
        if way == "PeftModel":
            return peft.PeftModel.from_pretrained(model, folder)
        model.load_adapter(folder)
    except ValueError:
        return None
    return model


@pytest.mark.filterwarnings("ignore:.*owners at once", "ignore:Found missing adapter keys")
@pytest.mark.parametrize("family", [family for family in causal_lm_families() if family not in EXCEPTIONS])
@pytest.mark.parametrize("place", ["attention", "all-linear"])
def test_an_adapter_of_the_dense_anchor_is_applied_in_full_or_refused(family: str, place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    graft = flexmoe_from_anchor(dense)
    blocks = tuple(name.removeprefix("anchor.") for name in graft.named_blocks())
    targets = attention_of(dense, blocks) if place == "attention" else place
    try:
        adapted = peft.get_peft_model(dense, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    except ValueError as error:  # PEFT knows the family, and fused or state-space matrices
        pytest.skip(f"PEFT refuses it on the dense anchor: {error}")
    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(input_ids=TOKENS).logits
        for way in ("PeftModel", "load_adapter"):
            loaded = with_adapter(copy.deepcopy(graft), str(tmp_path), way)
            assert loaded is not None or place == "all-linear" or way == "load_adapter"
            if loaded is not None:
                torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected, **TOLERANCES[torch.float32])
