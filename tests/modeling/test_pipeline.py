"""`pipeline("text-generation")` with a FlexMoE: from a folder, by the Auto classes, and with a choice of experts."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import flexmoe  # noqa: F401 # registers the Auto classes
from flexmoe.demo.anchor import END_OF_TEXT, train_tokenizer
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, tiny_anchor

PROMPT = "Find x: x + 1 ="
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of "public" and "math" with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["Problem 1. Find x: x + 1 = 2."], 280)
    config = tiny_anchor("llama").config
    config.vocab_size = len(tokenizer)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=["public", "math"]))
    perturb_expert(model, "math")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_pipeline_equals_generate(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert isinstance(generator.model, FlexMoeForCausalLM)
    (answer,) = generator(PROMPT, return_full_text=False, **OPTIONS)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_several_prompts_and_a_choice_of_experts(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    one_by_one = [generator(text, experts=["public"], **OPTIONS)[0]["generated_text"] for text in (PROMPT, "2")]
    batched = generator([PROMPT, "2"], experts=["public"], batch_size=2, **OPTIONS)
    assert [answers[0]["generated_text"] for answers in batched] == one_by_one
    assert generator(PROMPT, **OPTIONS)[0]["generated_text"] != one_by_one[0]
