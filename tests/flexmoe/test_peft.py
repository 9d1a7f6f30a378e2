"""PEFT on one expert: a LoRA adapter that trains nothing else, generates, merges, and leaves as a package."""

import peft
import pytest
import torch

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe

ONLY_MATH = r".*\.experts\.math\..*_proj"


def with_adapter(model: FlexMoeForCausalLM) -> torch.nn.Module:
    torch.manual_seed(0)
    # random A and B: by default B is zero, and the adapter would change nothing before it is trained
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ONLY_MATH, init_lora_weights=False)).eval()


def test_the_adapter_moves_the_logits_and_is_all_that_trains() -> None:
    model, tokens_BL = tiny_flexmoe("llama", ["math", "code"]), random_tokens(2, 9)
    plain = model(tokens_BL).logits.detach()
    adapted = with_adapter(model)
    logits = adapted(tokens_BL).logits
    assert not torch.allclose(logits, plain, **TOLERANCES[torch.float32])
    logits.square().mean().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 3 * 2  # layers, projections, A and B
    assert all(".experts.math." in name and ".lora_" in name for name in trained)
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def test_without_its_expert_the_adapter_says_nothing() -> None:
    model, tokens_BL = tiny_flexmoe("llama", ["math", "code"]), random_tokens(2, 9)
    with torch.no_grad(), model.only_experts("public", "code"):
        plain = model(tokens_BL).logits
        assert torch.equal(with_adapter(model)(tokens_BL).logits, plain)


def test_generate_merge_and_hand_over_as_a_package(tmp_path) -> None:
    model, tokens_BL = tiny_flexmoe("llama", ["math", "code"]), random_tokens(2, 9)
    adapted = with_adapter(model)
    with torch.no_grad():
        before = adapted(tokens_BL).logits
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    written = adapted.generate(input_ids=tokens_BL, **options)
    assert written.shape == (2, 13)
    with pytest.raises(ValueError, match="adapter"):
        model.save_expert("math", tmp_path / "wrapped")

    merged = adapted.merge_and_unload()
    with torch.no_grad():
        logits = merged(tokens_BL).logits
    torch.testing.assert_close(logits, before, **TOLERANCES[torch.float32])
    assert torch.equal(merged.generate(input_ids=tokens_BL, **options), written)

    clean = tiny_flexmoe("llama", ["code"])
    clean.add_expert(merged.save_expert("math", tmp_path / "package"))
    merged.remove_expert("code")
    clean.remove_expert("code")  # the order of experts is that of their coming, and sums follow it
    with torch.no_grad():
        assert torch.equal(clean(tokens_BL).logits, merged(tokens_BL).logits)
