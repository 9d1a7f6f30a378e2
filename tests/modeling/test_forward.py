"""The forward pass: k, masks, `only_experts`, outputs, losses, gradient checkpointing, threads, compilation."""

import itertools
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import (
    ANCHOR_CONFIGS,
    TOLERANCES,
    enable_checkpointing,
    flexmoe_from_anchor,
    random_tokens,
    tiny_flexmoe,
)
from tests.support.soak import thinned

OWNERS = ("math", "code", "legal")


@torch.no_grad()
def logits(model, tokens=None, **kwargs):
    return model(random_tokens(2, 9) if tokens is None else tokens, **kwargs).logits


@pytest.fixture
def model() -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)


class TestActiveExpertsPerToken:
    def test_argument_overrides_the_config_for_one_call(self, model):
        by_config = logits(model)
        by_call = logits(model, num_experts_per_tok=1)
        assert not torch.equal(by_call, by_config)
        model.config.num_experts_per_tok = 1
        assert torch.equal(logits(model), by_call)
        assert torch.equal(logits(model, num_experts_per_tok=2), by_config)

    def test_renormalization_follows_the_config(self, model):
        renormalized = logits(model)
        model.config.norm_topk_prob = False
        assert not torch.equal(logits(model), renormalized)

    def test_k_above_the_number_of_experts_is_clamped_and_kept_in_the_config(self, model):
        model.config.num_experts_per_tok = 50
        assert torch.equal(logits(model), logits(model, num_experts_per_tok=4))
        assert model.config.num_experts_per_tok == 50


class TestOnlyExperts:
    def test_rename_inside_the_context_changes_nothing(self, model):
        with model.only_experts("public", "math"):
            before = logits(model)
            model.rename_expert("math", "algebra")
            assert torch.equal(logits(model), before)

    def test_order_of_active_experts_does_not_matter(self, model):
        model.config.active_experts = ["code", "public", "math"]  # as in a config.json written by hand
        out = model(random_tokens(2, 9), output_router_logits=True)
        assert out.router_logits[0][:, 3].isneginf().all()
        model.set_active_experts(["public", "math", "code"])
        again = model(random_tokens(2, 9), output_router_logits=True)
        assert torch.equal(out.logits, again.logits)
        assert torch.equal(out.router_logits[0], again.router_logits[0])

    def test_nested_contexts_are_intersected(self, model):
        with model.only_experts("public", "math"):
            outer = logits(model)
            with model.only_experts("math", "code"):
                inner = logits(model)
            assert torch.equal(logits(model), outer)
        with model.only_experts("math"):
            assert torch.equal(logits(model), inner)

    def test_context_applies_to_its_own_model_only(self, model):
        other = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)
        unrestricted = logits(other)
        with model.only_experts("math"):
            assert torch.equal(logits(other), unrestricted)

    def test_context_that_excludes_all_active_experts(self, model):
        model.set_active_experts(["public"])
        with model.only_experts("math"), pytest.raises(ValueError, match="No expert is allowed"):
            logits(model)

    @pytest.mark.parametrize("names", [(), ("unknown",)])
    def test_invalid_names(self, model, names):
        for call in (lambda: model.only_experts(*names), lambda: model.set_active_experts(list(names))):
            with pytest.raises(ValueError, match=r"name at least one|does not have"):
                call()

    def test_threads_are_independent(self, model):
        sets = [("public",), ("math",), ("code", "legal"), ("public", "legal")]
        expected = []
        for names in sets:
            with model.only_experts(*names):
                expected.append(logits(model))
        failed = []

        def run(i):
            for _ in range(25):
                with model.only_experts(*sets[i]):
                    if not torch.equal(logits(model), expected[i]):
                        failed.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []


class TestOutputs:
    def test_router_logits_have_a_column_for_each_expert(self, model):
        with model.only_experts("public", "legal"), torch.no_grad():
            out = model(random_tokens(2, 9), output_router_logits=True)
        assert len(out.router_logits) == 2
        for layer in out.router_logits:
            assert layer.shape == (18, 4)
            assert (layer[:, 1:3] == -float("inf")).all()
            assert layer[:, [0, 3]].isfinite().all()
        assert out.aux_loss.isfinite()
        assert out.z_loss.isfinite()

    def test_coefficients_scale_the_auxiliary_losses(self, model):
        tokens = random_tokens(2, 9)
        without = model(tokens, labels=tokens, output_router_logits=True)
        model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 0.5, 0.25
        out = model(tokens, labels=tokens, output_router_logits=True)
        torch.testing.assert_close(out.loss, without.loss + 0.5 * out.aux_loss + 0.25 * out.z_loss)
        assert model(tokens, labels=tokens).aux_loss is None

    def test_return_dict_false(self, model):
        out = model(random_tokens(2, 9), return_dict=False)
        assert isinstance(out, tuple)
        assert torch.equal(out[0], model(random_tokens(2, 9)).logits)

    def test_hidden_states_and_inputs_embeds(self, model):
        tokens = random_tokens(2, 9)
        out = model(inputs_embeds=model.get_input_embeddings()(tokens), output_hidden_states=True, logits_to_keep=1)
        assert len(out.hidden_states) == 3
        torch.testing.assert_close(out.logits[:, 0], logits(model)[:, -1], **TOLERANCES[torch.float32])

    def test_flexmoe_model_gives_the_hidden_states_of_the_causal_lm(self, model):
        decoder = FlexMoeModel(model.config)
        decoder.load_state_dict({k: v for k, v in model.state_dict().items() if "lm_head" not in k})
        tokens = random_tokens(2, 9)
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(decoder.eval()(tokens).last_hidden_state, hidden)


