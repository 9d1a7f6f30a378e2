"""Invalid arguments raise errors with the given value and the allowed ones, for both model classes.

Does not cover checkpoints (`test_loading.py`), names in lifecycle calls (`test_lifecycle.py`) and KV caches
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
    # of forward and generate
    "k = 0": ({"num_experts_per_tok": 0}, ValueError, "at least 1; got 0"),
    "k < 0": ({"num_experts_per_tok": -3}, ValueError, "at least 1; got -3"),
    "k is a bool": ({"num_experts_per_tok": True}, TypeError, r"integer, at least 1; got True \(bool\)"),
    "k is a float": ({"num_experts_per_tok": 1.5}, TypeError, r"integer, at least 1; got 1.5 \(float\)"),
    "k is a string": ({"num_experts_per_tok": "2"}, TypeError, r"integer, at least 1; got '2' \(str\)"),
    "k is a tensor": ({"num_experts_per_tok": torch.tensor(2)}, TypeError, r"integer.*Tensor"),
    "a mask without a batch": ({"expert_mask": ones(4)}, ValueError, r"shape \[4\]; expected \[2, 4\]"),
    "a mask for one sequence": ({"expert_mask": ones(1, 4)}, ValueError, r"shape \[1, 4\]; expected \[2, 4\]"),
    "a mask for three sequences": ({"expert_mask": ones(3, 4)}, ValueError, r"shape \[3, 4\]; expected \[2, 4\]"),
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
    "no names": ([], ValueError, "names no expert: name at least one of"),
    "an unknown name": (["unknown"], ValueError, r"\['unknown'\], which this model does not have"),
    "no names for one prompt": ([["public"], []], ValueError, r"experts\[1\] names no expert"),
    "an unknown name for one prompt": ([["public"], ["unknown"]], ValueError, r"experts\[1\] names \['unknown'\]"),
    "lists for three prompts": ([["public"]] * 3, ValueError, "3 lists of names for 2 sequence"),
    "a name instead of a list": ("math", TypeError, "got 'math'"),
}

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "k = 0": ({"num_experts_per_tok": 0}, "at least 1; got 0"),
    "k < 0": ({"num_experts_per_tok": -1}, "at least 1; got -1"),
    "k is a bool": ({"num_experts_per_tok": True}, r"(expected int, got bool|got True \(bool\))"),
    "k is a float": ({"num_experts_per_tok": 2.0}, "expected int, got float"),
    "an unknown active name": (
        {"active_experts": ["public", "zoology"]},
        r"\['zoology'\], which this model does not have",
    ),
}


@pytest.fixture(scope="module")
def models() -> dict[type, FlexMoeForCausalLM | FlexMoeModel]:
    causal = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)
    decoder = FlexMoeModel(causal.config).eval()
    decoder.load_state_dict({key: value for key, value in causal.state_dict().items() if "lm_head" not in key})
    return {FlexMoeForCausalLM: causal, FlexMoeModel: decoder}


def assert_raises(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_forward(models, cls, case):
    arguments, error, message = ARGUMENTS[case]
    assert_raises(lambda: models[cls](TOKENS, **arguments), error, message)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_generate(models, case):
    arguments, error, message = ARGUMENTS[case]
    generate = models[FlexMoeForCausalLM].generate
    assert_raises(lambda: generate(TOKENS, max_new_tokens=1, num_beams=2, **arguments), error, message)
    if "expert_mask" in arguments:
        assert_raises(lambda: generate(TOKENS, max_new_tokens=1, experts=["public"], **arguments), error, message)


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_of_generate(models, case):
    experts, error, message = EXPERTS[case]
    assert_raises(
        lambda: models[FlexMoeForCausalLM].generate(TOKENS, experts=experts, max_new_tokens=1), error, message
    )


def test_experts_and_mask_without_a_common_expert(models):
    model = models[FlexMoeForCausalLM]
    mask = model.expert_mask([["public"], ["code"]])
    assert_raises(
        lambda: model.generate(TOKENS, experts=["public"], expert_mask=mask), ValueError, r"sequence\(s\) \[1\]"
    )


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    fields, message = CONFIGS[case]
    error = ValueError if message.startswith("at least 1") else StrictDataclassError
    assert_raises(lambda: FlexMoeConfig(experts=["public", "math"], **fields), error, message)


@pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel])
@pytest.mark.parametrize("k", [0, -1])
def test_invalid_k_set_on_the_config_of_a_model(models, cls, k):
    model = models[cls]
    model.config.num_experts_per_tok = k
    try:
        assert_raises(lambda: model(TOKENS), ValueError, f"at least 1; got {k}")
    finally:
        model.config.num_experts_per_tok = 2


def test_mask_and_active_set_without_a_common_expert(models):
    model = models[FlexMoeForCausalLM]
    model.set_active_experts(["code"])
    try:
        mask = model.expert_mask([["math"], ["math"]])
        assert_raises(lambda: model(TOKENS, expert_mask=mask), ValueError, r"no active expert .*active are \['code'\]")
    finally:
        model.set_active_experts(None)
