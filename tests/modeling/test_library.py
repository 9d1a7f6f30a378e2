"""Features that transformers offers for any causal LM: attention, embeddings, dtypes, outputs, `torch.export`.

Two anchors: one whose routing weights are renormalized, and one whose are not. Does not cover generation
(`test_decoding`, `test_generation`), devices (`test_devices`) and training (`test_trainer`).
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, VOCABULARY, random_tokens, tiny_anchor, tiny_flexmoe
from tests.support.soak import thinned

OWNERS = ("math", "code", "legal")
TOKENS = random_tokens(2, 9)
families = pytest.mark.parametrize("family", ["llama", "olmo2"])


def model_of(family: str) -> FlexMoeForCausalLM:
    return tiny_flexmoe(family, OWNERS, num_experts_per_tok=2)


@torch.no_grad()
def logits(model, tokens=TOKENS, **kwargs):
    return model(tokens, **kwargs).logits


@families
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_implementations_equal_eager(family, attention, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    eager, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name) for name in ("eager", attention)
    )
    used = {module.config._attn_implementation for module in other.modules() if hasattr(module, "config")}
    assert used == {attention}
    padded = torch.nn.functional.pad(TOKENS, (2, 0), value=0)
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes minutes (tests/soak)
        for tokens in (TOKENS, padded):
            mask = (tokens != 0).long()
            expected, got = (logits(model, tokens, attention_mask=mask)[mask.bool()] for model in (eager, other))
            torch.testing.assert_close(got, expected, **TOLERANCES[torch.float32])


@families
def test_hidden_states_and_attentions_equal_those_of_the_anchor(family):
    anchor, model = tiny_anchor(family), tiny_flexmoe(family)
    for dense in (anchor, model):
        dense.set_attn_implementation("eager")
    outputs = {"output_hidden_states": True, "output_attentions": True}
    theirs, ours = anchor(TOKENS, **outputs), model(TOKENS, **outputs)
    assert [x.shape for x in ours.hidden_states] == [(2, 9, 32)] * 3
    assert [x.shape for x in ours.attentions] == [(2, 4, 9, 9)] * 2
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(our, their) for our, their in zip(ours[name], theirs[name], strict=True))


@families
def test_logits_to_keep(family):
    model, all_logits = model_of(family), logits(model_of(family))
    torch.testing.assert_close(logits(model, logits_to_keep=3), all_logits[:, -3:], **TOLERANCES[torch.float32])
    some = torch.tensor([0, 5])
    torch.testing.assert_close(logits(model, logits_to_keep=some), all_logits[:, some], **TOLERANCES[torch.float32])


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    from_config = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    for each in (half, from_config):
        dtypes = {".router." in name: parameter.dtype for name, parameter in each.named_parameters()}
        assert dtypes == {True: torch.float32, False: dtype}
    # the weights are rounded, too, not only the products
    torch.testing.assert_close(logits(half).float(), logits(model), rtol=0.1, atol=0.05)
    half(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {dtype, torch.float32}
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


def with_tied_head(family: str, experts: tuple[str, ...] = OWNERS) -> FlexMoeForCausalLM:
    config = ANCHOR_CONFIGS[family]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=["public", *experts])).eval()


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
def test_tied_head_is_kept(family, tmp_path):
    model = with_tied_head(family)
    assert model.config.tie_word_embeddings
    model.resize_token_embeddings(VOCABULARY + 5)
    model.remove_expert("math")
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    torch.testing.assert_close(logits(loaded), logits(model), **TOLERANCES[torch.float32])


@families
@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 9])
def test_resized_embeddings(family, size, tmp_path):
    model = model_of(family)
    tokens = TOKENS.clamp(max=size - 1)
    before = logits(model, tokens)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.config.anchor_config.vocab_size == size
    after = logits(model, tokens)
    kept = min(size, VOCABULARY)
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept], **TOLERANCES[torch.float32])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), after, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("family", thinned(["llama", "olmo2"], ["olmo2"]))
def test_export_with_dynamic_shapes(family):
    model = tiny_flexmoe(family, ["math"], num_experts_per_tok=1)
    mask = model.expert_mask([["public", "math"], ["math"]])
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "expert_mask": mask, "use_cache": False}
    shapes = {"input_ids": dynamic, "attention_mask": dynamic, "expert_mask": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(model, (), example, dynamic_shapes={**shapes, "use_cache": None}).module()
    for tokens, rows in ((TOKENS, [0, 1]), (random_tokens(3, 14), [1, 0, 1])):
        inputs = {"attention_mask": torch.ones_like(tokens), "expert_mask": mask[rows], "use_cache": False}
        torch.testing.assert_close(
            exported(input_ids=tokens, **inputs).logits.detach(),
            logits(model, tokens, **inputs),
            **TOLERANCES[torch.float32],
        )