def gradients(model: nn.Module, tokens: torch.Tensor, **kwargs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, output_router_logits=True, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestTraining:
    def test_freeze_except(self, model):
        model.freeze_except("math")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name in dict(model.named_parameters()) if ".math." in name}
        model.freeze_except("math", rows=False)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name in dict(model.named_parameters()) if ".experts.math." in name}

    def test_trained_expert_without_tokens_has_zero_gradients(self, model):
        model.freeze_except("math")
        for block in model.flexmoe_blocks():
            block.router["math"].bias.data.fill_(-1e4)
        grads = gradients(model, random_tokens(2, 9))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(grads)
        assert all(not gradient.any() for gradient in grads.values())

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_checkpointing_recomputes_with_the_mask_and_k_of_the_forward_pass(self, model, k):
        tokens = random_tokens(2, 9)
        model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.1
        mask = model.expert_mask([["public", "math"], ["code", "legal"]])
        expected = gradients(model, tokens, expert_mask=mask, num_experts_per_tok=k)
        enable_checkpointing(model)
        checkpointed = gradients(model, tokens, expert_mask=mask, num_experts_per_tok=k)
        assert expected.keys() == checkpointed.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    def test_two_forward_passes_with_different_masks_and_one_backward(self, model):
        enable_checkpointing(model)
        tokens = random_tokens(2, 9)
        first, second = (gradients(model, tokens, expert_mask=model.expert_mask([s, s])) for s in (["math"], ["code"]))
        model.zero_grad()
        masks = [model.expert_mask([s, s]) for s in (["math"], ["code"])]
        sum(model(tokens, labels=tokens, expert_mask=mask).loss for mask in masks).backward()
        both = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in both.items():
            parts = [part[name] for part in (first, second) if name in part]
            torch.testing.assert_close(gradient, sum(parts), msg=name)

    def test_reentrant_checkpointing_is_refused(self, model):
        with pytest.raises(ValueError, match="use_reentrant"):
            enable_checkpointing(model, use_reentrant=True)

    def test_router_is_float32_under_autocast(self, model):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            out = model(random_tokens(2, 9), output_router_logits=True)
        assert all(layer.dtype == torch.float32 for layer in out.router_logits)


@pytest.fixture
def shallow() -> FlexMoeForCausalLM:
    """`model` with one layer: torch.compile traces each layer, which takes seconds."""
    torch._dynamo.reset()  # its limit counts what other tests compiled
    config = ANCHOR_CONFIGS["llama"]()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    anchor = AutoModelForCausalLM.from_config(config).eval()
    return flexmoe_from_anchor(anchor, OWNERS, num_experts_per_tok=2)


@pytest.mark.parametrize("masked", thinned([False, True], [True]))  # below, it is compiled without a mask
def test_model_compiles_without_graph_breaks(shallow, masked):
    tokens, kwargs = random_tokens(2, 9), {}
    if masked:  # no token may use "legal", which holds NaN
        kwargs["expert_mask"] = shallow.expert_mask([["public", "math"], ["code"]])
        for parameter in shallow.flexmoe_blocks()[0].experts["legal"].parameters():
            parameter.data.fill_(float("nan"))
    expected = logits(shallow, tokens, **kwargs)
    assert expected.isfinite().all()
    compiled = torch.compile(shallow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens, **kwargs), expected, **TOLERANCES[torch.float32])


def test_compiled_model_follows_the_active_set_and_refuses_only_experts(shallow):
    model = shallow
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    all_experts = logits(compiled)
    model.set_active_experts(["public", "code"])
    torch.testing.assert_close(logits(compiled), logits(model), **TOLERANCES[torch.float32])
    assert not torch.allclose(logits(compiled), all_experts)
    with model.only_experts("code"), pytest.raises(Exception, match="cannot see the contexts"):
        logits(compiled)


@pytest.mark.promise(
    "`torch.compile`",
    "`fullgraph=True` with another `expert_mask` per call",
    "compiled once; each list of `experts` or active set is compiled for itself, up to torch's `recompile_limit`",
)
def test_masks_do_not_compile_again_and_active_sets_do(shallow):
    counter = CompileCounter()
    compiled = torch.compile(shallow, fullgraph=True, backend=counter)
    chosen = [list(names) for n in (1, 2, 3) for names in itertools.combinations(shallow.expert_names, n)]
    assert len(chosen) > torch._dynamo.config.recompile_limit
    for names in chosen:
        got = logits(compiled, expert_mask=shallow.expert_mask([names, ["public"]]))
        torch.testing.assert_close(got, logits(shallow, experts=[names, ["public"]]), **TOLERANCES[torch.float32])
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(recompile_limit=2):
        logits(compiled, experts=["public", "code"])
        shallow.set_active_experts(["public", "code"])
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            logits(compiled)
