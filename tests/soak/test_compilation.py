"""Compiled models give the outputs of the uncompiled model. Not in `make test`, because compiling takes minutes.

Does not cover graph breaks (`modeling/test_forward.py`) and export (`modeling/test_library.py`).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe

OWNERS = ("math", {"name": "code", "kind": "low_rank", "rank": [3, 4], "alpha": 6.0}, "legal")
families = pytest.mark.parametrize("family", ["llama", "phi3"])  # low-rank experts share products, or not


def model_of(family):
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=2)
    model.generation_config.eos_token_id = None
    return model


@families
@torch.no_grad()
def test_compiled_flex_attention_equals_eager(family, tmp_path):
    model, tokens = model_of(family), random_tokens(2, 9)
    model.save_pretrained(tmp_path)
    flex_attention = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flex_attention")
    model.set_attn_implementation("eager")
    torch.testing.assert_close(flex_attention(tokens).logits, model(tokens).logits, **TOLERANCES[torch.float32])


@families
def test_compiled_generation_with_a_static_cache(family):
    model, tokens = model_of(family), random_tokens(2, 9)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(tokens, **options)
    compile_config = CompileConfig()
    compile_config._compile_all_devices = True
    for _ in range(2):
        compiled = model.generate(tokens, cache_implementation="static", compile_config=compile_config, **options)
        torch.testing.assert_close(
            torch.stack(compiled.logits), torch.stack(expected.logits), **TOLERANCES[torch.float32]
        )
        model.remove_expert("math" if "math" in model.expert_names else "legal")
        expected = model.generate(tokens, **options)


@families
def test_continuous_batching_equals_generate(family):
    model, rows = model_of(family), [random_tokens(1, length, seed=length)[0] for length in (9, 5, 12)]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    answers = model.generate_batch([row.tolist() for row in rows], generation_config=settings)
    generated = {tuple(answer.prompt_ids): list(answer.generated_tokens) for answer in answers.values()}
    for row in rows:
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=6, do_sample=False)
        assert generated[tuple(row.tolist())] == alone[0, len(row) :].tolist()


@families
def test_gradients_of_the_compiled_model(family):
    model, tokens = model_of(family), random_tokens(2, 9)
    model.freeze_except("math", "code")
    gradients = []
    for callee in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        callee(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
