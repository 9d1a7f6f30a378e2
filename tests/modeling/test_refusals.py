"""Calls that make no sense say what was given, what is allowed and what to do: one table, for both models.

Not here: checkpoints (`test_loading.py`), names in lifecycle calls (`test_lifecycle.py`), KV caches
(`test_generation.py`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")
TOKENS = random_tokens(2, 5)


def ones(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.ones(shape, **{"dtype": torch.bool, **kwargs})


def without_rows(*rows: int) -> torch.Tensor:
    mask = ones(2, 4)
    mask[list(rows)] = False
    return mask


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # of a forward pass, and of generate
    "k = 0": ({"num_experts_per_tok": 0}, ValueError, "at least 1; got 0"),
    "k < 0": ({"num_experts_per_tok": -3}, ValueError, "at least 1; got -3"),
    "k a truth value": ({"num_experts_per_tok": True}, TypeError, r"whole number, at least 1; got True \(bool\)"),
    "k a fraction": ({"num_experts_per_tok": 1.5}, TypeError, r"whole number, at least 1; got 1.5 \(float\)"),
    "k a word": ({"num_experts_per_tok": "2"}, TypeError, r"whole number, at least 1; got '2' \(str\)"),
    "k a tensor": ({"num_experts_per_tok": torch.tensor(2)}, TypeError, r"whole number.*Tensor"),
    "a mask without a batch": ({"expert_mask": ones(4)}, ValueError, r"shape \[4\]; expected \[2, 4\]"),
    "a mask for one": ({"expert_mask": ones(1, 4)}, ValueError, r"shape \[1, 4\]; expected \[2, 4\]"),
    "a mask for three": ({"expert_mask": ones(3, 4)}, ValueError, r"shape \[3, 4\]; expected \[2, 4\]"),
    "a column too many": ({"expert_mask": ones(2, 5)}, ValueError, r"\[2, 5\]; .*'public', 'math', 'code', 'legal'"),
    "a column too few": ({"expert_mask": ones(2, 3)}, ValueError, r"shape \[2, 3\]; expected \[2, 4\]"),
    "a mask per token": ({"expert_mask": ones(2, 5, 4)}, ValueError, r"shape \[2, 5, 4\]; expected \[2, 4\]"),
    "a mask of floats": ({"expert_mask": ones(2, 4, dtype=torch.float32)}, TypeError, r"bool .*torch.float32"),
    "a mask of integers": ({"expert_mask": ones(2, 4, dtype=torch.int64)}, TypeError, r"bool .*torch.int64"),
    "a mask as a list": ({"expert_mask": [[True] * 4] * 2}, TypeError, r"bool .*list"),
    "a mask without values": ({"expert_mask": ones(2, 4, device="meta")}, ValueError, "meta device"),
    "a sequence without an expert": ({"expert_mask": without_rows(1)}, ValueError, r"sequence\(s\) \[1\]"),
    "no sequence with an expert": ({"expert_mask": without_rows(0, 1)}, ValueError, r"sequence\(s\) \[0, 1\]"),
}

EXPERTS: dict[str, tuple[Any, type[Exception], str]] = {
    # of generate
    "nobody": ([], ValueError, "names no expert: name at least one of"),
    "a stranger": (["nobody"], ValueError, r"\['nobody'\], which this model has not"),
    "nobody for one prompt": ([["public"], []], ValueError, r"experts\[1\] names no expert"),
    "a stranger for one prompt": ([["public"], ["nobody"]], ValueError, r"experts\[1\] names \['nobody'\]"),
    "lists for three": ([["public"]] * 3, ValueError, r"shape \[3, 4\]; expected \[2, 4\]"),
    "a name alone": ("math", TypeError, "the string 'math'"),
}

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "k = 0": ({"num_experts_per_tok": 0}, "at least 1; got 0"),
    "k < 0": ({"num_experts_per_tok": -1}, "at least 1; got -1"),
    "k a truth value": ({"num_experts_per_tok": True}, r"(expected int, got bool|got True \(bool\))"),
    "k a fraction": ({"num_experts_per_tok": 2.0}, "expected int, got float"),
    "an active stranger": ({"active_experts": ["public", "zoology"]}, r"\['zoology'\], which this model has not"),
}


@pytest.fixture(scope="module")
def models() -> dict[type, FlexMoeForCausalLM | FlexMoeModel]:
    causal = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)
    decoder = FlexMoeModel(causal.config).eval()
    decoder.load_state_dict({key: value for key, value in causal.state_dict().items() if "lm_head" not in key})
    return {FlexMoeForCausalLM: causal, FlexMoeModel: decoder}


def refused(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_a_forward_pass(models, cls, case):
    arguments, error, words = ARGUMENTS[case]
    refused(lambda: models[cls](TOKENS, **arguments), error, words)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_generate(models, case):
    arguments, error, words = ARGUMENTS[case]
    generate = models[FlexMoeForCausalLM].generate
    refused(lambda: generate(TOKENS, max_new_tokens=1, num_beams=2, **arguments), error, words)
    if "expert_mask" in arguments:
        refused(lambda: generate(TOKENS, max_new_tokens=1, experts=["public"], **arguments), error, words)


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_of_generate(models, case):
    experts, error, words = EXPERTS[case]
    refused(lambda: models[FlexMoeForCausalLM].generate(TOKENS, experts=experts, max_new_tokens=1), error, words)


def test_experts_and_a_mask_that_do_not_meet(models):
    model = models[FlexMoeForCausalLM]
    mask = model.expert_mask([["public"], ["code"]])
    refused(lambda: model.generate(TOKENS, experts=["public"], expert_mask=mask), ValueError, r"sequence\(s\) \[1\]")


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    fields, words = CONFIGS[case]
    refused(lambda: FlexMoeConfig(experts=["public", "math"], **fields), StrictDataclassError, words)


@pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel])
@pytest.mark.parametrize("k", [0, -1])
def test_k_that_was_set_in_a_config_by_hand(models, cls, k):
    model = models[cls]
    model.config.num_experts_per_tok = k
    try:
        refused(lambda: model(TOKENS), ValueError, f"at least 1; got {k}")
    finally:
        model.config.num_experts_per_tok = 2


def test_mask_and_active_set_that_do_not_meet(models):
    model = models[FlexMoeForCausalLM]
    model.set_active_experts(["code"])
    try:
        mask = model.expert_mask([["math"], ["math"]])
        refused(lambda: model(TOKENS, expert_mask=mask), ValueError, r"no active expert .*active are \['code'\]")
    finally:
        model.set_active_experts(None)
