"""A choice of experts reaches every way in, or is refused there. `EXCLUDED` holds NaN: if it ran, it would show."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation import ContinuousBatchingConfig

from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import random_tokens, tiny_flexmoe
from tests.support.words import word_tokenizer

EXCLUDED = "math"
ALLOWED = ["public", "code"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
BATCHED = GenerationConfig(**{**SETTINGS, "eos_token_id": -1})
IDS = random_tokens(2, 5, seed=3)


@pytest.fixture(scope="module")
def model() -> FlexMoeForCausalLM:
    model = tiny_flexmoe("llama", [EXCLUDED, "code"])
    with torch.no_grad():
        for block in model.flexmoe_blocks():
            for parameter in block.experts[EXCLUDED].parameters():
                parameter.fill_(float("nan"))
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="module")
def reference(model: FlexMoeForCausalLM) -> torch.Tensor:
    """The tokens that the allowed experts generate."""
    with model.only_experts(*ALLOWED):
        return model.generate(IDS, **SETTINGS)


class TestForward:
    @pytest.mark.promise(
        "`model(...)`",
        "`experts=[...]`, or one list per row",
        "works; `None` for a row allows all",
    )
    def test_names(self, model):
        with model.only_experts(*ALLOWED):
            expected = model(IDS).logits
        assert torch.equal(model(IDS, experts=ALLOWED).logits, expected)
        assert torch.equal(model(IDS, experts=[ALLOWED, ["code", "public"]]).logits, expected)
        assert model(IDS, experts=[ALLOWED, None]).logits.isnan().flatten(1).any(-1).tolist() == [False, True]

    def test_with_a_mask_both_apply(self, model):
        mask = model.expert_mask([["public", EXCLUDED], ["public"]])
        both = model(IDS, experts=ALLOWED, expert_mask=mask).logits
        assert torch.equal(both, model(IDS, experts=["public"]).logits)

    @pytest.mark.promise(
        "`model(...)`",
        "a keyword that the model does not use",
        "`TypeError` that names it",
    )
    @pytest.mark.parametrize("keyword", ["expert", "output_router_logit", "num_experts", "guidance"])
    def test_unused_keywords_are_refused(self, model, keyword):
        for cls in (FlexMoeForCausalLM, FlexMoeModel):
            run = model if cls is FlexMoeForCausalLM else FlexMoeModel(model.config)
            with pytest.raises(TypeError, match=rf"does not use \['{keyword}'\]"):
                run(IDS, **{keyword: 1})

    def test_keywords_of_the_library_are_used(self, model):
        out = model(IDS, experts=ALLOWED, output_hidden_states=True, num_items_in_batch=3, use_cache=False)
        assert len(out.hidden_states) == 3


class TestGenerate:
    @pytest.mark.promise(
        "`generate`",
        "`experts` as an argument or in a `GenerationConfig`",
        "works; the argument is preferred",
    )
    @pytest.mark.parametrize("call", ["argument", "config", "the model's config", "positional config"])
    def test_of_generate_and_its_config(self, model, reference, call):
        config = GenerationConfig(**SETTINGS, experts=ALLOWED)
        if call == "argument":
            ids = model.generate(IDS, experts=ALLOWED, **SETTINGS)
        elif call == "the model's config":
            before, model.generation_config = model.generation_config, config
            ids = model.generate(IDS)
            model.generation_config = before
        else:
            ids = (
                model.generate(IDS, config) if "positional" in call else model.generate(IDS, generation_config=config)
            )
        assert torch.equal(ids, reference)

    def test_an_argument_is_preferred_to_the_config(self, model):
        config = GenerationConfig(**SETTINGS, experts=ALLOWED)
        with model.only_experts("public"):
            expected = model.generate(IDS, **SETTINGS)
        assert torch.equal(model.generate(IDS, config, experts=["public"]), expected)

    @pytest.mark.promise(
        "`generate`",
        "experts with guidance, negative prompts, beams, sampling, a static cache, prompt lookup",
        "every pass uses them",
    )
    @pytest.mark.parametrize(
        "settings",
        [
            {"guidance_scale": 1.5},
            {"guidance_scale": 1.5, "negative_prompt_ids": IDS},
            {"num_beams": 2},
            {"do_sample": True, "num_return_sequences": 2},
            {"cache_implementation": "static"},
            {"prompt_lookup_num_tokens": 2},
        ],
        ids=str,
    )
    def test_every_pass_uses_the_choice(self, model, settings):
        prompts = IDS[:1] if "prompt_lookup_num_tokens" in settings else IDS
        results = []
        for choose in ("names", "lists", "scope"):
            torch.manual_seed(0)
            given = {"names": ALLOWED, "lists": [ALLOWED] * len(prompts)}.get(choose)
            if choose == "scope":
                with model.only_experts(*ALLOWED):
                    results.append(model.generate(prompts, **{**SETTINGS, **settings}))
            else:
                results.append(model.generate(prompts, experts=given, **{**SETTINGS, **settings}))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.promise(
        "`generate(assistant_model=...)`",
        "a FlexMoE assistant with other experts",
        "works; the choice is the main model's, whose output the assistant does not change",
    )
    def test_an_assistant_with_other_experts(self, model, reference):
        assistant = tiny_flexmoe("llama", ["law"])
        ids = model.generate(IDS[:1], experts=ALLOWED, assistant_model=assistant, **SETTINGS)
        assert torch.equal(ids, reference[:1])

    @pytest.mark.promise(
        "`generate`",
        "`output_router_logits=True` with `return_dict_in_generate=True`",
        "`router_logits`, one entry per forward pass",
    )
    def test_router_logits(self, model):
        out = model.generate(IDS, experts=ALLOWED, output_router_logits=True, return_dict_in_generate=True, **SETTINGS)
        assert [len(step) for step in out.router_logits] == [2] * 4
        assert [tuple(step[0].shape) for step in out.router_logits] == [(10, 3), (2, 3), (2, 3), (2, 3)]
        assert out.router_logits[0][0][:, 1].isneginf().all()


class TestThreads:
    @pytest.mark.promise(
        "`threading.Thread`, executors",
        "`only_experts` around them",
        "`RuntimeError`, unless the thread runs in a copy of the context or passes `experts`",
    )
    def test_a_scope_that_a_thread_does_not_inherit_is_refused(self, model, reference):
        with model.only_experts(*ALLOWED), ThreadPoolExecutor(1) as pool:
            for call in (lambda: model.generate(IDS, **SETTINGS), lambda: model(IDS)):
                with pytest.raises(RuntimeError, match=r"threads do not inherit it.*experts=\[\.\.\.\]"):
                    pool.submit(call).result()
            generate = lambda **more: model.generate(IDS, **more, **SETTINGS)  # noqa: E731
            assert torch.equal(pool.submit(generate, experts=ALLOWED).result(), reference)
            assert torch.equal(pool.submit(contextvars.copy_context().run, generate).result(), reference)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: model(IDS).logits).result().isnan().any()  # no scope: all experts

    @pytest.mark.promise(
        "`TextIteratorStreamer`",
        "`generate(experts=...)` in a thread",
        "works",
    )
    def test_a_streamer_in_a_thread(self, model, reference):
        tokenizer = word_tokenizer()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"experts": ALLOWED, "streamer": streamer, **SETTINGS}
        thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=options)
        thread.start()
        assert "".join(streamer).split() == tokenizer.decode(reference[0, 5:]).split()
        thread.join()


@pytest.mark.promise(
    "`model.anchor(...)`, `model.get_decoder()(...)`",
    "the active set of the config",
    "works; scopes and `experts` belong to calls of the model",
)
def test_the_active_set_reaches_the_parts_of_a_model(model):
    model.set_active_experts(ALLOWED)
    try:
        expected = model(IDS, output_hidden_states=True)
        assert torch.equal(model.anchor(IDS).logits, expected.logits)
        assert torch.equal(model.get_decoder()(IDS).last_hidden_state, expected.hidden_states[-1])
    finally:
        model.set_active_experts(None)


class TestContinuousBatching:
    def tokens(self, outputs: dict[str, Any]) -> list[list[int]]:
        return [out.generated_tokens for out in outputs.values()]

    @pytest.mark.promise(
        "`generate_batch`, paged `generate`",
        "`experts` as an argument, in the config or as a scope; one list per prompt",
        "works; prompts of one set run together",
    )
    @pytest.mark.parametrize("call", ["argument", "scope", "config", "one list per prompt", "paged"])
    def test_the_choice_reaches_it(self, model, reference, call):
        expected = reference[:, 5:].tolist()
        if call == "paged":
            out = model.generate(
                IDS, experts=ALLOWED, cache_implementation="paged", continuous_batching_config=SMALL, **SETTINGS
            )
            assert out[0, :, 5:].tolist() == expected
            return
        config = GenerationConfig(**BATCHED.to_diff_dict(), experts=ALLOWED) if call == "config" else BATCHED
        experts = {"argument": ALLOWED, "one list per prompt": [ALLOWED, ["public"]]}.get(call)
        if call == "scope":
            with model.only_experts(*ALLOWED):
                outputs = model.generate_batch(IDS.tolist(), config, SMALL)
        else:
            outputs = model.generate_batch(IDS.tolist(), config, SMALL, experts=experts)
        if call == "one list per prompt":
            expected[1] = model.generate(IDS[1:], experts=["public"], **SETTINGS)[0, 5:].tolist()
        assert self.tokens(outputs) == expected
        assert list(outputs) == [out.request_id for out in outputs.values()] == ["req_0", "req_1"]

    def test_the_argument_is_preferred_to_the_generation_config(self, model, reference):
        config = GenerationConfig(**BATCHED.to_diff_dict(), experts=["public"])
        outputs = model.generate_batch(IDS.tolist(), config, SMALL, experts=ALLOWED)
        assert self.tokens(outputs) == reference[:, 5:].tolist()
        each = model.generate_batch(
            IDS.tolist(), generation_config=config, continuous_batching_config=SMALL, experts=[ALLOWED, None]
        )
        assert self.tokens(each)[0] == reference[0, 5:].tolist()
        assert config.experts == ["public"]

    @pytest.mark.promise(
        "continuous batching",
        "removing, adding or choosing experts while it runs",
        "`RuntimeError`",
    )
    def test_changes_are_refused_while_a_manager_runs(self):
        model = tiny_flexmoe("llama", ["math"])
        model.set_attn_implementation("sdpa")
        with model.continuous_batching_context_manager(BATCHED, continuous_batching_config=SMALL):
            for change in (lambda: model.remove_expert("math"), lambda: model.set_active_experts(["public"])):
                with pytest.raises(RuntimeError, match="continuous batch"):
                    change()
        model.remove_expert("math")

    @pytest.mark.promise(
        "continuous batching",
        "a persistent manager with another choice of experts",
        "a new manager, as the cache holds the influence of others",
    )
    def test_a_persistent_manager_is_not_shared_by_other_experts(self, model):
        first = model.generate_batch(IDS.tolist(), BATCHED, SMALL, experts=["public"], persistent_manager=True)
        second = model.generate_batch(IDS.tolist(), BATCHED, SMALL, experts=ALLOWED, persistent_manager=True)
        again = model.generate_batch(IDS.tolist(), BATCHED, SMALL, experts=["public"])
        model.destroy_cached_continuous_batching_manager()
        assert self.tokens(first) == self.tokens(again) != self.tokens(second)

    @pytest.mark.promise(
        "continuous batching",
        "`expert_mask`, `num_experts_per_tok`, `add_request(experts=...)`, padding",
        "refused with the reason",
    )
    def test_unused_arguments_are_refused(self, model):
        with pytest.raises(TypeError, match=r"does not use \['expert_mask'\]"):
            model.generate_batch(IDS.tolist(), BATCHED, SMALL, expert_mask=model.expert_mask([ALLOWED] * 2))
        with pytest.raises(ValueError, match="expert_mask does not reach"):
            model.generate(IDS, cache_implementation="paged", expert_mask=model.expert_mask([ALLOWED] * 2), **SETTINGS)
        manager = model.init_continuous_batching(BATCHED, SMALL, experts=ALLOWED)
        with pytest.raises(TypeError, match="one set of experts"):
            manager.add_request([5], experts=["public"])


@pytest.mark.promise(
    "`pipeline`",
    "`experts` in a call",
    "works",
)
def test_pipeline(model, reference):
    tokenizer = word_tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate(tokenizer.decode(IDS[0]), experts=ALLOWED, return_full_text=False, **SETTINGS)
    assert text[0]["generated_text"].split() == tokenizer.decode(reference[0, 5:]).split()


HEADS: dict[str, tuple[Any, Callable[[Any], torch.Tensor], torch.Tensor]] = {
    "sequence": (AutoModelForSequenceClassification, lambda out: out.logits, torch.tensor([0, 2])),
    "token": (AutoModelForTokenClassification, lambda out: out.logits, torch.tensor([[0, 1, 2, -100, 1]] * 2)),
}


class TestClassification:
    @pytest.mark.promise(
        "`AutoModelForSequenceClassification`, `AutoModelForTokenClassification`",
        "training and loading with a choice of experts",
        "works, with the package imported",
    )
    @pytest.mark.parametrize("kind", HEADS)
    def test_from_a_checkpoint(self, model, tmp_path, kind):
        auto, _, labels = HEADS[kind]
        model.save_pretrained(tmp_path)
        classifier = auto.from_pretrained(tmp_path, num_labels=3).eval()
        out = classifier(IDS, labels=labels, experts=ALLOWED)
        out.loss.backward()
        assert out.logits.shape == ((2, 3) if kind == "sequence" else (2, 5, 3))
        assert classifier(IDS).logits.isnan().any()
        classifier.save_pretrained(tmp_path / "tuned")
        again = auto.from_pretrained(tmp_path / "tuned").eval()
        assert torch.equal(again(IDS, experts=ALLOWED).logits, out.logits)
        hidden = AutoModel.from_pretrained(tmp_path).eval()(IDS, experts=ALLOWED).last_hidden_state
        scores = torch.nn.functional.linear(hidden, classifier.score.weight, classifier.score.bias)
        assert torch.equal(scores if kind == "token" else scores[:, -1], out.logits)

    def test_the_last_token_that_is_not_padding(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
        classifier.config.pad_token_id = 0
        short = classifier(IDS[:1, :3], experts=ALLOWED).logits
        padded = torch.cat([IDS[:1, :3], torch.zeros(1, 2, dtype=torch.long)], -1)
        torch.testing.assert_close(classifier(padded, experts=ALLOWED).logits, short)

    def test_router_losses_count(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
        plain = classifier(IDS, labels=torch.tensor([0, 1]), experts=ALLOWED).loss
        classifier.config.router_aux_loss_coef = 1.0
        more = classifier(IDS, labels=torch.tensor([0, 1]), experts=ALLOWED, output_router_logits=True).loss
        assert more > plain


def test_signatures_have_the_choice(model):
    for method in (model.forward, model.generate, model.generate_batch, model.init_continuous_batching):
        assert "experts" in inspect.signature(method).parameters
